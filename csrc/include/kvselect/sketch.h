// The sketch: a low-bit copy of the keys that is scanned instead of them. Layout of one block.
//
// Unit: 128 consecutive tokens of one row and KV head. Record, in bytes, in this order:
//   step  float16[head_dim]      per channel: (max - min) / levels, rounded to float16
//   lo    float16[head_dim]      per channel: min, rounded to float16
//   codes uint8[...]             eight sub-blocks of 16 tokens. A 64-byte line holds 16 tokens x 4
//   bytes, token-major:
//         int4: line l of a sub-block = channels 8l..8l+7; byte i of a token: low nibble channel
//         8l+i, high nibble 8l+4+i int8: line l of a sub-block = channels 4l..4l+3; byte i of a
//         token: channel 4l+i
// step[0] = NaN says that the block has no codes (a key in it is not finite, or its range leaves
// float16): such a block is scored from the keys themselves, so nothing is lost and nothing is
// hidden.
#pragma once

#include <cstdint>

#include "kvselect/host_device.h"

namespace kvselect {

enum class SketchFormat : int32_t { kNone = 0, kInt4 = 4, kInt8 = 8 };

constexpr int64_t kSketchBlockTokens = 128;
constexpr int64_t kSketchSubBlockTokens = 16;

[[gnu::always_inline]] KVS_HOST_DEVICE inline constexpr int64_t sketch_levels(SketchFormat format) {
    return format == SketchFormat::kInt4 ? 15 : 255;
}

[[gnu::always_inline]] KVS_HOST_DEVICE inline constexpr int64_t sketch_code_bytes(
    SketchFormat format, int64_t head_dim) {
    return format == SketchFormat::kNone
               ? 0
               : kSketchBlockTokens * head_dim * static_cast<int64_t>(format) / 8;
}

[[gnu::always_inline]] KVS_HOST_DEVICE inline constexpr int64_t sketch_block_bytes(
    SketchFormat format, int64_t head_dim) {
    return format == SketchFormat::kNone ? 0 : 4 * head_dim + sketch_code_bytes(format, head_dim);
}

// The sketch of a cache, [batch, num_kv_heads, max_blocks, block_bytes] uint8, last dim contiguous.
// Blocks follow logical positions: block i of a row holds its real tokens [128 i, 128 i + 128),
// counted from the first one (left padding never shares a block with them), whatever pages the keys
// lie in.
// Where every page holds whole blocks, a record may lie with its page instead, so that rows which
// share a page share its records: [num_pages, num_kv_heads, page_blocks, block_bytes], found by the
// block table of the keys.
struct SketchView {
    uint8_t* data;  // nullptr: no sketch
    SketchFormat format;
    int64_t row_stride, head_stride, block_stride;  // bytes; of a page where there is a table
    const int32_t* block_table = nullptr;  // of the keys, where records lie with their page
    int64_t block_table_stride = 0;        // elements between rows
    int64_t page_blocks = 1;               // blocks per page

    [[gnu::always_inline]] KVS_HOST_DEVICE uint8_t* block(int64_t row, int64_t kv_head,
                                                          int64_t index) const {
        if (block_table) {
            const int64_t page = index / page_blocks;
            row = block_table[row * block_table_stride + page];
            index -= page * page_blocks;
        }
        return data + row * row_stride + kv_head * head_stride + index * block_stride;
    }
};

}  // namespace kvselect
