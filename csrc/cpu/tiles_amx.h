// The tile unit of AMX. The same names, in plain C++: tests/cpp/tiles_emulated.h.
//
// Instructions by hand: GCC 12's intrinsics are the same asm, but tell the compiler neither which
// memory a tile load or the whole of a configuration reads, nor that it must be written before; and
// as macros that paste the tile's number they take no template argument.

// Eight empty tiles of these shapes, on this thread.
inline void tile_configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config));
}
// Back to no tiles: from here on the kernel has nothing to save for this thread.
inline void tile_release() { asm volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Row r of the tile is the memory at from + r * stride [bytes].
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += over k, i: int8 a[m][4 k + i] * uint8 b[k][4 n + i], in int32.
template <int kSum, int kA, int kB>
inline void tile_dot() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
// sum[m][n] += over k, i: bfloat16 a[m][2 k + i] * b[k][2 n + i], in float32; subnormal numbers
// count as 0.
template <int kSum, int kA, int kB>
inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// How bfloat16 operands are laid out: a tile's row holds two channels (or tokens) of 16 columns.

// Channels [begin, begin + 32) of 16 rows, of which `left` exist: pair k of row n becomes pair n of
// row k.
inline void transpose_pairs(const BFloat16* const* rows, int64_t begin, int64_t left,
                            BFloat16* out) {
    const auto there = static_cast<__mmask16>(left >= 32 ? 0xffff : (1u << left / 2) - 1);
    F32 x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_maskz_loadu_ps(there, rows[i] + begin);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 32 * i, _mm512_castps_si512(x[i]));
}
// 16 elements of two rows in turn.
inline void interleave(const BFloat16* even, const BFloat16* odd, BFloat16* out) {
    const I32 low =
                  _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even))),
              high =
                  _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    _mm512_store_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
