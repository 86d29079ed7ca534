#include "kvselect/kv_append.h"

#include <algorithm>

#include "check.h"
#include "cuda_emulated.h"
#include "inputs.h"
#include "sketch_codec.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

// Tokens as a caller hands them over: token-major, with a gap of NaN after each token.
struct NewTokens {
    NewTokens(const Cache& cache, int64_t num_new)
        : num_new(num_new),
          token_stride(cache.num_kv_heads * cache.head_dim + 8),
          k(cache.dtype, std::max<int64_t>(cache.seqlens.size() * num_new * token_stride, 1)),
          v(k) {}
    int64_t num_new, token_stride;
    Elements k, v;
};

struct Append {
    Append(Cache& cache, SketchFormat format) : cache(cache), before(cache.seqlens.size(), 0) {
        const int64_t batch = cache.seqlens.size();
        int64_t longest = 0;
        for (int32_t length : cache.seqlens) longest = std::max<int64_t>(longest, length);
        max_blocks = longest / kSketchBlockTokens;
        block_bytes = sketch_block_bytes(format, cache.head_dim);
        sketch.assign(batch * cache.num_kv_heads * max_blocks * block_bytes, 0xab);
        num_nonfinite.assign(batch * cache.num_kv_heads, 0);
        p = KvAppendParams{};
        p.dtype = cache.dtype;
        p.batch = batch;
        p.num_kv_heads = cache.num_kv_heads;
        p.head_dim = cache.head_dim;
        p.seqlens_before = before.data();
        p.capacity_tokens = longest;
        p.k_cache = cache.keys();
        p.v_cache = cache.values();
        p.sketch = SketchView{format == SketchFormat::kNone ? nullptr : sketch.data(), format,
                              cache.num_kv_heads * max_blocks * block_bytes,
                              max_blocks * block_bytes, block_bytes};
        p.num_nonfinite = num_nonfinite.data();
    }
    void run(const cpu::Implementation& ops, NewTokens& tokens, const std::vector<int32_t>& valid) {
        p.num_new = tokens.num_new;
        p.k = tokens.k.data();
        p.v = tokens.v.data();
        for (int64_t* strides : {p.k_strides, p.v_strides}) {
            strides[0] = tokens.num_new * tokens.token_stride;
            strides[1] = tokens.token_stride;
            strides[2] = cache.head_dim;
        }
        p.num_valid = valid.data();
        const int64_t items = kv_append_items(p).count;
        ops.kv_append(p, 0, items / 2);  // two calls, as two threads would
        ops.kv_append(p, items / 2, items);
        for (size_t row = 0; row < before.size(); ++row) before[row] += valid[row];
    }
    Cache& cache;
    std::vector<int32_t> before;
    int64_t max_blocks = 0, block_bytes = 0;
    std::vector<uint8_t> sketch;
    std::vector<int64_t> num_nonfinite;
    KvAppendParams p;
};

// Fills a cache of 300 and 131 tokens in ragged steps and checks every byte of it and of its
// sketch. page_blocks: records lie with pages of so many blocks; 0: with their row.
void append_and_compare(const cpu::Implementation& ops, DType dtype, SketchFormat format,
                        Layout layout, int64_t head_dim, bool with_nonfinite,
                        const std::vector<int32_t>& starts = {}, int64_t page_blocks = 0) {
    Random random(static_cast<uint64_t>(head_dim) + (with_nonfinite ? 1 : 0));
    Cache cache(dtype, layout, {300, 131}, 2, head_dim);
    Cache want(dtype, layout, {300, 131}, 2, head_dim);
    want.fill(random);
    for (int64_t t = 0; t < 128; ++t) {  // a constant channel has step 0
        want.k.set(want.keys().offset(0, t, 0) + 3, 0.5);
    }
    std::vector<int64_t> want_nonfinite(4, 0);
    if (with_nonfinite) {
        want.k.set(want.keys().offset(0, 130, 1) + 7, kInf);
        want.v.set(want.values().offset(1, 5, 0) + head_dim - 1, kNaN);
        ++want_nonfinite[1];
        ++want_nonfinite[2];
    }
    Append append(cache, format);
    if (!starts.empty()) append.p.starts = starts.data();
    PagedRecords paged(format, head_dim, 2, 2, append.max_blocks,
                       std::max<int64_t>(page_blocks, 1));
    if (page_blocks) append.p.sketch = paged.view;
    int64_t step = 1;
    while (append.before[0] < 300 || append.before[1] < 131) {
        NewTokens tokens(cache, step);
        std::vector<int32_t> valid;
        for (int64_t row = 0; row < 2; ++row) {
            const int64_t left = cache.seqlens[row] - append.before[row];
            valid.push_back(
                static_cast<int32_t>(std::min<int64_t>(left, row == 0 ? step : step / 2)));
            for (int64_t t = 0; t < valid.back(); ++t)
                for (int64_t h = 0; h < 2; ++h)
                    for (int64_t d = 0; d < head_dim; ++d) {
                        const int64_t at =
                            (row * step + t) * tokens.token_stride + h * head_dim + d;
                        const int64_t position = append.before[row] + t;
                        tokens.k.set(at, want.key(row, position, h, d));
                        tokens.v.set(at, want.value(row, position, h, d));
                    }
        }
        append.run(ops, tokens, valid);
        step = step * 2 + 1;
    }
    EXPECT(cache.k.bytes() == want.k.bytes(), "keys; tokens that were not appended stay NaN");
    EXPECT(cache.v.bytes() == want.v.bytes(), "values");
    EXPECT(append.num_nonfinite == want_nonfinite);
    if (format == SketchFormat::kNone) return;
    const Sketch defined(want, format, starts);
    if (page_blocks) {
        PagedRecords filled(format, head_dim, 2, 2, append.max_blocks, page_blocks);
        filled.fill(defined.view);
        EXPECT(paged.bytes == filled.bytes, "sketch in pages, head_dim ", head_dim);
    } else {
        EXPECT(append.sketch == defined.bytes, "sketch, head_dim ", head_dim);
    }
}

}  // namespace

TEST(kv_append_stores_every_byte_and_the_defined_sketch) {
    for (DType dtype : kDTypes)
        for (SketchFormat format : {SketchFormat::kNone, SketchFormat::kInt4, SketchFormat::kInt8})
            for (Layout layout : kLayouts)
                append_and_compare(ops, dtype, format, layout, 32, false);
    for (int64_t head_dim : kHeadDims)
        for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
            append_and_compare(ops, DType::kBFloat16, format, Layout::kPaged, head_dim, false);
}

TEST(kv_append_writes_records_with_their_page) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (int64_t page_blocks : {1, 2, 3})
            for (int64_t head_dim : {32, 128})
                append_and_compare(ops, DType::kBFloat16, format, Layout::kPaged, head_dim, false,
                                   {}, page_blocks);
}

// Left padding shares no block with real tokens; row 1 is all padding in the second case.
TEST(kv_append_counts_sketch_blocks_from_the_first_real_token) {
    for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
        for (const std::vector<int32_t>& starts :
             {std::vector<int32_t>{5, 3}, {44, 300}, {172, 0}, {173, 131}})
            append_and_compare(ops, DType::kBFloat16, format, Layout::kPaged, 64, false, starts);
}

TEST(kv_append_counts_what_is_not_finite_and_marks_its_block) {
    for (DType dtype : kDTypes)
        for (SketchFormat format : {SketchFormat::kInt4, SketchFormat::kInt8})
            append_and_compare(ops, dtype, format, Layout::kHeadMajor, 80, true);
}

TEST(kv_append_marks_a_block_whose_range_leaves_float16) {
    Cache cache(DType::kFloat32, Layout::kHeadMajor, {128}, 1, 32);
    Append append(cache, SketchFormat::kInt4);
    NewTokens tokens(cache, 128);
    for (int64_t t = 0; t < 128; ++t)
        for (int64_t d = 0; d < 32; ++d)
            tokens.k.set(t * tokens.token_stride + d, t == 9 && d == 31 ? 2e6 : 0.25),
                tokens.v.set(t * tokens.token_stride + d, 1.0);
    append.run(ops, tokens, {128});
    EXPECT(append.sketch[0] == 0x00 && append.sketch[1] == 0x7e);
    EXPECT(std::all_of(append.sketch.begin() + 2, append.sketch.end(),
                       [](uint8_t b) { return b == 0; }));
    EXPECT(append.num_nonfinite[0] == 0);
}

// On the CPU the binding refuses; a captured step on a GPU has nobody to ask.
TEST_ONCE(kv_append_on_cuda_drops_what_a_row_has_no_room_for) {
    Cache cache(DType::kBFloat16, Layout::kHeadMajor, {128, 128}, 2, 64);
    Append append(cache, SketchFormat::kInt4);
    append.p.capacity_tokens = 128;
    NewTokens tokens(cache, 5);
    for (int64_t i = 0; i < 2 * 5 * tokens.token_stride; ++i)
        tokens.k.set(i, 1.0), tokens.v.set(i, 1.0);
    append.p.num_new = 5;
    append.p.k = tokens.k.data();
    append.p.v = tokens.v.data();
    for (int64_t* strides : {append.p.k_strides, append.p.v_strides}) {
        strides[0] = 5 * tokens.token_stride;
        strides[1] = tokens.token_stride;
        strides[2] = cache.head_dim;
    }
    append.before = {126, 128};
    append.p.seqlens_before = append.before.data();
    const auto k_before = cache.k;
    const CudaLaunch launch{nullptr, false};
    cuda::kv_append(append.p, launch);
    std::vector<int32_t> seqlens = append.before;
    cuda::advance_seqlens(seqlens.data(), append.p, launch);
    EXPECT(seqlens == std::vector<int32_t>({128, 128}));
    for (int64_t row = 0; row < 2; ++row)
        for (int64_t head = 0; head < 2; ++head)
            for (int64_t t = 0; t < 128; ++t) {
                const int64_t at = cache.keys().offset(row, t, head);
                const double want = row == 0 && t >= 126 ? 1.0 : k_before.get(at);
                const double got = cache.k.get(at);
                EXPECT(got == want || (std::isnan(got) && std::isnan(want)), "row ", row,
                       ", token ", t);
            }
}
