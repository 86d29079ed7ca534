#include "kvselect/sparse_attention.h"

#include <algorithm>

#include "bindings/aligned_rows.h"
#include "bindings/cuda/ops.h"
#include "bindings/outputs.h"

namespace kvselect::bindings::cuda {

// List entries that are no token of the row are skipped; everything else that lists and lengths
// hold is the caller's to guarantee: it lies on the device.
std::tuple<Tensor, Tensor> sparse_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor block_table, Tensor cache_seqlens,
    OptionalTensor starts, OptionalTensor indices, OptionalTensor topk_length,
    OptionalTensor q_block_offsets, double softmax_scale, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, double softcap, OptionalTensor sink_logits) {
    const OnDevice device("q", q);
    const Place place = device.place();
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
    require_cuda_head_dim(keys.head_dim);
    for (const TensorArg* arg : {&k_cache_arg, &v_cache_arg})
        require_aligned_rows(*arg, keys.dtype == DType::kFloat32 ? 4 : 2);

    SparseAttentionParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim, place);
    KVS_CHECK(indices.has_value() == topk_length.has_value(), "topk_length: got ",
              topk_length ? "a tensor" : "None",
              ", allowed: ", indices ? "a tensor, like indices" : "None, like indices");
    int64_t longest = keys.capacity_tokens;
    if (indices) {
        const IndexListsArg lists =
            read_index_lists(*indices, *topk_length, p.blocks, keys.num_kv_heads, place);
        p.indices = lists.indices;
        p.topk_length = lists.topk_length;
        std::copy_n(lists.indices_strides, 3, p.indices_strides);
        std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
        longest = lists.num_ranks - 1;
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
    const Tensor workspace = new_output(
        {kvselect::cuda::sparse_attention_workspace_bytes(p, longest)}, ScalarType::Byte, place);
    kvselect::cuda::sparse_attention(p, longest, workspace.mutable_data_ptr(), device.launch());
    return {out, lse};
}

}  // namespace kvselect::bindings::cuda
