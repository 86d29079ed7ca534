// Every op, compiled for AVX-512 (F, BW, VL, DQ, VNNI, BF16) + AMX (TILE, INT8, BF16).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// GCC 12's own AVX-512 headers trip over their deliberately undefined registers (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "cpu/dispatch.h"
#include "cpu/element_types.h"
#include "cpu/target_region.h"
#include "cpu/tile_config.h"

#define KVS_HAS_BF16_DOT 1
#define KVS_HAS_TILE_DOT 1
KVS_TARGET_REGION(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-"
    "bf16")
namespace kvselect::cpu {
namespace amx {
namespace {

#include "cpu/vec_avx512.h"
#include "cpu/vec_avx512_bf16.h"
#include "cpu/tiles_amx.h"
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace amx
}  // namespace kvselect::cpu
KVS_UNTARGET_REGION

namespace kvselect::cpu {

const Implementation& amx_implementation() {
    static constexpr Implementation implementation{"amx",
                                                   nullptr,
                                                   amx::kv_append,
                                                   amx::score_tokens,
                                                   amx::select_tokens,
                                                   amx::sparse_attention,
                                                   amx::merge_splits,
                                                   amx::recovered_mass,
                                                   amx::selection_cache_step,
                                                   amx::rolling_sweep,
                                                   amx::block_sparse_attention,
                                                   amx::block_mass,
                                                   amx::list_blocks,
                                                   amx::gather_tokens};
    return implementation;
}

}  // namespace kvselect::cpu
