#include "kvselect/rolling_sweep.h"

#include <algorithm>

#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {
namespace {

// Sinks, picks and recent tokens of the longest list; with "compact", the positions it rotates to.
int64_t longest_list(const RollingSweepParams& p) {
    int64_t longest = 0;
    for (int64_t row = 0; row < p.blocks.batch; ++row) {
        const BlockRange range = block_range(p.blocks, row, 0);
        const int64_t picked = std::min(p.keep, range.window_start - range.sink_end);
        longest = std::max(
            longest, (range.sink_end - range.start) + picked + (range.end - range.window_start));
    }
    return longest;
}

// A list that `hit` reuses must have room for the newest token, and must not hold it yet.
void require_room(const RollingSweepParams& p) {
    const int64_t needed = longest_list(p);
    KVS_CHECK(needed <= p.width, "indices: got width ", p.width, ", allowed: at least ", needed,
              " (sinks, picks and recent tokens)");
    for (int64_t at = 0; p.hit && at < p.blocks.batch * p.num_lists; ++at) {
        if (!p.hit[at]) continue;
        const int64_t row = at / p.num_lists, list = at % p.num_lists;
        const int64_t length = p.topk_length[at];
        KVS_CHECK(length >= 0 && length < p.width, "topk_length: got ", length, " at [", row, ", ",
                  list, "] where hit is set, allowed: 0..", p.width - 1,
                  " (width leaves room for one token more)");
        const int64_t newest = block_range(p.blocks, row, 0).end - 1;
        const int64_t last = length > 0 ? p.indices[at * p.width + length - 1] : -1;
        KVS_CHECK(last < newest, "indices: got ", last, " as the last entry at [", row, ", ", list,
                  "] where hit is set, allowed: below the newest token, ", newest);
    }
}

// The kernel reads keys at these positions. One pass without branches; what is wrong is looked for
// only if something is.
void require_pools(const RollingSweepParams& p) {
    for (int64_t at = 0; at < p.blocks.batch * p.num_lists; ++at) {
        const int64_t seqlen = p.blocks.cache_seqlens[at / p.num_lists];
        KVS_CHECK(p.next_segment[at] >= 0 && p.next_segment[at] < p.num_segments,
                  "next_segment: got ", p.next_segment[at], ", allowed: 0..", p.num_segments - 1);
        for (int64_t pool = at * p.num_segments; pool < (at + 1) * p.num_segments; ++pool) {
            const int64_t length = p.pool_length[pool];
            KVS_CHECK(length >= 0 && length <= p.pool_width, "pool_length: got ", length,
                      ", allowed: 0..", p.pool_width, " (the width of pool)");
            if (p.scanned_to[pool] <= 0) continue;  // void: nobody reads it
            const int32_t* members = p.pool + pool * p.pool_width;
            int32_t disorder = 0;
            for (int64_t i = 1; i < length; ++i) disorder |= members[i - 1] >= members[i];
            const bool inside =
                length == 0 || (members[0] >= 0 && members[length - 1] < p.scanned_to[pool] &&
                                members[length - 1] < seqlen);
            KVS_CHECK(!disorder && inside, "pool: got positions ", length ? members[0] : 0, "..",
                      length ? members[length - 1] : 0, disorder ? " that do not ascend" : "",
                      " in segment ", pool % p.num_segments, " of row ", at / p.num_lists,
                      ", allowed: ascending positions in 0..",
                      std::min<int64_t>(seqlen, p.scanned_to[pool]) - 1);
        }
    }
}

}  // namespace

std::tuple<Tensor, Tensor> rolling_sweep(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, OptionalTensor cos, OptionalTensor sin, int64_t rope_start,
    bool rope_interleaved, OptionalTensor hit, OptionalTensor scan_all, Tensor pool,
    Tensor pool_length, Tensor scanned_to, Tensor next_segment, Tensor indices, Tensor topk_length,
    Tensor kept_score, double softcap, OptionalTensor sink_logits) {
    const std::string format = take_string(sketch_format);
    require_count("num_sink_tokens", num_sink_tokens, 0);
    require_count("num_recent_tokens", num_recent_tokens, 0);
    require_count("keep", keep, 0);

    const TensorArg q_arg("q", q), cache_arg("k_cache", k_cache);
    q_arg.require_dtype(ScalarType::Float)
        .require_shape({{"batch"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous();
    const int64_t batch = q_arg.size(0), num_q_heads = q_arg.size(1);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);
    const Dim batch_dim{"batch", batch};
    const std::initializer_list<Dim> q_shape{
        batch_dim, {"num_q_heads", num_q_heads}, {"head_dim", keys.head_dim}};
    q_arg.require_shape(q_shape);

    RollingSweepParams p{};
    p.q = q_arg.data<float>();
    if (q_local) {
        const TensorArg local_arg("q_local", *q_local);
        local_arg.require_dtype(ScalarType::Float).require_shape(q_shape).require_contiguous();
        p.q_local = local_arg.data<float>();
    }
    p.blocks = read_query_blocks(cache_seqlens, starts, std::nullopt, batch, 1);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    require_stored_pages(keys, p.blocks);
    int64_t longest = 0;
    for (int64_t row = 0; row < batch; ++row)
        longest = std::max<int64_t>(longest, p.blocks.cache_seqlens[row]);
    p.sketch = read_sketch(sketch, format, batch, keys.num_kv_heads, keys.head_dim, longest);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim);
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.keys = keys.view;
    p.keep = keep;
    p.scale = static_cast<float>(scale);
    p.softcap = read_softcap(softcap);
    p.sink_logits = read_sink_logits(sink_logits, num_q_heads);
    p.normalise_candidates_only = normalise_candidates_only;

    const TensorArg pool_arg("pool", pool);
    pool_arg.require_dtype(ScalarType::Int)
        .require_shape({batch_dim, {"num_lists"}, {"num_segments"}, {"pool_width"}})
        .require_contiguous();
    p.num_lists = pool_arg.size(1);
    p.num_segments = pool_arg.size(2);
    p.pool_width = pool_arg.size(3);
    KVS_CHECK(p.num_lists == 1 || p.num_lists == p.num_kv_heads, "num_lists: got ", p.num_lists,
              ", allowed: num_kv_heads = ", p.num_kv_heads, ", or 1 list for all heads");
    KVS_CHECK(p.num_segments >= 2 && p.num_segments <= kMaxSegments, "num_segments: got ",
              p.num_segments, ", allowed: 2..", kMaxSegments);
    const Dim lists_dim{"num_lists", p.num_lists}, segments_dim{"num_segments", p.num_segments};
    const auto list_numbers = [&](const char* name, const Tensor& tensor,
                                  std::initializer_list<Dim> shape) {
        return TensorArg(name, tensor)
            .require_dtype(ScalarType::Int)
            .require_shape(shape)
            .require_contiguous()
            .mutable_data<int32_t>();
    };
    p.pool = pool_arg.mutable_data<int32_t>();
    p.pool_length = list_numbers("pool_length", pool_length, {batch_dim, lists_dim, segments_dim});
    p.scanned_to = list_numbers("scanned_to", scanned_to, {batch_dim, lists_dim, segments_dim});
    p.next_segment = list_numbers("next_segment", next_segment, {batch_dim, lists_dim});
    if (hit) p.hit = list_numbers("hit", *hit, {batch_dim, lists_dim});
    if (scan_all) p.scan_all = list_numbers("scan_all", *scan_all, {batch_dim, lists_dim});
    p.indices = list_numbers("indices", indices, {batch_dim, lists_dim, {"width"}});
    p.width = indices.size(2);
    p.topk_length = list_numbers("topk_length", topk_length, {batch_dim, lists_dim});
    p.kept_score = TensorArg("kept_score", kept_score)
                       .require_dtype(ScalarType::Float)
                       .require_shape({batch_dim, lists_dim})
                       .require_contiguous()
                       .mutable_data<float>();
    require_room(p);
    require_pools(p);
    if (p.rope.cos) require_rope_positions(p.rope, longest_list(p));

    p.room = rolling_sweep_room(p);
    Tensor num_seen = new_output({batch, p.num_lists, 2}, ScalarType::Int);
    Tensor num_nonfinite = new_output({batch, p.num_kv_heads}, ScalarType::Long);
    p.num_seen = static_cast<int32_t*>(num_seen.mutable_data_ptr());
    p.num_nonfinite = static_cast<int64_t*>(num_nonfinite.mutable_data_ptr());
    p.votes = SharedWorkspace::get(batch * p.num_kv_heads * p.room);

    const auto kernel = cpu::current_implementation().rolling_sweep;
    for (const SweepStage stage : {SweepStage::kVote, SweepStage::kPick})
        run_parallel(rolling_sweep_items(p, stage), rolling_sweep_scratch_floats(p),
                     [&](int64_t begin, int64_t end, float* scratch) {
                         kernel(p, stage, begin, end, scratch);
                     });
    SharedWorkspace::give_back_if_large();
    return {num_seen, num_nonfinite};
}

}  // namespace kvselect::bindings
