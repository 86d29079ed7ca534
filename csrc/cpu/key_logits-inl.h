// Dot products of a few query columns with cached keys: the exact-key half of score_tokens,
// sparse_attention (decode) and recovered_mass. Keys come as row pointers, so that contiguous runs,
// pages and gathered lists share one loop.

constexpr int64_t kTileTokens = 64;
constexpr int64_t kMaxHeadDim = 512;

template <typename T>
inline const T* key_row(const KVView& view, int64_t row, int64_t position, int64_t kv_head) {
    return static_cast<const T*>(view.data) + view.offset(row, position, kv_head);
}

// Pointers of positions [begin, begin + count): one page look-up per run of tokens, not per token.
template <typename T>
inline void row_pointers(const KVView& view, int64_t row, int64_t begin, int64_t count,
                         int64_t kv_head, const T** out) {
    int64_t done = 0;
    while (done < count) {
        const int64_t position = begin + done;
        const int64_t left = view.page_block_size - position % view.page_block_size;
        const int64_t run = left < count - done ? left : count - done;
        const T* first = key_row<T>(view, row, position, kv_head);
        for (int64_t i = 0; i < run; ++i) out[done + i] = first + i * view.token_stride;
        done += run;
    }
}

// x of one row rotated to `position`, as float32. The table's angles: (a, b) -> (a cos - b sin, b
// cos + a sin).
template <typename T>
inline void rotate_row(const T* x, const RopeView& rope, int64_t position, int64_t head_dim,
                       float* out) {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(x + d));
    const float* cos = rope.cos + position * rope.num_pairs;
    const float* sin = rope.sin + position * rope.num_pairs;
    float* span = out + rope.start;
    const int64_t step = rope.interleaved ? 2 : 1, other = rope.interleaved ? 1 : rope.num_pairs;
    int64_t i = 0;
    if (!rope.interleaved) {
        for (; i + kLanes <= rope.num_pairs; i += kLanes) {
            const F32 a = load(span + i), b = load(span + other + i), c = load(cos + i),
                      s = load(sin + i);
            store(span + i, sub(mul(a, c), mul(b, s)));
            store(span + other + i, add(mul(b, c), mul(a, s)));
        }
    }
    for (; i < rope.num_pairs; ++i) {
        const float a = span[i * step], b = span[i * step + other];
        span[i * step] = a * cos[i] - b * sin[i];
        span[i * step + other] = b * cos[i] + a * sin[i];
    }
}

// Rows that will be needed soon. Their cache lines are asked for a few at a time, spread over the
// loop that uses the rows before them: a burst of prefetches overruns the fill buffers, and the
// hardware does not follow gathered rows. Measured on the sketch scan at 128K tokens, one
// thread: 9.7 ms without, 4.6 ms with.
struct Upcoming {
    const char* const* rows = nullptr;
    int64_t count = 0;
    int64_t bytes = 0;       // per row
    bool scattered = false;  // rows far apart: into L2, where more fetches fit at once

    // Inlined by force: GCC takes a function that only prefetches for one without effect, and drops
    // its calls.
    [[gnu::always_inline]] void fetch(int64_t index) const {
        if (index >= count) return;
        if (scattered) {
            for (int64_t at = 0; at < bytes; at += 64) prefetch_to_l2(rows[index] + at);
        } else {
            for (int64_t at = 0; at < bytes; at += 64) prefetch(rows[index] + at);
        }
    }
};

template <typename T>
inline const char* const* as_bytes(const T* const* rows) {
    return reinterpret_cast<const char* const*>(rows);
}

// out[c * stride + i] = scale * the sum of acc[c][i], for the first `count` of four tokens.
template <int kCols>
inline void store_sums(const F32 (&acc)[kCols][4], float scale, int64_t count, float* out,
                       int64_t stride) {
    if constexpr (kCols == 4) {
        if (count >= 4) return reduce_add_4x4(acc, scale, out, stride);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
        float sums[4];
        reduce_add4(acc[c][0], acc[c][1], acc[c][2], acc[c][3], sums);
        for (int i = 0; i < 4 && i < count; ++i) out[c * stride + i] = scale * sums[i];
    }
}

// out[c * stride + t] = scale * q[c] . rows[t] for kCols columns; columns lie `q_stride` floats
// apart.
template <int kCols, typename T>
inline void dot_columns(const T* const* rows, int64_t count, const float* q, int64_t q_stride,
                        int64_t head_dim, float scale, const Upcoming& upcoming, float* out,
                        int64_t stride) {
    constexpr int kTokens = 4;
    for (int64_t t = 0; t < count; t += kTokens) {
        const T* k[kTokens];
#pragma GCC unroll 4
        for (int i = 0; i < kTokens; ++i) {
            k[i] = rows[t + i < count ? t + i : count - 1];
            upcoming.fetch(t + i);
        }
        F32 acc[kCols][kTokens];
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
            for (int i = 0; i < kTokens; ++i) acc[c][i] = broadcast(0.f);
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            F32 key[kTokens];
#pragma GCC unroll 4
            for (int i = 0; i < kTokens; ++i) key[i] = load(k[i] + d);
#pragma GCC unroll 4
            for (int c = 0; c < kCols; ++c) {
                const F32 query = load(q + c * q_stride + d);
#pragma GCC unroll 4
                for (int i = 0; i < kTokens; ++i) acc[c][i] = fma(key[i], query, acc[c][i]);
            }
        }
        store_sums<kCols>(acc, scale, count - t, out + t, stride);
    }
}

// All columns, four at a time (any count).
template <typename T>
inline void dot_rows(const T* const* rows, int64_t count, const float* q, int64_t q_stride,
                     int64_t num_columns, int64_t head_dim, float scale, const Upcoming& upcoming,
                     float* out, int64_t stride) {
    Upcoming rest = upcoming;  // the first pass over the rows fetches, later ones do not
    const auto columns = [&](auto width, int64_t c) {
        dot_columns<width()>(rows, count, q + c * q_stride, q_stride, head_dim, scale, rest,
                             out + c * stride, stride);
        rest.count = 0;
    };
    int64_t c = 0;
    for (; c + 4 <= num_columns; c += 4) columns(std::integral_constant<int, 4>{}, c);
    for (; c + 2 <= num_columns; c += 2) columns(std::integral_constant<int, 2>{}, c);
    if (c < num_columns) columns(std::integral_constant<int, 1>{}, c);
}

// Calls fn(rows, tokens, position, upcoming) for every tile of positions [begin, end), in order;
// its fetches run half a tile ahead, so that rows in use and on their way leave room in the
// first-level cache for what is computed. The caller goes on after `end` and up to `horizon`.
template <typename T, typename Fn>
inline void for_each_key_tile(const KVView& keys, int64_t row, int64_t kv_head, int64_t begin,
                              int64_t end, int64_t horizon, int64_t head_dim, Fn fn) {
    constexpr int64_t kAhead = kTileTokens / 2;
    const T* rows[kTileTokens + kAhead];
    for (int64_t position = begin; position < end; position += kTileTokens) {
        const int64_t left = horizon - position, room = kTileTokens + kAhead;
        const int64_t known = left < room ? left : room;
        row_pointers(keys, row, position, known, kv_head, rows);
        const int64_t tokens = end - position < kTileTokens ? end - position : kTileTokens;
        const Upcoming upcoming{as_bytes(rows + kAhead), known > kAhead ? known - kAhead : 0,
                                head_dim * int64_t{sizeof(T)}};
        const T* const* tile = rows;
        fn(tile, tokens, position, upcoming);
    }
}

// Scaled logits of positions [begin, end) of one (row, kv_head) with exact keys: out[c * stride +
// position - begin]. With a rope table the key of `position` is first rotated to `position +
// shift`.
template <typename T>
inline void key_logits(const KVView& keys, int64_t row, int64_t kv_head, int64_t begin, int64_t end,
                       int64_t horizon, const float* q, int64_t q_stride, int64_t num_columns,
                       int64_t head_dim, float scale, const RopeView* rope, int64_t shift,
                       float* out, int64_t stride) {
    for_each_key_tile<T>(
        keys, row, kv_head, begin, end, horizon, head_dim,
        [&](const T* const* rows, int64_t tokens, int64_t position, const Upcoming& upcoming) {
            float* tile_out = out + (position - begin);
            if (rope == nullptr) {
                dot_rows(rows, tokens, q, q_stride, num_columns, head_dim, scale, upcoming,
                         tile_out, stride);
                return;
            }
            for (int64_t t = 0; t < tokens; t += 4) {  // four rotated rows at a time stay in L1
                float rotated[4][kMaxHeadDim];
                const float* rotated_rows[4];
                const int64_t some = tokens - t < 4 ? tokens - t : 4;
                for (int64_t i = 0; i < some; ++i) {
                    rotate_row(rows[t + i], *rope, position + t + i + shift, head_dim, rotated[i]);
                    rotated_rows[i] = rotated[i];
                }
                dot_rows(rotated_rows, some, q, q_stride, num_columns, head_dim, scale, Upcoming{},
                         tile_out + t, stride);
            }
        });
}

// Whether every element is finite: x * 0 is NaN for NaN and inf, and NaN survives the sum.
inline bool all_finite(const float* x, int64_t count) {
    const int64_t whole = count / kLanes * kLanes;
    F32 sum = broadcast(0.f);
    for (int64_t i = 0; i < whole; i += kLanes) sum = fma(load(x + i), broadcast(0.f), sum);
    float tail = reduce_add(sum);
    for (int64_t i = whole; i < count; ++i) tail += x[i] * 0.f;
    return tail == 0.f;
}

// weights[i] = 2^(logits[i] - max), logits in units of ln 2; returns max and the sum.
// NaN entries are ignored by the maximum but not by the sum: a defect makes the result NaN, never a
// wrong number. `lowest` receives the smallest logit. May be in place.
inline float exp2_of(const float* logits, int64_t count, float* weights, float* sum,
                     float* lowest = nullptr) {
    const int64_t whole = count / kLanes * kLanes;
    F32 top = broadcast(-INFINITY), bottom = broadcast(INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) {
        top = max(load(logits + i), top);
        bottom = min(load(logits + i), bottom);
    }
    float peak = reduce_max(top), least = -reduce_max(sub(broadcast(0.f), bottom));
    for (int64_t i = whole; i < count; ++i) {
        peak = logits[i] > peak ? logits[i] : peak;
        least = logits[i] < least ? logits[i] : least;
    }
    if (lowest) *lowest = least;
    if (peak == -INFINITY) {  // nothing visible: weights 0, not exp(-inf - -inf)
        bool defect = false;  // every logit is -inf or NaN: what is not a number must show
        for (int64_t i = 0; i < count; ++i) {
            defect = defect || logits[i] != -INFINITY;
            weights[i] = logits[i] == -INFINITY ? 0.f : NAN;
        }
        *sum = defect ? NAN : 0.f;
        return defect ? 0.f : peak;
    }
    F32 total = broadcast(0.f);
    for (int64_t i = 0; i < whole; i += kLanes) {
        const F32 weight = exp2(sub(load(logits + i), broadcast(peak)));
        store(weights + i, weight);
        total = add(total, weight);
    }
    float tail = reduce_add(total);
    for (int64_t i = whole; i < count; ++i) {
        const float weight = exp2(logits[i] - peak);
        weights[i] = weight;
        tail += weight;
    }
    *sum = tail;
    return peak;
}
inline float exp2_in_place(float* logits, int64_t count, float* sum) {
    return exp2_of(logits, count, logits, sum);
}
