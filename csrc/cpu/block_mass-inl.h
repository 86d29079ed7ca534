// block_mass: exact weights of keys summed per (q block, KV block), without a value read.
//
// Floor   2 * head_dim flops per counted query and visible key.
// Plan    One pass over the keys. Every KV block keeps a maximum and a sum of its own for each
//         query, so that the normaliser, cached or made of them at the end, comes in afterwards.

template <typename T>
void block_mass_of(const BlockMassParams& p, int64_t item, float* scratch) {
    const BlockGrid& g = p.grid;
    const QueryRows r = query_rows(g, item, p.row_stride);
    const int64_t num_kv_blocks = g.num_kv_blocks(), rows = whole_lanes(r.count);
    const int64_t limit = (r.visible_end + g.kv_block_size - 1) / g.kv_block_size;
    float* panels = scratch;
    float* peaks = panels + rows * g.head_dim;  // [limit, rows]
    float* sums = peaks + rows * num_kv_blocks;
    float* lse = sums + rows * num_kv_blocks;  // [rows], base 2
    float* keys = lse + 2 * rows;              // [kTileTokens, head_dim]
    float* logits = keys + kTileTokens * g.head_dim;
    float* mass = p.mass + item * num_kv_blocks;
    for (int64_t b = limit; b < num_kv_blocks; ++b) mass[b] = 0.f;
    if (limit == 0) return;
    load_panels<T>(g, r, Upcoming{}, panels);
    for (int64_t i = 0; i < limit * rows; ++i) peaks[i] = -INFINITY, sums[i] = 0.f;
    const int64_t full_end = r.full_end(g.causal);
    for (int64_t b = 0; b < limit; ++b) {
        const int64_t behind = (b + 1) * g.kv_block_size;
        const int64_t stop = behind < r.visible_end ? behind : r.visible_end;
        for (int64_t at = b * g.kv_block_size; at < stop; at += kTileTokens) {
            const int64_t tokens = stop - at < kTileTokens ? stop - at : kTileTokens;
            int64_t positions[kTileTokens];
            for (int64_t t = 0; t < tokens; ++t) positions[t] = at + t;
            const T* from = key_row<T>(g.keys, r.row, at, r.kv_head);
            for (int64_t t = 0; t < tokens; ++t)
                load_row(from + t * g.keys.token_stride, g.head_dim, keys + t * g.head_dim);
            for (int64_t first = 0; first < r.count; first += kPanelQueries) {
                const int64_t width = panel_width(r.count, first);
                panel_logits(g, r, panels, first, width, keys, tokens,
                             at + tokens <= full_end ? nullptr : positions, logits);
                panel_softmax<false>(logits, tokens, width, peaks + b * rows + first,
                                     sums + b * rows + first, nullptr);
            }
        }
    }
    if (p.lse) {
        for (int64_t i = 0; i < rows; ++i)
            lse[i] = i < r.count ? kLog2E * p.lse[r.row * p.lse_strides[0] +
                                                  (r.first + i * r.stride) * p.lse_strides[1] +
                                                  r.head * p.lse_strides[2]]
                                 : 0.f;
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            float peak = kLowest, total = 0.f;
            for (int64_t b = 0; b < limit; ++b)
                peak = peaks[b * rows + i] > peak ? peaks[b * rows + i] : peak;
            for (int64_t b = 0; b < limit; ++b)
                total += sums[b * rows + i] * exp2(peaks[b * rows + i] - peak);
            lse[i] = total == 0.f ? -INFINITY : peak + std::log2(total);
        }
    }
    for (int64_t b = 0; b < limit; ++b) {
        float sum = 0.f;
        for (int64_t i = 0; i < r.count; ++i) {
            // A query that sees nothing, or saw nothing when its lse was taken, counts nothing.
            if (lse[i] == -INFINITY || sums[b * rows + i] == 0.f) continue;
            const float exponent = peaks[b * rows + i] - lse[i];
            sum += sums[b * rows + i] * (exponent > 126.f ? INFINITY : exp2(exponent));
        }
        mass[b] = sum;
    }
}

void block_mass(const BlockMassParams& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t item = begin; item < end; ++item) switch (p.grid.dtype) {
            case DType::kFloat32:
                block_mass_of<float>(p, item, scratch);
                break;
            case DType::kFloat16:
                block_mass_of<Float16>(p, item, scratch);
                break;
            case DType::kBFloat16:
                block_mass_of<BFloat16>(p, item, scratch);
                break;
        }
}
