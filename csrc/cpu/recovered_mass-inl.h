// recovered_mass: one exact pass over the keys, then a sum of the listed weights. A measuring tool,
// not a fast path.

template <typename T>
void recovered_mass_of(const RecoveredMassParams& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const int64_t stride = p.max_seqlen_k;
    float* q = scratch;                             // [group, head_dim]
    float* weights = scratch + group * p.head_dim;  // [group, max_seqlen_k]
    for (int64_t item = begin; item < end; ++item) {
        const int64_t kv_head = item % p.num_kv_heads;
        const int64_t query = item / p.num_kv_heads % p.blocks.seqlen_q;
        const int64_t row = item / p.num_kv_heads / p.blocks.seqlen_q;
        int64_t block = 0;
        while (p.blocks.offsets && block + 1 < p.blocks.num_blocks &&
               p.blocks.offsets[block + 1] <= query)
            ++block;
        const BlockRange range = block_range(p.blocks, row, block);
        const int64_t position = p.blocks.cache_seqlens[row] - p.blocks.seqlen_q + query;
        const int64_t visible = position + 1 - range.start;
        float* mass = p.mass + (row * p.blocks.seqlen_q + query) * p.num_q_heads + kv_head * group;
        if (visible <= 0) {
            for (int64_t h = 0; h < group; ++h) mass[h] = 1.f;
            continue;
        }
        for (int64_t h = 0; h < group; ++h) {
            const T* from = static_cast<const T*>(p.q) + row * p.q_strides[0] +
                            query * p.q_strides[1] + (kv_head * group + h) * p.q_strides[2];
            for (int64_t d = 0; d < p.head_dim; d += kLanes)
                store(q + h * p.head_dim + d, load(from + d));
        }
        key_logits<T>(p.keys, row, kv_head, range.start, position + 1, position + 1, q, p.head_dim,
                      group, p.head_dim, p.softmax_scale * kLog2E, nullptr, 0, weights, stride);
        const int32_t* list = p.indices + row * p.indices_strides[0] +
                              block * p.indices_strides[1] + kv_head * p.indices_strides[2];
        const int64_t count =
            p.topk_length[row * p.topk_length_strides[0] + block * p.topk_length_strides[1] +
                          kv_head * p.topk_length_strides[2]];
        for (int64_t h = 0; h < group; ++h) {
            float* weight = weights + h * stride;
            float total;
            cap_logits(weight, visible, p.softcap);
            exp2_in_place(weight, visible, &total);
            double kept = 0.0;
            for (int64_t i = 0; i < count && list[i] <= position; ++i)
                if (list[i] >= range.start) kept += weight[list[i] - range.start];
            const float share = static_cast<float>(kept / total);
            mass[h] = share > 1.f ? 1.f : share;  // NaN stays
        }
    }
}

void recovered_mass(const RecoveredMassParams& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.dtype) {
        case DType::kFloat32:
            return recovered_mass_of<float>(p, begin, end, scratch);
        case DType::kFloat16:
            return recovered_mass_of<Float16>(p, begin, end, scratch);
        case DType::kBFloat16:
            return recovered_mass_of<BFloat16>(p, begin, end, scratch);
    }
}
