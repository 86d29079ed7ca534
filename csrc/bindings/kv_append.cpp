#include "bindings/kv_append_call.h"
#include "bindings/ops.h"
#include "bindings/parallel.h"
#include "cpu/dispatch.h"

namespace kvselect::bindings {

void kv_append(Tensor k, Tensor v, OptionalTensor num_valid, Tensor k_cache, Tensor v_cache,
               OptionalTensor block_table, Tensor cache_seqlens, OptionalTensor sketch,
               StringArg sketch_format, Tensor num_nonfinite, OptionalTensor starts,
               bool sketch_in_pages) {
    const std::string format = take_string(sketch_format);
    const KvAppendParams p =
        read_kv_append(k, v, num_valid, k_cache, v_cache, block_table, cache_seqlens, sketch,
                       format, num_nonfinite, starts, sketch_in_pages, Place{});
    const auto kernel = cpu::current_implementation().kv_append;
    run_parallel(kv_append_items(p).count, 0,
                 [&](int64_t begin, int64_t end, float*) { kernel(p, begin, end); });

    int32_t* seqlens_after = TensorArg("cache_seqlens", cache_seqlens).mutable_data<int32_t>();
    for (int64_t row = 0; row < p.batch; ++row) {
        seqlens_after[row] += p.num_valid ? p.num_valid[row] : static_cast<int32_t>(p.num_new);
    }
}

}  // namespace kvselect::bindings
