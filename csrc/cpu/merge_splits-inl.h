// merge_splits: out = sum_s exp(lse_s - lse) * out_s. Memory-bound: reads each partial row once.

void merge_splits(const MergeSplitsParams& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        float peak = -INFINITY;
        bool defect = false;
        for (int64_t s = 0; s < p.num_splits; ++s) {
            const float lse = p.partial_lse[s * p.num_rows + row];
            peak = lse > peak ? lse : peak;
            defect = defect || lse != lse;
        }
        float* out = p.out + row * p.head_dim;
        for (int64_t d = 0; d < p.head_dim; ++d) out[d] = 0.f;
        if (defect) {  // a part that is not a number makes the whole not a number
            for (int64_t d = 0; d < p.head_dim; ++d) out[d] = NAN;
            p.lse[row] = NAN;
            continue;
        }
        if (peak == -INFINITY) {
            p.lse[row] = -INFINITY;
            continue;
        }
        double total = 0.0;  // sums of at most num_splits terms; double costs nothing here
        for (int64_t s = 0; s < p.num_splits; ++s)
            total += std::exp(double{p.partial_lse[s * p.num_rows + row]} - peak);
        for (int64_t s = 0; s < p.num_splits; ++s) {
            const float lse = p.partial_lse[s * p.num_rows + row];
            if (lse == -INFINITY) continue;  // its partial_out is not read: it may hold anything
            const float weight = static_cast<float>(std::exp(double{lse} - peak) / total);
            const float* part = p.partial_out + (s * p.num_rows + row) * p.head_dim;
            int64_t d = 0;
            for (; d + kLanes <= p.head_dim; d += kLanes)
                store(out + d, fma(load(part + d), broadcast(weight), load(out + d)));
            for (; d < p.head_dim; ++d) out[d] += weight * part[d];
        }
        p.lse[row] = static_cast<float>(peak + std::log(total));
    }
}
