#include "kvselect/gather_tokens.h"

#include <algorithm>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

struct Case {
    DType dtype = DType::kFloat32;
    Layout layout = Layout::kHeadMajor;
    std::vector<int32_t> seqlens{100}, starts{};
    int64_t num_kv_heads = 2, head_dim = 64, seqlen_q = 4;
    std::vector<int32_t> offsets{};
    int64_t listed = 20;       // tokens per list besides the block's own, at most
    bool shared_list = false;  // head stride 0
    const RopeTable* rope = nullptr;
    int64_t break_list = -1;  // a list of this number names no token of its block
};

// Runs the op on a cache whose unlisted tokens are NaN and compares with the rows themselves.
void gather_and_compare(const cpu::Implementation& ops, const Case& c, int line) {
    const int64_t batch = static_cast<int64_t>(c.seqlens.size());
    const int64_t num_blocks = c.offsets.empty() ? 1 : static_cast<int64_t>(c.offsets.size()) - 1;
    Random random(static_cast<uint64_t>(line) * 31 + static_cast<uint64_t>(c.head_dim));
    Cache cache(c.dtype, c.layout, c.seqlens, c.num_kv_heads, c.head_dim);
    cache.fill(random);

    GatherTokensParams p{};
    p.dtype = c.dtype;
    p.num_kv_heads = c.num_kv_heads;
    p.head_dim = c.head_dim;
    p.blocks = QueryBlocks{batch,
                           num_blocks,
                           c.seqlen_q,
                           c.offsets.empty() ? nullptr : c.offsets.data(),
                           c.seqlens.data(),
                           c.starts.empty() ? nullptr : c.starts.data(),
                           WindowRule::kDecode,
                           0,
                           0};
    p.keys = cache.keys();
    p.values = cache.values();
    if (c.rope) p.rope = c.rope->view();

    const int64_t list_heads = c.shared_list ? 1 : c.num_kv_heads;
    const int64_t width = c.listed + c.seqlen_q + 3;
    std::vector<int32_t> indices(static_cast<size_t>(batch * num_blocks * list_heads * width), -1),
        lengths(static_cast<size_t>(batch * num_blocks * list_heads));
    for (int64_t row = 0; row < batch; ++row) {
        std::vector<bool> used(static_cast<size_t>(c.seqlens[row]), false);
        for (int64_t block = 0; block < num_blocks; ++block) {
            const BlockRange range = block_range(p.blocks, row, block);
            for (int64_t head = 0; head < list_heads; ++head) {
                const int64_t list = (row * num_blocks + block) * list_heads + head;
                int32_t* out = indices.data() + list * width;
                int32_t& length = lengths[static_cast<size_t>(list)];
                for (int64_t t = range.start; t < range.end; ++t)
                    if (t >= range.begin || (length < c.listed && random.below(3) == 0)) {
                        out[length++] = static_cast<int32_t>(t);
                        used[static_cast<size_t>(t)] = true;
                    }
            }
        }
        for (int64_t t = 0; t < c.seqlens[row]; ++t)
            if (!used[static_cast<size_t>(t)]) cache.poison(row, t);
    }
    p.indices = indices.data();
    p.topk_length = lengths.data();
    const int64_t strides[] = {num_blocks * list_heads, list_heads, c.shared_list ? 0 : 1};
    for (int i = 0; i < 3; ++i) {
        p.indices_strides[i] = strides[i] * width;
        p.topk_length_strides[i] = strides[i];
    }
    p.width = width;
    const int64_t num_lists = gather_tokens_lists(p);
    int64_t total = 0;
    for (int64_t number = 0; number < num_lists; ++number) {
        GatheredList list = gathered_list(p, number);
        total += list.count;
        EXPECT(ends_with_its_block(p, list), "list ", number);
    }
    // Memory for the listed tokens only: nothing behind them is written.
    Elements k(c.dtype, total * c.head_dim), v(c.dtype, total * c.head_dim);
    std::vector<int32_t> cu_seqlens(static_cast<size_t>(num_lists + 1), -7);
    p.k = k.data();
    p.v = v.data();
    p.cu_seqlens = cu_seqlens.data();
    for (int64_t number = 0; number < num_lists; ++number) ops.gather_tokens(p, number, number + 1);
    const auto one_by_one = k;
    ops.gather_tokens(p, 0, num_lists);
    EXPECT(one_by_one.bytes() == k.bytes(), "bits depend on how lists are dealt out");

    RelativeError rotated;
    int64_t at = 0;
    for (int64_t number = 0; number < num_lists; ++number) {
        const GatheredList list = gathered_list(p, number);
        EXPECT(cu_seqlens[static_cast<size_t>(number)] == at, "list ", number, " begins at ",
               cu_seqlens[static_cast<size_t>(number)], " for ", at);
        for (int64_t i = 0; i < list.count; ++i, ++at) {
            const int64_t t = list.entries[i];
            std::vector<double> key;
            for (int64_t d = 0; d < c.head_dim; ++d) {
                key.push_back(cache.key(list.row, t, list.kv_head, d));
                EXPECT(v.get(at * c.head_dim + d) == cache.value(list.row, t, list.kv_head, d),
                       "value ", i, " of list ", number);
            }
            if (c.rope) key = c.rope->rotate(key, i);
            for (int64_t d = 0; d < c.head_dim; ++d) {
                const double got = k.get(at * c.head_dim + d), want = key[static_cast<size_t>(d)];
                if (!c.rope) EXPECT(got == want, "key ", i, " of list ", number);
                rotated.add(got, want);
            }
        }
    }
    EXPECT(cu_seqlens.back() == total, "the last list ends at ", cu_seqlens.back(), " for ", total);
    EXPECT(!(rotated.value() > tolerance(c.dtype)), "error of rotated keys: ", rotated.value());
}

}  // namespace

TEST(gather_tokens_copies_listed_rows) {
    for (DType dtype : kDTypes)
        for (Layout layout : kLayouts)
            for (int64_t head_dim : kHeadDims) {
                Case c{dtype, layout, {100, 37}};
                c.head_dim = head_dim;
                gather_and_compare(ops, c, __LINE__);
            }
}

TEST(gather_tokens_of_blocks_and_padding) {
    for (bool shared_list : {false, true})
        for (int64_t listed : {0, 1, 63, 64, 150}) {
            Case c{DType::kBFloat16, Layout::kPaged, {300, 41, 13, 0}, {0, 7, 12, 0}, 3, 32, 40};
            c.offsets = {0, 9, 9, 24, 25, 40};
            c.listed = listed;
            c.shared_list = shared_list;
            gather_and_compare(ops, c, __LINE__);
        }
}

TEST(gather_tokens_rotates_keys_to_their_ranks) {
    for (bool interleaved : {false, true})
        for (DType dtype : kDTypes) {
            const RopeTable rope(160, 24, 8, interleaved);
            Case c{dtype, Layout::kTokenMajor, {200, 90}};
            c.listed = 130;
            c.rope = &rope;
            gather_and_compare(ops, c, __LINE__);
        }
}

TEST(gather_tokens_of_no_query) {
    Case c{DType::kFloat32, Layout::kHeadMajor, {20, 0}};
    c.seqlen_q = 0;
    gather_and_compare(ops, c, __LINE__);
}

TEST(lists_that_do_not_end_with_their_block) {
    const int32_t seqlens[] = {10}, starts[] = {8}, offsets[] = {0, 3, 3};
    const std::vector<std::vector<int32_t>> wrong{{},        {9},       {7, 8},
                                                  {0, 7, 9}, {0, 1, 2}, {5, 6, 7, 8}};
    GatherTokensParams p{};
    p.blocks = QueryBlocks{1, 1, 3, nullptr, seqlens, nullptr, WindowRule::kDecode, 0, 0};
    for (const auto& entries : wrong) {
        const GatheredList list{0, 0, 0, entries.data(), static_cast<int64_t>(entries.size())};
        EXPECT(!ends_with_its_block(p, list), "a list of ", entries.size());
    }
    const std::vector<int32_t> right{0, 4, 7, 8, 9};
    EXPECT(ends_with_its_block(p, {0, 0, 0, right.data(), 5}), "5 entries");
    EXPECT(ends_with_its_block(p, {0, 0, 0, right.data() + 2, 3}), "3 entries");
    // Two tokens and a query before them: there is nothing else to see.
    p.blocks.starts = starts;
    EXPECT(ends_with_its_block(p, {0, 0, 0, right.data() + 3, 2}), "padding");
    EXPECT(!ends_with_its_block(p, {0, 0, 0, right.data() + 2, 3}), "a token in the padding");
    // No query, nothing to ask for.
    p.blocks.offsets = offsets;
    p.blocks.num_blocks = 2;
    EXPECT(ends_with_its_block(p, {0, 1, 0, right.data(), 2}), "no query");
    (void)ops;
}

// What the CPU's op refuses, a GPU's marks: its host cannot look.
TEST(gather_tokens_on_cuda_marks_what_it_cannot_serve) {
    if (std::string(ops.name) != "cuda") return;
    Random random(3);
    Cache cache(DType::kBFloat16, Layout::kHeadMajor, {40}, 1, 32);
    cache.fill(random);
    const int32_t seqlens[] = {40};
    // Of three blocks of two queries: a good one; one without its own tokens; one with no token.
    const int32_t offsets[] = {0, 2, 4, 6};
    const std::vector<int32_t> indices{1, 34, 35, 3, 4, 5, 40, 38, 39}, lengths{3, 3, 3};
    Elements k(DType::kBFloat16, 9 * 32), v(DType::kBFloat16, 9 * 32);
    std::vector<int32_t> cu_seqlens(4, -7);
    GatherTokensParams p{};
    p.dtype = DType::kBFloat16;
    p.num_kv_heads = 1;
    p.head_dim = 32;
    p.blocks = QueryBlocks{1, 3, 6, offsets, seqlens, nullptr, WindowRule::kDecode, 0, 0};
    p.keys = cache.keys();
    p.values = cache.values();
    p.indices = indices.data();
    p.topk_length = lengths.data();
    p.indices_strides[0] = 9;
    p.indices_strides[1] = 3;
    p.topk_length_strides[0] = 3;
    p.topk_length_strides[1] = 1;
    p.width = 3;
    p.k = k.data();
    p.v = v.data();
    p.cu_seqlens = cu_seqlens.data();
    ops.gather_tokens(p, 0, 3);
    for (int64_t row = 0; row < 9; ++row)
        for (int64_t d = 0; d < 32; ++d) {
            const bool marked = (row >= 3 && row < 6) || row == 6;
            EXPECT(std::isnan(k.get(row * 32 + d)) == marked, "key of row ", row);
            EXPECT(!std::isnan(v.get(row * 32 + d)), "value of row ", row);
        }
}

TEST(gather_tokens_stays_in_its_room) {
    const int32_t indices[] = {0, 1, 2, 3, 4, 5}, lengths[] = {7, -2, 1};
    GatherTokensParams p{};
    p.num_kv_heads = 1;
    p.blocks.batch = 1;
    p.blocks.num_blocks = 3;
    p.indices = indices;
    p.topk_length = lengths;
    p.indices_strides[1] = 2;
    p.topk_length_strides[1] = 1;
    p.width = 2;
    const int64_t want[] = {2, 0, 1};
    for (int64_t number = 0; number < 3; ++number)
        EXPECT(gathered_list(p, number).count == want[number], "list ", number);
    (void)ops;
}
