// kv_append: store new keys and values, and sketch every 128-token block that they complete.
#pragma once

#include "kvselect/kv_view.h"
#include "kvselect/sketch.h"

namespace kvselect {

struct KvAppendParams {
    DType dtype;
    int64_t batch, num_new, num_kv_heads, head_dim;
    const void* k;  // [batch, num_new, num_kv_heads, head_dim]
    const void* v;
    int64_t k_strides[3], v_strides[3];  // elements: batch, token, head
    const int32_t*
        num_valid;  // [batch] how many of num_new tokens count (the first ones), or nullptr: all
    const int32_t* seqlens_before;  // [batch]
    const int32_t* starts;  // [batch] first real token: sketch blocks count from it; or nullptr: 0
    KVView k_cache, v_cache;
    SketchView sketch;
    int64_t*
        num_nonfinite;  // [batch, num_kv_heads] += new tokens whose key or value holds NaN or inf
};

// Work items are (row, kv_head): [0, batch * num_kv_heads).
using KvAppendFn = void (*)(const KvAppendParams&, int64_t begin, int64_t end);

}  // namespace kvselect
