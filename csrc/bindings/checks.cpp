#include "bindings/checks.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <array>
#include <limits>

namespace kvselect::bindings {
namespace {

std::string shape_text(const int64_t* sizes, int64_t dim) {
    std::ostringstream text;
    text << "[";
    for (int64_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
    text << "]";
    return text.str();
}

std::string shape_text(std::initializer_list<Dim> dims) {
    std::ostringstream text;
    const char* separator = "[";
    for (const Dim& dim : dims) {
        text << separator << dim.name;
        if (dim.size != kAnySize) text << "=" << dim.size;
        separator = ", ";
    }
    text << "]";
    return text.str();
}

const char* dtype_name(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Float:
            return "float32";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        default:
            return torch::headeronly::toString(dtype);
    }
}

// That a list holds ascending positions in [0, seqlen): one pass without branches; the entry at
// fault is looked for only if there is one.
void require_positions(const int32_t* list, int64_t length, int64_t seqlen,
                       const int64_t (&at)[3]) {
    if (length == 0) return;
    int32_t disorder = 0;
    for (int64_t i = 1; i < length; ++i) disorder |= list[i - 1] >= list[i];
    if (!disorder && list[0] >= 0 && list[length - 1] < seqlen) return;
    int64_t before = -1;
    for (int64_t i = 0; i < length; ++i) {
        KVS_CHECK(list[i] > before && list[i] < seqlen, "indices: got ", list[i], " at [", at[0],
                  ", ", at[1], ", ", at[2], ", ", i, "], allowed: ascending positions in 0..",
                  seqlen - 1);
        before = list[i];
    }
}

}  // namespace

TensorArg::TensorArg(const char* name, const Tensor& tensor, Place place)
    : name_(name),
      tensor_(&tensor),
      dim_(tensor.dim()),
      sizes_(tensor.sizes().data()),
      strides_(tensor.strides().data()),
      dtype_(tensor.scalar_type()),
      place_(place) {
    if (!place.is_cuda) {
        KVS_CHECK(tensor.is_cpu(), name,
                  ": got a tensor on another device, allowed: cpu, like k_cache");
        return;
    }
    const bool is_cuda = tensor.is_cuda();
    KVS_CHECK(is_cuda && tensor.get_device_index() == place.index, name, ": got a tensor on ",
              is_cuda           ? "cuda:" + std::to_string(tensor.get_device_index())
              : tensor.is_cpu() ? std::string("cpu")
                                : std::string("another device"),
              ", allowed: cuda:", place.index, ", like the other tensors");
}

const TensorArg& TensorArg::require_dtype(ScalarType allowed) const {
    KVS_CHECK(dtype_ == allowed, name_, ": got ", dtype_name(dtype_),
              ", allowed: ", dtype_name(allowed));
    return *this;
}

const TensorArg& TensorArg::require_shape(std::initializer_list<Dim> dims) const {
    bool same = dim_ == static_cast<int64_t>(dims.size());
    int64_t i = 0;
    for (const Dim& dim : dims) {
        if (!same) break;
        same = dim.size == kAnySize || dim.size == sizes_[i];
        ++i;
    }
    KVS_CHECK(same, name_, ": got shape ", shape_text(sizes_, dim_),
              ", allowed: ", shape_text(dims));
    return *this;
}

const TensorArg& TensorArg::require_contiguous_rows() const {
    KVS_CHECK(dim_ > 0 && (strides_[dim_ - 1] == 1 || sizes_[dim_ - 1] <= 1), name_,
              ": got strides ", shape_text(strides_, dim_), ", allowed: 1 in the last dimension");
    return *this;
}

const TensorArg& TensorArg::require_contiguous() const {
    KVS_CHECK(tensor_->is_contiguous(), name_, ": got strides ", shape_text(strides_, dim_),
              ", allowed: a contiguous tensor");
    return *this;
}

const TensorArg& TensorArg::require_writable() const {
    for (int64_t i = 0; i < dim_; ++i) {
        KVS_CHECK(strides_[i] != 0 || sizes_[i] <= 1, name_, ": got strides ",
                  shape_text(strides_, dim_),
                  ", allowed: no stride of 0 in a tensor that is written");
    }
    return *this;
}

std::string take_string(StringArg argument) {
    const auto handle = static_cast<StringHandle>(argument.handle);
    size_t length = 0;
    const char* text = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    std::string taken(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return taken;
}

const int32_t* row_numbers(const char* name, const Tensor& tensor, int64_t batch, Place place) {
    return TensorArg(name, tensor, place)
        .require_dtype(ScalarType::Int)
        .require_shape({{"batch", batch}})
        .require_contiguous()
        .data<int32_t>();
}

const int32_t* row_numbers(const char* name, const OptionalTensor& tensor, int64_t batch,
                           Place place) {
    return tensor ? row_numbers(name, *tensor, batch, place) : nullptr;
}

DType kernel_dtype(const TensorArg& arg) {
    switch (arg.dtype()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::Half:
            return DType::kFloat16;
        case ScalarType::BFloat16:
            return DType::kBFloat16;
        default:
            fail(arg.name(), ": got ", dtype_name(arg.dtype()),
                 ", allowed: float32, float16, bfloat16");
    }
}

void require_count(const char* name, int64_t value, int64_t low) {
    KVS_CHECK(value >= low, name, ": got ", value, ", allowed: an int >= ", low);
}

void require_heads(int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim) {
    KVS_CHECK(num_kv_heads >= 1, "num_kv_heads: got ", num_kv_heads, ", allowed: an int >= 1");
    KVS_CHECK(num_q_heads >= 1 && num_q_heads % num_kv_heads == 0, "num_q_heads: got ", num_q_heads,
              ", allowed: a multiple of num_kv_heads = ", num_kv_heads);
    constexpr std::array<int64_t, 9> kHeadDims{32, 64, 80, 96, 128, 160, 192, 256, 512};
    KVS_CHECK(std::find(kHeadDims.begin(), kHeadDims.end(), head_dim) != kHeadDims.end(),
              "head_dim: got ", head_dim, ", allowed: 32, 64, 80, 96, 128, 160, 192, 256, 512");
}

CacheArg read_cache(const TensorArg& cache, const OptionalTensor& block_table, int64_t batch) {
    cache.require_shape({{"num_blocks"}, {"page_block_size"}, {"num_kv_heads"}, {"head_dim"}})
        .require_contiguous_rows();
    CacheArg read;
    read.dtype = kernel_dtype(cache);
    read.scalar_type = cache.dtype();
    read.num_blocks = cache.size(0);
    read.num_kv_heads = cache.size(2);
    read.head_dim = cache.size(3);
    read.view = KVView{cache.mutable_data<void>(),
                       cache.stride(0),
                       cache.stride(1),
                       cache.stride(2),
                       cache.size(1),
                       nullptr,
                       0};
    read.capacity_tokens = cache.size(1);
    if (block_table) {
        const TensorArg table("block_table", *block_table, cache.place());
        table.require_dtype(ScalarType::Int)
            .require_shape({{"batch", batch}, {"max_num_blocks"}})
            .require_contiguous_rows();
        KVS_CHECK(cache.size(1) >= 1, cache.name(), ": got page_block_size ", cache.size(1),
                  ", allowed: an int >= 1");
        read.view.block_table = table.data<int32_t>();
        read.view.block_table_stride = table.stride(0);
        read.capacity_tokens = table.size(1) * cache.size(1);
    } else {
        KVS_CHECK(cache.size(0) == batch, cache.name(), ": got ", cache.size(0),
                  " rows, allowed: batch = ", batch, " without a block_table");
    }
    return read;
}

CacheArg read_values(const TensorArg& values, const TensorArg& keys, const CacheArg& keys_read) {
    values.require_dtype(keys.dtype())
        .require_shape({{"num_blocks", keys.size(0)},
                        {"page_block_size", keys.size(1)},
                        {"num_kv_heads", keys.size(2)},
                        {"head_dim", keys.size(3)}})
        .require_contiguous_rows();
    CacheArg read = keys_read;
    read.view.data = values.mutable_data<void>();
    read.view.page_stride = values.stride(0);
    read.view.token_stride = values.stride(1);
    read.view.head_stride = values.stride(2);
    return read;
}

void require_pages(const CacheArg& cache, int64_t row, int64_t first, int64_t last) {
    KVS_CHECK(last <= cache.capacity_tokens, "cache_seqlens: got ", last, " tokens in row ", row,
              ", allowed: at most ", cache.capacity_tokens, " (what ",
              cache.view.block_table ? "block_table" : "k_cache", " has room for)");
    if (!cache.view.block_table || first >= last) return;
    const int32_t* table = cache.view.block_table + row * cache.view.block_table_stride;
    const int64_t first_page = first / cache.view.page_block_size;
    const int64_t last_page = (last - 1) / cache.view.page_block_size;
    int32_t lowest = 0, highest = 0;  // one pass without branches; the page at fault is looked up
                                      // only if there is one
    for (int64_t page = first_page; page <= last_page; ++page) {
        lowest = std::min(lowest, table[page]);
        highest = std::max(highest, table[page]);
    }
    if (lowest >= 0 && highest < cache.num_blocks) return;
    for (int64_t page = first_page; page <= last_page; ++page) {
        KVS_CHECK(table[page] >= 0 && table[page] < cache.num_blocks, "block_table: got page ",
                  table[page], " at [", row, ", ", page, "], allowed: 0..", cache.num_blocks - 1);
    }
}

void require_stored_pages(const CacheArg& cache, const QueryBlocks& blocks) {
    for (int64_t row = 0; row < blocks.batch; ++row) {
        const int64_t seqlen = blocks.cache_seqlens[row];
        const int64_t start = blocks.starts ? blocks.starts[row] : 0;
        require_pages(cache, row, std::clamp<int64_t>(start, 0, seqlen), seqlen);
    }
}

void require_max_seqlen(const char* name, int64_t max_seqlen_k, const QueryBlocks& blocks) {
    for (int64_t row = 0; row < blocks.batch; ++row) {
        KVS_CHECK(blocks.cache_seqlens[row] <= max_seqlen_k, name, ": got ", max_seqlen_k,
                  ", allowed: at least cache_seqlens[", row, "] = ", blocks.cache_seqlens[row]);
    }
}

SketchFormat sketch_format(const std::string& name) {
    if (name == "int4") return SketchFormat::kInt4;
    if (name == "int8") return SketchFormat::kInt8;
    KVS_CHECK(name == "none", "sketch_format: got '", name, "', allowed: int4, int8, none");
    return SketchFormat::kNone;
}

SketchView read_sketch(const OptionalTensor& sketch, const std::string& format, int64_t batch,
                       int64_t num_kv_heads, int64_t head_dim, int64_t needed_tokens, Place place) {
    SketchView view{nullptr, sketch_format(format), 0, 0, 0};
    if (!sketch) return view;
    KVS_CHECK(view.format != SketchFormat::kNone,
              "sketch_format: got 'none' with a sketch, allowed: ", "int4, int8");
    const TensorArg arg("sketch", *sketch, place);
    arg.require_dtype(ScalarType::Byte)
        .require_shape({{"batch", batch},
                        {"num_kv_heads", num_kv_heads},
                        {"max_blocks"},
                        {"block_bytes", sketch_block_bytes(view.format, head_dim)}})
        .require_contiguous_rows();
    const int64_t needed_blocks = needed_tokens / kSketchBlockTokens;
    KVS_CHECK(arg.size(2) >= needed_blocks, "sketch: got ", arg.size(2),
              " blocks, allowed: at least ", needed_blocks, " for ", needed_tokens, " tokens");
    view.data = arg.mutable_data<uint8_t>();
    view.row_stride = arg.stride(0);
    view.head_stride = arg.stride(1);
    view.block_stride = arg.stride(2);
    return view;
}

SketchView read_paged_sketch(const OptionalTensor& sketch, const std::string& format,
                             const CacheArg& keys, const OptionalTensor& starts, Place place) {
    KVS_CHECK(
        sketch && keys.view.block_table && !starts,
        "sketch_in_pages: got true, allowed: false without a sketch or a block_table, or with "
        "starts");
    const int64_t page_blocks = keys.view.page_block_size / kSketchBlockTokens;
    KVS_CHECK(page_blocks * kSketchBlockTokens == keys.view.page_block_size && page_blocks >= 1,
              "sketch_in_pages: got true with page_block_size ", keys.view.page_block_size,
              ", allowed: false, or a multiple of ", kSketchBlockTokens);
    // As many "rows" as there are pages, each as long as a page.
    SketchView view = read_sketch(sketch, format, keys.num_blocks, keys.num_kv_heads, keys.head_dim,
                                  keys.view.page_block_size, place);
    view.block_table = keys.view.block_table;
    view.block_table_stride = keys.view.block_table_stride;
    view.page_blocks = page_blocks;
    return view;
}

WindowRule window_rule(const std::string& name) {
    if (name == "decode") return WindowRule::kDecode;
    if (name == "block_start") return WindowRule::kBlockStart;
    KVS_CHECK(name == "block_end", "window_rule: got '", name,
              "', allowed: decode, block_start, block_end");
    return WindowRule::kBlockEnd;
}

QueryBlocks read_query_blocks(const Tensor& cache_seqlens, const OptionalTensor& starts,
                              const OptionalTensor& q_block_offsets, int64_t batch,
                              int64_t seqlen_q, Place place) {
    require_count("seqlen_q", seqlen_q, 0);
    QueryBlocks blocks{};
    blocks.batch = batch;
    blocks.num_blocks = 1;
    blocks.seqlen_q = seqlen_q;
    blocks.cache_seqlens = row_numbers("cache_seqlens", cache_seqlens, batch, place);
    blocks.starts = row_numbers("starts", starts, batch, place);
    blocks.rule = WindowRule::kDecode;
    for (int64_t row = 0; place.host_readable() && row < batch; ++row) {
        KVS_CHECK(blocks.cache_seqlens[row] >= 0, "cache_seqlens: got ", blocks.cache_seqlens[row],
                  " in row ", row, ", allowed: an int >= 0");
    }
    if (q_block_offsets) {
        const TensorArg arg("q_block_offsets", *q_block_offsets, place);
        arg.require_dtype(ScalarType::Int).require_shape({{"num_blocks + 1"}}).require_contiguous();
        KVS_CHECK(arg.size(0) >= 1,
                  "q_block_offsets: got no entry, allowed: num_blocks + 1 entries");
        blocks.num_blocks = arg.size(0) - 1;
        blocks.offsets = arg.data<int32_t>();
        int64_t before = 0;
        for (int64_t i = 0; place.host_readable() && i <= blocks.num_blocks; ++i) {
            const int64_t offset = blocks.offsets[i];
            KVS_CHECK(offset >= before && offset <= seqlen_q, "q_block_offsets: got ", offset,
                      " at ", i, ", allowed: ascending from 0 to seqlen_q = ", seqlen_q);
            before = offset;
        }
    }
    return blocks;
}

void require_all_queries_covered(const QueryBlocks& blocks) {
    if (!blocks.offsets) return;
    const int64_t first = blocks.offsets[0], last = blocks.offsets[blocks.num_blocks];
    KVS_CHECK(first == 0 && last == blocks.seqlen_q, "q_block_offsets: got ", first, "..", last,
              ", allowed: 0..", blocks.seqlen_q, " (every query belongs to one block)");
}

RopeView read_rope(const OptionalTensor& cos, const OptionalTensor& sin, int64_t start,
                   bool interleaved, int64_t head_dim, Place place) {
    RopeView rope{};
    KVS_CHECK(cos.has_value() == sin.has_value(), "sin: got ", sin ? "a tensor" : "None",
              ", allowed: ", cos ? "a tensor, like cos" : "None, like cos");
    if (!cos) return rope;
    const TensorArg cos_arg("cos", *cos, place), sin_arg("sin", *sin, place);
    cos_arg.require_dtype(ScalarType::Float)
        .require_shape({{"num_positions"}, {"num_pairs"}})
        .require_contiguous();
    sin_arg.require_dtype(ScalarType::Float)
        .require_shape({{"num_positions", cos_arg.size(0)}, {"num_pairs", cos_arg.size(1)}})
        .require_contiguous();
    KVS_CHECK(start >= 0 && start + 2 * cos_arg.size(1) <= head_dim, "rope_start: got ", start,
              " with ", cos_arg.size(1),
              " pairs, allowed: rotated channels inside head_dim = ", head_dim);
    rope.cos = cos_arg.data<float>();
    rope.sin = sin_arg.data<float>();
    rope.num_positions = cos_arg.size(0);
    rope.num_pairs = cos_arg.size(1);
    rope.start = start;
    rope.interleaved = interleaved;
    return rope;
}

float read_softcap(double softcap) {
    const bool usable = softcap == 0.0 || (softcap >= 1e-6 && softcap <= 1e6);
    KVS_CHECK(usable, "softcap: got ", softcap, ", allowed: 0 (none), or 1e-6 .. 1e6");
    return static_cast<float>(softcap);
}

const float* read_sink_logits(const OptionalTensor& sink_logits, int64_t num_q_heads, Place place) {
    if (!sink_logits) return nullptr;
    return TensorArg("sink_logits", *sink_logits, place)
        .require_dtype(ScalarType::Float)
        .require_shape({{"num_q_heads", num_q_heads}})
        .require_contiguous()
        .data<float>();
}

int32_t* read_ranking(const OptionalTensor& ranking, int64_t batch, int64_t num_blocks,
                      int64_t num_lists, Place place) {
    if (!ranking) return nullptr;
    KVS_CHECK(place.is_cuda,
              "ranking: got a tensor, allowed: none on the CPU, whose select_tokens counts alone");
    return TensorArg("ranking", *ranking, place)
        .require_dtype(ScalarType::Int)
        .require_shape({{"batch", batch},
                        {"num_blocks", num_blocks},
                        {"num_lists", num_lists},
                        {"words", kRankingWords}})
        .require_contiguous()
        .mutable_data<int32_t>();
}

void require_rope_positions(const RopeView& rope, int64_t needed) {
    KVS_CHECK(!rope.cos || rope.num_positions >= needed, "cos: got ", rope.num_positions,
              " positions, allowed: at least ", needed);
}

IndexListsArg read_index_lists(const Tensor& indices, const Tensor& topk_length,
                               const QueryBlocks& blocks, int64_t num_kv_heads, Place place) {
    const TensorArg lists("indices", indices, place), lengths("topk_length", topk_length, place);
    lists.require_dtype(ScalarType::Int)
        .require_shape({{"batch", blocks.batch},
                        {"num_blocks", blocks.num_blocks},
                        {"num_kv_heads", num_kv_heads},
                        {"width"}})
        .require_contiguous_rows();
    lengths.require_dtype(ScalarType::Int)
        .require_shape({{"batch", blocks.batch},
                        {"num_blocks", blocks.num_blocks},
                        {"num_kv_heads", num_kv_heads}});
    IndexListsArg read{};
    // Lists without room are empty lists; a null pointer would mean none, that is, every token.
    static constexpr int32_t kNoEntries = -1;
    read.indices = lists.size(3) > 0 ? lists.data<int32_t>() : &kNoEntries;
    read.topk_length = lengths.data<int32_t>();
    for (int i = 0; i < 3; ++i) {
        read.indices_strides[i] = lists.stride(i);
        read.topk_length_strides[i] = lengths.stride(i);
    }
    const int64_t width = lists.size(3);
    if (!place.host_readable()) {
        read.num_ranks = width + 1;
        return read;
    }
    // Heads that share a list (stride 0) share its check.
    const bool shared = read.indices_strides[2] == 0 && read.topk_length_strides[2] == 0;
    const int64_t num_lists = shared ? std::min<int64_t>(num_kv_heads, 1) : num_kv_heads;
    for (int64_t row = 0; row < blocks.batch; ++row) {
        for (int64_t block = 0; block < blocks.num_blocks; ++block) {
            const int64_t newest = block_range(blocks, row, block).end - 1;
            for (int64_t head = 0; head < num_lists; ++head) {
                const int64_t at[3] = {row, block, head};
                const int32_t* list = read.indices;
                const int32_t* length_of = read.topk_length;
                for (int i = 0; i < 3; ++i) {
                    list += at[i] * read.indices_strides[i];
                    length_of += at[i] * read.topk_length_strides[i];
                }
                const int64_t length = *length_of;
                KVS_CHECK(length >= 0 && length <= width, "topk_length: got ", length, " at [", row,
                          ", ", block, ", ", head, "], allowed: 0..", width);
                require_positions(list, length, blocks.cache_seqlens[row], at);
                // A query has the rank of its own token, or the next one if its token is not
                // listed.
                const bool behind = length == 0 || list[length - 1] < newest;
                read.num_ranks = std::max(read.num_ranks, length + behind);
            }
        }
    }
    return read;
}

}  // namespace kvselect::bindings
