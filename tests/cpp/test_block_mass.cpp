#include "kvselect/block_mass.h"

#include "block_inputs.h"
#include "check.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

void expect_mass(const cpu::Implementation& ops, BlockInputs& in, int64_t row_stride,
                 const float* lse) {
    const BlockGrid& g = in.grid;
    const int64_t rows = g.batch * g.num_q_heads * g.num_q_blocks(), blocks = g.num_kv_blocks();
    std::vector<float> mass(static_cast<size_t>(rows * blocks), NAN);
    BlockMassParams p{};
    p.grid = g;
    p.row_stride = row_stride;
    p.lse = lse;
    p.lse_strides[0] = g.seqlen_q * g.num_q_heads;
    p.lse_strides[1] = g.num_q_heads;
    p.lse_strides[2] = 1;
    p.mass = mass.data();
    std::vector<float> scratch(static_cast<size_t>(block_mass_scratch_floats(p)));
    ops.block_mass(p, 0, 1, scratch.data());
    ops.block_mass(p, 1, rows, scratch.data());

    std::vector<double> expected(mass.size(), 0.0);
    for (int64_t row = 0; row < g.batch; ++row)
        for (int64_t head = 0; head < g.num_q_heads; ++head)
            for (int64_t query = 0; query < in.row_seqlen_q(row); ++query) {
                const int64_t block = query / g.q_block_size;
                const int64_t last =
                    std::min((block + 1) * g.q_block_size, in.row_seqlen_q(row)) - 1;
                if ((last - query) % row_stride != 0) continue;
                double total = 0;
                for (int64_t t = 0; t < in.seen(row, query); ++t)
                    total += std::exp(in.logit(row, query, head, t));
                const double norm =
                    lse ? lse[(row * g.seqlen_q + query) * g.num_q_heads + head] : std::log(total);
                if (norm == -kInf) continue;
                const int64_t list = (row * g.num_q_heads + head) * g.num_q_blocks() + block;
                for (int64_t t = 0; t < in.seen(row, query); ++t)
                    expected[static_cast<size_t>(list * blocks + t / g.kv_block_size)] +=
                        std::exp(in.logit(row, query, head, t) - norm);
            }
    for (size_t i = 0; i < mass.size(); ++i)
        EXPECT(std::abs(mass[i] - expected[i]) <= 1e-5 * expected[i], i, " ", mass[i], " ",
               expected[i]);
}

}  // namespace

TEST(block_mass_equals_plain_loops) {
    // Emulated threads are slow: of all cases every fifth, in which every size occurs.
    const int64_t every = ops.name == std::string("cuda") ? 5 : 1;
    int64_t number = 0;
    for (DType dtype : kDTypes)
        for (bool causal : {true, false})
            for (int64_t q_block_size : {16, 128})
                for (int64_t kv_block_size : {16, 128})
                    for (int64_t row_stride : {1, 7, 200}) {
                        if (number++ % every != 0) continue;
                        BlockInputs in(dtype, 80, q_block_size, kv_block_size, causal);
                        expect_mass(ops, in, row_stride, nullptr);
                        std::vector<float> lse(static_cast<size_t>(
                            in.grid.batch * in.grid.seqlen_q * in.grid.num_q_heads));
                        for (size_t i = 0; i < lse.size(); ++i)
                            lse[i] = i % 5 == 0 ? -INFINITY : static_cast<float>(i % 7);
                        expect_mass(ops, in, row_stride, lse.data());
                    }
}

TEST(block_mass_of_groups_and_long_rows) {
    for (int64_t group : {1, 7}) {
        BlockInputs in(DType::kBFloat16, 64, 16, 64, true, group);
        expect_mass(ops, in, 4, nullptr);
    }
    for (int64_t head_dim : {128, 256}) {
        BlockInputs in(DType::kFloat16, head_dim, 64, 32, true, 1);
        expect_mass(ops, in, 1, nullptr);
    }
}
