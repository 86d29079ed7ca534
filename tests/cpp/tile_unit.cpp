#include "tile_unit.h"

#include <cmath>
#include <cstring>

#include "check.h"

namespace kvselect::test {

void TileUnit::configure(const void* memory) {
    cpu::TileConfig config;
    std::memcpy(&config, memory, sizeof config);
    EXPECT(config.palette <= 1, "#GP: palette ", int{config.palette});
    if (config.palette == 0) return release();
    EXPECT(config.start_row < cpu::kTileRows, "#GP: start_row ", int{config.start_row});
    EXPECT(config.start_row == 0, "this unit restarts no interrupted load");
    for (uint8_t byte : config.reserved) EXPECT(byte == 0, "#GP: reserved byte");
    for (int tile = 0; tile < 16; ++tile) {
        const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
        if (tile >= cpu::kNumTiles) {
            EXPECT(rows == 0 && row_bytes == 0, "#GP: tile ", tile, " does not exist");
            continue;
        }
        EXPECT(rows <= cpu::kTileRows && row_bytes <= cpu::kTileBytes, "#GP: tile ", tile, " has ",
               rows, " rows of ", row_bytes, " bytes");
        EXPECT((rows == 0) == (row_bytes == 0), "#GP: tile ", tile, " has ", rows, " rows of ",
               row_bytes, " bytes");
    }
    for (int tile = 0; tile < cpu::kNumTiles; ++tile)
        tiles_[tile] = Tile{config.rows[tile], config.row_bytes[tile], {}};
    palette_ = config.palette;
    ++num_configurations_;
}

void TileUnit::release() {
    palette_ = 0;
    for (Tile& tile : tiles_) tile = Tile{};
}

const TileUnit::Tile& TileUnit::usable(int tile) const {
    EXPECT(configured(), "#UD: no palette");
    EXPECT(tile >= 0 && tile < cpu::kNumTiles && tiles_[tile].rows > 0, "#UD: tile ", tile,
           " is not configured");
    EXPECT(tiles_[tile].row_bytes % 4 == 0, "#UD: tile ", tile, " has no whole dwords");
    return tiles_[tile];
}

void TileUnit::zero(int tile) {
    Tile& t = usable(tile);
    std::memset(t.data, 0, sizeof t.data);
}

void TileUnit::load(int tile, const void* from, int64_t stride) {
    Tile& t = usable(tile);
    std::memset(t.data, 0, sizeof t.data);  // what lies outside the configured shape becomes 0
    for (int64_t row = 0; row < t.rows; ++row)
        std::memcpy(t.data[row], static_cast<const uint8_t*>(from) + row * stride,
                    static_cast<size_t>(t.row_bytes));
}

void TileUnit::store(int tile, void* to, int64_t stride) const {
    const Tile& t = usable(tile);
    for (int64_t row = 0; row < t.rows; ++row)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, t.data[row],
                    static_cast<size_t>(t.row_bytes));
}

void TileUnit::require_fitting(int sum, int first, int second) const {
    EXPECT(sum != first && sum != second && first != second, "#UD: a tile twice");
    const Tile &c = usable(sum), &a = usable(first), &b = usable(second);
    EXPECT(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes / 4 == b.rows, "#UD: [",
           c.rows, ", ", c.row_bytes, "] += [", a.rows, ", ", a.row_bytes, "] . [", b.rows, ", ",
           b.row_bytes, "]");
}

void TileUnit::dot_signed_unsigned(int sum, int first, int second) {
    require_fitting(sum, first, second);
    Tile& c = usable(sum);
    const Tile &a = usable(first), &b = usable(second);
    for (int64_t m = 0; m < c.rows; ++m) {
        uint32_t row[cpu::kTileBytes / 4] = {};  // the unit wraps: it does not saturate
        std::memcpy(row, c.data[m], static_cast<size_t>(c.row_bytes));
        for (int64_t k = 0; k < a.row_bytes / 4; ++k)
            for (int64_t n = 0; n < c.row_bytes / 4; ++n)
                for (int64_t i = 0; i < 4; ++i)
                    row[n] += static_cast<uint32_t>(static_cast<int8_t>(a.data[m][4 * k + i]) *
                                                    int32_t{b.data[k][4 * n + i]});
        std::memset(c.data[m], 0, sizeof c.data[m]);
        std::memcpy(c.data[m], row, static_cast<size_t>(c.row_bytes));
    }
    for (int64_t m = c.rows; m < cpu::kTileRows; ++m) std::memset(c.data[m], 0, sizeof c.data[m]);
    ++num_dots_;
}

void TileUnit::dot_bfloat16(int sum, int first, int second) {
    require_fitting(sum, first, second);
    Tile& c = usable(sum);
    const Tile &a = usable(first), &b = usable(second);
    const auto number = [](const uint8_t* at) {  // subnormal: 0
        uint16_t bits;
        std::memcpy(&bits, at, sizeof bits);
        const uint32_t wide = (bits & 0x7f80 ? bits : bits & 0x8000u) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    };
    for (int64_t m = 0; m < c.rows; ++m) {
        float row[cpu::kTileBytes / 4] = {};
        std::memcpy(row, c.data[m], static_cast<size_t>(c.row_bytes));
        for (int64_t k = 0; k < a.row_bytes / 4; ++k)
            for (int64_t n = 0; n < c.row_bytes / 4; ++n)
                for (int64_t i = 0; i < 2; ++i)
                    row[n] = std::fma(number(a.data[m] + 4 * k + 2 * i),
                                      number(b.data[k] + 4 * n + 2 * i), row[n]);
        std::memset(c.data[m], 0, sizeof c.data[m]);
        std::memcpy(c.data[m], row, static_cast<size_t>(c.row_bytes));
    }
    for (int64_t m = c.rows; m < cpu::kTileRows; ++m) std::memset(c.data[m], 0, sizeof c.data[m]);
    ++num_dots_;
}

TileUnit& tile_unit() {
    thread_local TileUnit unit;
    return unit;
}

}  // namespace kvselect::test
