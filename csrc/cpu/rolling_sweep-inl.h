// rolling_sweep: scan one segment of the sketch, score the pools of the others from exact keys,
// pick from both, and refill the segment's pool.
//
// Floor   bytes = 1 / num_segments of the sketch + the keys of (num_segments - 1) * pool_width
//         members. The first is a stream, the second are random rows of head_dim elements.
// Plan    vote   one (row, kv_head) at a time, into slots [sinks | recent | scanned | pooled]:
//                logits, one softmax per query head over all of them, votes added over the heads
//         pick   one (row, list): the best of the scanned and pooled slots, exactly; the list in
//                ascending order; the segment's best into its pool
// Slots follow what is looked at, not positions: nothing here runs over the whole row. An item's
// arithmetic does not depend on the number of threads, so neither do its bits.

// Blocks that one list scans, and where their candidates' slots are. Only the first block may lose
// tokens at its beginning (to the sinks), only the last one at its end (to the window).
struct SweptBlocks {
    int32_t* index;  // ascending
    int64_t count, start, lead, tokens;

    int64_t position(int64_t slot) const {
        const int64_t at = slot + lead;
        return start + index[at / kSketchBlockTokens] * kSketchBlockTokens +
               at % kSketchBlockTokens;
    }
    // Candidates of the block that is i-th here.
    int64_t begin(int64_t i) const {
        return start + index[i] * kSketchBlockTokens + (i == 0 ? lead : 0);
    }
    int64_t end(int64_t i) const {
        return i + 1 < count ? start + (index[i] + 1) * kSketchBlockTokens
                             : begin(i) + tokens - slot(i);
    }
    int64_t slot(int64_t i) const { return i == 0 ? 0 : i * kSketchBlockTokens - lead; }
};

// The blocks of `all` in segment `segment`, or all of `plan` for segment < 0, with `index` as room.
inline SweptBlocks swept_blocks(const SweepPlan& plan, int64_t num_segments, int64_t segment,
                                int32_t* index) {
    SweptBlocks blocks{index, 0, plan.range.start, 0, 0};
    for (int64_t i = 0; i < plan.num_own && (segment < 0 || segment == plan.segment); ++i)
        index[blocks.count++] = static_cast<int32_t>(plan.own_first + i * num_segments);
    for (int64_t i = 0; i < plan.num_tail; ++i)
        if (segment < 0 || (plan.tail_first + i) % num_segments == segment)
            index[blocks.count++] = static_cast<int32_t>(plan.tail_first + i);
    if (blocks.count == 0) return blocks;
    const int64_t first = plan.range.start + index[0] * kSketchBlockTokens;
    const int64_t end = plan.range.start + (index[blocks.count - 1] + 1) * kSketchBlockTokens;
    if (first < plan.range.sink_end) blocks.lead = plan.range.sink_end - first;
    blocks.tokens = blocks.count * kSketchBlockTokens - blocks.lead;
    if (end > plan.range.window_start) blocks.tokens -= end - plan.range.window_start;
    return blocks;
}

// Members of the other segments' pools that are candidates of no scanned block. Stretch by stretch
// of the row: pools of all segments lie in the same pages, and a page that was just used costs less
// than another.
inline int64_t pooled_positions(const RollingSweepParams& p, const SweepPlan& plan, int64_t at,
                                int32_t* out) {
    if (plan.all) return 0;
    constexpr int64_t kStretch = 1024;  // tokens
    int64_t next[kMaxSegments], count = 0;
    for (int64_t s = 0; s < p.num_segments; ++s) next[s] = 0;
    for (int64_t begin = plan.range.sink_end; begin < plan.tail_begin; begin += kStretch) {
        const int64_t end = begin + kStretch < plan.tail_begin ? begin + kStretch : plan.tail_begin;
        for (int64_t s = 0; s < p.num_segments; ++s) {
            if (s == plan.segment) continue;
            const int32_t* members = p.pool + (at * p.num_segments + s) * p.pool_width;
            const int64_t length = p.pool_length[at * p.num_segments + s];
            int64_t i = next[s];
            for (; i < length && members[i] < end; ++i)
                if (members[i] >= begin) out[count++] = members[i];
            next[s] = i;
        }
    }
    return count;
}

struct SweepItem {
    int64_t row, kv_head;
    SweepPlan plan;
    SweptBlocks scanned;
    const int32_t* pooled;
    int64_t num_pooled;
    int64_t num_always, seen;  // slots of sinks and recent tokens; all slots
    int64_t num_columns;       // columns with a finite query
    const float* q;            // their queries, [num_columns, head_dim]
    const float* q_local;
    float scale;    // of logits in units of ln 2
    float* logits;  // [num_columns, stride]
    int64_t stride;
    float* peak;   // [num_columns] maximum logit
    float* total;  // [num_columns] sum of 2^(logit - peak), then what a weight is a share by
    float* sink;   // [num_columns] sink logit of the column's head
};

// Logits of tokens [begin, end) from their keys, into slots from `out` on.
template <typename T>
[[gnu::noinline]] void sweep_key_logits(const RollingSweepParams& p, const SweepItem& s,
                                        const float* q, int64_t begin, int64_t end,
                                        const RopeView* rope, int64_t shift, float* out) {
    if (begin >= end) return;
    logits_from_keys<T>(p.keys, s.row, s.kv_head, begin, end, end, q, s.num_columns, p.head_dim,
                        s.scale, rope, shift, out, s.stride);
}

template <typename T, SketchFormat kFormat>
inline void scan_sketch(const RollingSweepParams& p, const SweepItem& s, float* out) {
    const int64_t seqlen = p.blocks.cache_seqlens[s.row];
    for (int64_t i = 0; i < s.scanned.count; ++i) {
        const int64_t first = s.scanned.start + s.scanned.index[i] * kSketchBlockTokens;
        const int64_t begin = s.scanned.begin(i), end = s.scanned.end(i);
        float* slots = out + s.scanned.slot(i);
        const uint8_t* record = first + kSketchBlockTokens <= seqlen
                                    ? p.sketch.block(s.row, s.kv_head, s.scanned.index[i])
                                    : nullptr;
        if (!record || !has_codes(record)) {  // unfinished, or holding what is not finite
            sweep_key_logits<T>(p, s, s.q, begin, end, nullptr, 0, slots);
            continue;
        }
        int64_t ahead = kSketchAhead;
        if (i + 1 < s.scanned.count) {  // its steps; the codes follow during the scan
            const uint8_t* next = p.sketch.block(s.row, s.kv_head, s.scanned.index[i + 1]);
            for (int64_t at = 0; at < 4 * p.head_dim; at += 64) prefetch(next + at);
            ahead = next - record;
        }
        logits_from_block<kFormat>(record, begin - first, end - first, s.q, s.num_columns,
                                   p.head_dim, s.scale, slots, s.stride, ahead);
    }
}

// Neighbouring blocks in one go: the tail, or all of them.
template <typename T>
inline void scan_keys(const RollingSweepParams& p, const SweepItem& s, float* out) {
    for (int64_t i = 0, next; i < s.scanned.count; i = next) {
        for (next = i + 1;
             next < s.scanned.count && s.scanned.index[next] == s.scanned.index[next - 1] + 1;)
            ++next;
        sweep_key_logits<T>(p, s, s.q, s.scanned.begin(i), s.scanned.end(next - 1), nullptr, 0,
                            out + s.scanned.slot(i));
    }
}

// Pool members: exact keys, row by row; the rows half a tile ahead are on their way. Into L2 and a
// whole tile ahead took 10 % less at 28,000 members per head, and 25 % more at 3,600.
template <typename T>
inline void score_pooled(const RollingSweepParams& p, const SweepItem& s, float* out) {
    constexpr int64_t kAhead = kTileTokens / 2;
    const T* rows[kTileTokens + kAhead];
    const T* base = static_cast<const T*>(p.keys.data) + p.keys.offset(s.row, 0, s.kv_head);
    [[maybe_unused]] bool bfloat16_products = false;
#if KVS_HAS_BF16_DOT
    alignas(64) BFloat16 columns[kMaxBf16Group * kMaxHeadDim];
    if constexpr (std::is_same_v<T, BFloat16>) {
        bfloat16_products = p.head_dim % 32 == 0 && s.num_columns <= kMaxBf16Group;
        for (int64_t i = 0; bfloat16_products && i < s.num_columns * p.head_dim; ++i)
            bfloat16_products = (element::bits_of(s.q[i]) & 0xffffu) == 0;
        for (int64_t c = 0; bfloat16_products && c < s.num_columns; ++c)
            for (int64_t d = 0; d < p.head_dim; d += kLanes)
                store(columns + c * kMaxHeadDim + d, load(s.q + c * p.head_dim + d));
    }
#endif
    int64_t known = 0;  // rows whose place was looked up for the tile before
    for (int64_t first = 0; first < s.num_pooled; first += kTileTokens) {
        const int64_t left = s.num_pooled - first;
        const int64_t tokens = left < kTileTokens ? left : kTileTokens;
        const int64_t needed = left < kTileTokens + kAhead ? left : kTileTokens + kAhead;
        for (int64_t i = 0; i < known; ++i) rows[i] = rows[kTileTokens + i];
        for (int64_t i = known; i < needed; ++i) {
            const int64_t position = s.pooled[first + i];
            rows[i] = p.keys.block_table ? key_row<T>(p.keys, s.row, position, s.kv_head)
                                         : base + position * p.keys.token_stride;
        }
        known = needed > kTileTokens ? needed - kTileTokens : 0;
        const Upcoming upcoming{as_bytes(rows + kAhead), needed > kAhead ? needed - kAhead : 0,
                                p.head_dim * int64_t{sizeof(T)}};
#if KVS_HAS_BF16_DOT
        if constexpr (std::is_same_v<T, BFloat16>) {
            if (bfloat16_products) {
                dot_rows_bf16(rows, tokens, columns, s.num_columns, p.head_dim, s.scale, upcoming,
                              out + first, s.stride);
                continue;
            }
        }
#endif
        dot_rows(rows, tokens, s.q, p.head_dim, s.num_columns, p.head_dim, s.scale, upcoming,
                 out + first, s.stride);
    }
}

template <typename T>
inline void fill_sweep_logits(const RollingSweepParams& p, const SweepItem& s) {
    const BlockRange& r = s.plan.range;
    const RopeView* rope = p.rope.cos ? &p.rope : nullptr;
    const int64_t num_sinks = r.sink_end - r.start, num_candidates = r.window_start - r.sink_end;
    // The rank of the window is that of a full list, as the caller's q_local has it.
    const int64_t picked = p.keep < num_candidates ? p.keep : num_candidates;
    sweep_key_logits<T>(p, s, s.q_local, r.start, r.sink_end, rope, -r.start, s.logits);
    sweep_key_logits<T>(p, s, s.q_local, r.window_start, r.end, rope,
                        num_sinks + picked - r.window_start, s.logits + num_sinks);
    float* scanned = s.logits + s.num_always;
    if (p.sketch.data == nullptr)
        scan_keys<T>(p, s, scanned);
    else if (p.sketch.format == SketchFormat::kInt4)
        scan_sketch<T, SketchFormat::kInt4>(p, s, scanned);
    else
        scan_sketch<T, SketchFormat::kInt8>(p, s, scanned);
    score_pooled<T>(p, s, scanned + s.scanned.tokens);
    for (int64_t c = 0; c < s.num_columns; ++c)
        cap_logits(s.logits + c * s.stride, s.seen, p.softcap);
}

// Marks a slot NaN where a finite query met a logit that is not; such a token weighs nothing.
inline int64_t drop_nonfinite_slots(const SweepItem& s, float* votes) {
    int64_t dropped = 0;
    for (int64_t i = 0; i < s.seen; ++i) {
        bool finite = true;
        for (int64_t c = 0; c < s.num_columns; ++c)
            finite = finite && element::is_finite(s.logits[c * s.stride + i]);
        if (finite) continue;
        ++dropped;
        votes[i] = NAN;
        for (int64_t c = 0; c < s.num_columns; ++c) s.logits[c * s.stride + i] = -INFINITY;
    }
    return dropped;
}

// Logits to 2^(logit - maximum) in place, column by column. False if one was not finite.
inline bool weigh_slots(const SweepItem& s) {
    bool finite = true;
    for (int64_t c = 0; c < s.num_columns; ++c) {
        float lowest;
        float* column = s.logits + c * s.stride;
        s.peak[c] = exp2_of(column, s.seen, column, s.total + c, &lowest);
        finite = finite && element::is_finite(s.total[c]) && lowest != -INFINITY;
    }
    return finite;
}

// votes[i] += sum over columns of weight * inverse total; a NaN mark stays.
template <int kCols>
inline void add_votes(const SweepItem& s, int64_t column, float* votes) {
    const float* weights = s.logits + column * s.stride;
    const float* inverse = s.total + column;
    const int64_t whole = s.seen / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        F32 sum = load(votes + i);
#pragma GCC unroll 4
        for (int c = 0; c < kCols; ++c)
            sum = fma(load(weights + c * s.stride + i), broadcast(inverse[c]), sum);
        store(votes + i, sum);
    }
    for (int64_t i = whole; i < s.seen; ++i)
        for (int c = 0; c < kCols; ++c) votes[i] += weights[c * s.stride + i] * inverse[c];
}

template <typename T>
void sweep_votes(const RollingSweepParams& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t group = p.num_q_heads / p.num_kv_heads;
    for (int64_t item = begin; item < end; ++item) {
        SweepItem s;
        s.kv_head = item % p.num_kv_heads;
        s.row = item / p.num_kv_heads;
        const int64_t list = p.num_lists == 1 ? 0 : s.kv_head, at = s.row * p.num_lists + list;
        p.num_nonfinite[item] = 0;
        if (p.hit && p.hit[at]) continue;
        s.plan = sweep_plan(p, s.row, list);
        const BlockRange& r = s.plan.range;
        float* q = scratch;
        float* q_local = q + group * p.head_dim;
        s.peak = q_local + group * p.head_dim;
        s.total = s.peak + group;
        s.sink = s.total + group;
        s.logits = s.sink + group;
        s.stride = p.room;
        s.scale = p.scale * kLog2E;
        int32_t* pooled = reinterpret_cast<int32_t*>(s.logits + group * s.stride);
        s.q = q, s.q_local = p.q_local ? q_local : q, s.pooled = pooled;
        s.scanned = swept_blocks(s.plan, p.num_segments, -1, pooled + p.room);
        s.num_pooled = pooled_positions(p, s.plan, at, pooled);
        s.num_always = (r.sink_end - r.start) + (r.end - r.window_start);
        s.seen = s.num_always + s.scanned.tokens + s.num_pooled;

        // Gather the finite queries; a query vector with NaN or inf has no vote.
        const bool has_sinks = p.sink_logits && !p.normalise_candidates_only;
        s.num_columns = 0;
        for (int64_t h = 0; h < group; ++h) {
            const int64_t from = (s.row * p.num_q_heads + s.kv_head * group + h) * p.head_dim;
            if (!all_finite(p.q + from, p.head_dim) ||
                (p.q_local && !all_finite(p.q_local + from, p.head_dim))) {
                ++p.num_nonfinite[item];
                continue;
            }
            const size_t bytes = sizeof(float) * static_cast<size_t>(p.head_dim);
            std::memcpy(q + s.num_columns * p.head_dim, p.q + from, bytes);
            if (p.q_local)
                std::memcpy(q_local + s.num_columns * p.head_dim, p.q_local + from, bytes);
            s.sink[s.num_columns] = has_sinks ? p.sink_logits[s.kv_head * group + h] : -INFINITY;
            ++s.num_columns;
        }

        float* votes = p.votes + item * p.room;
        std::memset(votes, 0, sizeof(float) * static_cast<size_t>(s.seen));
        fill_sweep_logits<T>(p, s);
        if (p.normalise_candidates_only) {
            p.num_nonfinite[item] += drop_nonfinite_slots(s, votes);
            for (int64_t c = 0; c < s.num_columns; ++c)  // sinks and recent tokens weigh nothing
                for (int64_t i = 0; i < s.num_always; ++i) s.logits[c * s.stride + i] = -INFINITY;
            weigh_slots(s);
        } else if (!weigh_slots(s)) {  // only then are the logits made again and looked at
            fill_sweep_logits<T>(p, s);
            p.num_nonfinite[item] += drop_nonfinite_slots(s, votes);
            weigh_slots(s);
        }
        for (int64_t c = 0; c < s.num_columns; ++c) {
            if (!(s.total[c] > 0.f)) {
                s.total[c] = 0.f;
                continue;
            }
            const float sum = s.peak[c] + std::log2(s.total[c]);
            const float share = has_sinks ? exp2(sum - with_sink(sum, s.sink[c])) : 1.f;
            s.total[c] = share / s.total[c];
        }
        int64_t c = 0;
        for (; c + 4 <= s.num_columns; c += 4) add_votes<4>(s, c, votes);
        for (; c < s.num_columns; ++c) add_votes<1>(s, c, votes);
    }
}

// Ascending order of positions below `limit`; least significant digit first.
inline void sort_positions(int32_t* values, int64_t count, int64_t limit, int32_t* spare) {
    constexpr int kDigit = 11;
    int32_t *from = values, *to = spare;
    for (int shift = 0; shift < 31 && limit >> shift > 0; shift += kDigit) {
        int32_t at[1 << kDigit] = {};
        for (int64_t i = 0; i < count; ++i) ++at[from[i] >> shift & ((1 << kDigit) - 1)];
        for (int32_t digit = 0, sum = 0; digit < 1 << kDigit; ++digit) {
            const int32_t own = at[digit];
            at[digit] = sum;
            sum += own;
        }
        for (int64_t i = 0; i < count; ++i)
            to[at[from[i] >> shift & ((1 << kDigit) - 1)]++] = from[i];
        int32_t* other = from;
        from = to, to = other;
    }
    if (from != values) std::memcpy(values, from, sizeof(int32_t) * static_cast<size_t>(count));
}

// A vote that at least `keep` slots reach, or 0: from the maxima of small strided groups.
inline float votes_bound(const float* votes, int64_t count, int64_t keep) {
    constexpr int64_t kMaxGroups = 1024;
    const int64_t run = count / (2 * keep);  // slots per maximum
    if (run < 2) return 0.f;
    const int64_t vectors = count / kLanes;
    int64_t per_group = run;
    if (vectors / per_group > kMaxGroups) per_group = (vectors + kMaxGroups - 1) / kMaxGroups;
    const int64_t groups = vectors / per_group;
    if (groups * kLanes < keep) return 0.f;
    float maxima[kMaxGroups * kLanes];
    for (int64_t g = 0; g < groups; ++g) {
        F32 top = broadcast(0.f);  // NaN loses against it
        for (int64_t v = 0; v < per_group; ++v)
            top = max(load(votes + (g * per_group + v) * kLanes), top);
        store(maxima + g * kLanes, top);
    }
    int32_t histogram[2048] = {};  // by sign, exponent and the first bits: votes are not negative
    for (int64_t i = 0; i < groups * kLanes; ++i) ++histogram[element::bits_of(maxima[i]) >> 20];
    int64_t above = 0;
    for (int64_t bin = 2047; bin > 0; --bin) {
        above += histogram[bin];
        if (above >= keep) return element::float_of(static_cast<uint32_t>(bin) << 20);
    }
    return 0.f;
}

struct SweepRoom {  // room for every slot that could compete: nothing is truncated
    int32_t* slots;
    uint32_t* keys;
    int32_t *positions, *ties;
};

// Positions of the `keep` best slots by (votes descending, position ascending), in ascending order,
// in room.positions; their number. NaN never competes. Adds their votes to `kept`.
template <typename Position>
inline int64_t best_positions(const float* votes, int64_t count, int64_t keep, int64_t limit,
                              bool slots_ascend, Position position_of, const SweepRoom& room,
                              double* kept) {
    if (keep <= 0) return 0;
    const float bound = count > keep ? votes_bound(votes, count, keep) : 0.f;
    int64_t packed = 0;
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        packed += pack_positions(room.slots + packed, static_cast<int32_t>(i),
                                 mask_ge(load(votes + i), broadcast(bound)));
    for (int64_t i = whole; i < count; ++i)
        if (votes[i] >= bound) room.slots[packed++] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < packed; ++i) room.keys[i] = element::bits_of(votes[room.slots[i]]);

    // The border: keys above it are kept, and `ties` of those equal to it.
    uint32_t border = 0, known = 0;
    int64_t ties = keep < packed ? keep : packed;
    constexpr int kShift[3] = {21, 10, 0};
    constexpr uint32_t kMask[3] = {2047u, 2047u, 1023u};
    for (int round = 0; round < 3 && packed > keep; ++round) {
        int32_t histogram[2048] = {};
        for (int64_t i = 0; i < packed; ++i)
            if ((room.keys[i] & known) == border)
                ++histogram[room.keys[i] >> kShift[round] & kMask[round]];
        int64_t bin = kMask[round];
        while (histogram[bin] < ties) ties -= histogram[bin--];
        border |= static_cast<uint32_t>(bin) << kShift[round];
        known |= kMask[round] << kShift[round];
    }
    // Slots that ascend meet the ties in order of position; else they are put aside and sorted.
    int64_t found = 0, tied = 0;
    for (int64_t i = 0; i < packed; ++i) {
        const bool above = packed <= keep || room.keys[i] > border;
        if (!above && (room.keys[i] < border || (slots_ascend && tied == ties))) continue;
        const int32_t position = static_cast<int32_t>(position_of(room.slots[i]));
        if (above || slots_ascend) {
            room.positions[found++] = position;
            *kept += element::float_of(room.keys[i]);
            tied += !above;
        } else {
            room.ties[tied++] = position;
        }
    }
    if (slots_ascend) return found;
    int32_t* spare = reinterpret_cast<int32_t*>(room.keys);  // not needed any more
    if (packed > keep) {
        if (tied > ties) sort_positions(room.ties, tied, limit, spare);
        std::memcpy(room.positions + found, room.ties, sizeof(int32_t) * static_cast<size_t>(ties));
        found += ties;
        *kept += static_cast<double>(ties) * element::float_of(border);
    }
    sort_positions(room.positions, found, limit, spare);
    return found;
}

// The pool of `segment` becomes the best of its scanned candidates.
inline void refill_pool(const RollingSweepParams& p, const SweepPlan& plan, int64_t at,
                        int64_t segment, const SweptBlocks& scanned, const float* votes,
                        float* own_votes, int32_t* own_index, const SweepRoom& room) {
    const SweptBlocks own = swept_blocks(plan, p.num_segments, segment, own_index);
    for (int64_t i = 0, j = 0; i < own.count; ++i) {
        while (scanned.index[j] != own.index[i]) ++j;
        std::memcpy(own_votes + own.slot(i), votes + scanned.slot(j),
                    sizeof(float) * static_cast<size_t>(own.end(i) - own.begin(i)));
    }
    double kept = 0.0;
    const int64_t length = best_positions(
        own_votes, own.tokens, p.pool_width, plan.range.end, true,
        [&](int64_t slot) { return own.position(slot); }, room, &kept);
    const int64_t pool = at * p.num_segments + segment;
    std::memcpy(p.pool + pool * p.pool_width, room.positions,
                sizeof(int32_t) * static_cast<size_t>(length));
    p.pool_length[pool] = static_cast<int32_t>(length);
    p.scanned_to[pool] = static_cast<int32_t>(plan.range.window_start);
}

inline void sweep_lists(const RollingSweepParams& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t at = begin; at < end; ++at) {
        const int64_t row = at / p.num_lists, list = at % p.num_lists;
        int32_t* indices = p.indices + at * p.width;
        int32_t* num_seen = p.num_seen + at * 2;
        if (p.hit && p.hit[at]) {
            indices[p.topk_length[at]++] =
                static_cast<int32_t>(block_range(p.blocks, row, 0).end - 1);
            p.kept_score[at] = NAN;
            num_seen[0] = num_seen[1] = 0;
            continue;
        }
        const SweepPlan plan = sweep_plan(p, row, list);
        const BlockRange& r = plan.range;
        float* sum = scratch;
        float* own_votes = sum + p.room;
        int32_t* pooled = reinterpret_cast<int32_t*>(own_votes + p.room);
        const SweepRoom room{pooled + p.room, reinterpret_cast<uint32_t*>(pooled + 2 * p.room),
                             pooled + 3 * p.room, pooled + 4 * p.room};
        int32_t* index = pooled + 5 * p.room;
        int32_t* own_index = pooled + 6 * p.room;
        const SweptBlocks scanned = swept_blocks(plan, p.num_segments, -1, index);
        const int64_t num_pooled = pooled_positions(p, plan, at, pooled);
        const int64_t num_sinks = r.sink_end - r.start, num_recent = r.end - r.window_start;
        const int64_t num_always = num_sinks + num_recent;
        const int64_t seen = num_always + scanned.tokens + num_pooled;

        const float* votes = p.votes + (row * p.num_kv_heads + list) * p.room;
        if (p.num_lists < p.num_kv_heads) {  // all heads vote on one list
            std::memcpy(sum, votes, sizeof(float) * static_cast<size_t>(seen));
            for (int64_t g = 1; g < p.num_kv_heads; ++g)  // whole vectors: there is room
                for (int64_t i = 0; i < seen; i += kLanes)
                    store(sum + i, add(load(sum + i), load(votes + g * p.room + i)));
            votes = sum;
        }
        double kept = 0.0;
        int64_t length = 0;
        const auto write_always = [&](int64_t first_slot, int64_t first, int64_t count) {
            for (int64_t i = 0; i < count; ++i) {
                const float vote = votes[first_slot + i];
                if (!element::is_finite(vote)) continue;
                indices[length++] = static_cast<int32_t>(first + i);
                kept += vote;
            }
        };
        const float* candidates = votes + num_always;
        write_always(0, r.start, num_sinks);
        const int64_t picked = best_positions(
            candidates, scanned.tokens + num_pooled, p.keep, r.end, num_pooled == 0,
            [&](int64_t slot) {
                return slot < scanned.tokens ? scanned.position(slot)
                                             : int64_t{pooled[slot - scanned.tokens]};
            },
            room, &kept);
        std::memcpy(indices + length, room.positions,
                    sizeof(int32_t) * static_cast<size_t>(picked));
        length += picked;
        write_always(num_sinks, r.window_start, num_recent);
        p.topk_length[at] = static_cast<int32_t>(length);
        p.kept_score[at] = static_cast<float>(kept);
        for (int64_t i = length; i < p.width; ++i) indices[i] = -1;
        num_seen[0] = static_cast<int32_t>(num_always + scanned.tokens);
        num_seen[1] = static_cast<int32_t>(num_pooled);

        // Nobody voted (no finite query): the pools keep what they knew.
        bool voted = false;
        for (int64_t i = 0; i < seen && !voted; ++i) voted = votes[i] > 0.f;
        if (!voted || (p.scan_all && p.scan_all[at])) continue;
        if (!plan.all) {
            refill_pool(p, plan, at, plan.segment, scanned, candidates, own_votes, own_index, room);
            p.next_segment[at] = static_cast<int32_t>((plan.segment + 1) % p.num_segments);
            continue;
        }
        for (int64_t s = 0; s < p.num_segments; ++s)
            refill_pool(p, plan, at, s, scanned, candidates, own_votes, own_index, room);
        p.next_segment[at] = 0;
    }
}

void rolling_sweep(const RollingSweepParams& p, SweepStage stage, int64_t begin, int64_t end,
                   float* scratch) {
    if (stage == SweepStage::kPick) return sweep_lists(p, begin, end, scratch);
    switch (p.dtype) {
        case DType::kFloat32:
            return sweep_votes<float>(p, begin, end, scratch);
        case DType::kFloat16:
            return sweep_votes<Float16>(p, begin, end, scratch);
        case DType::kBFloat16:
            return sweep_votes<BFloat16>(p, begin, end, scratch);
    }
}
