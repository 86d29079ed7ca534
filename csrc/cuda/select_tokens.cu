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
//                       and how many tokens of it are kept. Not needed where score_tokens counted
//                       while it voted (`ranking`).
//          2 border     The bin's tokens are packed in order into room for the whole chunk, and
//                       each chunk counts what lies above. The last block refines the border over
//                       the packed ones, 8 bits at a time, down to equal keys; then it knows every
//                       chunk's count, hence its place in the list and its share of the ties.
//          3 write      Each chunk writes its kept positions at its place, and its share of the
//                       padding; the last one adds the chunks' sums, in their order.
//          With pool_width > 1 the key is (pooled score, own score): 64 bits, the same steps.
//          Chunks count from position 0, so no bit depends on the grid.
#include "kvselect/select_tokens.h"

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/ranking.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = kRankingWarps, kThreads = kRankingThreads;
constexpr int kChunkTokens = 4096;
constexpr int kDigitBits = 8, kDigitBins = 1 << kDigitBits;
static_assert(kDigitBins % kThreads == 0, "threads have whole bins");

// Memory of all lists.
struct Workspace {
    int64_t num_chunks;
    Ranking* ranking;     // [lists] zeroed, or as score_tokens left it
    int32_t* num_above;   // [lists, num_chunks] always listed or above the border's bin
    int32_t* num_border;  // [lists, num_chunks] tokens in the border's bin
    int32_t* place;       // [lists, num_chunks] where the chunk's positions begin in the list
    int32_t* tie_share;   // [lists, num_chunks] ties that the chunk keeps
    double* sum;          // [lists, num_chunks] of the kept scores
    int32_t*
        border_index;  // [lists, num_chunks * 4096] positions in the border's bin, chunk by chunk
};

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

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const SelectTokensParams p, const Workspace w) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const List list(p, blockIdx.x / w.num_chunks);
    const int64_t begin = blockIdx.x % w.num_chunks * kChunkTokens;
    if (list.hit) return;
    TopCounts counts;
    counts.clear();
    for (int i = static_cast<int>(threadIdx.x); i < kChunkTokens; i += kThreads)
        if (list.kind(begin + i) == Token::kCandidate)
            counts.add(static_cast<uint32_t>(list.key(begin + i, p.pool_width) >> 32));
    counts.finish(w.ranking[list.number], w.num_chunks, p.keep);
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
    ListState& state = w.ranking[list.number].state;
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
    ListState& state = w.ranking[list.number].state;
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
    if (!is_last_block(&state.tickets[2], w.num_chunks) || thread != 0) return;
    double all = 0.0;  // of the chunks, in their order
    for (int64_t c = 0; c < w.num_chunks; ++c)
        all += __ldcg(&w.sum[list.number * w.num_chunks + c]);
    p.kept_score[list.number] = static_cast<float>(all);
}

int64_t num_lists_of(const SelectTokensParams& p) {
    return p.blocks.batch * p.blocks.num_blocks * p.num_lists;
}
int64_t num_chunks_of(const SelectTokensParams& p) {
    return p.max_seqlen_k > 0 ? ceil_div(p.max_seqlen_k, kChunkTokens) : 1;
}
int64_t ranking_bytes(const SelectTokensParams& p) {
    return p.ranking ? 0 : num_lists_of(p) * static_cast<int64_t>(sizeof(Ranking));
}

}  // namespace

int64_t select_tokens_workspace_bytes(const SelectTokensParams& p) {
    const int64_t chunks = num_lists_of(p) * num_chunks_of(p);
    return ranking_bytes(p) + chunks * (8 + 4 * 4 + 4 * int64_t{kChunkTokens});
}

void select_tokens(const SelectTokensParams& p, void* workspace, const CudaLaunch& where) {
    const int64_t lists = num_lists_of(p);
    Workspace w{};
    w.num_chunks = num_chunks_of(p);
    const int64_t chunks = lists * w.num_chunks;
    uint8_t* memory = static_cast<uint8_t*>(workspace);
    w.ranking = reinterpret_cast<Ranking*>(p.ranking ? static_cast<void*>(p.ranking) : workspace);
    w.sum = reinterpret_cast<double*>(memory + ranking_bytes(p));
    w.num_above = reinterpret_cast<int32_t*>(w.sum + chunks);
    w.num_border = w.num_above + chunks;
    w.place = w.num_border + chunks;
    w.tie_share = w.place + chunks;
    w.border_index = w.tie_share + chunks;
    if (lists == 0) return;
    if (!p.ranking) {
        const size_t num_bytes = static_cast<size_t>(ranking_bytes(p));
        KVS_CUDA_CHECK(cudaMemsetAsync(workspace, 0, num_bytes, where.stream));
        // A memory operation is no kernel to overlap with.
        const CudaLaunch alone{where.stream, false};
        launch(alone, histogram_kernel, chunks, 1, kThreads, 0, p, w);
    }
    launch(where, border_kernel, chunks, 1, kThreads, 0, p, w);
    launch(where, write_kernel, chunks, 1, kThreads, 0, p, w);
}

}  // namespace kvselect::cuda
