#include "bindings/select_tokens_call.h"

#include "bindings/cuda/ops.h"
#include "bindings/outputs.h"

namespace kvselect::bindings::cuda {

// Room is the caller's to make: how long a list becomes is known on the device only. Entries that
// do not fit are not written.
void select_tokens(Tensor scores, Tensor cache_seqlens, OptionalTensor starts,
                   OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
                   int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep,
                   int64_t pool_width, OptionalTensor hit, Tensor indices, Tensor topk_length,
                   Tensor kept_score, OptionalTensor ranking) {
    const std::string rule = take_string(window_rule);
    const OnDevice device("scores", scores);
    const SelectTokensParams p =
        read_select_tokens(scores, cache_seqlens, starts, q_block_offsets, seqlen_q, rule,
                           num_sink_tokens, num_recent_tokens, keep, pool_width, hit, indices,
                           topk_length, kept_score, ranking, device.place());
    const Tensor workspace = new_output({kvselect::cuda::select_tokens_workspace_bytes(p)},
                                        ScalarType::Byte, device.place());
    kvselect::cuda::select_tokens(p, workspace.mutable_data_ptr(), device.launch());
}

}  // namespace kvselect::bindings::cuda
