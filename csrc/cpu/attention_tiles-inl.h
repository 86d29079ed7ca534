// Attention of many bfloat16 queries by a unit that multiplies tiles: tile_* come from the
// including file.
//
// Unit    float32 C [16 rows, 16] += bfloat16 A [16 rows, 32] . B [32, 16], 16 cycles (published,
//         Intel's optimisation manual): 512 multiply-adds a cycle where two FMA ports make 32. B
//         comes in pairs: row k of it holds channels 2 k and 2 k + 1 of every column.
// Floor   2 * head_dim multiply-adds per row and token on the unit, and a 2^x, which costs as much:
//         32 rows x 256 tokens at head_dim 128 take 4096 cycles on the unit, 512 registers of
//         logits some ten instructions each.
// Plan    256 tokens at a time are laid out once for all rows: keys transposed by pairs of
//         channels, values by pairs of tokens. A panel of 32 rows then takes three steps in the
//         first-level cache: logits, softmax (float32), weighted values, whose sums stay in float32
//         between the passes. Weights are rounded to bfloat16 (by at most 2^-8 of each), as fused
//         attention kernels do; their sum is that of the weights before.

struct AttentionTiles {
    int64_t rows, padded_rows, head_dim, channels;
    BFloat16* q;        // [padded_rows, channels], zeros outside
    float* acc;         // [padded_rows, head_dim] sums of weight * value
    float* peak;        // [padded_rows] maximum logit, in units of ln 2
    float* total;       // [padded_rows] sums of weights
    BFloat16* keys;     // [kTiledTokens / 16, channels / 32] B tiles
    BFloat16* values;   // [kTiledTokens / 32, head_dim / 16] B tiles
    float* logits;      // [kTiledRows, kTiledTokens]
    BFloat16* weights;  // [kTiledRows, kTiledTokens]

    AttentionTiles(int64_t num_rows, int64_t dim, float* memory)
        : rows(num_rows),
          padded_rows(attention_tiles_padded_rows(num_rows)),
          head_dim(dim),
          channels(attention_tiles_padded_dim(dim)) {
        const auto address = reinterpret_cast<uintptr_t>(memory);
        float* next = memory + (64 - address % 64) % 64 / sizeof(float);
        const auto take = [&](int64_t floats) {
            float* const begin = next;
            next += floats;
            return begin;
        };
        q = reinterpret_cast<BFloat16*>(take(padded_rows * channels / 2));
        keys = reinterpret_cast<BFloat16*>(take(kTiledTokens * channels / 2));
        values = reinterpret_cast<BFloat16*>(take(kTiledTokens * head_dim / 2));
        logits = take(kTiledRows * kTiledTokens);
        weights = reinterpret_cast<BFloat16*>(take(kTiledRows * kTiledTokens / 2));
        acc = take(padded_rows * head_dim);
        peak = take(padded_rows);
        total = take(padded_rows);
    }

    // Row r's query is at query_of(r).
    template <typename QueryOf>
    void begin(const QueryOf& query_of) const {
        for (int64_t r = 0; r < padded_rows; ++r) {
            BFloat16* to = q + r * channels;
            const int64_t known = r < rows ? head_dim : 0;
            if (known) std::memcpy(to, query_of(r), static_cast<size_t>(2 * head_dim));
            std::memset(to + known, 0, static_cast<size_t>(2 * (channels - known)));
            peak[r] = -INFINITY;
            total[r] = 0.f;
        }
        std::memset(acc, 0, static_cast<size_t>(padded_rows * head_dim) * sizeof(float));
    }
};

constexpr int64_t kPairTileElements = 16 * 32;  // of a B tile of bfloat16 pairs

// Lays keys and values of `tokens` rows out; zeros up to a multiple of 32 tokens.
inline void pack_tiles(const AttentionTiles& t, const BFloat16* const* key_rows,
                       const BFloat16* const* value_rows, int64_t tokens) {
    alignas(64) static const BFloat16 zeros[kMaxHeadDim] = {};
    const int64_t padded = (tokens + 31) / 32 * 32, key_tiles = t.channels / 32;
    for (int64_t first = 0; first < padded; first += 16) {
        const BFloat16* rows[16];
        for (int64_t i = 0; i < 16; ++i) rows[i] = first + i < tokens ? key_rows[first + i] : zeros;
        for (int64_t c = 0; c < key_tiles; ++c) {
            BFloat16* const to = t.keys + (first / 16 * key_tiles + c) * kPairTileElements;
            transpose_pairs(rows, c * 32, t.head_dim - c * 32, to);
        }
    }
    const int64_t value_tiles = t.head_dim / 16;
    for (int64_t first = 0; first < padded; first += 2) {
        const BFloat16* even = first < tokens ? value_rows[first] : zeros;
        const BFloat16* odd = first + 1 < tokens ? value_rows[first + 1] : zeros;
        BFloat16* const to =
            t.values + first / 32 * value_tiles * kPairTileElements + first % 32 / 2 * 32;
        for (int64_t n = 0; n < value_tiles; ++n)
            interleave(even + n * 16, odd + n * 16, to + n * kPairTileElements);
    }
}

inline bool values_are_finite(const AttentionTiles& t, int64_t tokens) {
    const int64_t count = (tokens + 31) / 32 * 32 * t.head_dim;
    Raw magnitudes = zero_raw();
    for (int64_t i = 0; i < count; i += kRawBytes / 2)
        magnitudes = larger_magnitude<BFloat16>(magnitudes, load_raw(t.values + i));
    return !any_nonfinite<BFloat16>(magnitudes);
}

// Logits of 32 rows and `tokens` (a multiple of 32), not scaled.
inline void tiled_logits(const AttentionTiles& t, int64_t first_row, int64_t tokens) {
    const int64_t key_tiles = t.channels / 32, q_stride = t.channels * 2;
    constexpr int64_t kOutStride = kTiledTokens * sizeof(float);
    const BFloat16* q = t.q + first_row * t.channels;
    for (int64_t n = 0; n < tokens; n += 32) {
        const BFloat16* b = t.keys + n / 16 * key_tiles * kPairTileElements;
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t c = 0; c < key_tiles; ++c) {
            tile_load<6>(b + c * kPairTileElements, 64);
            tile_load<4>(q + c * 32, q_stride);
            tile_dot_bf16<0, 4, 6>();
            tile_load<5>(q + 16 * t.channels + c * 32, q_stride);
            tile_dot_bf16<2, 5, 6>();
            tile_load<7>(b + (key_tiles + c) * kPairTileElements, 64);
            tile_dot_bf16<1, 4, 7>();
            tile_dot_bf16<3, 5, 7>();
        }
        tile_store<0>(t.logits + n, kOutStride);
        tile_store<1>(t.logits + n + 16, kOutStride);
        tile_store<2>(t.logits + 16 * kTiledTokens + n, kOutStride);
        tile_store<3>(t.logits + 16 * kTiledTokens + n + 16, kOutStride);
    }
}

// acc of 32 rows += their weights of `tokens` (a multiple of 32) . values, for one or two tiles of
// 16 channels from `n` on.
template <bool kBoth>
inline void add_tiled_values(const AttentionTiles& t, int64_t first_row, int64_t tokens,
                             int64_t n) {
    const int64_t value_tiles = t.head_dim / 16;
    const int64_t acc_stride = t.head_dim * int64_t{sizeof(float)};
    constexpr int64_t kWeightStride = kTiledTokens * sizeof(BFloat16);
    float* const acc = t.acc + first_row * t.head_dim + n * 16;
    float* const lower = acc + 16 * t.head_dim;
    tile_load<0>(acc, acc_stride);
    tile_load<2>(lower, acc_stride);
    if constexpr (kBoth) {
        tile_load<1>(acc + 16, acc_stride);
        tile_load<3>(lower + 16, acc_stride);
    }
    for (int64_t at = 0; at < tokens; at += 32) {
        const BFloat16* b = t.values + (at / 32 * value_tiles + n) * kPairTileElements;
        tile_load<6>(b, 64);
        tile_load<4>(t.weights + at, kWeightStride);
        tile_dot_bf16<0, 4, 6>();
        tile_load<5>(t.weights + 16 * kTiledTokens + at, kWeightStride);
        tile_dot_bf16<2, 5, 6>();
        if constexpr (kBoth) {
            tile_load<7>(b + kPairTileElements, 64);
            tile_dot_bf16<1, 4, 7>();
            tile_dot_bf16<3, 5, 7>();
        }
    }
    tile_store<0>(acc, acc_stride);
    tile_store<2>(lower, acc_stride);
    if constexpr (kBoth) {
        tile_store<1>(acc + 16, acc_stride);
        tile_store<3>(lower + 16, acc_stride);
    }
}

// Logits of one row become weights: all but the first `seen` are 0. `tokens`: a multiple of 32.
inline void tiled_softmax(const AttentionTiles& t, int64_t row, int64_t seen, int64_t tokens,
                          float scale, float softcap) {
    float* const x = t.logits + row % kTiledRows * kTiledTokens;
    BFloat16* const weights = t.weights + row % kTiledRows * kTiledTokens;
    if (softcap != 0.f || seen < tokens) {
        for (int64_t i = 0; i < tokens; i += kLanes)
            store(x + i, mul(load(x + i), broadcast(scale)));
        cap_logits(x, tokens, softcap);
        for (int64_t i = seen; i < tokens; ++i) x[i] = -INFINITY;
        scale = 1.f;
    }
    F32 top = broadcast(-INFINITY);
    for (int64_t i = 0; i < tokens; i += kLanes)  // NaN is no maximum, and shows in the sum
        top = max(mul(load(x + i), broadcast(scale)), top);
    const float before = t.peak[row];
    float now = reduce_max(top);
    if (before > now) now = before;
    if (now == -INFINITY) {
        bool defect = false;
        for (int64_t i = 0; i < seen; ++i) defect = defect || x[i] * scale != -INFINITY;
        if (!defect) {
            std::memset(weights, 0, static_cast<size_t>(tokens) * sizeof(BFloat16));
            return;
        }
        now = 0.f;
    }
    F32 sum = broadcast(0.f);
    for (int64_t i = 0; i < tokens; i += kLanes) {
        // Not fma(): its product is exact, `now` is not, and huge logits would differ from it.
        const F32 weight = exp2(sub(mul(load(x + i), broadcast(scale)), broadcast(now)));
        sum = add(sum, weight);
        store_weights(weights + i, weight);
    }
    const float added = reduce_add(sum);
    if (now == before) {
        t.total[row] += added;
        return;
    }
    t.peak[row] = now;
    const float factor = exp2(before - now);  // 0 at the first tokens
    t.total[row] = t.total[row] * factor + added;
    if (before == -INFINITY) return;
    float* const acc = t.acc + row * t.head_dim;
    for (int64_t d = 0; d < t.head_dim; d += kLanes)
        store(acc + d, mul(load(acc + d), broadcast(factor)));
}

// Goes on over `tokens` tokens. Row r sees the first seen_of(r) of them (below 0: none, above
// `tokens`: all), which is asked once per row, in order. Meanwhile the rows of `upcoming` are
// fetched.
template <typename SeenOf>
inline void attend_tiles(const AttentionTiles& t, const BFloat16* const* key_rows,
                         const BFloat16* const* value_rows, int64_t tokens, float scale,
                         float softcap, const Upcoming& upcoming, const SeenOf& seen_of) {
    pack_tiles(t, key_rows, value_rows, tokens);
    // 0 * NaN is NaN: a value that is not finite may only meet the queries that see it.
    const bool finite = values_are_finite(t, tokens);
    const int64_t rows_a_step = (upcoming.count + t.rows - 1) / t.rows;
    int64_t fetched = 0;
    for (int64_t first = 0; first < t.rows; first += kTiledRows) {
        int64_t seen[kTiledRows], most = 0, least = tokens;
        for (int64_t i = 0; i < kTiledRows; ++i) {
            const int64_t sees = first + i < t.rows ? seen_of(first + i) : 0;
            seen[i] = sees < 0 ? 0 : (sees < tokens ? sees : tokens);
            most = seen[i] > most ? seen[i] : most;
            if (first + i < t.rows) least = seen[i] < least ? seen[i] : least;
        }
        if (most == 0) continue;
        const int64_t padded = (most + 31) / 32 * 32;
        tiled_logits(t, first, padded);
        for (int64_t i = 0; i < kTiledRows; ++i) {
            tiled_softmax(t, first + i, seen[i], padded, scale, softcap);
            for (int64_t n = 0; n < rows_a_step; ++n) upcoming.fetch(fetched++);
        }
        if (!finite && least < tokens) {
            for (int64_t i = 0; i < kTiledRows; ++i) {
                float weights[kTiledTokens];
                for (int64_t at = 0; at < padded; at += kLanes)
                    store(weights + at, load(t.weights + i * kTiledTokens + at));
                weighted_columns<1>(value_rows, seen[i], weights, Upcoming{},
                                    t.acc + (first + i) * t.head_dim, t.head_dim);
            }
            continue;
        }
        int64_t n = 0;
        for (; n + 2 <= t.head_dim / 16; n += 2) add_tiled_values<true>(t, first, padded, n);
        if (n < t.head_dim / 16) add_tiled_values<false>(t, first, padded, n);
    }
}
