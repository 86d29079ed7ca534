// selection_cache_step: which lists of a decode step may be reused, and what to remember of the
// step.
//
// A list is reused (hit) if its row grew by exactly one token since the last step, it is younger
// than max_age, its heads met no new defect, and the step's query is similar to the query that made
// it. Similar: all but `may_differ` of its vectors have
//
//     dot(q, anchor) >= similarity_threshold * sqrt(dot(q, q) * dot(anchor, anchor))
//
// with a right side that is neither 0 nor inf nor NaN. One definition of the bits for every
// implementation: products and sums in double, a vector's element i added to partial sum i % 8, and
// the eight added as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)). A product of two floats is exact in
// double, so a fused multiply-add changes nothing.
#pragma once

#include <cstdint>

#include "kvselect/host_device.h"
#include "kvselect/kv_view.h"

namespace kvselect {

// What the cosines of the query heads that share a list are asked for.
enum class Similarity : int32_t {
    kMin = 0,   // the smallest
    kQ10 = 1,   // the 10 % quantile, lower value
    kFlat = 2,  // that of all heads laid end to end
};

struct SelectionCacheStepParams {
    int64_t batch, num_lists, num_q_heads, num_kv_heads, head_dim;
    DType dtype;                   // of q
    const void* q;                 // [batch, num_q_heads, head_dim], last dim contiguous
    int64_t q_strides[2];          // elements: batch, head
    const int32_t* cache_seqlens;  // [batch] tokens stored, the query's own included
    const int32_t* starts;         // [batch] first real token of each row, or nullptr: 0
    const int64_t* num_nonfinite;  // [batch, num_kv_heads] defects ever appended
    Similarity similarity;
    double similarity_threshold;
    int64_t max_age;      // most steps in a row that a list is reused
    int64_t dense_limit;  // lists of rows of at most so many real tokens are not reused later
    // What is remembered from step to step; read, then written.
    float* anchor_query;        // [batch, num_q_heads, head_dim] the query that made each list
    int32_t* age;               // [batch, num_lists] steps since then
    int32_t* expected_seqlens;  // [batch] length at which the lists may be reused; -1: at none
    int64_t* known_nonfinite;   // [batch, num_lists] defects met up to the last step
    int64_t* reuse_counts;      // [2] grows by: lists reused, and the visible tokens of their heads
    int32_t* hit;               // [batch, num_lists] 1: reuse, 0: make anew
};

// Vectors of a list that may be less similar than the threshold.
KVS_HOST_DEVICE inline int64_t may_differ(const SelectionCacheStepParams& p) {
    const int64_t num_heads = p.num_q_heads / p.num_lists;
    return p.similarity == Similarity::kQ10 ? (num_heads - 1) / 10 : 0;
}

// Work items are rows: [0, batch).
using SelectionCacheStepFn = void (*)(const SelectionCacheStepParams&, int64_t begin, int64_t end);

}  // namespace kvselect
