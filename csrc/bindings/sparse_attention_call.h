// What the CPU and the CUDA op have in common: the arguments checked, the params filled, fresh
// outputs.
#pragma once

#include <algorithm>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "kvselect/sparse_attention.h"

namespace kvselect::bindings {

struct SparseAttentionCall {
    SparseAttentionParams params;
    int64_t longest;  // tokens that one query may attend to; on CUDA, at most
    Tensor out, lse;
};

inline SparseAttentionCall read_sparse_attention(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    const OptionalTensor& block_table, const Tensor& cache_seqlens, const OptionalTensor& starts,
    const OptionalTensor& indices, const OptionalTensor& topk_length,
    const OptionalTensor& q_block_offsets, double softmax_scale, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t rope_start, bool rope_interleaved, double softcap,
    const OptionalTensor& sink_logits, Place place) {
    const TensorArg q_arg("q", q, place), k_cache_arg("k_cache", k_cache, place),
        v_cache_arg("v_cache", v_cache, place);
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
    if (place.is_cuda) {
        require_cuda_head_dim(keys.head_dim);
        for (const TensorArg* arg : {&k_cache_arg, &v_cache_arg}) require_aligned_rows(*arg);
    }

    SparseAttentionParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    if (place.host_readable()) {
        require_all_queries_covered(p.blocks);
        require_stored_pages(keys, p.blocks);
    }
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim, place);
    int64_t longest = place.host_readable() ? 0 : keys.capacity_tokens;
    KVS_CHECK(indices.has_value() == topk_length.has_value(), "topk_length: got ",
              topk_length ? "a tensor" : "None",
              ", allowed: ", indices ? "a tensor, like indices" : "None, like indices");
    if (indices) {
        const IndexListsArg lists =
            read_index_lists(*indices, *topk_length, p.blocks, keys.num_kv_heads, place);
        p.indices = lists.indices;
        p.topk_length = lists.topk_length;
        std::copy_n(lists.indices_strides, 3, p.indices_strides);
        std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
        if (place.host_readable()) require_rope_positions(p.rope, lists.num_ranks);
        longest = lists.num_ranks;
    } else if (place.host_readable() && p.blocks.num_blocks > 0) {
        for (int64_t row = 0; row < batch; ++row) {
            const BlockRange range = block_range(p.blocks, row, p.blocks.num_blocks - 1);
            require_rope_positions(p.rope, range.end - range.start);
            longest = std::max(longest, range.end - range.start);
        }
    }

    Tensor out = new_output({batch, seqlen_q, num_q_heads, keys.head_dim}, q_arg.dtype(), place);
    Tensor lse = new_output({batch, seqlen_q, num_q_heads}, ScalarType::Float, place);
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
    p.sink_logits = read_sink_logits(sink_logits, num_q_heads, place);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    return {p, longest, std::move(out), std::move(lse)};
}

}  // namespace kvselect::bindings
