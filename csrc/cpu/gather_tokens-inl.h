// gather_tokens: listed keys and values, copied side by side.
//
// Floor  4 * head_dim * element size bytes per listed token and KV head: keys and values, read and
//        written.
// Plan   Rows are copied one by one; while a tile's rows are, the next tile's are on their way:
// rows
//        that lie anywhere are bound by latency.

template <typename T>
inline void gather_rows(const GatherTokensParams& p, const GatheredList& list, const KVView& view,
                        bool rotates, T* to) {
    const T* rows[2][kTileTokens];
    const auto point = [&](int64_t first, const T** out) {
        const int64_t left = list.count - first;
        const int64_t tokens = left < 0 ? 0 : (left < kTileTokens ? left : kTileTokens);
        for (int64_t i = 0; i < tokens; ++i)
            out[i] = key_row<T>(view, list.row, list.entries[first + i], list.kv_head);
        return tokens;
    };
    const int64_t row_bytes = p.head_dim * int64_t{sizeof(T)};
    int64_t tokens = point(0, rows[0]);
    for (int64_t first = 0, turn = 0; tokens > 0; first += kTileTokens, turn ^= 1) {
        const int64_t next = point(first + kTileTokens, rows[turn ^ 1]);
        const Upcoming upcoming{as_bytes(rows[turn ^ 1]), next, row_bytes, true};
        for (int64_t i = 0; i < tokens; ++i) {
            upcoming.fetch(i);
            T* row = to + (first + i) * p.head_dim;
            if (!rotates) {
                __builtin_memcpy(row, rows[turn][i], static_cast<size_t>(row_bytes));
                continue;
            }
            float rotated[kMaxHeadDim];
            rotate_row(rows[turn][i], p.rope, first + i, p.head_dim, rotated);
            for (int64_t d = 0; d < p.head_dim; d += kLanes) store(row + d, load(rotated + d));
        }
        tokens = next;
    }
}

template <typename T>
inline void gather_lists(const GatherTokensParams& p, int64_t begin, int64_t end) {
    int64_t at = 0;
    for (int64_t number = 0; number < begin; ++number) at += gathered_list(p, number).count;
    for (int64_t number = begin; number < end; ++number) {
        const GatheredList list = gathered_list(p, number);
        p.cu_seqlens[number] = static_cast<int32_t>(at);
        gather_rows<T>(p, list, p.keys, p.rope.cos != nullptr,
                       static_cast<T*>(p.k) + at * p.head_dim);
        gather_rows<T>(p, list, p.values, false, static_cast<T*>(p.v) + at * p.head_dim);
        at += list.count;
        if (number + 1 == gather_tokens_lists(p))
            p.cu_seqlens[number + 1] = static_cast<int32_t>(at);
    }
}

void gather_tokens(const GatherTokensParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return gather_lists<float>(p, begin, end);
        case DType::kFloat16:
            return gather_lists<Float16>(p, begin, end);
        case DType::kBFloat16:
            return gather_lists<BFloat16>(p, begin, end);
    }
}
