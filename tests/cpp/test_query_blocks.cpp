#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

TEST(block_range_is_ordered_and_inside_the_row_for_all_small_cases) {
    const WindowRule rules[] = {WindowRule::kDecode, WindowRule::kBlockStart,
                                WindowRule::kBlockEnd};
    for (WindowRule rule : rules)
        for (int32_t seqlen = 0; seqlen <= 6; ++seqlen)
            for (int32_t start = 0; start <= 7; ++start)
                for (int64_t seqlen_q = 0; seqlen_q <= 7; ++seqlen_q)
                    for (int64_t sinks = 0; sinks <= 3; ++sinks)
                        for (int64_t recent = 0; recent <= 3; ++recent) {
                            const int32_t middle = static_cast<int32_t>(seqlen_q / 2);
                            const int32_t offsets[] = {0, middle, static_cast<int32_t>(seqlen_q)};
                            const QueryBlocks blocks{1,      2,    seqlen_q, offsets, &seqlen,
                                                     &start, rule, sinks,    recent};
                            for (int64_t block = 0; block < 2; ++block) {
                                const BlockRange r = block_range(blocks, 0, block);
                                EXPECT(0 <= r.start && r.start <= r.sink_end &&
                                       r.sink_end <= r.window_start && r.window_start <= r.end &&
                                       r.end <= seqlen);
                                EXPECT(r.start <= r.begin && r.begin <= r.end);
                                EXPECT(r.visible_end ==
                                       (rule == WindowRule::kDecode ? r.end : r.begin));
                                EXPECT(r.sink_end - r.start <= sinks);
                            }
                        }
}

TEST(block_start_gives_the_first_query_its_whole_window) {
    const int32_t seqlen = 100, offsets[] = {0, 10, 20};
    const QueryBlocks blocks{1, 2, 20, offsets, &seqlen, nullptr, WindowRule::kBlockStart, 4, 16};
    const BlockRange second = block_range(blocks, 0, 1);
    EXPECT(second.begin == 90 && second.end == 100);
    EXPECT(second.window_start == 90 - 16);
    EXPECT(second.sink_end == 4);
}
