// list_blocks: the tokens of chosen blocks and of a window of blocks, as one ascending list.
//
// Problem  indices = the positions, in order, of all tokens of the blocks whose flag is set
// Floor    5 bytes per listed token (a flag read, an entry written): 2,048 tokens of 8 KV heads, 80
//          KB, hence latency: one launch instead of some fifteen of torch's operators.
// Plan     One thread block per list. Its candidates, the tokens of all its blocks, are taken
//          kThreads at a time: a ballot numbers those of a warp, shared memory those of the warps.
#include "kvselect/list_blocks.h"

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__global__ void __launch_bounds__(kThreads) list_blocks_kernel(const ListBlocksParams p) {
    __shared__ int32_t listed_by_warp[kWarps];
    const int64_t item = blockIdx.x;
    const int64_t row = item / p.num_lists, list = item % p.num_lists;
    const int64_t batch_row = row / p.num_query_blocks;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();

    const int64_t num_heads = p.num_lists == 1 ? p.num_kv_heads : 1;
    const uint8_t* const finite =
        p.finite + batch_row * p.finite_strides[0] + list * p.finite_strides[1];
    const int32_t* const picked = p.picked + row * p.picked_strides[0] + list * p.picked_strides[1];
    const int64_t first_block = p.first_block[row], end = p.end[row];
    const int64_t start = p.starts ? p.starts[batch_row] : 0;
    int32_t* const indices = p.indices + item * p.width;
    const int64_t num_candidates = (p.num_picked + p.num_window_blocks) * p.block_size;

    int64_t length = 0;  // the same in all threads
    for (int64_t done = 0; done < num_candidates; done += kThreads) {
        const int64_t candidate = done + static_cast<int>(threadIdx.x);
        const int64_t entry = candidate / p.block_size, i = candidate % p.block_size;
        int64_t token = 0;
        bool listed = false;
        if (candidate < num_candidates) {
            const int64_t block =
                entry < p.num_picked ? picked[entry] : first_block + (entry - p.num_picked);
            token = block * p.block_size + i;
            listed = block >= 0 && block < p.num_blocks && token < end;
            for (int64_t head = 0; listed && head < num_heads; ++head)
                listed = finite[head * p.finite_strides[1] + block * p.finite_strides[2] + i] != 0;
        }
        const unsigned votes = __ballot_sync(kAllLanes, listed);
        if (lane == 0) listed_by_warp[warp] = __popc(votes);
        __syncthreads();
        int64_t at = length + __popc(votes & ((1u << lane) - 1u));
        for (int other = 0; other < kWarps; ++other) {
            if (other < warp) at += listed_by_warp[other];
            length += listed_by_warp[other];
        }
        if (listed && at < p.width) indices[at] = static_cast<int32_t>(start + token);
        __syncthreads();
    }
    length = length < p.width ? length : p.width;
    if (threadIdx.x == 0) p.count[item] = static_cast<int32_t>(length);
    for (int64_t at = length + static_cast<int>(threadIdx.x); at < p.width; at += kThreads)
        indices[at] = -1;
}

}  // namespace

void list_blocks(const ListBlocksParams& p, const CudaLaunch& where) {
    launch(where, list_blocks_kernel, p.num_rows * p.num_lists, 1, kThreads, 0, p);
}

}  // namespace kvselect::cuda
