#include "bindings/cuda/ops.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cuda/architectures.h"

namespace kvselect::bindings::cuda {
namespace {

std::atomic<bool> overlap{false};

Place place_of(const char* name, const Tensor& tensor) {
    // The dispatcher comes here if any tensor is on a GPU; this one need not be it.
    KVS_CHECK(tensor.is_cuda(), name, ": got a tensor on ",
              tensor.is_cpu() ? "cpu" : "another device",
              ", allowed: one CUDA device for all tensors of a call");
    return {true, tensor.get_device_index()};
}

// That this build has code for the device; asked once per device.
void require_architecture(int32_t index) {
    constexpr int32_t kMaxDevices = 64;
    static std::atomic<bool> known[kMaxDevices];
    if (index < kMaxDevices && known[index].load(std::memory_order_relaxed)) return;
    int major = 0, minor = 0;
    for (const cudaError_t status :
         {cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
          cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)})
        if (status != cudaSuccess)
            fail_at_run_time("CUDA: ", cudaGetErrorString(status), " when asking cuda:", index,
                             " for its architecture");
    KVS_CHECK(kvselect::cuda::runs_on(KVSELECT_CUDA_ARCHS, major, minor),
              "device: got cuda:", index, " of architecture sm_", major, minor,
              ", allowed: what this build is for, ", KVSELECT_CUDA_ARCHS,
              " (set KVSELECT_CUDA_ARCHS and build again)");
    if (index < kMaxDevices) known[index].store(true, std::memory_order_relaxed);
}

}  // namespace

OnDevice::OnDevice(const char* name, const Tensor& first)
    : place_(place_of(name, first)), guard_(place_.index), launch_{} {
    require_architecture(place_.index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.index, &stream));
    launch_.stream = static_cast<CUstream_st*>(stream);
    launch_.overlap = overlap.load(std::memory_order_relaxed);
}

void set_cuda_overlap(bool on) { overlap.store(on, std::memory_order_relaxed); }

}  // namespace kvselect::bindings::cuda

STABLE_TORCH_LIBRARY_IMPL(kvselect, CUDA, m) {
    using namespace kvselect::bindings;
    m.impl("block_mass", TORCH_BOX(&cuda::block_mass));
    m.impl("block_sparse_attention", TORCH_BOX(&cuda::block_sparse_attention));
    m.impl("kv_append", TORCH_BOX(&cuda::kv_append));
    m.impl("score_tokens", TORCH_BOX(&cuda::score_tokens));
    m.impl("score_tokens.reuse", TORCH_BOX(&cuda::score_tokens_reuse));
    m.impl("select_tokens", TORCH_BOX(&cuda::select_tokens));
    m.impl("sparse_attention", TORCH_BOX(&cuda::sparse_attention));
    m.impl("gather_tokens", TORCH_BOX(&cuda::gather_tokens));
    m.impl("list_blocks", TORCH_BOX(&cuda::list_blocks));
    m.impl("merge_splits", TORCH_BOX(&cuda::merge_splits));
    m.impl("recovered_mass", TORCH_BOX(&cuda::recovered_mass));
}

STABLE_TORCH_LIBRARY_IMPL(kvselect, CompositeExplicitAutograd, m) {
    using namespace kvselect::bindings;
    m.impl("set_cuda_overlap", TORCH_BOX(&cuda::set_cuda_overlap));
}
