// block_mass: exact weights of keys summed per (q block, KV block), without a value read.
//
// Floor    2 * head_dim flops per counted query and visible key.
// Plan     A warp has 16 counted queries of one (q head, q block), as registers; the eight warps of
//          a thread block take as many neighbouring items of one KV head as they hold (heads of the
//          group first, then q blocks), so that sampled rows share their keys with other items.
//          Tiles of keys come through a ring in shared memory, filled by cp.async ahead of use.
//          Without a given lse all keys are read twice: once for the normalisers, once for the
//          masses; per-block sums of every query, as the CPU keeps them, would be 8 bytes per query
//          and KV block. Sums of warps are added in their order: same inputs, same bits.
#include "kvselect/block_mass.h"

#include "cuda/device/block_tiles.cuh"
#include "cuda/device/soft_cap.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize, kPlaces = 3;

// The (row, q head, q block) items of a thread block, all of one KV head.
struct Share {
    int warps_per_item, items;  // of a thread block
    int64_t blocks_per_head;    // thread blocks of one (row, KV head)
    bool aligned_queries;       // they can be loaded two at a time
};

Share share_of(const BlockMassParams& p) {
    const BlockGrid& g = p.grid;
    Share s{};
    const int64_t counted = ceil_div(g.q_block_size, p.row_stride);
    s.warps_per_item = static_cast<int>(ceil_div(counted, kGroupRows));
    s.items = kWarps / s.warps_per_item;
    s.blocks_per_head = ceil_div(g.num_q_heads / g.num_kv_heads * g.num_q_blocks(), s.items);
    const int64_t pair = g.dtype == DType::kFloat32 ? 4 : 2;  // elements of 4 bytes need no pair
    const auto even = [&](int64_t stride) { return pair == 4 || stride % 2 == 0; };
    s.aligned_queries = reinterpret_cast<uintptr_t>(g.q) % 4 == 0 && even(g.q_strides[0]) &&
                        even(g.q_strides[1]) && even(g.q_strides[2]);
    return s;
}

struct Item {
    bool exists;
    int q_block;
    BlockQueries queries;
};

// The `which`-th item of this thread block. q blocks begin with the last, which see most.
__device__ __forceinline__ Item find_item(const BlockMassParams& p, const Share& share, int which) {
    const BlockGrid& g = p.grid;
    const int group = static_cast<int>(g.num_q_heads / g.num_kv_heads);
    const int blocks = static_cast<int>(g.num_q_blocks());
    const int64_t head_of_all = blockIdx.x / share.blocks_per_head;
    const int64_t number = blockIdx.x % share.blocks_per_head * share.items + which;
    Item item;
    item.exists = number < int64_t{group} * blocks;
    const int row = static_cast<int>(head_of_all / g.num_kv_heads);
    const int kv_head = static_cast<int>(head_of_all % g.num_kv_heads);
    item.q_block = item.exists ? blocks - 1 - static_cast<int>(number / group) : 0;
    const int begin = item.q_block * static_cast<int>(g.q_block_size);
    const int64_t left = g.seqlen_q - begin;
    const int size = static_cast<int>(left < g.q_block_size ? left : g.q_block_size);
    // A stride beyond the block counts its last query only, and so does the block's size.
    const int stride =
        static_cast<int>(p.row_stride < g.q_block_size ? p.row_stride : g.q_block_size);
    item.queries = block_queries(g, row, kv_head * group + static_cast<int>(number % group), begin,
                                 item.exists ? size : 0, stride);
    return item;
}

struct Shared {
    Item items[kWarps];
    float sums[2][kWarps][4];  // of the warps' rows over a tile's spans, of this tile and the last
};
static_assert(sizeof(Shared) <= kMaxStaticSharedBytes);

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, float> || kHeadDim > 128 ? 1 : 2)
    block_mass_kernel(const BlockMassParams p, const Share share) {
    using Rows = TileRows<T, kHeadDim>;
    constexpr int kColumns = Rows::kTokens / 8;
    __shared__ Shared shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const LanePlace at;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    const int head_dim = static_cast<int>(p.grid.head_dim);
    const int kv_block = static_cast<int>(p.grid.kv_block_size);
    const int kv_blocks = static_cast<int>(p.grid.num_kv_blocks());
    if (thread < share.items) shared.items[thread] = find_item(p, share, thread);
    __syncthreads();
    int visible_end = 0;
    for (int i = 0; i < share.items; ++i) {
        const int its = shared.items[i].queries.visible_end;
        visible_end = its > visible_end ? its : visible_end;
    }
    const int num_tiles = (visible_end + Rows::kTokens - 1) / Rows::kTokens;

    // The warp's item, and which 16 of its queries; a warp that is left over has none.
    const int own_item = warp / share.warps_per_item;
    const bool works = own_item < share.items && shared.items[own_item].exists;
    const BlockQueries& q = shared.items[works ? own_item : 0].queries;
    const int own_row = warp % share.warps_per_item * kGroupRows;
    int limits[2];
    float lse[2];  // base 2
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const int i = own_row + at.group + 8 * which;
        const bool counts = works && i < q.count;
        limits[which] = counts ? q.limit(i) : 0;
        lse[which] = 0.f;
        if (counts && p.lse) {
            lse[which] = kLog2E * p.lse[q.row * p.lse_strides[0] +
                                        (q.first + int64_t{i} * q.stride) * p.lse_strides[1] +
                                        q.head * p.lse_strides[2]];
            // It saw nothing when its lse was taken: it counts nothing.
            if (lse[which] == -INFINITY) limits[which] = 0;
        }
    }
    const int last = q.count < own_row + kGroupRows ? q.count - 1 : own_row + kGroupRows - 1;
    const int some_end = works && last >= own_row ? q.limit(last) : 0;
    const int all_end = works && last == own_row + kGroupRows - 1 ? q.limit(own_row) : 0;

    uint32_t queries[Rows::kSteps][4];
#pragma unroll
    for (int step = 0; step < Rows::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Rows group and group + 8; word `quad` of both chunks of the step.
            const int row = own_row + at.group + i % 2 * 8;
            constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
            const int d = (2 * step + i / 2) * kElementsPerChunk<T> + at.quad * kPerWord;
            queries[step][i] = 0;
            if (!works || row >= q.count || d >= head_dim) continue;
            const T* from = query_row<T>(p.grid, q, row) + d;
            if (share.aligned_queries) {
                queries[step][i] = *reinterpret_cast<const uint32_t*>(from);
            } else {
                T elements[kPerWord];
#pragma unroll
                for (int c = 0; c < kPerWord; ++c) elements[c] = from[c];
                memcpy(&queries[step][i], elements, sizeof elements);
            }
        }

    auto* const ring = static_cast<unsigned char*>(ptx::dynamic_shared_memory());
    const BlockQueries& any = shared.items[0].queries;
    const T* const keys = head_rows<T>(p.grid.keys, any.row, any.kv_head);
    const int rounds = p.lse ? 1 : 2, all_tiles = rounds * num_tiles;
    const auto load = [&](int number) {
        if (number < all_tiles) {
            const int tile = number < num_tiles ? number : number - num_tiles;
            copy_tile<T, kHeadDim>(
                keys, p.grid.keys.token_stride, head_dim,
                [&](int row) { return tile * Rows::kTokens + row; }, visible_end,
                ring + number % kPlaces * Rows::kTileBytes);
        }
        ptx::end_copies();
    };
    const bool plain = p.grid.softcap == 0.f && p.grid.softmax_scale > 0.f;
    const float factor = plain ? p.grid.softmax_scale * kLog2E : 1.f;

    // Whose sums a thread writes: KV block `of_tile` of a tile, for item `its_item`.
    constexpr int kTokens = Rows::kTokens;
    const int blocks_of_tile = kv_block < kTokens ? kTokens / kv_block : 1;
    const int its_item = thread / blocks_of_tile, of_tile = thread % blocks_of_tile;
    const bool writes = its_item < share.items && shared.items[its_item].exists;
    float* mass = nullptr;
    if (writes) {
        const Item& item = shared.items[its_item];
        mass = p.mass + ((int64_t{item.queries.row} * p.grid.num_q_heads + item.queries.head) *
                             p.grid.num_q_blocks() +
                         item.q_block) *
                            kv_blocks;
    }
    float sum_so_far = 0.f;
    const auto write_sums = [&](int tile) {  // of a tile that all warps have left
        if (!writes) return;
        const int spans = kv_block < kTokens ? kv_block / kSpanTokens : 1;
        float sum = 0.f;
        for (int w = 0; w < share.warps_per_item; ++w)
            for (int i = 0; i < spans; ++i)
                sum +=
                    shared.sums[tile % 2][its_item * share.warps_per_item + w][of_tile * spans + i];
        sum_so_far += sum;
        const int end = tile * kTokens + (of_tile + 1) * (kv_block < kTokens ? kv_block : kTokens);
        const int block = (end - 1) / kv_block;
        if (end % kv_block != 0 && tile + 1 < num_tiles) return;  // the block goes on
        if (block < kv_blocks) mass[block] = sum_so_far;
        sum_so_far = 0.f;
    };

    float peak[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int i = 0; i < kPlaces - 1; ++i) load(i);
    for (int number = 0; number < all_tiles; ++number) {
        ptx::wait_for_copies<kPlaces - 2>();
        __syncthreads();
        load(number + kPlaces - 1);
        const bool for_lse = rounds == 2 && number < num_tiles;
        const int tile = number < num_tiles ? number : number - num_tiles;
        if (!for_lse && tile > 0) write_sums(tile - 1);
        const int begin = tile * kTokens;
        float logits[1][kColumns][4] = {};
        if (begin < some_end) {
            multiply_keys<T, kHeadDim, 1>(
                ring + number % kPlaces * Rows::kTileBytes,
                [&](int step, uint32_t (&a)[1][4]) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[0][i] = queries[step][i];
                },
                logits);
            float scale = p.grid.softmax_scale, cap = p.grid.softcap;
            ptx::forget(scale);
            ptx::forget(cap);
            if (!plain) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        logits[0][j][i] = soft_capped(logits[0][j][i] * (scale * kLog2E), cap);
            }
        }
        const bool whole = begin + kTokens <= all_end;  // all 16 rows see all of it
        const auto sees = [&](int j, int i) {
            return whole || begin + 8 * j + 2 * at.quad + i % 2 < limits[i / 2];
        };
        if (for_lse) {
            if (begin >= some_end) continue;
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                float top = -INFINITY;
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
#pragma unroll
                    for (int i = 2 * which; i < 2 * which + 2; ++i)
                        if (sees(j, i)) top = fmaxf(top, logits[0][j][i]);
                top = fmaxf(peak[which], reduce_max<4>(top) * factor);
                const float base = top == -INFINITY ? 0.f : top;
                const float old = ptx::exp2_approximate(peak[which] - base);
                peak[which] = top;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
#pragma unroll
                    for (int i = 2 * which; i < 2 * which + 2; ++i)
                        if (sees(j, i))
                            sum += ptx::exp2_approximate(fmaf(logits[0][j][i], factor, -base));
                total[which] = fmaf(total[which], old, sum);
            }
            continue;
        }
        if (rounds == 2 && tile == 0) {
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const float all = reduce_add<4>(total[which]);
                if (all == 0.f) limits[which] = 0;
                lse[which] = peak[which] + log2f(all);
            }
        }
        float sums[Rows::kSpans] = {};
        if (begin < some_end) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float weight =
                        ptx::exp2_approximate(fmaf(logits[0][j][i], factor, -lse[i / 2]));
                    if (begin + 8 * j + 2 * at.quad + i % 2 < limits[i / 2]) sums[j / 2] += weight;
                }
        }
        if (kv_block >= kTokens) {
#pragma unroll
            for (int i = 1; i < Rows::kSpans; ++i) sums[0] += sums[i];
            sums[0] = reduce_add(sums[0]);
            if (at.lane == 0) shared.sums[tile % 2][warp][0] = sums[0];
        } else {
#pragma unroll
            for (int i = 0; i < Rows::kSpans; ++i) {
                const float sum = reduce_add(sums[i]);
                if (at.lane == 0) shared.sums[tile % 2][warp][i] = sum;
            }
        }
    }
    __syncthreads();
    if (num_tiles > 0) write_sums(num_tiles - 1);
    // KV blocks that none of the items sees.
    const int begun = (num_tiles * kTokens + kv_block - 1) / kv_block;
    for (int i = 0; i < share.items; ++i) {
        const Item& item = shared.items[i];
        if (!item.exists) continue;
        float* const to =
            p.mass + ((int64_t{item.queries.row} * p.grid.num_q_heads + item.queries.head) *
                          p.grid.num_q_blocks() +
                      item.q_block) *
                         kv_blocks;
        for (int block = begun + thread; block < kv_blocks; block += kThreads) to[block] = 0.f;
    }
}

template <typename T, int kHeadDim>
void find_masses(const BlockMassParams& p, const CudaLaunch& where) {
    static_assert(kPlaces * TileRows<T, kHeadDim>::kTileBytes <= kMaxDynamicSharedBytes);
    const Share share = share_of(p);
    launch(where, block_mass_kernel<T, kHeadDim>,
           p.grid.batch * p.grid.num_kv_heads * share.blocks_per_head, 1, kThreads,
           kPlaces * TileRows<T, kHeadDim>::kTileBytes, p, share);
}

}  // namespace

void block_mass(const BlockMassParams& p, const CudaLaunch& where) {
    const BlockGrid& g = p.grid;
    if (g.batch * g.num_q_blocks() * g.num_kv_blocks() == 0) return;
    with_element_type(g.dtype, [&](auto element) {
        using T = decltype(element);
        if (g.head_dim <= 64)
            find_masses<T, 64>(p, where);
        else if (g.head_dim <= 96)
            find_masses<T, 96>(p, where);
        else if (g.head_dim <= 128)
            find_masses<T, 128>(p, where);
        else
            find_masses<T, 256>(p, where);
    });
}

}  // namespace kvselect::cuda
