// block_sparse_attention with Hopper's own instructions: the bulk tensor copy and wgmma.
//
// Problem  csrc/cuda/block_sparse_attention.cu, whose results these are.
// Floor    4 * head_dim flops per query and kept token: 128 x 128 x 128 x 4 = 8.4 MFLOP per tile of
//          128 queries and tokens, 1.1 us on one SM at 990 TFLOP/s; 64 KB of keys and values each.
// Plan     As many thread blocks as fit the GPU take items (row, head, q block) off a counter, in
//          an order by falling length that two small kernels make on the device.
//          A thread block is one warpgroup that loads and one (q blocks of 64) or two (128) that
//          compute 64 queries each. Of the loading one, a warp takes items and marks what the mask
//          keeps, one item ahead; a thread of another walks the marks ascending and has tiles
//          copied: keys and values of kTokens kept tokens, made of whole KV blocks (or of halves of
//          one), alternate in one ring: K0 K1 V0 K2 V1 ... V(n-1). The last tile's missing tokens
//          are asked for behind the end of the keys, where the engine writes zeros: every place
//          of the ring has the same number of bytes.
//          Who computes has two products in flight: logits of tile i + 1 and the sums of tile i;
//          softmax of i + 1 runs beside the latter. Two warpgroups take turns to begin them, so
//          that one multiplies while the other takes exponentials.
//          Blocks that all queries see whole come first, since positions ascend; tiles at the
//          diagonal or at the row's end ("partial") are masked, and searched for values that are
//          not finite: 0 * NaN is NaN, and it may only meet queries that see it.
#include "kvselect/block_sparse_attention.h"

#include "cuda/device/hopper_ptx.cuh"
#include "cuda/device/kept_blocks.cuh"
#include "cuda/device/longest_first.cuh"
#include "cuda/device/soft_cap.cuh"
#include "cuda/device/swizzled_tiles.h"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

// --- which thread block does what

struct Schedule {
    int* next;             // counts the items that were taken
    const int32_t* order;  // [num_items], or nullptr: from the last item to the first
    int num_items;
};

__device__ __forceinline__ Work work_of_item(const BlockGrid& g, int item) {
    const int blocks = static_cast<int>(g.num_q_blocks()), heads = static_cast<int>(g.num_q_heads);
    const int size = static_cast<int>(g.q_block_size);
    Work w;
    w.item = item;
    w.block = item % blocks;
    const int head = item / blocks % heads, row = item / blocks / heads;
    w.begin = w.block * size;
    const int all = static_cast<int>(g.seqlen_q) - w.begin;
    w.size = all < size ? all : size;
    w.queries = block_queries(g, row, head, w.begin, w.size, 1);
    return w;
}

__device__ __forceinline__ int visible_blocks(const BlockGrid& g, const Work& work) {
    const int size = static_cast<int>(g.kv_block_size);
    return (work.queries.visible_end + size - 1) / size;
}

// How many KV blocks each item keeps, of those that it sees; entries of lists as often as they are
// there. A warp an item.
constexpr int kCountThreads = 256;
__global__ void __launch_bounds__(kCountThreads)
    count_kept_kernel(const BlockGrid g, const BlockMask mask, int num_items, int32_t* lengths) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int item = static_cast<int>(blockIdx.x) * (kCountThreads / kWarpSize) +
                     static_cast<int>(threadIdx.x) / kWarpSize;
    if (item >= num_items) return;  // whole warps
    const Work work = work_of_item(g, item);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, seen = visible_blocks(g, work);
    const int64_t at = work.queries.row * mask.strides[0] + work.queries.head * mask.strides[1] +
                       work.block * mask.strides[2];
    int count = 0;
    if (mask.form == MaskForm::kDense)
        for (int i = lane; i < seen; i += kWarpSize)
            count += mask.dense[at + i * mask.strides[3]] != 0;
    else
        for (int64_t i = lane; i < mask.width; i += kWarpSize) {
            const int block = mask.indices[at + i * mask.strides[3]];
            count += block >= 0 && block < seen;
        }
    count = reduce_add(count);
    if (lane == 0) lengths[item] = count;
}

// By lengths, or by those of CSR rows; nothing is taken yet.
__global__ void __launch_bounds__(kOrderThreads)
    order_by_length_kernel(const int64_t* row_offsets, const int32_t* lengths, int num_items,
                           int longest, int* next, int32_t* order) {
    __shared__ int ends[kLengthClasses];
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    if (threadIdx.x == 0) *next = 0;
    order_longest_first(
        [&](int item) {
            return row_offsets ? row_offsets[item + 1] - row_offsets[item] : int64_t{lengths[item]};
        },
        num_items, longest, ends, order);
}

// --- how a thread block lies in shared memory and in registers

template <int kHeadDim, int kGroups>
struct Plan {
    static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "one, two or four panels");
    static_assert(kGroups == 1 || kGroups == 2, "64 or 128 queries");
    static constexpr int kRows = kGroups * kProductRows;
    // Tokens of a tile, by what logits, weights and sums leave of the registers.
    static constexpr int kTokens = kHeadDim == 64 || (kHeadDim == 128 && kGroups == 2) ? 128 : 64;
    static constexpr int kGranules = kTokens / kSpanTokens;
    static constexpr int kPanels = kHeadDim / kPanelChannels;
    // Sums are made by 128 channels at most.
    static constexpr int kParts = kHeadDim == 256 ? 2 : 1, kPartChannels = kHeadDim / kParts;
    static constexpr int kQueryBytes = kRows * kHeadDim * 2, kTileBytes = kTokens * kHeadDim * 2;
    static constexpr int kQueryPlaces = kQueryBytes > 32768 ? 1 : 2;
    static constexpr int kPlaces = kHeadDim == 64 && kGroups == 2 ? 6 : 4;
    static constexpr int kSharedBytes =
        kTurnBytes + kQueryPlaces * kQueryBytes + kPlaces * kTileBytes;
    // 65536 registers: 168 a thread of three warpgroups, 128 of four in two thread blocks.
    // Multiples of 8, and together no more than that.
    static constexpr int kBlocksPerSm = kGroups == 1 && kHeadDim < 256 ? 2 : 1;
    static constexpr int kThreads = (1 + kGroups) * kGroupThreads;
    static constexpr bool kMovesRegisters = kThreads * kBlocksPerSm > 256;
    static constexpr int kLoaderRegisters = 40;
    static constexpr int kComputerRegisters = kGroups == 2 ? 232 : 216;
    static constexpr int kAtLaunch = 65536 / (kThreads * kBlocksPerSm) / 8 * 8;
    static_assert(!kMovesRegisters ||
                      kLoaderRegisters + kGroups * kComputerRegisters <= (1 + kGroups) * kAtLaunch,
                  "nobody waits for registers that are not given back");
    static_assert(kBlocksPerSm * (kSharedBytes + 4096) <= 228 * 1024, "what an SM has");
};

constexpr int kMarkedPlaces = 2, kMostQueryPlaces = 2, kMostPlaces = 6, kMostGranules = 8;
// Of the ring's places at most every second holds keys, and what a tile is made of is read until
// its values are given back: more than there can be tiles at once.
constexpr int kTilePlaces = 8;
static_assert(kTilePlaces >= kMostPlaces + 2);

// A window of marked blocks of an item, from the warp that marks to the thread that walks.
struct Marked {
    Work work;  // item < 0: there are no more
    int first_block, num_words;
    bool is_last;  // of the item
    uint32_t bits[kWindowWords];
};
// From there to those who compute: what to do, with the queries,
struct Item {
    Work work;  // item < 0: there are no more
    bool has_tiles;
};
// and with each tile of keys where its tokens are, 16 by 16.
struct Tile {
    int first[kMostGranules];
    bool is_last;  // of the item
};

struct Shared {
    Marked marked[kMarkedPlaces];
    Item items[kMostQueryPlaces];
    Tile tiles[kTilePlaces];
    ptx::Barrier is_marked[kMarkedPlaces], can_mark[kMarkedPlaces];
    ptx::Barrier has_queries[kMostQueryPlaces], can_query[kMostQueryPlaces];
    ptx::Barrier is_full[kMostPlaces], is_empty[kMostPlaces];
};

// Barriers by number; 0 is __syncthreads().
constexpr int kTurnBarrier = 1;    // + warpgroup: its turn to begin products
constexpr int kSearchBarrier = 3;  // all who compute
constexpr int kGroupBarrier = 4;   // + warpgroup: its own warps

struct Operands {
    TensorMap queries, keys, values;
    BlockSparseAttentionParams p;
    Schedule schedule;
};

// --- who loads

// Takes items and marks what their masks keep; one warp.
__device__ __forceinline__ void mark_items(const Operands& o, Shared& shared) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    RingPlace at;
    for (;;) {
        int number = 0;
        if (lane == 0) number = atomicAdd(o.schedule.next, 1);
        number = __shfl_sync(kAllLanes, number, 0);
        const bool exists = number < o.schedule.num_items;
        Work work{};
        work.item = -1;
        int seen = 0;
        if (exists) {
            const int item =
                o.schedule.order ? o.schedule.order[number] : o.schedule.num_items - 1 - number;
            work = work_of_item(o.p.grid, item);
            seen = visible_blocks(o.p.grid, work);
        }
        int window = 0;
        do {
            ptx::wait_for_phase(&shared.can_mark[at.place], at.phase ^ 1u);
            Marked& to = shared.marked[at.place];
            if (window < seen) mark_window<WarpTeam>(o.p.mask, work, seen, window, to.bits);
            if (lane == 0) {
                const int rest = seen - window;
                to.work = work;
                to.first_block = window;
                to.num_words = ((rest < kWindowBlocks ? rest : kWindowBlocks) + 31) / 32;
                to.is_last = rest <= kWindowBlocks;
            }
            __syncwarp();
            if (lane == 0) ptx::arrive(&shared.is_marked[at.place]);
            at.advance<kMarkedPlaces>();
            window += kWindowBlocks;
        } while (window < seen);
        if (!exists) return;
    }
}

// Walks the marks of one item after the other, ascending; one thread. An item's windows are given
// back as the walk leaves them, the last one when next() says kNowhere.
class MarkedSpans {
public:
    __device__ __forceinline__ explicit MarkedSpans(Shared& shared) : shared_(shared) {}

    // The next item's.
    __device__ __forceinline__ const Work& begin(int block_size) {
        open();
        const Work& work = shared_.marked[at_.place].work;
        size_ = block_size;
        end_ = work.queries.visible_end;
        position_ = 0;
        return work;
    }
    // First position of the next `span` tokens, or kNowhere.
    __device__ __forceinline__ int next(int span) {
        if ((position_ & (size_ - 1)) == 0 || position_ >= end_) {
            while (word_ == 0) {
                Marked& window = shared_.marked[at_.place];
                if (index_ == window.num_words) {
                    const bool was_last = window.is_last;
                    ptx::arrive(&shared_.can_mark[at_.place]);
                    at_.advance<kMarkedPlaces>();
                    if (was_last) return kNowhere;
                    open();
                    continue;
                }
                word_ = window.bits[index_];
                first_ = window.first_block + 32 * index_++;
            }
            position_ = (first_ + __ffs(static_cast<int>(word_)) - 1) * size_;
            word_ &= word_ - 1;
        }
        const int found = position_;
        position_ += span;
        return found;
    }

private:
    __device__ __forceinline__ void open() {
        ptx::wait_for_phase(&shared_.is_marked[at_.place], at_.phase);
        index_ = 0;
        word_ = 0;
    }

    Shared& shared_;
    RingPlace at_;
    int size_ = 0, end_ = 0;
    int index_ = 0, first_ = 0;  // the bitmap's next word; block of bit 0 of the one before
    uint32_t word_ = 0;          // what is left of it
    int position_ = 0;           // the next, unless the block is done
};

// Has queries, keys and values of every item copied; one thread.
template <typename Own>
__device__ __forceinline__ void load_items(const Operands& o, Shared& shared,
                                           unsigned char* queries, unsigned char* ring) {
    const BlockGrid& g = o.p.grid;
    const int block_size = static_cast<int>(g.kv_block_size);
    const int span = block_size < Own::kTokens ? block_size : Own::kTokens;
    const int behind = static_cast<int>(g.seqlen_k);  // no token is there
    MarkedSpans kept(shared);
    RingPlace query, at;
    int number = 0;  // of the tile
    for (;;) {
        const Work& work = kept.begin(block_size);
        ptx::wait_for_phase(&shared.can_query[query.place], query.phase ^ 1u);
        Item& item = shared.items[query.place];
        item.work = work;
        const int row = work.queries.row, kv_head = work.queries.kv_head;
        const bool exists = work.item >= 0;
        int next = kept.next(span);  // gives `work` back where there is nothing
        item.has_tiles = next != kNowhere;
        ptx::Barrier* const has_queries = &shared.has_queries[query.place];
        if (next == kNowhere) {
            ptx::arrive(has_queries);
        } else {
            ptx::arrive_expecting(has_queries, Own::kQueryBytes);
            for (int panel = 0; panel < Own::kPanels; ++panel)
                ptx::copy_box(queries + query.place * Own::kQueryBytes +
                                  panel * (Own::kRows * kPanelRowBytes),
                              o.queries, panel * kPanelChannels, item.work.begin,
                              item.work.queries.head, row, has_queries);
        }
        query.advance<Own::kQueryPlaces>();
        if (!exists) return;

        const auto load = [&](const TensorMap& from, const Tile& tile) {
            ptx::Barrier* const is_full = &shared.is_full[at.place];
            unsigned char* const to = ring + at.place * Own::kTileBytes;
            ptx::arrive_expecting(is_full, Own::kTileBytes);
            for (int token = 0; token < Own::kTokens; token += span) {
                const int first = tile.first[token / kSpanTokens];
                for (int panel = 0; panel < Own::kPanels; ++panel)
                    ptx::copy_box(to + (panel * Own::kTokens + token) * kPanelRowBytes, from,
                                  panel * kPanelChannels, first == kNowhere ? behind : first,
                                  kv_head, row, is_full);
            }
            at.advance<Own::kPlaces>();
        };
        const auto make_room = [&] {
            ptx::wait_for_phase(&shared.is_empty[at.place], at.phase ^ 1u);
        };
        if (next == kNowhere) continue;
        for (bool is_first = true; next != kNowhere; is_first = false) {
            make_room();  // and nobody reads the entry of the tile kTilePlaces before any more
            Tile& tile = shared.tiles[number % kTilePlaces];
            for (int token = 0; token < Own::kTokens; token += span) {
                for (int i = 0; i < span; i += kSpanTokens)
                    tile.first[(token + i) / kSpanTokens] = next == kNowhere ? kNowhere : next + i;
                if (next != kNowhere) next = kept.next(span);
            }
            tile.is_last = next == kNowhere;
            load(o.keys, tile);
            if (!is_first) {
                make_room();
                load(o.values, shared.tiles[(number - 1) % kTilePlaces]);
            }
            ++number;
        }
        make_room();
        load(o.values, shared.tiles[(number - 1) % kTilePlaces]);
    }
}

// --- who computes

// One warpgroup's part: 64 queries of each item.
template <typename T, int kHeadDim, int kGroups>
class Computer {
    using Own = Plan<kHeadDim, kGroups>;
    static constexpr bool kBFloat = std::is_same_v<T, BFloat>;
    static constexpr int kTokens = Own::kTokens, kLogits = kTokens / 2, kSums = kHeadDim / 2;
    static constexpr int kThreads = kGroups * kGroupThreads;  // that compute
    static constexpr int kChunks = Own::kTileBytes / 16;      // of a tile

public:
    __device__ __forceinline__ Computer(const Operands& o, Shared& shared, unsigned char* queries,
                                        unsigned char* ring, int group)
        : o_(o), shared_(shared), queries_(queries), ring_(ring), group_(group) {}

    __device__ __forceinline__ void run() {
        const BlockGrid& g = o_.p.grid;
        plain_ = g.softcap == 0.f && g.softmax_scale > 0.f;
        factor_ = plain_ ? g.softmax_scale * kLog2E : 1.f;
        if (kGroups == 2 && group_ == 1) pass_turn();
        for (;;) {
            ptx::wait_for_phase(&shared_.has_queries[query_.place], query_.phase);
            const Item& item = shared_.items[query_.place];
            if (item.work.item < 0) break;
            if (item.has_tiles)
                attend(item.work);
            else
                write_nothing(item.work);
            give_back(&shared_.can_query[query_.place]);
            query_.template advance<Own::kQueryPlaces>();
        }
        if (kGroups == 2 && group_ == 0) take_turn();  // the one that nobody took
    }

private:
    static __device__ __forceinline__ int thread() {  // of the warpgroup
        return static_cast<int>(threadIdx.x) % kGroupThreads;
    }
    // This thread's rows of the thread block's are row(0) and row(1).
    __device__ __forceinline__ int row(int which) const {
        return group_ * kProductRows + share_row(thread(), 2 * which);
    }

    // A column that nothing is kept for: what is derived from it does not lie in registers
    // meanwhile.
    static __device__ __forceinline__ int fresh_column() {
        int column = share_column(thread(), 0);
        ptx::forget(column);
        return column;
    }

    // A place of a ring, by every warp.
    __device__ __forceinline__ void give_back(ptx::Barrier* barrier) const {
        __syncwarp();
        if (threadIdx.x % kWarpSize == 0) ptx::arrive(barrier);
    }
    __device__ __forceinline__ void take_turn() const {
        if (kGroups == 2) ptx::meet_at(kTurnBarrier + group_, 2 * kGroupThreads);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (kGroups == 2) ptx::pass_by(kTurnBarrier + 1 - group_, 2 * kGroupThreads);
    }

    __device__ __forceinline__ void wait_for_tile(const RingPlace& at) const {
        ptx::wait_for_phase(&shared_.is_full[at.place], at.phase);
    }

    // Logits of the keys at a place.
    __device__ __forceinline__ void begin_logits(int place) {
        const uint32_t own = ptx::shared_address(queries_) +
                             static_cast<uint32_t>(query_.place * Own::kQueryBytes +
                                                   group_ * kProductRows * kPanelRowBytes);
        const uint32_t keys =
            ptx::shared_address(ring_) + static_cast<uint32_t>(place * Own::kTileBytes);
        const uint64_t a = operand_descriptor(own, 16), b = operand_descriptor(keys, 16);
#pragma unroll
        for (int step = 0; step < kHeadDim / kProductDepth; ++step)
            ptx::multiply_tiles<kBFloat>(logits_, a + step_along_channels(Own::kRows, step),
                                         b + step_along_channels(kTokens, step), step > 0);
        ptx::end_products();
    }
    // Adds the products of the weights and the values at a place to the sums.
    __device__ __forceinline__ void begin_sums(int place) {
        const uint32_t values =
            ptx::shared_address(ring_) + static_cast<uint32_t>(place * Own::kTileBytes);
        const uint64_t b = operand_descriptor(values, kTokens * kPanelRowBytes);
#pragma unroll
        for (int part = 0; part < Own::kParts; ++part)
#pragma unroll
            for (int step = 0; step < kTokens / kProductDepth; ++step)
                ptx::multiply_by_rows<kBFloat>(
                    sums_[part], weights_[step],
                    b + step_along_rows(step) +
                        (part * Own::kPartChannels / kPanelChannels * kTokens * kPanelRowBytes >>
                         4));
        ptx::end_products();
    }
    // What products read and write is as the code before them left it.
    __device__ __forceinline__ void settle() {
        ptx::keep_in_place(logits_);
        ptx::keep_in_place(weights_);
#pragma unroll
        for (int part = 0; part < Own::kParts; ++part) ptx::keep_in_place(sums_[part]);
    }

    // Logits become weights 2^(logit - peak); rescale_: what the sums of the tiles before are
    // multiplied by.
    __device__ __forceinline__ void weigh(const Tile& tile, bool is_partial) {
        if (!plain_) {
            const float scale = o_.p.grid.softmax_scale * kLog2E, cap = o_.p.grid.softcap;
#pragma unroll
            for (int i = 0; i < kLogits; ++i) logits_[i] = soft_capped(logits_[i] * scale, cap);
        }
        if (is_partial) {
            const int column = fresh_column();
#pragma unroll
            for (int i = 0; i < kLogits; ++i) {
                const int at = share_column(0, i);  // of the tile, but for the thread's column
                if (tile.first[at / kSpanTokens] + at % kSpanTokens + column >= limit_[i % 4 / 2])
                    logits_[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            float top = -INFINITY;
#pragma unroll
            for (int i = 2 * which; i < kLogits; i += 4)
                top = fmaxf(top, fmaxf(logits_[i], logits_[i + 1]));
            top = fmaxf(peak_[which], reduce_max<4>(top) * factor_);
            const float base = top == -INFINITY ? 0.f : top;
            rescale_[which] = ptx::exp2_approximate(peak_[which] - base);
            peak_[which] = top;
            float sum = 0.f;
#pragma unroll
            for (int i = 2 * which; i < kLogits; i += 4)
#pragma unroll
                for (int j = i; j < i + 2; ++j) {
                    logits_[j] = ptx::exp2_approximate(fmaf(logits_[j], factor_, -base));
                    sum += logits_[j];
                }
            total_[which] = fmaf(total_[which], rescale_[which], sum);
        }
    }
    // Once the products that read the weights before are done.
    __device__ __forceinline__ void set_weights() {
#pragma unroll
        for (int part = 0; part < Own::kParts; ++part)
#pragma unroll
            for (int i = 0; i < kSums / Own::kParts; ++i) sums_[part][i] *= rescale_[i % 4 / 2];
#pragma unroll
        for (int step = 0; step < kTokens / kProductDepth; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights_[step][i] =
                    packed(logits_[8 * step + 2 * i], logits_[8 * step + 2 * i + 1], T{});
    }

    // Values at a place that are not finite are added to the sums of queries that see them,
    // whatever they weigh, and become 0. By all who compute, while no product is under way.
    __device__ __forceinline__ void search_values(const RingPlace& at, const Tile& tile,
                                                  int visible_end) {
        wait_for_tile(at);
        unsigned char* const values = ring_ + at.place * Own::kTileBytes;
        const int begin = group_ * kGroupThreads + thread();
        bool found = false;
        for (int i = begin; i < kChunks; i += kThreads)
            found = found || any_nonfinite<T>(*reinterpret_cast<const uint4*>(values + 16 * i));
        if (ptx::any_at(kSearchBarrier, kThreads, found)) {
            add_nonfinite(values, tile, visible_end);
            ptx::meet_at(kSearchBarrier, kThreads);
            for (int i = begin; i < Own::kTileBytes / 2; i += kThreads) {
                T* element = reinterpret_cast<T*>(values) + i;
                if (!is_finite(to_float(*element))) *element = T{};
            }
            ptx::leave_to_async();
            ptx::meet_at(kSearchBarrier, kThreads);
        }
    }
    __device__ __forceinline__ void add_nonfinite(const unsigned char* values, const Tile& tile,
                                                  int visible_end) {
#pragma unroll 1
        for (int token = 0; token < kTokens; ++token) {
            const int position = tile.first[token / kSpanTokens] + token % kSpanTokens;
            if (position >= visible_end) continue;
            const int column = fresh_column();
#pragma unroll
            for (int part = 0; part < Own::kParts; ++part)
#pragma unroll
                for (int i = 0; i < kSums / Own::kParts; ++i) {
                    const int channel = part * Own::kPartChannels + share_column(0, i) + column;
                    T own;
                    memcpy(&own, values + element_offset(kTokens, token, channel), sizeof own);
                    const float x = to_float(own);
                    if (!is_finite(x) && position < limit_[i % 4 / 2]) sums_[part][i] += x;
                }
        }
    }

    __device__ __forceinline__ void attend(const Work& work) {
        const int all_see = work.queries.limit(0), visible_end = work.queries.visible_end;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            limit_[which] = work.queries.limit(row(which));
            peak_[which] = -INFINITY;
            total_[which] = 0.f;
        }
#pragma unroll
        for (int part = 0; part < Own::kParts; ++part)
#pragma unroll
            for (int i = 0; i < kSums / Own::kParts; ++i) sums_[part][i] = 0.f;
        const auto is_partial = [&](const Tile& tile) {
            return tile.first[Own::kGranules - 1] + kSpanTokens > all_see;
        };

        const Tile* tile = &shared_.tiles[number_++ % kTilePlaces];
        wait_for_tile(at_);
        settle();
        ptx::begin_products();
        begin_logits(at_.place);
        ptx::wait_for_products<0>();
        settle();
        give_back(&shared_.is_empty[at_.place]);
        at_.template advance<Own::kPlaces>();
        bool partial = is_partial(*tile);
        weigh(*tile, partial);
        set_weights();

        while (!tile->is_last) {
            const RingPlace keys = at_;
            RingPlace values = at_;
            values.template advance<Own::kPlaces>();
            if (partial) search_values(values, *tile, visible_end);
            take_turn();
            wait_for_tile(keys);
            settle();
            ptx::begin_products();
            begin_logits(keys.place);
            wait_for_tile(values);
            ptx::begin_products();
            begin_sums(values.place);
            pass_turn();
            ptx::wait_for_products<1>();
            ptx::keep_in_place(logits_);
            give_back(&shared_.is_empty[keys.place]);
            tile = &shared_.tiles[number_++ % kTilePlaces];
            partial = is_partial(*tile);
            // Two calls, and so a branch: in straight-line code ptxas moves the wait for the sums
            // in front of the softmax that is to run beside them.
            if (partial)
                weigh(*tile, true);
            else
                weigh(*tile, false);
            ptx::wait_for_products<0>();
            settle();
            give_back(&shared_.is_empty[values.place]);
            set_weights();
            at_ = values;
            at_.template advance<Own::kPlaces>();
        }

        if (partial) search_values(at_, *tile, visible_end);
        wait_for_tile(at_);
        settle();
        ptx::begin_products();
        begin_sums(at_.place);
        ptx::wait_for_products<0>();
        settle();
        give_back(&shared_.is_empty[at_.place]);
        at_.template advance<Own::kPlaces>();
        write(work);
    }

    // Where row `row` of the item begins, in elements of `out` and in numbers of `lse`.
    __device__ __forceinline__ int64_t lse_at(const Work& work, int row) const {
        const BlockGrid& g = o_.p.grid;
        return (int64_t{work.queries.row} * g.seqlen_q + work.begin + row) * g.num_q_heads +
               work.queries.head;
    }
    // Results, by way of the warp's own rows of queries, so that they are written in whole lines.
    __device__ __forceinline__ void write(const Work& work) {
        unsigned char* const staged = queries_ + query_.place * Own::kQueryBytes;
        ptx::meet_at(kGroupBarrier + group_, kGroupThreads);  // nobody multiplies queries any more
        const int column = fresh_column();
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const float sum = reduce_add<4>(total_[which]);
            const bool empty = sum == 0.f || row(which) >= work.queries.count;
            const float weight = empty ? 0.f : 1.f / sum;
            if (column == 0 && row(which) < work.size)
                o_.p.lse[lse_at(work, row(which))] =
                    empty ? -INFINITY : (peak_[which] + log2f(sum)) * kLn2;
#pragma unroll
            for (int part = 0; part < Own::kParts; ++part)
#pragma unroll
                for (int i = 2 * which; i < kSums / Own::kParts; i += 4) {
                    const int channel = part * Own::kPartChannels + share_column(0, i) + column;
                    const uint32_t pair = packed(empty ? 0.f : sums_[part][i] * weight,
                                                 empty ? 0.f : sums_[part][i + 1] * weight, T{});
                    memcpy(staged + element_offset(Own::kRows, row(which), channel), &pair,
                           sizeof pair);
                }
        }
        __syncwarp();
        const int lane = thread() % kWarpSize, head_dim = static_cast<int>(o_.p.grid.head_dim);
        const int first = row(0) - lane / 4, chunks = head_dim / 8;
        for (int i = lane; i < 16 * chunks; i += kWarpSize) {
            const int own = first + i / chunks, channel = i % chunks * 8;
            if (own >= work.size) break;
            *reinterpret_cast<uint4*>(static_cast<T*>(o_.p.out) + lse_at(work, own) * head_dim +
                                      channel) =
                *reinterpret_cast<const uint4*>(staged + element_offset(Own::kRows, own, channel));
        }
        ptx::leave_to_async();
    }
    __device__ __forceinline__ void write_nothing(const Work& work) const {
        const int head_dim = static_cast<int>(o_.p.grid.head_dim), chunks = head_dim / 8;
        const int begin = group_ * kGroupThreads + thread();
        for (int i = begin; i < work.size; i += kThreads) o_.p.lse[lse_at(work, i)] = -INFINITY;
        for (int i = begin; i < work.size * chunks; i += kThreads)
            *reinterpret_cast<uint4*>(static_cast<T*>(o_.p.out) +
                                      lse_at(work, i / chunks) * head_dim + i % chunks * 8) =
                make_uint4(0, 0, 0, 0);
    }

    const Operands& o_;
    Shared& shared_;
    unsigned char *queries_, *ring_;
    int group_;
    RingPlace query_, at_;
    int number_ = 0;  // of the tile
    bool plain_ = true;
    float factor_ = 1.f;
    int limit_[2];
    float peak_[2], total_[2], rescale_[2];
    float logits_[kLogits] = {};
    uint32_t weights_[kTokens / kProductDepth][4] = {};
    float sums_[Own::kParts][kSums / Own::kParts] = {};
};

template <typename T, int kHeadDim, int kGroups>
__global__ void __launch_bounds__(Plan<kHeadDim, kGroups>::kThreads,
                                  Plan<kHeadDim, kGroups>::kBlocksPerSm)
    attend_blocks_sm90a_kernel(const __grid_constant__ Operands o) {
    using Own = Plan<kHeadDim, kGroups>;
    __shared__ Shared shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    auto* const dynamic = static_cast<unsigned char*>(ptx::dynamic_shared_memory());
    unsigned char* const queries =
        dynamic + (kTurnBytes - ptx::shared_address(dynamic) % kTurnBytes) % kTurnBytes;
    unsigned char* const ring = queries + Own::kQueryPlaces * Own::kQueryBytes;
    // The same for all of a warp, which the compiler does not know.
    const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
    if (threadIdx.x == 0) {
        constexpr int kComputingWarps = kGroups * kGroupThreads / kWarpSize;
        for (int i = 0; i < kMarkedPlaces; ++i) {
            ptx::init_barrier(&shared.is_marked[i], 1);
            ptx::init_barrier(&shared.can_mark[i], 1);
        }
        for (int i = 0; i < Own::kQueryPlaces; ++i) {
            ptx::init_barrier(&shared.has_queries[i], 1);
            ptx::init_barrier(&shared.can_query[i], kComputingWarps);
        }
        for (int i = 0; i < Own::kPlaces; ++i) {
            ptx::init_barrier(&shared.is_full[i], 1);
            ptx::init_barrier(&shared.is_empty[i], kComputingWarps);
        }
        ptx::publish_barriers();
    }
    __syncthreads();
    if (group == 0) {
        if constexpr (Own::kMovesRegisters) ptx::give_registers<Own::kLoaderRegisters>();
        if (warp == 0) {
            if (threadIdx.x == 0) load_items<Own>(o, shared, queries, ring);
        } else if (warp == 1) {
            mark_items(o, shared);
        }
    } else {
        if constexpr (Own::kMovesRegisters) ptx::take_registers<Own::kComputerRegisters>();
        Computer<T, kHeadDim, kGroups>(o, shared, queries, ring, group - 1).run();
    }
}

// --- launcher

int64_t num_items(const BlockGrid& g) { return g.batch * g.num_q_heads * g.num_q_blocks(); }

bool is_ordered(const BlockGrid& g) {
    return num_items(g) <= kMostOrderedItems && g.num_kv_blocks() > 0;
}

constexpr int64_t kCounterBytes = 16;

template <typename T, int kHeadDim, int kGroups>
void attend(const Operands& o, int64_t num_sms, const CudaLaunch& where) {
    using Own = Plan<kHeadDim, kGroups>;
    const int64_t fit = num_sms * Own::kBlocksPerSm, items = o.schedule.num_items;
    launch_with(where, attend_blocks_sm90a_kernel<T, kHeadDim, kGroups>, fit < items ? fit : items,
                1, Own::kThreads, Own::kSharedBytes, Own::kSharedBytes, o);
}

template <typename T, int kHeadDim>
void attend(const Operands& o, int64_t num_sms, const CudaLaunch& where) {
    if (o.p.grid.q_block_size == 128) return attend<T, kHeadDim, 2>(o, num_sms, where);
    attend<T, kHeadDim, 1>(o, num_sms, where);
}

template <typename T>
void attend(const Operands& o, int64_t num_sms, const CudaLaunch& where) {
    if (o.p.grid.head_dim <= 64)
        attend<T, 64>(o, num_sms, where);
    else if (o.p.grid.head_dim <= 128)
        attend<T, 128>(o, num_sms, where);
    else
        attend<T, 256>(o, num_sms, where);
}

int tile_tokens(const BlockGrid& g) {
    const bool both = g.q_block_size == 128;
    if (g.head_dim <= 64) return both ? Plan<64, 2>::kTokens : Plan<64, 1>::kTokens;
    if (g.head_dim <= 128) return both ? Plan<128, 2>::kTokens : Plan<128, 1>::kTokens;
    return both ? Plan<256, 2>::kTokens : Plan<256, 1>::kTokens;
}

int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    KVS_CUDA_CHECK(cudaGetDevice(&device));
    KVS_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

}  // namespace

int64_t block_sparse_attention_sm90a_workspace_bytes(const BlockSparseAttentionParams& p) {
    const bool counts = p.mask.form != MaskForm::kCsr;
    return kCounterBytes + (is_ordered(p.grid) ? (counts ? 8 : 4) * num_items(p.grid) : 0);
}

void require_block_sparse_attention_sm90a(const BlockSparseAttentionParams& p) {
    const BlockGrid& g = p.grid;
    const int major = attribute(cudaDevAttrComputeCapabilityMajor),
              minor = attribute(cudaDevAttrComputeCapabilityMinor);
    KVS_CHECK(major == 9 && minor == 0, "implementation: got 'sm90a' on a GPU of architecture sm_",
              major, minor, ", allowed: sm_90");
    KVS_CHECK(g.dtype != DType::kFloat32,
              "q: got float32, allowed: float16 or bfloat16 "
              "(implementation 'sm90a')");
    KVS_CHECK(g.head_dim >= 64 && g.head_dim <= 256, "head_dim: got ", g.head_dim,
              ", allowed: 64 to 256 (implementation 'sm90a')");
    KVS_CHECK(g.q_block_size >= 64, "q_block_size: got ", g.q_block_size,
              ", allowed: 64, 128 (implementation 'sm90a')");
    KVS_CHECK(rows_are_aligned(g.dtype, g.q, g.q_strides[0], g.q_strides[1], g.q_strides[2]),
              "q: got rows off 16-byte boundaries, allowed: rows that begin at multiples of 16 "
              "bytes (implementation 'sm90a')");
}

void block_sparse_attention_sm90a(const BlockSparseAttentionParams& p, void* workspace,
                                  const CudaLaunch& where) {
    const BlockGrid& g = p.grid;
    const int64_t items = num_items(g);
    if (items == 0) return;
    KVS_CHECK(items < kMaxGridX, "grid: got ", items,
              " q blocks of all rows and heads, allowed: "
              "fewer than ",
              kMaxGridX);
    Operands o{};
    o.p = p;
    o.schedule.next = static_cast<int*>(workspace);
    o.schedule.num_items = static_cast<int>(items);
    if (is_ordered(g)) {
        auto* const order =
            reinterpret_cast<int32_t*>(static_cast<unsigned char*>(workspace) + kCounterBytes);
        const bool counts = p.mask.form != MaskForm::kCsr;
        int32_t* const lengths = counts ? order + items : nullptr;
        if (counts)
            launch(where, count_kept_kernel, ceil_div(items, kCountThreads / kWarpSize), 1,
                   kCountThreads, 0, g, p.mask, o.schedule.num_items, lengths);
        launch(where, order_by_length_kernel, 1, 1, kOrderThreads, 0,
               counts ? nullptr : p.mask.row_offsets, lengths, o.schedule.num_items,
               static_cast<int>(g.num_kv_blocks()), o.schedule.next, order);
        o.schedule.order = order;
    } else {
        KVS_CUDA_CHECK(cudaMemsetAsync(o.schedule.next, 0, sizeof(int), where.stream));
    }
    const int rows = static_cast<int>(g.q_block_size);
    o.queries = make_tensor_map("q",
                                {g.dtype, g.q, g.head_dim, g.seqlen_q, g.num_q_heads, g.batch,
                                 g.q_strides[1], g.q_strides[2], g.q_strides[0]},
                                rows);
    const auto of_cache = [&](const char* name, const KVView& view, int span) {
        return make_tensor_map(name,
                               {g.dtype, view.data, g.head_dim, g.seqlen_k, g.num_kv_heads, g.batch,
                                view.token_stride, view.head_stride, view.page_stride},
                               span);
    };
    with_element_type(g.dtype, [&](auto element) {
        using T = decltype(element);
        if constexpr (!std::is_same_v<T, float>) {
            // Boxes are of one KV block, or of what fits a tile.
            const int most = tile_tokens(g);
            const int span = static_cast<int>(g.kv_block_size < most ? g.kv_block_size : most);
            // Without a token there is nothing to map, and nobody asks.
            o.keys = g.seqlen_k > 0 ? of_cache("k", g.keys, span) : o.queries;
            o.values = g.seqlen_k > 0 ? of_cache("v", p.values, span) : o.queries;
            attend<T>(o, attribute(cudaDevAttrMultiProcessorCount), where);
        }
    });
}

}  // namespace kvselect::cuda
