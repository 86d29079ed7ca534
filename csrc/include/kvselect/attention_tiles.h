// What blocks of bfloat16 queries work in on a CPU with a tile unit (cpu/attention_tiles-inl.h).
#pragma once

#include <cstdint>

namespace kvselect {

constexpr int64_t kTiledTokens = 256;  // of one pass
constexpr int64_t kTiledRows = 32;     // of one panel: two tiles

// Fewer rows are not worth laying keys and values out for a tile unit.
constexpr int64_t kMinTiledRows = 16;

inline int64_t attention_tiles_padded_rows(int64_t rows) {
    return (rows + kTiledRows - 1) / kTiledRows * kTiledRows;
}
// Channels of keys and queries: whole tiles of 32.
inline int64_t attention_tiles_padded_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// Scratch of a thread.
inline int64_t attention_tiles_floats(int64_t rows, int64_t head_dim) {
    const int64_t padded = attention_tiles_padded_rows(rows),
                  channels = attention_tiles_padded_dim(head_dim);
    const int64_t queries = padded * channels / 2, sums = padded * (head_dim + 2);
    const int64_t keys = kTiledTokens * channels / 2, values = kTiledTokens * head_dim / 2;
    const int64_t logits = kTiledRows * kTiledTokens, weights = logits / 2;
    return queries + sums + keys + values + logits + weights + 16;  // 16: begins at a cache line
}

}  // namespace kvselect
