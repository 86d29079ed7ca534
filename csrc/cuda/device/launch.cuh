// How kernels are launched: every launch checked, every error a C++ exception that says what failed
// where.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kvselect/check.h"
#include "kvselect/cuda_launch.h"
#include "kvselect/host_device.h"

#define KVS_CUDA_CHECK(call)                                                                       \
    do {                                                                                           \
        const cudaError_t kvs_status = (call);                                                     \
        if (kvs_status != cudaSuccess)                                                             \
            ::kvselect::fail_at_run_time("CUDA: ", cudaGetErrorString(kvs_status), " in ", #call); \
    } while (false)

namespace kvselect::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridY = 65535;

// Shared memory that a block may have on every GPU that we build for (sm_86, sm_89, sm_120: 99
// KiB): what a kernel declares, where it asks for more at launch, and what it may ask for.
constexpr int64_t kMaxStaticSharedBytes = int64_t{1} << 10;
constexpr int64_t kMaxDynamicSharedBytes = (int64_t{99} << 10) - kMaxStaticSharedBytes;

// grid.x = x, grid.y = y; a grid of nothing is not launched. shared_limit: the most that this
// kernel is ever launched with.
template <typename... Params, typename... Args>
void launch_with(const CudaLaunch& where, void (*kernel)(Params...), int64_t x, int64_t y,
                 int threads, int64_t shared_bytes, int64_t shared_limit, const Args&... args) {
    if (x == 0 || y == 0) return;
    KVS_CHECK(x <= kMaxGridX && y <= kMaxGridY, "grid: got ", x, " x ", y, ", allowed: at most ",
              kMaxGridX, " x ", kMaxGridY, " (rows, blocks of queries and heads of one call)");
    // Unasked, a kernel gets 48 KiB less what it declares. The limit is the same at every launch:
    // no thread of the host lowers it for another that launches the same kernel.
    if (shared_bytes > 0)
        KVS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_limit)));
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = where.stream;
    config.attrs = &overlap;
    config.numAttrs = where.overlap ? 1 : 0;
    KVS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
    KVS_CUDA_CHECK(cudaGetLastError());
}

// With shared memory that every GPU has.
template <typename... Params, typename... Args>
void launch(const CudaLaunch& where, void (*kernel)(Params...), int64_t x, int64_t y, int threads,
            int64_t shared_bytes, const Args&... args) {
    launch_with(where, kernel, x, y, threads, shared_bytes, kMaxDynamicSharedBytes, args...);
}

KVS_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kvselect::cuda
