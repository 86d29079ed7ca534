// Exact-key logits with bfloat16 dot products: half the instructions of the float32 path for
// bfloat16 keys. Used only when the queries are bfloat16 numbers themselves, so that nothing is
// rounded that was not before.

constexpr int64_t kMaxBf16Group = 16;

template <int kCols>
inline void dot_columns_bf16(const BFloat16* const* rows, int64_t count, const BFloat16* q,
                             int64_t head_dim, float scale, const Upcoming& upcoming, float* out,
                             int64_t stride) {
    for (int64_t t = 0; t < count; t += 4) {
        const BFloat16* k[4];
        for (int i = 0; i < 4; ++i) {
            k[i] = rows[t + i < count ? t + i : count - 1];
            upcoming.fetch(t + i);
        }
        F32 acc[kCols][4];
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) acc[c][i] = broadcast(0.f);
        for (int64_t d = 0; d < head_dim; d += 32) {
            Bf16Pairs key[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) key[i] = load_pairs(k[i] + d);
#pragma GCC unroll 4
            for (int c = 0; c < kCols; ++c) {
                const Bf16Pairs query = load_pairs(q + c * kMaxHeadDim + d);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) acc[c][i] = dot_pairs(acc[c][i], key[i], query);
            }
        }
        store_sums<kCols>(acc, scale, count - t, out + t, stride);
    }
}

// All columns, four at a time; column c of q starts at c * kMaxHeadDim.
inline void dot_rows_bf16(const BFloat16* const* rows, int64_t count, const BFloat16* q,
                          int64_t num_columns, int64_t head_dim, float scale,
                          const Upcoming& upcoming, float* out, int64_t stride) {
    Upcoming rest = upcoming;  // the first pass over the rows fetches, later ones do not
    for (int64_t c = 0; c < num_columns; c += 4) {
        const auto dot = [&](auto width) {
            dot_columns_bf16<width()>(rows, count, q + c * kMaxHeadDim, head_dim, scale, rest,
                                      out + c * stride, stride);
        };
        switch (num_columns - c) {
            case 1:
                dot(std::integral_constant<int, 1>{});
                break;
            case 2:
                dot(std::integral_constant<int, 2>{});
                break;
            case 3:
                dot(std::integral_constant<int, 3>{});
                break;
            default:
                dot(std::integral_constant<int, 4>{});
                break;
        }
        rest.count = 0;
    }
}

// False, with nothing written, if a query is not exactly bfloat16 or head_dim is no multiple of 32.
inline bool key_logits_bf16(const KVView& keys, int64_t row, int64_t kv_head, int64_t begin,
                            int64_t end, int64_t horizon, const float* q, int64_t num_columns,
                            int64_t head_dim, float scale, float* out, int64_t stride) {
    if (head_dim % 32 != 0) return false;
    for (int64_t i = 0; i < num_columns * head_dim; ++i)
        if (element::bits_of(q[i]) & 0xffffu) return false;
    alignas(64) BFloat16 columns[4 * kMaxHeadDim];
    for (int64_t first = 0; first < num_columns; first += 4) {
        const int64_t count = num_columns - first < 4 ? num_columns - first : 4;
        for (int64_t c = 0; c < count; ++c)
            for (int64_t d = 0; d < head_dim; ++d)
                columns[c * kMaxHeadDim + d].bits =
                    static_cast<uint16_t>(element::bits_of(q[(first + c) * head_dim + d]) >> 16);
        for_each_key_tile<BFloat16>(keys, row, kv_head, begin, end, horizon, head_dim,
                                    [&](const BFloat16* const* rows, int64_t tokens,
                                        int64_t position, const Upcoming& upcoming) {
                                        dot_rows_bf16(
                                            rows, tokens, columns, count, head_dim, scale, upcoming,
                                            out + first * stride + (position - begin), stride);
                                    });
    }
    return true;
}
