// What the CPU and the CUDA op have in common: the arguments checked, the params filled.
#pragma once

#include <algorithm>
#include <string>

#include "bindings/checks.h"
#include "kvselect/select_tokens.h"

namespace kvselect::bindings {

// Nothing is truncated: every list must have room for its sinks, picks and recent tokens. A list
// that `hit` reuses must have room for the newest token, and must not hold it yet.
inline void require_width(const SelectTokensParams& p) {
    for (int64_t row = 0; row < p.blocks.batch; ++row) {
        for (int64_t block = 0; block < p.blocks.num_blocks; ++block) {
            const BlockRange range = block_range(p.blocks, row, block);
            const int64_t needed = (range.sink_end - range.start) +
                                   std::min(p.keep, range.window_start - range.sink_end) +
                                   (range.end - range.window_start);
            for (int64_t list = 0; list < p.num_lists; ++list) {
                const int64_t at = row * p.num_lists + list;
                if (!p.hit || !p.hit[at]) {
                    KVS_CHECK(needed <= p.width, "indices: got width ", p.width,
                              ", allowed: at least ", needed,
                              " (sinks, picks and recent tokens of row ", row, ", block ", block,
                              ")");
                    continue;
                }
                const int64_t length = p.topk_length[at];
                KVS_CHECK(length >= 0 && length < p.width, "topk_length: got ", length, " at [",
                          row, ", ", list, "] where hit is set, allowed: 0..", p.width - 1,
                          " (width leaves room for one token more)");
                const int64_t newest = range.end - 1;
                const int64_t last = length > 0 ? p.indices[at * p.width + length - 1] : -1;
                KVS_CHECK(last < newest, "indices: got ", last, " as the last entry at [", row,
                          ", ", list, "] where hit is set, allowed: below the newest token, ",
                          newest);
            }
        }
    }
}

inline SelectTokensParams read_select_tokens(
    const Tensor& scores, const Tensor& cache_seqlens, const OptionalTensor& starts,
    const OptionalTensor& q_block_offsets, int64_t seqlen_q, const std::string& rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, int64_t pool_width,
    const OptionalTensor& hit, const Tensor& indices, const Tensor& topk_length,
    const Tensor& kept_score, const OptionalTensor& ranking, Place place) {
    require_count("num_sink_tokens", num_sink_tokens, 0);
    require_count("num_recent_tokens", num_recent_tokens, 0);
    require_count("keep", keep, 0);
    KVS_CHECK(pool_width >= 1 && pool_width % 2 == 1, "pool_width: got ", pool_width,
              ", allowed: an odd int >= 1");

    const TensorArg scores_arg("scores", scores, place), indices_arg("indices", indices, place),
        length_arg("topk_length", topk_length, place), kept_arg("kept_score", kept_score, place);
    scores_arg.require_dtype(ScalarType::Float)
        .require_shape({{"batch"}, {"num_blocks"}, {"num_lists"}, {"seqlen_k"}})
        .require_contiguous_rows();
    const int64_t batch = scores_arg.size(0), num_lists = scores_arg.size(2);

    SelectTokensParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    p.blocks.rule = window_rule(rule);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    const Dim batch_dim{"batch", batch}, blocks_dim{"num_blocks", p.blocks.num_blocks},
        lists_dim{"num_lists", num_lists};
    scores_arg.require_shape({batch_dim, blocks_dim, lists_dim, {"seqlen_k"}});
    if (place.host_readable()) require_max_seqlen("scores: seqlen_k", scores_arg.size(3), p.blocks);
    indices_arg.require_dtype(ScalarType::Int)
        .require_shape({batch_dim, blocks_dim, lists_dim, {"width"}})
        .require_contiguous();
    length_arg.require_dtype(ScalarType::Int)
        .require_shape({batch_dim, blocks_dim, lists_dim})
        .require_contiguous();
    kept_arg.require_dtype(ScalarType::Float)
        .require_shape({batch_dim, blocks_dim, lists_dim})
        .require_contiguous();
    if (hit) {
        KVS_CHECK(p.blocks.num_blocks == 1, "hit: got ", p.blocks.num_blocks,
                  " query blocks, allowed: 1 (a list is reused from one decode step to the next)");
        const TensorArg hit_arg("hit", *hit, place);
        hit_arg.require_dtype(ScalarType::Int)
            .require_shape({batch_dim, lists_dim})
            .require_contiguous();
        p.hit = hit_arg.data<int32_t>();
    }
    p.num_lists = num_lists;
    p.scores = scores_arg.data<float>();
    for (int i = 0; i < 3; ++i) p.scores_strides[i] = scores_arg.stride(i);
    p.max_seqlen_k = scores_arg.size(3);
    p.keep = keep;
    p.pool_width = pool_width;
    p.width = indices_arg.size(3);
    p.indices = indices_arg.mutable_data<int32_t>();
    p.topk_length = length_arg.mutable_data<int32_t>();
    p.kept_score = kept_arg.mutable_data<float>();
    p.ranking = read_ranking(ranking, batch, p.blocks.num_blocks, num_lists, place);
    KVS_CHECK(!p.ranking || pool_width == 1, "pool_width: got ", pool_width,
              ", allowed: 1 with a ranking (score_tokens counted scores, not their maxima)");
    if (place.host_readable()) require_width(p);
    return p;
}

}  // namespace kvselect::bindings
