#include "kvselect/list_blocks.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

// Lists of drawn blocks, drawn flags, every buffer exactly as long as promised.
struct Case {
    int64_t batch, num_query_blocks, num_kv_heads, num_lists, num_blocks, block_size, num_picked,
        num_window_blocks, width;
    bool has_starts;
};

void check_case(const cpu::Implementation& ops, const Case& c, Random& random) {
    const int64_t num_rows = c.batch * c.num_query_blocks;
    const int64_t num_lists = num_rows * c.num_lists;
    std::vector<int32_t> first(num_rows), end(num_rows), starts(c.batch);
    std::vector<int32_t> picked(num_lists * c.num_picked, -1);
    std::vector<uint8_t> finite(c.batch * c.num_kv_heads * c.num_blocks * c.block_size, 1);
    for (uint8_t& flag : finite) flag = random.below(8) != 0;
    for (int32_t& start : starts) start = static_cast<int32_t>(random.below(9));
    for (int64_t row = 0; row < num_rows; ++row) {
        end[row] = static_cast<int32_t>(random.below(c.num_blocks * c.block_size + 1));
        first[row] = static_cast<int32_t>(random.below(c.num_blocks + 1));
        for (int64_t list = 0; list < c.num_lists; ++list) {
            int32_t* out = picked.data() + (row * c.num_lists + list) * c.num_picked;
            int64_t length = 0;
            for (int32_t block = 0; block < first[row] && length < c.num_picked; ++block)
                if (random.below(2)) out[length++] = block;
        }
    }
    std::vector<int32_t> indices(num_lists * c.width, 7), count(num_lists, 7);
    ListBlocksParams p{};
    p.num_rows = num_rows;
    p.num_query_blocks = c.num_query_blocks;
    p.num_lists = c.num_lists;
    p.num_picked = c.num_picked;
    p.num_window_blocks = c.num_window_blocks;
    p.picked = picked.data();
    p.picked_strides[0] = c.num_lists * c.num_picked;
    p.picked_strides[1] = c.num_picked;
    p.first_block = first.data();
    p.end = end.data();
    p.starts = c.has_starts ? starts.data() : nullptr;
    p.num_kv_heads = c.num_kv_heads;
    p.num_blocks = c.num_blocks;
    p.block_size = c.block_size;
    p.finite = finite.data();
    p.finite_strides[0] = c.num_kv_heads * c.num_blocks * c.block_size;
    p.finite_strides[1] = c.num_blocks * c.block_size;
    p.finite_strides[2] = c.block_size;
    p.width = c.width;
    p.indices = indices.data();
    p.count = count.data();
    for (int64_t item = 0; item < num_lists; ++item) ops.list_blocks(p, item, item + 1);

    for (int64_t item = 0; item < num_lists; ++item) {
        const int64_t row = item / c.num_lists, list = item % c.num_lists;
        const int64_t batch_row = row / c.num_query_blocks;
        const int32_t start = c.has_starts ? starts[batch_row] : 0;
        std::vector<int32_t> want;
        for (int64_t token = 0; token < std::min<int64_t>(end[row], c.num_blocks * c.block_size);
             ++token) {
            const int64_t block = token / c.block_size;
            const int32_t* chosen = picked.data() + item * c.num_picked;
            bool listed = std::count(chosen, chosen + c.num_picked, block) > 0 ||
                          (block >= first[row] && block < first[row] + c.num_window_blocks);
            for (int64_t head = 0; head < c.num_kv_heads; ++head)
                if (c.num_lists == 1 || head == list)
                    listed = listed && finite[batch_row * p.finite_strides[0] +
                                              head * p.finite_strides[1] + token];
            if (listed) want.push_back(static_cast<int32_t>(token) + start);
        }
        want.resize(std::min<size_t>(want.size(), static_cast<size_t>(c.width)));
        EXPECT(count[item] == static_cast<int32_t>(want.size()), count[item], " for ", want.size());
        for (int64_t at = 0; at < c.width; ++at)
            EXPECT(indices[item * c.width + at] ==
                       (at < count[item] ? want[static_cast<size_t>(at)] : -1),
                   "item ", item, " entry ", at);
    }
}

}  // namespace

TEST(list_blocks_equals_the_definition) {
    Random random(5);
    for (int64_t block_size : {1, 16, 128})
        for (int64_t num_lists : {1, 3})
            for (bool has_starts : {false, true})
                for (int64_t num_query_blocks : {1, 2})
                    check_case(ops,
                               {2, num_query_blocks, 3, num_lists, 11, block_size, 4, 3,
                                7 * block_size, has_starts},
                               random);
}

TEST(list_blocks_writes_no_more_than_there_is_room_for) {
    Random random(6);
    for (int64_t width : {0, 1, 40})
        check_case(ops, {1, 1, 1, 1, 9, 16, 6, 2, width, false}, random);
}

TEST(list_blocks_of_no_blocks) {
    Random random(7);
    check_case(ops, {1, 2, 2, 2, 5, 8, 0, 2, 16, true}, random);
    check_case(ops, {1, 2, 2, 2, 5, 8, 3, 0, 24, true}, random);
    check_case(ops, {1, 1, 2, 2, 5, 8, 0, 0, 8, false}, random);
}
