// merge_splits: one attention result out of the parts of a split context.
#pragma once

#include <cstdint>

#include "kvselect/cuda_launch.h"

namespace kvselect {

struct MergeSplitsParams {
    int64_t num_splits, num_rows, head_dim;
    const float* partial_out;  // [num_splits, num_rows, head_dim] contiguous
    const float* partial_lse;  // [num_splits, num_rows] natural log; -inf: the split saw nothing
    float* out;                // [num_rows, head_dim]
    float* lse;                // [num_rows]
};

// Work items are rows: [0, num_rows).
using MergeSplitsFn = void (*)(const MergeSplitsParams&, int64_t begin, int64_t end);

namespace cuda {
void merge_splits(const MergeSplitsParams&, const CudaLaunch&);
}

}  // namespace kvselect
