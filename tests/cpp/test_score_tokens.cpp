#include "kvselect/score_tokens.h"

#include <algorithm>

#include "check.h"
#include "cuda_emulated.h"
#include "inputs.h"
#include "kvselect/select_tokens.h"
#include "sketch_codec.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

struct Case {
    DType dtype = DType::kFloat32;
    Layout layout = Layout::kHeadMajor;
    std::vector<int32_t> seqlens{100}, starts{};
    int64_t num_kv_heads = 2, group = 2, head_dim = 64, num_vectors = 1, seqlen_q = 1;
    std::vector<int32_t> offsets{};
    WindowRule rule = WindowRule::kDecode;
    int64_t sinks = 0, recent = 0, keep = 0;
    bool normalise_candidates_only = false, max_vote = false, separate_local = false;
    const RopeTable* rope = nullptr;
};

// The op's outputs and everything it read.
struct Scored {
    Scored(const cpu::Implementation& ops, const Case& c, Cache& cache, const SketchView* sketch,
           bool nonfinite_query = false)
        : c(c), num_q_heads(c.num_kv_heads * c.group) {
        batch = c.seqlens.size();
        num_blocks = c.offsets.empty() ? 1 : static_cast<int64_t>(c.offsets.size()) - 1;
        columns = *std::max_element(c.seqlens.begin(), c.seqlens.end());
        Random random(static_cast<uint64_t>(c.head_dim + c.num_vectors));
        q.resize(batch * num_blocks * c.num_vectors * num_q_heads * c.head_dim);
        for (float& x : q) x = static_cast<float>(random.normal());
        q_local = q;
        if (c.separate_local)
            for (float& x : q_local) x = static_cast<float>(random.normal());
        if (nonfinite_query) q[c.head_dim + 1] = NAN;  // query head 1 of the first vector
        p = ScoreTokensParams{};
        p.dtype = c.dtype;
        p.num_q_heads = num_q_heads;
        p.num_kv_heads = c.num_kv_heads;
        p.head_dim = c.head_dim;
        p.blocks = QueryBlocks{batch,
                               num_blocks,
                               c.seqlen_q,
                               c.offsets.empty() ? nullptr : c.offsets.data(),
                               c.seqlens.data(),
                               c.starts.empty() ? nullptr : c.starts.data(),
                               c.rule,
                               c.sinks,
                               c.recent};
        p.num_vectors = c.num_vectors;
        p.q = q.data();
        p.q_local = c.separate_local ? q_local.data() : nullptr;
        p.keys = cache.keys();
        if (sketch) p.sketch = *sketch;
        if (c.rope) p.rope = c.rope->view();
        p.keep = c.keep;
        p.scale = 0.15f;
        p.normalise_candidates_only = c.normalise_candidates_only;
        p.max_vote = c.max_vote;
        const int64_t lists = batch * num_blocks * c.num_kv_heads;
        scores.assign(lists * columns, -3.f);
        lse.assign(batch * num_blocks * c.num_vectors * num_q_heads, -3.f);
        num_nonfinite.assign(lists, -3);
        p.scores = scores.data();
        p.max_seqlen_k = columns;
        p.lse = lse.data();
        p.num_nonfinite = num_nonfinite.data();
        run(ops);
    }
    // Item by item, then in parts from the last to the first: the same bits, from dirty memory.
    void run(const cpu::Implementation& ops) {
        const int64_t items = p.blocks.batch * p.blocks.num_blocks * p.num_kv_heads,
                      parts = score_tokens_parts(p);
        const int64_t per_item = score_tokens_workspace_floats(p);
        std::vector<float> workspace(items * per_item, NAN),
            scratch(score_tokens_scratch_floats(p), NAN);
        for (int64_t item = 0; item < items; ++item)
            for (const ScoreStage stage : {ScoreStage::kWeigh, ScoreStage::kVote})
                ops.score_tokens(p, stage, item, 0, parts, workspace.data(), scratch.data());
        const std::vector<float> whole = scores, whole_lse = lse;
        const std::vector<int64_t> whole_nonfinite = num_nonfinite;
        std::fill(workspace.begin(), workspace.end(), NAN);
        for (const ScoreStage stage : {ScoreStage::kWeigh, ScoreStage::kVote})
            for (int64_t i = items * parts - 1; i >= 0; --i) {
                std::fill(scratch.begin(), scratch.end(), NAN);
                ops.score_tokens(p, stage, i / parts, i % parts, i % parts + 1,
                                 workspace.data() + i / parts * per_item, scratch.data());
            }
        EXPECT(same_bits(whole, scores) && same_bits(whole_lse, lse) &&
                   whole_nonfinite == num_nonfinite,
               "in parts, scores differ from those of whole items");
    }
    int64_t q_at(int64_t row, int64_t block, int64_t vector, int64_t head) const {
        return (((row * num_blocks + block) * c.num_vectors + vector) * num_q_heads + head) *
               c.head_dim;
    }
    float score(int64_t row, int64_t block, int64_t kv_head, int64_t t) const {
        return scores[((row * num_blocks + block) * c.num_kv_heads + kv_head) * columns + t];
    }
    const Case& c;
    int64_t num_q_heads, batch, num_blocks, columns;
    std::vector<float> q, q_local, scores, lse;
    std::vector<int64_t> num_nonfinite;
    ScoreTokensParams p;
};

// Emulated CUDA only: select_tokens picks the same from what the vote counted as from the scores
// alone.
void select_from_ranking(const cpu::Implementation& ops, ScoreTokensParams p, int line) {
    if (&ops != &cuda_emulated_implementation()) return;
    const int64_t group = p.num_q_heads / p.num_kv_heads, sets = p.max_vote ? p.num_vectors : 1;
    if (sets * ((p.num_vectors * group / sets + 3) / 4 * 4) > 16) return;  // logits are not kept
    const int64_t lists = p.blocks.batch * p.blocks.num_blocks * p.num_kv_heads;
    std::vector<float> scores(lists * p.max_seqlen_k, -3.f),
        lse(p.blocks.batch * p.blocks.num_blocks * p.num_vectors * p.num_q_heads);
    std::vector<int64_t> num_nonfinite(lists), ranking(lists * kRankingWords / 2, -1);
    p.scores = scores.data();
    p.lse = lse.data();
    p.num_nonfinite = num_nonfinite.data();
    p.ranking = reinterpret_cast<int32_t*>(ranking.data());
    const CudaLaunch launch{nullptr, false};
    std::vector<uint8_t> memory(cuda::score_tokens_workspace_bytes(p), 0xff);
    cuda::score_tokens(p, memory.data(), launch);
    const int64_t width = p.max_seqlen_k + 1;
    std::vector<int32_t> indices[2], lengths[2];
    std::vector<float> kept[2];
    for (const bool ranked : {false, true}) {
        indices[ranked].assign(lists * width, 12345);
        lengths[ranked].assign(lists, 0);
        kept[ranked].assign(lists, -5.f);
        SelectTokensParams s{};
        s.blocks = p.blocks;
        s.num_lists = p.num_kv_heads;
        s.scores = scores.data();
        s.scores_strides[0] = p.blocks.num_blocks * p.num_kv_heads * p.max_seqlen_k;
        s.scores_strides[1] = p.num_kv_heads * p.max_seqlen_k;
        s.scores_strides[2] = p.max_seqlen_k;
        s.max_seqlen_k = p.max_seqlen_k;
        s.keep = p.keep;
        s.pool_width = 1;
        s.width = width;
        s.hit = p.hit;
        s.ranking = ranked ? p.ranking : nullptr;
        s.indices = indices[ranked].data();
        s.topk_length = lengths[ranked].data();
        s.kept_score = kept[ranked].data();
        std::vector<uint8_t> workspace(cuda::select_tokens_workspace_bytes(s), 0xff);
        cuda::select_tokens(s, workspace.data(), launch);
    }
    EXPECT(indices[0] == indices[1] && lengths[0] == lengths[1] && same_bits(kept[0], kept[1]),
           "from line ", line, ": other lists from a ranking, keep ", p.keep);
}

constexpr int32_t kLongRow = kScoreTileTokens * kScorePartTiles + 300;

// Scores of exact keys against the definition in double.
void score_and_compare(const cpu::Implementation& ops, const Case& c, int line,
                       bool with_nonfinite = false) {
    Random random(static_cast<uint64_t>(line));
    Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, c.head_dim);
    cache.fill(random);
    for (int64_t row = 0; row < static_cast<int64_t>(c.starts.size()); ++row)
        for (int64_t t = 0; t < c.starts[row]; ++t) cache.poison(row, t);
    if (with_nonfinite) cache.k.set(cache.keys().offset(0, 40, 0) + 5, kInf);
    const Scored got(ops, c, cache, nullptr, with_nonfinite);
    select_from_ranking(ops, got.p, line);
    RelativeError score_error;
    for (int64_t row = 0; row < got.batch; ++row)
        for (int64_t block = 0; block < got.num_blocks; ++block)
            for (int64_t kv_head = 0; kv_head < c.num_kv_heads; ++kv_head) {
                const BlockRange r = block_range(got.p.blocks, row, block);
                const int64_t visible_end = std::max(r.visible_end, r.start),
                              sink_end = std::min(r.sink_end, visible_end);
                const int64_t cand_end = std::min(r.window_start, visible_end);
                const int64_t picked = std::min(c.keep, cand_end - sink_end);
                std::vector<double> want(got.columns, 0.0);
                std::vector<bool> bad(got.columns, false);
                int64_t want_nonfinite = 0;
                for (int64_t t = r.start; t < r.end; ++t) {
                    const bool candidate = t >= sink_end && t < cand_end;
                    if (c.normalise_candidates_only && !candidate && t < visible_end) continue;
                    for (int64_t d = 0; d < c.head_dim; ++d)
                        if (!std::isfinite(cache.key(row, t, kv_head, d))) bad[t] = true;
                    want_nonfinite += bad[t];
                }
                for (int64_t vector = 0; vector < c.num_vectors; ++vector) {
                    std::vector<double> votes(got.columns, 0.0);
                    for (int64_t head = kv_head * c.group; head < (kv_head + 1) * c.group; ++head) {
                        const int64_t at = got.q_at(row, block, vector, head);
                        const std::vector<double> query(got.q.begin() + at,
                                                        got.q.begin() + at + c.head_dim);
                        const std::vector<double> local(got.q_local.begin() + at,
                                                        got.q_local.begin() + at + c.head_dim);
                        const float lse = got.lse[at / c.head_dim];
                        if (!std::isfinite(dot(query, query))) {
                            ++want_nonfinite;
                            EXPECT(lse == -INFINITY, "from line ", line);
                            continue;
                        }
                        double peak = -kInf, total = 0.0;
                        std::vector<double> logits(got.columns, -kInf);
                        for (int64_t t = r.start; t < visible_end; ++t) {
                            const bool candidate = t >= sink_end && t < cand_end;
                            if (bad[t] || (c.normalise_candidates_only && !candidate)) continue;
                            std::vector<double> key(c.head_dim);
                            for (int64_t d = 0; d < c.head_dim; ++d)
                                key[d] = cache.key(row, t, kv_head, d);
                            if (c.rope && !candidate)
                                key = c.rope->rotate(
                                    key, t < sink_end
                                             ? t - r.start
                                             : (sink_end - r.start) + picked + (t - cand_end));
                            logits[t] = double{0.15f} * dot(candidate ? query : local, key);
                            peak = std::max(peak, logits[t]);
                        }
                        for (double x : logits) total += peak > -kInf ? std::exp(x - peak) : 0.0;
                        if (total == 0.0) {
                            EXPECT(lse == -INFINITY, "from line ", line);
                            continue;
                        }
                        EXPECT(std::abs(lse - (peak + std::log(total))) < 1e-5, "from line ", line,
                               ": lse ", lse);
                        for (int64_t t = 0; t < got.columns; ++t)
                            votes[t] += std::exp(logits[t] - peak) / total;
                    }
                    for (int64_t t = 0; t < got.columns; ++t)
                        want[t] = c.max_vote ? std::max(want[t], votes[t]) : want[t] + votes[t];
                }
                EXPECT(
                    got.num_nonfinite[(row * got.num_blocks + block) * c.num_kv_heads + kv_head] ==
                        want_nonfinite,
                    "from line ", line);
                for (int64_t t = 0; t < got.columns; ++t) {
                    const float score = got.score(row, block, kv_head, t);
                    EXPECT(std::isnan(score) == bad[t], "from line ", line, ": token ", t,
                           " has score ", score);
                    if (bad[t]) continue;
                    score_error.add(score, want[t]);
                    EXPECT(want[t] > 0.0 || score == 0.f, "from line ", line, ": invisible token ",
                           t);
                }
            }
    EXPECT(score_error.value() < 1e-5, "from line ", line, ": error ", score_error.value(),
           ", head_dim ", c.head_dim);
}

}  // namespace

TEST(score_tokens_from_keys) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts)
            for (int64_t head_dim : kHeadDims)
                score_and_compare(ops,
                                  {.dtype = dtype,
                                   .layout = layout,
                                   .seqlens = {1, 130, 65, 0},
                                   .head_dim = head_dim,
                                   .sinks = 4,
                                   .recent = 9},
                                  __LINE__);
    for (int64_t group : {1, 3, 4, 8})
        score_and_compare(ops, {.seqlens = {70}, .group = group}, __LINE__);
}

TEST(score_tokens_over_several_parts) {
    for (int64_t num_vectors : {1, 9})  // 9 vectors of 2 heads are more columns than are kept
        for (bool with_nonfinite : {false, true})
            for (bool max_vote : {false, true})
                score_and_compare(ops,
                                  {.dtype = DType::kBFloat16,
                                   .layout = Layout::kPaged,
                                   .seqlens = {kLongRow, 1030},
                                   .starts = {70, 3},
                                   .num_kv_heads = 1,
                                   .head_dim = 32,
                                   .num_vectors = num_vectors,
                                   .sinks = 3,
                                   .recent = 200,
                                   .max_vote = max_vote},
                                  __LINE__, with_nonfinite);
}

TEST(score_tokens_over_query_blocks_and_vectors) {
    for (WindowRule rule : {WindowRule::kDecode, WindowRule::kBlockStart, WindowRule::kBlockEnd})
        for (bool max_vote : {false, true})
            for (bool candidates_only : {false, true})
                score_and_compare(ops,
                                  {.dtype = DType::kBFloat16,
                                   .seqlens = {140, 33},
                                   .starts = {11, 0},
                                   .head_dim = 32,
                                   .num_vectors = 3,
                                   .seqlen_q = 40,
                                   .offsets = {0, 16, 40},
                                   .rule = rule,
                                   .sinks = 3,
                                   .recent = 20,
                                   .normalise_candidates_only = candidates_only,
                                   .max_vote = max_vote},
                                  __LINE__);
}

TEST(score_tokens_rotates_sinks_and_recent_tokens_to_their_compact_place) {
    const RopeTable half(140, 16, 0, false), part(140, 10, 4, true);
    for (const RopeTable* rope : {&half, &part})
        score_and_compare(ops,
                          {.dtype = DType::kFloat16,
                           .seqlens = {130, 12},
                           .starts = {5, 0},
                           .head_dim = 32,
                           .sinks = 6,
                           .recent = 17,
                           .keep = 20,
                           .separate_local = true,
                           .rope = rope},
                          __LINE__);
}

TEST(score_tokens_marks_what_is_not_finite) {
    for (bool max_vote : {false, true})
        score_and_compare(
            ops, {.seqlens = {90}, .num_vectors = 2, .sinks = 2, .recent = 5, .max_vote = max_vote},
            __LINE__, true);
    // Token 40 is a query of the block that looks at it, and a candidate of the next block.
    for (WindowRule rule : {WindowRule::kBlockStart, WindowRule::kBlockEnd})
        score_and_compare(ops,
                          {.seqlens = {90},
                           .seqlen_q = 60,
                           .offsets = {0, 30, 60},
                           .rule = rule,
                           .sinks = 2,
                           .recent = 5},
                          __LINE__, true);
}

TEST(score_tokens_leaves_hits_alone) {
    Random random(3);
    Cache cache(DType::kFloat32, Layout::kHeadMajor, {50, 50}, 2, 32);
    cache.fill(random);
    const Case c{.seqlens = {50, 50}, .head_dim = 32};
    Scored fresh(ops, c, cache, nullptr);
    const std::vector<int32_t> hit{0, 1, 1, 0};
    Scored some(ops, c, cache, nullptr);
    some.p.hit = hit.data();
    some.p.num_hit_lists = 2;
    std::fill(some.scores.begin(), some.scores.end(), -3.f);
    some.run(ops);
    for (int64_t list = 0; list < 4; ++list)
        for (int64_t t = 0; t < 50; ++t)
            EXPECT(some.scores[list * 50 + t] == (hit[list] ? -3.f : fresh.scores[list * 50 + t]));
    some.p.keep = 9;
    select_from_ranking(ops, some.p, __LINE__);
}

TEST(score_tokens_counts_for_any_number_kept) {
    Random random(5);
    const Case c{.dtype = DType::kBFloat16,
                 .seqlens = {kLongRow, 700, 0},
                 .starts = {33, 0, 0},
                 .head_dim = 32,
                 .sinks = 3,
                 .recent = 40};
    Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, c.head_dim);
    cache.fill(random);
    const auto channel = [&](int64_t token, int64_t d) {
        return cache.keys().offset(1, token, 0) + d;
    };
    for (int64_t token = 100; token < 600; ++token)  // equal keys: 500 ties of row 1, head 0
        for (int64_t d = 0; d < c.head_dim; ++d) cache.k.set(channel(token, d), 0.25);
    cache.k.set(channel(650, 1), kNaN);
    Scored got(ops, c, cache, nullptr);
    for (int64_t keep : {0, 1, 250, 656, 657, 100000}) {
        got.p.keep = keep;
        select_from_ranking(ops, got.p, __LINE__);
    }
}

// The same bits wherever the records lie.
TEST(score_tokens_reads_records_with_their_page) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t page_blocks : {1, 2, 3}) {
            Random random(static_cast<uint64_t>(page_blocks));
            const Case c{.dtype = DType::kBFloat16,
                         .layout = Layout::kPaged,
                         .seqlens = {1300, 127, 128, 640},
                         .sinks = 5,
                         .recent = 128};
            Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, c.head_dim);
            cache.fill(random);
            Sketch rows(cache, format, {});
            PagedRecords paged(format, c.head_dim, 4, c.num_kv_heads, 1300 / kSketchBlockTokens,
                               page_blocks);
            paged.fill(rows.view);
            const Scored by_row(ops, c, cache, &rows.view), by_page(ops, c, cache, &paged.view);
            EXPECT(same_bits(by_row.scores, by_page.scores) && same_bits(by_row.lse, by_page.lse),
                   "pages of ", page_blocks, " blocks");
            std::fill(paged.bytes.begin(), paged.bytes.end(), 0);  // they are read, then
            const Scored other(ops, c, cache, &paged.view);
            EXPECT(!same_bits(by_row.scores, other.scores));
        }
}

// With one vector and one query head per KV head, log(score) + lse is the logit: it must be that of
// the decoded sketch, up to the rounding of the query to integers.
TEST(score_tokens_from_a_sketch_equals_the_decoded_keys) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t head_dim : kHeadDims) {
            Random random(static_cast<uint64_t>(head_dim));
            const Case c{.dtype = DType::kBFloat16,
                         .layout = Layout::kPaged,
                         .seqlens = {400, 127, 128},
                         .starts = {37, 0, 0},
                         .group = 1,
                         .head_dim = head_dim,
                         .sinks = 5,
                         .recent = 9};
            Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, head_dim);
            cache.fill(random);
            // One token of block 1, head 0 is not finite: the block is scored from its keys, the
            // token dropped.
            cache.k.set(cache.keys().offset(0, 200, 0) + 3, kNaN);
            Sketch sketch(cache, format, c.starts);
            const Scored got(ops, c, cache, &sketch.view);
            for (int64_t row = 0; row < got.batch; ++row)
                for (int64_t h = 0; h < 2; ++h) {
                    const BlockRange r = block_range(got.p.blocks, row, 0);
                    for (int64_t t = r.start; t < r.visible_end; ++t) {
                        const float score = got.score(row, 0, h, t);
                        if (row == 0 && h == 0 && t == 200) {
                            EXPECT(std::isnan(score));
                            continue;
                        }
                        const int64_t at = got.q_at(row, 0, 0, h);
                        const int64_t place = t - c.starts[row], block = place / kSketchBlockTokens;
                        const bool complete =
                            (block + 1) * kSketchBlockTokens <= c.seqlens[row] - c.starts[row];
                        const uint8_t* record =
                            complete ? sketch.view.block(row, h, block) : nullptr;
                        const bool exact =
                            t < r.sink_end || t >= r.window_start || !record || !has_codes(record);
                        double logit = 0.0, unit = 0.0, spread = 0.0;
                        for (int64_t d = 0; d < head_dim; ++d) {
                            const double x = got.q[at + d];
                            if (exact) {
                                logit += x * cache.key(row, t, h, d);
                                continue;
                            }
                            const Channel stored =
                                channel(record, head_dim, format, place % kSketchBlockTokens, d);
                            const double centre = static_cast<double>(sketch_levels(format)) / 2;
                            logit += x * stored.value();
                            spread += (stored.code - centre) * (stored.code - centre);
                            unit =
                                std::max(unit, std::abs(x * stored.step) /
                                                   (format == SketchFormat::kInt4 ? 127 : 32639));
                        }
                        // Six standard deviations of the sum of roundings, each uniform in +-unit
                        // / 2.
                        const double allowed = 0.15 * 6.0 * unit * std::sqrt(spread / 12.0) + 2e-5;
                        const double error = std::log(double{score}) + got.lse[at / head_dim] -
                                             double{0.15f} * logit;
                        EXPECT(std::abs(error) < allowed, "token ", t, " of row ", row,
                               ", head_dim ", head_dim, ": logit off by ", error, ", allowed ",
                               allowed);
                    }
                }
        }
}
