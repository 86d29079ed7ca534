#include "bindings/sparse_attention_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

// List entries that are no token of the row are skipped; everything else that lists and lengths
// hold is the caller's to guarantee: it lies on the device.
std::tuple<Tensor, Tensor> sparse_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor block_table, Tensor cache_seqlens,
    OptionalTensor starts, OptionalTensor indices, OptionalTensor topk_length,
    OptionalTensor q_block_offsets, double softmax_scale, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, double softcap, OptionalTensor sink_logits) {
    const OnDevice device("q", q);
    const SparseAttentionCall call =
        read_sparse_attention(q, k_cache, v_cache, block_table, cache_seqlens, starts, indices,
                              topk_length, q_block_offsets, softmax_scale, cos, sin, rope_start,
                              rope_interleaved, softcap, sink_logits, device.place());
    const Tensor workspace =
        new_output({kvselect::cuda::sparse_attention_workspace_bytes(call.params, call.longest)},
                   ScalarType::Byte, device.place());
    kvselect::cuda::sparse_attention(call.params, call.longest, workspace.mutable_data_ptr(),
                                     device.launch());
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings::cuda
