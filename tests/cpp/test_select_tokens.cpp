#include "kvselect/select_tokens.h"

#include <algorithm>
#include <numeric>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

struct Select {
    std::vector<int32_t> seqlens{0}, starts{0}, offsets;
    int64_t seqlen_q = 1, sinks = 0, recent = 0, keep = 0, pool_width = 1, num_lists = 1,
            spare_width = 0;
    WindowRule rule = WindowRule::kDecode;
    std::vector<float> scores;  // [batch, num_blocks, num_lists, columns]
    int64_t columns = 0;

    int64_t batch() const { return seqlens.size(); }
    int64_t num_blocks() const {
        return offsets.empty() ? 1 : static_cast<int64_t>(offsets.size()) - 1;
    }
    QueryBlocks blocks() const {
        return QueryBlocks{
            batch(),        num_blocks(),  seqlen_q, offsets.empty() ? nullptr : offsets.data(),
            seqlens.data(), starts.data(), rule,     sinks,
            recent};
    }
    void random_scores(uint64_t seed, bool coarse) {
        columns = *std::max_element(seqlens.begin(), seqlens.end());
        scores.resize(batch() * num_blocks() * num_lists * columns);
        Random random(seed);
        for (float& s : scores) {
            s = static_cast<float>(coarse ? random.below(5) : random.uniform());
            if (random.below(40) == 0) s = random.below(2) ? NAN : INFINITY;
        }
    }

    // By sorting: the definition.
    std::vector<int32_t> expected(int64_t row, int64_t block, int64_t list) const {
        const BlockRange r = block_range(blocks(), row, block);
        const float* s =
            scores.data() + ((row * num_blocks() + block) * num_lists + list) * columns;
        std::vector<int32_t> out;
        for (int64_t i = r.start; i < r.sink_end; ++i)
            if (std::isfinite(s[i])) out.push_back(static_cast<int32_t>(i));
        std::vector<int32_t> candidates;
        std::vector<float> pooled(columns, 0.f);
        for (int64_t i = r.sink_end; i < r.window_start; ++i) {
            if (!std::isfinite(s[i])) continue;
            candidates.push_back(static_cast<int32_t>(i));
            pooled[i] = s[i];
            for (int64_t j = i - pool_width / 2; j <= i + pool_width / 2; ++j)
                if (j >= r.sink_end && j < r.window_start && std::isfinite(s[j]))
                    pooled[i] = std::max(pooled[i], s[j]);
        }
        std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) {
            return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : s[a] > s[b];
        });
        candidates.resize(std::min<int64_t>(candidates.size(), keep));
        std::sort(candidates.begin(), candidates.end());
        out.insert(out.end(), candidates.begin(), candidates.end());
        for (int64_t i = r.window_start; i < r.end; ++i)
            if (std::isfinite(s[i])) out.push_back(static_cast<int32_t>(i));
        return out;
    }

    void run(const cpu::Implementation& ops, int line) const {
        const int64_t items = batch() * num_blocks() * num_lists;
        int64_t width =
            spare_width;  // exactly what the longest list needs, so that one entry too many is seen
        for (int64_t row = 0; row < batch(); ++row)
            for (int64_t block = 0; block < num_blocks(); ++block) {
                const BlockRange r = block_range(blocks(), row, block);
                width = std::max(width, spare_width + (r.sink_end - r.start) +
                                            (r.end - r.window_start) +
                                            std::min(keep, r.window_start - r.sink_end));
            }
        std::vector<int32_t> indices(items * width, 12345), lengths(items, 777);
        std::vector<float> kept(items, -5.f);
        SelectTokensParams p{};
        p.blocks = blocks();
        p.num_lists = num_lists;
        p.scores = scores.data();
        p.scores_strides[0] = num_blocks() * num_lists * columns;
        p.scores_strides[1] = num_lists * columns;
        p.scores_strides[2] = columns;
        p.max_seqlen_k = columns;
        p.keep = keep;
        p.pool_width = pool_width;
        p.width = width;
        p.indices = indices.data();
        p.topk_length = lengths.data();
        p.kept_score = kept.data();
        std::vector<float> scratch(select_tokens_scratch_floats(p), NAN);
        // Backwards and one at a time: a list that spilled into the next one would be seen.
        for (int64_t item = items; item-- > 0;)
            ops.select_tokens(p, item, item + 1, scratch.data());
        for (int64_t item = 0; item < items; ++item) {
            const int64_t list = item % num_lists, block = item / num_lists % num_blocks();
            const int64_t row = item / num_lists / num_blocks();
            const std::vector<int32_t> want = expected(row, block, list);
            EXPECT(lengths[item] == static_cast<int64_t>(want.size()), "from line ", line,
                   ": length ", lengths[item], " instead of ", want.size());
            const int32_t* got = indices.data() + item * width;
            EXPECT(std::equal(want.begin(), want.end(), got), "from line ", line, ", item ", item);
            EXPECT(std::all_of(got + want.size(), got + width, [](int32_t i) { return i == -1; }),
                   "from line ", line);
            double sum = 0.0;
            for (int32_t i : want) sum += scores[item * columns + i];
            EXPECT(std::abs(kept[item] - sum) <= 1e-5 * (1.0 + std::abs(sum)), "from line ", line);
        }
    }
};

}  // namespace

TEST(select_tokens_equals_a_sort) {
    uint64_t seed = 0;
    for (int32_t seqlen : {1, 2, 17, 64, 257, 3000})
        for (int64_t keep : {0, 1, 7, 64, 5000})
            for (int64_t pool_width : {1, 3, 7})
                for (bool coarse : {false, true}) {
                    Select select;
                    select.seqlens = {seqlen, std::max(1, seqlen / 2), 0};
                    select.starts = {0, seqlen / 5, 0};
                    select.num_lists = 2;
                    select.sinks = 4;
                    select.recent = 9;
                    select.keep = keep;
                    select.pool_width = pool_width;
                    select.random_scores(++seed, coarse);
                    select.run(ops, __LINE__);
                }
}

TEST(select_tokens_over_query_blocks) {
    for (WindowRule rule : {WindowRule::kDecode, WindowRule::kBlockStart, WindowRule::kBlockEnd}) {
        Select select;
        select.rule = rule;
        select.seqlens = {600, 45};
        select.starts = {0, 3};
        select.seqlen_q = 50;  // longer than what row 1 holds
        select.offsets = {0, 1, 20, 50};
        select.sinks = 5;
        select.recent = 30;
        select.keep = 16;
        select.random_scores(99, false);
        select.run(ops, __LINE__);
    }
}

TEST(select_tokens_with_16385_ties) {
    Select select;
    select.seqlens = {20000};
    select.columns = 20000;
    select.scores.assign(20000, 0.25f);
    for (int i = 0; i < 1000; ++i) select.scores[i * 20] = 0.5f;  // above the border
    select.keep = 16385 + 1000;
    select.run(ops, __LINE__);
    select.keep = 16385;
    select.scores.assign(20000, 0.f);  // nothing but ties
    select.run(ops, __LINE__);
    select.scores.assign(20000, -0.f);
    for (int i = 10000; i < 20000; ++i) select.scores[i] = 0.f;  // -0 ties with a later 0
    select.run(ops, __LINE__);
}

TEST(select_tokens_never_lists_nan_or_infinity) {
    Select select;
    select.seqlens = {300};
    select.columns = 300;
    select.sinks = 4;
    select.recent = 8;
    select.keep = 50;
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        select.scores.assign(300, bad);
        select.run(ops, __LINE__);  // nothing is left
        for (int i = 0; i < 300; i += 7) select.scores[i] = static_cast<float>(i);
        select.run(ops, __LINE__);
    }
    for (int i = 0; i < 300; ++i)
        select.scores[i] = -1.f - static_cast<float>(i);  // negative scores are scores
    select.run(ops, __LINE__);
}

TEST(select_tokens_hit_appends_the_newest_token_and_reads_no_score) {
    const std::vector<int32_t> seqlens{10, 20};
    std::vector<int32_t> indices{1, 4, 8, -1, 2, 3, -1, -1}, lengths{3, 2};
    const std::vector<int32_t> hit{1, 1};
    std::vector<float> kept{0.f, 0.f};
    SelectTokensParams p{};
    p.blocks = QueryBlocks{2, 1, 1, nullptr, seqlens.data(), nullptr, WindowRule::kDecode, 2, 2};
    p.num_lists = 1;
    p.scores = nullptr;
    p.max_seqlen_k = 20;
    p.keep = 1;
    p.pool_width = 1;
    p.width = 4;
    p.hit = hit.data();
    p.indices = indices.data();
    p.topk_length = lengths.data();
    p.kept_score = kept.data();
    ops.select_tokens(p, 0, 2, nullptr);
    EXPECT((indices == std::vector<int32_t>{1, 4, 8, 9, 2, 3, 19, -1}));
    EXPECT((lengths == std::vector<int32_t>{4, 3}));
    EXPECT(std::isnan(kept[0]) && std::isnan(kept[1]));
}
