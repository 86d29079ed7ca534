// block_sparse_attention: softmax over the kept KV blocks of a block of queries, float32 inside.
//
// Floor   4 * head_dim flops per query and kept key; compute-bound from a few queries per block on.
// Plan    One work item per (row, head, q block). Its kept blocks are listed once, ascending,
//         whatever form the mask has; those that every query sees whole come first and need no
//         comparison, the few at the causal diagonal follow. Kept tokens fill tiles of 64, so small
//         KV blocks share one. A tile is widened to float32; two products per panel of 64 queries:
//         logits = keys . queries' (queries are transposed once per item), out += weights' .
//         values.

// Kept blocks with a token before `end`, ascending, into `out`; returns how many. `marks`: one byte
// per KV block.
inline int64_t list_blocks(const BlockSparseAttentionParams& p, const QueryRows& r, int64_t item,
                           uint8_t* marks, int32_t* out) {
    const BlockGrid& g = p.grid;
    const BlockMask& m = p.mask;
    const int64_t limit = (r.visible_end + g.kv_block_size - 1) / g.kv_block_size;
    const int64_t at =
        r.row * m.strides[0] + r.head * m.strides[1] + item % g.num_q_blocks() * m.strides[2];
    int64_t count = 0;
    if (m.form == MaskForm::kDense) {
        const uint8_t* kept = m.dense + at;
        for (int64_t b = 0; b < limit; ++b)
            if (kept[b * m.strides[3]]) out[count++] = static_cast<int32_t>(b);
        return count;
    }
    const bool csr = m.form == MaskForm::kCsr;
    const int32_t* list = m.indices + (csr ? m.row_offsets[item] : at);
    const int64_t entries = csr ? m.row_offsets[item + 1] - m.row_offsets[item] : m.width;
    const int64_t step = csr ? 1 : m.strides[3];
    for (int64_t b = 0; b < limit; ++b) marks[b] = 0;
    for (int64_t i = 0; i < entries; ++i) {
        const int64_t b = list[i * step];
        if (b >= 0 && b < limit) marks[b] = 1;
    }
    for (int64_t b = 0; b < limit; ++b)
        if (marks[b]) out[count++] = static_cast<int32_t>(b);
    return count;
}

// What an item works in.
struct BlockScratch {
    float* panels;  // queries, panel by panel [head_dim, width]
    float* acc;     // [rows, head_dim]
    float* peak;    // [rows]
    float* total;   // [rows]
    float* factor;  // [rows]
    float* keys;    // [kTileTokens, head_dim]
    float* values;  // [kTileTokens, head_dim]
    float* logits;  // [kTileTokens, kPanelQueries]
    int32_t* blocks;
    uint8_t* marks;
    float* tiles;  // of AttentionTiles

    BlockScratch(const BlockGrid& g, float* memory) {
        const int64_t rows = whole_lanes(g.q_block_size);
        panels = memory;
        acc = panels + rows * g.head_dim;
        peak = acc + rows * g.head_dim;
        total = peak + rows;
        factor = total + rows;
        keys = factor + rows;
        values = keys + kTileTokens * g.head_dim;
        logits = values + kTileTokens * g.head_dim;
        blocks = reinterpret_cast<int32_t*>(logits + kTileTokens * kPanelQueries);
        marks = reinterpret_cast<uint8_t*>(blocks + g.num_kv_blocks() + 16);
        tiles = logits + kTileTokens * kPanelQueries + 2 * (g.num_kv_blocks() + 16);
    }
};

// Up to kCapacity kept tokens, ascending.
template <typename T, int64_t kCapacity>
struct TokenTile {
    int64_t tokens;
    bool partial;  // some query does not see all of them
    int64_t positions[kCapacity];
    const T* rows[2 * kCapacity];  // key and value of each

    Upcoming upcoming(int64_t head_dim) const {
        return {as_bytes(rows), 2 * tokens, head_dim * int64_t{sizeof(T)}, true};
    }
};

// Where the next tile begins, in blocks[block..end) of the item's list.
struct TileCursor {
    int64_t block, end;
    int64_t done;  // tokens of the block
};

template <typename T, int64_t kCapacity>
inline void next_tile(const BlockSparseAttentionParams& p, const QueryRows& r,
                      const int32_t* blocks, TileCursor* at, TokenTile<T, kCapacity>* tile) {
    const int64_t size = p.grid.kv_block_size;
    tile->tokens = 0;
    while (at->block < at->end && tile->tokens < kCapacity) {
        const int64_t first = blocks[at->block] * size, left = r.visible_end - first;
        const int64_t rest = (left < size ? left : size) - at->done;
        const int64_t room = kCapacity - tile->tokens, some = rest < room ? rest : room;
        const T* key = key_row<T>(p.grid.keys, r.row, first + at->done, r.kv_head);
        const T* value = key_row<T>(p.values, r.row, first + at->done, r.kv_head);
        for (int64_t t = 0; t < some; ++t) {
            const int64_t to = tile->tokens + t;
            tile->positions[to] = first + at->done + t;
            tile->rows[2 * to] = key + t * p.grid.keys.token_stride;
            tile->rows[2 * to + 1] = value + t * p.values.token_stride;
        }
        tile->tokens += some;
        at->done += some;
        if (some == rest) ++at->block, at->done = 0;
    }
}

// Goes on over a tile and fetches the rows of the one behind it.
template <typename T>
inline void attend_tile(const BlockSparseAttentionParams& p, const QueryRows& r,
                        const BlockScratch& s, const TokenTile<T, kTileTokens>& tile,
                        const Upcoming& upcoming) {
    const BlockGrid& g = p.grid;
    const int64_t head_dim = g.head_dim, tokens = tile.tokens;
    const bool partial = tile.partial;
    const int64_t* positions = partial ? tile.positions : nullptr;
    for (int64_t t = 0; t < tokens; ++t) {
        load_row(tile.rows[2 * t], head_dim, s.keys + t * head_dim);
        load_row(tile.rows[2 * t + 1], head_dim, s.values + t * head_dim);
    }
    // 0 * NaN is NaN: a value that is not finite may only meet the queries that see it.
    const bool guarded = partial && !all_finite(s.values, tokens * head_dim);
    const int64_t panels = (r.count + kPanelQueries - 1) / kPanelQueries;
    const int64_t steps = panels * matmul_steps(tokens) + matmul_steps(r.count);
    const int64_t rows_a_step = (upcoming.count + steps - 1) / steps;
    int64_t fetched = 0;
    const auto fetch = [&]() {
        for (int64_t i = 0; i < rows_a_step; ++i) upcoming.fetch(fetched++);
    };
    for (int64_t first = 0; first < r.count; first += kPanelQueries) {
        const int64_t width = panel_width(r.count, first);
        const int64_t queries = r.count - first < width ? r.count - first : width;
        if (partial && r.blind_to(positions[0]) >= first + queries) continue;
        panel_logits(g, r, s.panels, first, width, s.keys, tokens, positions, s.logits, fetch);
        panel_softmax<true>(s.logits, tokens, width, s.peak + first, s.total + first,
                            s.factor + first);
        float* acc = s.acc + first * head_dim;
        for (int64_t i = 0; i < queries; ++i) {
            const float factor = s.factor[first + i];
            if (factor == 1.f) continue;
            for (int64_t d = 0; d < head_dim; d += kLanes)
                store(acc + i * head_dim + d, mul(load(acc + i * head_dim + d), broadcast(factor)));
        }
        if (!guarded) {
            matmul_tall<true, Left::kColumns>(queries, s.logits, width, s.values, head_dim, tokens,
                                              acc, head_dim, fetch);
            continue;
        }
        for (int64_t i = 0; i < queries; ++i) {
            int64_t seen = 0;
            while (seen < tokens && r.blind_to(positions[seen]) <= first + i) ++seen;
            matmul_tall<true, Left::kColumns>(1, s.logits + i, width, s.values, head_dim, seen,
                                              acc + i * head_dim, head_dim);
        }
    }
}

// The item's kept blocks, tile by tile: `full` of `num_blocks` need no comparison of positions.
// begin(first tile), then attend(tile, the one behind it) for each.
template <typename T, int64_t kCapacity, typename Begin, typename Attend>
inline void for_each_tile(const BlockSparseAttentionParams& p, const QueryRows& r,
                          const int32_t* blocks, int64_t full, int64_t num_blocks,
                          const Begin& begin, const Attend& attend) {
    TokenTile<T, kCapacity> tiles[2];
    TileCursor at{0, full, 0};
    bool partial = false;
    const auto advance = [&](TokenTile<T, kCapacity>* tile) {
        next_tile(p, r, blocks, &at, tile);
        if (tile->tokens == 0 && !partial) {
            partial = true;
            at = TileCursor{full, num_blocks, 0};
            next_tile(p, r, blocks, &at, tile);
        }
        tile->partial = partial;
    };
    advance(&tiles[0]);
    begin(tiles[0]);
    for (int64_t turn = 0; tiles[turn].tokens > 0; turn ^= 1) {
        advance(&tiles[turn ^ 1]);
        attend(tiles[turn], tiles[turn ^ 1]);
    }
}

#if KVS_HAS_TILE_DOT
// A block of queries by a tile unit.
inline void attend_blocks_by_tiles(const BlockSparseAttentionParams& p, const QueryRows& r,
                                   const AttentionTiles& t, const int32_t* blocks, int64_t full,
                                   int64_t num_blocks) {
    using Tile = TokenTile<BFloat16, kTiledTokens>;
    const BlockGrid& g = p.grid;
    TileScope tiles(kTileBytes);  // rows of 64 bytes: full tiles, of any type
    tiles.use(kTileRows, kTileRows);
    const auto begin = [&](const Tile&) {
        t.begin([&](int64_t i) {
            return static_cast<const BFloat16*>(g.q) + r.row * g.q_strides[0] +
                   (r.first + i) * g.q_strides[1] + r.head * g.q_strides[2];
        });
    };
    const auto attend = [&](const Tile& tile, const Tile& next) {
        const BFloat16 *keys[kTiledTokens], *values[kTiledTokens];
        for (int64_t i = 0; i < tile.tokens; ++i)
            keys[i] = tile.rows[2 * i], values[i] = tile.rows[2 * i + 1];
        int64_t seen = 0;  // grows with the query
        attend_tiles(t, keys, values, tile.tokens, g.softmax_scale * kLog2E, g.softcap,
                     next.upcoming(g.head_dim), [&](int64_t i) {
                         if (!tile.partial) return tile.tokens;
                         while (seen < tile.tokens && r.blind_to(tile.positions[seen]) <= i) ++seen;
                         return seen;
                     });
    };
    for_each_tile<BFloat16, kTiledTokens>(p, r, blocks, full, num_blocks, begin, attend);
}
#endif

// Sums, in scratch, of the item's queries.
struct QuerySums {
    const float *acc, *peak, *total;
};

template <typename T>
inline QuerySums attend_blocks(const BlockSparseAttentionParams& p, const QueryRows& r,
                               const BlockScratch& s, int64_t full, int64_t num_blocks) {
    const int64_t head_dim = p.grid.head_dim, rows = whole_lanes(r.count);
#if KVS_HAS_TILE_DOT
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (r.count >= kMinTiledRows) {
            const AttentionTiles t(r.count, head_dim, s.tiles);
            attend_blocks_by_tiles(p, r, t, s.blocks, full, num_blocks);
            return {t.acc, t.peak, t.total};
        }
    }
#endif
    for (int64_t i = 0; i < rows; ++i) s.peak[i] = -INFINITY, s.total[i] = 0.f;
    for (int64_t i = 0; i < r.count * head_dim; i += kLanes) store(s.acc + i, broadcast(0.f));
    using Tile = TokenTile<T, kTileTokens>;
    const auto begin = [&](const Tile& tile) {
        load_panels<T>(p.grid, r, tile.upcoming(head_dim), s.panels);
    };
    const auto attend = [&](const Tile& tile, const Tile& next) {
        attend_tile(p, r, s, tile, next.upcoming(head_dim));
    };
    for_each_tile<T, kTileTokens>(p, r, s.blocks, full, num_blocks, begin, attend);
    return {s.acc, s.peak, s.total};
}

template <typename T>
void attend_item(const BlockSparseAttentionParams& p, int64_t item, float* scratch) {
    const BlockGrid& g = p.grid;
    const int64_t head_dim = g.head_dim;
    const QueryRows r = query_rows(g, item, 1);
    const BlockScratch s(g, scratch);
    const int64_t num_blocks = list_blocks(p, r, item, s.marks, s.blocks);
    QuerySums sums{};
    if (num_blocks > 0) {
        const int64_t full_end = r.full_end(g.causal);
        int64_t full = num_blocks;  // the last one may end with the row: it is short, not partial
        while (full > 0) {
            const int64_t end = (s.blocks[full - 1] + int64_t{1}) * g.kv_block_size;
            if ((end < r.visible_end ? end : r.visible_end) <= full_end) break;
            --full;
        }
        sums = attend_blocks<T>(p, r, s, full, num_blocks);
    }
    const int64_t begin = item % g.num_q_blocks() * g.q_block_size;
    const int64_t left = g.seqlen_q - begin, all = left < g.q_block_size ? left : g.q_block_size;
    for (int64_t i = 0; i < all; ++i) {
        const int64_t to = (r.row * g.seqlen_q + begin + i) * g.num_q_heads + r.head;
        T* out = static_cast<T*>(p.out) + to * head_dim;
        const bool empty = num_blocks == 0 || i >= r.count || sums.total[i] == 0.f;
        p.lse[to] = empty ? -INFINITY : sums.peak[i] * kLn2 + std::log(sums.total[i]);
        if (empty) {
            for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, broadcast(0.f));
            continue;
        }
        const F32 inverse = broadcast(1.f / sums.total[i]);
        for (int64_t d = 0; d < head_dim; d += kLanes)
            store(out + d, mul(load(sums.acc + i * head_dim + d), inverse));
    }
}

void block_sparse_attention(const BlockSparseAttentionParams& p, int64_t begin, int64_t end,
                            float* scratch) {
    for (int64_t item = begin; item < end; ++item) switch (p.grid.dtype) {
            case DType::kFloat32:
                attend_item<float>(p, item, scratch);
                break;
            case DType::kFloat16:
                attend_item<Float16>(p, item, scratch);
                break;
            case DType::kBFloat16:
                attend_item<BFloat16>(p, item, scratch);
                break;
        }
}
