// sparse_attention: softmax over the listed tokens only, exact keys and values, sums in float32.
//
// Problem  out = sum_i softmax_i(scale * q . k_i) v_i over a list of tokens per KV head, causal
// Floor    decode: 2 * head_dim * element size bytes per listed token and KV head: 11 MB for 2688
//          tokens and 8 heads of 128 in bf16, 2.6 us at 4.3 TB/s; a launch costs as much.
// Plan     16 rows (query x head of the group) are the rows of a product, 16 listed tokens its
//          columns, so that the results of q k^T are the operands of p v as they lie, and keys and
//          values go from memory into registers: no shared memory, no barrier, every warp for
//          itself. A lane loads whole 16-byte chunks: keys of its column's token, values of the
//          four tokens that its k's are (which channel is which column of p v is ours to choose).
//          Few rows (decode): four warps of a thread block take tiles of 16 tokens in turn; lists
//          are split over several blocks, whose results the last one to finish (by a ticket)
//          merges in their order. Many rows (prefill): each of the four has 16 rows of its own and
//          walks the whole list, so that three of them find keys and values in L1.
//          The number of splits depends on the list's capacity only, lengths are read on the
//          device, so the grid is fixed and no bit depends on the batch. Positions by rank: keys
//          are rotated on their way, from a table.
#include "kvselect/sparse_attention.h"

#include "cuda/device/fragments.cuh"
#include "cuda/device/soft_cap.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kRows = 16, kTileTokens = 16;

// What the warps of a thread block have in common.
enum class Common {
    kRows,   // 16 rows; each warp takes other tokens
    kTokens  // the list; each warp has 16 rows of its own
};
template <Common kCommon>
constexpr int kRowsOfBlock = kCommon == Common::kRows ? kRows : kWarps * kRows;

struct Workspace {
    int64_t num_splits, num_tiles;  // tiles: of a thread block's rows, per (row, KV head)
    float* out;                     // [batch, num_kv_heads, num_tiles, num_splits, 16, head_dim]
    float* peak;        // [batch, num_kv_heads, num_tiles, num_splits, 16] in units of ln 2
    float* total;       // the same: sum of 2^(logit - peak)
    uint32_t* tickets;  // [batch, num_kv_heads, num_tiles] zeroed
};

// What one thread block works on: some rows of a block of queries and their list.
struct Unit {
    int64_t number, row, kv_head, split;
    int64_t group;
    int64_t first_query,
        num_rows;  // rows: (query, head), query by query, from first_row of the block's on
    int64_t first_row, first_position;
    int64_t start, seqlen;
    int64_t first_listed;  // list entries below are no tokens
    const int32_t* list;   // or nullptr: every position from start on
    int64_t count;         // listed tokens of the block

    // By one thread; false: there is no such tile.
    __device__ bool find(const SparseAttentionParams& p, const Workspace& w, int tile_rows) {
        split = blockIdx.x % w.num_splits;
        number = blockIdx.x / w.num_splits;
        int64_t tile = number % w.num_tiles;
        kv_head = number / w.num_tiles % p.num_kv_heads;
        row = number / w.num_tiles / p.num_kv_heads;
        group = p.num_q_heads / p.num_kv_heads;
        for (int64_t block = 0; block < p.blocks.num_blocks; ++block) {
            first_query = p.blocks.offsets ? p.blocks.offsets[block] : 0;
            const int64_t end = p.blocks.offsets ? p.blocks.offsets[block + 1] : p.blocks.seqlen_q;
            num_rows = (end - first_query) * group;
            const int64_t tiles = ceil_div(num_rows, tile_rows);
            if (tile >= tiles) {
                tile -= tiles;
                continue;
            }
            const BlockRange range = block_range(p.blocks, row, block);
            first_row = tile * tile_rows;
            seqlen = p.blocks.cache_seqlens[row];
            first_position = seqlen - p.blocks.seqlen_q + first_query;  // may lie in padding
            start = range.start;
            first_listed = p.lists_skip_padding ? start : 0;
            list = nullptr;
            count = range.end - range.start;
            if (p.indices) {
                list = p.indices + row * p.indices_strides[0] + block * p.indices_strides[1] +
                       kv_head * p.indices_strides[2];
                count = p.topk_length[row * p.topk_length_strides[0] +
                                      block * p.topk_length_strides[1] +
                                      kv_head * p.topk_length_strides[2]];
            }
            return true;
        }
        return false;
    }
    __device__ int64_t position_of_row(int64_t r) const { return first_position + r / group; }
    // Listed tokens at or before `position`.
    __device__ int64_t listed_up_to(int64_t position) const {
        if (!list) {
            const int64_t n = position + 1 - start;
            return n < 0 ? 0 : (n < count ? n : count);
        }
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (list[middle] <= position)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
    // Of query and output, in rows of head_dim.
    __device__ int64_t query_of(int64_t r) const { return first_query + r / group; }
    __device__ int64_t head_of(int64_t r) const { return kv_head * group + r % group; }
    __device__ int64_t place_of(const SparseAttentionParams& p, int64_t r) const {
        return (row * p.blocks.seqlen_q + query_of(r)) * p.num_q_heads + head_of(r);
    }
};

// The queries of 16 rows as operands of every step of k, lane by lane.
template <typename T, int kHeadDim>
struct Queries {
    uint4 operand[2 * (kHeadDim / kElementsPerChunk<T> / 4)][kWarpSize];
};

template <typename T, int kHeadDim, Common kCommon>
struct Shared;

template <typename T, int kHeadDim>
struct Shared<T, kHeadDim, Common::kRows> {
    Unit unit;
    bool exists, is_last;
    int seen[kRows];  // listed tokens that a row sees
    float peak[kWarps][kRows], total[kWarps][kRows];
    float all_peak[kRows], all_total[kRows];
    union {
        Queries<T, kHeadDim> queries[1];
        float out[kRows][kHeadDim];
    };
};

template <typename T, int kHeadDim>
struct Shared<T, kHeadDim, Common::kTokens> {
    Unit unit;
    bool exists;
    int seen[kWarps * kRows];
    Queries<T, kHeadDim> queries[kWarps];
};

// Two elements of one register from two registers: elements `which` of both.
__device__ __forceinline__ uint32_t same_halves(uint32_t a, uint32_t b, int which) {
    return __byte_perm(a, b, which == 0 ? 0x5410u : 0x7632u);
}
__device__ __forceinline__ uint32_t word_of(const uint4& chunk, int i) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    return words[i];
}

// A chunk of a key, rotated to `place` where there is a rope table.
template <typename T>
__device__ __forceinline__ uint4 load_key(const SparseAttentionParams& p, const T* row, int d,
                                          int64_t place) {
    if (p.rope.cos == nullptr) return *reinterpret_cast<const uint4*>(row + d);
    return rotated_chunk(p.rope, row, d, place);
}

// The rows' queries as operands: step s of a chunk takes the chunk's elements 4 s' .. as keys have
// them.
template <typename T, int kHeadDim>
__device__ void load_queries(const SparseAttentionParams& p, const Unit& unit, int num_groups,
                             Queries<T, kHeadDim>* queries) {
    constexpr int kPerChunk = kElementsPerChunk<T>, kPerRegister = kPerChunk / 4;
    constexpr int kSteps = 2 * (kHeadDim / kPerChunk / 4);
    const int head_dim = static_cast<int>(p.head_dim);
    // An operand is rows group and group + 8, registers 2 * step and 2 * step + 1 of the chunk quad
    // + 4 j.
    for (int i = static_cast<int>(threadIdx.x); i < num_groups * kSteps * kWarpSize;
         i += kThreads) {
        const int lane = i % kWarpSize, step = i / kWarpSize % kSteps;
        const int rows = i / (kSteps * kWarpSize);  // which 16 of the thread block's
        const int d = (lane % 4 + step / 2 * 4) * kPerChunk + step % 2 * 2 * kPerRegister;
        uint32_t words[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t r = unit.first_row + rows * kRows + lane / 4 + half * 8;
            if (r >= unit.num_rows || d >= head_dim) continue;
            const T* from = static_cast<const T*>(p.q) + unit.row * p.q_strides[0] +
                            unit.query_of(r) * p.q_strides[1] + unit.head_of(r) * p.q_strides[2];
            int64_t place = 0;  // the rank of its own token, listed or not
            if (p.rope.cos) place = unit.listed_up_to(unit.position_of_row(r) - 1);
            T elements[2 * kPerRegister];
#pragma unroll
            for (int c = 0; c < 2 * kPerRegister; ++c) {
                elements[c] = from[d + c];
                if (p.rope.cos)
                    from_float(rotated(from, rope_pair(p.rope, d + c),
                                       p.rope.cos + place * p.rope.num_pairs,
                                       p.rope.sin + place * p.rope.num_pairs, d + c),
                               &elements[c]);
            }
            uint32_t registers[2];
            memcpy(registers, elements, sizeof registers);
            words[half] = registers[0];
            words[2 + half] = registers[1];
        }
        queries[rows].operand[step][lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// What a warp has added up: rows group and group + 8.
template <typename T, int kHeadDim>
struct Attention {
    static constexpr int kPerChunk = kElementsPerChunk<T>;
    static constexpr int kValueChunks = kHeadDim / kPerChunk / 8;  // of a lane
    float out[kValueChunks][kPerChunk][4] = {};  // channel i of chunk (column + 8 j)
    float peak[2] = {-INFINITY, -INFINITY};
    float total[2] = {};  // of this lane's columns
};

template <typename T, int kHeadDim>
__device__ __forceinline__ void attend_tile(const SparseAttentionParams& p, const Unit& unit,
                                            const Queries<T, kHeadDim>& queries, const int* seen_by,
                                            int64_t begin, int64_t end,
                                            Attention<T, kHeadDim>& sum) {
    constexpr int kPerChunk = kElementsPerChunk<T>;
    constexpr int kKeyChunks = kHeadDim / kPerChunk / 4;
    const LanePlace at;
    const int head_dim = static_cast<int>(p.head_dim);

    // Lanes 0-15 look up the tile's keys, lanes 16-31 its values.
    const int64_t index = begin + at.lane % kTileTokens;
    int64_t own = -1;
    if (index < end) {
        const int64_t position = unit.list ? int64_t{unit.list[index]} : unit.start + index;
        if (position >= unit.first_listed && position < unit.seqlen)  // else it is no token
            own = row_offset(at.lane < kTileTokens ? p.keys : p.values, unit.row, position,
                             unit.kv_head);
    }
    const unsigned listed = __ballot_sync(kAllLanes, own >= 0);
    const T* keys = static_cast<const T*>(p.keys.data);
    const T* values = static_cast<const T*>(p.values.data);

    // Logits: columns are tokens group and group + 8 as operands; results hold tokens 2 * quad, +
    // 1, + 8, + 9.
    float logits[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t offset = __shfl_sync(kAllLanes, own, at.group + 8 * half);
        uint4 key[kKeyChunks];
#pragma unroll
        for (int j = 0; j < kKeyChunks; ++j) {
            const int d = (at.quad + 4 * j) * kPerChunk;
            key[j] = make_uint4(0, 0, 0, 0);
            if (offset >= 0 && d < head_dim)
                key[j] = load_key(p, keys + offset, d, begin + at.group + 8 * half);
        }
#pragma unroll
        for (int j = 0; j < kKeyChunks; ++j)
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                const uint4 q = queries.operand[2 * j + step][at.lane];
                const uint32_t b[2] = {word_of(key[j], 2 * step), word_of(key[j], 2 * step + 1)};
                if constexpr (std::is_same_v<T, float>) {
                    const float wide_a[4] = {__uint_as_float(q.x), __uint_as_float(q.y),
                                             __uint_as_float(q.z), __uint_as_float(q.w)};
                    const float wide_b[2] = {__uint_as_float(b[0]), __uint_as_float(b[1])};
                    multiply_wide(logits[half], wide_a, wide_b);
                } else {
                    const uint32_t a[4] = {q.x, q.y, q.z, q.w};
                    multiply(logits[half], a, b, T{});
                }
            }
    }

    // Weights: 2^(logit - peak); tokens that a row does not see weigh nothing.
    const int seen[2] = {seen_by[at.group], seen_by[at.group + 8]};
    const auto sees = [&](int which, int token) {
        return begin + token < seen[which] && (listed >> token & 1u) != 0;
    };
    bool all_seen = listed == kAllLanes;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        all_seen = all_seen && begin + kTileTokens <= seen[which];
        float top = sum.peak[which];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& x = logits[i / 2][2 * which + i % 2];
            const int token = i / 2 * 8 + 2 * at.quad + i % 2;
            x = sees(which, token) ? soft_capped(x * (p.softmax_scale * kLog2E), p.softcap)
                                   : -INFINITY;
            top = fmaxf(top, x);
        }
        top = reduce_max<4>(top);
        const float base = top == -INFINITY ? 0.f : top;
        const float old = ptx::exp2_approximate(sum.peak[which] - base);
        sum.peak[which] = top;
        sum.total[which] *= old;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& x = logits[i / 2][2 * which + i % 2];
            x = ptx::exp2_approximate(x - base);
            sum.total[which] += x;
        }
#pragma unroll
        for (int j = 0; j < sum.kValueChunks; ++j)
#pragma unroll
            for (int i = 0; i < kPerChunk; ++i) {
                sum.out[j][i][2 * which] *= old;
                sum.out[j][i][2 * which + 1] *= old;
            }
    }

    // Values of the tokens 2 * quad, + 1, + 8, + 9; columns are chunks group + 8 j.
    int64_t offset[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        offset[i] = __shfl_sync(kAllLanes, own, kTileTokens + i / 2 * 8 + 2 * at.quad + i % 2);
#pragma unroll
    for (int j = 0; j < sum.kValueChunks; ++j) {
        const int d = (at.group + 8 * j) * kPerChunk;
        uint4 value[4];
        bool finite = true;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            value[i] = make_uint4(0, 0, 0, 0);
            if (offset[i] >= 0 && d < head_dim)
                value[i] = *reinterpret_cast<const uint4*>(values + offset[i] + d);
            finite = finite && !any_nonfinite<T>(value[i]);
        }
        // 0 * NaN is NaN: a value that is not finite may only meet the rows that see it.
        if (!__all_sync(kAllLanes, finite || all_seen)) {
#pragma unroll 1
            for (int token = 0; token < kTileTokens; ++token) {
                const int64_t from = __shfl_sync(kAllLanes, own, kTileTokens + token);
                float weight[2];
#pragma unroll
                for (int which = 0; which < 2; ++which) {
                    const float x = token < 8 ? logits[0][2 * which + 0] : logits[1][2 * which + 0];
                    const float y = token < 8 ? logits[0][2 * which + 1] : logits[1][2 * which + 1];
                    weight[which] = __shfl_sync(kAllLanes, token % 2 == 0 ? x : y,
                                                4 * at.group + token % 8 / 2);
                }
#pragma unroll
                for (int i = 0; i < kPerChunk; ++i)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int channel = (2 * at.quad + c + 8 * j) * kPerChunk + i;
                        if (from < 0 || channel >= head_dim) continue;
                        const float x = to_float(values[from + channel]);
#pragma unroll
                        for (int which = 0; which < 2; ++which)
                            if (sees(which, token))
                                sum.out[j][i][2 * which + c] =
                                    fmaf(weight[which], x, sum.out[j][i][2 * which + c]);
                    }
            }
            continue;
        }
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float a[4] = {logits[half][0], logits[half][2], logits[half][1],
                                    logits[half][3]};
#pragma unroll
                for (int i = 0; i < kPerChunk; ++i) {
                    const float b[2] = {__uint_as_float(word_of(value[2 * half], i)),
                                        __uint_as_float(word_of(value[2 * half + 1], i))};
                    multiply_wide(sum.out[j][i], a, b);
                }
            }
        } else {
            const uint32_t a[4] = {
                packed(logits[0][0], logits[0][1], T{}), packed(logits[0][2], logits[0][3], T{}),
                packed(logits[1][0], logits[1][1], T{}), packed(logits[1][2], logits[1][3], T{})};
#pragma unroll
            for (int i = 0; i < kPerChunk; ++i) {
                const uint32_t b[2] = {
                    same_halves(word_of(value[0], i / 2), word_of(value[1], i / 2), i % 2),
                    same_halves(word_of(value[2], i / 2), word_of(value[3], i / 2), i % 2)};
                multiply(sum.out[j][i], a, b, T{});
            }
        }
    }
}

// Rows' results, not normalised, in shared.out; peaks and totals in shared.all_peak and all_total.
// The warps in their order.
template <typename T, int kHeadDim>
__device__ void merge_warps(Attention<T, kHeadDim>& sum,
                            Shared<T, kHeadDim, Common::kRows>& shared) {
    const LanePlace at;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    constexpr int kPerChunk = kElementsPerChunk<T>;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const float total = reduce_add<4>(sum.total[which]);
        if (at.quad == 0) {
            shared.peak[warp][at.group + 8 * which] = sum.peak[which];
            shared.total[warp][at.group + 8 * which] = total;
        }
    }
    __syncthreads();
    if (thread < kRows) {
        float peak = -INFINITY, total = 0.f;
        for (int i = 0; i < kWarps; ++i) peak = fmaxf(peak, shared.peak[i][thread]);
        for (int i = 0; i < kWarps; ++i)
            if (shared.total[i][thread] != 0.f)
                total +=
                    shared.total[i][thread] * ptx::exp2_approximate(shared.peak[i][thread] - peak);
        shared.all_peak[thread] = peak;
        shared.all_total[thread] = total;
    }
    __syncthreads();  // and nobody reads the queries, which lie where `out` does
    for (int turn = 0; turn < kWarps; ++turn) {
        if (warp == turn) {
#pragma unroll
            for (int which = 0; which < 2; ++which) {
                const int r = at.group + 8 * which;
                // A warp that saw nothing of the row adds nothing, whatever 0 * x would be. Logits
                // that are NaN leave no peak, but a total.
                const bool empty = shared.total[warp][r] == 0.f;
                const float factor =
                    empty ? 0.f : ptx::exp2_approximate(sum.peak[which] - shared.all_peak[r]);
#pragma unroll
                for (int j = 0; j < sum.kValueChunks; ++j)
#pragma unroll
                    for (int i = 0; i < kPerChunk; ++i)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const int channel = (2 * at.quad + c + 8 * j) * kPerChunk + i;
                            const float x = empty ? 0.f : sum.out[j][i][2 * which + c] * factor;
                            if (channel < kHeadDim)
                                shared.out[r][channel] = turn == 0 ? x : shared.out[r][channel] + x;
                        }
            }
        }
        __syncthreads();
    }
}

// The thread block's rows: which tile, what each sees, their queries; how many there are.
template <typename T, int kHeadDim, Common kCommon>
__device__ int prepare(const SparseAttentionParams& p, const Workspace& w,
                       Shared<T, kHeadDim, kCommon>& shared) {
    constexpr int kBlockRows = kRowsOfBlock<kCommon>;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) shared.exists = shared.unit.find(p, w, kBlockRows);
    __syncthreads();
    if (!shared.exists) return 0;
    const Unit& unit = shared.unit;
    const int64_t left = unit.num_rows - unit.first_row;
    const int rows = left < kBlockRows ? static_cast<int>(left) : kBlockRows;
    if (thread < kBlockRows)
        shared.seen[thread] =
            thread < rows
                ? static_cast<int>(unit.listed_up_to(unit.position_of_row(unit.first_row + thread)))
                : 0;
    load_queries<T, kHeadDim>(p, unit, kBlockRows / kRows, shared.queries);
    __syncthreads();
    return rows;
}

// What row `r`'s sums are multiplied by, with its head's sink in the denominator; writes its lse.
__device__ __forceinline__ float finish_row(const SparseAttentionParams& p, const Unit& unit,
                                            int64_t r, float peak, float total) {
    const bool empty = total == 0.f;
    float lse = empty ? -INFINITY : peak + log2f(total), weight = empty ? 0.f : 1.f / total;
    if (p.sink_logits && !empty) {
        const float all = with_sink(lse, p.sink_logits[unit.head_of(r)]);
        weight *= ptx::exp2_approximate(lse - all);
        lse = all;
    }
    p.lse[unit.place_of(p, r)] = lse * kLn2;
    return weight;
}

// Few rows: the warps share them.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attend_few_kernel(const SparseAttentionParams p, const Workspace w) {
    __shared__ Shared<T, kHeadDim, Common::kRows> shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    const int rows = prepare(p, w, shared);
    if (rows == 0) return;
    const Unit& unit = shared.unit;
    const int head_dim = static_cast<int>(p.head_dim);

    // Rows are in the order of their positions: the last one sees the most. Splits are whole rounds
    // of tiles.
    const int64_t count = shared.seen[rows - 1];
    constexpr int64_t kRound = kWarps * kTileTokens;
    const int64_t per_split = ceil_div(ceil_div(count, w.num_splits), kRound) * kRound;
    const int64_t begin = unit.split * per_split;
    const int64_t stop = begin + per_split, end = stop < count ? stop : count;
    Attention<T, kHeadDim> sum;
    for (int64_t tile = begin + warp * kTileTokens; tile < end; tile += kRound)
        attend_tile<T, kHeadDim>(p, unit, shared.queries[0], shared.seen, tile, end, sum);
    merge_warps(sum, shared);

    if (w.num_splits > 1) {
        const int64_t first = unit.number * w.num_splits, mine = (first + unit.split) * kRows;
        for (int i = thread; i < rows * head_dim; i += kThreads)
            w.out[mine * head_dim + i] = shared.out[i / head_dim][i % head_dim];
        if (thread < rows) {
            w.peak[mine + thread] = shared.all_peak[thread];
            w.total[mine + thread] = shared.all_total[thread];
        }
        __threadfence();
        __syncthreads();
        if (thread == 0)
            shared.is_last =
                atomicAdd(&w.tickets[unit.number], 1u) + 1 == static_cast<uint32_t>(w.num_splits);
        __syncthreads();
        if (!shared.is_last) return;
        __threadfence();
        if (thread < rows) {
            float peak = -INFINITY, total = 0.f;
            for (int64_t s = 0; s < w.num_splits; ++s)
                peak = fmaxf(peak, __ldcg(&w.peak[(first + s) * kRows + thread]));
            for (int64_t s = 0; s < w.num_splits; ++s) {
                const float its = __ldcg(&w.total[(first + s) * kRows + thread]);
                if (its != 0.f)
                    total += its * ptx::exp2_approximate(
                                       __ldcg(&w.peak[(first + s) * kRows + thread]) - peak);
            }
            shared.all_peak[thread] = peak;
            shared.all_total[thread] = total;
        }
        __syncthreads();
        for (int i = thread; i < rows * head_dim; i += kThreads) {
            const int r = i / head_dim;
            float x = 0.f;
            for (int64_t s = 0; s < w.num_splits; ++s) {
                if (__ldcg(&w.total[(first + s) * kRows + r]) == 0.f) continue;
                const float its = __ldcg(&w.peak[(first + s) * kRows + r]);
                x = fmaf(__ldcg(&w.out[(first + s) * kRows * head_dim + i]),
                         ptx::exp2_approximate(its - shared.all_peak[r]), x);
            }
            shared.out[r][i % head_dim] = x;
        }
        __syncthreads();
    }

    if (thread < rows)
        shared.all_total[thread] = finish_row(p, unit, unit.first_row + thread,
                                              shared.all_peak[thread], shared.all_total[thread]);
    __syncthreads();
    for (int i = thread; i < rows * head_dim; i += kThreads) {
        const int64_t to = unit.place_of(p, unit.first_row + i / head_dim);
        const float weight = shared.all_total[i / head_dim];
        from_float(weight == 0.f ? 0.f : shared.out[i / head_dim][i % head_dim] * weight,
                   static_cast<T*>(p.out) + to * head_dim + i % head_dim);
    }
}

// Many rows: the warps share the list.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2)  // else sm_80 gets 128 registers, and spills
    attend_many_kernel(const SparseAttentionParams p, const Workspace w) {
    __shared__ Shared<T, kHeadDim, Common::kTokens> shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const LanePlace at;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int rows = prepare(p, w, shared) - warp * kRows;  // from this warp's first on
    if (rows <= 0) return;                                  // whole warps, and no barrier follows
    const Unit& unit = shared.unit;
    const int* seen = shared.seen + warp * kRows;

    const int64_t count = seen[rows < kRows ? rows - 1 : kRows - 1];
    Attention<T, kHeadDim> sum;
    for (int64_t tile = 0; tile < count; tile += kTileTokens)
        attend_tile<T, kHeadDim>(p, unit, shared.queries[warp], seen, tile, count, sum);

    constexpr int kPerChunk = kElementsPerChunk<T>;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
        const float total = reduce_add<4>(sum.total[which]);
        const int own = at.group + 8 * which;
        if (own >= rows) continue;
        const int64_t r = unit.first_row + warp * kRows + own;
        const float weight = finish_row(p, unit, r, sum.peak[which], total);
        T* to = static_cast<T*>(p.out) + unit.place_of(p, r) * p.head_dim;
#pragma unroll
        for (int j = 0; j < sum.kValueChunks; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int channel = (2 * at.quad + c + 8 * j) * kPerChunk;
                if (channel >= p.head_dim) continue;
                T elements[kPerChunk];
#pragma unroll
                for (int i = 0; i < kPerChunk; ++i)
                    from_float(weight == 0.f ? 0.f : sum.out[j][i][2 * which + c] * weight,
                               &elements[i]);
                memcpy(to + channel, elements, sizeof elements);
            }
    }
}

// --- launcher

struct Sizes {
    Common common;
    int64_t splits, tiles, units;
};
Sizes sizes_of(const SparseAttentionParams& p, int64_t longest_list) {
    Sizes sizes{};
    const int64_t rows = p.blocks.seqlen_q * (p.num_q_heads / p.num_kv_heads);
    // Operands of float32 take twice the room, and three times the products: rows stay few.
    const bool many =
        rows > p.blocks.num_blocks * kRowsOfBlock<Common::kTokens> && p.dtype != DType::kFloat32;
    sizes.common = many ? Common::kTokens : Common::kRows;
    // Blocks of queries may end in a tile of fewer rows each.
    const int64_t tile_rows = many ? kRowsOfBlock<Common::kTokens> : kRowsOfBlock<Common::kRows>;
    sizes.tiles = rows == 0 ? 0 : ceil_div(rows, tile_rows) + p.blocks.num_blocks - 1;
    sizes.units = p.blocks.batch * p.num_kv_heads * sizes.tiles;
    // A decode query's list is cut so that 8 heads fill a GPU; many rows fill it by themselves.
    const int64_t most = longest_list > 8192 ? 32 : 16;
    const int64_t wanted = ceil_div(longest_list, 2 * kWarps * kTileTokens);
    const bool fills = rows > kRowsOfBlock<Common::kTokens>;  // where `many`, always
    sizes.splits = fills || wanted < 2 ? 1 : (wanted < most ? wanted : most);
    return sizes;
}

template <typename T, int kHeadDim>
void attend(const SparseAttentionParams& p, const Workspace& w, Common common, int64_t grid,
            const CudaLaunch& where) {
    if constexpr (!std::is_same_v<T, float>)
        if (common == Common::kTokens)
            return launch(where, attend_many_kernel<T, kHeadDim>, grid, 1, kThreads, 0, p, w);
    launch(where, attend_few_kernel<T, kHeadDim>, grid, 1, kThreads, 0, p, w);
}

}  // namespace

int64_t sparse_attention_workspace_bytes(const SparseAttentionParams& p, int64_t longest_list) {
    const Sizes sizes = sizes_of(p, longest_list);
    if (sizes.splits == 1) return 0;
    return 4 * sizes.units * (1 + sizes.splits * kRows * (p.head_dim + 2));
}

void sparse_attention(const SparseAttentionParams& p, int64_t longest_list, void* workspace,
                      const CudaLaunch& where) {
    const Sizes sizes = sizes_of(p, longest_list);
    if (sizes.units == 0) return;
    Workspace w{};
    w.num_splits = sizes.splits;
    w.num_tiles = sizes.tiles;
    CudaLaunch own = where;
    if (sizes.splits > 1) {
        w.tickets = static_cast<uint32_t*>(workspace);
        w.out = reinterpret_cast<float*>(w.tickets + sizes.units);
        w.peak = w.out + sizes.units * sizes.splits * kRows * p.head_dim;
        w.total = w.peak + sizes.units * sizes.splits * kRows;
        KVS_CUDA_CHECK(
            cudaMemsetAsync(w.tickets, 0, static_cast<size_t>(4 * sizes.units), where.stream));
        own.overlap = false;  // a memory operation is no kernel to overlap with
    }
    const int64_t grid = sizes.units * sizes.splits;
    with_element_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (p.head_dim <= 64)
            attend<T, 64>(p, w, sizes.common, grid, own);
        else if (p.head_dim <= 128)
            attend<T, 128>(p, w, sizes.common, grid, own);
        else
            attend<T, 256>(p, w, sizes.common, grid, own);
    });
}

}  // namespace kvselect::cuda
