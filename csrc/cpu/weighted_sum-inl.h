// Sums of value rows under the weights of a few query columns.

// acc[c][d] += sum_t weights[c][t] * rows[t][d] for a strip of kCols columns x kVecs vectors.
template <int kCols, int kVecs, typename T>
inline void weighted_strip(const T* const* rows, int64_t count, const float* weights, int64_t d,
                           const Upcoming& upcoming, float* acc, int64_t head_dim) {
    F32 sum[kCols][kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[c][v] = load(acc + c * head_dim + d + v * kLanes);
    for (int64_t t = 0; t < count; ++t) {
        upcoming.fetch(t);
        F32 value[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) value[v] = load(rows[t] + d + v * kLanes);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) {
            const F32 weight = broadcast(weights[c * kTileTokens + t]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sum[c][v] = fma(value[v], weight, sum[c][v]);
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(acc + c * head_dim + d + v * kLanes, sum[c][v]);
}

template <int kCols, typename T>
inline void weighted_columns(const T* const* rows, int64_t count, const float* weights,
                             const Upcoming& upcoming, float* acc, int64_t head_dim) {
    int64_t d = 0;
    for (; d + kValueVecs * kLanes <= head_dim; d += kValueVecs * kLanes)
        weighted_strip<kCols, kValueVecs>(rows, count, weights, d, d == 0 ? upcoming : Upcoming{},
                                          acc, head_dim);
    for (; d < head_dim; d += kLanes)
        weighted_strip<kCols, 1>(rows, count, weights, d, d == 0 ? upcoming : Upcoming{}, acc,
                                 head_dim);
}

// acc[c][:] += sum_t weights[c][t] * rows[t][:] for all columns; the first ones fetch what comes.
template <typename T>
inline void weighted_sum(const T* const* rows, int64_t count, const float* weights,
                         int64_t num_columns, const Upcoming& upcoming, float* acc,
                         int64_t head_dim) {
    int64_t c = 0;
    for (; c + kValueCols <= num_columns; c += kValueCols)
        weighted_columns<kValueCols>(rows, count, weights + c * kTileTokens,
                                     c == 0 ? upcoming : Upcoming{}, acc + c * head_dim, head_dim);
    for (; c < num_columns; ++c)
        weighted_columns<1>(rows, count, weights + c * kTileTokens, c == 0 ? upcoming : Upcoming{},
                            acc + c * head_dim, head_dim);
}
