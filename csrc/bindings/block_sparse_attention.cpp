#include "kvselect/block_sparse_attention.h"

#include "bindings/block_mask_call.h"
#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> block_sparse_attention(
    Tensor q, Tensor k, Tensor v, Tensor block_mask, OptionalTensor row_offsets,
    OptionalTensor seqlens_q, OptionalTensor cache_seqlens, int64_t q_block_size,
    int64_t kv_block_size, bool causal, double softmax_scale, double softcap) {
    const TensorArg q_arg("q", q), k_arg("k", k), v_arg("v", v);
    BlockSparseAttentionParams p{};
    p.grid = read_block_grid(q_arg, k_arg, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
                             causal, softmax_scale, softcap);
    const BlockGrid& g = p.grid;
    v_arg.require_dtype(k_arg.dtype())
        .require_shape({{"batch", g.batch},
                        {"seqlen_k", g.seqlen_k},
                        {"num_kv_heads", g.num_kv_heads},
                        {"head_dim", g.head_dim}});
    p.values = read_cache(v_arg, std::nullopt, g.batch).view;
    p.mask = read_block_mask(block_mask, row_offsets, g);
    Tensor out = new_output({g.batch, g.seqlen_q, g.num_q_heads, g.head_dim}, q_arg.dtype());
    Tensor lse = new_output({g.batch, g.seqlen_q, g.num_q_heads}, ScalarType::Float);
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    const auto kernel = cpu::current_implementation().block_sparse_attention;
    run_parallel(
        g.batch * g.num_q_heads * g.num_q_blocks(), block_sparse_attention_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return {out, lse};
}

}  // namespace kvselect::bindings
