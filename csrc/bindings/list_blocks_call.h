// What the CPU and the CUDA op have in common: the arguments checked, the outputs allocated, the
// params filled.
#pragma once

#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "kvselect/list_blocks.h"

namespace kvselect::bindings {

struct ListBlocksCall {
    Tensor indices, count;
    ListBlocksParams params;
};

inline ListBlocksCall read_list_blocks(const Tensor& picked, const Tensor& first_block,
                                       const Tensor& end, const OptionalTensor& starts,
                                       const Tensor& finite, int64_t num_window_blocks,
                                       int64_t width, Place place) {
    require_count("num_window_blocks", num_window_blocks, 0);
    require_count("width", width, 0);
    const TensorArg picked_arg("picked", picked, place), finite_arg("finite", finite, place);
    picked_arg.require_dtype(ScalarType::Int)
        .require_shape({{"num_rows"}, {"num_lists"}, {"num_picked"}})
        .require_contiguous_rows();
    finite_arg.require_dtype(ScalarType::Bool)
        .require_shape({{"batch"}, {"num_kv_heads"}, {"num_blocks"}, {"block_size"}})
        .require_contiguous_rows();
    ListBlocksParams p{};
    p.num_rows = picked_arg.size(0);
    p.num_lists = picked_arg.size(1);
    p.num_picked = picked_arg.size(2);
    p.num_window_blocks = num_window_blocks;
    const int64_t batch = finite_arg.size(0);
    p.num_kv_heads = finite_arg.size(1);
    p.num_blocks = finite_arg.size(2);
    p.block_size = finite_arg.size(3);
    KVS_CHECK(batch == 0 ? p.num_rows == 0 : p.num_rows % batch == 0, "picked: got num_rows ",
              p.num_rows, ", allowed: a multiple of finite's batch ", batch);
    p.num_query_blocks = batch == 0 ? 1 : p.num_rows / batch;
    KVS_CHECK(p.num_lists == 1 || p.num_lists == p.num_kv_heads, "picked: got num_lists ",
              p.num_lists, ", allowed: 1 or finite's num_kv_heads ", p.num_kv_heads);
    p.first_block = row_numbers("first_block", first_block, p.num_rows, place);
    p.end = row_numbers("end", end, p.num_rows, place);
    p.starts = row_numbers("starts", starts, batch, place);
    p.picked = picked_arg.data<int32_t>();
    p.finite = finite_arg.data<uint8_t>();
    for (int i = 0; i < 2; ++i) p.picked_strides[i] = picked_arg.stride(i);
    for (int i = 0; i < 3; ++i) p.finite_strides[i] = finite_arg.stride(i);
    p.width = width;

    ListBlocksCall call{new_output({p.num_rows, p.num_lists, width}, ScalarType::Int, place),
                        new_output({p.num_rows, p.num_lists}, ScalarType::Int, place), p};
    call.params.indices = static_cast<int32_t*>(call.indices.mutable_data_ptr());
    call.params.count = static_cast<int32_t*>(call.count.mutable_data_ptr());
    return call;
}

}  // namespace kvselect::bindings
