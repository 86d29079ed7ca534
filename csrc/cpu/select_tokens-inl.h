// select_tokens: exact top-k by counting, written out in position order. No sort, and no buffer
// that could overflow: the one for candidates has room for every token, so 16,385 ties at the
// border cost time, never tokens.
//
// Problem    the `keep` best of `count` scores by (score descending, position ascending), ascending
// Floor      4 bytes per candidate read once: 0.13 ms for 8 lists of 128K from memory at 30 GB/s
// Plan       1. maxima of about 2 * keep interleaved subsets; a value that `keep` of them reach is
// a
//               lower bound of the border. The only pass that memory feeds: one max per 16 scores
//            2. pack the positions of what reaches the bound, in order, without branches (a list
//               of 128K is in L2 by then): at best about 1.4 * keep, at worst all
//            3. bisect the border between the packed values, on their bits, by counting how many
//               reach the middle; done as soon as exactly `keep` do, else at the last bit, which
//               leaves the number of ties to keep
//            4. pack what reaches the border; sum the scores of the list in eight fixed chains

constexpr int64_t kAllTies = INT64_MAX;
constexpr float kLargest = 0x1.fffffep127f;

// Order-preserving map of floats that are not NaN to unsigned integers, and back; -0 and 0 are
// equal.
inline uint32_t order_key(float value) {
    const uint32_t bits = element::bits_of(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float value_of_key(uint32_t key) {
    return element::float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The border of a top-k: entries above `value` are kept, and the first `ties` of those equal to it.
struct Border {
    float value;
    int64_t ties;
};

// Tokens in the running for one list, ascending by position.
struct Candidates {
    int32_t* index;
    float* value;
    int64_t count;
};

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes; }

// NaN, which reaches nothing, behind the last of `count` entries, up to a whole vector.
inline void pad(float* values, int64_t count) {
    for (int64_t i = count; i < whole_vectors(count) * kLanes; ++i) values[i] = NAN;
}

// How many entries of padded `values` reach `bound`.
inline int64_t count_at_least(const float* values, int64_t count, float bound) {
    constexpr int64_t kStep = 4 * kLanes;
    const F32 threshold = broadcast(bound);
    const int64_t end = whole_vectors(count) * kLanes;
    I32 reached[4] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
    int64_t i = 0;
    for (; i + kStep <= end; i += kStep)
        for (int j = 0; j < 4; ++j)
            reached[j] = count_ge(reached[j], load(values + i + j * kLanes), threshold);
    for (; i < end; i += kLanes) reached[0] = count_ge(reached[0], load(values + i), threshold);
    return reduce_add(reached[0]) + reduce_add(reached[1]) + reduce_add(reached[2]) +
           reduce_add(reached[3]);
}

// The border of the `keep` best of padded `values`, none of them NaN; if no more than
// keep + slack reach a value that `keep` reach, that one will do.
inline Border find_border(const float* values, int64_t count, int64_t keep, int64_t slack) {
    if (count <= keep + slack) return {-INFINITY, kAllTies};
    F32 least = broadcast(INFINITY), greatest = broadcast(-INFINITY);
    for (int64_t i = 0; i < whole_vectors(count) * kLanes; i += kLanes) {
        least = min(load(values + i), least);
        greatest = max(load(values + i), greatest);
    }
    // At least `keep` entries reach `low`; `above` of them, fewer than `keep`, reach `high`.
    uint32_t low = order_key(-reduce_max(sub(broadcast(0.f), least)));
    uint32_t high = order_key(reduce_max(greatest)) + 1;
    int64_t above = 0;
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        const int64_t reached = count_at_least(values, count, value_of_key(middle));
        if (reached < keep) {
            high = middle, above = reached;
            continue;
        }
        low = middle;
        if (reached <= keep + slack) return {value_of_key(low), kAllTies};
    }
    return {value_of_key(low), keep - above};
}

// A value that at least `keep` finite entries reach, or -inf. Entry i counts for maximum
// i % (columns * kLanes): neighbours, which tend to be large together, go to different maxima.
inline float lower_bound_of_kept(const float* values, int64_t count, int64_t keep, float* maxima) {
    // At least eight vectors, so that a maximum is stored well before it is loaded again.
    const int64_t columns = whole_vectors(2 * keep) > 8 ? whole_vectors(2 * keep) : 8;
    const int64_t row = columns * kLanes;
    if (count < 4 * row) return -INFINITY;
    const F32 none = broadcast(-INFINITY);  // the second operand wins against NaN
    for (int64_t i = 0; i < row; i += kLanes)
        store(maxima + i, max(load(values + i), max(load(values + row + i), none)));
    int64_t begin = 2 * row;
    for (; begin + 2 * row <= count; begin += 2 * row)
        for (int64_t i = begin; i < begin + row; i += kLanes) {
            float* to = maxima + (i - begin);
            store(to, max(load(values + i), max(load(values + row + i), load(to))));
        }
    for (int64_t i = 0; begin + i + kLanes <= count; i += kLanes) {
        float* to = maxima + i % row;
        store(to, max(load(values + begin + i), load(to)));
    }
    for (int64_t i = 0; i < row;
         i += kLanes) {  // +inf - inf is NaN: such a maximum counts for none
        const F32 top = load(maxima + i);
        store(maxima + i, max(add(top, sub(top, top)), broadcast(-INFINITY)));
    }
    return find_border(maxima, row, keep, keep / 16).value;
}

// Packs the finite entries of values[0, count) that reach `bound`; pads their values.
inline void pack_at_least(const float* values, int64_t count, float bound, const float* next,
                          Candidates* out) {
    constexpr int64_t kWord = 64, kFew = 4;
    static_assert(kWord % kLanes == 0, "a word holds the masks of whole vectors");
    const float least = bound > -kLargest ? bound : -kLargest;
    const F32 threshold = broadcast(least);
    int32_t* index = out->index;
    int64_t packed = 0;
    const int64_t whole = count / kWord * kWord;
    for (int64_t i = 0; i < whole; i += kWord) {
        for (int64_t j = 0; next && j < kWord; j += 16) prefetch_far(next + i + j);
        uint64_t word = 0;
        for (int64_t j = 0; j < kWord; j += kLanes)
            word |= uint64_t{mask_ge(load(values + i + j), threshold)} << j;
        const int64_t set = __builtin_popcountll(word);
        if (set <= kFew) {  // most words, without a branch on what they hold
            int32_t* to = index + packed;
            uint64_t left = word;
            for (int64_t j = 0; j < kFew; ++j, left &= left - 1)
                to[j] = static_cast<int32_t>(i + __builtin_ctzll(left | uint64_t{1} << 63));
            packed += set;
            continue;
        }
        for (int64_t j = 0; j < kWord; j += kLanes, word >>= kLanes)
            packed += pack_positions(index + packed, static_cast<int32_t>(i + j),
                                     static_cast<uint32_t>(word & ((uint64_t{1} << kLanes) - 1)));
    }
    for (int64_t i = whole; i < count; ++i)
        if (values[i] >= least) index[packed++] = static_cast<int32_t>(i);
    bool infinite = false;
    for (int64_t j = 0; j < packed; ++j) {
        out->value[j] = values[index[j]];
        infinite |= out->value[j] > kLargest;
    }
    if (infinite) {
        int64_t finite = 0;
        for (int64_t j = 0; j < packed; ++j) {
            index[finite] = index[j];
            out->value[finite] = out->value[j];
            finite += out->value[j] <= kLargest;
        }
        packed = finite;
    }
    pad(out->value, packed);
    out->count = packed;
}

// Keeps what the border keeps: positions only, in order.
inline void keep_border(Candidates* all, Border border) {
    const F32 least = broadcast(border.value);
    int64_t kept = 0;
    for (int64_t i = 0; i < all->count; i += kLanes) {
        const F32 value = load(all->value + i);
        uint32_t mask = mask_ge(value, least);
        if (border.ties != kAllTies) {
            uint32_t equal = mask & mask_ge(least, value);
            while (__builtin_popcount(equal) > border.ties) {  // the last ones go
                const uint32_t last = 1u << (31 - __builtin_clz(equal));
                equal ^= last, mask ^= last;
            }
            border.ties -= __builtin_popcount(equal);
        }
        kept += pack_words(all->index + kept, all->index + i, mask);
    }
    all->count = kept;
}

// Maximum over |j - i| <= width / 2 inside [0, count); entries that are not finite neither count
// nor receive.
inline void pool_maximum(const float* values, int64_t count, int64_t width, float* pooled) {
    const int64_t reach = width / 2;
    for (int64_t i = 0; i < count; ++i) {
        pooled[i] = NAN;
        if (!element::is_finite(values[i])) continue;
        const int64_t first = i - reach > 0 ? i - reach : 0,
                      last = i + reach < count - 1 ? i + reach : count - 1;
        float top = values[i];
        for (int64_t j = first; j <= last; ++j)
            if (element::is_finite(values[j]) && values[j] > top) top = values[j];
        pooled[i] = top;
    }
}

struct ListWriter {
    int32_t* out;
    const float* scores;
    int64_t count;

    void write_range(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (element::is_finite(scores[i])) out[count++] = static_cast<int32_t>(i);
    }
    void write_shifted(const int32_t* positions, int64_t num, int64_t shift) {
        for (int64_t i = 0; i < num; ++i)
            out[count + i] = positions[i] + static_cast<int32_t>(shift);
        count += num;
    }
    // Eight chains, entry i in chain i % 8: the same bits for every vector width.
    float kept_score() const {
        double chain[8] = {};
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            for (int j = 0; j < 8; ++j) chain[j] += double{scores[out[i + j]]};
        for (; i < count; ++i) chain[i % 8] += double{scores[out[i]]};
        return static_cast<float>(((chain[0] + chain[4]) + (chain[2] + chain[6])) +
                                  ((chain[1] + chain[5]) + (chain[3] + chain[7])));
    }
};

inline void write_picked(const SelectTokensParams& p, const float* scores, int64_t begin,
                         int64_t end, const float* next, float* scratch, ListWriter* list) {
    const int64_t count = end - begin;
    if (count <= 0 || p.keep <= 0) return;
    if (count <= p.keep) return list->write_range(begin, end);
    const float* own = scores + begin;
    const int64_t room = select_tokens_room(p);
    Candidates all{reinterpret_cast<int32_t*>(scratch), scratch + room, 0};
    const float* ranked = own;
    if (p.pool_width > 1) {
        pool_maximum(own, count, p.pool_width, scratch + 2 * room);
        ranked = scratch + 2 * room;
    }
    pack_at_least(ranked, count, lower_bound_of_kept(ranked, count, p.keep, all.value), next, &all);
    const Border border = find_border(all.value, all.count, p.keep, 0);
    if (p.pool_width <= 1 || border.ties == kAllTies) {
        keep_border(&all, border);
        return list->write_shifted(all.index, all.count, begin);
    }
    // Pooled scores make plateaus: inside the border's plateau the token's own score decides, then
    // its position.
    float* plateau = scratch + 3 * room;
    int64_t on_plateau = 0;
    for (int64_t i = 0; i < all.count; ++i)
        if (all.value[i] == border.value) plateau[on_plateau++] = own[all.index[i]];
    pad(plateau, on_plateau);
    Border inner = find_border(plateau, on_plateau, border.ties, 0);
    int64_t kept = 0;
    for (int64_t i = 0; i < all.count; ++i) {
        if (all.value[i] < border.value) continue;
        const float score = own[all.index[i]];
        if (all.value[i] > border.value || score > inner.value ||
            (score == inner.value && inner.ties-- > 0))
            all.index[kept++] = all.index[i];
    }
    list->write_shifted(all.index, kept, begin);
}

void select_tokens(const SelectTokensParams& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t which = item % p.num_lists;
        const int64_t block = item / p.num_lists % p.blocks.num_blocks;
        const int64_t row = item / p.num_lists / p.blocks.num_blocks;
        const BlockRange range = block_range(p.blocks, row, block);
        int32_t* indices = p.indices + item * p.width;
        if (p.hit && p.hit[row * p.num_lists + which]) {
            indices[p.topk_length[item]++] = static_cast<int32_t>(range.end - 1);
            p.kept_score[item] = NAN;
            continue;
        }
        const float* scores = p.scores + row * p.scores_strides[0] + block * p.scores_strides[1] +
                              which * p.scores_strides[2];
        ListWriter list{indices, scores, 0};
        list.write_range(range.start, range.sink_end);
        // Lists of one row lie one behind the other and are as long.
        const float* next = item + 1 < end && which + 1 < p.num_lists
                                ? scores + p.scores_strides[2] + range.sink_end
                                : nullptr;
        write_picked(p, scores, range.sink_end, range.window_start, next, scratch, &list);
        list.write_range(range.window_start, range.end);
        p.topk_length[item] = static_cast<int32_t>(list.count);
        p.kept_score[item] = list.kept_score();
        for (int64_t i = list.count; i < p.width; ++i) indices[i] = -1;
    }
}
