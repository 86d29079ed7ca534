// Marks what kernels of both backends call: in CUDA's compilation it exists on the GPU too.
#pragma once

#if defined(__CUDACC__)
#define KVS_HOST_DEVICE __host__ __device__
#else
#define KVS_HOST_DEVICE
#endif
