// gather_tokens: the keys and values that the lists of query blocks name, side by side in memory.
//
// Problem  row i of list l goes to row cu_seqlens[l] + i; keys are rotated to i on the way where
//          positions are compact
// Floor    4 * head_dim * element size bytes per listed token and KV head (read and written, keys
//          and values): 63 MB for 8 heads of 128 in bf16 and 3840 tokens, of which the half that is
//          written stays in L2 for the kernel that follows: 7 us at 4.3 TB/s for the rest.
// Plan     A thread block copies 64 entries of one list in chunks of 16 bytes; one thread per entry
//          looks its rows up, then neighbouring threads copy neighbouring chunks. Where its list
//          begins, every thread block adds up for itself: a few hundred lengths, from L2. The grid
//          follows the lists' room, lengths are read on the device.
#include "kvselect/gather_tokens.h"

#include "cuda/device/fragments.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpSize, kTileTokens = 64;
static_assert(kTileTokens <= kThreads, "one thread looks one entry up");

template <typename T>
__device__ __forceinline__ uint4 chunk_of_nan() {
    T elements[kElementsPerChunk<T>];
#pragma unroll
    for (int i = 0; i < kElementsPerChunk<T>; ++i) from_float(NAN, &elements[i]);
    uint4 chunk;
    memcpy(&chunk, elements, sizeof chunk);
    return chunk;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_tokens_kernel(const GatherTokensParams p, int64_t tiles_per_list) {
    __shared__ int64_t before_by_warp[kWarps];
    __shared__ int64_t key_at[kTileTokens], value_at[kTileTokens];  // -1: no token
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t number = blockIdx.x / tiles_per_list;
    const int64_t first = blockIdx.x % tiles_per_list * kTileTokens;
    const GatheredList list = gathered_list(p, number);
    if (first > 0 && first >= list.count) return;  // the whole thread block

    int64_t before = 0;
    for (int64_t i = thread; i < number; i += kThreads) before += gathered_list(p, i).count;
    before = reduce_add(before);
    if (thread % kWarpSize == 0) before_by_warp[thread / kWarpSize] = before;
    if (thread < kTileTokens) {
        key_at[thread] = -1;
        if (first + thread < list.count && ends_with_its_block(p, list)) {
            const int64_t position = list.entries[first + thread];
            if (position >= 0 && position < p.blocks.cache_seqlens[list.row]) {
                key_at[thread] = row_offset(p.keys, list.row, position, list.kv_head);
                value_at[thread] = row_offset(p.values, list.row, position, list.kv_head);
            }
        }
    }
    __syncthreads();
    int64_t begin = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) begin += before_by_warp[warp];
    if (first == 0 && thread == 0) {
        p.cu_seqlens[number] = static_cast<int32_t>(begin);
        if (number + 1 == gather_tokens_lists(p))
            p.cu_seqlens[number + 1] = static_cast<int32_t>(begin + list.count);
    }

    const int64_t left = list.count - first;
    const int tokens = static_cast<int>(left < kTileTokens ? left : kTileTokens);
    const int chunks = static_cast<int>(p.head_dim) / kElementsPerChunk<T>;
    const T* const keys = static_cast<const T*>(p.keys.data);
    const T* const values = static_cast<const T*>(p.values.data);
    uint4* const k_out = reinterpret_cast<uint4*>(static_cast<T*>(p.k)) + (begin + first) * chunks;
    uint4* const v_out = reinterpret_cast<uint4*>(static_cast<T*>(p.v)) + (begin + first) * chunks;
#pragma unroll 4
    for (int i = thread; i < tokens * chunks; i += kThreads) {
        const int token = i / chunks, d = i % chunks * kElementsPerChunk<T>;
        uint4 key = chunk_of_nan<T>(), value = make_uint4(0, 0, 0, 0);
        if (key_at[token] >= 0) {
            const T* row = keys + key_at[token];
            key = p.rope.cos ? rotated_chunk(p.rope, row, d, first + token)
                             : *reinterpret_cast<const uint4*>(row + d);
            value = *reinterpret_cast<const uint4*>(values + value_at[token] + d);
        }
        k_out[i] = key;
        v_out[i] = value;
    }
}

}  // namespace

void gather_tokens(const GatherTokensParams& p, const CudaLaunch& where) {
    const int64_t num_lists = gather_tokens_lists(p);
    if (num_lists == 0) {
        KVS_CUDA_CHECK(cudaMemsetAsync(p.cu_seqlens, 0, sizeof(int32_t), where.stream));
        return;
    }
    // Empty lists have an end, too.
    const int64_t tiles = p.width > 0 ? ceil_div(p.width, kTileTokens) : 1;
    with_element_type(p.dtype, [&](auto element) {
        launch(where, gather_tokens_kernel<decltype(element)>, num_lists * tiles, 1, kThreads, 0, p,
               tiles);
    });
}

}  // namespace kvselect::cuda
