#include "bindings/merge_splits_call.h"
#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> merge_splits(Tensor partial_out, Tensor partial_lse) {
    const MergeSplitsCall call = read_merge_splits(partial_out, partial_lse, Place{});
    const MergeSplitsParams& p = call.params;
    const auto kernel = cpu::current_implementation().merge_splits;
    run_parallel(p.num_rows, 0, [&](int64_t begin, int64_t end, float*) { kernel(p, begin, end); });
    return {call.out, call.lse};
}

}  // namespace kvselect::bindings
