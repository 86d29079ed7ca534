#include "kvselect/block_mass.h"

#include "bindings/block_mask_call.h"
#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

Tensor block_mass(Tensor q, Tensor k, OptionalTensor lse, OptionalTensor seqlens_q,
                  OptionalTensor cache_seqlens, int64_t q_block_size, int64_t kv_block_size,
                  bool causal, int64_t row_stride, double softmax_scale, double softcap) {
    const TensorArg q_arg("q", q), k_arg("k", k);
    require_count("row_stride", row_stride, 1);
    BlockMassParams p{};
    p.grid = read_block_grid(q_arg, k_arg, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
                             causal, softmax_scale, softcap);
    const BlockGrid& g = p.grid;
    p.row_stride = row_stride;
    if (lse) {
        const TensorArg lse_arg("lse", *lse);
        lse_arg.require_dtype(ScalarType::Float)
            .require_shape(
                {{"batch", g.batch}, {"seqlen_q", g.seqlen_q}, {"num_q_heads", g.num_q_heads}});
        p.lse = lse_arg.data<float>();
        for (int i = 0; i < 3; ++i) p.lse_strides[i] = lse_arg.stride(i);
    }
    Tensor mass = new_output({g.batch, g.num_q_heads, g.num_q_blocks(), g.num_kv_blocks()},
                             ScalarType::Float);
    p.mass = static_cast<float*>(mass.mutable_data_ptr());
    const auto kernel = cpu::current_implementation().block_mass;
    run_parallel(
        g.batch * g.num_q_heads * g.num_q_blocks(), block_mass_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return mass;
}

}  // namespace kvselect::bindings
