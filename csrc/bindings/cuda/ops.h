// The CUDA op of every schema in bindings/ops.cpp that has one: check, allocate, fill the params,
// launch. Nothing is read back from the device, and memory comes from torch's allocator, so every
// op can be captured in a CUDA graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "bindings/checks.h"
#include "kvselect/cuda_launch.h"

namespace kvselect::bindings::cuda {

// The device of an op's first tensor, current while the op runs; its stream is torch's current one.
class OnDevice {
public:
    OnDevice(const char* name, const Tensor& first);

    Place place() const { return place_; }
    CudaLaunch launch() const { return launch_; }

private:
    Place place_;
    torch::stable::accelerator::DeviceGuard guard_;
    CudaLaunch launch_;
};

void kv_append(Tensor k, Tensor v, OptionalTensor num_valid, Tensor k_cache, Tensor v_cache,
               OptionalTensor block_table, Tensor cache_seqlens, OptionalTensor sketch,
               StringArg sketch_format, Tensor num_nonfinite, OptionalTensor starts);

std::tuple<Tensor, Tensor> merge_splits(Tensor partial_out, Tensor partial_lse);

void set_cuda_overlap(bool on);

}  // namespace kvselect::bindings::cuda
