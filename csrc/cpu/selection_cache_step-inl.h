// selection_cache_step: 8 * num_q_heads * head_dim bytes of query and anchor per row, whatever the
// length of the context: 16 to 32 KB, all in L1 or L2.
//
// Plan    eight double sums per product, in two vectors of four, by the compiler's vector
// extension:
//         their order is the definition (selection_cache_step.h), so one code serves all
//         implementations. (Vectors of eight fall apart into scalars for AVX2 with GCC 12: twice
//         the time.)

using Float4 = float __attribute__((vector_size(16)));
using Double4 = double __attribute__((vector_size(32)));

struct EightSums {
    Double4 low = {}, high = {};  // elements 0-3 and 4-7 of every eight
};

struct CosineTerms {
    EightSums qq, aa, qa;
};

inline double in_order(const EightSums& sum) {
    const Double4 pairs = sum.low + sum.high;
    return (pairs[0] + pairs[2]) + (pairs[1] + pairs[3]);
}

// Four floats as doubles. Not returned: without AVX such a vector has no register to come back in.
inline void widen(const float* from, Double4* out) {
    Float4 narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    *out = __builtin_convertvector(narrow, Double4);
}

inline void add_products(const float* q, const float* anchor, int64_t count, CosineTerms* terms) {
    CosineTerms sum = *terms;
    for (int64_t i = 0; i < count; i += 8) {
        Double4 q_low, q_high, a_low, a_high;
        widen(q + i, &q_low), widen(q + i + 4, &q_high);
        widen(anchor + i, &a_low), widen(anchor + i + 4, &a_high);
        sum.qq.low += q_low * q_low, sum.qq.high += q_high * q_high;
        sum.aa.low += a_low * a_low, sum.aa.high += a_high * a_high;
        sum.qa.low += q_low * a_low, sum.qa.high += q_high * a_high;
    }
    *terms = sum;
}

inline bool reaches(const CosineTerms& terms, double threshold) {
    const double norm = __builtin_sqrt(in_order(terms.qq) * in_order(terms.aa));
    return norm > 0.0 && norm < INFINITY && in_order(terms.qa) >= threshold * norm;
}

template <typename T>
void load_query(const SelectionCacheStepParams& p, int64_t row, int64_t head, float* out) {
    const T* from = static_cast<const T*>(p.q) + row * p.q_strides[0] + head * p.q_strides[1];
    for (int64_t d = 0; d < p.head_dim; d += kLanes) store(out + d, load(from + d));
}

template <typename T>
bool is_similar(const SelectionCacheStepParams& p, int64_t row, int64_t list) {
    constexpr int64_t kMaxHeadDim = 512;
    const int64_t num_heads = p.num_q_heads / p.num_lists;
    alignas(64) float q[kMaxHeadDim];
    CosineTerms terms;
    int64_t left = may_differ(p);
    for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t head = list * num_heads + h;
        load_query<T>(p, row, head, q);
        const float* anchor = p.anchor_query + (row * p.num_q_heads + head) * p.head_dim;
        add_products(q, anchor, p.head_dim, &terms);
        if (p.similarity == Similarity::kFlat && h + 1 < num_heads) continue;
        if (!reaches(terms, p.similarity_threshold) && left-- == 0) return false;
        terms = CosineTerms{};
    }
    return true;
}

template <typename T>
void selection_cache_step_of(const SelectionCacheStepParams& p, int64_t begin, int64_t end) {
    const int64_t q_heads = p.num_q_heads / p.num_lists, kv_heads = p.num_kv_heads / p.num_lists;
    for (int64_t row = begin; row < end; ++row) {
        const int32_t seqlen = p.cache_seqlens[row];
        const bool grew_by_one = p.expected_seqlens[row] == seqlen;
        int64_t num_hits = 0;
        for (int64_t list = 0; list < p.num_lists; ++list) {
            const int64_t at = row * p.num_lists + list;
            int64_t defects = 0;
            for (int64_t h = 0; h < kv_heads; ++h)
                defects += p.num_nonfinite[row * p.num_kv_heads + list * kv_heads + h];
            const bool hit = grew_by_one && p.age[at] < p.max_age &&
                             p.known_nonfinite[at] == defects && is_similar<T>(p, row, list);
            p.hit[at] = hit;
            p.age[at] = hit ? p.age[at] + 1 : 0;
            p.known_nonfinite[at] = defects;
            num_hits += hit;
            if (hit) continue;
            for (int64_t head = list * q_heads; head < (list + 1) * q_heads; ++head)
                load_query<T>(p, row, head,
                              p.anchor_query + (row * p.num_q_heads + head) * p.head_dim);
        }
        const int64_t real = seqlen - (p.starts ? p.starts[row] : 0);
        p.expected_seqlens[row] = real > p.dense_limit ? seqlen + 1 : -1;
        // Rows of other threads add to the same two numbers; whole numbers add up in any order.
        __atomic_fetch_add(p.reuse_counts, num_hits, __ATOMIC_RELAXED);
        __atomic_fetch_add(p.reuse_counts + 1, num_hits * kv_heads * (real > 0 ? real : 0),
                           __ATOMIC_RELAXED);
    }
}

void selection_cache_step(const SelectionCacheStepParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
        case DType::kFloat32:
            return selection_cache_step_of<float>(p, begin, end);
        case DType::kFloat16:
            return selection_cache_step_of<Float16>(p, begin, end);
        case DType::kBFloat16:
            return selection_cache_step_of<BFloat16>(p, begin, end);
    }
}
