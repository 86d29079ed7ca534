#include "kvselect/merge_splits.h"

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

TEST(merge_splits_equals_the_formula) {
    Random random(11);
    for (int64_t num_splits : {1, 2, 5, 17})
        for (int64_t head_dim : {1, 31, 64, 80})
            for (int64_t num_rows : {1, 3}) {
                std::vector<float> parts(static_cast<size_t>(num_splits * num_rows * head_dim));
                std::vector<float> lses(static_cast<size_t>(num_splits * num_rows));
                for (float& x : parts) x = static_cast<float>(random.normal());
                for (float& x : lses) x = static_cast<float>(30.0 * random.normal());
                // Split 0 of row 0 saw nothing: its output may hold anything.
                if (num_splits > 1) {
                    lses[0] = -INFINITY;
                    for (int64_t d = 0; d < head_dim; ++d) parts[d] = NAN;
                }
                std::vector<float> out(static_cast<size_t>(num_rows * head_dim)),
                    lse(static_cast<size_t>(num_rows));
                ops.merge_splits({num_splits, num_rows, head_dim, parts.data(), lses.data(),
                                  out.data(), lse.data()},
                                 0, num_rows);
                for (int64_t row = 0; row < num_rows; ++row) {
                    double peak = -kInf, total = 0.0;
                    for (int64_t s = 0; s < num_splits; ++s)
                        peak = std::max(peak, double{lses[s * num_rows + row]});
                    for (int64_t s = 0; s < num_splits; ++s)
                        total += std::exp(lses[s * num_rows + row] - peak);
                    EXPECT(std::abs(lse[row] - (peak + std::log(total))) <
                           1e-6 * (1 + std::abs(peak)));
                    RelativeError error;
                    for (int64_t d = 0; d < head_dim; ++d) {
                        double want = 0.0;
                        for (int64_t s = 0; s < num_splits; ++s) {
                            const double weight = std::exp(lses[s * num_rows + row] - peak) / total;
                            if (weight > 0.0)
                                want += weight * parts[(s * num_rows + row) * head_dim + d];
                        }
                        error.add(out[row * head_dim + d], want);
                    }
                    EXPECT(error.value() < 2e-6, error.value());
                }
            }
}

TEST(merge_splits_shows_a_part_that_is_not_a_number) {
    const std::vector<float> parts(2 * 40, 1.f), lses{0.f, NAN};
    std::vector<float> out(40, 7.f), lse(1, 7.f);
    ops.merge_splits({2, 1, 40, parts.data(), lses.data(), out.data(), lse.data()}, 0, 1);
    for (float x : out) EXPECT(std::isnan(x));
    EXPECT(std::isnan(lse[0]));
}

TEST(merge_splits_of_nothing_is_zero) {
    const std::vector<float> parts(2 * 40, NAN), lses(2, -INFINITY);
    std::vector<float> out(40, 7.f), lse(1, 7.f);
    ops.merge_splits({2, 1, 40, parts.data(), lses.data(), out.data(), lse.data()}, 0, 1);
    for (float x : out) EXPECT(x == 0.f);
    EXPECT(lse[0] == -INFINITY);
}
