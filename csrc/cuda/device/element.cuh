// Elements of a cache on the device, and the choice of a kernel by their type.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/ptx.cuh"
#include "kvselect/kv_view.h"

namespace kvselect::cuda {

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return ptx::from_half(x.bits); }
__device__ __forceinline__ float to_float(BFloat x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
}
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, Half* out) { out->bits = ptx::to_half(x); }
__device__ __forceinline__ void from_float(float x, BFloat* out) { out->bits = ptx::to_bfloat(x); }

__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

// Elements in 16 bytes.
template <typename T>
constexpr int kElementsPerChunk = 16 / static_cast<int>(sizeof(T));

// Element i of 16 bytes that were loaded as words.
__device__ __forceinline__ float element_of(const uint4& chunk, int i, float) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    return __uint_as_float(words[i]);
}
template <typename T>
__device__ __forceinline__ float element_of(const uint4& chunk, int i, T) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    return to_float(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
}

// Whether one of the elements is NaN or infinite.
template <typename T>
__device__ __forceinline__ bool any_nonfinite(const uint4& chunk) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kElementsPerChunk<T>; ++i)
        found = found || !is_finite(element_of(chunk, i, T{}));
    return found;
}

// 16 bytes from where elements lie; `aligned`: the address is a multiple of 16 (the same for a
// whole call).
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const uint4*>(from);
    T elements[kElementsPerChunk<T>];
#pragma unroll
    for (int i = 0; i < kElementsPerChunk<T>; ++i) elements[i] = from[i];
    uint4 chunk;
    memcpy(&chunk, elements, sizeof chunk);
    return chunk;
}
template <typename T>
__device__ __forceinline__ void store_chunk(T* to, const uint4& chunk, bool aligned) {
    if (aligned) {
        *reinterpret_cast<uint4*>(to) = chunk;
        return;
    }
    T elements[kElementsPerChunk<T>];
    memcpy(elements, &chunk, sizeof chunk);
#pragma unroll
    for (int i = 0; i < kElementsPerChunk<T>; ++i) to[i] = elements[i];
}

// Whether rows that begin at `data` and multiples of the strides (in elements) begin at multiples
// of 16 bytes.
template <typename... Strides>
bool rows_are_aligned(DType dtype, const void* data, Strides... strides) {
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides * bytes % 16 == 0) && ...);
}

// choose(T{}) with T the element type.
template <typename Choose>
void with_element_type(DType dtype, const Choose& choose) {
    switch (dtype) {
        case DType::kFloat32:
            return choose(float{});
        case DType::kFloat16:
            return choose(Half{});
        case DType::kBFloat16:
            return choose(BFloat{});
    }
}

}  // namespace kvselect::cuda
