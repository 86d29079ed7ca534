#include "bindings/recovered_mass_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

Tensor recovered_mass(Tensor q, Tensor k_cache, OptionalTensor block_table, Tensor cache_seqlens,
                      OptionalTensor starts, Tensor indices, Tensor topk_length,
                      OptionalTensor q_block_offsets, double softmax_scale, int64_t max_seqlen_k,
                      double softcap) {
    const OnDevice device("q", q);
    const RecoveredMassCall call =
        read_recovered_mass(q, k_cache, block_table, cache_seqlens, starts, indices, topk_length,
                            q_block_offsets, softmax_scale, max_seqlen_k, softcap, device.place());
    const Tensor workspace = new_output({kvselect::cuda::recovered_mass_workspace_bytes(
                                            call.params, call.longest_list, call.capacity_tokens)},
                                        ScalarType::Byte, device.place());
    kvselect::cuda::recovered_mass(call.params, call.longest_list, call.capacity_tokens,
                                   workspace.mutable_data_ptr(), device.launch());
    return call.mass;
}

}  // namespace kvselect::bindings::cuda
