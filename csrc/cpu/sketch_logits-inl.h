// Logits of one 128-token sketch block for many query columns: integer dot products of 4- or 8-bit
// codes with an integer query, one multiply-add per logit at the end.
//
//   logit = scale * sum_d q_d (lo_d + step_d * code_d)
//         = mul * (sum_d code_d * w_d - centre * sum_d w_d) + scale * sum_d q_d (lo_d + step_d *
//         centre)
//
// with w_d = round(q_d * step_d / unit) and mul = scale * unit. Centring the codes keeps the
// rounding of w from shifting a whole block: what is left of it multiplies (code - centre), which
// has no mean. int4: w is int8 (unit = max |q step| / 127). int8: codes are 16 times finer, so w
// has 16 bits, in two bytes.

constexpr int64_t kSketchAhead = 12288;  // bytes from a use to the prefetch: 8 KB and 16 KB lose
constexpr int64_t kSketchColumns = 4;    // query columns that share one pass over the codes

// Up to kColumns columns against one block; column c's bytes start at c * kMaxHeadDim.
template <int64_t kColumns = kSketchColumns>
struct SketchQueries {
    alignas(64) int8_t high[kColumns * kMaxHeadDim];
    alignas(64) int8_t low[kColumns * kMaxHeadDim];  // int8 only: w = 256 * high + low
    float mul[kColumns], add[kColumns];
};

// Partial sums of signed bytes, which are zero from `count` up to a multiple of 64.
inline F32 sum_of_bytes(const int8_t* bytes, int64_t count) {
    I32 sum = zero_i32();
    for (int64_t d = 0; d < count; d += 4 * kLanes)
        sum = add_byte_quads(sum, reinterpret_cast<const uint8_t*>(bytes + d));
    return to_f32(sum);
}

// The columns q of the block at `record` into the columns `first` .. first + kSketchColumns of out.
template <SketchFormat kFormat, int64_t kColumns>
inline void quantise_queries(const float* const* q, const uint8_t* record, int64_t head_dim,
                             float scale, SketchQueries<kColumns>* out, int64_t first = 0) {
    constexpr int kCols = kSketchColumns;
    int8_t* const high_bytes = out->high + first * kMaxHeadDim;
    int8_t* const low_bytes = out->low + first * kMaxHeadDim;
    constexpr float kCentre = static_cast<float>(sketch_levels(kFormat)) * 0.5f;
    // A little under 127 and 127 * 256 + 127, so that no rounding of 1 / unit passes them.
    constexpr float kTop = kFormat == SketchFormat::kInt8 ? 32638.f : 126.99f;
    const Float16* step = reinterpret_cast<const Float16*>(record);
    const Float16* lo = step + head_dim;
    // q_d * step_d, zero past head_dim: bytes are made, and summed, in whole registers of them.
    constexpr int64_t kPack = 4 * kLanes;
    alignas(64) float products[kCols * kMaxHeadDim];
    const int64_t padded = (head_dim + kPack - 1) / kPack * kPack;
    for (int64_t d = head_dim; d < padded; d += kLanes)
        for (int64_t c = 0; c < kCols; ++c) store(products + c * kMaxHeadDim + d, broadcast(0.f));
    F32 top[kCols], at_centre[kCols];
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) top[c] = at_centre[c] = broadcast(0.f);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        prefetch(record + 4 * d + kSketchAhead);  // what lies between two blocks' codes
        const F32 width = load(step + d), centre = fma(width, broadcast(kCentre), load(lo + d));
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) {
            const F32 query = load(q[c] + d), product = mul(query, width);
            store(products + c * kMaxHeadDim + d, product);
            top[c] = max_abs(product, top[c]);
            at_centre[c] = fma(query, centre, at_centre[c]);
        }
    }
    float peak[kCols], constant[kCols], inverse[kCols], unit[kCols], whole[kCols];
    reduce_max4(top[0], top[1], top[2], top[3], peak);
    reduce_add4(at_centre[0], at_centre[1], at_centre[2], at_centre[3], constant);
    for (int c = 0; c < kCols; ++c) {
        unit[c] = peak[c] > 0.f ? peak[c] * (1.f / kTop) : 1.f;
        inverse[c] = 1.f / unit[c];
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
        const F32 times = broadcast(inverse[c]);
        for (int64_t d = 0; d < padded; d += kPack) {
            F32 w[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                w[i] = mul(load(products + c * kMaxHeadDim + d + i * kLanes), times);
            if constexpr (kFormat == SketchFormat::kInt8) {
                F32 high[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    // + 0.5: no ties, so that the low byte lies in [-128, 127]
                    w[i] = round_even(w[i]);
                    high[i] = round_even(mul(add(w[i], broadcast(0.5f)), broadcast(1.f / 256.f)));
                    w[i] = fma(high[i], broadcast(-256.f), w[i]);
                }
                store_signed_bytes(low_bytes + c * kMaxHeadDim + d, w[0], w[1], w[2], w[3]);
                store_signed_bytes(high_bytes + c * kMaxHeadDim + d, high[0], high[1], high[2],
                                   high[3]);
            } else {
                store_signed_bytes(high_bytes + c * kMaxHeadDim + d, w[0], w[1], w[2], w[3]);
            }
        }
    }
    F32 sum[kCols];  // of whole numbers below 2^24: exact
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
        sum[c] = sum_of_bytes(high_bytes + c * kMaxHeadDim, head_dim);
        if constexpr (kFormat == SketchFormat::kInt8)
            sum[c] =
                fma(sum[c], broadcast(256.f), sum_of_bytes(low_bytes + c * kMaxHeadDim, head_dim));
    }
    reduce_add4(sum[0], sum[1], sum[2], sum[3], whole);
    for (int c = 0; c < kCols; ++c) {
        out->mul[first + c] = scale * unit[c];
        out->add[first + c] = scale * (constant[c] - unit[c] * kCentre * whole[c]);
    }
}

// Four query bytes of a column, as dot4 takes them.
inline int32_t query_quad(const int8_t* bytes) {
    int32_t quad;
    std::memcpy(&quad, bytes, 4);
    return quad;
}

// Logits of kParts * kLanes tokens from register group `group` on (groups walk a 64-byte line, then
// the sub-blocks).
template <SketchFormat kFormat, int kCols, int kParts>
inline void scan_part(const uint8_t* codes, int64_t lines, const SketchQueries<>& q, int64_t group,
                      float* const* out, int64_t ahead) {
    constexpr int64_t kGroups = kSketchSubBlockTokens / kLanes;  // per line
    I32 acc[kCols][kParts], fine[kCols][kParts];
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) acc[c][part] = fine[c][part] = zero_i32();
    const uint8_t* from[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part)
        from[part] =
            codes + (group + part) / kGroups * lines * 64 + (group + part) % kGroups * 4 * kLanes;
    for (int64_t line = 0; line < lines; ++line) {
        Codes raw[kParts];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            prefetch(from[part] + line * 64 + ahead);
            raw[part] = load_codes(from[part] + line * 64);
        }
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c) {
            const int8_t* high = q.high + c * kMaxHeadDim;
            if constexpr (kFormat == SketchFormat::kInt4) {
                const int32_t even = query_quad(high + line * 8);
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part)
                    acc[c][part] = dot4_nibbles(acc[c][part], low_nibbles(raw[part]), even);
            } else {
                const int32_t coarse = query_quad(high + line * 4),
                              rest = query_quad(q.low + c * kMaxHeadDim + line * 4);
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part) {
                    acc[c][part] = dot4(acc[c][part], raw[part], coarse);
                    fine[c][part] = dot4(fine[c][part], raw[part], rest);
                }
            }
        }
        if constexpr (kFormat == SketchFormat::kInt4) {
#pragma GCC unroll 4
            for (int c = 0; c < kCols; ++c) {
                const int32_t odd = query_quad(q.high + c * kMaxHeadDim + line * 8 + 4);
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part)
                    acc[c][part] = dot4_nibbles(acc[c][part], high_nibbles(raw[part]), odd);
            }
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            F32 sum = to_f32(acc[c][part]);
            if constexpr (kFormat == SketchFormat::kInt8)
                sum = fma(sum, broadcast(256.f), to_f32(fine[c][part]));
            store(out[c] + (group + part) * kLanes,
                  fma(sum, broadcast(q.mul[c]), broadcast(q.add[c])));
        }
}

template <SketchFormat kFormat, int kCols>
inline void scan_columns(const uint8_t* codes, int64_t lines, const SketchQueries<>& q, float* out,
                         int64_t stride, int64_t ahead) {
    constexpr int kParts = kFormat == SketchFormat::kInt4 ? kSketchParts : kSketchParts / 2;
    float* target[kCols];
    for (int c = 0; c < kCols; ++c) target[c] = out + c * stride;
    for (int64_t group = 0; group < kSketchBlockTokens / kLanes; group += kParts)
        scan_part<kFormat, kCols, kParts>(codes, lines, q, group, target, ahead);
}

// The first `count` of the columns in q, 1 .. kSketchColumns of them.
template <SketchFormat kFormat>
inline void scan_block(const uint8_t* record, int64_t head_dim, const SketchQueries<>& q,
                       int64_t count, float* out, int64_t stride, int64_t ahead) {
    const uint8_t* codes = record + 4 * head_dim;
    const int64_t lines = kFormat == SketchFormat::kInt4 ? head_dim / 8 : head_dim / 4;
    switch (count) {
        case 1:
            return scan_columns<kFormat, 1>(codes, lines, q, out, stride, ahead);
        case 2:
            return scan_columns<kFormat, 2>(codes, lines, q, out, stride, ahead);
        case 3:
            return scan_columns<kFormat, 3>(codes, lines, q, out, stride, ahead);
        default:
            return scan_columns<kFormat, 4>(codes, lines, q, out, stride, ahead);
    }
}

// The columns q + first * q_stride .. of num_columns; short of kSketchColumns, the last one again.
inline void pick_columns(const float* q, int64_t q_stride, int64_t first, int64_t num_columns,
                         const float** columns) {
    for (int64_t c = 0; c < kSketchColumns; ++c) {
        const int64_t column = first + c < num_columns ? first + c : num_columns - 1;
        columns[c] = q + column * q_stride;
    }
}

#if KVS_HAS_TILE_DOT
#include "cpu/sketch_tile_logits-inl.h"
#endif

// out[c * stride + t] for the block's 128 tokens and any number of columns of q. `ahead`: where the
// codes lie that are used next, seen from those in use; other than in a scan of neighbouring
// blocks.
template <SketchFormat kFormat>
inline void sketch_block_logits(const uint8_t* record, const float* q, int64_t q_stride,
                                int64_t num_columns, int64_t head_dim, float scale, float* out,
                                int64_t stride, int64_t ahead = kSketchAhead) {
#if KVS_HAS_TILE_DOT
    if (num_columns >= kMinTileColumns)
        return sketch_block_logits_by_tiles<kFormat>(record, q, q_stride, num_columns, head_dim,
                                                     scale, out, stride);
#endif
    SketchQueries<> queries;
    for (int64_t first = 0; first < num_columns; first += kSketchColumns) {
        const float* columns[kSketchColumns];
        pick_columns(q, q_stride, first, num_columns, columns);
        quantise_queries<kFormat>(columns, record, head_dim, scale, &queries);
        scan_block<kFormat>(record, head_dim, queries, num_columns - first, out + first * stride,
                            stride, ahead);
    }
}
