// sketch_block_logits on a tile unit: for blocks that meet many query columns. The integer sums are
// exact and the floating-point operations those of scan_part, so both give the same bits.

// Columns from which on tiles are used. Modelled for int4 at head_dim 128: 128 cycles a column on
// two VNNI ports, against about 250 to unpack, 200 to configure and 45 a column on tiles.
constexpr int64_t kMinTileColumns = 8;

template <SketchFormat kFormat>
inline void sketch_block_logits_by_tiles(const uint8_t* record, const float* q, int64_t q_stride,
                                         int64_t num_columns, int64_t head_dim, float scale,
                                         float* out, int64_t stride) {
    constexpr bool kTwoBytes = kFormat == SketchFormat::kInt8;
    constexpr int64_t kColumns = kTwoBytes ? kTileRows : 2 * kTileRows;
    const uint8_t* lines = record + 4 * head_dim;
    alignas(64) uint8_t unpacked[kTwoBytes ? 1 : kSketchBlockTokens * kMaxHeadDim];
    if constexpr (!kTwoBytes) {
        unpack_nibbles(lines, head_dim, unpacked);
        lines = unpacked;
    }
    SketchQueries<kColumns> queries;
    alignas(64) int32_t dots[2 * kTileRows][kSketchBlockTokens];
    TileScope tiles(head_dim);
    for (int64_t begin = 0; begin < num_columns; begin += kColumns) {
        const int64_t count = num_columns - begin < kColumns ? num_columns - begin : kColumns;
        for (int64_t c = 0; c < count; c += kSketchColumns) {
            const float* columns[kSketchColumns];
            pick_columns(q, q_stride, begin + c, num_columns, columns);
            quantise_queries<kFormat>(columns, record, head_dim, scale, &queries, c);
        }
        const int64_t rows = count < kTileRows ? count : kTileRows;
        const TileGroup first{queries.high, kMaxHeadDim, rows};
        const TileGroup second = kTwoBytes ? TileGroup{queries.low, kMaxHeadDim, rows}
                                           : TileGroup{queries.high + kTileRows * kMaxHeadDim,
                                                       kMaxHeadDim, count - rows};
        tile_dot_block(tiles, lines, head_dim, first, second, dots);
        for (int64_t c = 0; c < count; ++c) {
            const F32 mul = broadcast(queries.mul[c]), add = broadcast(queries.add[c]);
            for (int64_t t = 0; t < kSketchBlockTokens; t += kLanes) {
                F32 sum = to_f32(load(dots[c] + t));
                if constexpr (kTwoBytes)
                    sum = fma(sum, broadcast(256.f), to_f32(load(dots[kTileRows + c] + t)));
                store(out + (begin + c) * stride + t, fma(sum, mul, add));
            }
        }
    }
}
