// How every kernel sees cached keys or values: strides in elements, and an optional page table.
#pragma once

#include <cstdint>

#include "kvselect/host_device.h"

namespace kvselect {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Keys or values, [num_blocks, page_block_size, num_kv_heads, head_dim] with any strides and a
// contiguous last dim. A contiguous cache is one page per sequence: block_table == nullptr,
// page_block_size = capacity in tokens.
struct KVView {
    void* data;                  // borrowed; written by kv_append only
    int64_t page_stride;         // elements
    int64_t token_stride;        // elements, inside a page
    int64_t head_stride;         // elements
    int64_t page_block_size;     // tokens per page
    const int32_t* block_table;  // [batch, max_num_blocks] or nullptr
    int64_t block_table_stride;  // elements between rows

    // Element offset of (row, position, kv_head); int64 throughout: tokens * heads * head_dim
    // passes 2^31.
    [[gnu::always_inline]] KVS_HOST_DEVICE int64_t offset(int64_t row, int64_t position,
                                                          int64_t kv_head) const {
        const int64_t page = position / page_block_size;
        const int64_t slot = position - page * page_block_size;
        const int64_t physical =
            block_table ? int64_t{block_table[row * block_table_stride + page]} : row + page;
        return physical * page_stride + slot * token_stride + kv_head * head_stride;
    }
};

}  // namespace kvselect
