// rolling_sweep: a decode step's lists from a part of the keys: the blocks of one segment, scanned,
// and pools of the tokens that mattered when the other segments were scanned, scored anew.
//
// Segment of a logical 128-token block (counted from the row's first real token): block %
// num_segments. A list's step p scans segment p % num_segments with the query at hand, puts its
// best pool_width tokens into that segment's pool, and picks from the scanned tokens and the
// members of all other pools.
#pragma once

#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/rope.h"
#include "kvselect/sketch.h"

namespace kvselect {

constexpr int64_t kMaxSegments = 64;

struct RollingSweepParams {
    DType dtype;  // of the keys
    int64_t num_q_heads, num_kv_heads, head_dim;
    QueryBlocks blocks;  // one query per row, rule kDecode
    int64_t num_lists;   // num_kv_heads; 1: one list per row, by the votes of all heads together
    // Both [batch, num_q_heads, head_dim] float32, contiguous.
    const float* q;        // meets the candidates
    const float* q_local;  // meets sinks and recent tokens; nullptr: q
    KVView keys;
    SketchView sketch;  // data == nullptr: scanned from the keys; pool members always are
    RopeView rope;      // as in score_tokens.h
    int64_t keep;       // candidates to pick, by (votes descending, position ascending)
    float scale;
    float softcap;  // logits become softcap * tanh(logit / softcap); 0: they stay as they are
    const float* sink_logits;  // as in score_tokens.h
    bool normalise_candidates_only;
    const int32_t* hit;       // [batch, num_lists] non-zero: only append the newest token to the
                              // list, and leave its state alone; or nullptr
    const int32_t* scan_all;  // [batch, num_lists] non-zero: scan every candidate, and leave the
                              // list's state alone; or nullptr

    // State of each list, changed. scanned_to of 0 everywhere makes the next step scan everything
    // and fill all pools.
    int64_t num_segments, pool_width;
    int32_t* pool;          // [batch, num_lists, num_segments, pool_width] ascending positions
    int32_t* pool_length;   // [batch, num_lists, num_segments]
    int32_t* scanned_to;    // [batch, num_lists, num_segments] candidates of this segment below
                            // this position competed for its pool
    int32_t* next_segment;  // [batch, num_lists]

    // Outputs. Votes are shares of the attention that falls on what was seen.
    int64_t width;         // entries per list; the caller makes it large enough
    int32_t* indices;      // [batch, num_lists, width] ascending positions, -1 pads
    int32_t* topk_length;  // [batch, num_lists]
    float* kept_score;     // [batch, num_lists] sum of the votes of all listed tokens; NaN on a hit
    int32_t* num_seen;     // [batch, num_lists, 2] tokens scanned (sinks and recent ones included)
                           // and pool members scored; 0 on a hit
    int64_t* num_nonfinite;  // [batch, num_kv_heads] tokens seen and query vectors not finite

    float* votes;  // [batch, num_kv_heads, room] what the first stage leaves to the second
    int64_t room;
};

// Which tokens one list looks at.
struct SweepPlan {
    BlockRange range;
    int64_t segment;               // scanned at this step
    int64_t tail_begin;            // candidates from here on are scanned whatever their segment
    bool all;                      // that is every candidate
    int64_t own_first, num_own;    // blocks own_first + i * num_segments of the segment, before the
                                   // tail
    int64_t tail_first, num_tail;  // blocks of the tail, one after another
    int64_t num_pooled;            // members of the other segments' pools, at most

    [[gnu::always_inline]] int64_t most_seen() const {
        return (range.sink_end - range.start) + (range.end - range.window_start) +
               (num_own + num_tail) * kSketchBlockTokens + num_pooled;
    }
};

// No candidate is lost between two scans of its segment, however many tokens the window lets go in
// between. A candidate t of segment s either lay below scanned_to[s] when s was scanned last, and
// then competed for the pool; or t >= scanned_to[s] >= min(scanned_to), and then it is in the tail,
// which begins at the block of that minimum. Without hits a step moves the window by one token, and
// scanned_to holds the window starts of the last num_segments <= 64 steps: the tail is part of the
// newest two blocks. Each hit in between adds one token to it.
[[gnu::always_inline]] inline SweepPlan sweep_plan(const RollingSweepParams& p, int64_t row,
                                                   int64_t list) {
    SweepPlan plan;
    plan.range = block_range(p.blocks, row, 0);
    const BlockRange& r = plan.range;
    const int64_t at = row * p.num_lists + list;
    int64_t seen_to = r.window_start;
    for (int64_t s = 0; s < p.num_segments; ++s) {
        const int64_t to = p.scanned_to[at * p.num_segments + s];
        seen_to = to < seen_to ? to : seen_to;
    }
    if (seen_to < r.sink_end || (p.scan_all && p.scan_all[at])) seen_to = r.sink_end;
    const int64_t first = (r.sink_end - r.start) / kSketchBlockTokens;
    const int64_t last = (r.window_start - r.start + kSketchBlockTokens - 1) / kSketchBlockTokens;
    plan.tail_first = (seen_to - r.start) / kSketchBlockTokens;
    plan.tail_begin = r.start + plan.tail_first * kSketchBlockTokens;
    plan.all = plan.tail_begin <= r.sink_end;
    if (plan.all) plan.tail_begin = r.sink_end;
    plan.num_tail = r.window_start > plan.tail_begin ? last - plan.tail_first : 0;

    plan.segment = p.next_segment[at];
    const int64_t ahead = (plan.segment - first % p.num_segments + p.num_segments) % p.num_segments;
    plan.own_first = first + ahead;
    plan.num_own = plan.tail_first > plan.own_first
                       ? (plan.tail_first - plan.own_first - 1) / p.num_segments + 1
                       : 0;
    plan.num_pooled = 0;
    for (int64_t s = 0; s < p.num_segments && !plan.all; ++s)
        if (s != plan.segment) plan.num_pooled += p.pool_length[at * p.num_segments + s];
    return plan;
}

// Two stages, the second after all of the first: votes, by (row, kv_head), then lists and pools, by
// (row, list).
enum class SweepStage { kVote, kPick };

inline int64_t rolling_sweep_items(const RollingSweepParams& p, SweepStage stage) {
    return p.blocks.batch * (stage == SweepStage::kVote ? p.num_kv_heads : p.num_lists);
}
// Votes per (row, kv_head): set `room` to it. Vector stores may pass a list's last slot.
inline int64_t rolling_sweep_room(const RollingSweepParams& p) {
    int64_t room = 0;
    for (int64_t row = 0; row < p.blocks.batch; ++row)
        for (int64_t list = 0; list < p.num_lists; ++list) {
            if (p.hit && p.hit[row * p.num_lists + list]) continue;
            const int64_t seen = sweep_plan(p, row, list).most_seen();
            room = seen > room ? seen : room;
        }
    return (room + 15) / 16 * 16 + 16;
}
// Scratch per worker, in floats.
inline int64_t rolling_sweep_scratch_floats(const RollingSweepParams& p) {
    const int64_t columns = p.num_q_heads / p.num_kv_heads;
    const int64_t vote = columns * (p.room + 2 * p.head_dim + 3) + 2 * p.room;
    const int64_t pick = 9 * p.room;
    return vote > pick ? vote : pick;
}
using RollingSweepFn = void (*)(const RollingSweepParams&, SweepStage stage, int64_t begin,
                                int64_t end, float* scratch);

}  // namespace kvselect
