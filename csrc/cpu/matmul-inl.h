// Small float32 matrix products, a register tile of sums at a time: the prefill kernels' work.

// Of the left factor: element (r, k) at a[r * stride + k], or at a[k * stride + r].
enum class Left { kRows, kColumns };

// c[r][n] (+)= sum_k a[r][k] * b[k][n], n over kVecs vectors, r over kRows rows.
template <int kRows, int kVecs, bool kAccumulate, Left kLeft>
inline void matmul_strip(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                         int64_t depth, float* c, int64_t c_stride) {
    F32 sum[kRows][kVecs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
            sum[r][v] = kAccumulate ? load(c + r * c_stride + v * kLanes) : broadcast(0.f);
    for (int64_t k = 0; k < depth; ++k) {
        F32 column[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const F32 x =
                broadcast(kLeft == Left::kRows ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sum[r][v] = fma(column[v], x, sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(c + r * c_stride + v * kLanes, sum[r][v]);
}

template <int kRows, bool kAccumulate, Left kLeft>
inline void matmul_rows(const float* a, int64_t a_stride, const float* b, int64_t width,
                        int64_t depth, float* c, int64_t c_stride) {
    int64_t n = 0;
    for (; n + kGemmVecs * kLanes <= width; n += kGemmVecs * kLanes)
        matmul_strip<kRows, kGemmVecs, kAccumulate, kLeft>(a, a_stride, b + n, width, depth, c + n,
                                                           c_stride);
    for (; n < width; n += kLanes)
        matmul_strip<kRows, 1, kAccumulate, kLeft>(a, a_stride, b + n, width, depth, c + n,
                                                   c_stride);
}

// At most kGemmRows rows.
template <bool kAccumulate>
inline void matmul(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t width,
                   int64_t depth, float* c, int64_t c_stride) {
    if (rows == kGemmRows)
        return matmul_rows<kGemmRows, kAccumulate, Left::kRows>(a, a_stride, b, width, depth, c,
                                                                c_stride);
    for (int64_t r = 0; r < rows; ++r)
        matmul_rows<1, kAccumulate, Left::kRows>(a + r * a_stride, a_stride, b, width, depth,
                                                 c + r * c_stride, c_stride);
}

struct Nothing {
    [[gnu::always_inline]] void operator()() const {}
};

// Any number of rows. `between` is called after each register tile's rows: matmul_steps() times.
template <bool kAccumulate, Left kLeft, typename Between = Nothing>
inline void matmul_tall(int64_t rows, const float* a, int64_t a_stride, const float* b,
                        int64_t width, int64_t depth, float* c, int64_t c_stride,
                        const Between& between = {}) {
    const int64_t a_step = kLeft == Left::kRows ? a_stride : 1;
    int64_t r = 0;
    for (; r + kGemmRows <= rows; r += kGemmRows, between())
        matmul_rows<kGemmRows, kAccumulate, kLeft>(a + r * a_step, a_stride, b, width, depth,
                                                   c + r * c_stride, c_stride);
    for (; r + 2 <= rows; r += 2, between())
        matmul_rows<2, kAccumulate, kLeft>(a + r * a_step, a_stride, b, width, depth,
                                           c + r * c_stride, c_stride);
    if (r == rows) return;
    matmul_rows<1, kAccumulate, kLeft>(a + r * a_step, a_stride, b, width, depth, c + r * c_stride,
                                       c_stride);
    between();
}
inline int64_t matmul_steps(int64_t rows) {
    const int64_t rest = rows % kGemmRows;
    return rows / kGemmRows + rest / 2 + rest % 2;
}
