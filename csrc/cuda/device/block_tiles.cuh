// Tiles of tokens in shared memory, and the products that the ops over blocks make of them.
//
// A row of shared memory is a token's channels in chunks of 16 bytes. Chunks of neighbouring rows
// are turned against each other, so that the eight rows that a matrix load reads at once lie in
// different banks. One step of k is two chunks: 16 channels of 16 bits, or 8 of float32; ldmatrix
// gives either as mma wants it. A warp's product has 16 rows (queries) a row group.
#pragma once

#include "cuda/device/fragments.cuh"
#include "kvselect/block_mask.h"

namespace kvselect::cuda {

constexpr int kGroupRows = 16;   // queries of one product
constexpr int kSpanTokens = 16;  // neighbouring tokens that a tile is made of
// Where a tile has no span: beyond every position.
constexpr int kNowhere = 0x7fff0000;

template <typename T, int kHeadDim>
struct TileRows {
    static constexpr int kChunks = kHeadDim / kElementsPerChunk<T>;
    static constexpr int kSteps = kChunks / 2;
    static constexpr int kBytes = kChunks * 16;
    static_assert(kChunks % 4 == 0, "chunks are turned in fours or eights");
    // 16 KiB at most, so that a ring of them leaves room for others on every GPU.
    static constexpr int kTokens = kBytes <= 256 ? 64 : (kBytes <= 512 ? 32 : 16);
    static constexpr int kSpans = kTokens / kSpanTokens;
    static constexpr int kTileBytes = kTokens * kBytes;

    static __device__ __forceinline__ int offset(int row, int chunk) {
        constexpr int kTurns = kChunks % 8 == 0 ? 8 : 4;
        const int turn = kTurns == 8 ? row & 7 : row >> 1 & 3;
        return row * kBytes + (chunk % kTurns ^ turn) * 16 + chunk / kTurns * (kTurns * 16);
    }
};

// A place that nothing is kept for: what loops derive from it does not lie in registers meanwhile.
__device__ __forceinline__ LanePlace fresh_place() {
    int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    ptx::forget(lane);
    return LanePlace(lane);
}

// Where lane's row of the four matrices of step 0 lies: `row` and chunk `half` of it. A further
// step turns as its chunks do.
template <typename T, int kHeadDim>
struct MatrixRows {
    using Rows = TileRows<T, kHeadDim>;
    int first;

    __device__ __forceinline__ MatrixRows(int row, int half) : first(Rows::offset(row, half)) {}
    // Of step `step`, rows further on by a multiple of 16.
    __device__ __forceinline__ int offset(int step, int rows) const {
        constexpr int kStepsPerTurn = Rows::kChunks % 8 == 0 ? 4 : 2;
        return (first ^ step % kStepsPerTurn * 32) + rows * Rows::kBytes +
               step / kStepsPerTurn * (kStepsPerTurn * 32);
    }
};

// d += a b of one row group, `b` the two registers of eight columns.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
    if constexpr (std::is_same_v<T, float>) {
        const float wide_a[4] = {__uint_as_float(a[0]), __uint_as_float(a[1]),
                                 __uint_as_float(a[2]), __uint_as_float(a[3])};
        const float wide_b[2] = {__uint_as_float(b0), __uint_as_float(b1)};
        multiply_wide(d, wide_a, wide_b);
    } else {
        const uint32_t b[2] = {b0, b1};
        multiply(d, a, b, T{});
    }
}

// Adds the products of the warp's queries and a tile of keys: logits[group][j] is queries `group`
// and group + 8 by tokens 8 j + 2 quad, + 1. `operand(step, a)`: the queries' registers of a step.
template <typename T, int kHeadDim, int kGroups, typename Operand>
__device__ __forceinline__ void multiply_keys(
    const unsigned char* keys, const Operand& operand,
    float (&logits)[kGroups][TileRows<T, kHeadDim>::kTokens / 8][4]) {
    using Rows = TileRows<T, kHeadDim>;
    const LanePlace at = fresh_place();
    const MatrixRows<T, kHeadDim> rows(at.lane / 16 * 8 + at.lane % 8, at.lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < Rows::kSteps; ++step) {
        uint32_t a[kGroups][4];
        operand(step, a);
#pragma unroll
        for (int span = 0; span < Rows::kSpans; ++span) {
            uint32_t b[4];
            ptx::load_matrices(b, keys + rows.offset(step, span * kSpanTokens));
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                multiply_step<T>(logits[g][2 * span], a[g], b[0], b[1]);
                multiply_step<T>(logits[g][2 * span + 1], a[g], b[2], b[3]);
            }
        }
    }
}

// Weights as the operand of their product with a tile of values: kTokensPerStep tokens a step.
template <typename T>
constexpr int kTokensPerStep = std::is_same_v<T, float> ? 8 : 16;
template <typename T, int kHeadDim, int kGroups>
struct Weights {
    static constexpr int kSteps = TileRows<T, kHeadDim>::kTokens / kTokensPerStep<T>;
    uint32_t operand[kGroups][kSteps][4];

    // Of weights as multiply_keys lays out logits.
    __device__ __forceinline__ void set(
        const float (&weights)[kGroups][TileRows<T, kHeadDim>::kTokens / 8][4]) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                uint32_t (&to)[4] = operand[g][step];
                if constexpr (std::is_same_v<T, float>) {
                    // Of the k's of a lane the first is token 2 quad, the second the one behind it.
                    const float (&w)[4] = weights[g][step];
                    to[0] = __float_as_uint(w[0]);
                    to[1] = __float_as_uint(w[2]);
                    to[2] = __float_as_uint(w[1]);
                    to[3] = __float_as_uint(w[3]);
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float (&w)[4] = weights[g][2 * step + i];
                        to[2 * i] = packed(w[0], w[1], T{});
                        to[2 * i + 1] = packed(w[2], w[3], T{});
                    }
                }
            }
    }
};

// Adds the products of weights and a tile of values: out[group][j] is queries `group` and group + 8
// by channels 8 j + 2 quad, + 1.
template <typename T, int kHeadDim, int kGroups>
__device__ __forceinline__ void multiply_values(const unsigned char* values,
                                                const Weights<T, kHeadDim, kGroups>& weights,
                                                float (&out)[kGroups][kHeadDim / 8][4]) {
    using Rows = TileRows<T, kHeadDim>;
    const LanePlace at = fresh_place();
    const MatrixRows<T, kHeadDim> rows(at.lane % 16, at.lane / 16);
#pragma unroll
    for (int step = 0; step < weights.kSteps; ++step) {
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int n = 0; n < kHeadDim / 8; ++n) {
                uint32_t b[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[i] = *reinterpret_cast<const uint32_t*>(
                        values + Rows::offset(8 * step + 2 * at.quad + i, 2 * n + at.group / 4) +
                        at.group % 4 * 4);
#pragma unroll
                for (int g = 0; g < kGroups; ++g)
                    multiply_step<T>(out[g][n], weights.operand[g][step], b[0], b[1]);
            }
        } else {
#pragma unroll
            for (int n = 0; n < kHeadDim / 16; ++n) {
                uint32_t b[4];
                ptx::load_matrices_transposed(b, values + rows.offset(n, 16 * step));
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    multiply_step<T>(out[g][2 * n], weights.operand[g][step], b[0], b[1]);
                    multiply_step<T>(out[g][2 * n + 1], weights.operand[g][step], b[2], b[3]);
                }
            }
        }
    }
}

// Begins to copy a tile of rows at `head` + position * stride (elements), position_of(row) of each,
// by all threads of the block. Positions from `end` on, and channels from head_dim on, are not
// read; their places become 0.
template <typename T, int kHeadDim, typename PositionOf>
__device__ __forceinline__ void copy_tile(const T* head, int64_t stride, int head_dim,
                                          const PositionOf& position_of, int end,
                                          unsigned char* to) {
    using Rows = TileRows<T, kHeadDim>;
    const int threads = static_cast<int>(blockDim.x);
    int begin = static_cast<int>(threadIdx.x);
    ptx::forget(begin);
#pragma unroll 2
    for (int i = begin; i < Rows::kTokens * Rows::kChunks; i += threads) {
        const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
        const int d = chunk * kElementsPerChunk<T>;
        const int position = position_of(row);
        const bool exists = position < end && d < head_dim;
        ptx::copy_to_shared(to + Rows::offset(row, chunk),
                            exists ? head + position * stride + d : head, exists);
    }
}

// --- queries of one block

// Some queries of one block, at equal distances: what the CPU's QueryRows is.
struct BlockQueries {
    int row, head, kv_head;
    int first, count, stride;  // query first + i * stride, i in [0, count)
    int position;              // of query `first`; negative where it sees nothing
    int visible_end;           // positions that the last one sees: [0, visible_end)
    bool causal;

    // Query i sees positions below this.
    __device__ __forceinline__ int limit(int i) const {
        if (!causal) return visible_end;
        const int own = position + i * stride + 1;
        return own < visible_end ? own : visible_end;
    }
};

// Lengths that lie on the device are nobody's to check: they are cut to what there is.
__device__ __forceinline__ int row_length(const int32_t* lengths, int row, int64_t longest) {
    const int most = static_cast<int>(longest);
    if (!lengths) return most;
    const int own = lengths[row];
    return own < 0 ? 0 : (own < most ? own : most);
}

// Of queries [begin, begin + size) of a row: the last one that the row has and every `stride`-th
// before it.
__device__ __forceinline__ BlockQueries block_queries(const BlockGrid& g, int row, int head,
                                                      int begin, int size, int stride) {
    BlockQueries q;
    q.row = row;
    q.head = head;
    q.kv_head = head / static_cast<int>(g.num_q_heads / g.num_kv_heads);
    const int seqlen_q = row_length(g.seqlens_q, row, g.seqlen_q);
    const int seqlen_k = row_length(g.seqlens_k, row, g.seqlen_k);
    const int rest = seqlen_q - begin, all = rest < size ? rest : size;
    q.stride = stride;
    q.count = all > 0 ? (all - 1) / stride + 1 : 0;
    q.first = begin + (all > 0 ? (all - 1) % stride : 0);
    q.position = seqlen_k - seqlen_q + q.first;
    const int seen = g.causal ? seqlen_k - seqlen_q + begin + all : seqlen_k;
    q.visible_end = q.count == 0 || seen < 0 ? 0 : seen;
    q.causal = g.causal;
    return q;
}

template <typename T>
__device__ __forceinline__ const T* query_row(const BlockGrid& g, const BlockQueries& q, int i) {
    return static_cast<const T*>(g.q) + q.row * g.q_strides[0] +
           (q.first + int64_t{i} * q.stride) * g.q_strides[1] + q.head * g.q_strides[2];
}

// Keys or values of one row and head, from position 0 on.
template <typename T>
__device__ __forceinline__ const T* head_rows(const KVView& view, int row, int kv_head) {
    return static_cast<const T*>(view.data) + row * view.page_stride + kv_head * view.head_stride;
}

}  // namespace kvselect::cuda
