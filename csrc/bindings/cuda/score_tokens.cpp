#include "kvselect/score_tokens.h"

#include "bindings/aligned_rows.h"
#include "bindings/cuda/ops.h"
#include "bindings/outputs.h"

namespace kvselect::bindings::cuda {

// Lists that `hit` skips keep whatever the fresh memory of `scores` held, as on the CPU. What
// lengths and pages say is not checked: it lies on the device.
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
    const OnDevice device("q", q);
    const Place place = device.place();

    // A decode step brings its queries as the model made them.
    (void)kernel_dtype(TensorArg("q", q, place));
    if (q.scalar_type() != ScalarType::Float) q = torch::stable::to(q, ScalarType::Float);
    const TensorArg q_arg("q", q, place), cache_arg("k_cache", k_cache, place);
    q_arg.require_dtype(ScalarType::Float)
        .require_shape({{"batch"}, {"num_blocks"}, {"num_vectors"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous();
    const int64_t batch = q_arg.size(0), num_vectors = q_arg.size(2), num_q_heads = q_arg.size(3);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);
    require_cuda_head_dim(keys.head_dim);
    require_aligned_rows(cache_arg, keys.dtype == DType::kFloat32 ? 4 : 2);
    require_count("num_vectors", num_vectors, 1);
    KVS_CHECK(num_vectors * (num_q_heads / keys.num_kv_heads) <= kMaxScoreColumns,
              "num_vectors: got ", num_vectors, ", allowed: at most ",
              kMaxScoreColumns / (num_q_heads / keys.num_kv_heads), " with ", num_q_heads,
              " query heads over ", keys.num_kv_heads, " KV heads");

    ScoreTokensParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    p.blocks.rule = bindings::window_rule(rule);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    const auto require_queries = [&](const TensorArg& arg) {
        arg.require_dtype(ScalarType::Float)
            .require_shape({{"batch", batch},
                            {"num_blocks", p.blocks.num_blocks},
                            {"num_vectors", num_vectors},
                            {"num_q_heads", num_q_heads},
                            {"head_dim", keys.head_dim}})
            .require_contiguous();
        return arg.data<float>();
    };
    p.q = require_queries(q_arg);
    if (q_local) p.q_local = require_queries(TensorArg("q_local", *q_local, place));
    // Rows are at most max_seqlen_k long; blocks past the sketch's would be read where they are
    // longer.
    p.sketch = read_sketch(sketch, format, batch, keys.num_kv_heads, keys.head_dim, 0, place);
    if (sketch) require_aligned_rows(TensorArg("sketch", *sketch, place), 1);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim, place);
    if (hit) {
        const TensorArg hit_arg("hit", *hit, place);
        hit_arg.require_dtype(ScalarType::Int)
            .require_shape({{"batch", batch}, {"num_kv_heads", keys.num_kv_heads}})
            .require_contiguous();
        p.hit = hit_arg.data<int32_t>();
    }

    const int64_t num_blocks = p.blocks.num_blocks;
    Tensor scores =
        new_output({batch, num_blocks, keys.num_kv_heads, max_seqlen_k}, ScalarType::Float, place);
    Tensor lse =
        new_output({batch, num_blocks, num_vectors, num_q_heads}, ScalarType::Float, place);
    Tensor num_nonfinite =
        new_output({batch, num_blocks, keys.num_kv_heads}, ScalarType::Long, place);
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
    p.scores = static_cast<float*>(scores.mutable_data_ptr());
    p.max_seqlen_k = max_seqlen_k;
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.num_nonfinite = static_cast<int64_t*>(num_nonfinite.mutable_data_ptr());
    const Tensor workspace =
        new_output({kvselect::cuda::score_tokens_workspace_bytes(p)}, ScalarType::Byte, place);
    kvselect::cuda::score_tokens(p, workspace.mutable_data_ptr(), device.launch());
    return {scores, lse, num_nonfinite};
}

}  // namespace kvselect::bindings::cuda
