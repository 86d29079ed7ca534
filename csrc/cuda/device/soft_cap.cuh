// What a model adds to its softmax: capped logits, and one more logit per head of a value that is
// 0. Logits in units of ln 2.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device/ptx.cuh"

namespace kvselect::cuda {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// softcap * tanh(logit / softcap); 0: as it is. A logit that is not finite becomes NaN: the cap
// would make an ordinary number of an infinite one.
__device__ __forceinline__ float soft_capped(float x, float softcap) {
    if (softcap == 0.f) return x;
    return fmaf(x, 0.f, softcap * kLog2E * tanhf(x * (kLn2 / softcap)));
}

// log2 of 2^log2_sum + e^sink. Nothing is added to an empty sum.
__device__ __forceinline__ float with_sink(float log2_sum, float sink) {
    const float other = sink * kLog2E;
    if (log2_sum == -INFINITY || other == -INFINITY) return log2_sum;
    const float top = fmaxf(other, log2_sum);
    return top + log2f(ptx::exp2_approximate(log2_sum - top) + ptx::exp2_approximate(other - top));
}

}  // namespace kvselect::cuda
