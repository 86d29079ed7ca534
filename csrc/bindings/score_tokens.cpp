#include "bindings/score_tokens_call.h"

#include <algorithm>
#include <limits>

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"
#include "cpu/element_types.h"

namespace kvselect::bindings {
namespace {

// A decode step brings its queries as the model made them; aten's conversion of so few numbers
// costs more than all of these.
const float* as_float(const TensorArg& q) {
    if (q.dtype() == ScalarType::Float) return q.data<float>();
    int64_t count = 1;
    for (int64_t i = 0; i < q.dim(); ++i) count *= q.size(i);
    float* out = ConvertedQueries::get(count);
    const auto convert = [&](const auto* from) {
        for (int64_t i = 0; i < count; ++i) out[i] = cpu::element::to_float(from[i]);
    };
    if (kernel_dtype(q) == DType::kFloat16)
        convert(q.data<cpu::Float16>());
    else
        convert(q.data<cpu::BFloat16>());
    return out;
}

// Lists that `hit` skips keep whatever the fresh memory of `scores` held (nobody reads it:
// select_tokens skips the same lists); their lse is -inf and their num_nonfinite 0.
std::tuple<Tensor, Tensor, Tensor> score(const Tensor& q, ScoreTokensCall call) {
    ScoreTokensParams& p = call.params;
    const cpu::Implementation& kernels = cpu::current_implementation();
    if (p.reuse.anchor_query)
        run_parallel(p.reuse.batch, 0, [&](int64_t begin, int64_t end, float*) {
            kernels.selection_cache_step(p.reuse, begin, end);
        });
    // Where every list is reused no key is read, and nothing grows with the length of a row: so
    // pages are checked after the decision is written.
    const int32_t* const last = p.hit ? p.hit + p.blocks.batch * p.num_hit_lists : nullptr;
    if (!p.hit || std::find(p.hit, last, 0) != last) require_stored_pages(call.keys, p.blocks);
    p.q = as_float(TensorArg("q", q));
    const int64_t num_blocks = p.blocks.num_blocks, num_items = p.blocks.batch * p.num_kv_heads;
    Tensor new_scores =
        new_long_output({p.blocks.batch, num_blocks, p.num_kv_heads, p.max_seqlen_k},
                        ScalarType::Float, sizeof(float));
    auto [scores, lse, num_nonfinite] = score_tokens_outputs(&p, std::move(new_scores), Place{});
    std::fill_n(p.num_nonfinite, num_nonfinite.numel(), int64_t{0});
    if (p.hit) std::fill_n(p.lse, lse.numel(), -std::numeric_limits<float>::infinity());

    // Blocks that nothing is kept for share the codes of a part while these are in cache. Items are
    // numbered with the block last for that; the kernel numbers them with the KV head last.
    const auto kernel = kernels.score_tokens;
    const int64_t parts = score_tokens_parts(p);
    const auto run = [&](ScoreStage stage, int64_t index, int64_t part_begin, int64_t part_end,
                         float* workspace, float* scratch) {
        const int64_t block = index % num_blocks, list = index / num_blocks;
        const int64_t row = list / p.num_kv_heads, kv_head = list % p.num_kv_heads;
        const int64_t item = (row * num_blocks + block) * p.num_kv_heads + kv_head;
        kernel(p, stage, item, part_begin, part_end, workspace, scratch);
    };
    run_parted(
        PartedWork{num_items * num_blocks, parts, parts, score_tokens_workspace_floats(p),
                   score_tokens_scratch_floats(p), num_blocks},
        [&](int64_t index, float* workspace, float* scratch) {
            run(ScoreStage::kWeigh, index, 0, parts, workspace, scratch);
            run(ScoreStage::kVote, index, 0, parts, workspace, scratch);
        },
        [&](int64_t index, int64_t part, float* workspace, float* scratch) {
            run(ScoreStage::kWeigh, index, part, part + 1, workspace, scratch);
        },
        [&](int64_t index, int64_t part, float* workspace, float* scratch) {
            run(ScoreStage::kVote, index, part, part + 1, workspace, scratch);
        });
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
    return score(q, read_score_tokens(q, q_local, k_cache, block_table, cache_seqlens, starts,
                                      sketch, take_string(sketch_format), q_block_offsets, seqlen_q,
                                      take_string(window_rule), num_sink_tokens, num_recent_tokens,
                                      keep, scale, normalise_candidates_only, max_vote, cos, sin,
                                      rope_start, rope_interleaved, hit, max_seqlen_k, softcap,
                                      sink_logits, ranking, sketch_in_pages, nullptr, Place{}));
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
    return score(q, read_score_tokens(q, q_local, k_cache, block_table, cache_seqlens, starts,
                                      sketch, take_string(sketch_format), q_block_offsets, seqlen_q,
                                      take_string(window_rule), num_sink_tokens, num_recent_tokens,
                                      keep, scale, normalise_candidates_only, max_vote, cos, sin,
                                      rope_start, rope_interleaved, hit, max_seqlen_k, softcap,
                                      sink_logits, ranking, sketch_in_pages, &reuse, Place{}));
}

}  // namespace kvselect::bindings
