#include "bindings/selection_cache_step_call.h"
#include "bindings/ops.h"
#include "bindings/outputs.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

Tensor selection_cache_step(Tensor q, Tensor cache_seqlens, OptionalTensor starts,
                            Tensor num_nonfinite, StringArg similarity, double similarity_threshold,
                            int64_t max_age, int64_t dense_limit, Tensor anchor_query, Tensor age,
                            Tensor expected_seqlens, Tensor known_nonfinite, Tensor reuse_counts) {
    SelectionCacheStepParams p = read_selection_cache_step(
        {"q", "num_nonfinite"}, q, cache_seqlens, starts, num_nonfinite, take_string(similarity),
        similarity_threshold, max_age, dense_limit, anchor_query, age, expected_seqlens,
        known_nonfinite, reuse_counts, Place{});
    Tensor hit = new_output({p.batch, p.num_lists}, ScalarType::Int);
    p.hit = static_cast<int32_t*>(hit.mutable_data_ptr());
    const auto kernel = cpu::current_implementation().selection_cache_step;
    run_parallel(p.batch, 0, [&](int64_t begin, int64_t end, float*) { kernel(p, begin, end); });
    return hit;
}

}  // namespace kvselect::bindings
