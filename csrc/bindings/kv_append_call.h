// What the CPU and the CUDA op have in common: the arguments checked, the params filled.
#pragma once

#include <algorithm>
#include <limits>
#include <string>

#include "bindings/checks.h"
#include "kvselect/kv_append.h"

namespace kvselect::bindings {

inline KvAppendParams read_kv_append(const Tensor& k, const Tensor& v,
                                     const OptionalTensor& num_valid, const Tensor& k_cache,
                                     const Tensor& v_cache, const OptionalTensor& block_table,
                                     const Tensor& cache_seqlens, const OptionalTensor& sketch,
                                     const std::string& format, const Tensor& num_nonfinite,
                                     const OptionalTensor& starts, bool sketch_in_pages,
                                     Place place) {
    const TensorArg k_arg("k", k, place), v_arg("v", v, place),
        k_cache_arg("k_cache", k_cache, place), v_cache_arg("v_cache", v_cache, place),
        nonfinite_arg("num_nonfinite", num_nonfinite, place);
    k_arg.require_shape({{"batch"}, {"num_new"}, {"num_kv_heads"}, {"head_dim"}});
    const int64_t batch = k_arg.size(0), num_new = k_arg.size(1);
    const CacheArg keys = read_cache(k_cache_arg, block_table, batch);
    const CacheArg values = read_values(v_cache_arg, k_cache_arg, keys);
    k_cache_arg.require_writable();
    v_cache_arg.require_writable();
    require_heads(keys.num_kv_heads, keys.num_kv_heads, keys.head_dim);
    for (const TensorArg* arg : {&k_arg, &v_arg}) {
        arg->require_dtype(keys.scalar_type)
            .require_shape({{"batch", batch},
                            {"num_new", num_new},
                            {"num_kv_heads", keys.num_kv_heads},
                            {"head_dim", keys.head_dim}})
            .require_contiguous_rows();
    }
    nonfinite_arg.require_dtype(ScalarType::Long)
        .require_shape({{"batch", batch}, {"num_kv_heads", keys.num_kv_heads}})
        .require_contiguous();
    const int32_t* seqlens = row_numbers("cache_seqlens", cache_seqlens, batch, place);
    const int32_t* valid = row_numbers("num_valid", num_valid, batch, place);
    const int32_t* first_real = row_numbers("starts", starts, batch, place);

    // Room for every row, before the first one is written. On CUDA the caller knows the lengths.
    int64_t longest = 0;
    for (int64_t row = 0; place.host_readable() && row < batch; ++row) {
        const int64_t before = seqlens[row];
        const int64_t added = valid ? valid[row] : num_new;
        KVS_CHECK(before >= 0, "cache_seqlens: got ", before, " in row ", row,
                  ", allowed: an int >= 0");
        KVS_CHECK(added >= 0 && added <= num_new, "num_valid: got ", added, " in row ", row,
                  ", allowed: 0..", num_new);
        const int64_t after = before + added;
        KVS_CHECK(after <= keys.capacity_tokens, "capacity: got ", before, " + ", added,
                  " tokens in row ", row, ", allowed: at most ", keys.capacity_tokens, " (what ",
                  block_table ? "block_table" : "k_cache", " has room for)");
        KVS_CHECK(after <= std::numeric_limits<int32_t>::max(), "capacity: got ", after,
                  " tokens in row ", row, ", allowed: at most 2^31 - 1");
        // A block that these tokens complete is sketched from its first token on, so its older
        // pages are read too.
        const int64_t start = first_real ? first_real[row] : 0;
        KVS_CHECK(start >= 0, "starts: got ", start, " in row ", row, ", allowed: an int >= 0");
        const int64_t in_block = before > start ? (before - start) % kSketchBlockTokens : 0;
        const int64_t first_read = sketch ? before - in_block : before;
        require_pages(keys, row, first_read, after);
        longest = std::max(longest, after);
    }
    const SketchView sketch_view =
        sketch_in_pages
            ? read_paged_sketch(sketch, format, keys, starts, place)
            : read_sketch(sketch, format, batch, keys.num_kv_heads, keys.head_dim, longest, place);
    if (sketch) TensorArg("sketch", *sketch, place).require_writable();

    KvAppendParams p{};
    p.dtype = keys.dtype;
    p.batch = batch;
    p.num_new = num_new;
    p.num_kv_heads = keys.num_kv_heads;
    p.head_dim = keys.head_dim;
    p.k = k_arg.data<void>();
    p.v = v_arg.data<void>();
    for (int i = 0; i < 3; ++i) {
        p.k_strides[i] = k_arg.stride(i);
        p.v_strides[i] = v_arg.stride(i);
    }
    p.num_valid = valid;
    p.seqlens_before = seqlens;
    p.starts = first_real;
    p.capacity_tokens = keys.capacity_tokens;
    p.k_cache = keys.view;
    p.v_cache = values.view;
    p.sketch = sketch_view;
    p.num_nonfinite = nonfinite_arg.mutable_data<int64_t>();
    return p;
}

}  // namespace kvselect::bindings
