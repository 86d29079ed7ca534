// sparse_attention: softmax over the listed tokens only, exact keys and values, float32 inside.
//
// Floor   one decode query: 2 * head_dim * element size bytes per listed token and KV head;
// memory-bound.
//         a block of queries: 4 * rows * listed * head_dim flops per KV head (rows = queries *
//         group); compute-bound.
// Plan    tiles of 64 tokens. One query: dot products straight from the cache rows (bfloat16
// products where all are bfloat16), then a weighted sum of value rows; each fetches the rows that
// the other needs next.
//         Many rows: the tile is widened to float32 once (keys transposed) and two small matrix
//         products serve all rows.
// Both rotate a key to its rank on the way in when positions are compact.

struct AttentionItem {
    int64_t row, kv_head, group;
    int64_t start, list_end;  // visible positions of a list-free call: [start, list_end)
    const int32_t* list;      // or nullptr: every position from start on
    int64_t count;            // listed tokens
    int64_t first_query, num_queries, first_position;

    int64_t position_of(int64_t i) const { return list ? list[i] : start + i; }
    // Listed tokens at or before `position`.
    int64_t listed_up_to(int64_t position) const {
        if (!list) {
            const int64_t n = position + 1 - start;
            return n < 0 ? 0 : (n < count ? n : count);
        }
        int64_t low = 0, high = count;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (list[middle] <= position)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }
};

template <typename T>
inline void tile_pointers(const KVView& view, const AttentionItem& a, int64_t first, int64_t count,
                          const T** out) {
    if (!a.list) return row_pointers(view, a.row, a.start + first, count, a.kv_head, out);
    for (int64_t i = 0; i < count; ++i)
        out[i] = key_row<T>(view, a.row, a.list[first + i], a.kv_head);
}

// One query of one query head, (compact) rotated to the rank of its own token.
template <typename T>
inline void load_query(const SparseAttentionParams& p, const AttentionItem& a, int64_t query,
                       int64_t h, float* out) {
    const T* from = static_cast<const T*>(p.q) + a.row * p.q_strides[0] + query * p.q_strides[1] +
                    (a.kv_head * a.group + h) * p.q_strides[2];
    if (p.rope.cos) {
        // Entries before its own token: the token's rank, listed or not.
        const int64_t rank = a.listed_up_to(a.first_position + query - a.first_query - 1);
        rotate_row(from, p.rope, rank, p.head_dim, out);
    } else {
        for (int64_t d = 0; d < p.head_dim; d += kLanes) store(out + d, load(from + d));
    }
}

template <typename T>
inline void store_output(const SparseAttentionParams& p, const AttentionItem& a, int64_t query,
                         int64_t h, const float* acc, float peak, float total) {
    const int64_t row =
        (a.row * p.blocks.seqlen_q + query) * p.num_q_heads + a.kv_head * a.group + h;
    T* out = static_cast<T*>(p.out) + row * p.head_dim;
    const bool empty = peak == -INFINITY;
    float weight = empty ? 0.f : 1.f / total;
    p.lse[row] = empty ? -INFINITY : peak * kLn2 + std::log(total);
    if (p.sink_logits && !empty) {
        const float sum = peak + std::log2(total);
        const float all = with_sink(sum, p.sink_logits[a.kv_head * a.group + h]);
        weight *= exp2(sum - all);
        p.lse[row] = all * kLn2;
    }
    const F32 inverse = broadcast(weight);
    for (int64_t d = 0; d < p.head_dim; d += kLanes) store(out + d, mul(load(acc + d), inverse));
}

// Attention over some of a list, not normalised, for every head of a group.
struct AttentionPart {
    float* acc;    // [group, head_dim] sum of weight * value
    float* peak;   // [group] maximum logit, in units of ln 2
    float* total;  // [group] sum of weights = 2^(logit - peak)

    AttentionPart(float* memory, int64_t group, int64_t head_dim)
        : acc(memory), peak(memory + group * head_dim), total(peak + group) {}
    void clear(int64_t group, int64_t head_dim) const {
        for (int64_t i = 0; i < group * head_dim; ++i) acc[i] = 0.f;
        for (int64_t h = 0; h < group; ++h) peak[h] = -INFINITY, total[h] = 0.f;
    }
    // This part and a later one.
    void merge(const AttentionPart& later, int64_t group, int64_t head_dim) const {
        for (int64_t h = 0; h < group; ++h) {
            const float now = later.peak[h] > peak[h] ? later.peak[h] : peak[h];
            if (now == -INFINITY) {  // nothing yet; what is not a number must show
                total[h] += later.total[h];
                continue;
            }
            const F32 mine = broadcast(exp2(peak[h] - now)),
                      its = broadcast(exp2(later.peak[h] - now));
            float *to = acc + h * head_dim, *from = later.acc + h * head_dim;
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(to + d, fma(load(from + d), its, mul(load(to + d), mine)));
            total[h] = total[h] * exp2(peak[h] - now) + later.total[h] * exp2(later.peak[h] - now);
            peak[h] = now;
        }
    }
};

// One query against entries [begin, end) of its list; `count` entries are visible to it.
template <typename T>
inline void attend_part(const SparseAttentionParams& p, const AttentionItem& a, const float* q,
                        int64_t begin, int64_t end, int64_t count, const AttentionPart& part,
                        float* weights, float* rotated) {
    const int64_t head_dim = p.head_dim, group = a.group;
    const float scale = p.softmax_scale * kLog2E;
    part.clear(group, head_dim);
    const auto at_most_a_tile = [](int64_t n) { return n < kTileTokens ? n : kTileTokens; };
    [[maybe_unused]] bool bfloat16_products = false;
#if KVS_HAS_BF16_DOT
    alignas(64) BFloat16 columns[kMaxBf16Group * kMaxHeadDim];
    if constexpr (std::is_same_v<T, BFloat16>) {
        bfloat16_products = p.rope.cos == nullptr && head_dim % 32 == 0 && group <= kMaxBf16Group;
        for (int64_t h = 0; bfloat16_products && h < group; ++h)
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(columns + h * kMaxHeadDim + d, load(q + h * head_dim + d));
    }
#endif
    const T *keys[2][kTileTokens], *values[kTileTokens];
    const float* rotated_rows[kTileTokens];
    tile_pointers(p.keys, a, begin, at_most_a_tile(end - begin), keys[0]);
    for (int64_t first = begin, turn = 0; first < end; first += kTileTokens, turn ^= 1) {
        // This tile's values are on their way while its keys are used, then the next tile's keys.
        const int64_t tokens = at_most_a_tile(end - first);
        const int64_t next = at_most_a_tile(count - first - tokens);
        tile_pointers(p.values, a, first, tokens, values);
        tile_pointers(p.keys, a, first + tokens, next, keys[turn ^ 1]);
        const int64_t row_bytes = head_dim * int64_t{sizeof(T)};
        const bool scattered = a.list != nullptr;
        const Upcoming to_values{as_bytes(values), tokens, row_bytes, scattered},
            to_keys{as_bytes(keys[turn ^ 1]), next, row_bytes, scattered};
        if (p.rope.cos) {
            for (int64_t t = 0; t < tokens; ++t) {
                to_values.fetch(t);
                rotate_row(keys[turn][t], p.rope, first + t, head_dim, rotated + t * head_dim);
                rotated_rows[t] = rotated + t * head_dim;
            }
            dot_rows(rotated_rows, tokens, q, head_dim, group, head_dim, scale, Upcoming{}, weights,
                     kTileTokens);
        } else if (bfloat16_products) {
#if KVS_HAS_BF16_DOT
            if constexpr (std::is_same_v<T, BFloat16>)
                dot_rows_bf16(keys[turn], tokens, columns, group, head_dim, scale, to_values,
                              weights, kTileTokens);
#endif
        } else {
            dot_rows(keys[turn], tokens, q, head_dim, group, head_dim, scale, to_values, weights,
                     kTileTokens);
        }
        for (int64_t h = 0; h < group; ++h) {
            float* weight = weights + h * kTileTokens;
            cap_logits(weight, tokens, p.softcap);
            float sum;
            const float top = exp2_in_place(weight, tokens, &sum);
            const float now = top > part.peak[h] ? top : part.peak[h];
            if (now == -INFINITY) continue;
            const float old_factor = exp2(part.peak[h] - now), new_factor = exp2(top - now);
            float* acc = part.acc + h * head_dim;
            if (old_factor != 1.f)
                for (int64_t d = 0; d < head_dim; d += kLanes)
                    store(acc + d, mul(load(acc + d), broadcast(old_factor)));
            if (new_factor != 1.f)
                for (int64_t t = 0; t < tokens; ++t) weight[t] *= new_factor;
            part.total[h] = part.total[h] * old_factor + sum * new_factor;
            part.peak[h] = now;
        }
        weighted_sum(values, tokens, weights, group, to_keys, part.acc, head_dim);
    }
}

// A block of one query: its parts one after the other, or some of them, or what they add up to.
template <typename T>
inline void attend_one_query(const SparseAttentionParams& p, const AttentionItem& a,
                             AttentionStage stage, int64_t part_begin, int64_t part_end,
                             float* workspace, float* scratch) {
    const int64_t head_dim = p.head_dim, group = a.group;
    const int64_t query = a.first_query, part_floats = group * (head_dim + 2);
    const int64_t count = a.listed_up_to(a.first_position);
    float* q = scratch;                               // [group, head_dim]
    float* weights = q + group * head_dim;            // [group, kTileTokens]
    float* rotated = weights + group * kTileTokens;   // [kTileTokens, head_dim]
    float* parts = rotated + kTileTokens * head_dim;  // two of them
    const AttentionPart all(parts, group, head_dim), one(parts + part_floats, group, head_dim);
    if (stage != AttentionStage::kMerge)
        for (int64_t h = 0; h < group; ++h) load_query<T>(p, a, query, h, q + h * head_dim);
    if (stage == AttentionStage::kParts) {
        for (int64_t i = part_begin; i < part_end; ++i) {
            const int64_t begin = i * kAttentionPartTokens, stop = begin + kAttentionPartTokens;
            if (begin >= count) return;
            attend_part<T>(p, a, q, begin, stop < count ? stop : count, count,
                           AttentionPart(workspace + i * part_floats, group, head_dim), weights,
                           rotated);
        }
        return;
    }
    all.clear(group, head_dim);
    for (int64_t begin = 0, i = 0; begin < count; begin += kAttentionPartTokens, ++i) {
        const int64_t stop = begin + kAttentionPartTokens;
        if (stage == AttentionStage::kMerge) {
            all.merge(AttentionPart(workspace + i * part_floats, group, head_dim), group, head_dim);
        } else {
            attend_part<T>(p, a, q, begin, stop < count ? stop : count, count, one, weights,
                           rotated);
            all.merge(one, group, head_dim);
        }
    }
    for (int64_t h = 0; h < group; ++h)
        store_output<T>(p, a, query, h, all.acc + h * head_dim, all.peak[h], all.total[h]);
}

#if KVS_HAS_TILE_DOT
// attend_queries() by a tile unit.
inline void attend_queries_by_tiles(const SparseAttentionParams& p, const AttentionItem& a,
                                    int64_t first, int64_t num, float* scratch) {
    const int64_t group = a.group, first_position = a.first_position + (first - a.first_query);
    const AttentionTiles t(num * group, p.head_dim, scratch);
    t.begin([&](int64_t r) {
        return static_cast<const BFloat16*>(p.q) + a.row * p.q_strides[0] +
               (first + r / group) * p.q_strides[1] +
               (a.kv_head * group + r % group) * p.q_strides[2];
    });
    TileScope tiles(kTileBytes);  // rows of 64 bytes: full tiles, of any type
    tiles.use(kTileRows, kTileRows);
    const int64_t count = a.listed_up_to(first_position + num - 1);
    const BFloat16* rows[2][2 * kTiledTokens];  // keys, then values, of this pass and the next
    const auto find = [&](int64_t at, const BFloat16** out) {
        const int64_t left = count - at, tokens = left < kTiledTokens ? left : kTiledTokens;
        if (tokens <= 0) return int64_t{0};
        tile_pointers(p.keys, a, at, tokens, out);
        tile_pointers(p.values, a, at, tokens, out + tokens);
        return tokens;
    };
    int64_t tokens = find(0, rows[0]);
    for (int64_t at = 0, turn = 0; at < count; turn ^= 1) {
        const int64_t next = find(at + tokens, rows[turn ^ 1]);
        const Upcoming upcoming{as_bytes(rows[turn ^ 1]), 2 * next, 2 * p.head_dim, true};
        const int64_t last = a.position_of(at + tokens - 1);
        attend_tiles(t, rows[turn], rows[turn] + tokens, tokens, p.softmax_scale * kLog2E,
                     p.softcap, upcoming, [&](int64_t r) {
                         const int64_t position = first_position + r / group;
                         return last <= position ? tokens : a.listed_up_to(position) - at;
                     });
        at += tokens;
        tokens = next;
    }
    for (int64_t r = 0; r < t.rows; ++r)
        store_output<BFloat16>(p, a, first + r / group, r % group, t.acc + r * p.head_dim,
                               t.peak[r], t.total[r]);
}
#endif

// Queries [first, first + num) of the item, all heads of the group: row r = (query, head),
// query-major.
template <typename T>
inline void attend_queries(const SparseAttentionParams& p, const AttentionItem& a, int64_t first,
                           int64_t num, float* scratch) {
    const int64_t head_dim = p.head_dim, group = a.group, rows = num * group;
#if KVS_HAS_TILE_DOT
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (rows >= kMinTiledRows && !p.rope.cos)
            return attend_queries_by_tiles(p, a, first, num, scratch);
    }
#endif
    float* q = scratch;                                // [rows, head_dim]
    float* acc = q + rows * head_dim;                  // [rows, head_dim]
    float* peak = acc + rows * head_dim;               // [rows]
    float* total = peak + rows;                        // [rows]
    float* keys = total + rows;                        // [head_dim, kTileTokens], transposed
    float* values = keys + head_dim * kTileTokens;     // [kTileTokens, head_dim]
    float* weights = values + head_dim * kTileTokens;  // [kGemmRows, kTileTokens]
    for (int64_t r = 0; r < rows; ++r) {
        float* query = q + r * head_dim;
        load_query<T>(p, a, first + r / group, r % group, query);
        for (int64_t d = 0; d < head_dim; d += kLanes)
            store(query + d, mul(load(query + d), broadcast(p.softmax_scale * kLog2E)));
        peak[r] = -INFINITY;
        total[r] = 0.f;
    }
    for (int64_t i = 0; i < rows * head_dim; ++i) acc[i] = 0.f;
    const int64_t last_position = a.first_position + (first - a.first_query) + num - 1;
    const int64_t count = a.listed_up_to(last_position);
    const T *key_rows[kTileTokens], *value_rows[kTileTokens];
    int64_t seen[kGemmRows];
    for (int64_t tile = 0; tile < count; tile += kTileTokens) {
        const int64_t tokens = count - tile < kTileTokens ? count - tile : kTileTokens;
        tile_pointers(p.keys, a, tile, tokens, key_rows);
        tile_pointers(p.values, a, tile, tokens, value_rows);
        for (int64_t t = 0; t < kTileTokens; ++t) {
            float key[kMaxHeadDim];
            if (t >= tokens) {  // padding of the last tile: zero keys and values, weight 0
                for (int64_t d = 0; d < head_dim; ++d)
                    keys[d * kTileTokens + t] = values[t * head_dim + d] = 0.f;
                continue;
            }
            if (p.rope.cos) {
                rotate_row(key_rows[t], p.rope, tile + t, head_dim, key);
            } else {
                for (int64_t d = 0; d < head_dim; d += kLanes)
                    store(key + d, load(key_rows[t] + d));
            }
            for (int64_t d = 0; d < head_dim; ++d) keys[d * kTileTokens + t] = key[d];
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(values + t * head_dim + d, load(value_rows[t] + d));
        }
        // 0 * NaN is NaN: a value that is not finite may only meet the queries that see it.
        const bool finite_values = all_finite(values, kTileTokens * head_dim);
        const int64_t tile_first = a.position_of(tile),
                      tile_last = a.position_of(tile + tokens - 1);
        for (int64_t r0 = 0; r0 < rows; r0 += kGemmRows) {
            const int64_t some = rows - r0 < kGemmRows ? rows - r0 : kGemmRows;
            const int64_t lowest = a.first_position + (first - a.first_query) + r0 / group;
            const int64_t highest =
                a.first_position + (first - a.first_query) + (r0 + some - 1) / group;
            if (tile_first > highest) continue;  // wholly in these rows' future
            matmul<false>(some, q + r0 * head_dim, head_dim, keys, kTileTokens, head_dim, weights,
                          kTileTokens);
            const bool whole = tokens == kTileTokens && tile_last <= lowest;
            for (int64_t r = 0; r < some; ++r) {
                float* weight = weights + r * kTileTokens;
                cap_logits(weight, kTileTokens, p.softcap);
                seen[r] = kTileTokens;
                if (!whole) {
                    const int64_t position =
                        a.first_position + (first - a.first_query) + (r0 + r) / group;
                    const int64_t listed = a.listed_up_to(position) - tile;
                    seen[r] = listed < 0 ? 0 : (listed < tokens ? listed : tokens);
                    for (int64_t t = seen[r]; t < kTileTokens; ++t) weight[t] = -INFINITY;
                }
                float sum;
                const float top = exp2_in_place(weight, kTileTokens, &sum);
                float* row_acc = acc + (r0 + r) * head_dim;
                const float before = peak[r0 + r], now = top > before ? top : before;
                if (now == -INFINITY) continue;
                const float old_factor = exp2(before - now), new_factor = exp2(top - now);
                if (old_factor != 1.f)
                    for (int64_t d = 0; d < head_dim; d += kLanes)
                        store(row_acc + d, mul(load(row_acc + d), broadcast(old_factor)));
                if (new_factor != 1.f)
                    for (int64_t t = 0; t < kTileTokens; t += kLanes)
                        store(weight + t, mul(load(weight + t), broadcast(new_factor)));
                total[r0 + r] = total[r0 + r] * old_factor + sum * new_factor;
                peak[r0 + r] = now;
            }
            if (finite_values) {
                matmul<true>(some, weights, kTileTokens, values, head_dim, kTileTokens,
                             acc + r0 * head_dim, head_dim);
            } else {
                for (int64_t r = 0; r < some; ++r)
                    matmul<true>(1, weights + r * kTileTokens, kTileTokens, values, head_dim,
                                 seen[r], acc + (r0 + r) * head_dim, head_dim);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        store_output<T>(p, a, first + r / group, r % group, acc + r * head_dim, peak[r], total[r]);
}

template <typename T>
void sparse_attention_of(const SparseAttentionParams& p, AttentionStage stage, int64_t item,
                         int64_t part_begin, int64_t part_end, float* workspace, float* scratch) {
    AttentionItem a;
    a.kv_head = item % p.num_kv_heads;
    const int64_t block = item / p.num_kv_heads % p.blocks.num_blocks;
    a.row = item / p.num_kv_heads / p.blocks.num_blocks;
    a.group = p.num_q_heads / p.num_kv_heads;
    const BlockRange range = block_range(p.blocks, a.row, block);
    a.first_query = p.blocks.offsets ? p.blocks.offsets[block] : 0;
    a.num_queries =
        (p.blocks.offsets ? p.blocks.offsets[block + 1] : p.blocks.seqlen_q) - a.first_query;
    a.first_position =
        p.blocks.cache_seqlens[a.row] - p.blocks.seqlen_q + a.first_query;  // may lie in padding
    a.start = range.start;
    a.list_end = range.end;
    a.list = nullptr;
    a.count = a.list_end - a.start;
    if (p.indices) {
        a.list = p.indices + a.row * p.indices_strides[0] + block * p.indices_strides[1] +
                 a.kv_head * p.indices_strides[2];
        a.count =
            p.topk_length[a.row * p.topk_length_strides[0] + block * p.topk_length_strides[1] +
                          a.kv_head * p.topk_length_strides[2]];
    }
    if (a.num_queries == 1)
        return attend_one_query<T>(p, a, stage, part_begin, part_end, workspace, scratch);
    if (stage == AttentionStage::kParts) return;  // a longer block has none: kMerge does it all
    const int64_t at_once = sparse_attention_queries_at_once(a.group);
    for (int64_t done = 0; done < a.num_queries; done += at_once) {
        const int64_t num = a.num_queries - done < at_once ? a.num_queries - done : at_once;
        attend_queries<T>(p, a, a.first_query + done, num, scratch);
    }
}

void sparse_attention(const SparseAttentionParams& p, AttentionStage stage, int64_t item,
                      int64_t part_begin, int64_t part_end, float* workspace, float* scratch) {
    const auto run = [&](auto element) {
        sparse_attention_of<decltype(element)>(p, stage, item, part_begin, part_end, workspace,
                                               scratch);
    };
    switch (p.dtype) {
        case DType::kFloat32:
            return run(float{});
        case DType::kFloat16:
            return run(Float16{});
        case DType::kBFloat16:
            return run(BFloat16{});
    }
}
