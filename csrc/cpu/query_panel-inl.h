// Logits of a block of queries against tiles of keys, keys down and queries across: the queries are
// transposed once per block instead of the keys of every tile, and the softmax over keys runs down
// the lanes without a horizontal step.

constexpr int64_t kPanelQueries = 64;  // a strip of a transposed panel fits the first-level cache

// Some queries of one block, at equal distances.
struct QueryRows {
    int64_t row, head, kv_head;
    int64_t first, count, stride;  // query `first + i * stride`, i in [0, count)
    int64_t position;              // of query `first`; negative where it sees nothing
    int64_t visible_end;           // positions that the last one sees: [0, visible_end)

    // Positions below this are seen by all of them.
    int64_t full_end(bool causal) const {
        if (!causal) return visible_end;
        const int64_t end = position + 1;
        return end < 0 ? 0 : (end < visible_end ? end : visible_end);
    }
    // Queries that do not see a position come first: how many.
    int64_t blind_to(int64_t at) const {
        const int64_t behind = at - position;
        const int64_t blind = behind <= 0 ? 0 : (behind + stride - 1) / stride;
        return blind < count ? blind : count;
    }
};

// Of a work item: the last query of its block and every `stride`-th before it; count 0 where the
// block lies beyond the row's queries.
inline QueryRows query_rows(const BlockGrid& g, int64_t item, int64_t stride) {
    QueryRows r;
    const int64_t block = item % g.num_q_blocks();
    r.head = item / g.num_q_blocks() % g.num_q_heads;
    r.row = item / g.num_q_blocks() / g.num_q_heads;
    r.kv_head = r.head / (g.num_q_heads / g.num_kv_heads);
    const int64_t begin = block * g.q_block_size, seqlen_q = g.row_seqlen_q(r.row);
    const int64_t all = seqlen_q - begin, size = all < g.q_block_size ? all : g.q_block_size;
    r.stride = stride;
    r.count = size > 0 ? (size + stride - 1) / stride : 0;
    r.first = begin + (size > 0 ? (size - 1) % stride : 0);
    const int64_t seqlen_k = g.row_seqlen_k(r.row), last = begin + size - 1;
    r.position = seqlen_k - seqlen_q + r.first;
    const int64_t seen = g.causal ? seqlen_k - seqlen_q + last + 1 : seqlen_k;
    r.visible_end = r.count == 0 || seen < 0 ? 0 : seen;
    return r;
}

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The panels of a block lie behind each other: panel at `first` holds queries [first, first +
// width).
inline int64_t panel_width(int64_t count, int64_t first) {
    return count - first < kPanelQueries ? whole_lanes(count - first) : kPanelQueries;
}

// Scaled queries, panel by panel [head_dim, width], the last query repeated where the last is
// wider. Meanwhile the rows of `upcoming` are fetched.
template <typename T>
inline void load_panels(const BlockGrid& g, const QueryRows& r, const Upcoming& upcoming,
                        float* out) {
    int64_t fetched = 0;
    const int64_t steps = whole_lanes(r.count), rows_a_step = (upcoming.count + steps - 1) / steps;
    const F32 scale = broadcast(g.softmax_scale * kLog2E);
    for (int64_t first = 0; first < r.count; first += kPanelQueries) {
        const int64_t width = panel_width(r.count, first);
        float* panel = out + first * g.head_dim;
        for (int64_t i = 0; i < width; i += kLanes) {  // whole registers of the panel at a time
            const T* from[kLanes];
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const int64_t at = first + i + lane;
                const int64_t query = r.first + (at < r.count ? at : r.count - 1) * r.stride;
                from[lane] = static_cast<const T*>(g.q) + r.row * g.q_strides[0] +
                             query * g.q_strides[1] + r.head * g.q_strides[2];
                for (int64_t n = 0; n < rows_a_step; ++n) upcoming.fetch(fetched++);
            }
            for (int64_t d = 0; d < g.head_dim; d += kLanes) {
                F32 block[kLanes];
#pragma GCC unroll 16
                for (int lane = 0; lane < kLanes; ++lane)
                    block[lane] = mul(load(from[lane] + d), scale);
                transpose(block);
#pragma GCC unroll 16
                for (int j = 0; j < kLanes; ++j) store(panel + (d + j) * width + i, block[j]);
            }
        }
    }
}

template <typename T>
inline void load_row(const T* from, int64_t head_dim, float* out) {
    for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(from + d));
}

// Logits [tokens, width] in units of ln 2 of the panel whose first query is `first`; positions:
// [tokens] ascending, or nullptr where all queries see all of them. `between`: of matmul_tall.
template <typename Between = Nothing>
inline void panel_logits(const BlockGrid& g, const QueryRows& r, const float* panels, int64_t first,
                         int64_t width, const float* keys, int64_t tokens, const int64_t* positions,
                         float* logits, const Between& between = {}) {
    matmul_tall<false, Left::kRows>(tokens, keys, g.head_dim, panels + first * g.head_dim, width,
                                    g.head_dim, logits, width, between);
    cap_logits(logits, tokens * width, g.softcap);
    if (positions == nullptr) return;
    for (int64_t t = 0; t < tokens; ++t) {
        const int64_t blind = r.blind_to(positions[t]) - first;
        for (int64_t i = 0; i < blind && i < width; ++i) logits[t * width + i] = -INFINITY;
    }
}

// A stand-in for the maximum of logits that are all -inf: -inf - kLowest is -inf, not NaN.
constexpr float kLowest = -3e38f;

// Softmax with the queries of a panel across: peak and total [width] go on over these logits;
// kWeights: logits become 2^(logit - peak), and factor [width] what earlier sums are to be
// multiplied by. NaN is ignored by the peak but not by the total, so that a defect shows.
template <bool kWeights>
inline void panel_softmax(float* logits, int64_t tokens, int64_t width, float* peak, float* total,
                          float* factor) {
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32 before = load(peak + i);
        F32 top = before;
        for (int64_t t = 0; t < tokens; ++t) top = max(load(logits + t * width + i), top);
        const F32 reference = max(top, broadcast(kLowest));
        F32 sum = broadcast(0.f);
        for (int64_t t = 0; t < tokens; ++t) {
            const F32 weight = exp2(sub(load(logits + t * width + i), reference));
            if constexpr (kWeights) store(logits + t * width + i, weight);
            sum = add(sum, weight);
        }
        const F32 scale = exp2(sub(before, reference));
        store(peak + i, top);
        store(total + i, fma(load(total + i), scale, sum));
        if constexpr (kWeights) store(factor + i, scale);
    }
}
