#include "kvselect/selection_cache_step.h"

#include <algorithm>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

// A step of three rows; everything that no kernel may read holds NaN or lies outside its block.
struct Step {
    Step(DType dtype, int64_t num_lists, int64_t kv_heads, int64_t group, int64_t head_dim)
        : num_lists(num_lists),
          kv_heads(kv_heads),
          heads(kv_heads * group),
          head_dim(head_dim),
          dtype(dtype),
          q(dtype, batch * (heads + 1) * head_dim),
          anchor(batch * heads * head_dim),
          age(batch * num_lists, 0),
          known(batch * num_lists, 0),
          nonfinite(batch * kv_heads, 0) {}

    static constexpr int64_t batch = 3;
    int64_t num_lists, kv_heads, heads, head_dim;
    DType dtype;
    Elements q;  // one head of padding behind each row
    std::vector<float> anchor;
    std::vector<int32_t> age, seqlens{50, 70, 9}, starts{0, 3, 12}, expected{50, 71, 9};
    std::vector<int64_t> known, nonfinite, counts{0, 0};
    Similarity similarity = Similarity::kMin;
    double threshold = 0.9;

    int64_t at(int64_t row, int64_t head, int64_t d) const {
        return (row * (heads + 1) + head) * head_dim + d;
    }
    // Every second head keeps its anchor's direction, the others lose it by `noise`.
    void fill(Random& random, double noise) {
        for (int64_t row = 0; row < batch; ++row)
            for (int64_t head = 0; head < heads; ++head)
                for (int64_t d = 0; d < head_dim; ++d) {
                    q.set(at(row, head, d), random.normal());
                    const double own = q.get(at(row, head, d));
                    const double off = head % 2 ? noise * random.normal() : 0.0;
                    anchor[(row * heads + head) * head_dim + d] = static_cast<float>(own + off);
                }
    }
    SelectionCacheStepParams params(std::vector<int32_t>& hit) {
        return {batch,
                num_lists,
                heads,
                kv_heads,
                head_dim,
                dtype,
                q.data(),
                {(heads + 1) * head_dim, head_dim},
                seqlens.data(),
                starts.data(),
                nonfinite.data(),
                similarity,
                threshold,
                8,
                40,
                anchor.data(),
                age.data(),
                expected.data(),
                known.data(),
                counts.data(),
                hit.data()};
    }

    // Plain loops in the documented order of sums.
    double terms(int64_t row, int64_t first, int64_t last, int which) const {
        double sums[8] = {};
        for (int64_t head = first; head < last; ++head)
            for (int64_t d = 0; d < head_dim; ++d) {
                const double x = q.get(at(row, head, d));
                const double a = double{anchor[(row * heads + head) * head_dim + d]};
                sums[d % 8] += which == 0 ? x * x : which == 1 ? a * a : x * a;
            }
        return ((sums[0] + sums[4]) + (sums[2] + sums[6])) +
               ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
    bool alike(int64_t row, int64_t first, int64_t last) const {
        const double norm = std::sqrt(terms(row, first, last, 0) * terms(row, first, last, 1));
        return norm > 0.0 && norm < kInf && terms(row, first, last, 2) >= threshold * norm;
    }
    bool similar(int64_t row, int64_t list) const {
        const int64_t per_list = heads / num_lists, first = list * per_list;
        if (similarity == Similarity::kFlat) return alike(row, first, first + per_list);
        int64_t below = 0;
        for (int64_t head = first; head < first + per_list; ++head)
            below += !alike(row, head, head + 1);
        return below <= (similarity == Similarity::kQ10 ? (per_list - 1) / 10 : 0);
    }
};

}  // namespace

TEST(selection_cache_step_decides_and_remembers) {
    int64_t num_hits = 0, num_misses = 0;
    for (DType dtype : kDTypes)
        for (int64_t head_dim : kHeadDims)
            for (int64_t num_lists : {1, 4})
                for (Similarity how : {Similarity::kMin, Similarity::kQ10, Similarity::kFlat})
                    for (double noise : {0.1, 0.5, 0.9}) {
                        Random random(static_cast<uint64_t>(head_dim + num_lists));
                        Step step(dtype, num_lists, 4, 3, head_dim);
                        step.similarity = how;
                        step.fill(random, noise);
                        for (int32_t& age : step.age) age = static_cast<int32_t>(random.below(10));
                        step.nonfinite[5] = 2;
                        const Step before = step;
                        std::vector<int32_t> hit(Step::batch * num_lists, 77);
                        ops.selection_cache_step(step.params(hit), 0, Step::batch);

                        int64_t hits = 0, tokens = 0;
                        for (int64_t row = 0; row < Step::batch; ++row) {
                            const int64_t real = before.seqlens[row] - before.starts[row];
                            for (int64_t list = 0; list < num_lists; ++list) {
                                const int64_t at = row * num_lists + list, per = 4 / num_lists;
                                int64_t defects = 0;
                                for (int64_t h = 0; h < per; ++h)
                                    defects += before.nonfinite[row * 4 + list * per + h];
                                const bool want = before.expected[row] == before.seqlens[row] &&
                                                  before.age[at] < 8 && defects == 0 &&
                                                  before.similar(row, list);
                                EXPECT(hit[at] == want, row, " ", list);
                                EXPECT(step.age[at] == (want ? before.age[at] + 1 : 0));
                                EXPECT(step.known[at] == defects);
                                hits += want;
                                tokens += want * per * std::max<int64_t>(real, 0);
                                for (int64_t h = 0; h < 12 / num_lists; ++h)
                                    for (int64_t d = 0; d < head_dim; ++d) {
                                        const int64_t head = list * (12 / num_lists) + h;
                                        const int64_t i = (row * 12 + head) * head_dim + d;
                                        const double kept = double{before.anchor[i]};
                                        EXPECT(
                                            double{step.anchor[i]} ==
                                            (want ? kept : before.q.get(before.at(row, head, d))));
                                    }
                            }
                            EXPECT(step.expected[row] ==
                                   (real > 40 ? before.seqlens[row] + 1 : -1));
                        }
                        EXPECT(step.counts[0] == hits && step.counts[1] == tokens);
                        num_hits += hits;
                        num_misses += Step::batch * num_lists - hits;
                    }
    EXPECT(num_hits > 50 && num_misses > 50, num_hits, " hits, ", num_misses, " misses");
}

TEST(selection_cache_step_of_some_rows_leaves_the_others_alone) {
    Random random(3);
    Step step(DType::kBFloat16, 4, 4, 2, 64);
    step.fill(random, 0.5);
    const Step before = step;
    std::vector<int32_t> hit(Step::batch * 4, 77);
    ops.selection_cache_step(step.params(hit), 1, 2);
    for (int64_t list = 0; list < 4; ++list) EXPECT(hit[list] == 77 && hit[8 + list] == 77);
    EXPECT(step.expected[0] == 50 && step.expected[1] == 71 && step.expected[2] == 9);
    const int64_t row = 8 * 64;
    EXPECT(std::equal(step.anchor.begin(), step.anchor.begin() + row, before.anchor.begin()));
    EXPECT(std::equal(step.anchor.begin() + 2 * row, step.anchor.end(),
                      before.anchor.begin() + 2 * row));
}

// Where an estimate of a cosine could not tell: one number below, at and above it; and where
// squares leave float32.
TEST(selection_cache_step_decides_at_the_very_threshold) {
    int64_t num_hits = 0, num_misses = 0;
    for (DType dtype : kDTypes)
        for (double scale : {1e-38, 1e-12, 1.0, 1e12, 1e36}) {
            if (scale != 1.0 && dtype != DType::kFloat32) continue;
            for (int64_t head_dim : {32, 80, 128})
                for (int64_t heads : {1, 20})
                    for (uint64_t seed = 0; seed < 3; ++seed) {
                        Random random(seed);
                        Step step(dtype, 1, 1, heads, head_dim);
                        step.similarity = Similarity::kFlat;
                        step.fill(random, 1.0);
                        for (int64_t i = 0; i < heads * head_dim; ++i) {
                            step.q.set(i, scale * step.q.get(i));
                            const double noise = heads == 1 ? 0.3 * random.normal() : 0.0;
                            step.anchor[i] =
                                static_cast<float>(scale * (double{step.anchor[i]} + noise));
                        }
                        const double cosine =
                            step.terms(0, 0, heads, 2) /
                            std::sqrt(step.terms(0, 0, heads, 0) * step.terms(0, 0, heads, 1));
                        for (double threshold :
                             {std::nextafter(cosine, 0.0), cosine, std::nextafter(cosine, 2.0),
                              cosine * (1.0 - 1e-7), cosine * (1.0 + 1e-7)}) {
                            step.threshold = threshold;
                            Step tried = step;
                            std::vector<int32_t> hit(Step::batch, 77);
                            ops.selection_cache_step(tried.params(hit), 0, Step::batch);
                            EXPECT(hit[0] == step.similar(0, 0), static_cast<int>(dtype), " ",
                                   scale, " ", head_dim, " ", heads, " ", threshold / cosine - 1.0);
                            ++(hit[0] ? num_hits : num_misses);
                        }
                    }
        }
    EXPECT(num_hits > 200 && num_misses > 200, num_hits, " hits, ", num_misses, " misses");
}
