// list_blocks: the tokens of chosen blocks and of a window of blocks, as one ascending list.
#pragma once

#include <cstdint>

#include "kvselect/cuda_launch.h"

namespace kvselect {

// A row is a query block of a row of the batch. Its blocks are counted from the first real token of
// the batch row; the lists hold positions in the batch row.
struct ListBlocksParams {
    int64_t num_rows, num_query_blocks, num_lists, num_picked, num_window_blocks;
    const int32_t*
        picked;  // [num_rows, num_lists, num_picked], ascending below the window, then -1
    int64_t picked_strides[2];   // elements: row, list
    const int32_t* first_block;  // [num_rows] of the window
    const int32_t* end;          // [num_rows] tokens at or behind it are not listed
    const int32_t* starts;       // [batch] or nullptr: 0

    int64_t num_kv_heads, num_blocks, block_size;
    // [batch, num_kv_heads, num_blocks, block_size] 0: the token is not listed. With one list for
    // all heads, one head's 0 is enough.
    const uint8_t* finite;
    int64_t finite_strides[3];  // elements: batch, head, block

    int64_t width;     // what does not fit is not written and not counted
    int32_t* indices;  // [num_rows, num_lists, width], -1 behind the last
    int32_t* count;    // [num_rows, num_lists]
};

// Work items are lists: [0, num_rows * num_lists).
using ListBlocksFn = void (*)(const ListBlocksParams&, int64_t begin, int64_t end);

namespace cuda {
void list_blocks(const ListBlocksParams&, const CudaLaunch&);
}

}  // namespace kvselect
