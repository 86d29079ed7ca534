#include "bindings/kv_append_call.h"

#include "bindings/cuda/ops.h"

namespace kvselect::bindings::cuda {

// Room is the caller's to make: lengths lie on the device, and KVCache knows them on the host too.
// Tokens for which a row has no room are dropped: nothing else could be done from a captured step.
void kv_append(Tensor k, Tensor v, OptionalTensor num_valid, Tensor k_cache, Tensor v_cache,
               OptionalTensor block_table, Tensor cache_seqlens, OptionalTensor sketch,
               StringArg sketch_format, Tensor num_nonfinite, OptionalTensor starts,
               bool sketch_in_pages) {
    const std::string format = take_string(sketch_format);
    const OnDevice device("k", k);
    const KvAppendParams p =
        read_kv_append(k, v, num_valid, k_cache, v_cache, block_table, cache_seqlens, sketch,
                       format, num_nonfinite, starts, sketch_in_pages, device.place());
    kvselect::cuda::kv_append(p, device.launch());
    int32_t* seqlens_after = static_cast<int32_t*>(cache_seqlens.mutable_data_ptr());
    kvselect::cuda::advance_seqlens(seqlens_after, p, device.launch());
}

}  // namespace kvselect::bindings::cuda
