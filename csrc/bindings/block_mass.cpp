#include "bindings/block_mass_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

Tensor block_mass(Tensor q, Tensor k, OptionalTensor lse, OptionalTensor seqlens_q,
                  OptionalTensor cache_seqlens, int64_t q_block_size, int64_t kv_block_size,
                  bool causal, int64_t row_stride, double softmax_scale, double softcap) {
    const BlockMassCall call =
        read_block_mass(q, k, lse, seqlens_q, cache_seqlens, q_block_size, kv_block_size, causal,
                        row_stride, softmax_scale, softcap, {});
    const BlockMassParams& p = call.params;
    const auto kernel = cpu::current_implementation().block_mass;
    run_parallel(
        p.grid.batch * p.grid.num_q_heads * p.grid.num_q_blocks(), block_mass_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return call.mass;
}

}  // namespace kvselect::bindings
