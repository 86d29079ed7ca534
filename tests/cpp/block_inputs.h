// Queries, keys, values and a random mask of blocks for the ops over them, ragged, with NaN
// wherever nobody may read, and the logits in double.
#pragma once

#include <algorithm>
#include <vector>

#include "inputs.h"
#include "kvselect/block_mask.h"

namespace kvselect::test {

class BlockInputs {
public:
    static constexpr int64_t kBatch = 3, kSeqlenQ = 70, kSeqlenK = 150, kHeads = 2;

    BlockInputs(DType dtype, int64_t head_dim, int64_t q_block_size, int64_t kv_block_size,
                bool causal, int64_t group = 2)
        : group_(group),
          seqlens_q_{70, 33, 5},
          seqlens_k_{150, 20, 0},
          q_(dtype, kBatch * kSeqlenQ * kHeads * group_ * head_dim),
          k_(dtype, kBatch * kSeqlenK * kHeads * head_dim),
          v_(dtype, kBatch * kSeqlenK * kHeads * head_dim) {
        Random random(7);
        grid = BlockGrid{};
        grid.dtype = dtype;
        grid.batch = kBatch;
        grid.seqlen_q = kSeqlenQ;
        grid.seqlen_k = kSeqlenK;
        grid.num_q_heads = kHeads * group_;
        grid.num_kv_heads = kHeads;
        grid.head_dim = head_dim;
        grid.q_block_size = q_block_size;
        grid.kv_block_size = kv_block_size;
        grid.causal = causal;
        grid.seqlens_q = seqlens_q_.data();
        grid.seqlens_k = seqlens_k_.data();
        grid.q = q_.data();
        grid.q_strides[0] = kSeqlenQ * kHeads * group_ * head_dim;
        grid.q_strides[1] = kHeads * group_ * head_dim;
        grid.q_strides[2] = head_dim;
        grid.keys = view(k_.data());
        grid.softmax_scale = 0.2f;
        for (int64_t row = 0; row < kBatch; ++row) {
            fill(random, &q_, row * grid.q_strides[0], seqlens_q_[static_cast<size_t>(row)],
                 grid.q_strides[1]);
            for (Elements* x : {&k_, &v_})
                fill(random, x, row * grid.keys.page_stride, seqlens_k_[static_cast<size_t>(row)],
                     grid.keys.token_stride);
        }
        const int64_t rows = kBatch * grid.num_q_heads * grid.num_q_blocks(),
                      blocks = grid.num_kv_blocks();
        offsets_.push_back(0);
        for (int64_t row = 0; row < rows; ++row) {
            const bool empty = random.below(5) == 0;
            for (int64_t b = 0; b < blocks; ++b) dense_.push_back(!empty && random.below(2) == 0);
            std::vector<int32_t> list(static_cast<size_t>(blocks + 1), -1);
            for (int64_t b = blocks; b-- > 0;) {  // descending, one of them twice
                if (!dense_[static_cast<size_t>(row * blocks + b)]) continue;
                indices_.push_back(static_cast<int32_t>(b));
                list[static_cast<size_t>(b)] = list[static_cast<size_t>(blocks)] =
                    static_cast<int32_t>(b);
            }
            offsets_.push_back(static_cast<int64_t>(indices_.size()));
            lists_.insert(lists_.end(), list.begin(), list.end());
        }
        indices_.shrink_to_fit();
    }

    KVView values() { return view(v_.data()); }
    BlockMask dense() { return mask(MaskForm::kDense, grid.num_kv_blocks()); }
    BlockMask lists() { return mask(MaskForm::kLists, grid.num_kv_blocks() + 1); }
    BlockMask csr() { return mask(MaskForm::kCsr, static_cast<int64_t>(indices_.size())); }

    bool kept(int64_t row, int64_t head, int64_t q_block, int64_t kv_block) const {
        const int64_t list = (row * grid.num_q_heads + head) * grid.num_q_blocks() + q_block;
        return dense_[static_cast<size_t>(list * grid.num_kv_blocks() + kv_block)] != 0;
    }
    // A query sees positions [0, seen).
    int64_t seen(int64_t row, int64_t query) const {
        const int64_t seqlen_q = seqlens_q_[static_cast<size_t>(row)],
                      seqlen_k = seqlens_k_[static_cast<size_t>(row)];
        if (query >= seqlen_q) return 0;
        return grid.causal ? std::max<int64_t>(seqlen_k - seqlen_q + query + 1, 0) : seqlen_k;
    }
    int64_t row_seqlen_q(int64_t row) const { return seqlens_q_[static_cast<size_t>(row)]; }
    double logit(int64_t row, int64_t query, int64_t head, int64_t position) {
        double& sum = logits_[static_cast<size_t>(
            ((row * kSeqlenQ + query) * kHeads * group_ + head) * kSeqlenK + position)];
        if (std::isnan(sum)) {  // made once
            sum = 0;
            for (int64_t d = 0; d < grid.head_dim; ++d)
                sum += q_.get(row * grid.q_strides[0] + query * grid.q_strides[1] +
                              head * grid.q_strides[2] + d) *
                       k_.get(key_at(row, position, head) + d);
            sum *= grid.softmax_scale;
        }
        return grid.softcap == 0.f ? sum : grid.softcap * std::tanh(sum / grid.softcap);
    }
    void set_value(int64_t row, int64_t position, int64_t head, int64_t d, float x) {
        v_.set(key_at(row, position, head) + d, x);
    }
    double value(int64_t row, int64_t position, int64_t head, int64_t d) const {
        return v_.get(key_at(row, position, head) + d);
    }

    BlockGrid grid;

private:
    KVView view(void* data) const {
        return KVView{data,
                      kSeqlenK * kHeads * grid.head_dim,
                      kHeads * grid.head_dim,
                      grid.head_dim,
                      kSeqlenK,
                      nullptr,
                      0};
    }
    int64_t key_at(int64_t row, int64_t position, int64_t head) const {
        return grid.keys.offset(row, position, head / group_);
    }
    static void fill(Random& random, Elements* x, int64_t from, int64_t tokens, int64_t stride) {
        for (int64_t i = 0; i < tokens * stride; ++i) x->set(from + i, random.normal());
    }
    BlockMask mask(MaskForm form, int64_t width) {
        BlockMask m{};
        m.form = form;
        m.dense = dense_.data();
        m.indices = form == MaskForm::kCsr ? indices_.data() : lists_.data();
        m.row_offsets = offsets_.data();
        m.width = width;
        m.strides[3] = 1;
        m.strides[2] = width;
        m.strides[1] = grid.num_q_blocks() * width;
        m.strides[0] = grid.num_q_heads * m.strides[1];
        return m;
    }

    int64_t group_;
    std::vector<int32_t> seqlens_q_, seqlens_k_;
    Elements q_, k_, v_;
    std::vector<double> logits_ =
        std::vector<double>(kBatch * kSeqlenQ * kHeads * group_ * kSeqlenK, kNaN);
    std::vector<uint8_t> dense_;
    std::vector<int32_t> lists_, indices_;
    std::vector<int64_t> offsets_;
};

}  // namespace kvselect::test
