// Where ops put their results: fresh contiguous tensors on the CPU.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace kvselect::bindings {

// Memory that nobody has written to. torch::stable::new_empty looks aten's op up by name and boxes
// six arguments at every call: 1.0 us instead of 0.4, and a decode step makes six outputs.
inline torch::stable::Tensor new_output(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                        torch::headeronly::ScalarType dtype) {
    namespace detail = torch::stable::detail;
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    AtenTensorHandle output = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        detail::to<int32_t>(detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &output));
    return torch::stable::Tensor(output);
}

}  // namespace kvselect::bindings
