// What the CPU and the CUDA op have in common: the arguments checked, the params filled, fresh
// outputs.
#pragma once

#include <algorithm>
#include <limits>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "kvselect/gather_tokens.h"

namespace kvselect::bindings {

struct GatherTokensCall {
    GatherTokensParams params;
    Tensor k, v, cu_seqlens;
};

inline GatherTokensCall read_gather_tokens(const Tensor& k_cache, const Tensor& v_cache,
                                           const OptionalTensor& block_table,
                                           const Tensor& cache_seqlens,
                                           const OptionalTensor& starts, const Tensor& indices,
                                           const Tensor& topk_length,
                                           const OptionalTensor& q_block_offsets, int64_t seqlen_q,
                                           const OptionalTensor& cos, const OptionalTensor& sin,
                                           int64_t rope_start, bool rope_interleaved, Place place) {
    const TensorArg k_cache_arg("k_cache", k_cache, place), v_cache_arg("v_cache", v_cache, place),
        indices_arg("indices", indices, place);
    indices_arg.require_shape({{"batch"}, {"num_blocks"}, {"num_kv_heads"}, {"width"}});
    const int64_t batch = indices_arg.size(0);
    const CacheArg keys = read_cache(k_cache_arg, block_table, batch);
    const CacheArg values = read_values(v_cache_arg, k_cache_arg, keys);
    require_heads(keys.num_kv_heads, keys.num_kv_heads, keys.head_dim);
    if (place.is_cuda) {
        require_cuda_head_dim(keys.head_dim);
        for (const TensorArg* arg : {&k_cache_arg, &v_cache_arg}) require_aligned_rows(*arg);
    }

    GatherTokensParams p{};
    p.dtype = keys.dtype;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.keys = keys.view;
    p.values = values.view;
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    if (place.host_readable()) require_stored_pages(keys, p.blocks);
    p.rope = read_rope(cos, sin, rope_start, rope_interleaved, keys.head_dim, place);
    const IndexListsArg lists =
        read_index_lists(indices, topk_length, p.blocks, keys.num_kv_heads, place);
    p.indices = lists.indices;
    p.topk_length = lists.topk_length;
    std::copy_n(lists.indices_strides, 3, p.indices_strides);
    std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
    p.width = indices_arg.size(3);
    const int64_t num_lists = gather_tokens_lists(p);
    KVS_CHECK(num_lists * p.width <= std::numeric_limits<int32_t>::max(), "indices: got room for ",
              num_lists * p.width, " tokens, allowed: at most ",
              std::numeric_limits<int32_t>::max(), " in one call");
    if (place.host_readable()) {
        require_rope_positions(p.rope, lists.num_ranks);
        for (int64_t number = 0; number < num_lists; ++number) {
            const GatheredList list = gathered_list(p, number);
            KVS_CHECK(ends_with_its_block(p, list), "indices: got a list at [", list.row, ", ",
                      list.block, ", ", list.kv_head,
                      "] that does not end with all tokens of its block, allowed: lists that do, "
                      "for a dense kernel (sparse_attention takes any)");
        }
    }
    const auto new_rows = [&] {
        const int64_t num_rows = num_lists * p.width;
        return place.is_cuda ? new_output({num_rows, p.head_dim}, k_cache_arg.dtype(), place)
                             : new_long_output({num_rows, p.head_dim}, k_cache_arg.dtype(),
                                               keys.dtype == DType::kFloat32 ? 4 : 2);
    };
    Tensor k = new_rows(), v = new_rows();
    Tensor cu_seqlens = new_output({num_lists + 1}, ScalarType::Int, place);
    p.k = k.mutable_data_ptr();
    p.v = v.mutable_data_ptr();
    p.cu_seqlens = static_cast<int32_t*>(cu_seqlens.mutable_data_ptr());
    return {p, std::move(k), std::move(v), std::move(cu_seqlens)};
}

}  // namespace kvselect::bindings
