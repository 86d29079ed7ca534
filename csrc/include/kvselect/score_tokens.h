// score_tokens: how much each cached token matters to a block of queries: soft votes per KV head.
#pragma once

#include "kvselect/cuda_launch.h"
#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/ranking.h"
#include "kvselect/rope.h"
#include "kvselect/selection_cache_step.h"
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
    float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay as they are
    const float* sink_logits;  // [num_q_heads] one more logit per head in the normaliser, unless
                               // that is the candidates' alone; or nullptr
    bool normalise_candidates_only;  // published TokenSelect; otherwise over all visible tokens
    bool max_vote;                   // maximum over the vectors instead of the sum
    const int32_t* hit;     // [batch, num_hit_lists] non-zero: this list is reused, leave its
                            // scores alone; or nullptr
    int64_t num_hit_lists;  // 1 (all heads share it) or num_kv_heads
    // anchor_query != nullptr: the call first decides which lists are reused, and `hit` is this
    // one's. Only with num_blocks 1; queries of the keys' dtype.
    SelectionCacheStepParams reuse;

    // Outputs. A token whose key makes a finite query's logit NaN or infinite gets score NaN and
    // weight 0.
    float* scores;  // [batch, num_blocks, num_kv_heads, max_seqlen_k]; 0 where not visible
    int64_t max_seqlen_k;
    float* lse;  // [batch, num_blocks, num_vectors, num_q_heads]; -inf: nothing visible or query
                 // not finite
    int64_t* num_nonfinite;  // [batch, num_blocks, num_kv_heads] tokens and query vectors that were
                             // not finite
    int32_t*
        ranking;  // CUDA: [batch, num_blocks, num_kv_heads, kRankingWords] for select_tokens
                  // to pick `keep` from, pool_width 1; or nullptr. Not with kBlockEnd: a
                  // block's own tokens may then be candidates, and only what it sees is counted
};

constexpr int64_t kMaxScoreColumns = 4096;  // num_vectors * group_size

// A work item is a (row, block, kv_head): [0, batch * num_blocks * num_kv_heads). It is cut into
// parts, and these into tiles, at fixed distances from the row's first real token, so that no bit
// of a result depends on who computes which part.
constexpr int64_t kScoreTileTokens = 1024;  // a softmax of its own; in the first-level cache
constexpr int64_t kScorePartTiles = 4;      // the least that a thread takes

// Up to so many columns, what kWeigh has computed is kept for kVote; beyond, computing it again
// costs less than moving it.
constexpr int64_t kMaxKeptScoreColumns = 16;

enum class ScoreStage : int32_t {
    kWeigh = 0,  // logits of the parts, and for each tile their maximum and sum of exponentials
    kVote = 1,   // all parts of the item are weighed: lse, votes
};

KVS_HOST_DEVICE inline bool is_reused(const ScoreTokensParams& p, int64_t row, int64_t kv_head) {
    if (p.hit == nullptr) return false;
    const int64_t list = p.num_hit_lists == 1 ? 0 : kv_head;
    return p.hit[row * p.num_hit_lists + list] != 0;
}

inline int64_t score_tokens_columns(const ScoreTokensParams& p) {
    return p.num_vectors * (p.num_q_heads / p.num_kv_heads);
}
inline bool score_tokens_keeps_weights(const ScoreTokensParams& p) {
    return score_tokens_columns(p) <= kMaxKeptScoreColumns;
}
inline int64_t score_tokens_tiles(const ScoreTokensParams& p) {  // at least one, which writes lse
    return p.max_seqlen_k > 0 ? (p.max_seqlen_k + kScoreTileTokens - 1) / kScoreTileTokens : 1;
}
inline int64_t score_tokens_parts(const ScoreTokensParams& p) {
    return (score_tokens_tiles(p) + kScorePartTiles - 1) / kScorePartTiles;
}
// Of an item, shared by its parts.
inline int64_t score_tokens_workspace_floats(const ScoreTokensParams& p) {
    const int64_t tiles = (score_tokens_tiles(p) + 15) / 16 * 16;
    const int64_t kept = score_tokens_keeps_weights(p) ? tiles * kScoreTileTokens : 0;
    return score_tokens_columns(p) * (kept + 2 * tiles) + tiles;
}
// Of a thread.
inline int64_t score_tokens_scratch_floats(const ScoreTokensParams& p) {
    return score_tokens_columns(p) * (2 * p.head_dim + 2 + kScoreTileTokens) + 16;
}
using ScoreTokensFn = void (*)(const ScoreTokensParams&, ScoreStage, int64_t item,
                               int64_t part_begin, int64_t part_end, float* workspace,
                               float* scratch);

namespace cuda {
// Bytes of device memory that a call works in; what it holds before does not matter.
int64_t score_tokens_workspace_bytes(const ScoreTokensParams&);
// All items. Outputs of lists that `hit` skips: lse -inf, num_nonfinite 0, scores untouched.
void score_tokens(const ScoreTokensParams&, void* workspace, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
