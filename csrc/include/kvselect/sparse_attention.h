// sparse_attention: exact attention over a list of tokens per KV head; one decode query or a causal
// block of them.
#pragma once

#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/rope.h"

namespace kvselect {

struct SparseAttentionParams {
    DType dtype;  // of q, keys, values and out
    int64_t num_q_heads, num_kv_heads, head_dim;
    QueryBlocks blocks;    // rule and window sizes are not used
    const void* q;         // [batch, seqlen_q, num_q_heads, head_dim]
    int64_t q_strides[3];  // elements: batch, query, head
    KVView keys, values;
    const int32_t* indices;      // [batch, num_blocks, num_kv_heads, width] ascending, or nullptr:
                                 // every visible token
    const int32_t* topk_length;  // [batch, num_blocks, num_kv_heads]
    int64_t indices_strides[3],
        topk_length_strides[3];  // elements; head stride 0 = one list for all heads
    float softmax_scale;
    RopeView rope;  // cos != nullptr ("compact"): key of rank r rotates to r, a query to the rank
                    // of its own token
    void* out;  // [batch, seqlen_q, num_q_heads, head_dim] contiguous; 0 where a query sees nothing
    float* lse;  // [batch, seqlen_q, num_q_heads] natural log; -inf there
};

// Queries of a block that share one pass over the list: bounds the scratch of long blocks.
inline int64_t sparse_attention_queries_at_once(int64_t group_size) {
    return group_size >= 512 ? 1 : 512 / group_size;
}

// Work items are (row, block, kv_head): [0, batch * num_blocks * num_kv_heads). Scratch per worker,
// in floats:
inline int64_t sparse_attention_scratch_floats(const SparseAttentionParams& p) {
    constexpr int64_t kTileTokens = 64, kMaxGemmRows = 8;
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const int64_t limit = sparse_attention_queries_at_once(group);
    const int64_t rows = group * (p.blocks.seqlen_q < limit ? p.blocks.seqlen_q : limit);
    return rows * (2 * p.head_dim + kTileTokens + 2) +
           (2 * p.head_dim + kMaxGemmRows) * kTileTokens;
}
using SparseAttentionFn = void (*)(const SparseAttentionParams&, int64_t begin, int64_t end,
                                   float* scratch);

}  // namespace kvselect
