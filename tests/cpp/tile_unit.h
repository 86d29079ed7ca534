// A tile unit in plain C++, by the definition of the instructions in the Intel SDM (volume 2,
// LDTILECFG to TILEZERO; volume 1, "Programming with Intel AMX"): what they compute, in their
// order, and when they fault. A fault throws.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/tile_config.h"

namespace kvselect::test {

class TileUnit {
public:
    void configure(const void* config);                     // LDTILECFG
    void release();                                         // TILERELEASE
    void zero(int tile);                                    // TILEZERO
    void load(int tile, const void* from, int64_t stride);  // TILELOADD
    void store(int tile, void* to, int64_t stride) const;   // TILESTORED
    void dot_signed_unsigned(int sum, int a, int b);        // TDPBSUD
    void dot_bfloat16(int sum, int a, int b);               // TDPBF16PS

    bool configured() const { return palette_ != 0; }
    int64_t num_dots() const { return num_dots_; }
    int64_t num_configurations() const { return num_configurations_; }

private:
    struct Tile {
        int64_t rows, row_bytes;
        uint8_t data[cpu::kTileRows][cpu::kTileBytes];
    };
    const Tile& usable(int tile) const;
    void require_fitting(int sum, int a, int b) const;
    Tile& usable(int tile) { return const_cast<Tile&>(std::as_const(*this).usable(tile)); }

    int palette_ = 0;
    Tile tiles_[cpu::kNumTiles] = {};
    int64_t num_dots_ = 0, num_configurations_ = 0;
};

// The calling thread's, as in hardware.
TileUnit& tile_unit();

}  // namespace kvselect::test
