// Host twin of csrc/cuda/device/tensor_map.h: a map is what it was made from. What the driver would
// refuse is refused.
#pragma once

#include <cstdint>

#include "kvselect/check.h"
#include "kvselect/kv_view.h"

namespace kvselect::cuda {

struct TensorExtent {
    DType dtype;
    const void* data;
    int64_t channels, tokens, heads, rows;
    int64_t token_stride, head_stride, row_stride;  // elements
};

struct TensorMap {
    TensorExtent of;
    int box_tokens;
};

inline TensorMap make_tensor_map(const char* name, const TensorExtent& x, int box_tokens) {
    for (int64_t size : {x.channels, x.tokens, x.heads, x.rows})
        if (size < 1) fail_at_run_time("tensor map of ", name, ": a dimension of ", size);
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || box_tokens < 1 || box_tokens > 256)
        fail_at_run_time("tensor map of ", name, ": address or box");
    const int64_t strides[3][2] = {
        {x.token_stride, x.tokens}, {x.head_stride, x.heads}, {x.row_stride, x.rows}};
    for (const auto& [stride, size] : strides)
        if (size > 1 && (stride < 1 || stride % 8 != 0 || stride >= int64_t{1} << 39))
            fail_at_run_time("tensor map of ", name, ": a stride of ", stride, " elements");
    return {x, box_tokens};
}

}  // namespace kvselect::cuda
