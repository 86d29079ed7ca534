#include "bindings/merge_splits_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

std::tuple<Tensor, Tensor> merge_splits(Tensor partial_out, Tensor partial_lse) {
    const OnDevice device("partial_out", partial_out);
    const MergeSplitsCall call = read_merge_splits(partial_out, partial_lse, device.place());
    kvselect::cuda::merge_splits(call.params, device.launch());
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings::cuda
