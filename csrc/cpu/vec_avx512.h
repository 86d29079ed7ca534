// Vector operations for AVX-512 (F, BW, VL, DQ, VNNI). Names and meanings: vec_scalar.h.

constexpr int kLanes = 16;
constexpr int kGemmRows = 6, kGemmVecs = 4;
constexpr int kValueCols = 4, kValueVecs = 4;
constexpr int kSketchParts = 4;

constexpr bool kFusedFma = true;

using F32 = __m512;
using I32 = __m512i;

inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load(const BFloat16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
inline F32 load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline void store(BFloat16* p, F32 x) {
    const I32 bits = _mm512_castps_si512(x);
    const I32 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    I32 rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline void store(Float16* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline F32 max_abs(F32 a, F32 b) {  // of numbers: max(|a|, |b|)
    return _mm512_range_ps(a, b, 0x0b);
}
inline F32 round_even(F32 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 scale_or_zero(F32 a, F32 n, F32 x, float bound) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ), a, n);
}
inline F32 round_down(F32 a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// Twice as slow where n is not whole (Zen 5).
inline F32 scale_by_power(F32 a, F32 n) { return _mm512_scalef_ps(a, n); }
inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a); }
inline __m256 fold(F32 a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
inline void reduce_add4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    const __m256 sums =
        _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
// Sums of acc[c][i] to out[c * stride + i]: sixteen registers through one shuffle tree.
inline void reduce_add_4x4(const F32 acc[4][4], float scale, float* out, int64_t stride) {
    F32 quads[4];  // of column c: sums of four tokens, one part per 128 bits
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const F32 ab = _mm512_add_ps(_mm512_unpacklo_ps(acc[c][0], acc[c][1]),
                                     _mm512_unpackhi_ps(acc[c][0], acc[c][1]));
        const F32 cd = _mm512_add_ps(_mm512_unpacklo_ps(acc[c][2], acc[c][3]),
                                     _mm512_unpackhi_ps(acc[c][2], acc[c][3]));
        quads[c] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    const F32 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                                  _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
    const F32 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                                   _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
    const F32 sums = _mm512_mul_ps(
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)),
        _mm512_set1_ps(scale));
    _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
}
inline void transpose(F32 x[16]) {
    F32 pairs[16], quads[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // quads[i + j]: columns j, 4 + j, 8 + j, 12 + j of rows i..
        const F32 a = pairs[i], b = pairs[i + 1], c = pairs[i + 2], d = pairs[i + 3];
        quads[i] = _mm512_shuffle_ps(a, c, 0x44);
        quads[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        quads[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        quads[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const F32 a = quads[j], b = quads[4 + j], c = quads[8 + j], d = quads[12 + j];
        const F32 ab01 = _mm512_shuffle_f32x4(a, b, 0x44), ab23 = _mm512_shuffle_f32x4(a, b, 0xee),
                  cd01 = _mm512_shuffle_f32x4(c, d, 0x44), cd23 = _mm512_shuffle_f32x4(c, d, 0xee);
        x[j] = _mm512_shuffle_f32x4(ab01, cd01, 0x88);
        x[4 + j] = _mm512_shuffle_f32x4(ab01, cd01, 0xdd);
        x[8 + j] = _mm512_shuffle_f32x4(ab23, cd23, 0x88);
        x[12 + j] = _mm512_shuffle_f32x4(ab23, cd23, 0xdd);
    }
}
inline __m256 fold_max(F32 a) {
    return _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
inline void reduce_max4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    const __m256 e = fold_max(a), f = fold_max(b), g = fold_max(c), h = fold_max(d);
    const __m256 ef = _mm256_max_ps(_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f));
    const __m256 gh = _mm256_max_ps(_mm256_unpacklo_ps(g, h), _mm256_unpackhi_ps(g, h));
    const __m256 all =
        _mm256_max_ps(_mm256_shuffle_ps(ef, gh, 0x44), _mm256_shuffle_ps(ef, gh, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline uint32_t mask_ge(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t mask_between(F32 x, F32 low, F32 high) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LE_OQ);
}
inline int64_t pack_words(int32_t* out, const int32_t* in, uint32_t mask) {
    _mm512_storeu_si512(
        out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(in)));
    return __builtin_popcount(mask);
}
inline int64_t pack_positions(int32_t* out, int32_t base, uint32_t mask) {
    const I32 lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const I32 positions = _mm512_add_epi32(lanes, _mm512_set1_epi32(base));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), positions));
    return __builtin_popcount(mask);
}
// Packing works within 128 bits; the permutation puts the groups of four back in order.
inline void store_signed_bytes(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
    const I32 low = _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b)),
              high = _mm512_packs_epi32(_mm512_cvtps_epi32(c), _mm512_cvtps_epi32(d));
    const I32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
}

using Codes = I32;
inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low_nibbles(Codes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
inline Codes high_nibbles(Codes c) {
    return _mm512_and_si512(_mm512_srli_epi16(c, 4), _mm512_set1_epi8(15));
}
inline I32 zero_i32() { return _mm512_setzero_si512(); }
inline I32 count_ge(I32 acc, F32 a, F32 b) {
    return _mm512_mask_add_epi32(acc, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), acc,
                                 _mm512_set1_epi32(1));
}
inline int64_t reduce_add(I32 a) { return _mm512_reduce_add_epi32(a); }
inline I32 dot4(I32 acc, Codes codes, int32_t q4) {
    const I32 q = _mm512_set1_epi32(q4);
    // Not the intrinsic: around it GCC 12 copies and spills the sums of a loop that keeps sixteen.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(q));
    return acc;
}
inline I32 dot4_nibbles(I32 acc, Codes codes, int32_t q4) { return dot4(acc, codes, q4); }
inline I32 add_byte_quads(I32 acc, const uint8_t* p) {
    return _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), _mm512_loadu_si512(p));
}
inline I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a); }
[[gnu::always_inline]] inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
[[gnu::always_inline]] inline void prefetch_to_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

constexpr int64_t kRawBytes = 64;
using Raw = __m512i;
inline Raw load_raw(const void* p) { return _mm512_loadu_si512(p); }
inline void store_raw(void* p, Raw x) { _mm512_storeu_si512(p, x); }
inline void stream_raw(void* p, Raw x) { _mm512_stream_si512(static_cast<__m512i*>(p), x); }
inline void stream_fence() { _mm_sfence(); }
inline Raw zero_raw() { return _mm512_setzero_si512(); }
template <typename T>
inline Raw larger_magnitude(Raw a, Raw b) {
    if constexpr (sizeof(T) == 4)
        return _mm512_max_epu32(a, _mm512_and_si512(b, _mm512_set1_epi32(0x7fffffff)));
    else
        return _mm512_max_epu16(a, _mm512_and_si512(b, _mm512_set1_epi16(0x7fff)));
}
template <typename T>
inline Raw ordered(Raw a) {  // a ^ (sign & all other bits)
    if constexpr (sizeof(T) == 4)
        return _mm512_ternarylogic_epi32(a, _mm512_srai_epi32(a, 31), _mm512_set1_epi32(0x7fffffff),
                                         0x78);
    else
        return _mm512_ternarylogic_epi32(a, _mm512_srai_epi16(a, 15), _mm512_set1_epi16(0x7fff),
                                         0x78);
}
template <typename T>
inline void take_ordered(Raw a, Raw* low, Raw* high) {
    if constexpr (sizeof(T) == 4)
        *low = _mm512_min_epi32(*low, a), *high = _mm512_max_epi32(*high, a);
    else
        *low = _mm512_min_epi16(*low, a), *high = _mm512_max_epi16(*high, a);
}
template <typename T>
inline bool any_nonfinite(Raw magnitudes) {
    constexpr int limit = static_cast<int>(element::infinity_bits(T{}));
    if constexpr (sizeof(T) == 4)
        return _mm512_cmpge_epu32_mask(magnitudes, _mm512_set1_epi32(limit)) != 0;
    else
        return _mm512_cmpge_epu16_mask(magnitudes, _mm512_set1_epi16(limit)) != 0;
}

inline Codes pack_levels(F32 t0, F32 t1, F32 t2, F32 t3, uint8_t highest) {
    const I32 low = _mm512_packs_epi32(_mm512_cvtps_epi32(t0), _mm512_cvtps_epi32(t1)),
              high = _mm512_packs_epi32(_mm512_cvtps_epi32(t2), _mm512_cvtps_epi32(t3));
    return _mm512_min_epu8(_mm512_packus_epi16(low, high),
                           _mm512_set1_epi8(static_cast<char>(highest)));
}
// A transposition of 4 x 4 groups of 16 bytes.
inline void store_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    const I32 ab01 = _mm512_shuffle_i32x4(a, b, 0x44), ab23 = _mm512_shuffle_i32x4(a, b, 0xee),
              cd01 = _mm512_shuffle_i32x4(c, d, 0x44), cd23 = _mm512_shuffle_i32x4(c, d, 0xee);
    store_raw(p, _mm512_shuffle_i32x4(ab01, cd01, 0x88));
    store_raw(p + 64, _mm512_shuffle_i32x4(ab01, cd01, 0xdd));
    store_raw(p + 128, _mm512_shuffle_i32x4(ab23, cd23, 0x88));
    store_raw(p + 192, _mm512_shuffle_i32x4(ab23, cd23, 0xdd));
}
inline Codes paired_nibbles(Codes a, Codes b) {
    return _mm512_or_si512(_mm512_shuffle_i32x4(a, b, 0x88),
                           _mm512_slli_epi16(_mm512_shuffle_i32x4(a, b, 0xdd), 4));
}
inline void store_nibble_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    const Codes ab = paired_nibbles(a, b), cd = paired_nibbles(c, d);
    store_raw(p, _mm512_shuffle_i32x4(ab, cd, 0x88));
    store_raw(p + 64, _mm512_shuffle_i32x4(ab, cd, 0xdd));
}
