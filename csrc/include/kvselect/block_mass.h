// block_mass: how much of its queries' attention each KV block gets, exactly.
#pragma once

#include "kvselect/block_mask.h"
#include "kvselect/cuda_launch.h"

namespace kvselect {

struct BlockMassParams {
    BlockGrid grid;
    int64_t row_stride;  // of a q block the last query counts, and every row_stride-th before it
    const float* lse;    // [batch, seqlen_q, num_q_heads] natural log; or nullptr: made here
    int64_t lse_strides[3];  // elements
    float* mass;  // [batch, num_q_heads, num_q_blocks, num_kv_blocks] sum over those queries of the
                  // weights of the block's keys; 0 where none sees it
};

// Work items are (row, q head, q block): [0, batch * num_q_heads * num_q_blocks). Scratch of a
// thread, in floats:
inline int64_t block_mass_scratch_floats(const BlockMassParams& p) {
    constexpr int64_t kTileTokens = 64, kMaxLanes = 16;
    const BlockGrid& g = p.grid;
    const int64_t used = (g.q_block_size + p.row_stride - 1) / p.row_stride;
    const int64_t rows = (used + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
    return rows * (g.head_dim + 2 * g.num_kv_blocks() + 2) +
           kTileTokens * (g.head_dim + kTileTokens);
}
using BlockMassFn = void (*)(const BlockMassParams&, int64_t begin, int64_t end, float* scratch);

namespace cuda {
// All items.
void block_mass(const BlockMassParams&, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
