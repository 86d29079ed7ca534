// select_tokens: exact top-k by counting, written out in position order. No sort, and no buffer
// that could overflow: 16,385 ties at the border cost time, never tokens.
//
// Problem  the `keep` best of `count` scores by (score descending, position ascending), written
//          ascending between sinks and recent tokens
// Floor    4 bytes per candidate read from L2: 4 MB for 8 lists of 128K, under 1 us; so what counts
//          is launches.
// Plan     A list is cut into chunks of 4096 positions, one thread block each; the last block to
//          finish a list's stage (by a ticket, nobody waits for another) does what needs the whole
//          list.
//          1 histogram  of the top 12 bits of the order-preserving key, in shared memory, then
//                       added up per list. The last block finds the bin in which the border lies,
//                       and how many tokens of it are kept.
//          2 border     The bin's tokens are packed in order into room for the whole chunk, and
//                       each chunk counts what lies above. The last block refines the border over
//                       the packed ones, 8 bits at a time, down to equal keys; then it knows every
//                       chunk's count, hence its place in the list and its share of the ties.
//          3 write      Each chunk writes its kept positions at its place; block 0 the padding and
//                       the sum.
//          With pool_width > 1 the key is (pooled score, own score): 64 bits, the same steps.
//          Chunks count from position 0, so no bit depends on the grid.
#include "kvselect/select_tokens.h"

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kChunkTokens = 4096;
constexpr int kTopBits = 12, kTopBins = 1 << kTopBits, kDigitBits = 8, kDigitBins = 1 << kDigitBits;

struct ListState {
    uint64_t border;   // keys above it are kept, and of those equal to it each chunk's tie_share
    int32_t take_all;  // no more candidates than are kept
    uint32_t top_bin;  // bin of the border's top bits
    int32_t in_bin;    // how many of that bin's tokens are kept
    uint32_t tickets[2];
    uint32_t unused;
};
static_assert(sizeof(ListState) % 8 == 0, "the doubles behind the lists are aligned");

// Memory of all lists, zeroed where marked.
struct Workspace {
    int64_t num_chunks;
    ListState* state;     // [lists] tickets zeroed
    uint32_t* histogram;  // [lists, 4096] zeroed
    int32_t* num_above;   // [lists, num_chunks] always listed or above the border's bin
    int32_t* num_border;  // [lists, num_chunks] tokens in the border's bin
    int32_t* place;       // [lists, num_chunks] where the chunk's positions begin in the list
    int32_t* tie_share;   // [lists, num_chunks] ties that the chunk keeps
    double* sum;          // [lists, num_chunks] of the kept scores
    int32_t*
        border_index;  // [lists, num_chunks * 4096] positions in the border's bin, chunk by chunk
};

// Order-preserving map of floats that are not NaN to unsigned integers; -0 and 0 are equal.
__device__ __forceinline__ uint32_t order_key(float value) {
    const uint32_t bits = __float_as_uint(value + 0.f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

enum class Token { kNone, kAlways, kCandidate };  // not listed in any case; listed; ranked

// One list.
struct List {
    int64_t number, row, block, which;
    BlockRange range;
    const float* scores;
    bool hit;

    __device__ List(const SelectTokensParams& p, int64_t number) : number(number) {
        which = number % p.num_lists;
        block = number / p.num_lists % p.blocks.num_blocks;
        row = number / p.num_lists / p.blocks.num_blocks;
        range = block_range(p.blocks, row, block);
        scores = p.scores + row * p.scores_strides[0] + block * p.scores_strides[1] +
                 which * p.scores_strides[2];
        hit = p.hit && p.hit[row * p.num_lists + which] != 0;
    }
    __device__ Token kind(int64_t position) const {
        if (position < range.start || position >= range.end) return Token::kNone;
        if (!is_finite(scores[position])) return Token::kNone;
        return position >= range.sink_end && position < range.window_start ? Token::kCandidate
                                                                           : Token::kAlways;
    }
    // What a candidate ranks by: its pooled score in the upper half, its own in the lower one if
    // they can differ.
    __device__ uint64_t key(int64_t position, int64_t pool_width) const {
        const float own = scores[position];
        if (pool_width <= 1) return uint64_t{order_key(own)} << 32;
        const int64_t reach = pool_width / 2;
        const int64_t first = position - reach > range.sink_end ? position - reach : range.sink_end;
        const int64_t last =
            position + reach < range.window_start - 1 ? position + reach : range.window_start - 1;
        float top = own;
        for (int64_t i = first; i <= last; ++i)
            if (is_finite(scores[i]) && scores[i] > top) top = scores[i];
        return uint64_t{order_key(top)} << 32 | order_key(own);
    }
};

// The block that comes last; what the others wrote before is visible to it.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket, int64_t num_blocks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(num_blocks);
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Sums of `value` over the threads before this one, and over all (`total`).
__device__ __forceinline__ int exclusive_sum(int value, int* total) {
    __shared__ int of_warp[kWarps];
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize,
              warp = static_cast<int>(threadIdx.x) / kWarpSize;
    int inclusive = value;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(step));
        if (lane >= step) inclusive += before;
    }
    __syncthreads();  // of_warp may still be read
    if (lane == kWarpSize - 1) of_warp[warp] = inclusive;
    __syncthreads();
    int offset = 0, all = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp) offset += of_warp[i];
        all += of_warp[i];
    }
    *total = all;
    return offset + inclusive - value;
}

struct Bin {
    int number;
    int64_t wanted;  // how many of its tokens are
};

// Of bins counted in `counts` [num_bins], the one in which the `wanted`-th best lies. By all
// threads; `counts` may be global memory.
__device__ __forceinline__ Bin find_bin(const uint32_t* counts, int num_bins, int64_t wanted) {
    __shared__ Bin found;
    const int per_thread = num_bins / kThreads;
    // Thread 0 has the highest bins.
    const int high = num_bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
    int own = 0;
    for (int i = 0; i < per_thread; ++i) own += static_cast<int>(counts[high - i]);
    int total;
    int64_t before = exclusive_sum(own, &total);
    if (before < wanted && before + own >= wanted) {
        int i = 0;
        for (; before + counts[high - i] < wanted; ++i) before += counts[high - i];
        found = Bin{high - i, wanted - before};
    }
    __syncthreads();
    const Bin out = found;
    __syncthreads();
    return out;
}
static_assert(kTopBins % kThreads == 0 && kDigitBins % kThreads == 0, "threads have whole bins");

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const SelectTokensParams p, const Workspace w) {
    __shared__ uint32_t counts[kTopBins];
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x);
    const List list(p, blockIdx.x / w.num_chunks);
    const int64_t chunk = blockIdx.x % w.num_chunks;
    if (list.hit) return;
    ListState& state = w.state[list.number];
    for (int i = thread; i < kTopBins; i += kThreads) counts[i] = 0;
    __syncthreads();
    const int64_t begin = chunk * kChunkTokens;
    for (int i = thread; i < kChunkTokens; i += kThreads)
        if (list.kind(begin + i) == Token::kCandidate)
            atomicAdd(&counts[list.key(begin + i, p.pool_width) >> (64 - kTopBits)], 1u);
    __syncthreads();
    uint32_t* all = w.histogram + list.number * kTopBins;
    for (int i = thread; i < kTopBins; i += kThreads)
        if (counts[i] > 0) atomicAdd(&all[i], counts[i]);
    if (!is_last_block(&state.tickets[0], w.num_chunks)) return;

    int own = 0, num_candidates;
    for (int i = thread; i < kTopBins; i += kThreads) own += static_cast<int>(__ldcg(&all[i]));
    exclusive_sum(own, &num_candidates);
    const bool take_all = num_candidates <= p.keep;
    Bin bin{kTopBins, 0};  // no token is in that one
    if (!take_all && p.keep > 0) bin = find_bin(all, kTopBins, p.keep);
    if (thread == 0) {
        state.take_all = take_all;
        state.top_bin = static_cast<uint32_t>(bin.number);
        state.in_bin = static_cast<int32_t>(bin.wanted);
    }
}

__global__ void __launch_bounds__(kThreads, 2)
    border_kernel(const SelectTokensParams p, const Workspace w) {
    __shared__ uint32_t counts[kDigitBins];
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const List list(p, blockIdx.x / w.num_chunks);
    const int64_t chunk = blockIdx.x % w.num_chunks;
    if (list.hit) return;
    ListState& state = w.state[list.number];
    const int64_t at = list.number * w.num_chunks + chunk;
    int32_t* packed = w.border_index + at * kChunkTokens;
    int num_above = 0, num_border = 0;
    for (int first = 0; first < kChunkTokens; first += kThreads) {
        const int64_t position = chunk * kChunkTokens + first + thread;
        const Token kind = list.kind(position);
        bool above = kind == Token::kAlways, border = false;
        if (kind == Token::kCandidate) {
            const uint32_t bin =
                static_cast<uint32_t>(list.key(position, p.pool_width) >> (64 - kTopBits));
            above = state.take_all || bin > state.top_bin;
            border = !state.take_all && bin == state.top_bin;
        }
        int total;
        const int place = exclusive_sum(border ? 1 : 0, &total);
        if (border) packed[num_border + place] = static_cast<int32_t>(position);
        num_border += total;
        exclusive_sum(above ? 1 : 0, &total);
        num_above += total;
    }
    if (thread == 0) {
        w.num_above[at] = num_above;
        w.num_border[at] = num_border;
    }
    if (!is_last_block(&state.tickets[1], w.num_chunks)) return;

    // Digit by digit below the top bits, over the packed tokens only.
    const int64_t first_chunk = list.number * w.num_chunks;
    const int key_bits = p.pool_width > 1 ? 64 : 32;
    uint64_t prefix = uint64_t{state.top_bin};
    int known_bits = kTopBits;
    int64_t wanted = state.in_bin;
    const bool refine = !state.take_all && wanted > 0;
    while (refine && known_bits < key_bits) {
        const int digit = key_bits - known_bits < kDigitBits ? key_bits - known_bits : kDigitBits;
        for (int i = thread; i < kDigitBins; i += kThreads) counts[i] = 0;
        __syncthreads();
        for (int64_t c = 0; c < w.num_chunks; ++c) {
            const int32_t* indices = w.border_index + (first_chunk + c) * kChunkTokens;
            const int num = __ldcg(&w.num_border[first_chunk + c]);
            for (int i = thread; i < num; i += kThreads) {
                const uint64_t key = list.key(__ldcg(&indices[i]), p.pool_width);
                if (key >> (64 - known_bits) == prefix)
                    atomicAdd(
                        &counts[key >> (64 - known_bits - digit) & ((uint64_t{1} << digit) - 1)],
                        1u);
            }
        }
        __syncthreads();
        const Bin bin = find_bin(counts, kDigitBins, wanted);
        wanted = bin.wanted;
        prefix = prefix << digit | static_cast<uint64_t>(bin.number);
        known_bits += digit;
    }
    const uint64_t border = refine ? prefix << (64 - known_bits) : ~uint64_t{0};

    // Every chunk's share: of the packed tokens those above the border, and the first `wanted`
    // ties.
    const int warp = thread / kWarpSize;
    for (int64_t c = warp; c < w.num_chunks; c += kWarps) {
        const int32_t* indices = w.border_index + (first_chunk + c) * kChunkTokens;
        const int num = refine ? __ldcg(&w.num_border[first_chunk + c]) : 0;
        int above = 0, equal = 0;
        for (int i = lane; i < num; i += kWarpSize) {
            const uint64_t key = list.key(__ldcg(&indices[i]), p.pool_width);
            above += key > border;
            equal += key == border;
        }
        above = reduce_add(above);
        equal = reduce_add(equal);
        if (lane == 0) {
            w.place[first_chunk + c] = __ldcg(&w.num_above[first_chunk + c]) + above;
            w.tie_share[first_chunk + c] = equal;
        }
    }
    __syncthreads();
    if (thread == 0) {
        int64_t ties = wanted;
        int32_t place = 0;
        for (int64_t c = 0; c < w.num_chunks; ++c) {
            const int64_t equal = w.tie_share[first_chunk + c];
            const int32_t share = static_cast<int32_t>(!refine ? 0 : (equal < ties ? equal : ties));
            const int32_t count = w.place[first_chunk + c] + share;
            w.place[first_chunk + c] = place;
            w.tie_share[first_chunk + c] = share;
            place += count;
            ties -= share;
        }
        state.border = border;
        // The caller makes lists wide enough; a reader must stay inside one that is not.
        p.topk_length[list.number] = place < p.width ? place : static_cast<int32_t>(p.width);
    }
}

__global__ void __launch_bounds__(kThreads)
    write_kernel(const SelectTokensParams p, const Workspace w) {
    __shared__ double of_warp[kWarps];
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x);
    const List list(p, blockIdx.x / w.num_chunks);
    const int64_t chunk = blockIdx.x % w.num_chunks, at = list.number * w.num_chunks + chunk;
    int32_t* indices = p.indices + list.number * p.width;
    if (list.hit) {
        if (chunk == 0 && thread == 0) {
            const int32_t length = p.topk_length[list.number];
            if (length < p.width) {  // what the caller makes sure of
                indices[length] = static_cast<int32_t>(list.range.end - 1);
                p.topk_length[list.number] = length + 1;
            }
            p.kept_score[list.number] = NAN;
        }
        return;
    }
    const ListState& state = w.state[list.number];
    int place = w.place[at], ties = w.tie_share[at];
    double sum = 0.0;
    for (int first = 0; first < kChunkTokens; first += kThreads) {
        const int64_t position = chunk * kChunkTokens + first + thread;
        const Token kind = list.kind(position);
        bool listed = kind == Token::kAlways, tie = false;
        if (kind == Token::kCandidate) {
            const uint64_t key = list.key(position, p.pool_width);
            listed = state.take_all || key > state.border;
            tie = !state.take_all && key == state.border;
        }
        int total;
        const int tie_number = exclusive_sum(tie ? 1 : 0, &total);
        if (tie && tie_number < ties) listed = true;
        ties -= total;
        const int offset = exclusive_sum(listed ? 1 : 0, &total);
        if (listed && place + offset < p.width) {  // the caller makes lists wide enough
            indices[place + offset] = static_cast<int32_t>(position);
            sum += double{list.scores[position]};
        }
        place += total;
    }
    sum = reduce_add(sum);
    if (thread % kWarpSize == 0) of_warp[thread / kWarpSize] = sum;
    __syncthreads();
    if (thread == 0) {
        double all = 0.0;
        for (int i = 0; i < kWarps; ++i) all += of_warp[i];
        w.sum[at] = all;
    }
    for (int64_t i = p.topk_length[list.number] + chunk * kThreads + thread; i < p.width;
         i += w.num_chunks * kThreads)
        indices[i] = -1;
}

// Sums of the chunks, in their order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const SelectTokensParams p, const Workspace w, int64_t num_lists) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int64_t number = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (number >= num_lists || List(p, number).hit) return;
    double sum = 0.0;
    for (int64_t c = 0; c < w.num_chunks; ++c) sum += w.sum[number * w.num_chunks + c];
    p.kept_score[number] = static_cast<float>(sum);
}

int64_t num_lists_of(const SelectTokensParams& p) {
    return p.blocks.batch * p.blocks.num_blocks * p.num_lists;
}
int64_t num_chunks_of(const SelectTokensParams& p) {
    return p.max_seqlen_k > 0 ? ceil_div(p.max_seqlen_k, kChunkTokens) : 1;
}
int64_t zeroed_bytes(int64_t lists) {
    return lists * static_cast<int64_t>(sizeof(ListState) + kTopBins * sizeof(uint32_t));
}

}  // namespace

int64_t select_tokens_workspace_bytes(const SelectTokensParams& p) {
    const int64_t lists = num_lists_of(p), chunks = lists * num_chunks_of(p);
    return zeroed_bytes(lists) + chunks * (8 + 4 * 4 + 4 * int64_t{kChunkTokens});
}

void select_tokens(const SelectTokensParams& p, void* workspace, const CudaLaunch& where) {
    const int64_t lists = num_lists_of(p);
    Workspace w{};
    w.num_chunks = num_chunks_of(p);
    const int64_t chunks = lists * w.num_chunks;
    uint8_t* memory = static_cast<uint8_t*>(workspace);
    w.state = reinterpret_cast<ListState*>(memory);
    w.histogram = reinterpret_cast<uint32_t*>(memory + lists * sizeof(ListState));
    w.sum = reinterpret_cast<double*>(memory + zeroed_bytes(lists));
    w.num_above = reinterpret_cast<int32_t*>(w.sum + chunks);
    w.num_border = w.num_above + chunks;
    w.place = w.num_border + chunks;
    w.tie_share = w.place + chunks;
    w.border_index = w.tie_share + chunks;
    if (lists == 0) return;
    KVS_CUDA_CHECK(
        cudaMemsetAsync(workspace, 0, static_cast<size_t>(zeroed_bytes(lists)), where.stream));
    // A memory operation is no kernel to overlap with.
    launch(CudaLaunch{where.stream, false}, histogram_kernel, chunks, 1, kThreads, 0, p, w);
    launch(where, border_kernel, chunks, 1, kThreads, 0, p, w);
    launch(where, write_kernel, chunks, 1, kThreads, 0, p, w);
    launch(where, sum_kernel, ceil_div(lists, kThreads), 1, kThreads, 0, p, w, lists);
}

}  // namespace kvselect::cuda
