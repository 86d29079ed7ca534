// kv_append: copy the new rows into the cache, then quantise every 128-token block that became
// complete.

// One block of one (row, kv_head) into its sketch record (layout: sketch.h). Every step is an IEEE
// float32 operation of fixed order, so the codes are the same bits in every implementation and in
// kvselect/sketch.py.
template <typename T>
void sketch_block(const KvAppendParams& p, int64_t row, int64_t kv_head, int64_t index) {
    const int64_t head_dim = p.head_dim;
    const float levels = static_cast<float>(sketch_levels(p.sketch.format));
    uint8_t* record = p.sketch.block(row, kv_head, index);
    Float16* step_out = reinterpret_cast<Float16*>(record);
    Float16* lo_out = step_out + head_dim;
    uint8_t* codes_out = record + 4 * head_dim;

    const T* rows[kSketchBlockTokens];
    const int64_t start = p.starts ? p.starts[row] : 0;
    row_pointers(p.k_cache, row, start + index * kSketchBlockTokens, kSketchBlockTokens, kv_head,
                 rows);
    float lo[kMaxHeadDim], divisor[kMaxHeadDim];
    bool usable = true;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        F32 low = load(rows[0] + d), high = low, finite = broadcast(0.f);
        for (int64_t t = 0; t < kSketchBlockTokens; ++t) {
            const F32 x = load(rows[t] + d);
            low = min(x, low);
            high = max(x, high);
            finite = fma(x, broadcast(0.f), finite);
        }
        usable = usable && reduce_add(finite) == 0.f;
        store(lo + d, low);
        store(lo_out + d, low);
        store(step_out + d, div(sub(high, low), broadcast(levels)));
    }
    for (int64_t d = 0; d < head_dim; ++d) {
        lo[d] = element::to_float(lo_out[d]);
        const float step = element::to_float(step_out[d]);
        usable = usable && element::is_finite(lo[d]) && element::is_finite(step);
        divisor[d] =
            step > 0.f ? step : INFINITY;  // a constant channel: (k - lo) / inf = 0, code 0
    }
    if (!usable) {
        std::memset(record, 0, static_cast<size_t>(sketch_block_bytes(p.sketch.format, head_dim)));
        step_out[0].bits = 0x7e00;  // NaN: score this block from its keys
        return;
    }
    for (int64_t t = 0; t < kSketchBlockTokens; ++t) {
        uint8_t codes[kMaxHeadDim];
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            const F32 level =
                round_even(div(sub(load(rows[t] + d), load(lo + d)), load(divisor + d)));
            store_bytes(codes + d, min(max(level, broadcast(0.f)), broadcast(levels)));
        }
        const int64_t sub_block = t / kSketchSubBlockTokens, slot = t % kSketchSubBlockTokens;
        if (p.sketch.format == SketchFormat::kInt8) {
            const int64_t lines = head_dim / 4;
            for (int64_t line = 0; line < lines; ++line)
                std::memcpy(codes_out + (sub_block * lines + line) * 64 + slot * 4,
                            codes + line * 4, 4);
        } else {
            const int64_t lines = head_dim / 8;
            for (int64_t line = 0; line < lines; ++line) {
                uint8_t* out = codes_out + (sub_block * lines + line) * 64 + slot * 4;
                for (int64_t i = 0; i < 4; ++i)
                    out[i] =
                        static_cast<uint8_t>(codes[line * 8 + i] | codes[line * 8 + 4 + i] << 4);
            }
        }
    }
}

template <typename T>
void kv_append_of(const KvAppendParams& p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / p.num_kv_heads, kv_head = item % p.num_kv_heads;
        const int64_t before = p.seqlens_before[row];
        const int64_t count = p.num_valid ? p.num_valid[row] : p.num_new;
        int64_t nonfinite = 0;
        for (int64_t t = 0; t < count; ++t) {
            const T* k = static_cast<const T*>(p.k) + row * p.k_strides[0] + t * p.k_strides[1] +
                         kv_head * p.k_strides[2];
            const T* v = static_cast<const T*>(p.v) + row * p.v_strides[0] + t * p.v_strides[1] +
                         kv_head * p.v_strides[2];
            T* k_out = static_cast<T*>(p.k_cache.data) + p.k_cache.offset(row, before + t, kv_head);
            T* v_out = static_cast<T*>(p.v_cache.data) + p.v_cache.offset(row, before + t, kv_head);
            F32 finite = broadcast(0.f);
            for (int64_t d = 0; d < p.head_dim; d += kLanes) {
                finite = fma(load(k + d), broadcast(0.f), finite);
                finite = fma(load(v + d), broadcast(0.f), finite);
            }
            nonfinite += !(reduce_add(finite) == 0.f);
            std::memcpy(k_out, k, sizeof(T) * static_cast<size_t>(p.head_dim));
            std::memcpy(v_out, v, sizeof(T) * static_cast<size_t>(p.head_dim));
        }
        p.num_nonfinite[row * p.num_kv_heads + kv_head] += nonfinite;
        if (p.sketch.data == nullptr) continue;
        const int64_t start = p.starts ? p.starts[row] : 0;
        const int64_t first = before > start ? (before - start) / kSketchBlockTokens : 0;
        const int64_t complete = (before + count - start) / kSketchBlockTokens;
        for (int64_t block = first; block < complete; ++block)
            sketch_block<T>(p, row, kv_head, block);
    }
}

void kv_append(const KvAppendParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return kv_append_of<float>(p, begin, end);
        case DType::kFloat16:
            return kv_append_of<Float16>(p, begin, end);
        case DType::kBFloat16:
            return kv_append_of<BFloat16>(p, begin, end);
    }
}
