// What a mask keeps for a block of queries: marked in a bitmap, so that neither order nor
// repetition of what it lists matters.
#pragma once

#include "cuda/device/block_tiles.cuh"

namespace kvselect::cuda {

constexpr int kWindowWords = 128, kWindowBlocks = 32 * kWindowWords;

// Some queries of one item.
struct Work {
    int item;  // (row, q head, q block)
    int block;
    int begin, size;
    BlockQueries queries;
};

// Who marks together.
struct BlockTeam {
    static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
    static __device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
    static __device__ __forceinline__ void meet() { __syncthreads(); }
};
struct WarpTeam {
    static __device__ __forceinline__ int thread() {
        return static_cast<int>(threadIdx.x) % kWarpSize;
    }
    static __device__ __forceinline__ int threads() { return kWarpSize; }
    static __device__ __forceinline__ void meet() { __syncwarp(); }
};

// Marks which of the item's KV blocks from `window` on are kept, a bit each.
template <typename Team>
__device__ __forceinline__ void mark_window(const BlockMask& mask, const Work& work, int kv_blocks,
                                            int window, uint32_t* bits) {
    const int threads = Team::threads(), thread = Team::thread();
    const int rest = kv_blocks - window, count = rest < kWindowBlocks ? rest : kWindowBlocks;
    const int words = (count + 31) / 32;
    const int64_t at = work.queries.row * mask.strides[0] + work.queries.head * mask.strides[1] +
                       work.block * mask.strides[2];
    Team::meet();  // nobody reads the one before any more
    if (mask.form == MaskForm::kDense) {
        const uint8_t* kept = mask.dense + at + window * mask.strides[3];
        const int lane = thread % kWarpSize;
        for (int i = thread / kWarpSize; i < words; i += threads / kWarpSize) {
            const int block = 32 * i + lane;
            const bool is_kept = block < count && kept[block * mask.strides[3]] != 0;
            const unsigned word = __ballot_sync(kAllLanes, is_kept);
            if (lane == 0) bits[i] = word;
        }
    } else {
        for (int i = thread; i < words; i += threads) bits[i] = 0;
        Team::meet();
        // Entries that are no block, and offsets outside the list, are not the host's to find.
        const bool csr = mask.form == MaskForm::kCsr;
        const auto clipped = [&](int64_t offset) {
            return offset < 0 ? 0 : (offset < mask.width ? offset : mask.width);
        };
        const int64_t begin = csr ? clipped(mask.row_offsets[work.item]) : 0;
        const int64_t end = csr ? clipped(mask.row_offsets[work.item + 1]) : mask.width;
        const int32_t* list = mask.indices + (csr ? 0 : at);
        const int64_t step = csr ? 1 : mask.strides[3];
        for (int64_t i = begin + thread; i < end; i += threads) {
            const int64_t block = int64_t{list[i * step]} - window;
            if (block >= 0 && block < count)
                atomicOr(&bits[block / 32], 1u << static_cast<unsigned>(block % 32));
        }
    }
    Team::meet();
}

}  // namespace kvselect::cuda
