// Keys and queries as operands of the tensor cores, straight from where they lie: no shared memory,
// no transposes.
//
// mma.m16n8k16 gives lane (group, quad) = (lane / 4, lane % 4) of A the rows `group` and `group +
// 8` at four k's of its quad, and of B the column `group` at the same k's. Which token is which
// row, and which channel which k, is ours to choose as long as A and B agree:
//
//   rows      32 tokens make two products (m = 0, 1): token 4 * group + 2 * m is row `group`, the
//   next one row group + 8.
//             So a lane has four neighbouring tokens, and in each result their logits.
//   channels  a row is cut into chunks of 16 bytes (8 channels, or 4 of float32); the quads take
//   the chunks quad, quad + 4,
//             quad + 8, ... One chunk is two steps of k. The sketch's words hold the same 8 (int4)
//             or half of them (int8).
//   columns   a query is cut into pieces whose sum is the query to float32's precision: column
//   `group` is piece group % 2 of
//             query group / 2. So a product has 4 queries, and the two results of a lane in a row
//             add up to the logit of query `quad`.
#pragma once

#include <type_traits>

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"
#include "kvselect/rope.h"
#include "kvselect/sketch.h"

namespace kvselect::cuda {

constexpr int kQueriesPerProduct = 4;
constexpr int kTokensPerGroup = 32;
constexpr int kTokensPerLane = 4;

struct LanePlace {
    int lane, group, quad;
    __device__ LanePlace() : LanePlace(static_cast<int>(threadIdx.x) % kWarpSize) {}
    __device__ explicit LanePlace(int lane) : lane(lane), group(lane / 4), quad(lane % 4) {}
};

// --- one piece of a value: the nearest T, then the nearest T of what is left, ...

__device__ __forceinline__ float rounded(float x, float) {
    return __uint_as_float(ptx::to_tf32(x));
}
__device__ __forceinline__ float rounded(float x, Half) { return ptx::from_half(ptx::to_half(x)); }
__device__ __forceinline__ float rounded(float x, BFloat) {
    return __uint_as_float(uint32_t{ptx::to_bfloat(x)} << 16);
}
__device__ __forceinline__ uint32_t packed(float low, float high, Half) {
    return ptx::to_half2(low, high);
}
__device__ __forceinline__ uint32_t packed(float low, float high, BFloat) {
    return ptx::to_bfloat2(low, high);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], Half) {
    ptx::mma_half(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], BFloat) {
    ptx::mma_bfloat(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], float) {
    ptx::mma_tf32(d, a, b);
}

// d += a b with a and b in float32, as three products of tf32: what is dropped is below 2^-21 of a
// term.
__device__ __forceinline__ void multiply_wide(float (&d)[4], const float (&a)[4],
                                              const float (&b)[2]) {
    uint32_t a_first[4], a_left[4], b_first[2], b_left[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a_first[i] = ptx::to_tf32(a[i]);
        a_left[i] = is_finite(a[i]) ? ptx::to_tf32(a[i] - __uint_as_float(a_first[i])) : 0u;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        b_first[i] = ptx::to_tf32(b[i]);
        b_left[i] = is_finite(b[i]) ? ptx::to_tf32(b[i] - __uint_as_float(b_first[i])) : 0u;
    }
    ptx::mma_tf32(d, a_left, b_first);
    ptx::mma_tf32(d, a_first, b_left);
    ptx::mma_tf32(d, a_first, b_first);
}

// --- queries against exact keys

// B operands of one chunk: two steps of k, two registers each; `rest` is the third piece, which
// bfloat16 needs.
template <typename T>
struct QueryChunk {
    uint32_t main[2][2];
    uint32_t rest[2][2];
};

// From the chunk's elements as float32, q[kElementsPerChunk<T>].
template <typename T>
__device__ __forceinline__ QueryChunk<T> query_chunk(const float* q, int piece) {
    constexpr int kCount = kElementsPerChunk<T>;
    float main[kCount], rest[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float first = rounded(q[i], T{}), left = q[i] - first;
        const float second = rounded(left, T{});
        main[i] = piece == 0 ? first : second;
        rest[i] = piece == 0 ? left - second : 0.f;
    }
    QueryChunk<T> out;
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = (2 * step + r) * kCount / 4;
            if constexpr (kCount == 4) {
                out.main[step][r] = __float_as_uint(main[at]);
                out.rest[step][r] = 0;
            } else {
                out.main[step][r] = packed(main[at], main[at + 1], T{});
                out.rest[step][r] = packed(rest[at], rest[at + 1], T{});
            }
        }
    return out;
}

// Adds the products of one chunk of two rows per lane (the tokens of product m) to its four
// results.
template <typename T>
__device__ __forceinline__ void multiply_chunk(float (&d)[4], const uint4& row, const uint4& next,
                                               const QueryChunk<T>& q) {
    const uint32_t a[2][4] = {{row.x, next.x, row.y, next.y}, {row.z, next.z, row.w, next.w}};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        if constexpr (std::is_same_v<T, float>) {
            // Keys have 24 bits too: their nearest tf32, and what is left of them.
            uint32_t first[4], left[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float key = __uint_as_float(a[step][i]);
                first[i] = ptx::to_tf32(key);
                left[i] = is_finite(key) ? ptx::to_tf32(key - __uint_as_float(first[i])) : 0u;
            }
            multiply(d, left, q.main[step], T{});
            multiply(d, first, q.main[step], T{});
        } else {
            if constexpr (std::is_same_v<T, BFloat>) multiply(d, a[step], q.rest[step], T{});
            multiply(d, a[step], q.main[step], T{});
        }
    }
}

// --- rows of a cache

// Element offset of a token; positions are below 2^31, so the page is found by a division of 32
// bits.
__device__ __forceinline__ int64_t row_offset(const KVView& view, int64_t row, int64_t position,
                                              int64_t kv_head) {
    int64_t page = row, slot = position;
    if (view.block_table) {
        const uint32_t size = static_cast<uint32_t>(view.page_block_size);
        const uint32_t index = static_cast<uint32_t>(position) / size;
        slot = static_cast<uint32_t>(position) - index * size;
        page = view.block_table[row * view.block_table_stride + index];
    }
    return page * view.page_stride + slot * view.token_stride + kv_head * view.head_stride;
}

// Where channel d of a rotated row comes from: own * cos + factor * other * sin, or the channel as
// it is (pair < 0).
struct RopePair {
    int pair = -1, other = 0;
    float factor = 0.f;
};
__device__ __forceinline__ RopePair rope_pair(const RopeView& rope, int d) {
    RopePair out;
    const int num_pairs = static_cast<int>(rope.num_pairs), i = d - static_cast<int>(rope.start);
    if (i < 0 || i >= 2 * num_pairs) return out;
    const bool second = rope.interleaved ? i % 2 != 0 : i >= num_pairs;
    const int apart = rope.interleaved ? 1 : num_pairs;
    out.pair = rope.interleaved ? i / 2 : (second ? i - num_pairs : i);
    out.other = second ? d - apart : d + apart;
    out.factor = second ? 1.f : -1.f;
    return out;
}
// Channel d of `row` rotated: (a, b) -> (a cos - b sin, b cos + a sin). `cos` and `sin`: the
// tables' rows of its place.
template <typename T>
__device__ __forceinline__ float rotated(const T* row, const RopePair& at, const float* cos,
                                         const float* sin, int d) {
    const float own = to_float(row[d]);
    if (at.pair < 0) return own;
    return own * __ldg(cos + at.pair) + at.factor * to_float(row[at.other]) * __ldg(sin + at.pair);
}
// 16 bytes of `row` from channel d on, rotated to `place`.
template <typename T>
__device__ __forceinline__ uint4 rotated_chunk(const RopeView& rope, const T* row, int d,
                                               int64_t place) {
    T elements[kElementsPerChunk<T>];
#pragma unroll
    for (int i = 0; i < kElementsPerChunk<T>; ++i)
        from_float(rotated(row, rope_pair(rope, d + i), rope.cos + place * rope.num_pairs,
                           rope.sin + place * rope.num_pairs, d + i),
                   &elements[i]);
    uint4 chunk;
    memcpy(&chunk, elements, sizeof chunk);
    return chunk;
}

// --- the sketch

// Codes as fp16 numbers 1024 + code (or 1024 + 16 * code): a bit mask under the exponent of 1024,
// whose last place is 1. What 1024 adds to a product is taken off by the block's constant. `words`:
// token by token, 4 (int8: 2 x 4) or 8 channels of each.
__device__ __forceinline__ uint32_t masked(uint32_t word, uint32_t mask) {
    return (word & mask) | 0x64006400u;
}

template <SketchFormat kFormat>
struct CodeChunk;

// Word of 8 channels: byte i holds channel i in its low half, channel 4 + i in its high half. Pairs
// of channels in a register: (0, 2), (4, 6), (1, 3), (5, 7); the high halves stay where they are,
// which makes them 16 times as large.
template <>
struct CodeChunk<SketchFormat::kInt4> {
    uint4 tokens;
    __device__ __forceinline__ void load(const uint8_t* codes, int line_bytes, int chunk) {
        tokens = ptx::load_streaming(codes + chunk * line_bytes);
    }
    __device__ __forceinline__ void a_operands(int m, uint32_t (&a)[2][4]) const {
        const uint32_t row = m == 0 ? tokens.x : tokens.z, next = m == 0 ? tokens.y : tokens.w;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            a[step][0] = masked(row >> 8 * step, 0x000f000fu);
            a[step][1] = masked(next >> 8 * step, 0x000f000fu);
            a[step][2] = masked(row >> 8 * step, 0x00f000f0u);
            a[step][3] = masked(next >> 8 * step, 0x00f000f0u);
        }
    }
    // Channel of the chunk in half `half` of register r of step `step`, and what its code was
    // multiplied by.
    static __device__ constexpr int channel(int step, int r, int half) {
        return step + 2 * half + 4 * r;
    }
    static __device__ constexpr float inverse_factor(int r) { return r == 0 ? 1.f : 0.0625f; }
};

// Two lines of four channels each.
template <>
struct CodeChunk<SketchFormat::kInt8> {
    uint4 lines[2];
    __device__ __forceinline__ void load(const uint8_t* codes, int line_bytes, int chunk) {
        lines[0] = ptx::load_streaming(codes + 2 * chunk * line_bytes);
        lines[1] = ptx::load_streaming(codes + (2 * chunk + 1) * line_bytes);
    }
    __device__ __forceinline__ void a_operands(int m, uint32_t (&a)[2][4]) const {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint4& tokens = lines[step];
            const uint32_t row = m == 0 ? tokens.x : tokens.z, next = m == 0 ? tokens.y : tokens.w;
            a[step][0] = __byte_perm(row, 0x64646464u, 0x4140u);
            a[step][1] = __byte_perm(next, 0x64646464u, 0x4140u);
            a[step][2] = __byte_perm(row, 0x64646464u, 0x4342u);
            a[step][3] = __byte_perm(next, 0x64646464u, 0x4342u);
        }
    }
    static __device__ constexpr int channel(int step, int r, int half) {
        return 4 * step + 2 * r + half;
    }
    static __device__ constexpr float inverse_factor(int) { return 1.f; }
};

}  // namespace kvselect::cuda
