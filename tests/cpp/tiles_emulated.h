// The tile unit of csrc/cpu/tiles_amx.h in plain C++. Included inside a namespace of its own.

inline void tile_configure(const TileConfig& config) { test::tile_unit().configure(&config); }
inline void tile_release() { test::tile_unit().release(); }
template <int kTile>
inline void tile_zero() {
    test::tile_unit().zero(kTile);
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
    test::tile_unit().load(kTile, from, stride);
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
    test::tile_unit().store(kTile, to, stride);
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
    test::tile_unit().dot_signed_unsigned(kSum, kA, kB);
}
template <int kSum, int kA, int kB>
inline void tile_dot_bf16() {
    test::tile_unit().dot_bfloat16(kSum, kA, kB);
}
inline void transpose_pairs(const BFloat16* const* rows, int64_t begin, int64_t left,
                            BFloat16* out) {
    for (int64_t k = 0; k < 16; ++k)
        for (int64_t n = 0; n < 16; ++n)
            for (int64_t i = 0; i < 2; ++i)
                out[32 * k + 2 * n + i] =
                    2 * k + i < left ? rows[n][begin + 2 * k + i] : BFloat16{0};
}
inline void interleave(const BFloat16* even, const BFloat16* odd, BFloat16* out) {
    for (int64_t i = 0; i < 16; ++i) out[2 * i] = even[i], out[2 * i + 1] = odd[i];
}
