// Every op in portable C++, with a tile unit for the sketch's integer dot products. Tests only.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/dispatch.h"
#include "cpu/element_types.h"
#include "cpu/target_region.h"
#include "cpu/tile_config.h"
#include "tile_implementations.h"
#include "tile_unit.h"

#define KVS_HAS_BF16_DOT 0
#define KVS_HAS_TILE_DOT 1
namespace kvselect::cpu {
namespace scalar_tiles {
namespace {

#include "cpu/vec_scalar.h"
#include "tiles_emulated.h"
inline void store_weights(BFloat16* p, F32 x) { store(p, x); }
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace scalar_tiles
}  // namespace kvselect::cpu

namespace kvselect::test {

const cpu::Implementation& scalar_tiles_implementation() {
    static constexpr cpu::Implementation implementation{"scalar_tiles",
                                                        "for tests",
                                                        cpu::scalar_tiles::kv_append,
                                                        cpu::scalar_tiles::score_tokens,
                                                        cpu::scalar_tiles::select_tokens,
                                                        cpu::scalar_tiles::sparse_attention,
                                                        cpu::scalar_tiles::merge_splits,
                                                        cpu::scalar_tiles::recovered_mass,
                                                        cpu::scalar_tiles::selection_cache_step,
                                                        cpu::scalar_tiles::rolling_sweep,
                                                        cpu::scalar_tiles::block_sparse_attention,
                                                        cpu::scalar_tiles::block_mass,
                                                        cpu::scalar_tiles::list_blocks,
                                                        cpu::scalar_tiles::gather_tokens};
    return implementation;
}

}  // namespace kvselect::test
