#include "bindings/gather_tokens_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor, Tensor> gather_tokens(Tensor k_cache, Tensor v_cache,
                                                 OptionalTensor block_table, Tensor cache_seqlens,
                                                 OptionalTensor starts, Tensor indices,
                                                 Tensor topk_length, OptionalTensor q_block_offsets,
                                                 int64_t seqlen_q, OptionalTensor cos,
                                                 OptionalTensor sin, int64_t rope_start,
                                                 bool rope_interleaved) {
    const GatherTokensCall call = read_gather_tokens(
        k_cache, v_cache, block_table, cache_seqlens, starts, indices, topk_length, q_block_offsets,
        seqlen_q, cos, sin, rope_start, rope_interleaved, Place{});
    const auto kernel = cpu::current_implementation().gather_tokens;
    call.params.cu_seqlens[0] = 0;  // where there is no list
    run_parallel(gather_tokens_lists(call.params), 0,
                 [&](int64_t begin, int64_t end, float*) { kernel(call.params, begin, end); });
    return {call.k, call.v, call.cu_seqlens};
}

}  // namespace kvselect::bindings
