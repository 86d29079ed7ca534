#include "kvselect/sparse_attention.h"

#include <algorithm>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

struct Case {
    DType dtype = DType::kFloat32;
    Layout layout = Layout::kHeadMajor;
    std::vector<int32_t> seqlens{100}, starts{};
    int64_t num_kv_heads = 2, group = 2, head_dim = 64, seqlen_q = 1;
    std::vector<int32_t> offsets{};
    int64_t listed = 0;        // tokens per list; 0: no lists
    bool shared_list = false;  // head stride 0
    const RopeTable* rope = nullptr;
    float softcap = 0.f;
    std::vector<float> sink_logits{};  // one per query head, or none
};

// Runs the op on a cache whose unlisted tokens are NaN, and compares with softmax in double.
void attend_and_compare(const cpu::Implementation& ops, const Case& c, int line) {
    const int64_t batch = c.seqlens.size(), num_q_heads = c.num_kv_heads * c.group;
    const int64_t num_blocks = c.offsets.empty() ? 1 : static_cast<int64_t>(c.offsets.size()) - 1;
    Random random(static_cast<uint64_t>(line) * 31 + static_cast<uint64_t>(c.head_dim));
    Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, c.head_dim);
    cache.fill(random);

    const int64_t list_heads = c.shared_list ? 1 : c.num_kv_heads, width = c.listed + 1;
    std::vector<int32_t> indices(batch * num_blocks * list_heads * width, -1),
        lengths(batch * num_blocks * list_heads);
    for (int64_t row = 0; c.listed && row < batch; ++row) {
        const int64_t seqlen = c.seqlens[row];
        std::vector<bool> used(seqlen, false);
        for (int64_t list = 0; list < num_blocks * list_heads; ++list) {
            int32_t* out = indices.data() + (row * num_blocks * list_heads + list) * width;
            int32_t& length = lengths[row * num_blocks * list_heads + list];
            for (int64_t t = 0; t < seqlen; ++t)  // about `listed` of them, the newest always
                if (length < c.listed && (t == seqlen - 1 || random.below(seqlen) < c.listed)) {
                    out[length++] = static_cast<int32_t>(t);
                    used[t] = true;
                }
        }
        for (int64_t t = 0; t < seqlen; ++t)
            if (!used[t]) cache.poison(row, t);
    }
    for (int64_t row = 0; !c.starts.empty() && !c.listed && row < batch; ++row)
        for (int64_t t = 0; t < std::min(c.starts[row], c.seqlens[row]); ++t) cache.poison(row, t);

    const int64_t q_stride = num_q_heads * c.head_dim + 4;
    Elements q(c.dtype, std::max<int64_t>(1, batch * c.seqlen_q * q_stride));
    for (int64_t i = 0; i < batch * c.seqlen_q; ++i)
        for (int64_t j = 0; j < num_q_heads * c.head_dim; ++j)
            q.set(i * q_stride + j, 2.0 * random.normal());
    Elements out(c.dtype, batch * c.seqlen_q * num_q_heads * c.head_dim);
    std::vector<float> lse(batch * c.seqlen_q * num_q_heads, NAN);

    SparseAttentionParams p{};
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
                           WindowRule::kDecode,
                           0,
                           0};
    p.q = q.data();
    p.q_strides[0] = c.seqlen_q * q_stride;
    p.q_strides[1] = q_stride;
    p.q_strides[2] = c.head_dim;
    p.keys = cache.keys();
    p.values = cache.values();
    if (c.listed) {
        p.indices = indices.data();
        p.topk_length = lengths.data();
        const int64_t strides[] = {num_blocks * list_heads, list_heads, c.shared_list ? 0 : 1};
        for (int i = 0; i < 3; ++i) {
            p.indices_strides[i] = strides[i] * width;
            p.topk_length_strides[i] = strides[i];
        }
    }
    p.softmax_scale = 0.125f;
    p.softcap = c.softcap;
    if (!c.sink_logits.empty()) p.sink_logits = c.sink_logits.data();
    if (c.rope) p.rope = c.rope->view();
    p.out = out.data();
    p.lse = lse.data();
    const int64_t items = batch * num_blocks * c.num_kv_heads;
    // Item by item, then in parts from the last to the first: the same bits, from dirty memory.
    std::vector<float> scratch(sparse_attention_scratch_floats(p), NAN);
    for (int64_t item = 0; item < items; ++item)
        ops.sparse_attention(p, AttentionStage::kWhole, item, 0, 0, nullptr, scratch.data());
    if (sparse_attention_has_parts(p)) {
        const int64_t longest = *std::max_element(c.seqlens.begin(), c.seqlens.end());
        const int64_t parts = sparse_attention_parts(longest);
        const int64_t per_item = sparse_attention_workspace_floats(p, parts);
        std::vector<float> workspace(items * per_item, NAN);
        const std::vector<float> whole_lse = lse;
        const auto whole_out = out;
        for (int64_t i = items * parts - 1; i >= 0; --i)
            ops.sparse_attention(p, AttentionStage::kParts, i / parts, i % parts, i % parts + 1,
                                 workspace.data() + i / parts * per_item, scratch.data());
        for (int64_t item = 0; item < items; ++item)
            ops.sparse_attention(p, AttentionStage::kMerge, item, 0, parts,
                                 workspace.data() + item * per_item, scratch.data());
        EXPECT(same_bits(whole_lse, lse) && whole_out.bytes() == out.bytes(),
               "in parts, attention differs from that of whole items");
    }

    RelativeError error;
    double worst_lse = 0.0;
    for (int64_t row = 0; row < batch; ++row)
        for (int64_t j = 0; j < c.seqlen_q; ++j) {
            int64_t block = 0;
            while (block + 1 < num_blocks && c.offsets[block + 1] <= j) ++block;
            const int64_t position = c.seqlens[row] - c.seqlen_q + j;
            for (int64_t head = 0; head < num_q_heads; ++head) {
                const int64_t kv_head = head / c.group;
                std::vector<int64_t> seen;
                if (c.listed) {
                    const int64_t list =
                        (row * num_blocks + block) * list_heads + (c.shared_list ? 0 : kv_head);
                    for (int64_t i = 0; i < lengths[list]; ++i)
                        if (indices[list * width + i] <= position)
                            seen.push_back(indices[list * width + i]);
                } else {
                    const int64_t start =
                        c.starts.empty() ? 0 : std::min(c.starts[row], c.seqlens[row]);
                    for (int64_t t = start; t <= position; ++t) seen.push_back(t);
                }
                std::vector<double> query(c.head_dim), logits, want(c.head_dim, 0.0);
                for (int64_t d = 0; d < c.head_dim; ++d)
                    query[d] = q.get((row * c.seqlen_q + j) * q_stride + head * c.head_dim + d);
                if (c.rope) {  // to the rank of its own token: the entries before it, whether it is
                               // listed or not
                    const bool listed = !seen.empty() && seen.back() == position;
                    query = c.rope->rotate(query, static_cast<int64_t>(seen.size()) - listed);
                }
                double peak = -kInf, total = 0.0;
                for (size_t rank = 0; rank < seen.size(); ++rank) {
                    std::vector<double> key(c.head_dim);
                    for (int64_t d = 0; d < c.head_dim; ++d)
                        key[d] = cache.key(row, seen[rank], kv_head, d);
                    if (c.rope) key = c.rope->rotate(key, static_cast<int64_t>(rank));
                    logits.push_back(0.125 * dot(query, key));
                    if (c.softcap > 0.f)
                        logits.back() = c.softcap * std::tanh(logits.back() / c.softcap);
                    peak = std::max(peak, logits.back());
                }
                for (double& x : logits) total += x = std::exp(x - peak);
                if (!c.sink_logits.empty() && !seen.empty())
                    total += std::exp(double{c.sink_logits[head]} - peak);
                for (size_t i = 0; i < seen.size(); ++i)
                    for (int64_t d = 0; d < c.head_dim; ++d)
                        want[d] += logits[i] / total * cache.value(row, seen[i], kv_head, d);
                const int64_t at = (row * c.seqlen_q + j) * num_q_heads + head;
                for (int64_t d = 0; d < c.head_dim; ++d)
                    error.add(out.get(at * c.head_dim + d), want[d]);
                if (seen.empty()) {
                    EXPECT(lse[at] == -INFINITY, "from line ", line, ": a query that sees nothing");
                } else {
                    const double wanted = peak + std::log(total);
                    worst_lse = std::max(
                        worst_lse, std::abs(lse[at] - wanted) / std::max(1.0, std::abs(wanted)));
                }
            }
        }
    EXPECT(error.value() <= tolerance(c.dtype), "from line ", line, ": error ", error.value(),
           ", head_dim ", c.head_dim);
    EXPECT(worst_lse <= (c.dtype == DType::kFloat32 ? 2e-5 : 2e-2), "from line ", line,
           ": lse off by ", worst_lse);
}

}  // namespace

TEST(sparse_attention_decode_without_a_list) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts)
            for (int64_t head_dim : kHeadDims)
                attend_and_compare(ops,
                                   {.dtype = dtype,
                                    .layout = layout,
                                    .seqlens = {1, 63, 64, 65, 130},
                                    .head_dim = head_dim},
                                   __LINE__);
    for (int64_t group : {1, 3, 4, 8})
        attend_and_compare(ops, {.seqlens = {70}, .group = group}, __LINE__);
}

TEST(sparse_attention_decode_reads_listed_tokens_only) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts)
            for (bool shared : {false, true})
                attend_and_compare(ops,
                                   {.dtype = dtype,
                                    .layout = layout,
                                    .seqlens = {300, 5, 129},
                                    .group = 4,
                                    .head_dim = 96,
                                    .listed = 70,
                                    .shared_list = shared},
                                   __LINE__);
}

TEST(sparse_attention_over_several_parts) {
    constexpr int32_t kLong = 2 * kAttentionPartTokens + 100;
    for (DType dtype : kDTypes)
        for (int64_t listed : {int64_t{0}, kAttentionPartTokens + 70})
            attend_and_compare(ops,
                               {.dtype = dtype,
                                .layout = Layout::kPaged,
                                .seqlens = {kLong, 0, 511, 512, 513},
                                .starts = {9, 0, 0, 0, 1},
                                .num_kv_heads = 1,
                                .group = 5,
                                .listed = listed},
                               __LINE__);
    attend_and_compare(ops,
                       {.seqlens = {700}, .seqlen_q = 4, .offsets = {0, 1, 1, 3, 4}, .listed = 600},
                       __LINE__);  // as many blocks as queries, of 1, 0, 2 and 1 query
}

TEST(sparse_attention_blocks_of_queries_are_causal) {
    for (DType dtype : kDTypes)
        for (int64_t head_dim : kHeadDims)
            attend_and_compare(ops,
                               {.dtype = dtype,
                                .layout = Layout::kPaged,
                                .seqlens = {90, 40},
                                .starts = {0, 7},
                                .head_dim = head_dim,
                                .seqlen_q = 33,
                                .offsets = {0, 1, 17, 33}},
                               __LINE__);
    for (int64_t group : {1, 3, 5, 8})
        attend_and_compare(
            ops, {.seqlens = {150}, .group = group, .seqlen_q = 150, .offsets = {0, 128, 150}},
            __LINE__);
    attend_and_compare(
        ops, {.seqlens = {200, 77}, .seqlen_q = 20, .offsets = {0, 4, 20}, .listed = 50}, __LINE__);
}

TEST(sparse_attention_of_many_rows) {
    for (DType dtype : {DType::kFloat16, DType::kBFloat16})
        for (int64_t head_dim : {64, 96, 256})
            attend_and_compare(ops,
                               {.dtype = dtype,
                                .layout = Layout::kPaged,
                                .seqlens = {70, 20},
                                .starts = {0, 3},
                                .num_kv_heads = 1,
                                .group = 4,
                                .head_dim = head_dim,
                                .seqlen_q = 33,
                                .offsets = {0, 1, 33},
                                .listed = head_dim == 96 ? 0 : 40},
                               __LINE__);
    const RopeTable half(80, 16, 0, false);
    attend_and_compare(ops,
                       {.dtype = DType::kBFloat16,
                        .seqlens = {70},
                        .num_kv_heads = 1,
                        .group = 7,
                        .head_dim = 32,
                        .seqlen_q = 20,
                        .listed = 50,
                        .rope = &half,
                        .softcap = 30.f},
                       __LINE__);
    attend_and_compare(ops,
                       {.dtype = DType::kFloat16,
                        .seqlens = {70, 33},
                        .seqlen_q = 40,
                        .listed = 60,
                        .shared_list = true,
                        .sink_logits = {0.f, 2.f, -INFINITY, 40.f}},
                       __LINE__);
}

TEST(sparse_attention_caps_logits_and_counts_sinks) {
    for (DType dtype : kDTypes)
        for (float softcap : {0.f, 0.75f, 30.f})
            for (int64_t listed : {0, 70}) {
                Case c{.dtype = dtype,
                       .seqlens = {300, 1, 0, 70},
                       .listed = listed,
                       .softcap = softcap,
                       .sink_logits = {0.f, 2.f, -INFINITY, 40.f}};
                attend_and_compare(ops, c, __LINE__);
                c.seqlens = {300, 90};
                c.seqlen_q = 20;
                c.offsets = {0, 1, 20};
                attend_and_compare(ops, c, __LINE__);
            }
}

TEST(sparse_attention_rotates_to_ranks) {
    for (bool interleaved : {false, true}) {
        const RopeTable half(160, 16, 0, interleaved), part(160, 12, 8, interleaved);
        attend_and_compare(ops, {.seqlens = {150, 3}, .head_dim = 32, .listed = 40, .rope = &half},
                           __LINE__);
        attend_and_compare(ops,
                           {.seqlens = {150},
                            .head_dim = 80,
                            .seqlen_q = 9,
                            .offsets = {0, 4, 9},
                            .listed = 40,
                            .rope = &part},
                           __LINE__);
        attend_and_compare(ops, {.seqlens = {150}, .starts = {11}, .head_dim = 32, .rope = &half},
                           __LINE__);
    }
}

TEST(sparse_attention_of_nothing_is_zero) {
    // Row 0 is empty, row 1 has fewer tokens than queries, row 2 is all padding.
    attend_and_compare(ops, {.seqlens = {0, 2, 6}, .starts = {0, 0, 6}, .seqlen_q = 4}, __LINE__);
    attend_and_compare(ops, {.seqlens = {0, 6}, .starts = {0, 6}}, __LINE__);
}

namespace {

// One block of queries over everything that one KV head holds.
struct Attended {
    Attended(const cpu::Implementation& ops, Cache& cache, const Elements& q, int64_t heads,
             int64_t seqlen_q, int64_t head_dim)
        : out(cache.dtype, seqlen_q * heads * head_dim), lse(seqlen_q * heads, 0.f) {
        SparseAttentionParams p{};
        p.dtype = cache.dtype;
        p.num_q_heads = heads;
        p.num_kv_heads = 1;
        p.head_dim = head_dim;
        p.blocks = QueryBlocks{
            1, 1, seqlen_q, nullptr, cache.seqlens.data(), nullptr, WindowRule::kDecode, 0, 0};
        p.q = q.data();
        p.q_strides[0] = seqlen_q * heads * head_dim;
        p.q_strides[1] = heads * head_dim;
        p.q_strides[2] = head_dim;
        p.keys = cache.keys();
        p.values = cache.values();
        p.softmax_scale = 0.125f;
        p.out = out.data();
        p.lse = lse.data();
        std::vector<float> scratch(sparse_attention_scratch_floats(p), NAN);
        ops.sparse_attention(p, AttentionStage::kWhole, 0, 0, 0, nullptr, scratch.data());
    }
    Elements out;
    std::vector<float> lse;
};

}  // namespace

TEST(sparse_attention_shows_defects) {
    // A NaN key, alone with its part of the list or not, and a NaN query: never a healthy number.
    for (DType dtype : kDTypes)
        for (int64_t seqlen_q : {1, 40})
            for (int64_t bad : {0, 16, 49, 600}) {
                const int64_t head_dim = 64, heads = 4, q_stride = heads * head_dim;
                Random random(static_cast<uint64_t>(bad + seqlen_q));
                Cache cache(dtype, Layout::kHeadMajor, {700}, 1, head_dim);
                cache.fill(random);
                if (bad != 600) cache.k.set(cache.keys().offset(0, bad, 0) + 5, kNaN);
                Elements q(dtype, seqlen_q * q_stride);
                for (int64_t i = 0; i < seqlen_q * q_stride; ++i) q.set(i, random.normal());
                if (bad == 600) q.set((seqlen_q - 1) * q_stride + 3, kNaN);
                const Attended got(ops, cache, q, heads, seqlen_q, head_dim);
                const int64_t last = (seqlen_q - 1) * heads;
                EXPECT(std::isnan(got.lse[last]) && std::isnan(got.out.get(last * head_dim)),
                       "defect at ", bad, ", ", seqlen_q, " queries: lse ", got.lse[last]);
            }
}

// Heads of one query fill a panel of rows: all of them see as much, and less than there is.
TEST(sparse_attention_shows_a_value_to_those_who_see_it_and_nobody_else) {
    const int64_t length = 300, head_dim = 64, heads = 32, seqlen_q = 2;
    for (DType dtype : kDTypes) {
        Random random(5);
        Cache cache(dtype, Layout::kHeadMajor, {static_cast<int32_t>(length)}, 1, head_dim);
        cache.fill(random);
        cache.v.set(cache.values().offset(0, length - 1, 0) + 1, kNaN);
        Elements q(dtype, seqlen_q * heads * head_dim);
        for (int64_t i = 0; i < seqlen_q * heads * head_dim; ++i) q.set(i, random.normal());
        const Attended got(ops, cache, q, heads, seqlen_q, head_dim);
        for (int64_t row = 0; row < seqlen_q * heads; ++row)
            EXPECT(std::isnan(got.out.get(row * head_dim + 1)) == (row >= heads), "row ", row);
    }
}

TEST(sparse_attention_of_huge_logits_gives_the_likeliest_value) {
    const int64_t length = 300, head_dim = 64, heads = 4, seqlen_q = 20;
    for (DType dtype : kDTypes) {
        Random random(6);
        Cache cache(dtype, Layout::kHeadMajor, {static_cast<int32_t>(length)}, 1, head_dim);
        cache.fill(random);
        const double size = 8e3;
        for (int64_t t = 0; t < length; ++t)
            for (int64_t d = 0; d < head_dim; ++d)
                cache.k.set(cache.keys().offset(0, t, 0) + d, size * random.normal());
        Elements q(dtype, seqlen_q * heads * head_dim);
        for (int64_t i = 0; i < seqlen_q * heads * head_dim; ++i) q.set(i, size * random.normal());
        const Attended got(ops, cache, q, heads, seqlen_q, head_dim);
        for (int64_t row = 0; row < seqlen_q * heads; ++row) {
            int64_t likeliest = 0;
            double largest = -kInf;
            for (int64_t t = 0; t < length - seqlen_q + 1 + row / heads; ++t) {
                double logit = 0.0;
                for (int64_t d = 0; d < head_dim; ++d)
                    logit += q.get(row * head_dim + d) * cache.key(0, t, 0, d);
                if (logit > largest) largest = logit, likeliest = t;
            }
            const double value = got.out.get(row * head_dim),
                         want = cache.value(0, likeliest, 0, 0);
            EXPECT(std::abs(value - want) <= 2e-6 * std::abs(want), "row ", row, ": ", value,
                   " for ", want);
        }
    }
}
