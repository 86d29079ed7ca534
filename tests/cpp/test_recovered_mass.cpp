#include "kvselect/recovered_mass.h"

#include <algorithm>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

TEST(recovered_mass_equals_the_share_of_dense_attention) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts) {
            Random random(5);
            const std::vector<int32_t> seqlens{150, 21, 0}, starts{3, 0, 0}, offsets{0, 2, 5};
            const int64_t batch = 3, seqlen_q = 5, heads = 2, group = 3, head_dim = 80, width = 12;
            Cache cache(dtype, layout, seqlens, heads, head_dim);
            cache.fill(random);
            for (int64_t t = 0; t < 3; ++t) cache.poison(0, t);
            Elements q(dtype, batch * seqlen_q * heads * group * head_dim);
            for (int64_t i = 0; i < batch * seqlen_q * heads * group * head_dim; ++i)
                q.set(i, random.normal());
            std::vector<int32_t> indices(batch * 2 * heads * width, -1),
                lengths(batch * 2 * heads, 0);
            for (int64_t list = 0; list < batch * 2 * heads; ++list) {
                const int64_t seqlen = seqlens[list / (2 * heads)];
                for (int64_t t = 0; t < seqlen && lengths[list] < width; ++t)
                    if (random.below(4) == 0)
                        indices[list * width + lengths[list]++] = static_cast<int32_t>(t);
            }
            std::vector<float> mass(batch * seqlen_q * heads * group, NAN);
            RecoveredMassParams p{};
            p.dtype = dtype;
            p.num_q_heads = heads * group;
            p.num_kv_heads = heads;
            p.head_dim = head_dim;
            p.blocks = QueryBlocks{batch,
                                   2,
                                   seqlen_q,
                                   offsets.data(),
                                   seqlens.data(),
                                   starts.data(),
                                   WindowRule::kDecode,
                                   0,
                                   0};
            p.q = q.data();
            p.q_strides[0] = seqlen_q * heads * group * head_dim;
            p.q_strides[1] = heads * group * head_dim;
            p.q_strides[2] = head_dim;
            p.keys = cache.keys();
            p.indices = indices.data();
            p.topk_length = lengths.data();
            const int64_t strides[] = {2 * heads, heads, 1};
            for (int i = 0; i < 3; ++i) {
                p.indices_strides[i] = strides[i] * width;
                p.topk_length_strides[i] = strides[i];
            }
            p.softmax_scale = 0.2f;
            p.max_seqlen_k = 150;
            p.mass = mass.data();
            std::vector<float> scratch(recovered_mass_scratch_floats(p), NAN);
            ops.recovered_mass(p, 0, batch * seqlen_q * heads, scratch.data());
            for (int64_t row = 0; row < batch; ++row)
                for (int64_t j = 0; j < seqlen_q; ++j)
                    for (int64_t head = 0; head < heads * group; ++head) {
                        const int64_t position = seqlens[row] - seqlen_q + j,
                                      list = (row * 2 + (j >= 2)) * heads + head / group;
                        double peak = -kInf, total = 0.0, kept = 0.0;
                        std::vector<double> logits(seqlens[row], -kInf);
                        for (int64_t t = starts[row]; t <= position; ++t) {
                            logits[t] = 0.0;
                            for (int64_t d = 0; d < head_dim; ++d)
                                logits[t] +=
                                    double{0.2f} * cache.key(row, t, head / group, d) *
                                    q.get(((row * seqlen_q + j) * heads * group + head) * head_dim +
                                          d);
                            peak = std::max(peak, logits[t]);
                        }
                        for (double x : logits) total += peak > -kInf ? std::exp(x - peak) : 0.0;
                        for (int64_t i = 0; i < lengths[list] && total > 0.0; ++i)
                            kept += std::exp(logits[indices[list * width + i]] - peak);
                        const double want = total > 0.0 ? kept / total : 1.0;
                        const double got = mass[(row * seqlen_q + j) * heads * group + head];
                        EXPECT(std::abs(got - want) <= (dtype == DType::kFloat32 ? 2e-6 : 1e-5),
                               got, " for ", want);
                    }
        }
}
