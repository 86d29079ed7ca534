// Which tokens a block of queries sees, competes over and always keeps. One definition for every
// kernel.
#pragma once

#include <cstdint>

#include "kvselect/host_device.h"

namespace kvselect {

// Where the recent window of a query block [begin, end) is counted from, and what its scores
// normalise over.
enum class WindowRule : int32_t {
    kDecode = 0,  // window from `end`, visible up to `end`: each query block is one decode step
    kBlockStart =
        1,  // window from `begin`, visible up to `begin`: a prefill block with a true local window
    kBlockEnd = 2,  // window from `end`, visible up to `begin`: the published TokenSelect
};

// The queries of a call: the last `seqlen_q` tokens of each row, cut into blocks.
struct QueryBlocks {
    int64_t batch;
    int64_t num_blocks;
    int64_t seqlen_q;  // queries per row; query j of row b sits at position cache_seqlens[b] -
                       // seqlen_q + j
    const int32_t*
        offsets;  // [num_blocks + 1] first query of each block, or nullptr: one block [0, seqlen_q)
    const int32_t* cache_seqlens;  // [batch] tokens stored, the queries' own included
    const int32_t* starts;  // [batch] first real token of each row (left padding), or nullptr: 0
    WindowRule rule;
    int64_t num_sink_tokens;
    int64_t num_recent_tokens;
};

// Token positions of one (row, block); always start <= sink_end <= window_start <= end, all
// clipped.
struct BlockRange {
    int64_t start;     // first real token of the row
    int64_t sink_end;  // sinks are [start, sink_end)
    int64_t
        window_start;  // candidates are [sink_end, window_start), recent tokens [window_start, end)
    int64_t visible_end;  // scores normalise over [start, visible_end)
    int64_t begin, end;   // the block's own queries
};

[[gnu::always_inline]] KVS_HOST_DEVICE inline BlockRange block_range(const QueryBlocks& blocks,
                                                                     int64_t row, int64_t block) {
    const auto clip = [](int64_t value, int64_t low, int64_t high) {
        return value < low ? low : (value > high ? high : value);
    };
    const int64_t seqlen = blocks.cache_seqlens[row];
    const int64_t first = seqlen - blocks.seqlen_q;
    BlockRange range;
    range.start = clip(blocks.starts ? blocks.starts[row] : 0, 0, seqlen);
    range.begin = first + (blocks.offsets ? blocks.offsets[block] : 0);
    range.end = first + (blocks.offsets ? blocks.offsets[block + 1] : blocks.seqlen_q);
    range.begin = clip(range.begin, range.start, seqlen);
    range.end = clip(range.end, range.begin, seqlen);
    const int64_t anchor = blocks.rule == WindowRule::kBlockStart ? range.begin : range.end;
    range.visible_end = blocks.rule == WindowRule::kDecode ? range.end : range.begin;
    range.window_start = clip(anchor - blocks.num_recent_tokens, range.start, range.end);
    range.sink_end = clip(range.start + blocks.num_sink_tokens, range.start, range.window_start);
    return range;
}

}  // namespace kvselect
