// gather_tokens: the keys and values that the lists of query blocks name, side by side in memory,
// list after list, for a dense causal kernel that takes sequences of different lengths.
#pragma once

#include "kvselect/cuda_launch.h"
#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/rope.h"

namespace kvselect {

struct GatherTokensParams {
    DType dtype;
    int64_t num_kv_heads, head_dim;
    QueryBlocks blocks;  // rule and window sizes are not used
    KVView keys, values;
    const int32_t* indices;      // [batch, num_blocks, num_kv_heads, width] ascending
    const int32_t* topk_length;  // [batch, num_blocks, num_kv_heads]
    int64_t indices_strides[3],
        topk_length_strides[3];  // elements; head stride 0 = one list for all heads
    int64_t width;
    RopeView rope;  // cos != nullptr ("compact"): the key of rank r is rotated to r
    // List (kv_head * batch + row) * num_blocks + block lies at rows [cu_seqlens[list],
    // cu_seqlens[list + 1]); rows behind the last list are not written.
    void* k;              // [num_lists * width, head_dim]
    void* v;              // the same
    int32_t* cu_seqlens;  // [num_lists + 1]
};

[[gnu::always_inline]] KVS_HOST_DEVICE inline int64_t gather_tokens_lists(
    const GatherTokensParams& p) {
    return p.num_kv_heads * p.blocks.batch * p.blocks.num_blocks;
}

struct GatheredList {
    int64_t row, block, kv_head;
    const int32_t* entries;
    int64_t count;
};
[[gnu::always_inline]] KVS_HOST_DEVICE inline GatheredList gathered_list(
    const GatherTokensParams& p, int64_t number) {
    GatheredList list{};
    list.block = number % p.blocks.num_blocks;
    list.row = number / p.blocks.num_blocks % p.blocks.batch;
    list.kv_head = number / p.blocks.num_blocks / p.blocks.batch;
    list.entries = p.indices + list.row * p.indices_strides[0] + list.block * p.indices_strides[1] +
                   list.kv_head * p.indices_strides[2];
    const int64_t count =
        p.topk_length[list.row * p.topk_length_strides[0] + list.block * p.topk_length_strides[1] +
                      list.kv_head * p.topk_length_strides[2]];
    // Nobody has looked at the lengths on a GPU: what is written must not leave its room.
    list.count = count < 0 ? 0 : count > p.width ? p.width : count;
    return list;
}

// What lower-right causal attention takes for granted: the list ends with the tokens of its block's
// own queries, so that query j of n sees all entries but the last n - 1 - j. Where a block begins
// before its row does, there is nothing else to see.
[[gnu::always_inline]] KVS_HOST_DEVICE inline bool ends_with_its_block(const GatherTokensParams& p,
                                                                       const GatheredList& list) {
    const BlockRange range = block_range(p.blocks, list.row, list.block);
    const int64_t num_queries =
        p.blocks.offsets ? p.blocks.offsets[list.block + 1] - p.blocks.offsets[list.block]
                         : p.blocks.seqlen_q;
    const int64_t own = range.end - range.begin;
    if (num_queries == 0) return true;
    if (own < num_queries ? list.count != own : list.count < own) return false;
    return own == 0 || (list.entries[list.count - own] == range.begin &&
                        list.entries[list.count - 1] == range.end - 1);
}

// Work items are lists.
using GatherTokensFn = void (*)(const GatherTokensParams&, int64_t begin, int64_t end);

namespace cuda {
// All items. Where a list holds an entry that is no token of its row, that key is NaN; where it
// does not end with its block, all of its keys are.
void gather_tokens(const GatherTokensParams&, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
