#include "kvselect/score_tokens.h"

#include <algorithm>
#include <limits>

#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"
#include "cpu/element_types.h"

namespace kvselect::bindings {
namespace {

// Positions that "compact" rotates to: sinks keep their rank, the window follows the picked tokens.
int64_t compact_positions(const QueryBlocks& blocks, int64_t keep) {
    int64_t needed = 0;
    for (int64_t row = 0; row < blocks.batch; ++row) {
        for (int64_t block = 0; block < blocks.num_blocks; ++block) {
            const BlockRange range = block_range(blocks, row, block);
            needed = std::max(needed, (range.sink_end - range.start) +
                                          std::min(keep, range.window_start - range.sink_end) +
                                          (range.end - range.window_start));
        }
    }
    return needed;
}

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

}  // namespace

// Lists that `hit` skips keep whatever the fresh memory of `scores` held (nobody reads it:
// select_tokens skips the same lists); their lse is -inf and their num_nonfinite 0.
std::tuple<Tensor, Tensor, Tensor> score_tokens(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, bool max_vote, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, OptionalTensor hit, int64_t max_seqlen_k,
    double softcap, OptionalTensor sink_logits) {
    const std::string format = take_string(sketch_format), rule = take_string(window_rule);
    require_count("num_sink_tokens", num_sink_tokens, 0);
    require_count("num_recent_tokens", num_recent_tokens, 0);
    require_count("keep", keep, 0);
    require_count("max_seqlen_k", max_seqlen_k, 0);

    const TensorArg q_arg("q", q), cache_arg("k_cache", k_cache);
    (void)kernel_dtype(q_arg);
    q_arg.require_shape({{"batch"}, {"num_blocks"}, {"num_vectors"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous();
    const int64_t batch = q_arg.size(0), num_vectors = q_arg.size(2), num_q_heads = q_arg.size(3);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);
    require_count("num_vectors", num_vectors, 1);
    KVS_CHECK(num_vectors * (num_q_heads / keys.num_kv_heads) <= kMaxScoreColumns,
              "num_vectors: got ", num_vectors, ", allowed: at most ",
              kMaxScoreColumns / (num_q_heads / keys.num_kv_heads), " with ", num_q_heads,
              " query heads over ", keys.num_kv_heads, " KV heads");

    ScoreTokensParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q);
    p.blocks.rule = bindings::window_rule(rule);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    q_arg.require_shape({{"batch", batch},
                         {"num_blocks", p.blocks.num_blocks},
                         {"num_vectors", num_vectors},
                         {"num_q_heads", num_q_heads},
                         {"head_dim", keys.head_dim}});
    if (q_local) {
        const TensorArg local_arg("q_local", *q_local);
        local_arg.require_dtype(ScalarType::Float)
            .require_shape({{"batch", batch},
                            {"num_blocks", p.blocks.num_blocks},
                            {"num_vectors", num_vectors},
                            {"num_q_heads", num_q_heads},
                            {"head_dim", keys.head_dim}})
            .require_contiguous();
        p.q_local = local_arg.data<float>();
    }
    require_max_seqlen("max_seqlen_k", max_seqlen_k, p.blocks);
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row) {
        longest = std::max<int64_t>(longest, p.blocks.cache_seqlens[row]);
    }
    p.sketch = read_sketch(sketch, format, batch, keys.num_kv_heads, keys.head_dim, longest);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim);
    if (p.rope.cos) require_rope_positions(p.rope, compact_positions(p.blocks, keep));
    if (hit) {
        const TensorArg hit_arg("hit", *hit);
        hit_arg.require_dtype(ScalarType::Int)
            .require_shape({{"batch", batch}, {"num_kv_heads", keys.num_kv_heads}})
            .require_contiguous();
        p.hit = hit_arg.data<int32_t>();
    }
    // Where every list is reused, no key is read: nothing then grows with the length of a row.
    const bool reads_keys = !p.hit || std::find(p.hit, p.hit + batch * keys.num_kv_heads, 0) !=
                                          p.hit + batch * keys.num_kv_heads;
    if (reads_keys) require_stored_pages(keys, p.blocks);

    const int64_t num_blocks = p.blocks.num_blocks;
    Tensor scores = new_long_output({batch, num_blocks, keys.num_kv_heads, max_seqlen_k},
                                    ScalarType::Float, sizeof(float));
    Tensor lse = new_output({batch, num_blocks, num_vectors, num_q_heads}, ScalarType::Float);
    Tensor num_nonfinite = new_output({batch, num_blocks, keys.num_kv_heads}, ScalarType::Long);
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.num_vectors = num_vectors;
    p.q = as_float(q_arg);
    p.keys = keys.view;
    p.keep = keep;
    p.scale = static_cast<float>(scale);
    p.softcap = read_softcap(softcap);
    p.sink_logits = read_sink_logits(sink_logits, num_q_heads);
    p.normalise_candidates_only = normalise_candidates_only;
    p.max_vote = max_vote;
    p.scores = static_cast<float*>(scores.mutable_data_ptr());
    p.max_seqlen_k = max_seqlen_k;
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.num_nonfinite = static_cast<int64_t*>(num_nonfinite.mutable_data_ptr());
    std::fill_n(p.num_nonfinite, num_nonfinite.numel(), int64_t{0});
    if (p.hit) std::fill_n(p.lse, lse.numel(), -std::numeric_limits<float>::infinity());

    // Blocks that nothing is kept for share the codes of a part while these are in cache. Items are
    // numbered with the block last for that; the kernel numbers them with the KV head last.
    const auto kernel = cpu::current_implementation().score_tokens;
    const int64_t parts = score_tokens_parts(p);
    const auto run = [&](ScoreStage stage, int64_t index, int64_t part_begin, int64_t part_end,
                         float* workspace, float* scratch) {
        const int64_t block = index % num_blocks, list = index / num_blocks;
        const int64_t row = list / p.num_kv_heads, kv_head = list % p.num_kv_heads;
        const int64_t item = (row * num_blocks + block) * p.num_kv_heads + kv_head;
        kernel(p, stage, item, part_begin, part_end, workspace, scratch);
    };
    run_parted(
        PartedWork{batch * num_blocks * p.num_kv_heads, parts, parts,
                   score_tokens_workspace_floats(p), score_tokens_scratch_floats(p), num_blocks},
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

}  // namespace kvselect::bindings
