// score_tokens: logits of every visible token, one softmax per scoring vector and query head, votes
// added per KV head.
//
// Floor   bytes = sketch (4.25 bits per channel for int4) or keys of the visible tokens.
// Plan    1. kWeigh, tile by tile in cache: logits (sketch blocks for the candidates; keys for
//         sinks, recent tokens and what has no codes), then per column the maximum m of the tile,
//         2^(logit - m) and its sum
//         2. kVote: lse of each column from the tiles' maxima and sums; scores = sum over columns
//         of weight * 2^(m - lse)
// With many columns (prefill) nothing but maxima and sums is kept, and kVote makes the logits
// again: they would leave the cache twice, and the codes of a part stay in it.

struct ScoreItem {
    int64_t row, block, kv_head;
    BlockRange range;
    int64_t cand_end;     // candidates are [range.sink_end, cand_end)
    int64_t visible_end;  // tokens in [range.start, visible_end)
    int64_t num_columns;  // columns with a finite query
    const float* q;       // their queries, [num_columns, head_dim]
    const float* q_local;
    float scale;          // of logits in units of ln 2
    float* logits;        // [num_columns, kScoreTileTokens] of one tile
    float *lse, *factor;  // [num_columns] log2 of the sum of 2^logit; of one tile
    int64_t num_tiles;
    int64_t tile_stride;  // floats between columns of the two arrays that follow
    float *peak,
        *total;  // [num_columns, num_tiles]; what a tile's weights are relative to, their sum
    float* num_dropped;  // [num_tiles] tokens with a logit that is not finite
    bool keeps_weights;
    bool plain_logits;  // no logit made of codes can be infinite
    float* weights;     // [num_columns, tile_stride * kScoreTileTokens]
    int16_t source_column[kMaxScoreColumns];

    int64_t tile_begin(int64_t tile) const { return range.start + tile * kScoreTileTokens; }
    int64_t tile_end(int64_t tile) const {
        const int64_t end = tile_begin(tile + 1);
        return end < visible_end ? end : visible_end;
    }
};

// Logits of one tile, [num_columns, kScoreTileTokens].
struct ScoreTile {
    int64_t begin, end;  // positions
    float* out;
};

// Logits of positions [begin, end) from their keys; the tile's other keys, up to `horizon`, follow.
template <typename T>
inline void exact_logits(const ScoreTokensParams& p, const ScoreItem& s, const ScoreTile& tile,
                         const float* q, int64_t begin, int64_t end, int64_t horizon,
                         const RopeView* rope, int64_t shift) {
    begin = begin > tile.begin ? begin : tile.begin;
    end = end < tile.end ? end : tile.end;
    if (begin >= end) return;
    float* out = tile.out + (begin - tile.begin);
    logits_from_keys<T>(p.keys, s.row, s.kv_head, begin, end, horizon, q, s.num_columns, p.head_dim,
                        s.scale, rope, shift, out, kScoreTileTokens);
}

template <typename T, SketchFormat kFormat>
inline void candidate_logits_from_sketch(const ScoreTokensParams& p, const ScoreItem& s,
                                         const ScoreTile& tile) {
    const int64_t seqlen = p.blocks.cache_seqlens[s.row];
    int64_t position = s.range.sink_end > tile.begin ? s.range.sink_end : tile.begin;
    const int64_t end = s.cand_end < tile.end ? s.cand_end : tile.end;
    while (position < end) {
        const int64_t index = (position - s.range.start) / kSketchBlockTokens;
        const int64_t first = s.range.start + index * kSketchBlockTokens;
        const int64_t next = first + kSketchBlockTokens;
        const int64_t stop = next < end ? next : end;
        const uint8_t* record = next <= seqlen ? p.sketch.block(s.row, s.kv_head, index) : nullptr;
        if (record && has_codes(record))
            logits_from_block<kFormat>(record, position - first, stop - first, s.q, s.num_columns,
                                       p.head_dim, s.scale, tile.out + (position - tile.begin),
                                       kScoreTileTokens);
        else  // unfinished, or holding something that is not finite
            exact_logits<T>(p, s, tile, s.q, position, stop, stop, nullptr, 0);
        position = stop;
    }
}

// All logits of a tile: sinks and recent tokens at their compact ranks if there is a rope table,
// candidates as they are.
template <typename T>
inline void fill_logits(const ScoreTokensParams& p, const ScoreItem& s, const ScoreTile& tile) {
    const int64_t num_sinks = s.range.sink_end - s.range.start;
    const int64_t num_candidates = s.cand_end - s.range.sink_end;
    const int64_t picked = p.keep < num_candidates ? p.keep : num_candidates;
    const RopeView* rope = p.rope.cos ? &p.rope : nullptr;
    exact_logits<T>(p, s, tile, s.q_local, s.range.start, s.range.sink_end, s.range.sink_end, rope,
                    -s.range.start);
    exact_logits<T>(p, s, tile, s.q_local, s.cand_end, s.visible_end, s.visible_end, rope,
                    num_sinks + picked - s.cand_end);
    if (p.sketch.data == nullptr)
        exact_logits<T>(p, s, tile, s.q, s.range.sink_end, s.cand_end, s.cand_end, nullptr, 0);
    else if (p.sketch.format == SketchFormat::kInt4)
        candidate_logits_from_sketch<T, SketchFormat::kInt4>(p, s, tile);
    else
        candidate_logits_from_sketch<T, SketchFormat::kInt8>(p, s, tile);
}

// A token with a logit that is not finite weighs nothing in any column; `dropped` says which.
inline int64_t drop_nonfinite_tokens(const ScoreItem& s, const ScoreTile& tile, bool* dropped) {
    int64_t count = 0;
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
        dropped[i] = false;
        for (int64_t c = 0; c < s.num_columns; ++c)
            dropped[i] = dropped[i] || !element::is_finite(tile.out[c * kScoreTileTokens + i]);
        if (!dropped[i]) continue;
        ++count;
        for (int64_t c = 0; c < s.num_columns; ++c) tile.out[c * kScoreTileTokens + i] = -INFINITY;
    }
    return count;
}

// "candidates": sinks and recent tokens weigh nothing.
inline void drop_all_but_candidates(const ScoreItem& s, const ScoreTile& tile) {
    for (int64_t c = 0; c < s.num_columns; ++c)
        for (int64_t i = tile.begin; i < tile.end; ++i)
            if (i < s.range.sink_end || i >= s.cand_end)
                tile.out[c * kScoreTileTokens + (i - tile.begin)] = -INFINITY;
}

// Logits of a tile with every defect dropped; returns how many tokens had one. `suspicious`: look
// for them.
template <typename T>
inline int64_t clean_logits(const ScoreTokensParams& p, const ScoreItem& s, const ScoreTile& tile,
                            bool suspicious, bool* dropped) {
    fill_logits<T>(p, s, tile);
    for (int64_t c = 0; c < s.num_columns; ++c)
        cap_logits(tile.out + c * kScoreTileTokens, tile.end - tile.begin, p.softcap);
    const int64_t count = suspicious ? drop_nonfinite_tokens(s, tile, dropped) : 0;
    if (p.normalise_candidates_only) drop_all_but_candidates(s, tile);
    return count;
}

// Logits to 2^(logit - maximum), column by column, `stride` entries apart. False if one was not
// finite.
inline bool weigh_columns(const ScoreItem& s, int64_t tile_index, const ScoreTile& tile,
                          float* weights, int64_t stride) {
    bool finite = true;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        float lowest;
        float* total = s.total + c * s.tile_stride + tile_index;
        s.peak[c * s.tile_stride + tile_index] =
            exp2_of(tile.out + c * kScoreTileTokens, tile.end - tile.begin, weights + c * stride,
                    total, &lowest);
        finite = finite && element::is_finite(*total) && lowest != -INFINITY;
    }
    return finite;
}

// Whether no logit of the columns can leave float32 when it is made of codes, whose keys are
// float16 numbers: |lo + step * code| stays below 2^16 + 255 * 2^16.
inline bool code_logits_are_finite(const ScoreItem& s, int64_t head_dim) {
    float most = 0.f;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        F32 sum = broadcast(0.f);
        for (int64_t d = 0; d < head_dim; d += kLanes)
            sum = add(sum, abs(load(s.q + c * head_dim + d)));
        most = std::fmax(most, reduce_add(sum));
    }
    return most * std::fabs(s.scale) < 0x1p100f;
}

inline float largest(const float* x, int64_t count) {  // of whole registers
    F32 top = load(x);
    for (int64_t i = kLanes; i < count; i += kLanes) top = max(load(x + i), top);
    return reduce_max(top);
}

// The weights of a tile that is all candidates and whole blocks with codes, without a pass for its
// maxima: weighed against those of its first block. False, with nothing settled, where the tile is
// not of that kind or its logits rise too far above the first block's.
template <SketchFormat kFormat>
inline bool weigh_codes(const ScoreTokensParams& p, const ScoreItem& s, int64_t index,
                        float* weights, int64_t stride) {
    constexpr int64_t kBlocks = kScoreTileTokens / kSketchBlockTokens;
    const int64_t begin = s.tile_begin(index), end = begin + kScoreTileTokens;
    if (begin < s.range.sink_end || end > s.cand_end || end > p.blocks.cache_seqlens[s.row])
        return false;
    float peak[kMaxKeptScoreColumns], total[kMaxKeptScoreColumns] = {};
    alignas(64) float logits[kMaxKeptScoreColumns * kSketchBlockTokens];
    for (int64_t b = 0; b < kBlocks; ++b) {
        const uint8_t* record = p.sketch.block(s.row, s.kv_head, index * kBlocks + b);
        if (!has_codes(record)) return false;
        sketch_block_logits<kFormat>(record, s.q, p.head_dim, s.num_columns, p.head_dim, s.scale,
                                     logits, kSketchBlockTokens);
        for (int64_t c = 0; c < s.num_columns; ++c) {
            float* column = logits + c * kSketchBlockTokens;
            cap_logits(column, kSketchBlockTokens, p.softcap);
            if (b == 0) peak[c] = largest(column, kSketchBlockTokens);
            total[c] += exp2_against(column, peak[c], kSketchBlockTokens,
                                     weights + c * stride + b * kSketchBlockTokens);
        }
    }
    for (int64_t c = 0; c < s.num_columns; ++c)
        if (!(total[c] < 0x1p60f)) return false;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        s.peak[c * s.tile_stride + index] = peak[c];
        s.total[c * s.tile_stride + index] = total[c];
    }
    s.num_dropped[index] = 0.f;
    return true;
}

inline bool weigh_codes_of(const ScoreTokensParams& p, const ScoreItem& s, int64_t index,
                           float* weights, int64_t stride) {
    if (p.sketch.data == nullptr || !s.keeps_weights || !s.plain_logits) return false;
    return p.sketch.format == SketchFormat::kInt4
               ? weigh_codes<SketchFormat::kInt4>(p, s, index, weights, stride)
               : weigh_codes<SketchFormat::kInt8>(p, s, index, weights, stride);
}

template <typename T>
inline void weigh_tile(const ScoreTokensParams& p, const ScoreItem& s, int64_t index) {
    const ScoreTile tile{s.tile_begin(index), s.tile_end(index), s.logits};
    float* weights = s.logits;
    int64_t stride = kScoreTileTokens;
    if (s.keeps_weights) {
        weights = s.weights + index * kScoreTileTokens;
        stride = s.tile_stride * kScoreTileTokens;
    }
    if (weigh_codes_of(p, s, index, weights, stride)) return;
    bool dropped[kScoreTileTokens];
    // A defect shows in the sums, which are needed anyway; only then are the logits made again and
    // looked at. Where -inf is put on purpose, they are looked at in any case.
    bool suspicious = p.normalise_candidates_only;
    int64_t count = clean_logits<T>(p, s, tile, suspicious, dropped);
    if (!weigh_columns(s, index, tile, weights, stride) && !suspicious) {
        suspicious = true;
        count = clean_logits<T>(p, s, tile, suspicious, dropped);
        weigh_columns(s, index, tile, weights, stride);
    }
    s.num_dropped[index] = static_cast<float>(count);
    if (count > 0 && s.keeps_weights)  // the votes' first column carries the mark
        for (int64_t i = 0; i < tile.end - tile.begin; ++i)
            if (dropped[i]) weights[i] = NAN;
}

// log2 of each column's sum of 2^logit over all tiles, in their order.
inline void merge_tiles(const ScoreTokensParams& p, const ScoreItem& s) {
    const bool has_sinks = p.sink_logits && !p.normalise_candidates_only;
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        const float* peaks = s.peak + c * s.tile_stride;
        const float* totals = s.total + c * s.tile_stride;
        float peak = -INFINITY;
        for (int64_t t = 0; t < s.num_tiles; ++t) peak = peaks[t] > peak ? peaks[t] : peak;
        s.lse[c] = -INFINITY;
        if (peak == -INFINITY) continue;
        const int64_t whole = s.num_tiles / kLanes * kLanes;
        F32 sums = broadcast(0.f);
        for (int64_t t = 0; t < whole; t += kLanes)
            sums = fma(load(totals + t), exp2(sub(load(peaks + t), broadcast(peak))), sums);
        float sum = reduce_add(sums);
        for (int64_t t = whole; t < s.num_tiles; ++t) sum += totals[t] * exp2(peaks[t] - peak);
        s.lse[c] = peak + std::log2(sum);
        if (has_sinks)
            s.lse[c] =
                with_sink(s.lse[c], p.sink_logits[s.kv_head * group + s.source_column[c] % group]);
    }
}

// out[i] (+)= sum over kCols columns of weight[c][i] * factor[c].
template <int kCols, bool kAccumulate>
inline void add_columns(const float* weights, int64_t stride, const float* factor, int64_t count,
                        float* out) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        F32 sum = kAccumulate ? load(out + i) : broadcast(0.f);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c)
            sum = fma(load(weights + c * stride + i), broadcast(factor[c]), sum);
        store(out + i, sum);
    }
    for (int64_t i = whole; i < count; ++i) {
        float sum = kAccumulate ? out[i] : 0.f;
        for (int c = 0; c < kCols; ++c) sum += weights[c * stride + i] * factor[c];
        out[i] = sum;
    }
}

// Sum of columns [first, last), at least one of them.
inline void sum_columns(const float* weights, int64_t stride, int64_t first, int64_t last,
                        const float* factor, int64_t count, float* out) {
    const auto from = [&](int64_t c) { return weights + c * stride; };
    int64_t c = first;
    if (last - first >= 4) {
        add_columns<4, false>(from(c), stride, factor + c, count, out);
        c += 4;
    } else {
        add_columns<1, false>(from(c), stride, factor + c, count, out);
        c += 1;
    }
    for (; c + 4 <= last; c += 4) add_columns<4, true>(from(c), stride, factor + c, count, out);
    for (; c < last; ++c) add_columns<1, true>(from(c), stride, factor + c, count, out);
}

// Scores of a tile from its weights, times a factor per column.
inline void add_votes(const ScoreTokensParams& p, const ScoreItem& s, const float* weights,
                      int64_t stride, int64_t count, float* scores) {
    if (!p.max_vote) return sum_columns(weights, stride, 0, s.num_columns, s.factor, count, scores);
    // Each vector's heads are added up; the largest of these sums is the score.
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    float sum[kScoreTileTokens];
    for (int64_t first = 0, last; first < s.num_columns; first = last) {
        const int64_t vector = s.source_column[first] / group;
        for (last = first + 1; last < s.num_columns && s.source_column[last] / group == vector;)
            ++last;
        sum_columns(weights, stride, first, last, s.factor, count, first == 0 ? scores : sum);
        if (first == 0) continue;  // a mark in it stays: comparisons with NaN are false
        for (int64_t i = 0; i < count; ++i)
            if (sum[i] > scores[i]) scores[i] = sum[i];
    }
}

// Logits to 2^(logit - lse) in place.
inline void weigh_column(float* column, int64_t count, float lse) {
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        store(column + i, exp2(sub(load(column + i), broadcast(lse))));
    for (int64_t i = whole; i < count; ++i) column[i] = exp2(column[i] - lse);
}

template <typename T>
inline void vote_tile(const ScoreTokensParams& p, const ScoreItem& s, int64_t index,
                      float* row_scores) {
    const ScoreTile tile{s.tile_begin(index), s.tile_end(index), s.logits};
    const int64_t count = tile.end - tile.begin;
    float* scores = row_scores + tile.begin;
    if (s.num_columns == 0) {
        for (int64_t i = 0; i < count; ++i) scores[i] = 0.f;
        return;
    }
    if (s.keeps_weights) {
        float exponent[kMaxKeptScoreColumns] = {};
        for (int64_t c = 0; c < s.num_columns; ++c)
            exponent[c] =
                s.lse[c] == -INFINITY ? -INFINITY : s.peak[c * s.tile_stride + index] - s.lse[c];
        for (int64_t c = 0; c < s.num_columns; c += kLanes)
            store(s.factor + c, exp2(load(exponent + c)));
        const float* weights = s.weights + index * kScoreTileTokens;
        return add_votes(p, s, weights, s.tile_stride * kScoreTileTokens, count, scores);
    }
    bool dropped[kScoreTileTokens];
    const bool has_dropped = s.num_dropped[index] > 0.f;
    clean_logits<T>(p, s, tile, has_dropped, dropped);
    for (int64_t c = 0; c < s.num_columns; ++c) {
        weigh_column(tile.out + c * kScoreTileTokens, count,
                     s.lse[c] == -INFINITY ? 0.f : s.lse[c]);
        s.factor[c] = 1.f;
    }
    add_votes(p, s, tile.out, kScoreTileTokens, count, scores);
    for (int64_t i = 0; has_dropped && i < count; ++i)
        if (dropped[i]) scores[i] = NAN;
}

// What does not belong to any tile: lse, tokens without a score, the count of defects.
template <typename T>
inline void finish_item(const ScoreTokensParams& p, const ScoreItem& s, int64_t nonfinite_queries,
                        float* row_scores) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    const int64_t block_index = s.row * p.blocks.num_blocks + s.block;
    float* lse = p.lse + block_index * p.num_vectors * p.num_q_heads;
    for (int64_t vector = 0; vector < p.num_vectors; ++vector)
        for (int64_t h = 0; h < group; ++h)
            lse[vector * p.num_q_heads + s.kv_head * group + h] = -INFINITY;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        const int64_t vector = s.source_column[c] / group,
                      head = s.kv_head * group + s.source_column[c] % group;
        lse[vector * p.num_q_heads + head] = s.lse[c] * kLn2;
    }
    for (int64_t i = 0; i < s.range.start; ++i) row_scores[i] = 0.f;
    for (int64_t i = s.visible_end; i < p.max_seqlen_k; ++i) row_scores[i] = 0.f;
    // Tokens of the block itself, which have no score: a defect there must not be listed either.
    int64_t nonfinite = nonfinite_queries;
    for (int64_t i = s.visible_end; i < s.range.end; ++i) {
        float key[kMaxHeadDim];
        const T* from = key_row<T>(p.keys, s.row, i, s.kv_head);
        for (int64_t d = 0; d < p.head_dim; d += kLanes) store(key + d, load(from + d));
        if (all_finite(key, p.head_dim)) continue;
        row_scores[i] = NAN;
        ++nonfinite;
    }
    for (int64_t t = 0; t < s.num_tiles; ++t) nonfinite += static_cast<int64_t>(s.num_dropped[t]);
    p.num_nonfinite[block_index * p.num_kv_heads + s.kv_head] = nonfinite;
}

// Ranges, memory and finite queries of an item; returns how many query vectors were not finite.
inline int64_t prepare_item(const ScoreTokensParams& p, int64_t item, float* workspace,
                            float* scratch, ScoreItem* s) {
    const int64_t group = p.num_q_heads / p.num_kv_heads, all_columns = p.num_vectors * group;
    s->kv_head = item % p.num_kv_heads;
    s->block = item / p.num_kv_heads % p.blocks.num_blocks;
    s->row = item / p.num_kv_heads / p.blocks.num_blocks;
    s->range = block_range(p.blocks, s->row, s->block);
    const auto at_most = [](int64_t x, int64_t limit) { return x < limit ? x : limit; };
    s->visible_end = s->range.visible_end > s->range.start ? s->range.visible_end : s->range.start;
    s->range.sink_end = at_most(s->range.sink_end, s->visible_end);
    s->cand_end = at_most(s->range.window_start, s->visible_end);
    s->scale = p.scale * kLog2E;
    s->num_tiles = (s->visible_end - s->range.start + kScoreTileTokens - 1) / kScoreTileTokens;

    s->tile_stride = (score_tokens_tiles(p) + 15) / 16 * 16;
    s->peak = workspace;
    s->total = s->peak + all_columns * s->tile_stride;
    s->num_dropped = s->total + all_columns * s->tile_stride;
    s->keeps_weights = score_tokens_keeps_weights(p);
    s->weights = s->num_dropped + s->tile_stride;

    float* q = scratch;
    float* q_local = q + all_columns * p.head_dim;
    s->lse = q_local + all_columns * p.head_dim;
    s->factor = s->lse + all_columns;
    s->logits = s->factor + all_columns + 16;  // factors are stored in whole vectors
    s->q = q, s->q_local = p.q_local ? q_local : q;
    // Gather the finite queries; a query vector with NaN or inf has no vote.
    s->num_columns = 0;
    for (int64_t column = 0; column < all_columns; ++column) {
        const int64_t vector = column / group, head = s->kv_head * group + column % group;
        const int64_t block_index = s->row * p.blocks.num_blocks + s->block;
        const int64_t from =
            ((block_index * p.num_vectors + vector) * p.num_q_heads + head) * p.head_dim;
        if (!all_finite(p.q + from, p.head_dim) ||
            (p.q_local && !all_finite(p.q_local + from, p.head_dim)))
            continue;
        const size_t bytes = sizeof(float) * static_cast<size_t>(p.head_dim);
        std::memcpy(q + s->num_columns * p.head_dim, p.q + from, bytes);
        if (p.q_local) std::memcpy(q_local + s->num_columns * p.head_dim, p.q_local + from, bytes);
        s->source_column[s->num_columns++] = static_cast<int16_t>(column);
    }
    s->plain_logits = code_logits_are_finite(*s, p.head_dim);
    return all_columns - s->num_columns;
}

template <typename T>
void score_tokens_of(const ScoreTokensParams& p, ScoreStage stage, int64_t item, int64_t part_begin,
                     int64_t part_end, float* workspace, float* scratch) {
    const int64_t kv_head = item % p.num_kv_heads;
    const int64_t row = item / p.num_kv_heads / p.blocks.num_blocks;
    if (is_reused(p, row, kv_head)) return;
    ScoreItem s;
    const int64_t nonfinite_queries = prepare_item(p, item, workspace, scratch, &s);
    const int64_t first = part_begin * kScorePartTiles, stop = part_end * kScorePartTiles;
    const int64_t last = stop < s.num_tiles ? stop : s.num_tiles;
    if (stage == ScoreStage::kWeigh) {
        for (int64_t tile = first; tile < last; ++tile) weigh_tile<T>(p, s, tile);
        return;
    }
    merge_tiles(p, s);
    float* row_scores =
        p.scores +
        ((s.row * p.blocks.num_blocks + s.block) * p.num_kv_heads + s.kv_head) * p.max_seqlen_k;
    for (int64_t tile = first; tile < last; ++tile) vote_tile<T>(p, s, tile, row_scores);
    if (part_begin == 0) finish_item<T>(p, s, nonfinite_queries, row_scores);
}

void score_tokens(const ScoreTokensParams& p, ScoreStage stage, int64_t item, int64_t part_begin,
                  int64_t part_end, float* workspace, float* scratch) {
    const auto run = [&](auto key) {
        score_tokens_of<decltype(key)>(p, stage, item, part_begin, part_end, workspace, scratch);
    };
    switch (p.dtype) {
        case DType::kFloat32:
            return run(float{});
        case DType::kFloat16:
            return run(Float16{});
        case DType::kBFloat16:
            return run(BFloat16{});
    }
}
