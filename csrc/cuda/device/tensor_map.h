// What the copy engine is told of a tensor: its sizes, strides and the box that one copy takes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kvselect/check.h"
#include "kvselect/kv_view.h"

namespace kvselect::cuda {

using TensorMap = CUtensorMap;

// [rows, heads, tokens, channels] of 16-bit elements, whose rows of channels are contiguous.
struct TensorExtent {
    DType dtype;
    const void* data;
    int64_t channels, tokens, heads, rows;
    int64_t token_stride, head_stride, row_stride;  // elements
};

// Boxes of `box_tokens` tokens by 64 channels, swizzled by 128 bytes; 0 where the tensor has
// nothing. cuTensorMapEncodeTiled is the driver's: it is asked for, so that nothing links to it.
inline TensorMap make_tensor_map(const char* name, const TensorExtent& x, int box_tokens) {
    constexpr unsigned kSince = 12000;
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &result);
#else
        static_cast<void>(kSince);
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        if (status != cudaSuccess || result != cudaDriverEntryPointSuccess || !found) {
            static_cast<void>(cudaGetLastError());  // no launch's fault
            fail_at_run_time("CUDA: the driver has no cuTensorMapEncodeTiled (",
                             cudaGetErrorString(status), ", result ", static_cast<int>(result),
                             ")");
        }
        return reinterpret_cast<Encode>(found);
    }();
    // The stride of a dimension of one is never used, but it is checked.
    const auto bytes = [&](int64_t stride, int64_t size) {
        return static_cast<cuuint64_t>(size > 1 ? 2 * stride : 16 * ((2 * x.channels + 15) / 16));
    };
    const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(x.channels),
                                 static_cast<cuuint64_t>(x.tokens),
                                 static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.rows)};
    const cuuint64_t strides[3] = {bytes(x.token_stride, x.tokens), bytes(x.head_stride, x.heads),
                                   bytes(x.row_stride, x.rows)};
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_tokens), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const auto type = x.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    TensorMap map;
    const CUresult status =
        encode(&map, type, 4, const_cast<void*>(x.data), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        fail_at_run_time("CUDA: cuTensorMapEncodeTiled gave ", static_cast<int>(status), " for ",
                         name, " [", x.rows, ", ", x.heads, ", ", x.tokens, ", ", x.channels,
                         "], strides ", x.row_stride, ", ", x.head_stride, ", ", x.token_stride,
                         " at ", x.data);
    return map;
}

}  // namespace kvselect::cuda
