// What every op checks before it computes: dtype, shape, device, strides, page tables. Kernels
// trust their params. Every message reads `name: got X, allowed: Y`, and everything is checked
// before anything is written.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "kvselect/check.h"
#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/ranking.h"
#include "kvselect/rope.h"
#include "kvselect/sketch.h"

namespace kvselect::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAnySize = -1;

// One dimension of an expected shape, by the name that the documentation gives it.
struct Dim {
    const char* name;
    int64_t size = kAnySize;
};

// Where an op runs: all its tensors must lie there. What they hold (lengths, page numbers, lists)
// is checked on the CPU only: to read it from a GPU would stop the stream that a step runs on.
struct Place {
    bool is_cuda = false;
    int32_t index = 0;  // of the CUDA device

    bool host_readable() const { return !is_cuda; }
};

// A tensor argument under its name. Sizes and strides are read through the C ABI once; they are
// borrowed.
class TensorArg {
public:
    TensorArg(const char* name, const Tensor& tensor,
              Place place = {});  // checks that it lies there

    const TensorArg& require_dtype(ScalarType allowed) const;
    const TensorArg& require_shape(std::initializer_list<Dim> dims) const;
    const TensorArg& require_contiguous_rows() const;  // the last dimension has stride 1
    const TensorArg& require_contiguous() const;
    const TensorArg& require_writable() const;  // no two elements at one address by a stride of 0

    int64_t dim() const { return dim_; }
    int64_t size(int64_t i) const { return sizes_[i]; }
    int64_t stride(int64_t i) const { return strides_[i]; }
    ScalarType dtype() const { return dtype_; }
    const char* name() const { return name_; }
    Place place() const { return place_; }
    // Never null: kernels read a null pointer as "not given", and an empty tensor is given.
    template <typename T>
    const T* data() const {
        const void* data = tensor_->const_data_ptr();
        return static_cast<const T*>(data ? data : no_element_);
    }
    template <typename T>
    T* mutable_data() const {
        void* data = tensor_->mutable_data_ptr();
        return static_cast<T*>(data ? data : no_element_);
    }

private:
    const char* name_;
    const Tensor* tensor_;
    int64_t dim_;
    const int64_t* sizes_;
    const int64_t* strides_;
    ScalarType dtype_;
    Place place_;
    alignas(64) inline static char no_element_[64] = {};
};

// A `str` argument. torch's own conversion to std::string leaks one string a call (2.11 to 2.13),
// which a server that decodes for days would notice; the handle fits the stack slot, so we take the
// text and free it ourselves.
struct StringArg {
    void* handle;
};
std::string take_string(StringArg argument);

// An int32 tensor of one number per row (cache_seqlens, starts, num_valid), contiguous.
const int32_t* row_numbers(const char* name, const Tensor& tensor, int64_t batch, Place place = {});
const int32_t* row_numbers(const char* name, const OptionalTensor& tensor, int64_t batch,
                           Place place = {});  // or nullptr

DType kernel_dtype(const TensorArg& arg);  // float32, float16 or bfloat16
void require_count(const char* name, int64_t value, int64_t low);
void require_heads(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim);

// Keys or values as the kernels see them, and how many tokens one row can hold.
struct CacheArg {
    KVView view;
    DType dtype;
    ScalarType scalar_type;
    int64_t num_blocks, num_kv_heads, head_dim;
    int64_t capacity_tokens;
};
CacheArg read_cache(const TensorArg& cache, const OptionalTensor& block_table, int64_t batch);
// The values of a cache whose keys are `keys`: the same shape and dtype, strides of their own.
CacheArg read_values(const TensorArg& values, const TensorArg& keys, const CacheArg& keys_read);
// That tokens [first, last) of a row lie inside the row's capacity and in pages that exist.
void require_pages(const CacheArg& cache, int64_t row, int64_t first, int64_t last);
// The same for every stored token of every row.
void require_stored_pages(const CacheArg& cache, const QueryBlocks& blocks);
// The longest row must fit the columns of the call's score matrix (or its scratch memory).
void require_max_seqlen(const char* name, int64_t max_seqlen_k, const QueryBlocks& blocks);

SketchFormat sketch_format(const std::string& name);
// `needed_tokens`: the longest row; every whole block of it must have a record.
SketchView read_sketch(const OptionalTensor& sketch, const std::string& format, int64_t batch,
                       int64_t num_kv_heads, int64_t head_dim, int64_t needed_tokens,
                       Place place = {});
// Records that lie with the pages of `keys`, whose block table finds them.
SketchView read_paged_sketch(const OptionalTensor& sketch, const std::string& format,
                             const CacheArg& keys, const OptionalTensor& starts, Place place = {});

WindowRule window_rule(const std::string& name);
// Only the cutting of the queries; callers that keep windows add rule, sinks and recent tokens.
QueryBlocks read_query_blocks(const Tensor& cache_seqlens, const OptionalTensor& starts,
                              const OptionalTensor& q_block_offsets, int64_t batch,
                              int64_t seqlen_q, Place place = {});
void require_all_queries_covered(const QueryBlocks& blocks);

RopeView read_rope(const OptionalTensor& cos, const OptionalTensor& sin, int64_t start,
                   bool interleaved, int64_t head_dim, Place place = {});
// What a model adds to the softmax, into the params of an op that takes it.
float read_softcap(double softcap);
const float* read_sink_logits(const OptionalTensor& sink_logits, int64_t num_q_heads,
                              Place place = {});
// What score_tokens counts for select_tokens; nullptr: nothing. CUDA only.
int32_t* read_ranking(const OptionalTensor& ranking, int64_t batch, int64_t num_blocks,
                      int64_t num_lists, Place place);
void require_rope_positions(const RopeView& rope, int64_t needed);

// Selected token lists as the kernels read them; each list checked where the host can read it:
// ascending positions inside the row.
struct IndexListsArg {
    const int32_t* indices;
    const int32_t* topk_length;
    int64_t indices_strides[3], topk_length_strides[3];  // elements: batch, block, head
    int64_t num_ranks;  // ranks that listed tokens and queries can have: [0, num_ranks); on CUDA,
                        // at most
};
IndexListsArg read_index_lists(const Tensor& indices, const Tensor& topk_length,
                               const QueryBlocks& blocks, int64_t num_kv_heads, Place place = {});

}  // namespace kvselect::bindings
