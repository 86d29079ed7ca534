// Every op, compiled for AVX2 + FMA + F16C + AVX-VNNI: what CPUs without AVX-512 have had since
// 2021. The sketch's integer dot products take one instruction instead of seven; all else is avx2.
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
#define KVS_HAS_AVX_VNNI 1
KVS_TARGET_REGION("avx2,fma,f16c,avxvnni")
namespace kvselect::cpu {
namespace avx2_vnni {
namespace {

#include "cpu/vec_avx2.h"
#include "cpu/ops-inl.h"

}  // namespace
}  // namespace avx2_vnni
}  // namespace kvselect::cpu
KVS_UNTARGET_REGION

namespace kvselect::cpu {

const Implementation& avx2_vnni_implementation() {
    static constexpr Implementation implementation{"avx2_vnni",
                                                   nullptr,
                                                   avx2_vnni::kv_append,
                                                   avx2_vnni::score_tokens,
                                                   avx2_vnni::select_tokens,
                                                   avx2_vnni::sparse_attention,
                                                   avx2_vnni::merge_splits,
                                                   avx2_vnni::recovered_mass,
                                                   avx2_vnni::selection_cache_step,
                                                   avx2_vnni::rolling_sweep,
                                                   avx2_vnni::block_sparse_attention,
                                                   avx2_vnni::block_mass,
                                                   avx2_vnni::list_blocks,
                                                   avx2_vnni::gather_tokens};
    return implementation;
}

}  // namespace kvselect::cpu
