#include "bindings/sparse_attention_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> sparse_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor block_table, Tensor cache_seqlens,
    OptionalTensor starts, OptionalTensor indices, OptionalTensor topk_length,
    OptionalTensor q_block_offsets, double softmax_scale, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, double softcap, OptionalTensor sink_logits) {
    const SparseAttentionCall call =
        read_sparse_attention(q, k_cache, v_cache, block_table, cache_seqlens, starts, indices,
                              topk_length, q_block_offsets, softmax_scale, cos, sin, rope_start,
                              rope_interleaved, softcap, sink_logits, Place{});
    const SparseAttentionParams& p = call.params;
    const auto kernel = cpu::current_implementation().sparse_attention;
    const int64_t parts = sparse_attention_has_parts(p) ? sparse_attention_parts(call.longest) : 1;
    run_parted(
        PartedWork{p.blocks.batch * p.blocks.num_blocks * p.num_kv_heads, parts, 1,
                   sparse_attention_workspace_floats(p, parts), sparse_attention_scratch_floats(p),
                   1},
        [&](int64_t item, float* workspace, float* scratch) {
            kernel(p, AttentionStage::kWhole, item, 0, parts, workspace, scratch);
        },
        [&](int64_t item, int64_t part, float* workspace, float* scratch) {
            kernel(p, AttentionStage::kParts, item, part, part + 1, workspace, scratch);
        },
        [&](int64_t item, int64_t, float* workspace, float* scratch) {
            kernel(p, AttentionStage::kMerge, item, 0, parts, workspace, scratch);
        });
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings
