// Vector operations for AVX2 + FMA + F16C, and AVX-VNNI where the including file says that there is
// some. Names and meanings: vec_scalar.h.

constexpr int kLanes = 8;
constexpr int kGemmRows = 6, kGemmVecs = 2;
constexpr int kValueCols = 4, kValueVecs = 2;
constexpr int kSketchParts = 2;

constexpr bool kFusedFma = true;

using F32 = __m256;
using I32 = __m256i;

inline F32 broadcast(float x) { return _mm256_set1_ps(x); }
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 load(const BFloat16* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F32 load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
inline void store(BFloat16* p, F32 x) {
    const I32 bits = _mm256_castps_si256(x);
    const I32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I32 rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const I32 quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const I32 is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const I32 high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Float16* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 abs(F32 a) {
    return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}
inline F32 max_abs(F32 a, F32 b) { return max(abs(a), b); }
inline F32 round_even(F32 a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 scale_or_zero(F32 a, F32 n, F32 x, float bound) {
    const I32 biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const F32 scaled = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_LT_OQ), scaled);
}
inline F32 round_down(F32 a) { return _mm256_floor_ps(a); }
inline F32 scale_by_power(F32 a, F32 whole) {
    const F32 n =
        _mm256_min_ps(_mm256_set1_ps(127.f), _mm256_max_ps(_mm256_set1_ps(-127.f), whole));
    const I32 biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
inline float reduce_add(F32 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(F32 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline void transpose(F32 x[8]) {
    F32 pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {  // quads[i + j]: columns j and 4 + j of rows i..
        const F32 a = pairs[i], b = pairs[i + 1], c = pairs[i + 2], d = pairs[i + 3];
        quads[i] = _mm256_shuffle_ps(a, c, 0x44);
        quads[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        quads[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        quads[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        x[j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
        x[4 + j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
    }
}
inline void reduce_add4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    const F32 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}
inline void reduce_add_4x4(const F32 acc[4][4], float scale, float* out, int64_t stride) {
    for (int c = 0; c < 4; ++c) {
        float sums[4];
        reduce_add4(acc[c][0], acc[c][1], acc[c][2], acc[c][3], sums);
        for (int i = 0; i < 4; ++i) out[c * stride + i] = scale * sums[i];
    }
}
inline void reduce_max4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    const F32 ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F32 cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const F32 all = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline uint32_t mask_ge(F32 a, F32 b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline uint32_t mask_between(F32 x, F32 low, F32 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(
        _mm256_and_ps(_mm256_cmp_ps(x, low, _CMP_GE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ))));
}
// Byte i of entry m: which lane holds the i-th set bit of m.
struct SetBits {
    uint64_t lanes[256];
};
constexpr SetBits set_bits() {
    SetBits out{};
    for (int mask = 0; mask < 256; ++mask) {
        int count = 0;
        for (int i = 0; i < 8; ++i)
            if (mask >> i & 1) out.lanes[mask] |= static_cast<uint64_t>(i) << 8 * count++;
    }
    return out;
}
constexpr SetBits kSetBits = set_bits();
inline I32 set_lanes(uint32_t mask) {
    return _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.lanes + mask)));
}
inline int64_t pack_words(int32_t* out, const int32_t* in, uint32_t mask) {
    const I32 words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_permutevar8x32_epi32(words, set_lanes(mask)));
    return __builtin_popcount(mask);
}
inline int64_t pack_positions(int32_t* out, int32_t base, uint32_t mask) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_add_epi32(set_lanes(mask), _mm256_set1_epi32(base)));
    return __builtin_popcount(mask);
}
// Packing works within 128 bits; the permutation puts the groups of four back in order.
inline void store_signed_bytes(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
    const I32 low = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b)),
              high = _mm256_packs_epi32(_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
    const I32 order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

using Codes = I32;
inline Codes load_codes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Codes low_nibbles(Codes c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
inline Codes high_nibbles(Codes c) {
    return _mm256_and_si256(_mm256_srli_epi16(c, 4), _mm256_set1_epi8(15));
}
inline I32 zero_i32() { return _mm256_setzero_si256(); }
inline I32 count_ge(I32 acc, F32 a, F32 b) {
    return _mm256_sub_epi32(acc, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline int64_t reduce_add(I32 a) {
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xb1)));
}
#if KVS_HAS_AVX_VNNI
inline I32 dot4(I32 acc, Codes codes, int32_t q4) {
    return _mm256_dpbusd_avx_epi32(acc, codes, _mm256_set1_epi32(q4));
}
inline I32 dot4_nibbles(I32 acc, Codes codes, int32_t q4) { return dot4(acc, codes, q4); }
#else
// Widens to 16 bits first: vpmaddubsw would saturate with codes above 127.
inline I32 dot4(I32 acc, Codes codes, int32_t q4) {
    const I32 q = _mm256_set1_epi32(q4);
    const I32 q_even = _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8),
              q_odd = _mm256_srai_epi16(q, 8);
    const I32 even = _mm256_and_si256(codes, _mm256_set1_epi16(255)),
              odd = _mm256_srli_epi16(codes, 8);
    return _mm256_add_epi32(
        acc, _mm256_add_epi32(_mm256_madd_epi16(even, q_even), _mm256_madd_epi16(odd, q_odd)));
}
// Codes up to 15: a pair of products stays below 2 * 15 * 128, far from saturating 16 bits.
inline I32 dot4_nibbles(I32 acc, Codes codes, int32_t q4) {
    const I32 pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi32(q4));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
inline I32 add_byte_quads(I32 acc, const uint8_t* p) {
    const I32 pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load_codes(p));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I32 load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline F32 to_f32(I32 a) { return _mm256_cvtepi32_ps(a); }
[[gnu::always_inline]] inline void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}
[[gnu::always_inline]] inline void prefetch_to_l2(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

constexpr int64_t kRawBytes = 32;
using Raw = __m256i;
inline Raw load_raw(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_raw(void* p, Raw x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void stream_raw(void* p, Raw x) { _mm256_stream_si256(static_cast<__m256i*>(p), x); }
inline void stream_fence() { _mm_sfence(); }
inline Raw zero_raw() { return _mm256_setzero_si256(); }
template <typename T>
inline Raw larger_magnitude(Raw a, Raw b) {
    if constexpr (sizeof(T) == 4)
        return _mm256_max_epu32(a, _mm256_and_si256(b, _mm256_set1_epi32(0x7fffffff)));
    else
        return _mm256_max_epu16(a, _mm256_and_si256(b, _mm256_set1_epi16(0x7fff)));
}
template <typename T>
inline Raw ordered(Raw a) {
    if constexpr (sizeof(T) == 4)
        return _mm256_xor_si256(
            a, _mm256_and_si256(_mm256_srai_epi32(a, 31), _mm256_set1_epi32(0x7fffffff)));
    else
        return _mm256_xor_si256(
            a, _mm256_and_si256(_mm256_srai_epi16(a, 15), _mm256_set1_epi16(0x7fff)));
}
template <typename T>
inline void take_ordered(Raw a, Raw* low, Raw* high) {
    if constexpr (sizeof(T) == 4)
        *low = _mm256_min_epi32(*low, a), *high = _mm256_max_epi32(*high, a);
    else
        *low = _mm256_min_epi16(*low, a), *high = _mm256_max_epi16(*high, a);
}
template <typename T>
inline bool any_nonfinite(Raw magnitudes) {  // no sign bits are set: signed comparison will do
    constexpr int limit = static_cast<int>(element::infinity_bits(T{})) - 1;
    const Raw above =
        sizeof(T) == 4
            ? _mm256_cmpgt_epi32(magnitudes, _mm256_set1_epi32(limit))
            : _mm256_cmpgt_epi16(magnitudes, _mm256_set1_epi16(static_cast<int16_t>(limit)));
    return _mm256_movemask_epi8(above) != 0;
}

inline Codes pack_levels(F32 t0, F32 t1, F32 t2, F32 t3, uint8_t highest) {
    const I32 low = _mm256_packs_epi32(_mm256_cvtps_epi32(t0), _mm256_cvtps_epi32(t1)),
              high = _mm256_packs_epi32(_mm256_cvtps_epi32(t2), _mm256_cvtps_epi32(t3));
    return _mm256_min_epu8(_mm256_packus_epi16(low, high),
                           _mm256_set1_epi8(static_cast<char>(highest)));
}
inline void store_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    store_raw(p, _mm256_permute2x128_si256(a, b, 0x20));
    store_raw(p + 32, _mm256_permute2x128_si256(c, d, 0x20));
    store_raw(p + 64, _mm256_permute2x128_si256(a, b, 0x31));
    store_raw(p + 96, _mm256_permute2x128_si256(c, d, 0x31));
}
inline Codes paired_nibbles(Codes a, Codes b) {
    return _mm256_or_si256(_mm256_permute2x128_si256(a, b, 0x20),
                           _mm256_slli_epi16(_mm256_permute2x128_si256(a, b, 0x31), 4));
}
inline void store_nibble_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    store_raw(p, paired_nibbles(a, b));
    store_raw(p + 32, paired_nibbles(c, d));
}
