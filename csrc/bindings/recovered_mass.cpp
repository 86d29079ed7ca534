#include "kvselect/recovered_mass.h"

#include <algorithm>

#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

Tensor recovered_mass(Tensor q, Tensor k_cache, OptionalTensor block_table, Tensor cache_seqlens,
                      OptionalTensor starts, Tensor indices, Tensor topk_length,
                      OptionalTensor q_block_offsets, double softmax_scale, int64_t max_seqlen_k,
                      double softcap) {
    require_count("max_seqlen_k", max_seqlen_k, 0);
    const TensorArg q_arg("q", q), cache_arg("k_cache", k_cache);
    q_arg.require_shape({{"batch"}, {"seqlen_q"}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    const int64_t batch = q_arg.size(0), seqlen_q = q_arg.size(1), num_q_heads = q_arg.size(2);
    const CacheArg keys = read_cache(cache_arg, block_table, batch);
    q_arg.require_dtype(keys.scalar_type)
        .require_shape({{"batch", batch},
                        {"seqlen_q", seqlen_q},
                        {"num_q_heads", num_q_heads},
                        {"head_dim", keys.head_dim}});
    require_heads(num_q_heads, keys.num_kv_heads, keys.head_dim);

    RecoveredMassParams p{};
    p.blocks = read_query_blocks(cache_seqlens, starts, q_block_offsets, batch, seqlen_q);
    require_all_queries_covered(p.blocks);
    require_stored_pages(keys, p.blocks);
    require_max_seqlen("max_seqlen_k", max_seqlen_k, p.blocks);
    const IndexListsArg lists = read_index_lists(indices, topk_length, p.blocks, keys.num_kv_heads);

    Tensor mass = new_output({batch, seqlen_q, num_q_heads}, ScalarType::Float);
    p.dtype = keys.dtype;
    p.num_q_heads = num_q_heads;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.q = q_arg.data<void>();
    for (int i = 0; i < 3; ++i) p.q_strides[i] = q_arg.stride(i);
    p.keys = keys.view;
    p.indices = lists.indices;
    p.topk_length = lists.topk_length;
    std::copy_n(lists.indices_strides, 3, p.indices_strides);
    std::copy_n(lists.topk_length_strides, 3, p.topk_length_strides);
    p.softmax_scale = static_cast<float>(softmax_scale);
    p.softcap = read_softcap(softcap);
    p.max_seqlen_k = max_seqlen_k;
    p.mass = static_cast<float*>(mass.mutable_data_ptr());

    const auto kernel = cpu::current_implementation().recovered_mass;
    run_parallel(
        batch * seqlen_q * p.num_kv_heads, recovered_mass_scratch_floats(p),
        [&](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
    return mass;
}

}  // namespace kvselect::bindings
