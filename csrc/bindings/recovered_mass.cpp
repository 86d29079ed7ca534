#include "bindings/recovered_mass_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

Tensor recovered_mass(Tensor q, Tensor k_cache, OptionalTensor block_table, Tensor cache_seqlens,
                      OptionalTensor starts, Tensor indices, Tensor topk_length,
                      OptionalTensor q_block_offsets, double softmax_scale, int64_t max_seqlen_k,
                      double softcap) {
    const RecoveredMassCall call =
        read_recovered_mass(q, k_cache, block_table, cache_seqlens, starts, indices, topk_length,
                            q_block_offsets, softmax_scale, max_seqlen_k, softcap, Place{});
    const RecoveredMassParams& p = call.params;
    const auto kernel = cpu::current_implementation().recovered_mass;
    run_parallel(
        p.blocks.batch * p.blocks.seqlen_q * p.num_kv_heads, recovered_mass_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return call.mass;
}

}  // namespace kvselect::bindings
