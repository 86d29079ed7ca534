#include "bindings/gather_tokens_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

std::tuple<Tensor, Tensor, Tensor> gather_tokens(Tensor k_cache, Tensor v_cache,
                                                 OptionalTensor block_table, Tensor cache_seqlens,
                                                 OptionalTensor starts, Tensor indices,
                                                 Tensor topk_length, OptionalTensor q_block_offsets,
                                                 int64_t seqlen_q, OptionalTensor cos,
                                                 OptionalTensor sin, int64_t rope_start,
                                                 bool rope_interleaved) {
    const OnDevice device("k_cache", k_cache);
    const GatherTokensCall call = read_gather_tokens(
        k_cache, v_cache, block_table, cache_seqlens, starts, indices, topk_length, q_block_offsets,
        seqlen_q, cos, sin, rope_start, rope_interleaved, device.place());
    kvselect::cuda::gather_tokens(call.params, device.launch());
    return {call.k, call.v, call.cu_seqlens};
}

}  // namespace kvselect::bindings::cuda
