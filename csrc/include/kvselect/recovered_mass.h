// recovered_mass: share of each query head's dense attention mass that a selection holds.
#pragma once

#include "kvselect/cuda_launch.h"
#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"

namespace kvselect {

struct RecoveredMassParams {
    DType dtype;  // of q and keys
    int64_t num_q_heads, num_kv_heads, head_dim;
    QueryBlocks blocks;    // rule and window sizes are not used
    const void* q;         // [batch, seqlen_q, num_q_heads, head_dim]
    int64_t q_strides[3];  // elements: batch, query, head
    KVView keys;
    const int32_t* indices;      // [batch, num_blocks, num_kv_heads, width] ascending
    const int32_t* topk_length;  // [batch, num_blocks, num_kv_heads]
    int64_t indices_strides[3], topk_length_strides[3];
    float softmax_scale;
    float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay as they are
    int64_t max_seqlen_k;
    float* mass;  // [batch, seqlen_q, num_q_heads] in [0, 1]; 1 where nothing is visible
};

// Work items are (row, query, kv_head): [0, batch * seqlen_q * num_kv_heads). Scratch per worker,
// in floats:
inline int64_t recovered_mass_scratch_floats(const RecoveredMassParams& p) {
    return (p.num_q_heads / p.num_kv_heads) * (p.max_seqlen_k + 64 + p.head_dim);
}
using RecoveredMassFn = void (*)(const RecoveredMassParams&, int64_t begin, int64_t end,
                                 float* scratch);

namespace cuda {
// `longest_list`: entries that a list can have; `capacity`: tokens that a row has room for. Bytes
// of device memory that a call works in; what it holds before does not matter.
int64_t recovered_mass_workspace_bytes(const RecoveredMassParams&, int64_t longest_list,
                                       int64_t capacity);
// All items.
void recovered_mass(const RecoveredMassParams&, int64_t longest_list, int64_t capacity,
                    void* workspace, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
