#include "kvselect/rolling_sweep.h"

#include <algorithm>
#include <set>

#include "check.h"
#include "inputs.h"
#include "sketch_codec.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

struct Case {
    DType dtype = DType::kFloat32;
    Layout layout = Layout::kHeadMajor;
    std::vector<int32_t> seqlens{600}, starts{};
    int64_t num_kv_heads = 2, group = 2, head_dim = 32, num_lists = 2;
    int64_t num_segments = 3, pool_width = 20, keep = 15, sinks = 3, recent = 10;
    SketchFormat sketch = SketchFormat::kNone;
    bool normalise_candidates_only = false;
    const RopeTable* rope = nullptr;
};

// A cache whose rows grow by one token per step, and the lists and state of its sweeps.
struct Sweeps {
    Sweeps(const cpu::Implementation& ops, const Case& c, int64_t steps)
        : ops(ops),
          c(c),
          random(static_cast<uint64_t>(c.head_dim + c.num_segments)),
          batch(static_cast<int64_t>(c.seqlens.size())),
          cache(c.dtype, c.layout, grown(c.seqlens, steps), c.num_kv_heads, c.head_dim),
          lengths(c.seqlens) {
        cache.fill(random);
        for (int64_t row = 0; row < static_cast<int64_t>(c.starts.size()); ++row)
            for (int64_t t = 0; t < c.starts[row]; ++t) cache.poison(row, t);
        if (c.sketch != SketchFormat::kNone) sketch.emplace_back(cache, c.sketch, c.starts);
        const int64_t lists = batch * c.num_lists;
        pool.assign(lists * c.num_segments * c.pool_width, 0);
        pool_length.assign(lists * c.num_segments, 0);
        scanned_to = pool_length;
        next_segment.assign(lists, 0);
        topk_length.assign(lists, 0);
        kept_score.assign(lists, 0.f);
        num_seen.assign(lists * 2, -1);
        num_nonfinite.assign(batch * c.num_kv_heads, -1);
        width = c.sinks + c.keep + c.recent + 2;  // one that must stay -1, one for a hit
        indices.assign(lists * width, -7);
    }
    static std::vector<int32_t> grown(std::vector<int32_t> lengths, int64_t steps) {
        for (int32_t& n : lengths) n += static_cast<int32_t>(steps);
        return lengths;
    }

    RollingSweepParams params() {
        RollingSweepParams p{};
        p.dtype = c.dtype;
        p.num_q_heads = c.num_kv_heads * c.group;
        p.num_kv_heads = c.num_kv_heads;
        p.head_dim = c.head_dim;
        p.blocks = QueryBlocks{batch,
                               1,
                               1,
                               nullptr,
                               lengths.data(),
                               c.starts.empty() ? nullptr : c.starts.data(),
                               WindowRule::kDecode,
                               c.sinks,
                               c.recent};
        p.num_lists = c.num_lists;
        p.q = q.data();
        p.keys = cache.keys();
        if (!sketch.empty()) p.sketch = sketch[0].view;
        if (c.rope) p.rope = c.rope->view();
        p.keep = c.keep;
        p.scale = 0.3f;
        p.normalise_candidates_only = c.normalise_candidates_only;
        p.hit = hit.empty() ? nullptr : hit.data();
        p.scan_all = scan_all.empty() ? nullptr : scan_all.data();
        p.num_segments = c.num_segments;
        p.pool_width = c.pool_width;
        p.pool = pool.data();
        p.pool_length = pool_length.data();
        p.scanned_to = scanned_to.data();
        p.next_segment = next_segment.data();
        p.width = width;
        p.indices = indices.data();
        p.topk_length = topk_length.data();
        p.kept_score = kept_score.data();
        p.num_seen = num_seen.data();
        p.num_nonfinite = num_nonfinite.data();
        p.room = rolling_sweep_room(p);
        votes.assign(batch * c.num_kv_heads * p.room, -9.f);
        p.votes = votes.data();
        return p;
    }
    void run() {
        q.resize(batch * c.num_kv_heads * c.group * c.head_dim);
        for (float& x : q) x = static_cast<float>(random.normal());
        const RollingSweepParams p = params();
        std::vector<float> scratch(rolling_sweep_scratch_floats(p), NAN);
        for (SweepStage stage : {SweepStage::kVote, SweepStage::kPick}) {
            const int64_t items = rolling_sweep_items(p, stage);
            ops.rolling_sweep(p, stage, items / 2, items, scratch.data());
            ops.rolling_sweep(p, stage, 0, items / 2, scratch.data());
        }
    }
    void append() {
        for (int32_t& n : lengths) ++n;
    }
    std::vector<int32_t> pool_of(int64_t list, int64_t segment) const {
        const int64_t at = list * c.num_segments + segment;
        const auto first = pool.begin() + at * c.pool_width;
        return {first, first + pool_length[at]};
    }
    std::vector<int32_t> listed(int64_t list) const {
        const auto first = indices.begin() + list * width;
        return {first, first + topk_length[list]};
    }

    const cpu::Implementation& ops;
    const Case& c;
    Random random;
    int64_t batch, width = 0;
    Cache cache;
    std::vector<int32_t> lengths;
    std::vector<Sketch> sketch;
    std::vector<float> q, votes, kept_score;
    std::vector<int32_t> pool, pool_length, scanned_to, next_segment, indices, topk_length;
    std::vector<int32_t> num_seen, hit, scan_all;
    std::vector<int64_t> num_nonfinite;
};

// The best of `from` by the votes, as far as rounding lets one say so.
void expect_best(const std::vector<int32_t>& got, const std::vector<int32_t>& from, int64_t count,
                 const std::vector<double>& votes, int line) {
    std::vector<int32_t> order;
    for (int32_t t : from)
        if (std::isfinite(votes[t])) order.push_back(t);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return votes[a] > votes[b]; });
    count = std::min<int64_t>(count, order.size());
    EXPECT(static_cast<int64_t>(got.size()) == count, "from line ", line, ": ", got.size());
    EXPECT(std::is_sorted(got.begin(), got.end()) &&
               std::set<int32_t>(got.begin(), got.end()).size() == got.size(),
           "from line ", line);
    for (int32_t t : got) {
        EXPECT(std::find(from.begin(), from.end(), t) != from.end(), "from line ", line, ": ", t);
        EXPECT(votes[t] >= votes[order[count - 1]] * (1 - 1e-4), "from line ", line, ": token ", t);
    }
}

// Steps of exact keys against the definition in double.
void sweep_and_compare(const cpu::Implementation& ops, const Case& c, int line,
                       int64_t bad_token = -1, int64_t steps = 5) {
    Sweeps s(ops, c, steps);
    if (bad_token >= 0) s.cache.k.set(s.cache.keys().offset(0, bad_token, 0) + 5, kInf);
    for (int64_t step = 0; step < steps; ++step, s.append()) {
        const std::vector<int32_t> seen_before = s.scanned_to, next_before = s.next_segment;
        std::vector<std::vector<int32_t>> pools_before;
        for (int64_t i = 0; i < s.batch * c.num_lists * c.num_segments; ++i)
            pools_before.push_back(s.pool_of(i / c.num_segments, i % c.num_segments));
        s.run();
        const RollingSweepParams p = s.params();
        for (int64_t list = 0; list < s.batch * c.num_lists; ++list) {
            const int64_t row = list / c.num_lists;
            const BlockRange r = block_range(p.blocks, row, 0);
            int64_t seen_to = r.window_start;
            for (int64_t i = 0; i < c.num_segments; ++i)
                seen_to = std::min<int64_t>(seen_to, seen_before[list * c.num_segments + i]);
            seen_to = std::max(seen_to, r.sink_end);
            const int64_t tail = r.start + (seen_to - r.start) / 128 * 128;
            const auto segment_of = [&](int64_t t) { return (t - r.start) / 128 % c.num_segments; };
            std::vector<int32_t> always, scanned, candidates;
            for (int64_t t = r.start; t < r.end; ++t) {
                const int32_t at = static_cast<int32_t>(t);
                if (t < r.sink_end || t >= r.window_start)
                    always.push_back(at);
                else if (t >= tail || segment_of(t) == next_before[list])
                    scanned.push_back(at);
            }
            candidates = scanned;
            for (int64_t i = 0; i < c.num_segments && tail > r.sink_end; ++i)
                for (int32_t t : pools_before[list * c.num_segments + i])
                    if (i != next_before[list] && t < tail) candidates.push_back(t);
            std::vector<int32_t> seen = always;
            seen.insert(seen.end(), candidates.begin(), candidates.end());
            EXPECT(s.num_seen[2 * list] == static_cast<int64_t>(always.size() + scanned.size()),
                   "from line ", line);
            EXPECT(s.num_seen[2 * list + 1] ==
                       static_cast<int64_t>(candidates.size() - scanned.size()),
                   "from line ", line);

            std::vector<double> votes(r.end, 0.0);
            const int64_t first_head = c.num_lists == 1 ? 0 : list % c.num_lists;
            const int64_t last_head = c.num_lists == 1 ? c.num_kv_heads : first_head + 1;
            const int64_t picked = std::min(c.keep, r.window_start - r.sink_end);
            for (int64_t h = first_head * c.group; h < last_head * c.group; ++h) {
                const int64_t head = h / c.group, from = (row * p.num_q_heads + h) * c.head_dim;
                const std::vector<double> query(s.q.begin() + from,
                                                s.q.begin() + from + c.head_dim);
                std::vector<double> weights(r.end, 0.0);
                double total = 0.0;
                for (int32_t t : seen) {
                    std::vector<double> key(c.head_dim);
                    for (int64_t d = 0; d < c.head_dim; ++d) key[d] = s.cache.key(row, t, head, d);
                    const bool candidate = t >= r.sink_end && t < r.window_start;
                    if (c.rope && !candidate)
                        key = c.rope->rotate(key, t < r.sink_end ? t - r.start
                                                                 : (r.sink_end - r.start) + picked +
                                                                       (t - r.window_start));
                    const double logit = double{0.3f} * dot(query, key);
                    if (!std::isfinite(logit)) {
                        votes[t] = kNaN;
                        continue;
                    }
                    if (c.normalise_candidates_only && !candidate) continue;
                    total += weights[t] = std::exp(logit);
                }
                for (int32_t t : seen)
                    if (total > 0.0) votes[t] += weights[t] / total;
            }
            double kept = 0.0;
            std::vector<int32_t> got_picked;
            for (int32_t t : s.listed(list)) {
                kept += votes[t];
                if (t >= r.sink_end && t < r.window_start) got_picked.push_back(t);
            }
            EXPECT(std::abs(kept - s.kept_score[list]) < 1e-4, "from line ", line, ": ", kept);
            expect_best(got_picked, candidates, c.keep, votes, line);
            const int64_t finite_always = std::count_if(
                always.begin(), always.end(), [&](int32_t t) { return std::isfinite(votes[t]); });
            EXPECT(s.topk_length[list] == static_cast<int64_t>(got_picked.size()) + finite_always,
                   "from line ", line);
            for (int64_t i = s.topk_length[list]; i < s.width; ++i)
                EXPECT(s.indices[list * s.width + i] == -1, "from line ", line);
            for (int64_t i = 0; i < c.num_segments; ++i) {
                const int64_t at = list * c.num_segments + i;
                std::vector<int32_t> own;
                for (int32_t t : scanned)
                    if (segment_of(t) == i) own.push_back(t);
                if (tail > r.sink_end && i != next_before[list]) {
                    EXPECT(s.pool_of(list, i) == pools_before[at], "from line ", line);
                    continue;
                }
                expect_best(s.pool_of(list, i), own, c.pool_width, votes, line);
                EXPECT(s.scanned_to[at] == r.window_start || r.end == r.start, "from line ", line);
            }
        }
    }
}

}  // namespace

TEST(rolling_sweep_from_keys) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts)
            sweep_and_compare(ops,
                              {.dtype = dtype,
                               .layout = layout,
                               .seqlens = {700, 1, 140, 420},
                               .starts = {0, 0, 0, 29}},
                              __LINE__);
    for (int64_t head_dim : kHeadDims)
        sweep_and_compare(ops, {.seqlens = {450}, .head_dim = head_dim}, __LINE__, -1, 3);
}

TEST(rolling_sweep_shares_lists_and_rotates) {
    const RopeTable rope(60, 16, 0, false);
    for (int64_t num_lists : {1, 2})
        for (const RopeTable* table : {static_cast<const RopeTable*>(nullptr), &rope})
            for (bool candidates_only : {false, true})
                sweep_and_compare(ops,
                                  {.seqlens = {530, 300},
                                   .group = 3,
                                   .num_lists = num_lists,
                                   .normalise_candidates_only = candidates_only,
                                   .rope = table},
                                  __LINE__);
}

TEST(rolling_sweep_counts_segments_and_pools) {
    for (int64_t num_segments : {2, 5, 64})
        for (int64_t pool_width : {1, 500})
            for (int64_t keep : {0, 1, 100})
                sweep_and_compare(
                    ops, {.num_segments = num_segments, .pool_width = pool_width, .keep = keep},
                    __LINE__, -1, 4);
}

TEST(rolling_sweep_drops_what_is_not_finite) {
    for (int64_t bad : {1, 60, 300, 595})
        for (bool candidates_only : {false, true})
            sweep_and_compare(ops, {.normalise_candidates_only = candidates_only}, __LINE__, bad);
}

// What is scanned from codes may differ in votes, not in which tokens are looked at.
TEST(rolling_sweep_scans_the_sketch) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t head_dim : kHeadDims) {
            Case c{.dtype = DType::kBFloat16,
                   .seqlens = {900, 300},
                   .starts = {0, 40},
                   .head_dim = head_dim,
                   .recent = 130,
                   .sketch = format};
            Sweeps s(ops, c, 5);
            s.cache.k.set(s.cache.keys().offset(0, 200, 0) + 3, kNaN);
            s.sketch.clear();
            s.sketch.emplace_back(s.cache, format, c.starts);
            for (int64_t step = 0; step < 5; ++step, s.append()) {
                s.run();
                for (int64_t list = 0; list < 4; ++list) {
                    const std::vector<int32_t> listed = s.listed(list);
                    EXPECT(static_cast<int64_t>(listed.size()) == c.sinks + c.keep + c.recent);
                    EXPECT(std::is_sorted(listed.begin(), listed.end()));
                    if (list == 0) EXPECT(!std::count(listed.begin(), listed.end(), 200));
                    EXPECT(s.kept_score[list] > 0.f && s.kept_score[list] < 2.0001f);
                }
            }
        }
}

TEST(rolling_sweep_leaves_hits_and_whole_scans_alone) {
    const Case c{.seqlens = {500, 480}};
    Sweeps s(ops, c, 3);
    s.run();
    s.append();
    const std::vector<int32_t> before = s.listed(1), scanned_to = s.scanned_to, pool = s.pool;
    s.hit = {0, 1, 0, 0};
    s.scan_all = {0, 0, 1, 0};
    s.run();
    std::vector<int32_t> extended = before;
    extended.push_back(500);
    EXPECT(s.listed(1) == extended && std::isnan(s.kept_score[1]) && s.num_seen[2] == 0);
    EXPECT(s.num_seen[4] == 481 && s.num_seen[5] == 0 && s.num_seen[7] > 0);
    for (int64_t list : {1, 2})
        for (int64_t i = 0; i < c.num_segments; ++i) {
            const int64_t at = list * c.num_segments + i;
            EXPECT(s.scanned_to[at] == scanned_to[at]);
            for (int64_t j = 0; j < c.pool_width; ++j)
                EXPECT(s.pool[at * c.pool_width + j] == pool[at * c.pool_width + j]);
        }
    EXPECT(s.next_segment == (std::vector<int32_t>{1, 0, 0, 1}));
}
