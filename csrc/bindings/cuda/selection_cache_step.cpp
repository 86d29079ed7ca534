#include "bindings/selection_cache_step_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

Tensor selection_cache_step(Tensor q, Tensor cache_seqlens, OptionalTensor starts,
                            Tensor num_nonfinite, StringArg similarity, double similarity_threshold,
                            int64_t max_age, int64_t dense_limit, Tensor anchor_query, Tensor age,
                            Tensor expected_seqlens, Tensor known_nonfinite, Tensor reuse_counts) {
    const OnDevice device("q", q);
    const SelectionCacheStepCall call =
        read_selection_cache_step(q, cache_seqlens, starts, num_nonfinite, take_string(similarity),
                                  similarity_threshold, max_age, dense_limit, anchor_query, age,
                                  expected_seqlens, known_nonfinite, reuse_counts, device.place());
    kvselect::cuda::selection_cache_step(call.params, device.launch());
    return call.hit;
}

}  // namespace kvselect::bindings::cuda
