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
