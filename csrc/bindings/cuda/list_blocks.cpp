#include "bindings/list_blocks_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

std::tuple<Tensor, Tensor> list_blocks(Tensor picked, Tensor first_block, Tensor end,
                                       OptionalTensor starts, Tensor finite,
                                       int64_t num_window_blocks, int64_t width) {
    const OnDevice device("picked", picked);
    const ListBlocksCall call = read_list_blocks(picked, first_block, end, starts, finite,
                                                 num_window_blocks, width, device.place());
    kvselect::cuda::list_blocks(call.params, device.launch());
    return {call.indices, call.count};
}

}  // namespace kvselect::bindings::cuda
