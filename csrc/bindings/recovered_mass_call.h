// What the CPU and the CUDA op have in common: the arguments checked, the params filled, a fresh
// output.
#pragma once

#include <algorithm>
#include <utility>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "kvselect/recovered_mass.h"

namespace kvselect::bindings {

struct RecoveredMassCall {
    RecoveredMassParams params;
    int64_t longest_list;     // entries that a list can have
    int64_t capacity_tokens;  // of a row
    Tensor mass;
};

inline RecoveredMassCall read_recovered_mass(
    const Tensor& q, const Tensor& k_cache, const OptionalTensor& block_table,
    const Tensor& cache_seqlens, const OptionalTensor& starts, const Tensor& indices,
    const Tensor& topk_length, const OptionalTensor& q_block_offsets, double softmax_scale,
    int64_t max_seqlen_k, double softcap, Place place) {
    require_count("max_seqlen_k", max_seqlen_k, 0);
    const TensorArg q_arg("q", q, place), cache_arg("k_cache", k_cache, place);
    q_arg.require_shape({{"batch"}, {"seqlen_q"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    const int64_t batch = q_arg.size(0), seqlen_q = q_arg.size(1), num_q_heads = q_arg.size(2);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    q_arg.require_dtype(keys.scalar_type)
        .require_shape({{"batch", batch},
                        {"seqlen_q", seqlen_q},
                        {"num_q_heads", num_q_heads},
                        {"head_dim", keys.head_dim}});
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);
    if (place.is_cuda) {
        require_cuda_head_dim(keys.head_dim);
        require_aligned_rows(cache_arg);
    }

    RecoveredMassParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    if (place.host_readable()) {
        require_all_queries_covered(p.blocks);
        require_stored_pages(keys, p.blocks);
        require_max_seqlen("max_seqlen_k", max_seqlen_k, p.blocks);
    }
    const IndexListsArg lists =
        read_index_lists(indices, topk_length, p.blocks, keys.num_kv_heads, place);

    Tensor mass = new_output({batch, seqlen_q, num_q_heads}, ScalarType::Float, place);
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.q = q_arg.data<void>();
    for (int i = 0; i < 3; ++i) p.q_strides[i] = q_arg.stride(i);
    p.keys = keys.view;
    p.indices = lists.indices;
    p.topk_length = lists.topk_length;
    std::copy_n(lists.indices_strides, 3, p.indices_strides);
    std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.softcap = read_softcap(softcap);
    p.max_seqlen_k = max_seqlen_k;
    p.mass = static_cast<float*>(mass.mutable_data_ptr());
    return {p, lists.num_ranks, keys.capacity_tokens, std::move(mass)};
}

}  // namespace kvselect::bindings
