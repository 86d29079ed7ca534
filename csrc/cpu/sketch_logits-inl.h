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

struct SketchQuery {  // one column against one block
    alignas(64) int8_t high[kMaxHeadDim];
    alignas(64) int8_t low[kMaxHeadDim];  // int8 sketches only: w = 256 * high + low
    float mul, add;
};

template <SketchFormat kFormat>
inline void quantise_query(const float* q, const uint8_t* record, int64_t head_dim, float scale,
                           SketchQuery* out) {
    constexpr float kCentre = static_cast<float>(sketch_levels(kFormat)) * 0.5f;
    constexpr float kTop =
        kFormat == SketchFormat::kInt8 ? 32639.f : 127.f;  // 32639 = 127 * 256 + 127
    const Float16* step = reinterpret_cast<const Float16*>(record);
    const Float16* lo = step + head_dim;
    alignas(64) float product[kMaxHeadDim];
    F32 top = broadcast(0.f), at_centre = broadcast(0.f);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const F32 query = load(q + d), x = mul(query, load(step + d));
        store(product + d, x);
        top = max(abs(x), top);
        at_centre = fma(x, broadcast(kCentre), fma(query, load(lo + d), at_centre));
    }
    const float peak = reduce_max(top);
    const float unit = peak > 0.f ? peak / kTop : 1.f;
    const F32 inverse = broadcast(1.f / unit);
    F32 sum = broadcast(0.f);  // of whole numbers below 2^24: exact
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        // 1 / unit is rounded, so |w| could pass kTop by an ulp before rounding; clamp to keep the
        // bytes in range
        const F32 w = max(min(round_even(mul(load(product + d), inverse)), broadcast(kTop)),
                          broadcast(-kTop));
        sum = add(sum, w);
        if constexpr (kFormat == SketchFormat::kInt8) {
            // + 0.5: no ties, so that the low byte lies in [-128, 127]
            const F32 high = round_even(mul(add(w, broadcast(0.5f)), broadcast(1.f / 256.f)));
            store_bytes(reinterpret_cast<uint8_t*>(out->high + d), high);
            store_bytes(reinterpret_cast<uint8_t*>(out->low + d), fma(high, broadcast(-256.f), w));
        } else {
            store_bytes(reinterpret_cast<uint8_t*>(out->high + d), w);
        }
    }
    out->mul = scale * unit;
    out->add = scale * (reduce_add(at_centre) - unit * kCentre * reduce_add(sum));
}

// acc[c] += codes of kLanes tokens . columns; `line` = first code line of the sub-block part.
template <SketchFormat kFormat, int kCols, int kParts>
inline void scan_part(const uint8_t* codes, int64_t lines, const SketchQuery* const* queries,
                      float* const* out, int64_t at) {
    I32 high[kCols][kParts];
    I32 low[kCols][kParts];
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) high[c][part] = low[c][part] = zero_i32();
    constexpr int64_t kSubBlock =
        kSketchSubBlockTokens / kLanes;  // register groups per 16-token sub-block
    for (int64_t line = 0; line < lines; ++line) {
        Codes raw[kParts];
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            // parts walk register groups: first inside a 64-byte line, then over sub-blocks
            const int64_t group = at / kLanes + part;
            const uint8_t* from =
                codes + (group / kSubBlock * lines + line) * 64 + group % kSubBlock * 4 * kLanes;
            prefetch(from + kSketchBlockTokens * lines * 4 + 512);  // about one block ahead
            raw[part] = load_codes(from);
        }
#pragma GCC unroll 8
        for (int c = 0; c < kCols; ++c) {
            if constexpr (kFormat == SketchFormat::kInt4) {
                int32_t even, odd;
                std::memcpy(&even, queries[c]->high + line * 8, 4);
                std::memcpy(&odd, queries[c]->high + line * 8 + 4, 4);
#pragma GCC unroll 2
                for (int part = 0; part < kParts; ++part) {
                    high[c][part] = dot4(high[c][part], low_nibbles(raw[part]), even);
                    high[c][part] = dot4(high[c][part], high_nibbles(raw[part]), odd);
                }
            } else {
                int32_t coarse, fine;
                std::memcpy(&coarse, queries[c]->high + line * 4, 4);
                std::memcpy(&fine, queries[c]->low + line * 4, 4);
#pragma GCC unroll 2
                for (int part = 0; part < kParts; ++part) {
                    high[c][part] = dot4(high[c][part], raw[part], coarse);
                    low[c][part] = dot4(low[c][part], raw[part], fine);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c)
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            F32 sum = to_f32(high[c][part]);
            if constexpr (kFormat == SketchFormat::kInt8)
                sum = fma(sum, broadcast(256.f), to_f32(low[c][part]));
            store(out[c] + at + part * kLanes,
                  fma(sum, broadcast(queries[c]->mul), broadcast(queries[c]->add)));
        }
}

template <SketchFormat kFormat, int kCols>
inline void scan_columns(const uint8_t* codes, int64_t lines, const SketchQuery* queries,
                         float* out, int64_t stride) {
    const SketchQuery* column[kCols];
    float* target[kCols];
    for (int c = 0; c < kCols; ++c) column[c] = queries + c, target[c] = out + c * stride;
    for (int64_t t = 0; t < kSketchBlockTokens; t += 2 * kLanes)
        scan_part<kFormat, kCols, 2>(codes, lines, column, target, t);
}

constexpr int64_t kSketchColumns = 4;

#if KVS_HAS_TILE_DOT
#include "cpu/sketch_tile_logits-inl.h"
#endif

// out[c * stride + t] for the block's 128 tokens and up to kSketchColumns columns of q.
template <SketchFormat kFormat>
inline void sketch_block_logits(const uint8_t* record, const float* q, int64_t q_stride,
                                int64_t num_columns, int64_t head_dim, float scale, float* out,
                                int64_t stride) {
#if KVS_HAS_TILE_DOT
    if (num_columns >= kMinTileColumns)
        return sketch_block_logits_by_tiles<kFormat>(record, q, q_stride, num_columns, head_dim,
                                                     scale, out, stride);
#endif
    const uint8_t* codes = record + 4 * head_dim;
    const int64_t lines = kFormat == SketchFormat::kInt4 ? head_dim / 8 : head_dim / 4;
    SketchQuery queries[kSketchColumns];
    for (int64_t first = 0; first < num_columns; first += kSketchColumns) {
        const int64_t count =
            num_columns - first < kSketchColumns ? num_columns - first : kSketchColumns;
        for (int64_t c = 0; c < count; ++c)
            quantise_query<kFormat>(q + (first + c) * q_stride, record, head_dim, scale,
                                    queries + c);
        float* part = out + first * stride;
        switch (count) {
            case 1:
                scan_columns<kFormat, 1>(codes, lines, queries, part, stride);
                break;
            case 2:
                scan_columns<kFormat, 2>(codes, lines, queries, part, stride);
                break;
            case 3:
                scan_columns<kFormat, 3>(codes, lines, queries, part, stride);
                break;
            default:
                scan_columns<kFormat, 4>(codes, lines, queries, part, stride);
                break;
        }
    }
}
