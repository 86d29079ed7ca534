// block_sparse_attention: exact attention of each block of queries over the KV blocks that a mask
// keeps for it, per query head.
#pragma once

#include "kvselect/attention_tiles.h"
#include "kvselect/block_mask.h"
#include "kvselect/cuda_launch.h"

namespace kvselect {

struct BlockSparseAttentionParams {
    BlockGrid grid;
    KVView values;  // no block_table
    BlockMask mask;
    void* out;  // [batch, seqlen_q, num_q_heads, head_dim] contiguous; 0 where a query sees nothing
    float* lse;  // [batch, seqlen_q, num_q_heads] natural log; -inf there
};

// Work items are (row, q head, q block): [0, batch * num_q_heads * num_q_blocks). Scratch of a
// thread, in floats:
inline int64_t block_sparse_attention_scratch_floats(const BlockSparseAttentionParams& p) {
    constexpr int64_t kTileTokens = 64, kMaxLanes = 16;
    const BlockGrid& g = p.grid;
    const int64_t rows = (g.q_block_size + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    return rows * (2 * g.head_dim + 3) + kTileTokens * (2 * g.head_dim + kTileTokens) +
           2 * (g.num_kv_blocks() + 16) + attention_tiles_floats(g.q_block_size, g.head_dim);
}
using BlockSparseAttentionFn = void (*)(const BlockSparseAttentionParams&, int64_t begin,
                                        int64_t end, float* scratch);

namespace cuda {
// Bytes of device memory that a call works in; what it holds before does not matter.
int64_t block_sparse_attention_workspace_bytes(const BlockSparseAttentionParams&);
// All items.
void block_sparse_attention(const BlockSparseAttentionParams&, void* workspace, const CudaLaunch&);

// The same by sm_90a's own instructions, in builds for 90a only: 16-bit elements, head_dim 64 to
// 256, q blocks of 64 or 128; the require_ says what is not among that. It compiles and has not run
// on a GPU.
void require_block_sparse_attention_sm90a(const BlockSparseAttentionParams&);
int64_t block_sparse_attention_sm90a_workspace_bytes(const BlockSparseAttentionParams&);
void block_sparse_attention_sm90a(const BlockSparseAttentionParams&, void* workspace,
                                  const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
