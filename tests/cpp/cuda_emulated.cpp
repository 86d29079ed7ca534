#include "cuda_emulated.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

namespace kvselect::test {
namespace {

constexpr CudaLaunch kLaunch{nullptr, false};

// What CUDA has no kernel for (longer rows; ops that are missing here) runs on the CPU.
constexpr int64_t kMostChannels = 256;
const cpu::Implementation& kScalar = cpu::scalar_implementation();

// A launch does all items of an op. The tests call item by item, so it is made at the call that
// asks for the last one.
void kv_append(const KvAppendParams& p, int64_t begin, int64_t end) {
    if (begin < end && end == kv_append_items(p).count) cuda::kv_append(p, kLaunch);
}

void list_blocks(const ListBlocksParams& p, int64_t, int64_t end) {
    if (end == p.num_rows * p.num_lists) cuda::list_blocks(p, kLaunch);
}

void gather_tokens(const GatherTokensParams& p, int64_t begin, int64_t end) {
    if (p.head_dim > kMostChannels) return kScalar.gather_tokens(p, begin, end);
    if (end == gather_tokens_lists(p)) cuda::gather_tokens(p, kLaunch);
}

void merge_splits(const MergeSplitsParams& p, int64_t, int64_t end) {
    if (end == p.num_rows) cuda::merge_splits(p, kLaunch);
}

void score_tokens(const ScoreTokensParams& p, ScoreStage stage, int64_t item, int64_t part_begin,
                  int64_t part_end, float* memory, float* scratch) {
    if (p.head_dim > kMostChannels)
        return kScalar.score_tokens(p, stage, item, part_begin, part_end, memory, scratch);
    if (stage != ScoreStage::kVote || part_begin != 0 || item != 0) return;
    // Exactly what is asked for, and full of NaN.
    std::vector<uint8_t> workspace(cuda::score_tokens_workspace_bytes(p), 0xff);
    cuda::score_tokens(p, workspace.data(), kLaunch);
}

void select_tokens(const SelectTokensParams& p, int64_t begin, int64_t, float*) {
    if (begin != 0) return;
    std::vector<uint8_t> workspace(cuda::select_tokens_workspace_bytes(p), 0xff);
    cuda::select_tokens(p, workspace.data(), kLaunch);
}

// On CUDA the scan decides; over rows without a token it does nothing else. Rows are independent,
// so some of them are a call of their own.
void selection_cache_step(const SelectionCacheStepParams& all, int64_t begin, int64_t end) {
    SelectionCacheStepParams p = all;
    const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    p.batch = end - begin;
    p.q = static_cast<const uint8_t*>(p.q) + begin * p.q_strides[0] * element_bytes;
    p.cache_seqlens += begin;
    if (p.starts) p.starts += begin;
    p.num_nonfinite += begin * p.num_kv_heads;
    p.anchor_query += begin * p.num_q_heads * p.head_dim;
    p.age += begin * p.num_lists;
    p.expected_seqlens += begin;
    p.known_nonfinite += begin * p.num_lists;
    p.hit += begin * p.num_lists;
    const std::vector<int32_t> no_tokens(p.batch, 0);
    const std::vector<float> q(p.batch * p.num_q_heads * p.head_dim);
    std::vector<float> lse(p.batch * p.num_q_heads);
    std::vector<int64_t> num_nonfinite(p.batch * p.num_kv_heads);
    ScoreTokensParams scan{};
    scan.dtype = p.dtype;
    scan.num_q_heads = p.num_q_heads;
    scan.num_kv_heads = p.num_kv_heads;
    scan.head_dim = p.head_dim;
    scan.blocks = QueryBlocks{p.batch, 1, 1, nullptr, no_tokens.data(), nullptr, {}, 0, 0};
    scan.num_vectors = 1;
    scan.q = q.data();
    scan.hit = p.hit;
    scan.num_hit_lists = p.num_lists;
    scan.reuse = p;
    scan.lse = lse.data();
    scan.num_nonfinite = num_nonfinite.data();
    std::vector<uint8_t> workspace(cuda::score_tokens_workspace_bytes(scan), 0xff);
    cuda::score_tokens(scan, workspace.data(), kLaunch);
}

void sparse_attention(const SparseAttentionParams& p, AttentionStage stage, int64_t item,
                      int64_t part_begin, int64_t part_end, float* memory, float* scratch) {
    if (p.head_dim > kMostChannels)
        return kScalar.sparse_attention(p, stage, item, part_begin, part_end, memory, scratch);
    if (stage == AttentionStage::kParts || item != 0) return;
    // Without lists, what a cache of the longest row has room for.
    int64_t longest = p.indices ? p.indices_strides[0] : 1;
    for (int64_t row = 0; !p.indices && row < p.blocks.batch; ++row)
        longest = std::max<int64_t>(longest, p.blocks.cache_seqlens[row]);
    std::vector<uint8_t> workspace(cuda::sparse_attention_workspace_bytes(p, longest), 0xff);
    cuda::sparse_attention(p, longest, workspace.data(), kLaunch);
}

void recovered_mass(const RecoveredMassParams& p, int64_t begin, int64_t end, float* scratch) {
    if (p.head_dim > kMostChannels) return kScalar.recovered_mass(p, begin, end, scratch);
    if (begin != 0) return;
    const int64_t longest_list = p.indices_strides[2], capacity = p.max_seqlen_k;
    std::vector<uint8_t> workspace(cuda::recovered_mass_workspace_bytes(p, longest_list, capacity),
                                   0xff);
    cuda::recovered_mass(p, longest_list, capacity, workspace.data(), kLaunch);
}

void block_sparse_attention(const BlockSparseAttentionParams& p, int64_t begin, int64_t end,
                            float* scratch) {
    if (p.grid.head_dim > kMostChannels)
        return kScalar.block_sparse_attention(p, begin, end, scratch);
    if (end != p.grid.batch * p.grid.num_q_heads * p.grid.num_q_blocks()) return;
    std::vector<uint8_t> workspace(cuda::block_sparse_attention_workspace_bytes(p), 0xff);
    cuda::block_sparse_attention(p, workspace.data(), kLaunch);
}

void block_sparse_attention_sm90a(const BlockSparseAttentionParams& p, int64_t, int64_t end,
                                  float*) {
    if (end != p.grid.batch * p.grid.num_q_heads * p.grid.num_q_blocks()) return;
    const PlayedDevice sm90({9, 0, 2, (227 << 10) - (4 << 10)});  // less what the kernel declares
    cuda::require_block_sparse_attention_sm90a(p);
    std::vector<uint8_t> workspace(cuda::block_sparse_attention_sm90a_workspace_bytes(p), 0xff);
    cuda::block_sparse_attention_sm90a(p, workspace.data(), kLaunch);
}

void block_mass(const BlockMassParams& p, int64_t begin, int64_t end, float* scratch) {
    if (p.grid.head_dim > kMostChannels) return kScalar.block_mass(p, begin, end, scratch);
    if (end == p.grid.batch * p.grid.num_q_heads * p.grid.num_q_blocks())
        cuda::block_mass(p, kLaunch);
}

}  // namespace

const cpu::Implementation& cuda_emulated_implementation() {
    static const cpu::Implementation implementation = [] {
        cpu::Implementation table = cpu::scalar_implementation();
        table.name = "cuda";
        table.block_mass = block_mass;
        table.block_sparse_attention = block_sparse_attention;
        table.gather_tokens = gather_tokens;
        table.kv_append = kv_append;
        table.list_blocks = list_blocks;
        table.merge_splits = merge_splits;
        table.score_tokens = score_tokens;
        table.sparse_attention = sparse_attention;
        table.select_tokens = select_tokens;
        table.selection_cache_step = selection_cache_step;
        table.recovered_mass = recovered_mass;
        return table;
    }();
    return implementation;
}

const cpu::Implementation& cuda_emulated_sm90a_implementation() {
    static const cpu::Implementation implementation = [] {
        cpu::Implementation table = cpu::scalar_implementation();
        table.name = "cuda sm90a";
        table.block_sparse_attention = block_sparse_attention_sm90a;
        return table;
    }();
    return implementation;
}

}  // namespace kvselect::test
