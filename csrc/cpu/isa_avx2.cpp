// Every op, compiled for AVX2 + FMA + F16C.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/element_types.h"
#include "cpu/target_region.h"

#define KVS_HAS_BF16_DOT 0
#define KVS_HAS_TILE_DOT 0
#define KVS_HAS_AVX_VNNI 0
KVS_TARGET_REGION("avx2,fma,f16c")
namespace kvselect::cpu {
namespace avx2 {
namespace {

#include "cpu/vec_avx2.h"
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace avx2
}  // namespace kvselect::cpu
KVS_UNTARGET_REGION

namespace kvselect::cpu {

const Implementation& avx2_implementation() {
    static constexpr Implementation implementation{"avx2",
                                                   nullptr,
                                                   avx2::kv_append,
                                                   avx2::score_tokens,
                                                   avx2::select_tokens,
                                                   avx2::sparse_attention,
                                                   avx2::merge_splits,
                                                   avx2::recovered_mass,
                                                   avx2::selection_cache_step,
                                                   avx2::rolling_sweep,
                                                   avx2::block_sparse_attention,
                                                   avx2::block_mass,
                                                   avx2::list_blocks,
                                                   avx2::gather_tokens};
    return implementation;
}

}  // namespace kvselect::cpu
