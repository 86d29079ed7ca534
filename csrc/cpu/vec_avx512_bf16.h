// What BF16 adds to vec_avx512.h: a dot product of bfloat16 pairs with float32 sums.

using Bf16Pairs = __m512bh;  // 32 elements
inline Bf16Pairs load_pairs(const BFloat16* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
inline F32 dot_pairs(F32 acc, Bf16Pairs a, Bf16Pairs b) { return _mm512_dpbf16_ps(acc, a, b); }
// Of numbers that are not subnormal: rounded as by store(), in one instruction.
inline void store_weights(BFloat16* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
