// score_tokens: logits of every visible token, one softmax per scoring vector and query head, votes
// added per KV head.
//
// Floor   bytes = sketch (4.25 bits per channel for int4) or keys of the visible tokens; everything
// after the logits
//         works on one (row, block, kv_head) at a time: columns * seqlen floats of scratch, in
//         cache up to ~128K tokens.
// Plan    1. logits into scratch: sketch blocks for the candidates; keys for sinks, recent tokens
// and what has no codes
//         2. per column: maximum, exp in place, sum: lse        3. scores = sum over columns of exp
//         * 1 / sum
// A work item's arithmetic does not depend on the number of threads, so neither do its bits.

struct ScoreItem {
    int64_t row, block, kv_head;
    BlockRange range;
    int64_t cand_end;     // candidates are [range.sink_end, cand_end)
    int64_t visible;      // tokens in [range.start, range.visible_end)
    int64_t num_columns;  // columns with a finite query
    const float* q;       // their queries, [num_columns, head_dim]
    const float* q_local;
    float* logits;  // [num_columns, stride]
    int64_t stride;
    float* peak;   // [num_columns] maximum logit
    float* total;  // [num_columns] sum of exp(logit - peak), then its inverse
};

template <typename T>
inline void exact_logits(const ScoreTokensParams& p, const ScoreItem& s, const float* q,
                         int64_t begin, int64_t end, const RopeView* rope, int64_t shift) {
    if (begin >= end) return;
    float* out = s.logits + (begin - s.range.start);
#if KVS_HAS_BF16_DOT
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (rope == nullptr && key_logits_bf16(p.keys, s.row, s.kv_head, begin, end, q,
                                               s.num_columns, p.head_dim, p.scale, out, s.stride))
            return;
    }
#endif
    key_logits<T>(p.keys, s.row, s.kv_head, begin, end, q, p.head_dim, s.num_columns, p.head_dim,
                  p.scale, rope, shift, out, s.stride);
}

template <typename T, SketchFormat kFormat>
inline void candidate_logits_from_sketch(const ScoreTokensParams& p, const ScoreItem& s) {
    const int64_t seqlen = p.blocks.cache_seqlens[s.row];
    int64_t position = s.range.sink_end;
    while (position < s.cand_end) {
        const int64_t index = (position - s.range.start) / kSketchBlockTokens;
        const int64_t first = s.range.start + index * kSketchBlockTokens;
        const int64_t next = first + kSketchBlockTokens;
        const int64_t stop = next < s.cand_end ? next : s.cand_end;
        const uint8_t* record = next <= seqlen ? p.sketch.block(s.row, s.kv_head, index) : nullptr;
        const bool has_codes =
            record &&
            element::is_finite(element::to_float(*reinterpret_cast<const Float16*>(record)));
        if (!has_codes) {  // unfinished, or holding something that is not finite
            exact_logits<T>(p, s, s.q, position, stop, nullptr, 0);
        } else if (position == first && stop == next) {
            sketch_block_logits<kFormat>(record, s.q, p.head_dim, s.num_columns, p.head_dim,
                                         p.scale, s.logits + (position - s.range.start), s.stride);
        } else {  // a block that straddles a border: all of it aside, then the part that counts
            for (int64_t c = 0; c < s.num_columns; ++c) {
                float whole[kSketchBlockTokens];
                sketch_block_logits<kFormat>(record, s.q + c * p.head_dim, p.head_dim, 1,
                                             p.head_dim, p.scale, whole, 0);
                std::memcpy(s.logits + c * s.stride + (position - s.range.start),
                            whole + (position - first),
                            sizeof(float) * static_cast<size_t>(stop - position));
            }
        }
        position = stop;
    }
}

// All logits of the item: sinks and recent tokens at their compact ranks if there is a rope table,
// candidates as they are.
template <typename T>
inline void fill_logits(const ScoreTokensParams& p, const ScoreItem& s) {
    const int64_t visible_end = s.range.start + s.visible;
    const int64_t num_sinks = s.range.sink_end - s.range.start;
    const int64_t num_candidates = s.cand_end - s.range.sink_end;
    const int64_t picked = p.keep < num_candidates ? p.keep : num_candidates;
    const RopeView* rope = p.rope.cos ? &p.rope : nullptr;
    exact_logits<T>(p, s, s.q_local, s.range.start, s.range.sink_end, rope, -s.range.start);
    exact_logits<T>(p, s, s.q_local, s.cand_end, visible_end, rope,
                    num_sinks + picked - s.cand_end);
    if (p.sketch.data == nullptr)
        exact_logits<T>(p, s, s.q, s.range.sink_end, s.cand_end, nullptr, 0);
    else if (p.sketch.format == SketchFormat::kInt4)
        candidate_logits_from_sketch<T, SketchFormat::kInt4>(p, s);
    else
        candidate_logits_from_sketch<T, SketchFormat::kInt8>(p, s);
}

// Scores NaN where a finite query met a non-finite logit; such a token weighs nothing in any
// column.
inline int64_t drop_nonfinite_tokens(const ScoreItem& s, float* scores) {
    int64_t dropped = 0;
    for (int64_t i = 0; i < s.visible; ++i) {
        bool finite = true;
        for (int64_t c = 0; c < s.num_columns; ++c)
            finite = finite && element::is_finite(s.logits[c * s.stride + i]);
        if (finite) continue;
        ++dropped;
        scores[i] = NAN;
        for (int64_t c = 0; c < s.num_columns; ++c) s.logits[c * s.stride + i] = -INFINITY;
    }
    return dropped;
}

// Logits to exp(logit - maximum) in place, column by column. False if one held something that was
// not finite.
inline bool weigh(const ScoreItem& s) {
    bool finite = true;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        float lowest;
        s.peak[c] = exp_in_place(s.logits + c * s.stride, s.visible, s.total + c, &lowest);
        finite = finite && element::is_finite(s.total[c]) && lowest != -INFINITY;
    }
    return finite;
}

// out[i] += sum over kCols columns of weight[c][i] * inverse[c]; a NaN mark stays NaN.
template <int kCols>
inline void add_columns(const float* weights, int64_t stride, const float* inverse, int64_t count,
                        float* out) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        F32 sum = load(out + i);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c)
            sum = fma(load(weights + c * stride + i), broadcast(inverse[c]), sum);
        store(out + i, sum);
    }
    for (int64_t i = whole; i < count; ++i)
        for (int c = 0; c < kCols; ++c) out[i] += weights[c * stride + i] * inverse[c];
}

inline void add_all_columns(const ScoreItem& s, int64_t first, int64_t last, const float* inverse,
                            float* out) {
    for (; first + 4 <= last; first += 4)
        add_columns<4>(s.logits + first * s.stride, s.stride, inverse + first, s.visible, out);
    for (; first < last; ++first)
        add_columns<1>(s.logits + first * s.stride, s.stride, inverse + first, s.visible, out);
}

template <typename T>
void score_tokens_of(const ScoreTokensParams& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const int64_t all_columns = p.num_vectors * group;
    for (int64_t item = begin; item < end; ++item) {
        ScoreItem s;
        s.kv_head = item % p.num_kv_heads;
        s.block = item / p.num_kv_heads % p.blocks.num_blocks;
        s.row = item / p.num_kv_heads / p.blocks.num_blocks;
        if (p.hit && p.hit[s.row * p.num_kv_heads + s.kv_head]) continue;
        const int64_t block_index = s.row * p.blocks.num_blocks + s.block;
        s.range = block_range(p.blocks, s.row, s.block);
        const auto at_most = [](int64_t x, int64_t limit) { return x < limit ? x : limit; };
        const int64_t visible_end =
            s.range.visible_end > s.range.start ? s.range.visible_end : s.range.start;
        s.visible = visible_end - s.range.start;
        s.range.sink_end = at_most(s.range.sink_end, visible_end);
        s.cand_end = at_most(s.range.window_start, visible_end);

        float* q = scratch;
        float* q_local = q + all_columns * p.head_dim;
        s.peak = q_local + all_columns * p.head_dim;
        s.total = s.peak + all_columns;
        s.logits = s.total + all_columns;
        s.stride = (s.visible + kLanes - 1) / kLanes * kLanes;
        s.q = q, s.q_local = p.q_local ? q_local : q;

        // Gather the finite queries; a query vector with NaN or inf has no vote.
        float* lse = p.lse + block_index * p.num_vectors * p.num_q_heads;
        int64_t nonfinite = 0;
        int64_t source_column[kMaxScoreColumns];
        s.num_columns = 0;
        for (int64_t column = 0; column < all_columns; ++column) {
            const int64_t vector = column / group, head = s.kv_head * group + column % group;
            const int64_t from =
                ((block_index * p.num_vectors + vector) * p.num_q_heads + head) * p.head_dim;
            lse[vector * p.num_q_heads + head] = -INFINITY;
            if (!all_finite(p.q + from, p.head_dim) ||
                (p.q_local && !all_finite(p.q_local + from, p.head_dim))) {
                ++nonfinite;
                continue;
            }
            const size_t bytes = sizeof(float) * static_cast<size_t>(p.head_dim);
            std::memcpy(q + s.num_columns * p.head_dim, p.q + from, bytes);
            if (p.q_local)
                std::memcpy(q_local + s.num_columns * p.head_dim, p.q_local + from, bytes);
            source_column[s.num_columns++] = column;
        }

        float* row_scores = p.scores + (block_index * p.num_kv_heads + s.kv_head) * p.max_seqlen_k;
        std::memset(row_scores, 0, sizeof(float) * static_cast<size_t>(p.max_seqlen_k));
        float* scores = row_scores + s.range.start;

        // Tokens of the block itself, which have no score: a defect there must not be listed
        // either.
        for (int64_t i = visible_end; i < s.range.end; ++i) {
            float key[kMaxHeadDim];
            const T* from = key_row<T>(p.keys, s.row, i, s.kv_head);
            for (int64_t d = 0; d < p.head_dim; d += kLanes) store(key + d, load(from + d));
            if (all_finite(key, p.head_dim)) continue;
            row_scores[i] = NAN;
            ++nonfinite;
        }

        // A defect shows in the sums, which are needed anyway; only then are the logits made again
        // and looked at.
        fill_logits<T>(p, s);
        if (p.normalise_candidates_only) {
            nonfinite += drop_nonfinite_tokens(s, scores);
            for (int64_t c = 0; c < s.num_columns; ++c) {  // sinks and recent tokens weigh nothing
                float* logits = s.logits + c * s.stride;
                for (int64_t i = 0; i < s.range.sink_end - s.range.start; ++i)
                    logits[i] = -INFINITY;
                for (int64_t i = s.cand_end - s.range.start; i < s.visible; ++i)
                    logits[i] = -INFINITY;
            }
            weigh(s);
        } else if (!weigh(s)) {
            fill_logits<T>(p, s);
            nonfinite += drop_nonfinite_tokens(s, scores);
            weigh(s);
        }
        p.num_nonfinite[block_index * p.num_kv_heads + s.kv_head] = nonfinite;

        for (int64_t c = 0; c < s.num_columns; ++c) {
            const int64_t vector = source_column[c] / group,
                          head = s.kv_head * group + source_column[c] % group;
            if (s.total[c] > 0.f)
                lse[vector * p.num_q_heads + head] = s.peak[c] + std::log(s.total[c]);
            s.total[c] = s.total[c] > 0.f ? 1.f / s.total[c] : 0.f;
        }
        if (!p.max_vote) {
            add_all_columns(s, 0, s.num_columns, s.total, scores);
            continue;
        }
        // Each vector's heads are added up in its first column; the largest of these sums is the
        // score.
        for (int64_t first = 0, last; first < s.num_columns; first = last) {
            const int64_t vector = source_column[first] / group;
            for (last = first + 1; last < s.num_columns && source_column[last] / group == vector;)
                ++last;
            float* sum = s.logits + first * s.stride;
            for (int64_t i = 0; i < s.visible; ++i) sum[i] *= s.total[first];
            add_all_columns(s, first + 1, last, s.total, sum);
            for (int64_t i = 0; i < s.visible; ++i)
                if (sum[i] > scores[i]) scores[i] = sum[i];  // false for a NaN mark: it stays
        }
    }
}

void score_tokens(const ScoreTokensParams& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.dtype) {
        case DType::kFloat32:
            return score_tokens_of<float>(p, begin, end, scratch);
        case DType::kFloat16:
            return score_tokens_of<Float16>(p, begin, end, scratch);
        case DType::kBFloat16:
            return score_tokens_of<BFloat16>(p, begin, end, scratch);
    }
}
