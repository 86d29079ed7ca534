// Every op, compiled for AVX-512 (F, BW, VL, DQ, VNNI, BF16).
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

#define KVS_HAS_BF16_DOT 1
#define KVS_HAS_TILE_DOT 0
KVS_TARGET_REGION("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
namespace kvselect::cpu {
namespace avx512_bf16 {
namespace {

#include "cpu/vec_avx512.h"
#include "cpu/vec_avx512_bf16.h"
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace avx512_bf16
}  // namespace kvselect::cpu
KVS_UNTARGET_REGION

namespace kvselect::cpu {

const Implementation& avx512_bf16_implementation() {
    static constexpr Implementation implementation{"avx512_bf16",
                                                   nullptr,
                                                   avx512_bf16::kv_append,
                                                   avx512_bf16::score_tokens,
                                                   avx512_bf16::select_tokens,
                                                   avx512_bf16::sparse_attention,
                                                   avx512_bf16::merge_splits,
                                                   avx512_bf16::recovered_mass,
                                                   avx512_bf16::selection_cache_step,
                                                   avx512_bf16::rolling_sweep,
                                                   avx512_bf16::block_sparse_attention,
                                                   avx512_bf16::block_mass,
                                                   avx512_bf16::list_blocks,
                                                   avx512_bf16::gather_tokens};
    return implementation;
}

}  // namespace kvselect::cpu
