#include "bindings/select_tokens_call.h"

#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

void select_tokens(Tensor scores, Tensor cache_seqlens, OptionalTensor starts,
                   OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
                   int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep,
                   int64_t pool_width, OptionalTensor hit, Tensor indices, Tensor topk_length,
                   Tensor kept_score, OptionalTensor ranking) {
    const std::string rule = take_string(window_rule);
    const SelectTokensParams p =
        read_select_tokens(scores, cache_seqlens, starts, q_block_offsets, seqlen_q, rule,
                           num_sink_tokens, num_recent_tokens, keep, pool_width, hit, indices,
                           topk_length, kept_score, ranking, Place{});
    const auto kernel = cpu::current_implementation().select_tokens;
    run_parallel(
        p.blocks.batch * p.blocks.num_blocks * p.num_lists, select_tokens_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
}

}  // namespace kvselect::bindings
