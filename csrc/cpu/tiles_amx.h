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
