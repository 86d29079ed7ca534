// score_tokens: logits of every visible token, one softmax per scoring vector and query head,
// votes added per KV head.
//
// Problem  s[c, i] = scale * q[c] . k[i];  lse[c] = logsumexp_i s[c, i]
//          scores[i] = sum_c exp(s[c, i] - lse[c])
// Floor    the sketch (68 bytes per token and KV head for int4 at head_dim 128) or the keys, read
//          once: 71 MB at 128K tokens and 8 heads, 16.6 us at 4.3 TB/s. Instructions: about 950 a
//          warp and 128-token block, 11 us (modelled).
// Plan     Two kernels over the same grid: a thread block per item (row, block of queries, KV
//          head) and tile of 1024 tokens, a warp per 128-token sketch block.
//          weigh  Products on the tensor cores with keys as rows and queries as columns
//                 (fragments.cuh), codes unpacked to fp16 by a mask, queries times the block's
//                 steps in two fp16 pieces; sinks, recent tokens and blocks without codes from
//                 their keys. Per tile and column the maximum m and the sum of 2^(s - m); with few
//                 columns (decode) the logits too, in float32.
//          vote   lse from the tiles' pairs, in their order, in every thread block (cheaper than a
//                 third kernel); then the sum over columns of 2^(s - lse), from the logits kept
//                 or, with many columns (prefill), from logits made again: they would be twice
//                 what the keys are.
//          With a selection cache every thread block of weigh first decides whether its list is
//          reused (device/selection_cache.cuh) and leaves if so; vote writes what is remembered.
//          Tiles count from the row's first real token, so no bit depends on the grid. Lengths are
//          read on the device: the grid follows max_seqlen_k; tiles past a row's end leave at once.
#include "kvselect/score_tokens.h"

#include "cuda/device/fragments.cuh"
#include "cuda/device/ranking.cuh"
#include "cuda/device/selection_cache.cuh"
#include "cuda/device/soft_cap.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kTileTokens = static_cast<int>(kScoreTileTokens);
constexpr int kBlockTokens = static_cast<int>(kSketchBlockTokens);
static_assert(kTileTokens == kWarps * kBlockTokens, "a warp takes one sketch block of a tile");
constexpr int kGroups = kBlockTokens / kTokensPerGroup;
constexpr int kMaxHeadDim = 256;
constexpr int kQueryStride =
    kMaxHeadDim + 4;  // floats; queries of a product start in different banks

// Columns in products of four. With max_vote every vector's heads are added up first, so that its
// products must not hold heads of another vector.
struct Columns {
    int64_t per_set, num_sets;  // a set's columns are added; the score is the largest of the sums
    int64_t products_per_set;

    KVS_HOST_DEVICE int64_t num_products() const { return num_sets * products_per_set; }
    KVS_HOST_DEVICE int64_t padded() const { return num_products() * kQueriesPerProduct; }
    // Column number of a query of a product, or -1: padding.
    KVS_HOST_DEVICE int64_t column(int64_t product, int64_t query) const {
        const int64_t in_set = product % products_per_set * kQueriesPerProduct + query;
        return in_set < per_set ? product / products_per_set * per_set + in_set : -1;
    }
};

Columns columns_of(const ScoreTokensParams& p) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    Columns columns;
    columns.num_sets = p.max_vote ? p.num_vectors : 1;
    columns.per_set = p.max_vote ? group : p.num_vectors * group;
    columns.products_per_set = ceil_div(columns.per_set, kQueriesPerProduct);
    return columns;
}

struct Workspace {
    Columns columns;
    int64_t num_tiles;  // of the longest row
    float* peak;        // [items, padded columns, num_tiles] maximum of a tile, in units of ln 2
    float* total;  // [items, padded columns, num_tiles] sum of 2^(logit - peak); -1: the query is
                   // not finite
    int32_t* num_dropped;  // [items, num_tiles] tokens with a logit that is not finite
    float* logits;  // [items, padded columns, num_tiles * 1024]; NaN: dropped. nullptr: made again
};

// One item and tile.
struct Item {  // in shared memory: registers are for operands
    int64_t number, row, block, kv_head, tile;
    BlockRange range;
    int64_t cand_end, visible_end;
    int64_t begin;  // first position of the tile

    // By one thread; a barrier follows.
    __device__ void find(const ScoreTokensParams& p, const Workspace& w) {
        number = blockIdx.x / w.num_tiles;
        tile = blockIdx.x % w.num_tiles;
        kv_head = number % p.num_kv_heads;
        block = number / p.num_kv_heads % p.blocks.num_blocks;
        row = number / p.num_kv_heads / p.blocks.num_blocks;
        range = block_range(p.blocks, row, block);
        visible_end = range.visible_end > range.start ? range.visible_end : range.start;
        range.sink_end = range.sink_end < visible_end ? range.sink_end : visible_end;
        cand_end = range.window_start < visible_end ? range.window_start : visible_end;
        begin = range.start + tile * kTileTokens;
    }
    __device__ bool is_hit(const ScoreTokensParams& p) const { return is_reused(p, row, kv_head); }
    // Of a selection cache: the list of the item's head, which its first head speaks for.
    __device__ int64_t list(const SelectionCacheStepParams& p) const {
        return p.num_lists == 1 ? 0 : kv_head;
    }
    __device__ bool speaks_for_list(const SelectionCacheStepParams& p) const {
        return tile == 0 && (p.num_lists > 1 || kv_head == 0);
    }
    // Of the tile's block `index`; nullptr: it is not whole, or there is no sketch.
    __device__ const uint8_t* record(const ScoreTokensParams& p, int64_t index) const {
        const int64_t first = begin + index * kBlockTokens;
        if (p.sketch.data == nullptr || first + kBlockTokens > p.blocks.cache_seqlens[row])
            return nullptr;
        return p.sketch.block(row, kv_head, (first - range.start) / kBlockTokens);
    }
    // Where the vector of a column begins in q.
    __device__ int64_t query_at(const ScoreTokensParams& p, int64_t column) const {
        const int64_t group = p.num_q_heads / p.num_kv_heads;
        const int64_t vector = (row * p.blocks.num_blocks + block) * p.num_vectors + column / group;
        return (vector * p.num_q_heads + kv_head * group + column % group) * p.head_dim;
    }
    __device__ int64_t padded_column(const Workspace& w, int64_t product, int query) const {
        return number * w.columns.padded() + product * kQueriesPerProduct + query;
    }
};

// The four queries of a product, each scaled by a power of two so that its largest element lies in
// [1, 2): their pieces then fit fp16, whose smallest step is 2^-24. Zeros behind head_dim.
struct QuerySet {
    float q[kQueriesPerProduct][kQueryStride];
    float scale[kQueriesPerProduct];  // of logits in units of ln 2
    bool finite[kQueriesPerProduct];
};
struct Queries {
    QuerySet far, local;  // for candidates; for sinks and recent tokens
    __device__ bool usable(int query) const { return far.finite[query] && local.finite[query]; }
};

// A warp loads one query; `scale` receives the factor of its logits.
__device__ void load_query(const float* from, int head_dim, float score_scale, float* to,
                           float* scale, bool* finite) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    float largest = 0.f;
    bool all_finite = true;
    for (int d = lane; d < head_dim; d += kWarpSize) {
        const float x = from ? from[d] : 0.f;
        all_finite = all_finite && is_finite(x);
        largest = fmaxf(largest, fabsf(x));
    }
    largest = reduce_max(largest);
    all_finite = __all_sync(kAllLanes, all_finite);
    // 2^-exponent and 2^exponent, both in float32's range; subnormal and zero queries stay as they
    // are.
    int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    exponent = exponent < -126 || !all_finite ? 0 : (exponent > 126 ? 126 : exponent);
    const float down = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
    const float up = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
    for (int d = lane; d < kQueryStride; d += kWarpSize)
        to[d] = from && all_finite && d < head_dim ? from[d] * down : 0.f;
    if (lane == 0) {
        *scale = score_scale * kLog2E * up;
        *finite = from == nullptr || all_finite;
    }
}

// All warps; barriers on both sides. Padding gets zeros.
__device__ void load_queries(const ScoreTokensParams& p, const Item& item, const Columns& columns,
                             int64_t product, Queries& out) {
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, query = warp % kQueriesPerProduct;
    static_assert(kWarps == 2 * kQueriesPerProduct, "a warp per query, and per local query");
    const int64_t column = columns.column(product, query);
    const bool local = warp >= kQueriesPerProduct;
    const float* base = local && p.q_local ? p.q_local : p.q;
    const float* from = column < 0 ? nullptr : base + item.query_at(p, column);
    QuerySet& set = local ? out.local : out.far;
    load_query(from, static_cast<int>(p.head_dim), p.scale, set.q[query], &set.scale[query],
               &set.finite[query]);
    __syncthreads();
}

// --- logits of a warp's sketch block, 32 tokens at a time: emit(group, span, x) with the lane's
// four neighbouring tokens of query `quad`, of which those inside the span hold a logit.

// Tokens asked for, counted from the warp's first one, and what they are to the queries.
struct Span {
    int first, last;
    bool candidate;
    __device__ bool touches(int group) const {
        return group * kTokensPerGroup < last && (group + 1) * kTokensPerGroup > first;
    }
    __device__ bool holds(int token) const { return token >= first && token < last; }
};

// Offsets of the lane's four tokens of a group; -1: outside the span.
__device__ __forceinline__ void token_offsets(const ScoreTokensParams& p, const Item& item,
                                              const Span& span, int64_t begin, int group,
                                              int64_t (&offset)[kTokensPerLane]) {
    const LanePlace at;
    const int token = group * kTokensPerGroup + at.lane;
    const int64_t own =
        span.holds(token) ? row_offset(p.keys, item.row, begin + token, item.kv_head) : -1;
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i)
        offset[i] = __shfl_sync(kAllLanes, own, kTokensPerLane * at.group + i);
}

template <typename Emit>
__device__ __forceinline__ void emit_sums(int group, const Span& span, const float (&sums)[2][4],
                                          float factor, float softcap, const Emit& emit) {
    float x[kTokensPerLane];
#pragma unroll
    for (int i = 0; i < kTokensPerLane; ++i)
        x[i] = soft_capped(factor * (sums[i / 2][i % 2 * 2] + sums[i / 2][i % 2 * 2 + 1]), softcap);
    emit(group, span, x);
}

// From keys of 16 bits: the queries' operands stay in registers, but for bfloat16's third pieces
// beside a sketch, whose scan needs the registers more.
template <typename T, SketchFormat kFormat, int kHeadDim32, typename Emit>
__device__ __forceinline__ void logits_from_keys(const ScoreTokensParams& p, const Item& item,
                                                 const Span& span, int64_t begin,
                                                 const QuerySet& queries, const Emit& emit) {
    constexpr int kChunks = kHeadDim32, kPerChunk = kElementsPerChunk<T>;
    const LanePlace at;
    const int head_dim = static_cast<int>(p.head_dim);
    QueryChunk<T> columns[kChunks];
#pragma unroll
    for (int j = 0; j < kChunks; ++j)
        columns[j] =
            query_chunk<T>(queries.q[at.group / 2] + (at.quad + 4 * j) * kPerChunk, at.group % 2);
    const T* data = static_cast<const T*>(p.keys.data);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        if (!span.touches(group)) continue;
        int64_t offset[kTokensPerLane];
        token_offsets(p, item, span, begin, group, offset);
        float sums[2][4] = {};
        // One product after the other: two rows at a time leave registers for the operands.
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
            const int64_t pair[2] = {m == 0 ? offset[0] : offset[2],
                                     m == 0 ? offset[1] : offset[3]};
            float sum[4] = {};
            uint4 rows[kChunks][2];
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                const int d = (at.quad + 4 * j) * kPerChunk;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    rows[j][i] = make_uint4(0, 0, 0, 0);
                    if (pair[i] >= 0 && d < head_dim)
                        rows[j][i] = *reinterpret_cast<const uint4*>(data + pair[i] + d);
                }
            }
#pragma unroll
            for (int j = 0; j < kChunks; ++j) {
                QueryChunk<T> column = columns[j];
                if constexpr (kFormat != SketchFormat::kNone && std::is_same_v<T, BFloat>)
                    column = query_chunk<T>(queries.q[at.group / 2] + (at.quad + 4 * j) * kPerChunk,
                                            at.group % 2);
                multiply_chunk<T>(sum, rows[j][0], rows[j][1], column);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) (m == 0 ? sums[0][i] : sums[1][i]) = sum[i];
        }
        emit_sums(group, span, sums, queries.scale[at.quad], p.softcap, emit);
    }
}

// From keys in float32 arithmetic: caches of float32, and keys that are rotated (the one of
// position to position + shift) on their way. Chunk by chunk, which is small and slow: neither is
// what a long context is scanned from.
template <typename T, typename Emit>
__device__ __forceinline__ void logits_from_wide_keys(const ScoreTokensParams& p, const Item& item,
                                                      const Span& span, int64_t begin,
                                                      const QuerySet& queries, bool rotate,
                                                      int64_t shift, const Emit& emit) {
    const LanePlace at;
    const int head_dim = static_cast<int>(p.head_dim);
    const T* data = static_cast<const T*>(p.keys.data);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        if (!span.touches(group)) continue;
        int64_t offset[kTokensPerLane];
        token_offsets(p, item, span, begin, group, offset);
        const int64_t first = begin + group * kTokensPerGroup + kTokensPerLane * at.group + shift;
        float sums[2][4] = {};
#pragma unroll 1
        for (int m = 0; m < 2; ++m) {
            const int64_t pair[2] = {m == 0 ? offset[0] : offset[2],
                                     m == 0 ? offset[1] : offset[3]};
            float sum[4] = {};
#pragma unroll 1
            for (int chunk = 0; chunk < head_dim; chunk += 16) {  // head_dim is a multiple of 16
                const int d = chunk + at.quad * 4;
                float x[2][4] = {};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const RopePair at_rope = rotate ? rope_pair(p.rope, d + c) : RopePair{};
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (pair[i] < 0) continue;
                        const int64_t place = (first + 2 * m + i) * p.rope.num_pairs;
                        x[i][c] = rotated(data + pair[i], at_rope, p.rope.cos + place,
                                          p.rope.sin + place, d + c);
                    }
                }
                uint4 rows[2];
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    rows[i] = make_uint4(__float_as_uint(x[i][0]), __float_as_uint(x[i][1]),
                                         __float_as_uint(x[i][2]), __float_as_uint(x[i][3]));
                const QueryChunk<float> column =
                    query_chunk<float>(queries.q[at.group / 2] + d, at.group % 2);
                multiply_chunk<float>(sum, rows[0], rows[1], column);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) (m == 0 ? sums[0][i] : sums[1][i]) = sum[i];
        }
        emit_sums(group, span, sums, queries.scale[at.quad], p.softcap, emit);
    }
}

// From a block's record.
template <SketchFormat kFormat, int kHeadDim32, typename Emit>
__device__ __forceinline__ void logits_from_sketch(const ScoreTokensParams& p,
                                                   const uint8_t* record, const Span& span,
                                                   const QuerySet& queries, const Emit& emit) {
    constexpr int kChunks = kHeadDim32;  // of 8 channels, per lane
    using Code = CodeChunk<kFormat>;
    const LanePlace at;
    const int head_dim = static_cast<int>(p.head_dim);
    constexpr int kLineBytes = 4 * static_cast<int>(kSketchSubBlockTokens);
    const int sub_block_bytes =
        static_cast<int>(sketch_code_bytes(kFormat, head_dim)) / (kBlockTokens / 16);
    // A group is two sub-blocks of 16 tokens; four neighbours of one of them are this lane's.
    const uint8_t* codes =
        record + 4 * head_dim + at.group / 4 * sub_block_bytes + at.group % 4 * 16;
    // Columns: q * step in two fp16 pieces. What codes are too large by (1024, see fragments.cuh)
    // times the pieces as they were rounded, and the lows, make a constant per query: this lane's
    // share of it.
    const uint16_t* steps = reinterpret_cast<const uint16_t*>(record);
    uint32_t columns[kChunks][2][2];
    float constant = 0.f;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
        const int d = (at.quad + 4 * j) * 8;
        uint4 step = make_uint4(0, 0, 0, 0), lo = step;
        if (d < head_dim) {
            step = *reinterpret_cast<const uint4*>(steps + d);
            lo = *reinterpret_cast<const uint4*>(steps + head_dim + d);
        }
        const float* query = queries.q[at.group / 2] + d;
        float weight[8], at_lo = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            weight[i] = query[i] * element_of(step, i, Half{});
            at_lo = fmaf(query[i], element_of(lo, i, Half{}), at_lo);
        }
        if (at.group % 2 == 0) constant += at_lo;
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float piece[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float w = weight[Code::channel(k, r, half)] * Code::inverse_factor(r);
                    const float first = rounded(w, Half{});
                    piece[half] = at.group % 2 == 0 ? first : rounded(w - first, Half{});
                    constant = fmaf(piece[half], -1024.f, constant);
                }
                columns[j][k][r] = packed(piece[0], piece[1], Half{});
            }
    }
    // Lanes of one query: four quads, two pieces. The result is wanted by the lanes whose quad is
    // the query.
    constant = reduce_add<8>(constant);
    constant = __shfl_sync(kAllLanes, constant, 8 * at.quad);

#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
        if (!span.touches(group)) continue;
        // Fetching the next group meanwhile would take the registers of the second block on the SM.
        Code now[kChunks];
#pragma unroll
        for (int j = 0; j < kChunks; ++j) {
            now[j] = Code{};
            if ((at.quad + 4 * j) * 8 < head_dim)
                now[j].load(codes + group * 2 * sub_block_bytes, kLineBytes, at.quad + 4 * j);
        }
        float sums[2][4] = {{constant, 0.f, constant, 0.f}, {constant, 0.f, constant, 0.f}};
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                uint32_t rows[2][4];
                now[j].a_operands(m, rows);
                multiply(sums[m], rows[0], columns[j][0], Half{});
                multiply(sums[m], rows[1], columns[j][1], Half{});
            }
        emit_sums(group, span, sums, queries.scale[at.quad], p.softcap, emit);
    }
}

// All logits of the warp's block, which may have a record, for the queries in shared memory.
template <typename T, SketchFormat kFormat, int kHeadDim32, typename Emit>
__device__ __forceinline__ void logits_of_block(const ScoreTokensParams& p, const Item& item,
                                                int64_t begin, const uint8_t* const* found,
                                                const Queries& queries, const Emit& emit) {
    const int64_t left = item.visible_end - begin;
    const int end = left < kBlockTokens ? static_cast<int>(left) : kBlockTokens;
    if (end <= 0) return;
    const auto inside = [&](int64_t position) {
        const int64_t token = position - begin;
        return token < 0 ? 0 : (token < end ? static_cast<int>(token) : end);
    };
    const int sinks = inside(item.range.sink_end), recent = inside(item.cand_end);
    const int64_t num_sinks = item.range.sink_end - item.range.start;
    const int64_t num_candidates = item.cand_end - item.range.sink_end;
    const int64_t picked = p.keep < num_candidates ? p.keep : num_candidates;

    bool has_codes = false;
    if constexpr (kFormat != SketchFormat::kNone) {
        // A block without codes has NaN as its first step.
        const uint8_t* record = sinks < recent ? *found : nullptr;
        if (record != nullptr) {
            has_codes = is_finite(ptx::from_half(*reinterpret_cast<const uint16_t*>(record)));
            if (has_codes)
                logits_from_sketch<kFormat, kHeadDim32>(p, record, Span{sinks, recent, true},
                                                        queries.far, emit);
        }
    }
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {  // sinks, candidates, recent tokens
        const bool candidates = part == 1;
        const Span span{part == 0 ? 0 : (candidates ? sinks : recent),
                        part == 0 ? sinks : (candidates ? recent : end), candidates};
        if (span.first >= span.last || (candidates && has_codes)) continue;
        const QuerySet& set = candidates ? queries.far : queries.local;
        // Compact places: a sink's rank, a recent token's place behind what will be picked.
        const bool rotate = p.rope.cos != nullptr && !candidates;
        const int64_t shift = part == 0 ? -item.range.start : num_sinks + picked - item.cand_end;
        if constexpr (std::is_same_v<T, float>) {
            logits_from_wide_keys<T>(p, item, span, begin, set, rotate, shift, emit);
        } else {
            if (rotate)
                logits_from_wide_keys<T>(p, item, span, begin, set, true, shift, emit);
            else
                logits_from_keys<T, kFormat, kHeadDim32>(p, item, span, begin, set, emit);
        }
    }
}

// Maximum and sum of 2^(x - maximum) of a growing set.
struct Softmax {
    float peak = -INFINITY, total = 0.f;
    __device__ void add(float x) {
        if (x == -INFINITY) return;
        const float top = fmaxf(peak, x);
        total = total * ptx::exp2_approximate(peak - top) + ptx::exp2_approximate(x - top);
        peak = top;
    }
    __device__ void add(float other_peak, float other_total) {
        const float top = fmaxf(peak, other_peak);
        if (top == -INFINITY) return;
        total = total * ptx::exp2_approximate(peak - top) +
                other_total * ptx::exp2_approximate(other_peak - top);
        peak = top;
    }
};

// --- vote

// log2 of the sum of 2^logit of a column over its tiles, in the lanes' order; NaN: the query is not
// finite.
__device__ float merged_tiles(const Workspace& w, int64_t padded_column, int64_t num_tiles) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float* peaks = w.peak + padded_column * w.num_tiles;
    const float* totals = w.total + padded_column * w.num_tiles;
    if (num_tiles == 0) return -INFINITY;
    if (totals[0] < 0.f) return NAN;
    float peak = -INFINITY;
    for (int64_t t = lane; t < num_tiles; t += kWarpSize) peak = fmaxf(peak, peaks[t]);
    peak = reduce_max(peak);
    if (peak == -INFINITY) return -INFINITY;
    float total = 0.f;
    for (int64_t t = lane; t < num_tiles; t += kWarpSize)
        total += totals[t] * ptx::exp2_approximate(peaks[t] - peak);
    return peak + log2f(reduce_add(total));
}

// The same of a query of a product, with its head's sink; NaN for padding too.
__device__ float merged_lse(const ScoreTokensParams& p, const Workspace& w, const Item& item,
                            int64_t product, int query, int64_t num_tiles) {
    const int64_t column = w.columns.column(product, query);
    if (column < 0) return NAN;
    const float lse = merged_tiles(w, item.padded_column(w, product, query), num_tiles);
    if (p.sink_logits == nullptr || p.normalise_candidates_only) return lse;
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    return with_sink(lse, p.sink_logits[item.kv_head * group + column % group]);
}

// What belongs to no tile, by the thread block of tile 0: lse, tokens without a score, the count of
// defects.
template <typename T>
__device__ void finish_item(const ScoreTokensParams& p, const Workspace& w, const Item& item,
                            int64_t num_tiles, float* scores) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize,
              lane = thread % kWarpSize;
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const bool hit = item.is_hit(p);
    int64_t nonfinite = 0;  // this lane's share
    for (int64_t column = warp; column < p.num_vectors * group; column += kWarps) {
        const int64_t set = column / w.columns.per_set, in_set = column % w.columns.per_set;
        const int64_t product = set * w.columns.products_per_set + in_set / kQueriesPerProduct;
        const int64_t from = item.query_at(p, column);
        bool finite = true;
        for (int64_t d = lane; d < p.head_dim; d += kWarpSize)
            finite = finite && is_finite(p.q[from + d]) &&
                     (p.q_local == nullptr || is_finite(p.q_local[from + d]));
        finite = __all_sync(kAllLanes, finite);
        float lse = -INFINITY;
        if (!hit && finite)
            lse = merged_lse(p, w, item, product, static_cast<int>(in_set % kQueriesPerProduct),
                             num_tiles);
        if (lane == 0) {
            p.lse[from / p.head_dim] = lse * kLn2;
            nonfinite += !finite;
        }
    }
    if (!hit) {
        for (int64_t t = thread; t < num_tiles; t += kThreads)
            nonfinite += w.num_dropped[item.number * w.num_tiles + t];
        for (int64_t i = thread; i < item.range.start; i += kThreads) scores[i] = 0.f;
        // Tokens of the block itself, which have no score: a defect there must not be listed
        // either.
        const T* keys = static_cast<const T*>(p.keys.data);
        for (int64_t i = item.visible_end + warp; i < item.range.end; i += kWarps) {
            const int64_t offset = row_offset(p.keys, item.row, i, item.kv_head);
            bool finite = true;
            for (int64_t d = lane; d < p.head_dim; d += kWarpSize)
                finite = finite && is_finite(to_float(keys[offset + d]));
            finite = __all_sync(kAllLanes, finite);
            if (lane == 0) {
                scores[i] = finite ? 0.f : NAN;
                nonfinite += !finite;
            }
        }
        for (int64_t i = item.range.end + thread; i < p.max_seqlen_k; i += kThreads)
            scores[i] = 0.f;
    }
    // Whole numbers add up in any order.
    __shared__ int64_t sums[kWarps];
    nonfinite = reduce_add(nonfinite);
    if (lane == 0) sums[warp] = nonfinite;
    __syncthreads();
    if (thread == 0) {
        int64_t all = 0;
        for (int i = 0; i < kWarps; ++i) all += sums[i];
        p.num_nonfinite[item.number] = hit ? 0 : all;
    }
}

// --- what select_tokens would count first

// By the first kernel, whichever of its blocks that is.
__device__ void clear_ranking(const ScoreTokensParams& p, const Item& item) {
    if (p.ranking == nullptr || item.tile != 0) return;
    int32_t* const words = p.ranking + item.number * kRankingWords;
    for (int i = static_cast<int>(threadIdx.x); i < kRankingWords; i += kThreads) words[i] = 0;
}

// Writes the tile's scores, `score_of(i)` for its i-th token, and counts its candidates.
template <typename ScoreOf>
__device__ __forceinline__ void write_scores(const ScoreTokensParams& p, const Item& item,
                                             int64_t num_tiles, float* scores,
                                             const ScoreOf& score_of) {
    static_assert(kThreads == kRankingThreads, "all threads count");
    const int64_t left = item.visible_end - item.begin;
    TopCounts counts;
    if (p.ranking) counts.clear();
    for (int i = static_cast<int>(threadIdx.x); i < kTileTokens && i < left; i += kThreads) {
        const int64_t position = item.begin + i;
        const float score = score_of(i);
        scores[position] = score;
        if (p.ranking && position >= item.range.sink_end && position < item.cand_end &&
            is_finite(score))
            counts.add(order_key(score));
    }
    if (!p.ranking) return;
    Ranking* const all = reinterpret_cast<Ranking*>(p.ranking);
    counts.finish(all[item.number], num_tiles, p.keep);
}

// --- which lists are reused

// By the first kernel, of a selection cache; the flag that it leaves is for the kernels that
// follow. The answer comes through shared memory, so that nothing of its making stays in registers.
template <typename T>
__device__ __forceinline__ void decide_reuse(const ScoreTokensParams& p, const Item& item,
                                             bool* reused) {
    const int64_t list = item.list(p.reuse);
    const bool hit = may_reuse<T, kWarps>(p.reuse, item.row, list);
    if (threadIdx.x == 0) {
        *reused = hit;
        if (item.speaks_for_list(p.reuse)) p.reuse.hit[item.row * p.reuse.num_lists + list] = hit;
    }
    __syncthreads();
}

// --- kernels

// Columns whose logits are kept: what a decode step has. More of them, and making logits again
// costs less than moving them.
constexpr int kMaxKeptColumns = 16;

struct Shared {
    Item item;
    const uint8_t* records[kWarps];  // found here once: through a page table it takes registers
    Queries queries;
    // weigh
    bool reused;
    float peak[kWarps][kQueriesPerProduct], total[kWarps][kQueriesPerProduct];
    uint8_t dropped[kTileTokens];
    int any_dropped;
    // vote
    float lse[kQueriesPerProduct];
    float score[kTileTokens], set[kTileTokens];
};

// Two blocks of 128 registers where they fit without spills, for more loads under way.
template <typename T, SketchFormat kFormat, int kHeadDim32>
constexpr int kBlocksPerSm =
    kFormat != SketchFormat::kNone && kHeadDim32 == 4 && !std::is_same_v<T, float> ? 2 : 1;

// Weigh, or vote from logits made again (`voting`): one kernel, since the making of logits is most
// of either.
template <typename T, SketchFormat kFormat, int kHeadDim32>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T, kFormat, kHeadDim32>)
    logits_kernel(const ScoreTokensParams p, const Workspace w, const bool voting) {
    __shared__ Shared shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const Item& item = shared.item;
    if (threadIdx.x == 0) shared.item.find(p, w);
    __syncthreads();
    float* scores = p.scores + item.number * p.max_seqlen_k;
    const int64_t num_tiles = ceil_div(item.visible_end - item.range.start, int64_t{kTileTokens});
    if (voting && item.tile == 0) finish_item<T>(p, w, item, num_tiles, scores);
    if (!voting) clear_ranking(p, item);
    if (!voting && p.reuse.anchor_query) {
        if (item.begin >= item.visible_end && item.tile != 0) return;
        decide_reuse<T>(p, item, &shared.reused);
        if (item.begin >= item.visible_end || shared.reused) return;
    } else {
        if (item.begin >= item.visible_end || item.is_hit(p)) return;
    }
    const LanePlace at;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    for (int i = thread; i < kTileTokens; i += kThreads) {
        shared.dropped[i] = 0;
        shared.score[i] = shared.set[i] = 0.f;
    }
    if (thread == 0) shared.any_dropped = 0;
    if (thread < kWarps) shared.records[thread] = item.record(p, thread);
    const int64_t tile_at = item.number * w.num_tiles + item.tile;
    const bool has_dropped = voting && w.num_dropped[tile_at] > 0;

    // A token is dropped if any query's logit of it is not finite. That is known after all columns,
    // so where it happens the tile is weighed again.
#pragma unroll 1
    for (int attempt = 0; attempt < (voting ? 1 : 2); ++attempt) {
#pragma unroll 1
        for (int64_t product = 0; product < w.columns.num_products(); ++product) {
            load_queries(p, item, w.columns, product, shared.queries);
            if (voting) {
                if (warp < kQueriesPerProduct) {
                    const float lse = merged_lse(p, w, item, product, warp, num_tiles);
                    if (at.lane == 0) shared.lse[warp] = lse;
                }
                __syncthreads();
            }
            const bool usable = shared.queries.usable(at.quad);
            const float lse = voting ? shared.lse[at.quad] : 0.f;
            float* logits =
                w.logits ? w.logits +
                               item.padded_column(w, product, at.quad) * w.num_tiles * kTileTokens +
                               item.tile * kTileTokens
                         : nullptr;
            Softmax sum;
            const auto take = [&](int group, const Span& span, const float (&x)[kTokensPerLane]) {
                const int in_block = group * kTokensPerGroup + kTokensPerLane * at.group;
                const int first = warp * kBlockTokens + in_block;
                const bool counts = span.candidate || !p.normalise_candidates_only;
                if (voting) {
                    float own = 0.f;  // of token first + quad, over the product's queries
#pragma unroll
                    for (int i = 0; i < kTokensPerLane; ++i) {
                        float weight = 0.f;
                        if (lse == lse && has_dropped && !is_finite(x[i]))
                            weight = NAN;
                        else if (lse == lse && lse != -INFINITY && counts)
                            weight = ptx::exp2_approximate(x[i] - lse);
                        weight = reduce_add<4>(weight);
                        if (i == at.quad) own = weight;
                    }
                    if (span.holds(in_block + at.quad)) shared.set[first + at.quad] += own;
                    return;
                }
#pragma unroll
                for (int i = 0; i < kTokensPerLane; ++i) {
                    if (!span.holds(in_block + i)) continue;
                    float logit = x[i];
                    bool drop = shared.dropped[first + i] != 0;
                    if (usable && !is_finite(logit)) {
                        shared.dropped[first + i] = 1;  // whoever writes, writes 1
                        shared.any_dropped = 1;
                        drop = true;
                    }
                    if (!counts) logit = -INFINITY;
                    if (logits) logits[first + i] = drop ? NAN : logit;
                    if (usable && !drop) sum.add(logit);
                }
            };
            logits_of_block<T, kFormat, kHeadDim32>(p, item, item.begin + warp * kBlockTokens,
                                                    &shared.records[warp], shared.queries, take);
            if (voting) {
                if ((product + 1) % w.columns.products_per_set != 0) continue;
                __syncthreads();  // the set is complete
                for (int i = thread; i < kTileTokens; i += kThreads) {
                    const float together = shared.set[i], best = shared.score[i];
                    shared.score[i] =
                        best != best || together != together ? NAN : fmaxf(best, together);
                    shared.set[i] = 0.f;
                }
                continue;
            }
            // Over the eight groups of lanes, then over the warps, always in the same order.
#pragma unroll
            for (int bit = 4; bit < kWarpSize; bit *= 2) {
                const float peak = __shfl_xor_sync(kAllLanes, sum.peak, bit);
                const float total = __shfl_xor_sync(kAllLanes, sum.total, bit);
                sum.add(peak, total);
            }
            if (at.group == 0) {
                shared.peak[warp][at.quad] = sum.peak;
                shared.total[warp][at.quad] = sum.total;
            }
            __syncthreads();
            if (thread < kQueriesPerProduct) {
                Softmax tile;
                for (int i = 0; i < kWarps; ++i)
                    tile.add(shared.peak[i][thread], shared.total[i][thread]);
                const int64_t to = item.padded_column(w, product, thread) * w.num_tiles + item.tile;
                w.peak[to] = tile.peak;
                w.total[to] = shared.queries.usable(thread) ? tile.total : -1.f;
            }
        }
        __syncthreads();
        if (!shared.any_dropped) break;
    }
    if (voting) {
        const int64_t left = item.visible_end - item.begin;
        for (int i = thread; i < kTileTokens && i < left; i += kThreads)
            scores[item.begin + i] = shared.score[i];
    } else if (warp == 0) {
        int count = 0;
        for (int i = at.lane; i < kTileTokens; i += kWarpSize) count += shared.dropped[i];
        count = reduce_add(count);
        if (at.lane == 0) w.num_dropped[tile_at] = count;
    }
}

// Vote from kept logits.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    vote_kernel(const ScoreTokensParams p, const Workspace w) {
    __shared__ float lse_of[kMaxKeptColumns];
    __shared__ Item item;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    if (threadIdx.x == 0) item.find(p, w);
    __syncthreads();
    float* scores = p.scores + item.number * p.max_seqlen_k;
    const int64_t num_tiles = ceil_div(item.visible_end - item.range.start, int64_t{kTileTokens});
    if (item.tile == 0) finish_item<T>(p, w, item, num_tiles, scores);
    if (p.reuse.anchor_query && item.speaks_for_list(p.reuse))
        remember_step<T, kWarps>(p.reuse, item.row, item.list(p.reuse), item.is_hit(p));
    if (item.begin >= item.visible_end || item.is_hit(p)) return;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    const int64_t padded = w.columns.padded();
    for (int64_t c = warp; c < padded; c += kWarps) {
        const float lse = merged_lse(p, w, item, c / kQueriesPerProduct,
                                     static_cast<int>(c % kQueriesPerProduct), num_tiles);
        if (thread % kWarpSize == 0) lse_of[c] = lse;
    }
    __syncthreads();
    const int64_t stride = w.num_tiles * kTileTokens;
    const float* logits = w.logits + item.number * padded * stride + item.tile * kTileTokens;
    const int64_t set_columns = w.columns.products_per_set * kQueriesPerProduct;
    write_scores(p, item, num_tiles, scores, [&](int i) {
        float best = 0.f;
        bool dropped = false;
        for (int64_t first = 0; first < padded; first += set_columns) {
            float sum = 0.f;
            for (int64_t c = first; c < first + set_columns; ++c) {
                const float lse = lse_of[c];
                if (lse != lse) continue;  // no such query, or one that is not finite
                const float logit = logits[c * stride + i];
                dropped = dropped || logit != logit;
                if (lse != -INFINITY) sum += ptx::exp2_approximate(logit - lse);
            }
            best = fmaxf(best, sum);
        }
        return dropped ? NAN : best;
    });
}

// Where another kernel votes, which has no registers left for it: a block per row and list.
// Two blocks an SM: left alone, ptxas takes 32 registers and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) remember_kernel(const SelectionCacheStepParams p) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int64_t row = blockIdx.x, list = blockIdx.y;
    remember_step<T, kWarps>(p, row, list, p.hit[row * p.num_lists + list] != 0);
}

// --- launcher

struct Sizes {
    int64_t items, tiles, padded, logits;
    bool kept;
};
Sizes sizes_of(const ScoreTokensParams& p) {
    Sizes sizes{};
    sizes.items = p.blocks.batch * p.blocks.num_blocks * p.num_kv_heads;
    sizes.tiles = p.max_seqlen_k > 0 ? ceil_div(p.max_seqlen_k, kTileTokens) : 1;
    const Columns columns = columns_of(p);
    sizes.padded = columns.padded();
    sizes.kept = sizes.padded <= kMaxKeptColumns;
    sizes.logits = sizes.kept ? sizes.items * sizes.padded * sizes.tiles * kTileTokens : 0;
    return sizes;
}

template <typename T, SketchFormat kFormat, int kHeadDim32>
void launch_both(const ScoreTokensParams& p, const Workspace& w, const Sizes& sizes,
                 const CudaLaunch& where) {
    const int64_t grid = sizes.items * sizes.tiles;
    const auto kernel = logits_kernel<T, kFormat, kHeadDim32>;
    launch(where, kernel, grid, 1, kThreads, 0, p, w, false);
    if (sizes.kept) return launch(where, vote_kernel<T>, grid, 1, kThreads, 0, p, w);
    launch(where, kernel, grid, 1, kThreads, 0, p, w, true);
    if (p.reuse.anchor_query)
        launch(where, remember_kernel<T>, p.reuse.batch, p.reuse.num_lists, kThreads, 0, p.reuse);
}

// Operands in registers are padded with zeros: three lengths serve every head_dim.
template <typename T, SketchFormat kFormat>
void launch_for_head_dim(const ScoreTokensParams& p, const Workspace& w, const Sizes& sizes,
                         const CudaLaunch& where) {
    if (p.head_dim <= 64) return launch_both<T, kFormat, 2>(p, w, sizes, where);
    if (p.head_dim <= 128) return launch_both<T, kFormat, 4>(p, w, sizes, where);
    launch_both<T, kFormat, 8>(p, w, sizes, where);
}

}  // namespace

int64_t score_tokens_workspace_bytes(const ScoreTokensParams& p) {
    const Sizes sizes = sizes_of(p);
    return 4 * (sizes.logits + sizes.items * sizes.tiles * (2 * sizes.padded + 1));
}

void score_tokens(const ScoreTokensParams& p, void* workspace, const CudaLaunch& where) {
    const Sizes sizes = sizes_of(p);
    // The kernel that makes logits again has no registers left for it.
    KVS_CHECK(!p.ranking || sizes.kept, "ranking: got a tensor with ", sizes.padded,
              " columns of scores, allowed: none beyond ", kMaxKeptColumns);
    Workspace w{};
    w.columns = columns_of(p);
    w.num_tiles = sizes.tiles;
    float* memory = static_cast<float*>(workspace);
    if (sizes.kept) w.logits = memory;
    w.peak = memory + sizes.logits;
    w.total = w.peak + sizes.items * sizes.padded * sizes.tiles;
    w.num_dropped = reinterpret_cast<int32_t*>(w.total + sizes.items * sizes.padded * sizes.tiles);
    with_element_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        const SketchFormat format = p.sketch.data ? p.sketch.format : SketchFormat::kNone;
        switch (format) {
            case SketchFormat::kNone:
                return launch_for_head_dim<T, SketchFormat::kNone>(p, w, sizes, where);
            case SketchFormat::kInt4:
                return launch_for_head_dim<T, SketchFormat::kInt4>(p, w, sizes, where);
            case SketchFormat::kInt8:
                return launch_for_head_dim<T, SketchFormat::kInt8>(p, w, sizes, where);
        }
    });
}

}  // namespace kvselect::cuda
