// What the CPU and the CUDA op have in common: the arguments checked, the params filled.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "bindings/selection_cache_step_call.h"
#include "kvselect/score_tokens.h"

namespace kvselect::bindings {

// Positions that "compact" rotates to: sinks keep their rank, the window follows the picked tokens.
inline int64_t compact_positions(const QueryBlocks& blocks, int64_t keep) {
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

// Tensors and settings of a selection cache, with which the call first decides which lists are
// reused.
struct ReuseArgs {
    const Tensor &compared_q, &cache_nonfinite;
    std::string similarity;
    double similarity_threshold;
    int64_t max_age, dense_limit;
    const Tensor &anchor_query, &age, &expected_seqlens, &known_nonfinite, &reuse_counts;
};

// `hit` and `reuse` of the params.
inline void read_reuse(const ReuseArgs* args, const OptionalTensor& hit,
                       const Tensor& cache_seqlens, const OptionalTensor& starts,
                       const CacheArg& keys, ScoreTokensParams* p, Place place) {
    if (!hit) return;
    const TensorArg hit_arg("hit", *hit, place);
    hit_arg.require_dtype(ScalarType::Int)
        .require_shape({{"batch", p->blocks.batch}, {"num_lists"}})
        .require_contiguous();
    p->num_hit_lists = hit_arg.size(1);
    KVS_CHECK(p->num_hit_lists == 1 || p->num_hit_lists == p->num_kv_heads, "hit: got ",
              p->num_hit_lists, " lists, allowed: 1 or num_kv_heads = ", p->num_kv_heads);
    p->hit = hit_arg.data<int32_t>();
    if (!args) return;
    KVS_CHECK(p->blocks.num_blocks == 1, "q: got ", p->blocks.num_blocks,
              " blocks of queries, allowed: 1 with a selection cache, as a decode step has");
    SelectionCacheStepParams& reuse = p->reuse;
    reuse = read_selection_cache_step(
        {"compared_q", "cache_nonfinite"}, args->compared_q, cache_seqlens, starts,
        args->cache_nonfinite, args->similarity, args->similarity_threshold, args->max_age,
        args->dense_limit, args->anchor_query, args->age, args->expected_seqlens,
        args->known_nonfinite, args->reuse_counts, place);
    KVS_CHECK(reuse.batch == p->blocks.batch && reuse.num_kv_heads == p->num_kv_heads,
              "cache_nonfinite: got shape [", reuse.batch, ", ", reuse.num_kv_heads,
              "], allowed: [batch=", p->blocks.batch, ", num_kv_heads=", p->num_kv_heads, "]");
    TensorArg("compared_q", args->compared_q, place)
        .require_dtype(keys.scalar_type)
        .require_shape({{"batch", p->blocks.batch},
                        {"seqlen_q", 1},
                        {"num_q_heads", p->num_q_heads},
                        {"head_dim", p->head_dim}});
    KVS_CHECK(reuse.num_lists == p->num_hit_lists, "age: got ", reuse.num_lists,
              " lists, allowed: as many as hit, ", p->num_hit_lists);
    reuse.hit = hit_arg.mutable_data<int32_t>();
}

struct ScoreTokensCall {
    ScoreTokensParams params;
    CacheArg keys;
};

// All but the queries (`q` is any kernel dtype; the kernels take float32) and the outputs, and but
// for the pages of stored tokens: which of them are read the selection cache may say.
inline ScoreTokensCall read_score_tokens(
    const Tensor& q, const OptionalTensor& q_local, const Tensor& k_cache,
    const OptionalTensor& block_table, const Tensor& cache_seqlens, const OptionalTensor& starts,
    const OptionalTensor& sketch, const std::string& format, const OptionalTensor& q_block_offsets,
    int64_t seqlen_q, const std::string& rule, int64_t num_sink_tokens, int64_t num_recent_tokens,
    int64_t keep, double scale, bool normalise_candidates_only, bool max_vote,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t rope_start, bool rope_interleaved,
    const OptionalTensor& hit, int64_t max_seqlen_k, double softcap,
    const OptionalTensor& sink_logits, const OptionalTensor& ranking, bool sketch_in_pages,
    const ReuseArgs* reuse, Place place) {
    require_count("num_sink_tokens", num_sink_tokens, 0);
    require_count("num_recent_tokens", num_recent_tokens, 0);
    require_count("keep", keep, 0);
    require_count("max_seqlen_k", max_seqlen_k, 0);

    const TensorArg q_arg("q", q, place), cache_arg("k_cache", k_cache, place);
    (void)kernel_dtype(q_arg);
    q_arg.require_shape({{"batch"}, {"num_blocks"}, {"num_vectors"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous();
    const int64_t batch = q_arg.size(0), num_vectors = q_arg.size(2), num_q_heads = q_arg.size(3);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);
    if (place.is_cuda) {
        require_cuda_head_dim(keys.head_dim);
        require_aligned_rows(cache_arg);
    }
    require_count("num_vectors", num_vectors, 1);
    KVS_CHECK(num_vectors * (num_q_heads / keys.num_kv_heads) <= kMaxScoreColumns,
              "num_vectors: got ", num_vectors, ", allowed: at most ",
              kMaxScoreColumns / (num_q_heads / keys.num_kv_heads), " with ", num_q_heads,
              " query heads over ", keys.num_kv_heads, " KV heads");

    ScoreTokensParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    p.blocks.rule = window_rule(rule);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    const auto require_queries = [&](const TensorArg& arg) {
        arg.require_shape({{"batch", batch},
                           {"num_blocks", p.blocks.num_blocks},
                           {"num_vectors", num_vectors},
                           {"num_q_heads", num_q_heads},
                           {"head_dim", keys.head_dim}});
    };
    require_queries(q_arg);
    if (q_local) {
        const TensorArg local_arg("q_local", *q_local, place);
        local_arg.require_dtype(ScalarType::Float);
        require_queries(local_arg);
        local_arg.require_contiguous();
        p.q_local = local_arg.data<float>();
    }
    // On CUDA rows are at most max_seqlen_k long; blocks past the sketch's would be read where they
    // are longer.
    int64_t longest = 0;
    if (place.host_readable()) {
        require_max_seqlen("max_seqlen_k", max_seqlen_k, p.blocks);
        for (int64_t row = 0; row < batch; ++row)
            longest = std::max<int64_t>(longest, p.blocks.cache_seqlens[row]);
    }
    p.sketch = sketch_in_pages ? read_paged_sketch(sketch, format, keys, starts, place)
                               : read_sketch(sketch, format, batch, keys.num_kv_heads,
                                             keys.head_dim, longest, place);
    if (sketch && place.is_cuda) require_aligned_rows(TensorArg("sketch", *sketch, place));
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim, place);
    if (p.rope.cos && place.host_readable())
        require_rope_positions(p.rope, compact_positions(p.blocks, keep));
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.num_vectors = num_vectors;
    p.keys = keys.view;
    p.keep = keep;
    p.scale = static_cast<float>(scale);
    p.softcap = read_softcap(softcap);
    p.sink_logits = read_sink_logits(sink_logits, num_q_heads, place);
    p.normalise_candidates_only = normalise_candidates_only;
    p.max_vote = max_vote;
    p.max_seqlen_k = max_seqlen_k;
    p.ranking = read_ranking(ranking, batch, p.blocks.num_blocks, keys.num_kv_heads, place);
    KVS_CHECK(!p.ranking || p.blocks.rule != WindowRule::kBlockEnd,
              "window_rule: got 'block_end', allowed: decode, block_start with a ranking (which "
              "counts no candidates among a block's own tokens)");
    read_reuse(reuse, hit, cache_seqlens, starts, keys, &p, place);
    return {p, keys};
}

// The op's results, which `p` writes to.
inline std::tuple<Tensor, Tensor, Tensor> score_tokens_outputs(ScoreTokensParams* p, Tensor scores,
                                                               Place place) {
    const int64_t batch = p->blocks.batch, num_blocks = p->blocks.num_blocks;
    Tensor lse =
        new_output({batch, num_blocks, p->num_vectors, p->num_q_heads}, ScalarType::Float, place);
    Tensor num_nonfinite =
        new_output({batch, num_blocks, p->num_kv_heads}, ScalarType::Long, place);
    p->scores = static_cast<float*>(scores.mutable_data_ptr());
    p->lse = static_cast<float*>(lse.mutable_data_ptr());
    p->num_nonfinite = static_cast<int64_t*>(num_nonfinite.mutable_data_ptr());
    return {std::move(scores), std::move(lse), std::move(num_nonfinite)};
}

}  // namespace kvselect::bindings
