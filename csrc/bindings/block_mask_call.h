// What ops over blocks of queries and keys have in common: the grid's arguments and the mask's,
// checked, and the params filled. What lengths, lists and offsets on a GPU hold is not read: its
// kernels cut it to what there is.
#pragma once

#include <algorithm>

#include "bindings/aligned_rows.h"
#include "bindings/checks.h"
#include "kvselect/block_mask.h"

namespace kvselect::bindings {

inline void require_block_size(const char* name, int64_t size) {
    KVS_CHECK(size == 16 || size == 32 || size == 64 || size == 128, name, ": got ", size,
              ", allowed: 16, 32, 64, 128");
}

inline const int32_t* read_row_lengths(const char* name, const OptionalTensor& lengths,
                                       int64_t batch, int64_t longest, Place place) {
    const int32_t* read = row_numbers(name, lengths, batch, place);
    for (int64_t row = 0; read && place.host_readable() && row < batch; ++row)
        KVS_CHECK(read[row] >= 0 && read[row] <= longest, name, ": got ", read[row], " in row ",
                  row, ", allowed: 0..", longest);
    return read;
}

inline BlockGrid read_block_grid(const TensorArg& q, const TensorArg& k,
                                 const OptionalTensor& seqlens_q,
                                 const OptionalTensor& cache_seqlens, int64_t q_block_size,
                                 int64_t kv_block_size, bool causal, double softmax_scale,
                                 double softcap, Place place) {
    q.require_shape({{"batch"}, {"seqlen_q"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    k.require_shape({{"batch", q.size(0)}, {"seqlen_k"}, {"num_kv_heads"}, {"head_dim"}});
    const CacheArg keys = read_cache(k, std::nullopt, q.size(0));
    q.require_dtype(keys.scalar_type)
        .require_shape({{"batch", q.size(0)},
                        {"seqlen_q", q.size(1)},
                        {"num_q_heads", q.size(2)},
                        {"head_dim", keys.head_dim}});
    require_heads(q.size(2), keys.num_kv_heads, keys.head_dim);
    if (place.is_cuda) {
        require_cuda_head_dim(keys.head_dim);
        require_aligned_rows(k);
    }
    require_block_size("q_block_size", q_block_size);
    require_block_size("kv_block_size", kv_block_size);
    BlockGrid g{};
    g.dtype = keys.dtype;
    g.batch = q.size(0);
    g.seqlen_q = q.size(1);
    g.seqlen_k = k.size(1);
    g.num_q_heads = q.size(2);
    g.num_kv_heads = keys.num_kv_heads;
    g.head_dim = keys.head_dim;
    g.q_block_size = q_block_size;
    g.kv_block_size = kv_block_size;
    g.causal = causal;
    g.seqlens_q = read_row_lengths("seqlens_q", seqlens_q, g.batch, g.seqlen_q, place);
    g.seqlens_k = read_row_lengths("cache_seqlens", cache_seqlens, g.batch, g.seqlen_k, place);
    g.q = q.data<void>();
    for (int i = 0; i < 3; ++i) g.q_strides[i] = q.stride(i);
    g.keys = keys.view;
    g.softmax_scale = static_cast<float>(softmax_scale);
    g.softcap = read_softcap(softcap);
    return g;
}

inline void require_block_indices(const int32_t* indices, int64_t count, int64_t step, int64_t low,
                                  int64_t num_kv_blocks) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t block = indices[i * step];
        KVS_CHECK(block >= low && block < num_kv_blocks, "block_mask: got block ", block,
                  ", allowed: ", low, "..", num_kv_blocks - 1, low < 0 ? " (-1: none)" : "");
    }
}

// Dense bytes, lists of one width, or the indices of CSR rows.
inline BlockMask read_block_mask(const Tensor& block_mask, const OptionalTensor& row_offsets,
                                 const BlockGrid& g, Place place) {
    const TensorArg mask("block_mask", block_mask, place);
    const int64_t num_rows = g.batch * g.num_q_heads * g.num_q_blocks();
    BlockMask m{};
    if (row_offsets) {
        const TensorArg offsets("row_offsets", *row_offsets, place);
        mask.require_dtype(ScalarType::Int).require_shape({{"nnz"}}).require_contiguous();
        offsets.require_dtype(ScalarType::Long)
            .require_shape({{"batch * num_q_heads * num_q_blocks + 1", num_rows + 1}})
            .require_contiguous();
        m.form = MaskForm::kCsr;
        m.indices = mask.data<int32_t>();
        m.row_offsets = offsets.data<int64_t>();
        m.width = mask.size(0);
        if (!place.host_readable()) return m;
        KVS_CHECK(m.row_offsets[0] == 0 && m.row_offsets[num_rows] == mask.size(0),
                  "row_offsets: got ", m.row_offsets[0], "..", m.row_offsets[num_rows],
                  ", allowed: 0..", mask.size(0), ", the number of block indices");
        for (int64_t row = 0; row < num_rows; ++row)
            KVS_CHECK(m.row_offsets[row] <= m.row_offsets[row + 1], "row_offsets: got ",
                      m.row_offsets[row + 1], " after ", m.row_offsets[row], " at ", row + 1,
                      ", allowed: offsets that do not descend");
        require_block_indices(m.indices, mask.size(0), 1, 0, g.num_kv_blocks());
        return m;
    }
    const bool dense = mask.dtype() == ScalarType::Bool;
    if (!dense) mask.require_dtype(ScalarType::Int);
    m.form = dense ? MaskForm::kDense : MaskForm::kLists;
    const Dim batch{"batch", g.batch}, heads{"num_q_heads", g.num_q_heads},
        q_blocks{"num_q_blocks", g.num_q_blocks()};
    if (dense)
        mask.require_shape({batch, heads, q_blocks, {"num_kv_blocks", g.num_kv_blocks()}});
    else
        mask.require_shape({batch, heads, q_blocks, {"k"}});
    for (int i = 0; i < 4; ++i) m.strides[i] = mask.stride(i);
    m.width = mask.size(3);
    if (dense) {
        m.dense = mask.data<uint8_t>();
        return m;
    }
    m.indices = mask.data<int32_t>();
    if (!place.host_readable()) return m;
    const auto distinct = [&](int i) {  // a dimension of stride 0 repeats what is already checked
        return m.strides[i] == 0 ? std::min<int64_t>(mask.size(i), 1) : mask.size(i);
    };
    for (int64_t row = 0; row < distinct(0); ++row)
        for (int64_t head = 0; head < distinct(1); ++head)
            for (int64_t block = 0; block < distinct(2); ++block)
                require_block_indices(
                    m.indices + row * m.strides[0] + head * m.strides[1] + block * m.strides[2],
                    m.width, m.strides[3], -1, g.num_kv_blocks());
    return m;
}

}  // namespace kvselect::bindings
