// kv_append: store new keys and values, and sketch every 128-token block that they complete.
#pragma once

#include "kvselect/cuda_launch.h"
#include "kvselect/kv_view.h"
#include "kvselect/sketch.h"

namespace kvselect {

struct KvAppendParams {
    DType dtype;
    int64_t batch, num_new, num_kv_heads, head_dim;
    const void* k;  // [batch, num_new, num_kv_heads, head_dim]
    const void* v;
    int64_t k_strides[3], v_strides[3];  // elements: batch, token, head
    const int32_t*
        num_valid;  // [batch] how many of num_new tokens count (the first ones), or nullptr: all
    const int32_t* seqlens_before;  // [batch]
    const int32_t* starts;  // [batch] first real token: sketch blocks count from it; or nullptr: 0
    int64_t capacity_tokens;  // of a row; checked on the CPU, what is beyond it is dropped on CUDA
    KVView k_cache, v_cache;
    SketchView sketch;
    int64_t* num_nonfinite;  // [batch, num_kv_heads] += new tokens whose key or value holds NaN or
                             // inf; items add to it atomically
};

// Work items are (row, run of sketch blocks, group of KV heads), the group fastest. A group is all
// heads whose rows lie side by side in memory and whose block of keys still fits half of an L2: the
// tokens are then read once, in the order in which they lie. A run ends where a sketch block ends,
// so every record is written by one item.
constexpr int64_t kKeyGroupBytes = int64_t{256} << 10;
struct KvAppendItems {
    int64_t heads_per_group, num_groups;
    int64_t blocks_per_run, num_runs;  // per row, of its longest possible extent
    int64_t count;
};
// Inlined by force: a copy of it in the object file of one instruction set could be linked for all.
[[gnu::always_inline]] inline KvAppendItems kv_append_items(const KvAppendParams& p) {
    const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
    const bool side_by_side = p.k_strides[2] == p.head_dim;
    int64_t heads =
        side_by_side ? kKeyGroupBytes / (kSketchBlockTokens * p.head_dim * element_bytes) : 1;
    heads = heads < 1 ? 1 : (heads > p.num_kv_heads ? p.num_kv_heads : heads);
    KvAppendItems items{};
    items.heads_per_group = heads;
    items.num_groups = (p.num_kv_heads + heads - 1) / heads;
    // Rows may begin anywhere in a block, so `num_new` tokens touch up to this many.
    const int64_t blocks =
        p.num_new > 0 ? (p.num_new + kSketchBlockTokens - 2) / kSketchBlockTokens + 1 : 0;
    items.blocks_per_run =
        blocks >= 64 ? 8 : 1;  // a run's next block is fetched while one is coded
    items.num_runs = (blocks + items.blocks_per_run - 1) / items.blocks_per_run;
    items.count = p.batch * items.num_runs * items.num_groups;
    return items;
}
using KvAppendFn = void (*)(const KvAppendParams&, int64_t begin, int64_t end);

namespace cuda {
// All items.
void kv_append(const KvAppendParams&, const CudaLaunch&);
// cache_seqlens[row] += num_valid[row], or num_new without num_valid, up to the capacity: after
// kv_append on the same stream, which reads the lengths of before.
void advance_seqlens(int32_t* cache_seqlens, const KvAppendParams&, const CudaLaunch&);
}  // namespace cuda

}  // namespace kvselect
