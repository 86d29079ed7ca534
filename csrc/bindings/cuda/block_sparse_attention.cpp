#include "bindings/block_sparse_attention_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

// Entries that are no block of the keys are skipped, lengths and offsets cut to what there is.
std::tuple<Tensor, Tensor> block_sparse_attention(
    Tensor q, Tensor k, Tensor v, Tensor block_mask, OptionalTensor row_offsets,
    OptionalTensor seqlens_q, OptionalTensor cache_seqlens, int64_t q_block_size,
    int64_t kv_block_size, bool causal, double softmax_scale, double softcap) {
    const OnDevice device("q", q);
    const BlockSparseAttentionCall call = read_block_sparse_attention(
        q, k, v, block_mask, row_offsets, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
        causal, softmax_scale, softcap, device.place());
    const Tensor workspace =
        new_output({kvselect::cuda::block_sparse_attention_workspace_bytes(call.params)},
                   ScalarType::Byte, device.place());
    kvselect::cuda::block_sparse_attention(call.params, workspace.mutable_data_ptr(),
                                           device.launch());
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings::cuda
