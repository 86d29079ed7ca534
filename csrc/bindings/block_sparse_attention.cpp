#include "bindings/block_sparse_attention_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask,
                                                  OptionalTensor row_offsets,
                                                  OptionalTensor seqlens_q,
                                                  OptionalTensor cache_seqlens,
                                                  int64_t q_block_size, int64_t kv_block_size,
                                                  bool causal, double softmax_scale, double softcap,
                                                  StringArg implementation) {
    const std::string name = take_string(implementation);
    KVS_CHECK(name == "auto", "implementation: got '", name,
              "' with tensors on the CPU, allowed: 'auto' (set_cpu_implementation chooses there)");
    const BlockSparseAttentionCall call = read_block_sparse_attention(
        q, k, v, block_mask, row_offsets, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
        causal, softmax_scale, softcap, {});
    const BlockSparseAttentionParams& p = call.params;
    const auto kernel = cpu::current_implementation().block_sparse_attention;
    run_parallel(
        p.grid.batch * p.grid.num_q_heads * p.grid.num_q_blocks(),
        block_sparse_attention_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings
