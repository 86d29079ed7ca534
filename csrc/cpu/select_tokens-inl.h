// select_tokens: exact top-k by histogram, written out in position order. No sort, and no buffer
// that could overflow: the one for candidates has room for every token, so 16,385 ties at the
// border cost time, never tokens.
//
// Plan    1. a lower bound of the k-th score from maxima of small strided groups; tokens that reach
// it are packed
//            without branches (a few thousand of 128K)       2. three histogram rounds (11 + 11 +
//            10 bits) over the packed ones give the k-th score exactly and how many of its ties are
//            kept       3. one pass in position order writes the list

constexpr int64_t kBins = 2048;

// Order-preserving map of finite floats to unsigned integers; -0 and 0 are equal.
inline uint32_t order_key(float value) {
    const uint32_t bits = element::bits_of(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The border of a top-k: keys above `key` are kept, and the first `ties` of those equal to it.
struct Border {
    uint32_t key;
    int64_t ties;
};

// Tokens in the running for one list, ascending by position.
struct Candidates {
    int32_t* index;
    uint32_t* key;
    int64_t count;
};

// Packs the finite entries of values[0, count) that reach `bound`.
inline void pack_at_least(const float* values, int64_t count, float bound, Candidates* out) {
    const F32 threshold = broadcast(bound);
    int64_t packed = 0;
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        packed += pack_positions(out->index + packed, static_cast<int32_t>(i),
                                 mask_ge(load(values + i), threshold));
    for (int64_t i = whole; i < count; ++i)
        if (values[i] >= bound) out->index[packed++] = static_cast<int32_t>(i);
    out->count = 0;
    for (int64_t i = 0; i < packed; ++i) {  // +inf reaches every bound
        const int32_t at = out->index[i];
        out->index[out->count] = at;
        out->key[out->count] = order_key(values[at]);
        out->count += element::is_finite(values[at]);
    }
}

// A value that at least `keep` finite entries reach, or -inf. Lane j of group g covers every
// kLanes-th entry of a run.
inline float lower_bound_of_kept(const float* values, int64_t count, int64_t keep) {
    constexpr int64_t kMaxGroups = 1024;
    const int64_t run = count / (2 * keep);  // entries per maximum
    if (run < 4) return -INFINITY;
    const int64_t vectors = count / kLanes;
    int64_t per_group = run;
    if (vectors / per_group > kMaxGroups) per_group = (vectors + kMaxGroups - 1) / kMaxGroups;
    const int64_t groups = vectors / per_group;
    if (groups * kLanes < keep) return -INFINITY;
    float maxima[kMaxGroups * kLanes];
    for (int64_t g = 0; g < groups; ++g) {
        F32 top = broadcast(-INFINITY);
        for (int64_t v = 0; v < per_group; ++v) {
            const F32 x = load(values + (g * per_group + v) * kLanes);
            // inf - inf is NaN and loses against `top`: entries that are not finite do not count
            top = max(add(x, sub(x, x)), top);
        }
        store(maxima + g * kLanes, top);
    }
    // The keep-th largest maximum, to the precision of one histogram bin.
    int32_t histogram[kBins] = {};
    for (int64_t i = 0; i < groups * kLanes; ++i)
        if (maxima[i] > -INFINITY) ++histogram[order_key(maxima[i]) >> 21];
    int64_t above = 0;
    for (int64_t bin = kBins - 1; bin >= 0; --bin) {
        above += histogram[bin];
        if (above >= keep) {
            const uint32_t key = static_cast<uint32_t>(bin) << 21;  // smallest key of the bin
            return key & 0x80000000u ? element::float_of(key & 0x7fffffffu) : -INFINITY;
        }
    }
    return -INFINITY;
}

// Border of the `keep` best keys; key 0 and all ties if there are no more than that.
inline Border find_border(const uint32_t* keys, int64_t count, int64_t keep) {
    constexpr int kShift[3] = {21, 10, 0};
    constexpr uint32_t kMask[3] = {2047u, 2047u, 1023u};
    if (count <= keep) return {0, INT64_MAX};
    uint32_t prefix = 0, known = 0;  // the border's bits found so far, and which bits those are
    int64_t left = keep;
    for (int round = 0; round < 3; ++round) {
        int32_t histogram[kBins] = {};
        for (int64_t i = 0; i < count; ++i)
            if ((keys[i] & known) == prefix) ++histogram[keys[i] >> kShift[round] & kMask[round]];
        int64_t bin = kMask[round];
        while (histogram[bin] < left) left -= histogram[bin--];
        prefix |= static_cast<uint32_t>(bin) << kShift[round];
        known |= kMask[round] << kShift[round];
    }
    return {prefix, left};
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
    double kept;

    void write(int64_t position) {
        out[count++] = static_cast<int32_t>(position);
        kept += scores[position];
    }
    void write_range(int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            if (element::is_finite(scores[i])) write(i);
    }
};

inline void write_picked(const SelectTokensParams& p, const float* scores, int64_t begin,
                         int64_t end, float* scratch, ListWriter* list) {
    const int64_t count = end - begin;
    if (count <= 0 || p.keep <= 0) return;
    if (count <= p.keep) return list->write_range(begin, end);
    const float* own = scores + begin;
    const int64_t room = select_tokens_room(p);
    Candidates all{reinterpret_cast<int32_t*>(scratch), reinterpret_cast<uint32_t*>(scratch + room),
                   0};
    if (p.pool_width <= 1) {
        pack_at_least(own, count, lower_bound_of_kept(own, count, p.keep), &all);
        Border border = find_border(all.key, all.count, p.keep);
        for (int64_t i = 0; i < all.count; ++i)
            if (all.key[i] > border.key || (all.key[i] == border.key && border.ties-- > 0))
                list->write(begin + all.index[i]);
        return;
    }
    // Pooled scores make plateaus: inside the border's plateau the token's own score decides, then
    // its position.
    float* pooled = scratch + 2 * room;
    uint32_t* plateau = reinterpret_cast<uint32_t*>(scratch + 3 * room);
    pool_maximum(own, count, p.pool_width, pooled);
    pack_at_least(pooled, count, -INFINITY, &all);
    const Border outer = find_border(all.key, all.count, p.keep);
    int64_t on_plateau = 0;
    for (int64_t i = 0; i < all.count; ++i)
        if (all.key[i] == outer.key) plateau[on_plateau++] = order_key(own[all.index[i]]);
    Border inner = find_border(plateau, on_plateau, outer.ties);
    for (int64_t i = 0; i < all.count; ++i) {
        if (all.key[i] < outer.key) continue;
        const uint32_t key = order_key(own[all.index[i]]);
        if (all.key[i] > outer.key || key > inner.key || (key == inner.key && inner.ties-- > 0))
            list->write(begin + all.index[i]);
    }
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
        ListWriter list{indices, scores, 0, 0.0};
        list.write_range(range.start, range.sink_end);
        write_picked(p, scores, range.sink_end, range.window_start, scratch, &list);
        list.write_range(range.window_start, range.end);
        p.topk_length[item] = static_cast<int32_t>(list.count);
        p.kept_score[item] = static_cast<float>(list.kept);
        for (int64_t i = list.count; i < p.width; ++i) indices[i] = -1;
    }
}
