// What CUDA kernels ask of a cache beyond what the CPU's do: rows that can be loaded 16 bytes at a
// time.
#pragma once

#include "bindings/checks.h"

namespace kvselect::bindings {

inline void require_aligned_rows(const TensorArg& arg) {
    const int64_t element_bytes = arg.dtype() == ScalarType::Float  ? 4
                                  : arg.dtype() == ScalarType::Byte ? 1
                                                                    : 2;
    bool aligned = reinterpret_cast<uintptr_t>(arg.data<void>()) % 16 == 0;
    for (int64_t i = 0; i + 1 < arg.dim(); ++i)
        aligned = aligned && (arg.size(i) <= 1 || arg.stride(i) * element_bytes % 16 == 0);
    KVS_CHECK(aligned, arg.name(),
              ": got rows that do not begin at multiples of 16 bytes, allowed: data and strides of "
              "16 bytes on CUDA");
}

// Sums over a row's channels lie in registers.
inline void require_cuda_head_dim(int64_t head_dim) {
    KVS_CHECK(head_dim <= 256, "head_dim: got ", head_dim,
              ", allowed: 32, 64, 80, 96, 128, 160, 192, 256 on CUDA");
}

}  // namespace kvselect::bindings
