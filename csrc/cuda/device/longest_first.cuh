// Items of work by falling length, so that none of the long ones begins last.
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"

namespace kvselect::cuda {

constexpr int kOrderThreads = 1024, kLengthClasses = 256, kItemsPerThread = 4;
// Beyond this one thread block would take longer to order items than the order saves.
constexpr int64_t kMostOrderedItems = int64_t{1} << 18;

// Numbers of items in classes of about equal length(item) in [0, longest], the longest first. Which
// of a class comes first is left to chance. By one thread block of kOrderThreads.
template <typename Length>
__device__ __forceinline__ void order_longest_first(const Length& length, int num_items,
                                                    int longest, int (&ends)[kLengthClasses],
                                                    int32_t* order) {
    const int thread = static_cast<int>(threadIdx.x);
    const auto class_of = [&](int item) {  // 0: the longest
        const int64_t given = length(item);
        const int64_t own = given < 0 ? 0 : (given < longest ? given : longest);
        return kLengthClasses - 1 - static_cast<int>(own * (kLengthClasses - 1) / longest);
    };
    const auto for_each = [&](const auto& use) {  // several at once: they wait for memory together
        for (int begin = thread; begin < num_items; begin += kItemsPerThread * kOrderThreads) {
            int found[kItemsPerThread];
#pragma unroll
            for (int i = 0; i < kItemsPerThread; ++i) {
                const int item = begin + i * kOrderThreads;
                found[i] = item < num_items ? class_of(item) : 0;
            }
#pragma unroll
            for (int i = 0; i < kItemsPerThread; ++i)
                if (begin + i * kOrderThreads < num_items) use(begin + i * kOrderThreads, found[i]);
        }
    };
    if (thread < kLengthClasses) ends[thread] = 0;
    __syncthreads();
    for_each([&](int, int found) { atomicAdd(&ends[found], 1); });
    __syncthreads();
    if (thread < kWarpSize) {  // counts become the places of the first of each class
        constexpr int kEach = kLengthClasses / kWarpSize;
        int own = 0;
        for (int i = 0; i < kEach; ++i) own += ends[thread * kEach + i];
        int before = own;
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int other = __shfl_up_sync(kAllLanes, before, static_cast<unsigned>(step));
            if (thread >= step) before += other;
        }
        before -= own;
        for (int i = 0; i < kEach; ++i) {
            const int count = ends[thread * kEach + i];
            ends[thread * kEach + i] = before;
            before += count;
        }
    }
    __syncthreads();
    for_each([&](int item, int found) { order[atomicAdd(&ends[found], 1)] = item; });
}

}  // namespace kvselect::cuda
