// What the CPU and the CUDA op have in common: the arguments checked, the params filled.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "bindings/outputs.h"
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

// All but the queries (`q` is any kernel dtype; the kernels take float32) and the outputs.
inline ScoreTokensParams read_score_tokens(
    const Tensor& q, const OptionalTensor& q_local, const Tensor& k_cache,
    const OptionalTensor& block_table, const Tensor& cache_seqlens, const OptionalTensor& starts,
    const OptionalTensor& sketch, const std::string& format, const OptionalTensor& q_block_offsets,
    int64_t seqlen_q, const std::string& rule, int64_t num_sink_tokens, int64_t num_recent_tokens,
    int64_t keep, double scale, bool normalise_candidates_only, bool max_vote,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t rope_start, bool rope_interleaved,
    const OptionalTensor& hit, int64_t max_seqlen_k, double softcap,
    const OptionalTensor& sink_logits, const OptionalTensor& ranking, bool sketch_in_pages,
    Place place) {
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
    if (hit) {
        const TensorArg hit_arg("hit", *hit, place);
        hit_arg.require_dtype(ScalarType::Int)
            .require_shape({{"batch", batch}, {"num_kv_heads", keys.num_kv_heads}})
            .require_contiguous();
        p.hit = hit_arg.data<int32_t>();
    }
    if (place.host_readable()) {
        // Where every list is reused, no key is read: nothing then grows with the length of a row.
        const int32_t* const end = p.hit ? p.hit + batch * keys.num_kv_heads : nullptr;
        if (!p.hit || std::find(p.hit, end, 0) != end) require_stored_pages(keys, p.blocks);
    }
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
    return p;
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
