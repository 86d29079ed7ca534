// Where and how a CUDA launcher puts its kernels. Pointers in the params of such a call are device
// pointers.
#pragma once

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace kvselect {

struct CudaLaunch {
    CUstream_st* stream;
    // Programmatic dependent launch: a kernel starts while the one before it finishes, and waits
    // inside, before it reads what that one writes. Effective from sm_90 on.
    bool overlap;
};

}  // namespace kvselect
