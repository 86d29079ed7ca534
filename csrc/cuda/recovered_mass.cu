// recovered_mass: share of each query head's dense attention mass that a selection holds.
//
// Problem  mass = exp(lse of the listed tokens - lse of all visible ones)
// Plan     sparse_attention knows both; its values are the keys once more, its outputs dropped. A
//          measuring tool, not a fast path: it reads twice what dense attention reads.
#include "kvselect/recovered_mass.h"

#include <algorithm>

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"
#include "kvselect/sparse_attention.h"

namespace kvselect::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    share_kernel(const float* listed, const float* all, int64_t count, float* mass) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (i >= count) return;
    const float share = all[i] == -INFINITY ? 1.f : expf(listed[i] - all[i]);
    mass[i] = share > 1.f ? 1.f : share;  // NaN stays
}

int64_t num_results(const RecoveredMassParams& p) {
    return p.blocks.batch * p.blocks.seqlen_q * p.num_q_heads;
}

SparseAttentionParams attention_of(const RecoveredMassParams& p) {
    SparseAttentionParams all{};
    all.dtype = p.dtype;
    all.num_q_heads = p.num_q_heads;
    all.num_kv_heads = p.num_kv_heads;
    all.head_dim = p.head_dim;
    all.blocks = p.blocks;
    all.q = p.q;
    std::copy_n(p.q_strides, 3, all.q_strides);
    all.keys = all.values = p.keys;
    all.lists_skip_padding = true;
    all.softmax_scale = p.softmax_scale;
    all.softcap = p.softcap;
    return all;
}

int64_t attention_bytes(const RecoveredMassParams& p, int64_t longest_list, int64_t capacity) {
    const SparseAttentionParams all = attention_of(p);
    return std::max(sparse_attention_workspace_bytes(all, longest_list),
                    sparse_attention_workspace_bytes(all, capacity));
}

}  // namespace

// Both lse's, an output of float32 at most, the workspace of attention.
int64_t recovered_mass_workspace_bytes(const RecoveredMassParams& p, int64_t longest_list,
                                       int64_t capacity) {
    return 4 * num_results(p) * (2 + p.head_dim) + attention_bytes(p, longest_list, capacity);
}

void recovered_mass(const RecoveredMassParams& p, int64_t longest_list, int64_t capacity,
                    void* workspace, const CudaLaunch& where) {
    const int64_t count = num_results(p);
    float* const out = static_cast<float*>(workspace);  // first: written 16 bytes at a time
    float* const listed = out + count * p.head_dim;
    float* const all = listed + count;
    SparseAttentionParams attention = attention_of(p);
    attention.out = out;
    attention.lse = all;
    sparse_attention(attention, capacity, all + count, where);
    attention.indices = p.indices;
    attention.topk_length = p.topk_length;
    std::copy_n(p.indices_strides, 3, attention.indices_strides);
    std::copy_n(p.topk_length_strides, 3, attention.topk_length_strides);
    attention.lse = listed;
    sparse_attention(attention, longest_list, all + count, where);
    launch(where, share_kernel, ceil_div(count, kThreads), 1, kThreads, 0, listed, all, count,
           p.mass);
}

}  // namespace kvselect::cuda
