// The first digit of an exact top-k by counting: which of 4096 bins of keys the border lies in.
// select_tokens counts it itself, or reads what the vote of score_tokens counted on its way.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"
#include "kvselect/ranking.h"

namespace kvselect::cuda {

constexpr int kRankingWarps = 8, kRankingThreads = kRankingWarps * kWarpSize;
constexpr int kTopBits = 12, kTopBins = 1 << kTopBits;

// What is known of one list, beside the counts of its bins.
struct ListState {
    uint64_t border;      // keys above it are kept, and of those equal to it each chunk's tie_share
    int32_t take_all;     // no more candidates than are kept
    uint32_t top_bin;     // bin of the border's top bits
    int32_t in_bin;       // how many of that bin's tokens are kept
    uint32_t tickets[3];  // of blocks: counted, bordered, written
};

// A list's state and counts, as they lie in memory; all zeros before anything is counted.
struct Ranking {
    ListState state;
    uint32_t counts[kTopBins];
};
static_assert(sizeof(Ranking) == kRankingWords * sizeof(int32_t) && sizeof(Ranking) % 8 == 0,
              "callers allocate kRankingWords, and doubles behind the lists are aligned");

// Order-preserving map of floats that are not NaN to unsigned integers; -0 and 0 are equal.
__device__ __forceinline__ uint32_t order_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The block that comes last; what the others wrote before is visible to it.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket, int64_t num_blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(num_blocks);
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Sums of `value` over the threads before this one, and over all (`total`).
__device__ __forceinline__ int exclusive_sum(int value, int* total) {
    __shared__ int of_warp[kRankingWarps];
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
              warp = static_cast<int>(threadIdx.x) / kWarpSize;
    int inclusive = value;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(step));
        if (lane >= step) inclusive += before;
    }
    __syncthreads();  // of_warp may still be read
    if (lane == kWarpSize - 1) of_warp[warp] = inclusive;
    __syncthreads();
    int offset = 0, all = 0;
    for (int i = 0; i < kRankingWarps; ++i) {
        if (i < warp) offset += of_warp[i];
        all += of_warp[i];
    }
    *total = all;
    return offset + inclusive - value;
}

struct Bin {
    int number;
    int64_t wanted;  // how many of its tokens are
};

// Of bins counted in `counts` [num_bins], the one in which the `wanted`-th best lies. By all
// threads; `counts` may be global memory.
__device__ __forceinline__ Bin find_bin(const uint32_t* counts, int num_bins, int64_t wanted) {
    __shared__ Bin found;
    const int per_thread = num_bins / kRankingThreads;
    // Thread 0 has the highest bins.
    const int high = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
    int own = 0;
    for (int i = 0; i < per_thread; ++i) own += static_cast<int>(counts[high - i]);
    int total;
    int64_t before = exclusive_sum(own, &total);
    if (before < wanted && before + own >= wanted) {
        int i = 0;
        for (; before + counts[high - i] < wanted; ++i) before += counts[high - i];
        found = Bin{high - i, wanted - before};
    }
    __syncthreads();
    const Bin out = found;
    __syncthreads();
    return out;
}
static_assert(kTopBins % kRankingThreads == 0, "threads have whole bins");

// Counts of one block's candidates, in shared memory; all threads do everything together.
class TopCounts {
public:
    __device__ void clear() {
        for (int i = static_cast<int>(threadIdx.x); i < kTopBins; i += kRankingThreads)
            counts()[i] = 0;
        __syncthreads();
    }
    // By one thread, of one candidate; `key` as order_key gives it.
    __device__ __forceinline__ void add(uint32_t key) {
        atomicAdd(&counts()[key >> (32 - kTopBits)], 1u);
    }
    // Adds the counts to the list's. The last of its `num_blocks` blocks finds the bin in which the
    // border of the `keep` best lies.
    __device__ void finish(Ranking& ranking, int64_t num_blocks, int64_t keep) {
        __syncthreads();
        const int thread = static_cast<int>(threadIdx.x);
        for (int i = thread; i < kTopBins; i += kRankingThreads)
            if (counts()[i] > 0) atomicAdd(&ranking.counts[i], counts()[i]);
        if (!is_last_block(&ranking.state.tickets[0], num_blocks)) return;
        int own = 0, num_candidates;
        for (int i = thread; i < kTopBins; i += kRankingThreads)
            own += static_cast<int>(__ldcg(&ranking.counts[i]));
        exclusive_sum(own, &num_candidates);
        const bool take_all = num_candidates <= keep;
        Bin bin{kTopBins, 0};  // no token is in that one
        if (!take_all && keep > 0) bin = find_bin(ranking.counts, kTopBins, keep);
        if (thread == 0) {
            ranking.state.take_all = take_all;
            ranking.state.top_bin = static_cast<uint32_t>(bin.number);
            ranking.state.in_bin = static_cast<int32_t>(bin.wanted);
        }
    }

private:
    __device__ static uint32_t* counts() {
        __shared__ uint32_t of_block[kTopBins];
        return of_block;
    }
};

}  // namespace kvselect::cuda
