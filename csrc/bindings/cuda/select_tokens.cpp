#include "kvselect/select_tokens.h"

#include "bindings/cuda/ops.h"
#include "bindings/outputs.h"

namespace kvselect::bindings::cuda {

// Room is the caller's to make: how long a list becomes is known on the device only. Entries that
// do not fit are not written.
void select_tokens(Tensor scores, Tensor cache_seqlens, OptionalTensor starts,
                   OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
                   int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep,
                   int64_t pool_width, OptionalTensor hit, Tensor indices, Tensor topk_length,
                   Tensor kept_score) {
    const std::string rule = take_string(window_rule);
    const OnDevice device("scores", scores);
    const Place place = device.place();
    require_count("num_sink_tokens", num_sink_tokens, 0);
    require_count("num_recent_tokens", num_recent_tokens, 0);
    require_count("keep", keep, 0);
    KVS_CHECK(pool_width >= 1 && pool_width % 2 == 1, "pool_width: got ", pool_width,
              ", allowed: an odd int >= 1");

    const TensorArg scores_arg("scores", scores, place), indices_arg("indices", indices, place),
        length_arg("topk_length", topk_length, place), kept_arg("kept_score", kept_score, place);
    scores_arg.require_dtype(ScalarType::Float)
        .require_shape({{"batch"}, {"num_blocks"}, {"num_lists"}, {"seqlen_k"}})
        .require_contiguous_rows();
    const int64_t batch = scores_arg.size(0), num_lists = scores_arg.size(2);

    SelectTokensParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q, place);
    p.blocks.rule = bindings::window_rule(rule);
    p.blocks.num_sink_tokens = num_sink_tokens;
    p.blocks.num_recent_tokens = num_recent_tokens;
    const Dim batch_dim{"batch", batch}, blocks_dim{"num_blocks", p.blocks.num_blocks},
        lists_dim{"num_lists", num_lists};
    scores_arg.require_shape({batch_dim, blocks_dim, lists_dim, {"seqlen_k"}});
    indices_arg.require_dtype(ScalarType::Int)
        .require_shape({batch_dim, blocks_dim, lists_dim, {"width"}})
        .require_contiguous();
    length_arg.require_dtype(ScalarType::Int)
        .require_shape({batch_dim, blocks_dim, lists_dim})
        .require_contiguous();
    kept_arg.require_dtype(ScalarType::Float)
        .require_shape({batch_dim, blocks_dim, lists_dim})
        .require_contiguous();
    if (hit) {
        KVS_CHECK(p.blocks.num_blocks == 1, "hit: got ", p.blocks.num_blocks,
                  " query blocks, allowed: 1 (a list is reused from one decode step to the next)");
        const TensorArg hit_arg("hit", *hit, place);
        hit_arg.require_dtype(ScalarType::Int)
            .require_shape({batch_dim, lists_dim})
            .require_contiguous();
        p.hit = hit_arg.data<int32_t>();
    }
    p.num_lists = num_lists;
    p.scores = scores_arg.data<float>();
    for (int i = 0; i < 3; ++i) p.scores_strides[i] = scores_arg.stride(i);
    p.max_seqlen_k = scores_arg.size(3);
    p.keep = keep;
    p.pool_width = pool_width;
    p.width = indices_arg.size(3);
    p.indices = indices_arg.mutable_data<int32_t>();
    p.topk_length = length_arg.mutable_data<int32_t>();
    p.kept_score = kept_arg.mutable_data<float>();
    const Tensor workspace =
        new_output({kvselect::cuda::select_tokens_workspace_bytes(p)}, ScalarType::Byte, place);
    kvselect::cuda::select_tokens(p, workspace.mutable_data_ptr(), device.launch());
}

}  // namespace kvselect::bindings::cuda
