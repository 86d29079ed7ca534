// Rotary position embedding as a table: cos and sin of every position, in float32.
#pragma once

#include <cstdint>

namespace kvselect {

struct RopeView {
    const float*
        cos;  // [num_positions, num_pairs], or nullptr: keys and queries are used as they are
    const float* sin;  // [num_positions, num_pairs]
    int64_t num_positions;
    int64_t num_pairs;
    int64_t start;     // first rotated channel; channels [start, start + 2 * num_pairs) rotate
    bool interleaved;  // pair i is channels (2i, 2i + 1) of the rotated span; otherwise (i, i +
                       // num_pairs)
};

}  // namespace kvselect
