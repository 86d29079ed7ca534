// In place of NVIDIA's header of this name: kernels compiled as C++ over fibres.h. What our kernels
// use, and no more.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using dim3 = kvselect::emulation::Size3;
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- inside kernels

inline void __syncthreads() { kvselect::emulation::wait_for_block(); }
inline void __threadfence() {}
inline void __syncwarp() { kvselect::emulation::meet_warp("__syncwarp"); }

namespace kvselect::emulation {
template <typename T>
T from_lane(const char* what, T value, unsigned lane) {
    meet_warp(what, &value, sizeof value);
    T other;
    std::memcpy(&other, lane_slot(lane), sizeof other);
    return other;
}
inline unsigned lane_number() { return linear_thread() % kWarpThreads; }
}  // namespace kvselect::emulation

// Whole warps only, as all of our kernels use them.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return kvselect::emulation::from_lane("__shfl_sync", value, static_cast<unsigned>(lane));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    using namespace kvselect::emulation;
    return from_lane("__shfl_xor_sync", value, lane_number() ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
    using namespace kvselect::emulation;
    const unsigned lane = lane_number();
    return from_lane("__shfl_up_sync", value, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    using namespace kvselect::emulation;
    meet_warp("__ballot_sync", &predicate, sizeof predicate);
    unsigned mask = 0;
    for (unsigned lane = 0; lane < kWarpThreads; ++lane)
        if (*static_cast<const bool*>(lane_slot(lane))) mask |= 1u << lane;
    return mask;
}
inline bool __any_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}

template <typename T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = before + value;
    return before;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
    const unsigned before = *address;
    *address = before | value;
    return before;
}
template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}

inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
    return out;
}

// --- the runtime

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
union cudaLaunchAttributeValue {
    int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t num_bytes, cudaStream_t) {
    std::memset(memory, value, num_bytes);
    return cudaSuccess;
}
namespace kvselect::emulation {
// What a kernel declares is not known here: the most that one may. The smallest GPUs give 99 KiB.
constexpr size_t kStaticSharedBytes = 1 << 10;
constexpr size_t kUnaskedSharedBytes = (48 << 10) - kStaticSharedBytes;
constexpr size_t kMostSharedBytes = (99 << 10) - kStaticSharedBytes;
// Of the GPU that is played, which is a small one; one of sm_90 has more and its own instructions.
struct Device {
    int major = 8, minor = 6, num_sms = 2;
    size_t shared_bytes = kMostSharedBytes;
};
inline Device device;
inline std::map<const void*, size_t>& shared_limits() {
    static std::map<const void*, size_t> of_kernel;
    return of_kernel;
}
}  // namespace kvselect::emulation
inline cudaError_t cudaGetDevice(int* index) {
    *index = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    const kvselect::emulation::Device& device = kvselect::emulation::device;
    *value = which == cudaDevAttrMultiProcessorCount      ? device.num_sms
             : which == cudaDevAttrComputeCapabilityMajor ? device.major
                                                          : device.minor;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
    using namespace kvselect::emulation;
    if (value < 0 || static_cast<size_t>(value) > device.shared_bytes) return cudaErrorInvalidValue;
    shared_limits()[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    return cudaSuccess;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
    const auto& limits = kvselect::emulation::shared_limits();
    const auto asked = limits.find(reinterpret_cast<const void*>(kernel));
    if (config->dynamicSmemBytes >
        (asked == limits.end() ? kvselect::emulation::kUnaskedSharedBytes : asked->second))
        return cudaErrorInvalidValue;
    kvselect::emulation::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                  [&] { kernel(args...); });
    return cudaSuccess;
}
