#include "kvselect/block_sparse_attention.h"

#include "block_inputs.h"
#include "check.h"
#include "cuda_emulated.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

// Against plain loops in double.
void expect_attention(const cpu::Implementation& ops, BlockInputs& in, const BlockMask& mask) {
    const BlockGrid& g = in.grid;
    Elements out(g.dtype, g.batch * g.seqlen_q * g.num_q_heads * g.head_dim);
    std::vector<float> lse(static_cast<size_t>(g.batch * g.seqlen_q * g.num_q_heads), NAN);
    BlockSparseAttentionParams p{};
    p.grid = g;
    p.values = in.values();
    p.mask = mask;
    p.out = out.data();
    p.lse = lse.data();
    std::vector<float> scratch(static_cast<size_t>(block_sparse_attention_scratch_floats(p)));
    const int64_t items = g.batch * g.num_q_heads * g.num_q_blocks();
    ops.block_sparse_attention(p, 0, items / 2, scratch.data());
    ops.block_sparse_attention(p, items / 2, items, scratch.data());

    double error = 0, norm = 0;
    bool nonzero = false;  // where nothing is seen
    for (int64_t row = 0; row < g.batch; ++row)
        for (int64_t query = 0; query < g.seqlen_q; ++query)
            for (int64_t head = 0; head < g.num_q_heads; ++head) {
                const int64_t block = query / g.q_block_size;
                std::vector<double> expected(static_cast<size_t>(g.head_dim), 0.0);
                double total = 0;
                for (int64_t t = 0; t < in.seen(row, query); ++t) {
                    if (!in.kept(row, head, block, t / g.kv_block_size)) continue;
                    const double weight = std::exp(in.logit(row, query, head, t));
                    total += weight;
                    for (int64_t d = 0; d < g.head_dim; ++d)
                        expected[static_cast<size_t>(d)] += weight * in.value(row, t, head, d);
                }
                const int64_t at = (row * g.seqlen_q + query) * g.num_q_heads + head;
                const double got_lse = lse[static_cast<size_t>(at)];
                if (total == 0)
                    EXPECT(got_lse == -kInf, got_lse);
                else
                    EXPECT(std::abs(got_lse - std::log(total)) < 1e-5, got_lse, std::log(total));
                for (int64_t d = 0; d < g.head_dim; ++d) {
                    const double want = total == 0 ? 0.0 : expected[static_cast<size_t>(d)] / total;
                    const double got = out.get(at * g.head_dim + d);
                    error += (got - want) * (got - want);
                    norm += want * want;
                    nonzero = nonzero || (total == 0 && got != 0.0);
                }
            }
    const double bound = g.dtype == DType::kFloat32   ? 2e-6
                         : g.dtype == DType::kFloat16 ? 2e-3
                                                      : 1.6e-2;
    EXPECT(!nonzero);
    EXPECT(std::sqrt(error) <= bound * std::sqrt(norm), std::sqrt(error / norm));
}

}  // namespace

TEST(block_sparse_attention_equals_plain_loops_for_every_form_of_mask) {
    // Emulated threads are slow: of all cases every fifth, in which every form meets every size.
    const int64_t every = ops.name == std::string("cuda") ? 5 : 1;
    int64_t number = 0;
    for (DType dtype : kDTypes)
        for (bool causal : {true, false})
            for (int64_t head_dim : {32, 80})
                for (int64_t q_block_size : {16, 128})
                    for (int64_t kv_block_size : {16, 128}) {
                        BlockInputs in(dtype, head_dim, q_block_size, kv_block_size, causal);
                        for (const BlockMask& mask : {in.dense(), in.lists(), in.csr()})
                            if (number++ % every == 0) expect_attention(ops, in, mask);
                    }
}

TEST(block_sparse_attention_of_groups_and_long_rows) {
    for (int64_t group : {1, 7, 8}) {
        BlockInputs in(DType::kBFloat16, 64, 32, 64, true, group);
        expect_attention(ops, in, in.csr());
    }
    for (int64_t head_dim : {96, 128, 256}) {
        BlockInputs in(DType::kFloat16, head_dim, 128, 32, true, 1);
        expect_attention(ops, in, in.lists());
    }
}

namespace {
// A value that is not finite shows to those who see it and to nobody else.
void expect_bad_values_where_they_are_seen(const cpu::Implementation& ops,
                                           const std::vector<DType>& dtypes) {
    constexpr int64_t kChannel = 3, kBlock = 16;
    for (DType dtype : dtypes)
        for (float bad : {NAN, INFINITY}) {
            BlockInputs in(dtype, 64, 128, kBlock, true);
            const BlockGrid& g = in.grid;
            int64_t at = in.seen(0, 0) + 5;  // of a block that one of the heads keeps
            while (at < 140 && !in.kept(0, 0, 0, at / kBlock) && !in.kept(0, 1, 0, at / kBlock))
                ++at;
            in.set_value(0, at, 0, kChannel, bad);
            Elements out(g.dtype, g.batch * g.seqlen_q * g.num_q_heads * g.head_dim);
            std::vector<float> lse(static_cast<size_t>(g.batch * g.seqlen_q * g.num_q_heads));
            BlockSparseAttentionParams p{};
            p.grid = g;
            p.values = in.values();
            p.mask = in.dense();
            p.out = out.data();
            p.lse = lse.data();
            std::vector<float> scratch(
                static_cast<size_t>(block_sparse_attention_scratch_floats(p)));
            ops.block_sparse_attention(p, 0, g.batch * g.num_q_heads * g.num_q_blocks(),
                                       scratch.data());
            int64_t shown = 0;
            for (int64_t query = 0; query < g.seqlen_q; ++query)
                for (int64_t head = 0; head < g.num_q_heads; ++head)
                    for (int64_t d = 0; d < g.head_dim; ++d) {
                        const double got = out.get((query * g.num_q_heads + head) * g.head_dim + d);
                        const bool reached = head < 2 && d == kChannel && in.seen(0, query) > at &&
                                             in.kept(0, head, 0, at / kBlock);
                        shown += reached;
                        EXPECT(std::isfinite(got) != reached, query, " ", head, " ", d, " ", got);
                    }
            EXPECT(shown > 0);
        }
}
}  // namespace

TEST(block_sparse_attention_keeps_bad_values_to_those_who_see_them) {
    expect_bad_values_where_they_are_seen(ops, {std::begin(kDTypes), std::end(kDTypes)});
}

// More KV blocks than any kernel marks at once; lists with entries that are no blocks.
TEST(block_sparse_attention_finds_few_blocks_of_very_many) {
    constexpr int64_t kQueries = 3, kDim = 32, kBlocks = 5000, kTokens = kBlocks * 16 - 5;
    Elements q(DType::kFloat32, kQueries * kDim), k(DType::kFloat32, kTokens * kDim),
        out(DType::kFloat32, kQueries * kDim);
    Random random(3);
    for (int64_t i = 0; i < kQueries * kDim; ++i) q.set(i, random.normal());
    const std::vector<int32_t> kept{0, 31, 4095, 4096, 4999};
    for (int32_t block : kept)  // what lies between stays NaN: nobody may read it
        for (int64_t i = block * 16 * kDim; i < std::min<int64_t>((block + 1) * 16, kTokens) * kDim;
             ++i)
            k.set(i, random.normal());
    const std::vector<int32_t> list{4999, -1, 4096, 0, 5000, 31, 4095, 31, 1 << 30};
    float lse[kQueries];
    BlockSparseAttentionParams p{};
    BlockGrid& g = p.grid;
    g.dtype = DType::kFloat32;
    g.batch = g.num_q_heads = g.num_kv_heads = 1;
    g.seqlen_q = kQueries;
    g.seqlen_k = kTokens;
    g.head_dim = kDim;
    g.q_block_size = g.kv_block_size = 16;
    g.causal = true;
    g.q = q.data();
    g.q_strides[0] = kQueries * kDim;
    g.q_strides[1] = g.q_strides[2] = kDim;
    g.keys = KVView{k.data(), kTokens * kDim, kDim, kDim, kTokens, nullptr, 0};
    g.softmax_scale = 0.2f;
    p.values = g.keys;
    p.mask.form = MaskForm::kLists;
    p.mask.indices = list.data();
    p.mask.width = static_cast<int64_t>(list.size());
    p.mask.strides[3] = 1;
    p.out = out.data();
    p.lse = lse;
    std::vector<float> scratch(static_cast<size_t>(block_sparse_attention_scratch_floats(p)));
    ops.block_sparse_attention(p, 0, 1, scratch.data());
    for (int64_t query = 0; query < kQueries; ++query) {
        const int64_t seen = kTokens - kQueries + query + 1;
        double total = 0;
        std::vector<double> expected(kDim, 0.0);
        for (int32_t block : kept)
            for (int64_t t = block * 16; t < std::min<int64_t>((block + 1) * 16, seen); ++t) {
                double logit = 0;
                for (int64_t d = 0; d < kDim; ++d)
                    logit += q.get(query * kDim + d) * k.get(t * kDim + d);
                const double weight = std::exp(0.2 * logit);
                total += weight;
                for (int64_t d = 0; d < kDim; ++d)
                    expected[static_cast<size_t>(d)] += weight * k.get(t * kDim + d);
            }
        EXPECT(std::abs(lse[query] - std::log(total)) < 1e-5, lse[query], std::log(total));
        for (int64_t d = 0; d < kDim; ++d)
            EXPECT(std::abs(out.get(query * kDim + d) - expected[static_cast<size_t>(d)] / total) <
                   1e-5);
    }
}

TEST(block_sparse_attention_caps_logits) {
    BlockInputs in(DType::kFloat32, 64, 64, 64, true);
    in.grid.softcap = 1.5f;
    expect_attention(ops, in, in.dense());
}

// --- sm_90a's own kernel: copies, barriers and products of the warpgroups as host twins

namespace {
constexpr emulation::Order kOrders[] = {emulation::Order::kForwards, emulation::Order::kBackwards,
                                        emulation::Order::kShuffled};
}

TEST_ONCE(block_sparse_attention_sm90a_equals_plain_loops) {
    const cpu::Implementation& ops = cuda_emulated_sm90a_implementation();
    int64_t number = 0;
    for (int64_t head_dim : {64, 80, 128, 256})
        for (int64_t q_block_size : {64, 128})
            for (int64_t kv_block_size : {16, 64, 128}) {
                emulation::set_order(kOrders[number % 3]);
                const DType dtype = number % 2 ? DType::kFloat16 : DType::kBFloat16;
                BlockInputs in(dtype, head_dim, q_block_size, kv_block_size, number % 5 < 3, 1);
                if (number % 4 == 3) in.grid.softcap = 1.5f;
                const BlockMask masks[] = {in.dense(), in.lists(), in.csr()};
                expect_attention(ops, in, masks[number++ / 2 % 3]);
            }
    emulation::set_order(emulation::Order::kForwards);
}

TEST_ONCE(block_sparse_attention_sm90a_of_groups) {
    emulation::set_order(emulation::Order::kShuffled);
    BlockInputs in(DType::kBFloat16, 64, 64, 64, true, 7);
    expect_attention(cuda_emulated_sm90a_implementation(), in, in.csr());
    emulation::set_order(emulation::Order::kForwards);
}

TEST_ONCE(block_sparse_attention_sm90a_keeps_bad_values_to_those_who_see_them) {
    emulation::set_order(emulation::Order::kBackwards);
    expect_bad_values_where_they_are_seen(cuda_emulated_sm90a_implementation(),
                                          {DType::kFloat16, DType::kBFloat16});
    emulation::set_order(emulation::Order::kForwards);
}

// More tiles than places of the ring, and than entries that say what a tile is made of.
TEST_ONCE(block_sparse_attention_sm90a_goes_around_its_ring) {
    constexpr int64_t kTokens = 1300, kDim = 64;
    for (int64_t q_block_size : {64, 128})
        for (emulation::Order order : kOrders) {
            emulation::set_order(order);
            Elements q(DType::kBFloat16, q_block_size * kDim), k(DType::kBFloat16, kTokens * kDim),
                out(DType::kBFloat16, q_block_size * kDim);
            Random random(5);
            for (int64_t i = 0; i < q_block_size * kDim; ++i) q.set(i, random.normal());
            for (int64_t i = 0; i < kTokens * kDim; ++i) k.set(i, random.normal());
            const std::vector<uint8_t> everything(static_cast<size_t>((kTokens + 63) / 64), 1);
            std::vector<float> lse(static_cast<size_t>(q_block_size), NAN);
            BlockSparseAttentionParams p{};
            BlockGrid& g = p.grid;
            g.dtype = DType::kBFloat16;
            g.batch = g.num_q_heads = g.num_kv_heads = 1;
            g.seqlen_q = g.q_block_size = q_block_size;
            g.seqlen_k = kTokens;
            g.head_dim = kDim;
            g.kv_block_size = 64;
            g.q = q.data();
            g.q_strides[0] = q_block_size * kDim;
            g.q_strides[1] = g.q_strides[2] = kDim;
            g.keys = KVView{k.data(), kTokens * kDim, kDim, kDim, kTokens, nullptr, 0};
            g.softmax_scale = 0.2f;
            p.values = g.keys;
            p.mask.form = MaskForm::kDense;
            p.mask.dense = everything.data();
            p.mask.strides[3] = 1;
            p.out = out.data();
            p.lse = lse.data();
            cuda_emulated_sm90a_implementation().block_sparse_attention(p, 0, 1, nullptr);
            double error = 0, norm = 0;
            for (int64_t query = 0; query < q_block_size; query += 7) {
                double total = 0;
                std::vector<double> expected(kDim, 0.0);
                for (int64_t t = 0; t < kTokens; ++t) {
                    double logit = 0;
                    for (int64_t d = 0; d < kDim; ++d)
                        logit += q.get(query * kDim + d) * k.get(t * kDim + d);
                    const double weight = std::exp(0.2 * logit);
                    total += weight;
                    for (int64_t d = 0; d < kDim; ++d)
                        expected[static_cast<size_t>(d)] += weight * k.get(t * kDim + d);
                }
                EXPECT(std::abs(lse[static_cast<size_t>(query)] - std::log(total)) < 1e-5,
                       static_cast<int>(order), " ", query);
                for (int64_t d = 0; d < kDim; ++d) {
                    const double want = expected[static_cast<size_t>(d)] / total;
                    const double off = out.get(query * kDim + d) - want;
                    error += off * off;
                    norm += want * want;
                }
            }
            EXPECT(std::sqrt(error) <= 1.6e-2 * std::sqrt(norm), static_cast<int>(order), " ",
                   std::sqrt(error / norm));
        }
    emulation::set_order(emulation::Order::kForwards);
}
