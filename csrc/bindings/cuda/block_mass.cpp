#include "bindings/block_mass_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

Tensor block_mass(Tensor q, Tensor k, OptionalTensor lse, OptionalTensor seqlens_q,
                  OptionalTensor cache_seqlens, int64_t q_block_size, int64_t kv_block_size,
                  bool causal, int64_t row_stride, double softmax_scale, double softcap) {
    const OnDevice device("q", q);
    const BlockMassCall call =
        read_block_mass(q, k, lse, seqlens_q, cache_seqlens, q_block_size, kv_block_size, causal,
                        row_stride, softmax_scale, softcap, device.place());
    kvselect::cuda::block_mass(call.params, device.launch());
    return call.mass;
}

}  // namespace kvselect::bindings::cuda
