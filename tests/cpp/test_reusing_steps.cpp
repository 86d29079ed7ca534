// Decode steps with a selection cache, as a captured graph runs them: the same tensors every time,
// nothing but the device knows what is reused. On emulated CUDA the scan decides; beside it the
// CPU's selection_cache_step does, and everything must have its bits.
#include <algorithm>
#include <cstring>

#include "check.h"
#include "cuda_emulated.h"
#include "inputs.h"
#include "kvselect/score_tokens.h"
#include "kvselect/select_tokens.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

constexpr CudaLaunch kLaunch{nullptr, false};
constexpr int64_t kBatch = 4, kWidth = 64, kKeep = 24;
constexpr int32_t kLongest = 1056;  // two tiles

struct Setting {
    DType dtype;
    int64_t num_kv_heads, group, num_lists;
    Similarity similarity;
    int64_t num_heads() const { return num_kv_heads * group; }
};

// What steps remember and produce.
struct Steps {
    explicit Steps(const Setting& s, int64_t head_dim)
        : anchor(kBatch * s.num_heads() * head_dim, 0.f),
          age(kBatch * s.num_lists, 0),
          expected(kBatch, -1),
          known(kBatch * s.num_lists, 0),
          counts(2, 0),
          hit(kBatch * s.num_lists, 77),
          scores(kBatch * s.num_kv_heads * kLongest),
          lse(kBatch * s.num_heads()),
          num_nonfinite(kBatch * s.num_kv_heads),
          ranking(kBatch * s.num_kv_heads * kRankingWords / 2),
          indices(kBatch * s.num_lists * kWidth, -1),
          lengths(kBatch * s.num_lists, 0),
          kept(kBatch * s.num_lists, 0.f) {}

    std::vector<float> anchor;
    std::vector<int32_t> age, expected;
    std::vector<int64_t> known, counts;
    std::vector<int32_t> hit;
    std::vector<float> scores, lse;
    std::vector<int64_t> num_nonfinite, ranking;
    std::vector<int32_t> indices, lengths;
    std::vector<float> kept;
};

// Scores of an emulated scan, then lists: of the heads' sums where they share one.
void score_and_select(const Setting& s, ScoreTokensParams p, bool ranked, int step, Steps* steps) {
    std::fill(steps->scores.begin(), steps->scores.end(), -3.f);
    p.scores = steps->scores.data();
    p.lse = steps->lse.data();
    p.num_nonfinite = steps->num_nonfinite.data();
    if (ranked) p.ranking = reinterpret_cast<int32_t*>(steps->ranking.data());
    // Not clean, and not the same: NaN, or numbers.
    std::vector<uint8_t> memory(cuda::score_tokens_workspace_bytes(p), step % 2 ? 0xff : 0x40);
    cuda::score_tokens(p, memory.data(), kLaunch);

    std::vector<float> votes = steps->scores;
    if (s.num_lists < s.num_kv_heads)
        for (int64_t row = 0; row < kBatch; ++row)
            for (int64_t t = 0; t < kLongest; ++t) {
                float sum = 0.f;
                for (int64_t h = 0; h < s.num_kv_heads; ++h)
                    sum += steps->scores[(row * s.num_kv_heads + h) * kLongest + t];
                votes[row * kLongest + t] = sum;
            }
    SelectTokensParams select{};
    select.blocks = p.blocks;
    select.num_lists = s.num_lists;
    select.scores = votes.data();
    select.scores_strides[0] = select.scores_strides[1] = s.num_lists * kLongest;
    select.scores_strides[2] = kLongest;
    select.max_seqlen_k = kLongest;
    select.keep = kKeep;
    select.pool_width = 1;
    select.width = kWidth;
    select.hit = p.hit;
    select.ranking = p.ranking;
    select.indices = steps->indices.data();
    select.topk_length = steps->lengths.data();
    select.kept_score = steps->kept.data();
    std::vector<uint8_t> workspace(cuda::select_tokens_workspace_bytes(select), 0xff);
    cuda::select_tokens(select, workspace.data(), kLaunch);
}

struct Hits {
    int64_t hits = 0, misses = 0;
};

// The first row starts with so many tokens; from 1024 on the next tile begins.
Hits compare_steps(const Setting& s, int64_t head_dim, int32_t first_row, int num_steps) {
    const int64_t heads = s.num_heads(), row_stride = (heads + 1) * head_dim;
    Random random(static_cast<uint64_t>(100 * head_dim + 10 * s.num_lists + s.group));
    Cache cache(s.dtype, Layout::kPaged, {kLongest, 80, 130, 30}, s.num_kv_heads, head_dim,
                kLongest);
    cache.fill(random);
    std::vector<int32_t> seqlens{first_row, 57, 110, 0};
    const std::vector<int32_t> starts{7, 0, 30, 25};  // the last row: padding alone
    std::vector<int64_t> defects(kBatch * s.num_kv_heads, 0);
    Elements compared(s.dtype, kBatch * row_stride);  // a head of padding behind each row
    std::vector<float> q(kBatch * heads * head_dim);
    for (float& x : q) x = static_cast<float>(random.normal());
    Steps scan(s, head_dim), apart(s, head_dim);
    Hits found;
    for (int step = 0; step < num_steps; ++step) {
        for (int64_t row = 0; row < kBatch; ++row) {
            seqlens[row] += row == 2 && step == 4 ? 2 : 1;  // two at once void a row's lists
            for (int64_t head = 0; head < heads; ++head) {
                const bool turns = random.uniform() < 0.3 / static_cast<double>(s.group);
                for (int64_t d = 0; d < head_dim; ++d) {
                    float& x = q[(row * heads + head) * head_dim + d];
                    x = static_cast<float>(turns ? random.normal() : x + 0.05 * random.normal());
                    compared.set(row * row_stride + head * head_dim + d, double{x});
                }
            }
        }
        if (step == 3) {  // a token that is not finite
            cache.k.set(cache.keys().offset(0, seqlens[0] - 1, s.num_kv_heads - 1), kNaN);
            ++defects[s.num_kv_heads - 1];
        }
        ScoreTokensParams p{};
        p.dtype = s.dtype;
        p.num_q_heads = heads;
        p.num_kv_heads = s.num_kv_heads;
        p.head_dim = head_dim;
        p.blocks = QueryBlocks{
            kBatch, 1, 1, nullptr, seqlens.data(), starts.data(), WindowRule::kDecode, 3, 20};
        p.num_vectors = 1;
        p.q = q.data();
        p.keys = cache.keys();
        p.keep = kKeep;
        p.scale = 0.15f;
        p.max_seqlen_k = kLongest;
        p.num_hit_lists = s.num_lists;
        const auto memory = [&](Steps& of) {
            return SelectionCacheStepParams{kBatch,
                                            s.num_lists,
                                            heads,
                                            s.num_kv_heads,
                                            head_dim,
                                            s.dtype,
                                            compared.data(),
                                            {row_stride, head_dim},
                                            seqlens.data(),
                                            starts.data(),
                                            defects.data(),
                                            s.similarity,
                                            0.9,
                                            4,
                                            60,
                                            of.anchor.data(),
                                            of.age.data(),
                                            of.expected.data(),
                                            of.known.data(),
                                            of.counts.data(),
                                            of.hit.data()};
        };
        ScoreTokensParams plain = p;
        p.hit = scan.hit.data();
        p.reuse = memory(scan);
        score_and_select(s, p, s.num_lists == s.num_kv_heads && s.group <= 16, step, &scan);
        cpu::scalar_implementation().selection_cache_step(memory(apart), 0, kBatch);
        plain.hit = apart.hit.data();
        score_and_select(s, plain, false, step, &apart);
        EXPECT(scan.hit == apart.hit, "step ", step);
        EXPECT(same_bits(scan.anchor, apart.anchor), "step ", step);
        EXPECT(scan.age == apart.age && scan.known == apart.known, "step ", step);
        EXPECT(scan.expected == apart.expected && scan.counts == apart.counts, "step ", step);
        EXPECT(same_bits(scan.scores, apart.scores) && same_bits(scan.lse, apart.lse));
        EXPECT(scan.num_nonfinite == apart.num_nonfinite, "step ", step);
        EXPECT(scan.indices == apart.indices && scan.lengths == apart.lengths, "step ", step);
        EXPECT(same_bits(scan.kept, apart.kept), "step ", step);
        for (int64_t item = 0; item < kBatch * s.num_kv_heads; ++item) {
            const int64_t at = s.num_lists == 1 ? item / s.num_kv_heads : item;
            if (scan.hit[at] == 0) continue;
            EXPECT(scan.num_nonfinite[item] == 0 && scan.scores[item * kLongest + 40] == -3.f);
            for (int64_t h = 0; h < s.group; ++h) EXPECT(scan.lse[item * s.group + h] == -kInf);
        }
        for (const int32_t hit : scan.hit) ++(hit ? found.hits : found.misses);
    }
    return found;
}

}  // namespace

TEST(a_scan_decides_step_by_step_as_the_cpu_does) {
    if (&ops != &cuda_emulated_implementation()) return;
    const Setting settings[] = {{DType::kFloat32, 3, 4, 3, Similarity::kMin},
                                {DType::kFloat16, 3, 4, 1, Similarity::kFlat},
                                {DType::kBFloat16, 2, 8, 1, Similarity::kQ10}};
    for (const Setting& setting : settings) {
        const Hits found = compare_steps(setting, 80, setting.num_lists > 1 ? 1028 : 180, 8);
        EXPECT(found.hits > 2 && found.misses > 6, found.hits, " ", found.misses);
    }
    // More columns than logits are kept for: another kernel votes and remembers.
    for (const int64_t num_lists : {1, 2}) {
        const Setting setting{DType::kBFloat16, 2, 17, num_lists, Similarity::kQ10};
        const Hits found = compare_steps(setting, 32, num_lists > 1 ? 1028 : 180, 7);
        EXPECT(found.hits > 2 && found.misses > 6, found.hits, " ", found.misses);
    }
}
