// What a model adds to its softmax: capped logits, and one more logit per head of a value that is
// 0. Logits in units of ln 2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace kvselect::cuda {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// softcap * tanh(logit / softcap); 0: as it is. A logit that is not finite becomes NaN: the cap
// would make an ordinary number of an infinite one. tanh(z) = t / (t + 2) with t = e^(2z) - 1, as
// in csrc/cpu/soft_cap-inl.h: small logits keep their relative precision, and it takes fewer
// registers than tanhf.
__device__ __forceinline__ float soft_capped(float x, float softcap) {
    if (softcap == 0.f) return x;
    const float w = fminf(30.f, fmaxf(-30.f, x * (2.f / softcap)));  // tanh is 1 long before
    const float n = rintf(w), f = w - n;
    float q = 1.545316295e-4f;  // (2^f - 1) / f, relative error below 2e-8
    q = fmaf(q, f, 1.339086336e-3f);
    q = fmaf(q, f, 9.618082557e-3f);
    q = fmaf(q, f, 5.550357114e-2f);
    q = fmaf(q, f, 2.402265092e-1f);
    q = fmaf(q, f, 6.931471880e-1f);
    const float power = __uint_as_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
    const float t = fmaf(power * f, q, power - 1.f);
    return fmaf(x, 0.f, softcap * kLog2E * __fdividef(t, t + 2.f));
}

// log2 of 2^log2_sum + e^sink. Nothing is added to an empty sum.
__device__ __forceinline__ float with_sink(float log2_sum, float sink) {
    const float other = sink * kLog2E;
    if (log2_sum == -INFINITY || other == -INFINITY) return log2_sum;
    const float top = fmaxf(other, log2_sum);
    return top + log2f(ptx::exp2_approximate(log2_sum - top) + ptx::exp2_approximate(other - top));
}

}  // namespace kvselect::cuda
