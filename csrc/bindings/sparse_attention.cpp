#include "kvselect/sparse_attention.h"

#include <algorithm>

#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> sparse_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor block_table, Tensor cache_seqlens,
    OptionalTensor starts, OptionalTensor indices, OptionalTensor topk_length,
    OptionalTensor q_block_offsets, double softmax_scale, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, double softcap, OptionalTensor sink_logits) {
    const TensorArg q_arg("q", q), k_cache_arg("k_cache", k_cache), v_cache_arg("v_cache", v_cache);
    q_arg.require_shape({{"batch"}, {"seqlen_q"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    const int64_t batch = q_arg.size(0), seqlen_q = q_arg.size(1), num_q_heads = q_arg.size(2);
    const CacheArg keys = read_cache(k_cache_arg, block_table, batch);
    const CacheArg values = read_values(v_cache_arg, k_cache_arg, keys);
    q_arg.require_dtype(keys.scalar_type)
        .require_shape({{"batch", batch},
                        {"seqlen_q", seqlen_q},
                        {"num_q_heads", num_q_heads},
                        {"head_dim", keys.head_dim}});
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);

    SparseAttentionParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q);
    require_all_queries_covered(p.blocks);
    require_stored_pages(keys, p.blocks);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim);
    int64_t longest = 0;  // tokens that one query may attend to
    KVS_CHECK(indices.has_value() == topk_length.has_value(), "topk_length: got ",
              topk_length ? "a tensor" : "None",
              ", allowed: ", indices ? "a tensor, like indices" : "None, like indices");
    if (indices) {
        const IndexListsArg lists =
            read_index_lists(*indices, *topk_length, p.blocks, keys.num_kv_heads);
        p.indices = lists.indices;
        p.topk_length = lists.topk_length;
        std::copy_n(lists.indices_strides, 3, p.indices_strides);
        std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
        require_rope_positions(p.rope, lists.num_ranks);
        longest = lists.num_ranks;
    } else if (p.blocks.num_blocks > 0) {
        for (int64_t row = 0; row < batch; ++row) {
            const BlockRange range = block_range(p.blocks, row, p.blocks.num_blocks - 1);
            require_rope_positions(p.rope, range.end - range.start);
            longest = std::max(longest, range.end - range.start);
        }
    }

    Tensor out = new_output({batch, seqlen_q, num_q_heads, keys.head_dim}, q_arg.dtype());
    Tensor lse = new_output({batch, seqlen_q, num_q_heads}, ScalarType::Float);
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.q = q_arg.data<void>();
    for (int i = 0; i < 3; ++i) p.q_strides[i] = q_arg.stride(i);
    p.keys = keys.view;
    p.values = values.view;
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.softcap = read_softcap(softcap);
    p.sink_logits = read_sink_logits(sink_logits, num_q_heads);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());

    const auto kernel = cpu::current_implementation().sparse_attention;
    const int64_t parts = sparse_attention_has_parts(p) ? sparse_attention_parts(longest) : 1;
    run_parted(
        PartedWork{batch * p.blocks.num_blocks * p.num_kv_heads, parts, 1,
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
    return {out, lse};
}

}  // namespace kvselect::bindings
