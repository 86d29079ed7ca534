// Which KV blocks each block of queries attends to, and where those queries sit.
#pragma once

#include <cstdint>

#include "kvselect/kv_view.h"

namespace kvselect {

// Queries [batch, seqlen_q] and keys [batch, seqlen_k], cut into blocks from their first element
// on; the last block of either may be shorter.
struct BlockGrid {
    DType dtype;  // of queries, keys (and values and outputs)
    int64_t batch, seqlen_q, seqlen_k, num_q_heads, num_kv_heads, head_dim;
    int64_t q_block_size, kv_block_size;
    bool causal;               // query j of a row sees positions <= seqlens_k - seqlens_q + j
    const int32_t* seqlens_q;  // [batch] queries of each row; or nullptr: seqlen_q
    const int32_t* seqlens_k;  // [batch] keys of each row; or nullptr: seqlen_k
    const void* q;             // [batch, seqlen_q, num_q_heads, head_dim]
    int64_t q_strides[3];      // elements: batch, query, head
    KVView keys;               // no block_table
    float softmax_scale;
    float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay as they are

    KVS_HOST_DEVICE int64_t num_q_blocks() const {
        return (seqlen_q + q_block_size - 1) / q_block_size;
    }
    KVS_HOST_DEVICE int64_t num_kv_blocks() const {
        return (seqlen_k + kv_block_size - 1) / kv_block_size;
    }
    int64_t row_seqlen_q(int64_t row) const { return seqlens_q ? seqlens_q[row] : seqlen_q; }
    int64_t row_seqlen_k(int64_t row) const { return seqlens_k ? seqlens_k[row] : seqlen_k; }
};

enum class MaskForm : int32_t {
    kDense = 0,  // one byte per KV block, not 0: kept
    kLists = 1,  // up to `width` block indices; entries of -1 are none
    kCsr = 2,    // indices[row_offsets[r] .. row_offsets[r + 1]), r = (row, q head, q block)
};

// A set of KV blocks per (row, q head, q block): neither order nor repetition changes anything.
struct BlockMask {
    MaskForm form;
    const uint8_t* dense;  // [batch, num_q_heads, num_q_blocks, num_kv_blocks]
    const int32_t*
        indices;  // [batch, num_q_heads, num_q_blocks, width], or [nnz] where there are row_offsets
    const int64_t* row_offsets;  // [batch * num_q_heads * num_q_blocks + 1]
    int64_t strides[4];          // elements, of dense and of lists; 0 where a dimension is shared
    int64_t width;               // of a list; with row_offsets: entries in all
};

}  // namespace kvselect
