// What the CPU and the CUDA op have in common: the arguments checked, the params filled, a fresh
// output.
#pragma once

#include <algorithm>

#include "bindings/block_mask_call.h"
#include "bindings/outputs.h"
#include "kvselect/block_mass.h"

namespace kvselect::bindings {

struct BlockMassCall {
    BlockMassParams params;
    Tensor mass;
};

inline BlockMassCall read_block_mass(const Tensor& q, const Tensor& k, const OptionalTensor& lse,
                                     const OptionalTensor& seqlens_q,
                                     const OptionalTensor& cache_seqlens, int64_t q_block_size,
                                     int64_t kv_block_size, bool causal, int64_t row_stride,
                                     double softmax_scale, double softcap, Place place) {
    const TensorArg q_arg("q", q, place), k_arg("k", k, place);
    require_count("row_stride", row_stride, 1);
    BlockMassParams p{};
    p.grid = read_block_grid(q_arg, k_arg, seqlens_q, cache_seqlens, q_block_size, kv_block_size,
                             causal, softmax_scale, softcap, place);
    const BlockGrid& g = p.grid;
    // A stride beyond the block counts its last query only, and so does the block's size, with
    // which nobody's sums overflow.
    p.row_stride = std::min(row_stride, g.q_block_size);
    if (lse) {
        const TensorArg lse_arg("lse", *lse, place);
        lse_arg.require_dtype(ScalarType::Float)
            .require_shape(
                {{"batch", g.batch}, {"seqlen_q", g.seqlen_q}, {"num_q_heads", g.num_q_heads}});
        p.lse = lse_arg.data<float>();
        for (int i = 0; i < 3; ++i) p.lse_strides[i] = lse_arg.stride(i);
    }
    Tensor mass = new_output({g.batch, g.num_q_heads, g.num_q_blocks(), g.num_kv_blocks()},
                             ScalarType::Float, place);
    p.mass = static_cast<float*>(mass.mutable_data_ptr());
    return {p, std::move(mass)};
}

}  // namespace kvselect::bindings
