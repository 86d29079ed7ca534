// The 64 bytes that give a tile unit the shapes of its tiles, as LDTILECFG reads them.
#pragma once

#include <cstdint>

namespace kvselect::cpu {

constexpr int64_t kTileRows = 16;   // of one tile, at most
constexpr int64_t kTileBytes = 64;  // of one row, at most
constexpr int kNumTiles = 8;

struct alignas(64) TileConfig {
    uint8_t palette;  // 1: eight tiles of 1 KB; 0: none
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];  // of tiles 0..7; the rest is reserved
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

}  // namespace kvselect::cpu
