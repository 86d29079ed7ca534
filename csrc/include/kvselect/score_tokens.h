// score_tokens: how much each cached token matters to a block of queries: soft votes per KV head.
#pragma once

#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/rope.h"
#include "kvselect/sketch.h"

namespace kvselect {

struct ScoreTokensParams {
    DType dtype;  // of the keys
    int64_t num_q_heads, num_kv_heads, head_dim;
    QueryBlocks blocks;
    int64_t num_vectors;  // scoring vectors per block and query head; each votes with a softmax of
                          // its own
    // Both [batch, num_blocks, num_vectors, num_q_heads, head_dim] float32, contiguous.
    const float* q;        // meets the candidates
    const float* q_local;  // meets sinks and recent tokens with exact keys; nullptr: q
    KVView keys;
    SketchView sketch;  // data == nullptr: candidates are scored from the keys
    RopeView rope;      // cos != nullptr ("compact"): a sink's key is rotated to its rank, a recent
                        // token's to num_sinks + min(keep, candidates) + its offset in the window;
                        // candidates stay as they are
    int64_t keep;       // tokens that will be picked
    float scale;
    bool normalise_candidates_only;  // published TokenSelect; otherwise over all visible tokens
    bool max_vote;                   // maximum over the vectors instead of the sum
    const int32_t*
        hit;  // [batch, num_kv_heads] non-zero: leave this list's scores alone; or nullptr

    // Outputs. A token whose key makes a finite query's logit NaN or infinite gets score NaN and
    // weight 0.
    float* scores;  // [batch, num_blocks, num_kv_heads, max_seqlen_k]; 0 where not visible
    int64_t max_seqlen_k;
    float* lse;  // [batch, num_blocks, num_vectors, num_q_heads]; -inf: nothing visible or query
                 // not finite
    int64_t* num_nonfinite;  // [batch, num_blocks, num_kv_heads] tokens and query vectors that were
                             // not finite
};

constexpr int64_t kMaxScoreColumns = 4096;  // num_vectors * group_size

// Work items are (row, block, kv_head): [0, batch * num_blocks * num_kv_heads). Scratch per worker,
// in floats:
inline int64_t score_tokens_scratch_floats(const ScoreTokensParams& p) {
    const int64_t columns = p.num_vectors * (p.num_q_heads / p.num_kv_heads);
    return columns * (p.max_seqlen_k + 16 + 2 * p.head_dim + 2);  // logits, q, q_local, peak, total
}
using ScoreTokensFn = void (*)(const ScoreTokensParams&, int64_t begin, int64_t end,
                               float* scratch);

}  // namespace kvselect
