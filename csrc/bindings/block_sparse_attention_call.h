// What the CPU and the CUDA op have in common: the arguments checked, the params filled, fresh
// outputs.
#pragma once

#include "bindings/block_mask_call.h"
#include "bindings/outputs.h"
#include "kvselect/block_sparse_attention.h"

namespace kvselect::bindings {

struct BlockSparseAttentionCall {
    BlockSparseAttentionParams params;
    Tensor out, lse;
};

inline BlockSparseAttentionCall read_block_sparse_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_mask,
    const OptionalTensor& row_offsets, const OptionalTensor& seqlens_q,
    const OptionalTensor& cache_seqlens, int64_t q_block_size, int64_t kv_block_size, bool causal,
    double softmax_scale, double softcap, Place place) {
    const TensorArg q_arg("q", q, place), k_arg("k", k, place), v_arg("v", v, place);
    BlockSparseAttentionParams p{};
    p.grid = read_block_grid(q_arg, k_arg, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
                             causal, softmax_scale, softcap, place);
    const BlockGrid& g = p.grid;
    v_arg.require_dtype(k_arg.dtype())
        .require_shape({{"batch", g.batch},
                        {"seqlen_k", g.seqlen_k},
                        {"num_kv_heads", g.num_kv_heads},
                        {"head_dim", g.head_dim}});
    p.values = read_cache(v_arg, std::nullopt, g.batch).view;
    if (place.is_cuda) require_aligned_rows(v_arg);
    p.mask = read_block_mask(block_mask, row_offsets, g, place);
    Tensor out = new_output({g.batch, g.seqlen_q, g.num_q_heads, g.head_dim}, q_arg.dtype(), place);
    Tensor lse = new_output({g.batch, g.seqlen_q, g.num_q_heads}, ScalarType::Float, place);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    return {p, std::move(out), std::move(lse)};
}

}  // namespace kvselect::bindings
