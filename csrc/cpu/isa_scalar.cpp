// Every op, compiled for portable C++.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/element_types.h"
#include "cpu/target_region.h"

#define KVS_HAS_BF16_DOT 0
#define KVS_HAS_TILE_DOT 0
namespace kvselect::cpu {
namespace scalar {
namespace {

#include "cpu/vec_scalar.h"
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace scalar
}  // namespace kvselect::cpu

namespace kvselect::cpu {

const Implementation& scalar_implementation() {
    static constexpr Implementation implementation{"scalar",
                                                   nullptr,
                                                   scalar::kv_append,
                                                   scalar::score_tokens,
                                                   scalar::select_tokens,
                                                   scalar::sparse_attention,
                                                   scalar::merge_splits,
                                                   scalar::recovered_mass,
                                                   scalar::selection_cache_step,
                                                   scalar::rolling_sweep,
                                                   scalar::block_sparse_attention,
                                                   scalar::block_mass,
                                                   scalar::list_blocks,
                                                   scalar::gather_tokens};
    return implementation;
}

}  // namespace kvselect::cpu
