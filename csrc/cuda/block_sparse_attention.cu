// block_sparse_attention: softmax over the kept KV blocks of a block of queries, sums in float32.
//
// Problem  out = sum_i softmax_i(scale * q . k_i) v_i over the tokens i of kept blocks, per q head
// Floor    4 * head_dim flops per query and kept token; compute-bound from 64 queries per block on.
// Plan     A thread block per (row, head, q block): up to 128 queries, as 16 or 32 rows of each
//          warp's products. What the mask keeps for them, in whatever form, is marked in a bitmap
//          of 4096 KV blocks at a time and walked ascending, so that order and repetition change no
//          bit. Tiles are 64 tokens (fewer where rows are long), of one KV block or of several
//          small ones; keys and values alternate in one ring of tiles in shared memory, filled by
//          cp.async ahead of use, with one barrier a tile. Blocks that all queries of a warp see
//          whole need no comparison; that leaves the diagonal and the row's end. A value that is
//          not finite may only meet the queries that see it (0 * NaN is NaN): tiles at the diagonal
//          are looked through, and such values added apart.
//          q blocks begin with the last, which see most; CSR rows, whose lengths are there to be
//          read, with the longest. Heads of a group are neighbours: they find keys in L2.
#include "kvselect/block_sparse_attention.h"

#include "cuda/device/kept_blocks.cuh"
#include "cuda/device/longest_first.cuh"
#include "cuda/device/soft_cap.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

// --- which thread block does what

struct Schedule {
    const int32_t* order;  // [batch * num_q_heads * num_q_blocks] items, or nullptr
    int rows, parts;       // queries of a thread block, thread blocks of an item
    bool aligned_queries;  // they can be loaded 16 bytes at a time
};

// Items of CSR masks by falling number of kept blocks; results do not depend on the order.
__global__ void __launch_bounds__(kOrderThreads)
    order_items_kernel(const int64_t* row_offsets, int num_items, int longest, int32_t* order) {
    __shared__ int ends[kLengthClasses];
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    order_longest_first([&](int item) { return row_offsets[item + 1] - row_offsets[item]; },
                        num_items, longest, ends, order);
}

__device__ __forceinline__ Work find_work(const BlockGrid& g, const Schedule& schedule) {
    Work w;
    const int number = static_cast<int>(blockIdx.x) / schedule.parts;
    const int part = static_cast<int>(blockIdx.x) % schedule.parts;
    const int blocks = static_cast<int>(g.num_q_blocks()), heads = static_cast<int>(g.num_q_heads);
    int row, head;
    if (schedule.order) {
        w.item = schedule.order[number];
        w.block = w.item % blocks;
        head = w.item / blocks % heads;
        row = w.item / blocks / heads;
    } else {
        const int group = heads / static_cast<int>(g.num_kv_heads);
        w.block = blocks - 1 - number / group % blocks;
        const int kv_heads = number / group / blocks;
        head = kv_heads % static_cast<int>(g.num_kv_heads) * group + number % group;
        row = kv_heads / static_cast<int>(g.num_kv_heads);
        w.item = (row * heads + head) * blocks + w.block;
    }
    const int q_block_size = static_cast<int>(g.q_block_size);
    w.begin = w.block * q_block_size + part * schedule.rows;
    const int all = static_cast<int>(g.seqlen_q) - w.begin;
    w.size = all < schedule.rows ? all : schedule.rows;
    w.queries = block_queries(g, row, head, w.begin, w.size, 1);
    return w;
}

// --- what a mask keeps

// Walks the kept tokens of `work`, ascending. Every thread walks for itself; all come to every call
// together. What they have in common lies in shared memory: registers are scarce.
class KeptSpans {
public:
    // First position of the next kSpanTokens, or kNowhere.
    __device__ __forceinline__ int next(const BlockMask& mask, int size, const Work& work,
                                        uint32_t* bits) {
        const int end = work.queries.visible_end;
        if ((position_ & (size - 1)) == 0 || position_ >= end) {
            const int kv_blocks = (end + size - 1) / size;
            while (word_ == 0) {
                if (32 * index_ >= kv_blocks) return kNowhere;
                if (index_ % kWindowWords == 0)
                    mark_window<BlockTeam>(mask, work, kv_blocks, 32 * index_, bits);
                word_ = bits[index_++ % kWindowWords];
            }
            position_ = (32 * index_ - 33 + __ffs(static_cast<int>(word_))) * size;
            word_ &= word_ - 1;
        }
        const int found = position_;
        position_ += kSpanTokens;
        return found;
    }

private:
    int index_ = 0;      // of the bitmap's next word, from block 0 on
    uint32_t word_ = 0;  // what is left of the one before
    int position_ = 0;   // the next, unless the block is done
};

// --- attention

// How a thread block lies in shared memory and in registers.
template <typename T, int kHeadDim, int kGroups>
struct Plan {
    using Rows = TileRows<T, kHeadDim>;
    // float32 rows are long: two thread blocks share 128 queries. Warps of 32 rows read each tile
    // half as often as warps of 16; sums of 256 channels do not fit then.
    static constexpr bool kPaired = !std::is_same_v<T, float> && kHeadDim <= 128;
    static constexpr int kMostRows =
        std::is_same_v<T, float> || (kPaired && kGroups == 1) ? 64 : 128;
    static constexpr int kMostThreads = kMostRows / (kGroups * kGroupRows) * kWarpSize;
    // Tiles in the ring: keys and values in turn.
    static constexpr int kPlaces = kMostRows * Rows::kBytes >= 65536 ? 2 : 3;
    static constexpr int64_t shared_bytes(int rows) {
        return int64_t{rows} * Rows::kBytes + kPlaces * Rows::kTileBytes;
    }
    static_assert(kMostRows * Rows::kBytes + kPlaces * Rows::kTileBytes <= kMaxDynamicSharedBytes,
                  "queries and the ring fit every GPU");
    // 128 channels and 32 rows of a warp are 192 sums, 16 rows half of them.
    static constexpr int kBlocksPerSm = !kPaired ? 1 : (kGroups == 2 ? 2 : 3);
};

constexpr int kMostWarps = 8;

struct Shared {
    Work work;
    const void *keys, *values;  // of the row and KV head
    uint32_t bits[kWindowWords];
    int first[kMostWarps][2][4];  // where the spans of a tile and the next one begin, for each warp
    int nonfinite;
};
static_assert(sizeof(Shared) <= kMaxStaticSharedBytes);

// Adds the values that are not finite to the queries that see them, whatever they weigh, and puts 0
// in their place. By all threads; rows of the warp begin at own_row.
template <typename T, int kHeadDim, int kGroups>
__device__ __forceinline__ void add_nonfinite(const BlockQueries& q, int own_row, const int* first,
                                              unsigned char* values,
                                              float (&out)[kGroups][kHeadDim / 8][4]) {
    using Rows = TileRows<T, kHeadDim>;
    const LanePlace at = fresh_place();
#pragma unroll 1
    for (int token = 0; token < Rows::kTokens; ++token) {
        const int position = first[token / kSpanTokens] + token % kSpanTokens;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const int channel = 8 * n + 2 * at.quad;
            T pair[2];
            memcpy(pair,
                   values + Rows::offset(token, channel / kElementsPerChunk<T>) +
                       channel % kElementsPerChunk<T> * static_cast<int>(sizeof(T)),
                   sizeof pair);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float x = to_float(pair[c]);
                if (is_finite(x)) continue;
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
#pragma unroll
                    for (int which = 0; which < 2; ++which)
                        if (position < q.limit(own_row + g * kGroupRows + at.group + 8 * which))
                            out[g][n][2 * which + c] += x;
            }
        }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < Rows::kTileBytes / static_cast<int>(sizeof(T));
         i += static_cast<int>(blockDim.x)) {
        T* element = reinterpret_cast<T*>(values) + i;
        if (!is_finite(to_float(*element))) *element = T{};
    }
    __syncthreads();
}

template <typename T, int kHeadDim, int kGroups>
__global__ void __launch_bounds__(Plan<T, kHeadDim, kGroups>::kMostThreads,
                                  Plan<T, kHeadDim, kGroups>::kBlocksPerSm)
    attend_blocks_kernel(const BlockSparseAttentionParams p, const Schedule schedule) {
    using Rows = TileRows<T, kHeadDim>;
    constexpr int kPlaces = Plan<T, kHeadDim, kGroups>::kPlaces;
    constexpr int kColumns = Rows::kTokens / 8;
    __shared__ Shared shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const LanePlace at;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int own_row = thread / kWarpSize * kGroups * kGroupRows;  // the warp's first
    const int head_dim = static_cast<int>(p.grid.head_dim);
    if (thread == 0) {
        shared.work = find_work(p.grid, schedule);
        const BlockQueries& own = shared.work.queries;
        shared.keys = head_rows<T>(p.grid.keys, own.row, own.kv_head);
        shared.values = head_rows<T>(p.values, own.row, own.kv_head);
        shared.nonfinite = 0;
    }
    __syncthreads();
    const Work& work = shared.work;
    const BlockQueries& q = work.queries;
    if (work.size <= 0) return;  // a last q block that is short has fewer parts

    auto* const queries = static_cast<unsigned char*>(ptx::dynamic_shared_memory());
    unsigned char* const ring = queries + schedule.rows * Rows::kBytes;
    for (int i = thread; i < schedule.rows * Rows::kChunks; i += threads) {
        const int row = i / Rows::kChunks, d = i % Rows::kChunks * kElementsPerChunk<T>;
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (row < q.count && d < head_dim)
            chunk = load_chunk(query_row<T>(p.grid, q, row) + d, schedule.aligned_queries);
        *reinterpret_cast<uint4*>(queries + Rows::offset(row, i % Rows::kChunks)) = chunk;
    }

    KeptSpans kept;
    int (*const first)[4] = shared.first[thread / kWarpSize];
    // The tile whose spans are known, from `head` on.
    const auto load = [&](const void* head, int64_t stride, int tile, int place) {
        const int* const own = first[tile % 2];
        if (own[0] != kNowhere)
            copy_tile<T, kHeadDim>(
                static_cast<const T*>(head), stride, head_dim,
                [&](int row) { return own[row / kSpanTokens] + row % kSpanTokens; }, q.visible_end,
                ring + place * Rows::kTileBytes);
        ptx::end_copies();
    };
    const auto load_keys = [&](int tile, int place) {
#pragma unroll 1
        for (int i = 0; i < Rows::kSpans; ++i) {
            const int span =
                kept.next(p.mask, static_cast<int>(p.grid.kv_block_size), work, shared.bits);
            if (at.lane == 0) first[tile % 2][i] = span;
        }
        __syncwarp();
        load(shared.keys, p.grid.keys.token_stride, tile, place);
    };
    const auto load_values = [&](int tile, int place) {
        load(shared.values, p.values.token_stride, tile, place);
    };
    // Until the tile that is next in turn is there, and nobody reads the one before it any more.
    const auto arrive = [&] {
        ptx::wait_for_copies<kPlaces - 2>();
        __syncthreads();
    };
    load_keys(0, 0);
    if (kPlaces == 3) load_values(0, 1);

    float peak[kGroups][2], total[kGroups][2];
    float out[kGroups][kHeadDim / 8][4] = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            peak[g][which] = -INFINITY;
            total[g][which] = 0.f;
        }
    const bool plain = p.grid.softcap == 0.f && p.grid.softmax_scale > 0.f;
    const float factor = plain ? p.grid.softmax_scale * kLog2E : 1.f;

    int place = 0;
    const auto next_place = [&](int ahead) {
        const int next = place + ahead;
        return next < kPlaces ? next : next - kPlaces;
    };
    for (int tile = 0;; ++tile) {
        arrive();
        const int* const spans = first[tile % 2];
        if (spans[0] == kNowhere) break;
        if (kPlaces == 3)
            load_keys(tile + 1, next_place(2));
        else
            load_values(tile, next_place(1));
        // Of the warp's queries, the last sees most.
        const int rows = q.count - own_row;
        const bool sees =
            rows > 0 &&
            spans[0] <
                q.limit(own_row + (rows < kGroups * kGroupRows ? rows : kGroups * kGroupRows) - 1);
        Weights<T, kHeadDim, kGroups> weights;
        if (sees) {
            float logits[kGroups][kColumns][4] = {};
            const LanePlace here = fresh_place();
            const MatrixRows<T, kHeadDim> query_rows(own_row + here.lane % 16, here.lane / 16);
            multiply_keys<T, kHeadDim, kGroups>(
                ring + place * Rows::kTileBytes,
                [&](int step, uint32_t (&a)[kGroups][4]) {
#pragma unroll
                    for (int g = 0; g < kGroups; ++g)
                        ptx::load_matrices(a[g], queries + query_rows.offset(step, g * kGroupRows));
                },
                logits);
            if (!plain) {
                float scale = p.grid.softmax_scale, cap = p.grid.softcap;
                ptx::forget(scale);
                ptx::forget(cap);
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
#pragma unroll
                    for (int j = 0; j < kColumns; ++j)
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            logits[g][j][i] = soft_capped(logits[g][j][i] * (scale * kLog2E), cap);
            }
            // Spans ascend, and what is none comes last.
            if (spans[Rows::kSpans - 1] + kSpanTokens > q.limit(own_row)) {
                const LanePlace at = fresh_place();
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
#pragma unroll
                    for (int which = 0; which < 2; ++which) {
                        const int limit = q.limit(own_row + g * kGroupRows + at.group + 8 * which);
#pragma unroll
                        for (int j = 0; j < kColumns; ++j)
#pragma unroll
                            for (int i = 0; i < 2; ++i)
                                if (spans[j / 2] + j % 2 * 8 + 2 * at.quad + i >= limit)
                                    logits[g][j][2 * which + i] = -INFINITY;
                    }
            }
            // Weights: 2^(logit - peak).
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
#pragma unroll
                for (int which = 0; which < 2; ++which) {
                    float top = -INFINITY;
#pragma unroll
                    for (int j = 0; j < kColumns; ++j)
                        top =
                            fmaxf(top, fmaxf(logits[g][j][2 * which], logits[g][j][2 * which + 1]));
                    top = fmaxf(peak[g][which], reduce_max<4>(top) * factor);
                    const float base = top == -INFINITY ? 0.f : top;
                    const float old = ptx::exp2_approximate(peak[g][which] - base);
                    peak[g][which] = top;
                    float sum = 0.f;
#pragma unroll
                    for (int j = 0; j < kColumns; ++j)
#pragma unroll
                        for (int i = 2 * which; i < 2 * which + 2; ++i) {
                            logits[g][j][i] =
                                ptx::exp2_approximate(fmaf(logits[g][j][i], factor, -base));
                            sum += logits[g][j][i];
                        }
                    total[g][which] = fmaf(total[g][which], old, sum);
#pragma unroll
                    for (int n = 0; n < kHeadDim / 8; ++n) {
                        out[g][n][2 * which] *= old;
                        out[g][n][2 * which + 1] *= old;
                    }
                }
            weights.set(logits);
        }

        place = next_place(1);
        arrive();
        if (kPlaces == 3)
            load_values(tile + 1, next_place(2));
        else
            load_keys(tile + 1, next_place(1));
        unsigned char* const values = ring + place * Rows::kTileBytes;
        // The same for all threads: does the first query not see all of the tile?
        if (p.grid.causal && spans[Rows::kSpans - 1] + kSpanTokens > q.limit(0)) {
            bool found = false;
            for (int i = thread; i < Rows::kTileBytes / 16; i += threads)
                found = found || any_nonfinite<T>(*reinterpret_cast<const uint4*>(values + 16 * i));
            if (found) shared.nonfinite = 1;
            __syncthreads();
            if (shared.nonfinite != 0) {
                add_nonfinite<T, kHeadDim, kGroups>(q, own_row, spans, values, out);
                if (thread == 0) shared.nonfinite = 0;
            }
        }
        if (sees) multiply_values<T, kHeadDim, kGroups>(values, weights, out);
        place = next_place(1);
    }

    // Results, by way of the warp's own rows of queries, so that they are written in whole lines.
    __syncwarp();
    const LanePlace here = fresh_place();
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int row = own_row + g * kGroupRows + here.group + 8 * which;
            const float sum = reduce_add<4>(total[g][which]);
            const bool empty = sum == 0.f || row >= q.count;
            const float weight = empty ? 0.f : 1.f / sum;
            if (here.quad == 0 && row < work.size)
                p.lse[(int64_t{q.row} * p.grid.seqlen_q + work.begin + row) * p.grid.num_q_heads +
                      q.head] = empty ? -INFINITY : (peak[g][which] + log2f(sum)) * kLn2;
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                const int channel = 8 * n + 2 * here.quad;
                T pair[2];
#pragma unroll
                for (int c = 0; c < 2; ++c)
                    from_float(empty ? 0.f : out[g][n][2 * which + c] * weight, &pair[c]);
                memcpy(queries + Rows::offset(row, channel / kElementsPerChunk<T>) +
                           channel % kElementsPerChunk<T> * static_cast<int>(sizeof(T)),
                       pair, sizeof pair);
            }
        }
    __syncwarp();
    const int chunks = head_dim / kElementsPerChunk<T>;
    for (int i = here.lane; i < kGroups * kGroupRows * chunks; i += kWarpSize) {
        const int row = own_row + i / chunks, chunk = i % chunks;
        if (row >= work.size) break;
        T* const to =
            static_cast<T*>(p.out) +
            ((int64_t{q.row} * p.grid.seqlen_q + work.begin + row) * p.grid.num_q_heads + q.head) *
                head_dim;
        *reinterpret_cast<uint4*>(to + chunk * kElementsPerChunk<T>) =
            *reinterpret_cast<const uint4*>(queries + Rows::offset(row, chunk));
    }
}

// --- launcher

int64_t num_items(const BlockGrid& g) { return g.batch * g.num_q_heads * g.num_q_blocks(); }

bool is_ordered(const BlockSparseAttentionParams& p) {
    return p.mask.form == MaskForm::kCsr && num_items(p.grid) <= kMostOrderedItems &&
           p.grid.num_kv_blocks() > 0;
}

template <typename T, int kHeadDim, int kGroups>
void attend(const BlockSparseAttentionParams& p, Schedule schedule, const CudaLaunch& where) {
    using Own = Plan<T, kHeadDim, kGroups>;
    const int size = static_cast<int>(p.grid.q_block_size);
    schedule.rows = size < Own::kMostRows ? size : Own::kMostRows;
    schedule.parts = size / schedule.rows;
    launch(where, attend_blocks_kernel<T, kHeadDim, kGroups>, num_items(p.grid) * schedule.parts, 1,
           schedule.rows / (kGroups * kGroupRows) * kWarpSize, Own::shared_bytes(schedule.rows), p,
           schedule);
}

template <typename T, int kHeadDim>
void attend(const BlockSparseAttentionParams& p, const Schedule& schedule,
            const CudaLaunch& where) {
    if constexpr (Plan<T, kHeadDim, 1>::kPaired)
        if (p.grid.q_block_size == 128) return attend<T, kHeadDim, 2>(p, schedule, where);
    attend<T, kHeadDim, 1>(p, schedule, where);
}

}  // namespace

int64_t block_sparse_attention_workspace_bytes(const BlockSparseAttentionParams& p) {
    return is_ordered(p) ? 4 * num_items(p.grid) : 0;
}

void block_sparse_attention(const BlockSparseAttentionParams& p, void* workspace,
                            const CudaLaunch& where) {
    const BlockGrid& g = p.grid;
    if (num_items(g) == 0) return;
    Schedule schedule{};
    schedule.aligned_queries =
        rows_are_aligned(g.dtype, g.q, g.q_strides[0], g.q_strides[1], g.q_strides[2]);
    if (is_ordered(p)) {
        auto* const order = static_cast<int32_t*>(workspace);
        launch(where, order_items_kernel, 1, 1, kOrderThreads, 0, p.mask.row_offsets,
               static_cast<int>(num_items(g)), static_cast<int>(g.num_kv_blocks()), order);
        schedule.order = order;
    }
    with_element_type(g.dtype, [&](auto element) {
        using T = decltype(element);
        if (g.head_dim <= 64)
            attend<T, 64>(p, schedule, where);
        else if (g.head_dim <= 96)
            attend<T, 96>(p, schedule, where);
        else if (g.head_dim <= 128)
            attend<T, 128>(p, schedule, where);
        else
            attend<T, 256>(p, schedule, where);
    });
}

}  // namespace kvselect::cuda
