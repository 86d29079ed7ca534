// The arguments of a selection cache's step, checked: of the op itself, and of score_tokens, which
// decides on its way. All params but `hit`.
#pragma once

#include <string>

#include "bindings/checks.h"
#include "kvselect/selection_cache_step.h"

namespace kvselect::bindings {

inline Similarity similarity_of(const std::string& name) {
    if (name == "min") return Similarity::kMin;
    if (name == "q10") return Similarity::kQ10;
    KVS_CHECK(name == "flat", "similarity: got '", name, "', allowed: min, q10, flat");
    return Similarity::kFlat;
}

// The two ops call what is compared, and the defects ever appended, by other names.
struct StepNames {
    const char *q, *num_nonfinite;
};

inline SelectionCacheStepParams read_selection_cache_step(
    const StepNames& names, const Tensor& q, const Tensor& cache_seqlens,
    const OptionalTensor& starts, const Tensor& num_nonfinite, const std::string& similarity,
    double similarity_threshold, int64_t max_age, int64_t dense_limit, const Tensor& anchor_query,
    const Tensor& age, const Tensor& expected_seqlens, const Tensor& known_nonfinite,
    const Tensor& reuse_counts, Place place) {
    SelectionCacheStepParams p{};
    p.similarity = similarity_of(similarity);
    KVS_CHECK(similarity_threshold > 0.0 && similarity_threshold <= 1.0,
              "similarity_threshold: got ", similarity_threshold, ", allowed: a float in (0, 1]");
    require_count("max_age", max_age, 1);
    require_count("dense_limit", dense_limit, 0);

    const TensorArg q_arg(names.q, q, place), age_arg("age", age, place),
        nonfinite_arg(names.num_nonfinite, num_nonfinite, place),
        anchor_arg("anchor_query", anchor_query, place),
        expected_arg("expected_seqlens", expected_seqlens, place),
        known_arg("known_nonfinite", known_nonfinite, place),
        counts_arg("reuse_counts", reuse_counts, place);
    q_arg.require_shape({{"batch"}, {"seqlen_q", 1}, {"num_q_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    p.dtype = kernel_dtype(q_arg);
    p.batch = q_arg.size(0);
    p.num_q_heads = q_arg.size(2);
    p.head_dim = q_arg.size(3);
    const Dim batch{"batch", p.batch};
    nonfinite_arg.require_dtype(ScalarType::Long)
        .require_shape({batch, {"num_kv_heads"}})
        .require_contiguous();
    p.num_kv_heads = nonfinite_arg.size(1);
    require_heads(p.num_q_heads, p.num_kv_heads, p.head_dim);
    age_arg.require_dtype(ScalarType::Int)
        .require_shape({batch, {"num_lists"}})
        .require_contiguous();
    p.num_lists = age_arg.size(1);
    KVS_CHECK(p.num_lists == 1 || p.num_lists == p.num_kv_heads, "age: got ", p.num_lists,
              " lists, allowed: 1 or num_kv_heads = ", p.num_kv_heads);
    anchor_arg.require_dtype(ScalarType::Float)
        .require_shape({batch, {"num_q_heads", p.num_q_heads}, {"head_dim", p.head_dim}})
        .require_contiguous();
    expected_arg.require_dtype(ScalarType::Int).require_shape({batch}).require_contiguous();
    known_arg.require_dtype(ScalarType::Long)
        .require_shape({batch, {"num_lists", p.num_lists}})
        .require_contiguous();
    counts_arg.require_dtype(ScalarType::Long).require_shape({{"counts", 2}}).require_contiguous();

    p.q = q_arg.data<void>();
    p.q_strides[0] = q_arg.stride(0);
    p.q_strides[1] = q_arg.stride(2);
    p.cache_seqlens = row_numbers("cache_seqlens", cache_seqlens, p.batch, place);
    p.starts = row_numbers("starts", starts, p.batch, place);
    p.num_nonfinite = nonfinite_arg.data<int64_t>();
    p.similarity_threshold = similarity_threshold;
    p.max_age = max_age;
    p.dense_limit = dense_limit;
    p.anchor_query = anchor_arg.mutable_data<float>();
    p.age = age_arg.mutable_data<int32_t>();
    p.expected_seqlens = expected_arg.mutable_data<int32_t>();
    p.known_nonfinite = known_arg.mutable_data<int64_t>();
    p.reuse_counts = counts_arg.mutable_data<int64_t>();
    return p;
}

}  // namespace kvselect::bindings
