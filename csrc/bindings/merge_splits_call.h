// What the CPU and the CUDA op have in common: the arguments checked, the outputs allocated, the
// params filled.
#pragma once

#include <vector>

#include "bindings/checks.h"
#include "bindings/outputs.h"
#include "kvselect/merge_splits.h"

namespace kvselect::bindings {

struct MergeSplitsCall {
    Tensor out_parts, lse_parts;  // alive until the kernel ran
    Tensor out, lse;
    MergeSplitsParams params;
};

// Any strides: the parts are small (num_splits rows per query head), so others than contiguous ones
// are copied.
inline MergeSplitsCall read_merge_splits(const Tensor& partial_out, const Tensor& partial_lse,
                                         Place place) {
    const TensorArg out_arg("partial_out", partial_out, place),
        lse_arg("partial_lse", partial_lse, place);
    out_arg.require_dtype(ScalarType::Float);
    lse_arg.require_dtype(ScalarType::Float);
    KVS_CHECK(out_arg.dim() >= 2, "partial_out: got ", out_arg.dim(),
              " dimensions, allowed: [num_splits, ..., head_dim]");
    KVS_CHECK(out_arg.size(0) >= 1, "partial_out: got num_splits ", out_arg.size(0),
              ", allowed: an int >= 1");
    KVS_CHECK(lse_arg.dim() == out_arg.dim() - 1, "partial_lse: got ", lse_arg.dim(),
              " dimensions, allowed: ", out_arg.dim() - 1,
              ", those of partial_out without head_dim");
    std::vector<int64_t> lse_shape;
    int64_t num_rows = 1;
    for (int64_t i = 0; i < lse_arg.dim(); ++i) {
        KVS_CHECK(lse_arg.size(i) == out_arg.size(i), "partial_lse: got size ", lse_arg.size(i),
                  " in dimension ", i, ", allowed: ", out_arg.size(i), ", like partial_out");
        if (i == 0) continue;
        lse_shape.push_back(lse_arg.size(i));
        num_rows *= lse_arg.size(i);
    }
    std::vector<int64_t> out_shape = lse_shape;
    out_shape.push_back(out_arg.size(out_arg.dim() - 1));

    MergeSplitsCall call{torch::stable::contiguous(partial_out),
                         torch::stable::contiguous(partial_lse),
                         new_output(out_shape, ScalarType::Float, place),
                         new_output(lse_shape, ScalarType::Float, place),
                         {}};
    MergeSplitsParams& p = call.params;
    p.num_splits = out_arg.size(0);
    p.num_rows = num_rows;
    p.head_dim = out_shape.back();
    p.partial_out = static_cast<const float*>(call.out_parts.const_data_ptr());
    p.partial_lse = static_cast<const float*>(call.lse_parts.const_data_ptr());
    p.out = static_cast<float*>(call.out.mutable_data_ptr());
    p.lse = static_cast<float*>(call.lse.mutable_data_ptr());
    return call;
}

}  // namespace kvselect::bindings
