// select_tokens: sinks + the best-scored candidates + recent tokens, as one ascending list. Exact,
// never truncating.
#pragma once

#include "kvselect/cuda_launch.h"
#include "kvselect/query_blocks.h"
#include "kvselect/ranking.h"

namespace kvselect {

struct SelectTokensParams {
    QueryBlocks blocks;
    int64_t num_lists;    // lists per block: num_kv_heads, or 1 for scope "layer"
    const float* scores;  // [batch, num_blocks, num_lists, max_seqlen_k], last dim contiguous
    int64_t scores_strides[3];
    int64_t max_seqlen_k;
    int64_t keep;  // candidates to pick, by (pooled score, own score) descending, then position
                   // ascending
    int64_t pool_width;  // odd; 1 = off
    int64_t width;       // entries per list; the caller makes it large enough
    const int32_t*
        hit;  // [batch, num_lists] non-zero: only append the newest token to the list; or nullptr
    int32_t* ranking;  // CUDA: what score_tokens counted with the same blocks, keep and pool_width
                       // 1, used up; or nullptr
    int32_t* indices;  // [batch, num_blocks, num_lists, width] ascending positions, -1 pads
    int32_t* topk_length;  // [batch, num_blocks, num_lists]
    float* kept_score;     // [batch, num_blocks, num_lists] sum of the scores of all listed tokens;
                           // NaN on a hit
};

// Work items are (row, block, list): [0, batch * num_blocks * num_lists). Scratch per worker, in
// floats:
inline int64_t select_tokens_room(const SelectTokensParams& p) {
    return (p.max_seqlen_k + 31) / 16 * 16;
}
inline int64_t select_tokens_scratch_floats(const SelectTokensParams& p) {
    return select_tokens_room(p) * (p.pool_width > 1 ? 4 : 2);
}
using SelectTokensFn = void (*)(const SelectTokensParams&, int64_t begin, int64_t end,
                                float* scratch);

namespace cuda {
// Bytes of device memory that a call works in, aligned to 8; what it holds before does not matter.
int64_t select_tokens_workspace_bytes(const SelectTokensParams&);
// All items.
void select_tokens(const SelectTokensParams&, void* workspace, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
