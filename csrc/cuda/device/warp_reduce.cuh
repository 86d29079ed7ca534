// Sums and maxima over the lanes of a warp, in an order that is always the same; every lane gets
// the result.
#pragma once

#include "cuda/device/launch.cuh"

namespace kvselect::cuda {

// Over the lanes that differ in the bits of kLanes - 1: 32 for the warp, 4 for the quads of mma
// fragments.
template <int kLanes = kWarpSize, typename T>
__device__ __forceinline__ T reduce_add(T value) {
#pragma unroll
    for (int bit = kLanes / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
    return value;
}
template <int kLanes = kWarpSize>
__device__ __forceinline__ float reduce_max(float value) {
#pragma unroll
    for (int bit = kLanes / 2; bit > 0; bit /= 2)
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, bit));
    return value;
}

}  // namespace kvselect::cuda
