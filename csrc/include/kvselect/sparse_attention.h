// sparse_attention: exact attention over a list of tokens per KV head; one decode query or a causal
// block of them.
#pragma once

#include "kvselect/attention_tiles.h"
#include "kvselect/cuda_launch.h"
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
    bool lists_skip_padding;  // CUDA: listed tokens before a row's first real one are left out, as
                              // recovered_mass wants it
    float softmax_scale;
    float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay as they are
    const float* sink_logits;  // [num_q_heads] one more logit per head, in the denominator (and
                               // lse) only; or nullptr
    RopeView rope;  // cos != nullptr ("compact"): key of rank r rotates to r, a query to the rank
                    // of its own token
    void* out;  // [batch, seqlen_q, num_q_heads, head_dim] contiguous; 0 where a query sees nothing
    float* lse;  // [batch, seqlen_q, num_q_heads] natural log; -inf there
};

// Queries of a block that share one pass over the list: bounds the scratch of long blocks.
inline int64_t sparse_attention_queries_at_once(int64_t group_size) {
    return group_size >= 512 ? 1 : 512 / group_size;
}

// A work item is a (row, block, kv_head): [0, batch * num_blocks * num_kv_heads). The list of a
// block of one query is cut into parts of fixed size, which are attended separately and merged in
// their order, so that no bit of a result depends on who computes which part.
constexpr int64_t kAttentionPartTokens = 512;

enum class AttentionStage : int32_t {
    kWhole = 0,  // the item, all parts
    kParts = 1,  // the parts [part_begin, part_end), into the workspace
    kMerge = 2,  // all parts of the item are in the workspace: out, lse
};

// Only blocks of one query are worth sharing: longer ones are as many items as there is work.
inline bool sparse_attention_has_parts(const SparseAttentionParams& p) {
    return p.blocks.num_blocks == p.blocks.seqlen_q;
}
inline int64_t sparse_attention_parts(int64_t longest_list) {
    return longest_list > 0 ? (longest_list + kAttentionPartTokens - 1) / kAttentionPartTokens : 1;
}
// Of an item's `parts`: for each the sum of weighted values, maximum and sum of every head.
inline int64_t sparse_attention_workspace_floats(const SparseAttentionParams& p, int64_t parts) {
    return parts * (p.num_q_heads / p.num_kv_heads) * (p.head_dim + 2);
}
// Of a thread.
inline int64_t sparse_attention_scratch_floats(const SparseAttentionParams& p) {
    constexpr int64_t kTileTokens = 64, kMaxGemmRows = 8;
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const int64_t limit = sparse_attention_queries_at_once(group);
    const int64_t rows = group * (p.blocks.seqlen_q < limit ? p.blocks.seqlen_q : limit);
    const int64_t without_tiles = rows * (3 * p.head_dim + kTileTokens + 4) +
                                  (2 * p.head_dim + kMaxGemmRows) * kTileTokens + 16;
    const int64_t by_tiles = attention_tiles_floats(rows, p.head_dim);
    return by_tiles > without_tiles ? by_tiles : without_tiles;
}
using SparseAttentionFn = void (*)(const SparseAttentionParams&, AttentionStage, int64_t item,
                                   int64_t part_begin, int64_t part_end, float* workspace,
                                   float* scratch);

namespace cuda {
// `longest_list`: entries that a list can have (its width; the cache's capacity without lists).
// Bytes of device memory that a call works in; what it holds before does not matter.
int64_t sparse_attention_workspace_bytes(const SparseAttentionParams&, int64_t longest_list);
// All items.
void sparse_attention(const SparseAttentionParams&, int64_t longest_list, void* workspace,
                      const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
