#include "bindings/list_blocks_call.h"
#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

std::tuple<Tensor, Tensor> list_blocks(Tensor picked, Tensor first_block, Tensor end,
                                       OptionalTensor starts, Tensor finite,
                                       int64_t num_window_blocks, int64_t width) {
    const ListBlocksCall call = read_list_blocks(picked, first_block, end, starts, finite,
                                                 num_window_blocks, width, Place{});
    const ListBlocksParams& p = call.params;
    const auto kernel = cpu::current_implementation().list_blocks;
    run_parallel(p.num_rows * p.num_lists, 0,
                 [&](int64_t begin, int64_t last, float*) { kernel(p, begin, last); });
    return {call.indices, call.count};
}

}  // namespace kvselect::bindings
