#include "kvselect/block_sparse_attention.h"

#include "block_inputs.h"
#include "check.h"

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
    for (DType dtype : kDTypes)
        for (bool causal : {true, false})
            for (int64_t head_dim : {32, 80})
                for (int64_t q_block_size : {16, 128})
                    for (int64_t kv_block_size : {16, 128}) {
                        BlockInputs in(dtype, head_dim, q_block_size, kv_block_size, causal);
                        expect_attention(ops, in, in.dense());
                        expect_attention(ops, in, in.lists());
                        expect_attention(ops, in, in.csr());
                    }
}

TEST(block_sparse_attention_caps_logits) {
    BlockInputs in(DType::kFloat32, 64, 64, 64, true);
    in.grid.softcap = 1.5f;
    expect_attention(ops, in, in.dense());
}
