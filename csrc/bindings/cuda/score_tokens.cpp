#include "bindings/score_tokens_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

namespace {

// Lists that `hit` skips keep whatever the fresh memory of `scores` held, as on the CPU. What
// lengths and pages say is not checked: it lies on the device.
std::tuple<Tensor, Tensor, Tensor> score(Tensor q, ScoreTokensParams p, const OnDevice& device) {
    const Place place = device.place();
    // A decode step brings its queries as the model made them.
    if (q.scalar_type() != ScalarType::Float) q = torch::stable::to(q, ScalarType::Float);
    p.q = TensorArg("q", q, place).data<float>();
    auto [scores, lse, num_nonfinite] = score_tokens_outputs(
        &p,
        new_output({p.blocks.batch, p.blocks.num_blocks, p.num_kv_heads, p.max_seqlen_k},
                   ScalarType::Float, place),
        place);
    const Tensor workspace =
        new_output({kvselect::cuda::score_tokens_workspace_bytes(p)}, ScalarType::Byte, place);
    kvselect::cuda::score_tokens(p, workspace.mutable_data_ptr(), device.launch());
    return {scores, lse, num_nonfinite};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> score_tokens(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, bool max_vote, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, OptionalTensor hit, int64_t max_seqlen_k,
    double softcap, OptionalTensor sink_logits, OptionalTensor ranking, bool sketch_in_pages) {
    const OnDevice device("q", q);
    return score(q,
                 read_score_tokens(q, q_local, k_cache, block_table, cache_seqlens, starts, sketch,
                                   take_string(sketch_format), q_block_offsets, seqlen_q,
                                   take_string(window_rule), num_sink_tokens, num_recent_tokens,
                                   keep, scale, normalise_candidates_only, max_vote, cos, sin,
                                   rope_start, rope_interleaved, hit, max_seqlen_k, softcap,
                                   sink_logits, ranking, sketch_in_pages, nullptr, device.place())
                     .params,
                 device);
}

std::tuple<Tensor, Tensor, Tensor> score_tokens_reuse(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, bool max_vote, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, Tensor hit, int64_t max_seqlen_k, double softcap,
    OptionalTensor sink_logits, OptionalTensor ranking, bool sketch_in_pages, Tensor compared_q,
    Tensor cache_nonfinite, StringArg similarity, double similarity_threshold, int64_t max_age,
    int64_t dense_limit, Tensor anchor_query, Tensor age, Tensor expected_seqlens,
    Tensor known_nonfinite, Tensor reuse_counts) {
    const OnDevice device("q", q);
    const ReuseArgs reuse{compared_q,
                          cache_nonfinite,
                          take_string(similarity),
                          similarity_threshold,
                          max_age,
                          dense_limit,
                          anchor_query,
                          age,
                          expected_seqlens,
                          known_nonfinite,
                          reuse_counts};
    return score(q,
                 read_score_tokens(q, q_local, k_cache, block_table, cache_seqlens, starts, sketch,
                                   take_string(sketch_format), q_block_offsets, seqlen_q,
                                   take_string(window_rule), num_sink_tokens, num_recent_tokens,
                                   keep, scale, normalise_candidates_only, max_vote, cos, sin,
                                   rope_start, rope_interleaved, hit, max_seqlen_k, softcap,
                                   sink_logits, ranking, sketch_in_pages, &reuse, device.place())
                     .params,
                 device);
}

}  // namespace kvselect::bindings::cuda
