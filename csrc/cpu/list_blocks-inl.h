// list_blocks: blocks become the positions of their tokens. Bytes: one flag read and one entry
// written per listed token.

// Appends those tokens [begin, end) of a block, counted from the row's first, that may be listed.
inline int64_t list_block(const ListBlocksParams& p, const uint8_t* finite, int64_t num_heads,
                          int64_t block, int64_t end_token, int32_t start, int32_t* indices,
                          int64_t length) {
    const int64_t first = block * p.block_size;
    int64_t num_tokens = end_token - first;
    num_tokens = num_tokens < p.block_size ? num_tokens : p.block_size;
    const uint8_t* flags = finite + block * p.finite_strides[2];
    const int32_t place = static_cast<int32_t>(first) + start;
    uint8_t all = 1;
    for (int64_t head = 0; head < num_heads; ++head)
        for (int64_t i = 0; i < num_tokens; ++i) all &= flags[head * p.finite_strides[1] + i];
    if (all && length + num_tokens <= p.width) {
        for (int64_t i = 0; i < num_tokens; ++i)
            indices[length + i] = place + static_cast<int32_t>(i);
        return num_tokens > 0 ? length + num_tokens : length;
    }
    for (int64_t i = 0; i < num_tokens && length < p.width; ++i) {
        uint8_t listed = 1;
        for (int64_t head = 0; head < num_heads; ++head)
            listed &= flags[head * p.finite_strides[1] + i];
        indices[length] = place + static_cast<int32_t>(i);
        length += listed;  // an entry that is not listed is overwritten by the next
    }
    return length;
}

void list_blocks(const ListBlocksParams& p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / p.num_lists, list = item % p.num_lists;
        const int64_t batch_row = row / p.num_query_blocks;
        const int64_t end_token = p.end[row];
        const int32_t start = p.starts ? p.starts[batch_row] : 0;
        const int64_t num_heads = p.num_lists == 1 ? p.num_kv_heads : 1;
        const uint8_t* finite =
            p.finite + batch_row * p.finite_strides[0] + list * p.finite_strides[1];
        int32_t* indices = p.indices + item * p.width;
        int64_t length = 0;
        const int32_t* picked = p.picked + row * p.picked_strides[0] + list * p.picked_strides[1];
        for (int64_t entry = 0; entry < p.num_picked + p.num_window_blocks; ++entry) {
            const int64_t block =
                entry < p.num_picked ? picked[entry] : p.first_block[row] + (entry - p.num_picked);
            if (block >= 0 && block < p.num_blocks)
                length = list_block(p, finite, num_heads, block, end_token, start, indices, length);
        }
        p.count[item] = static_cast<int32_t>(length);
        for (; length < p.width; ++length) indices[length] = -1;
    }
}
