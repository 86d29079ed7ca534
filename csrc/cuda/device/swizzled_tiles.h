// Tiles of 16-bit elements as Hopper's copy engine writes them and its tensor cores read them, and
// the rings that they travel in: arithmetic only, so that it is tested on the host.
//
// A tile is cut into panels of 64 channels, a row of a panel is 128 bytes. In a panel the 16-byte
// chunks of a row are turned against each other by the row's number ("128-byte swizzle"): bits 4..6
// of the address are XORed with bits 7..9, so panels begin at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#include "kvselect/host_device.h"

namespace kvselect::cuda {

constexpr int kPanelChannels = 64, kPanelRowBytes = 128, kTurnBytes = 1024;
constexpr int kGroupThreads = 128;  // a warpgroup: what one product is made by
constexpr int kProductRows = 64;    // of A and of the result
constexpr int kProductDepth = 16;   // k of one instruction, 16-bit elements

// Where byte `offset` of a panel lies; also of an address, as panels begin at multiples of 1024.
KVS_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset) {
    return offset ^ (offset >> 3 & 0x70u);
}

// Byte offset of channel `channel` of row `row`, in a tile of `rows` rows.
KVS_HOST_DEVICE constexpr uint32_t element_offset(int rows, int row, int channel) {
    return static_cast<uint32_t>(channel / kPanelChannels * rows * kPanelRowBytes) +
           swizzled(static_cast<uint32_t>(row * kPanelRowBytes + channel % kPanelChannels * 2));
}

// The 64 bits that name an operand in shared memory: address, distance of panels ("leading"),
// distance of eight rows ("stride"), each in units of 16 bytes, and the kind of swizzle (1: 128).
KVS_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address, uint32_t panel_bytes) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return (address >> 4 & 0x3fffu) | uint64_t{panel_bytes >> 4 & 0x3fffu} << 16 |
           uint64_t{kTurnBytes >> 4} << 32 | kSwizzle128;
}

// A tile whose rows are the product's rows or columns and whose channels are k (queries and keys):
// what step `step` of 16 channels adds to the descriptor. Inside a panel the address moves by 32
// bytes: the rows' bits, which turn the chunks, stay.
KVS_HOST_DEVICE constexpr uint64_t step_along_channels(int rows, int step) {
    constexpr int kStepsPerPanel = kPanelChannels / kProductDepth;
    return static_cast<uint64_t>(step / kStepsPerPanel * rows * kPanelRowBytes +
                                 step % kStepsPerPanel * 2 * kProductDepth) >>
           4;
}
// A tile whose rows are k and whose channels are the product's columns (values): 16 rows further.
KVS_HOST_DEVICE constexpr uint64_t step_along_rows(int step) {
    return static_cast<uint64_t>(step * kProductDepth * kPanelRowBytes) >> 4;
}

// Register i of a thread's share of a product of 64 rows: which row and column that is.
KVS_HOST_DEVICE constexpr int share_row(int thread, int i) {
    return thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
}
KVS_HOST_DEVICE constexpr int share_column(int thread, int i) {
    return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// A place of a ring, and the parity of the round that it is in. Who fills waits for the round
// before (`phase ^ 1`: passes in the first round) of the barrier that says "empty", who empties for
// `phase` of the one that says "full".
struct RingPlace {
    int place = 0;
    uint32_t phase = 0;

    template <int kPlaces>
    KVS_HOST_DEVICE constexpr void advance() {
        if (++place == kPlaces) {
            place = 0;
            phase ^= 1u;
        }
    }
};

}  // namespace kvselect::cuda
