#include "bindings/block_sparse_attention_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

// Entries that are no block of the keys are skipped, lengths and offsets cut to what there is.
std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask,
                                                  OptionalTensor row_offsets,
                                                  OptionalTensor seqlens_q,
                                                  OptionalTensor cache_seqlens,
                                                  int64_t q_block_size, int64_t kv_block_size,
                                                  bool causal, double softmax_scale, double softcap,
                                                  StringArg implementation) {
    const std::string name = take_string(implementation);
    const bool sm90a = name == "sm90a";
    KVS_CHECK(sm90a || name == "auto", "implementation: got '", name,
              "', allowed: 'auto' or 'sm90a'");
#ifndef KVSELECT_SM90A
    KVS_CHECK(!sm90a, "implementation: got 'sm90a', allowed: 'auto' (this build is for ",
              KVSELECT_CUDA_ARCHS, ", without 90a)");
#endif
    const OnDevice device("q", q);
    const BlockSparseAttentionCall call = read_block_sparse_attention(
        q, k, v, block_mask, row_offsets, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
        causal, softmax_scale, softcap, device.place());
    const auto run = [&](auto workspace_bytes, auto kernel) {
        const Tensor workspace =
            new_output({workspace_bytes(call.params)}, ScalarType::Byte, device.place());
        kernel(call.params, workspace.mutable_data_ptr(), device.launch());
    };
    using namespace kvselect::cuda;
#ifdef KVSELECT_SM90A
    if (sm90a) {
        require_block_sparse_attention_sm90a(call.params);
        run(block_sparse_attention_sm90a_workspace_bytes, block_sparse_attention_sm90a);
        return {call.out, call.lse};
    }
#endif
    run(block_sparse_attention_workspace_bytes,
        static_cast<void (*)(const BlockSparseAttentionParams&, void*, const CudaLaunch&)>(
            kvselect::cuda::block_sparse_attention));
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings::cuda
