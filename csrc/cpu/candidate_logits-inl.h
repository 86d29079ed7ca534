// What score_tokens and rolling_sweep share: logits of positions from their keys, and of a block or
// some of it from its sketch.

// Logits of positions [begin, end) of a row; the keys up to `horizon` are used next. In bfloat16
// products where keys and queries are bfloat16 and nothing is rotated.
template <typename T>
inline void logits_from_keys(const KVView& keys, int64_t row, int64_t kv_head, int64_t begin,
                             int64_t end, int64_t horizon, const float* q, int64_t num_columns,
                             int64_t head_dim, float scale, const RopeView* rope, int64_t shift,
                             float* out, int64_t stride) {
#if KVS_HAS_BF16_DOT
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (rope == nullptr && key_logits_bf16(keys, row, kv_head, begin, end, horizon, q,
                                               num_columns, head_dim, scale, out, stride))
            return;
    }
#endif
    key_logits<T>(keys, row, kv_head, begin, end, horizon, q, head_dim, num_columns, head_dim,
                  scale, rope, shift, out, stride);
}

// Whether a whole block's record holds codes: none are made of keys that are not finite.
inline bool has_codes(const uint8_t* record) {
    return element::is_finite(element::to_float(*reinterpret_cast<const Float16*>(record)));
}

// out[c * stride + i] for tokens begin + i < end of the block; `ahead` as in sketch_block_logits.
template <SketchFormat kFormat>
inline void logits_from_block(const uint8_t* record, int64_t begin, int64_t end, const float* q,
                              int64_t num_columns, int64_t head_dim, float scale, float* out,
                              int64_t stride, int64_t ahead = kSketchAhead) {
    if (end - begin == kSketchBlockTokens)
        return sketch_block_logits<kFormat>(record, q, head_dim, num_columns, head_dim, scale, out,
                                            stride, ahead);
    // The block straddles a border: all of it aside, then the part that counts.
    float whole[kSketchColumns * kSketchBlockTokens];
    for (int64_t c = 0; c < num_columns; c += kSketchColumns) {
        const int64_t left = num_columns - c;
        const int64_t some = left < kSketchColumns ? left : kSketchColumns;
        sketch_block_logits<kFormat>(record, q + c * head_dim, head_dim, some, head_dim, scale,
                                     whole, kSketchBlockTokens);
        for (int64_t i = 0; i < some; ++i)
            std::memcpy(out + (c + i) * stride, whole + i * kSketchBlockTokens + begin,
                        sizeof(float) * static_cast<size_t>(end - begin));
    }
}
