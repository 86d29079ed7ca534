// Integer dot products of query columns with the codes of a sketch block, by a unit that multiplies
// tiles: tile_* come from the including file.
//
// Unit    int32 C [columns, 16 tokens] += int8 A [columns, k] . uint8 B [k, 16 tokens]. A tile has
//         up to 16 rows of up to 64 bytes, and the unit wants B as k / 4 rows of 16 tokens x 4
//         channels: a 64-byte line of an int8 sketch is such a row, and nothing moves.
// Floor   16 cycles for a product of full tiles (published, Intel's optimisation manual): 1024
//         multiply-adds a cycle where two VNNI ports make 128.
// Plan    Two groups of up to 16 rows of A meet two sub-blocks of B: four sums stay in tiles, and
//         four loads feed four products. int4: 32 columns. int8: the high and the low bytes of 16.
//         head_dim is cut into equal steps of at most 64 channels, so all steps have one shape and
//         one configuration does for a block; int4 codes are unpacked once for all columns.

constexpr int64_t kTileLineBytes = 64;  // a line of the sketch, a row of B
constexpr int64_t kSubBlocks = kSketchBlockTokens / kSketchSubBlockTokens;

// Rows of A: row r holds head_dim bytes at bytes + r * stride.
struct TileGroup {
    const int8_t* bytes;
    int64_t stride;
    int64_t rows;  // 0 .. kTileRows
};

// Steps of head_dim / steps channels, equal and of at most 64. head_dim is a multiple of 16, so
// there are 1 to 4.
inline int64_t tile_steps(int64_t head_dim) {
    const int64_t lines = head_dim / 4;
    int64_t steps = 1;
    while (lines % steps != 0 || lines / steps > kTileRows) ++steps;
    return steps;
}

// The calling thread's tiles, from the first use() to the end of the scope, which lies inside one
// call of a kernel: nothing stays configured on a thread that is not ours, or in a fork. Tiles that
// the caller had are lost, as the calling convention allows.
class TileScope {
public:
    explicit TileScope(int64_t head_dim)
        : step_(static_cast<uint16_t>(head_dim / tile_steps(head_dim))) {}
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    ~TileScope() {
        if (configured_) tile_release();
    }
    // Tiles 0..3: sums of group 0, then group 1, each with two sub-blocks; 4, 5: A; 6, 7: B.
    void use(int64_t rows0, int64_t rows1) {
        const uint8_t rows[2] = {static_cast<uint8_t>(rows0), static_cast<uint8_t>(rows1)};
        if (configured_ && rows[0] == rows_[0] && rows[1] == rows_[1]) return;
        TileConfig config{};
        config.palette = 1;
        for (int group = 0; group < 2; ++group) {
            if (rows[group] == 0) continue;  // a tile has rows and bytes, or neither
            config.rows[2 * group] = config.rows[2 * group + 1] = config.rows[4 + group] =
                rows[group];
            config.row_bytes[2 * group] = config.row_bytes[2 * group + 1] = kTileLineBytes;
            config.row_bytes[4 + group] = step_;
        }
        for (int tile : {6, 7}) {
            config.rows[tile] = static_cast<uint8_t>(step_ / 4);
            config.row_bytes[tile] = kTileLineBytes;
        }
        tile_configure(config);
        rows_[0] = rows[0], rows_[1] = rows[1], configured_ = true;
    }

private:
    uint16_t step_;
    uint8_t rows_[2] = {0, 0};
    bool configured_ = false;
};

// Lines of 8 channels in nibbles to twice as many lines of 4 channels in bytes, in channel order.
inline void unpack_nibbles(const uint8_t* codes, int64_t head_dim, uint8_t* lines) {
    const int64_t count = kSubBlocks * head_dim / 8;
    for (int64_t line = 0; line < count; ++line) {
        const uint8_t* from = codes + line * kTileLineBytes;
        uint8_t* to = lines + 2 * line * kTileLineBytes;
        __builtin_prefetch(from + count * kTileLineBytes + 512);  // about one block ahead
        for (int64_t i = 0; i < kTileLineBytes; ++i) {
            to[i] = from[i] & 15;
            to[kTileLineBytes + i] = from[i] >> 4;
        }
    }
}

template <bool kBothGroups>
inline void multiply_tiles(const uint8_t* lines, int64_t head_dim, const TileGroup& first,
                           const TileGroup& second, int32_t (*out)[kSketchBlockTokens]) {
    constexpr int64_t kOutStride = sizeof *out;
    const int64_t steps = tile_steps(head_dim), channels = head_dim / steps;
    const int64_t step_bytes = channels / 4 * kTileLineBytes, sub_block_bytes = steps * step_bytes;
    for (int64_t sub_block = 0; sub_block < kSubBlocks; sub_block += 2) {
        const uint8_t* codes = lines + sub_block * sub_block_bytes;
        int32_t* sums = out[0] + sub_block * kSketchSubBlockTokens;
        tile_zero<0>();
        tile_zero<1>();
        if constexpr (kBothGroups) {
            tile_zero<2>();
            tile_zero<3>();
        }
        for (int64_t step = 0; step < steps; ++step) {
            tile_load<6>(codes + step * step_bytes, kTileLineBytes);
            tile_load<7>(codes + step * step_bytes + sub_block_bytes, kTileLineBytes);
            tile_load<4>(first.bytes + step * channels, first.stride);
            tile_dot<0, 4, 6>();
            tile_dot<1, 4, 7>();
            if constexpr (kBothGroups) {
                tile_load<5>(second.bytes + step * channels, second.stride);
                tile_dot<2, 5, 6>();
                tile_dot<3, 5, 7>();
            }
        }
        tile_store<0>(sums, kOutStride);
        tile_store<1>(sums + kSketchSubBlockTokens, kOutStride);
        if constexpr (kBothGroups) {
            sums += kTileRows * kSketchBlockTokens;
            tile_store<2>(sums, kOutStride);
            tile_store<3>(sums + kSketchSubBlockTokens, kOutStride);
        }
    }
}

// out[r][t] = row r of `first` . token t, out[kTileRows + r][t] = row r of `second` . token t.
// `lines`: the codes of an int8 block, or what unpack_nibbles made of an int4 one.
inline void tile_dot_block(TileScope& tiles, const uint8_t* lines, int64_t head_dim,
                           const TileGroup& first, const TileGroup& second,
                           int32_t (*out)[kSketchBlockTokens]) {
    tiles.use(first.rows, second.rows);
    if (second.rows > 0)
        multiply_tiles<true>(lines, head_dim, first, second, out);
    else
        multiply_tiles<false>(lines, head_dim, first, second, out);
}
