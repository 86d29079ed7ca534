// kv_append: copy the new rows into the cache and quantise every 128-token block that they
// complete.
//
// Problem  per block and channel: lo = fp16(min), step = fp16((max - min) / levels),
//          code = clamp(round_half_even((k - lo) / step), 0, levels): the CPU's bits
// Floor    4 * head_dim * element size bytes per token and KV head (keys and values, read and
//          written) and the record, 68 bytes for int4 at head_dim 128. 128K tokens, 8 heads, bf16:
//          1.1 GB in a prompt. In decode a block is finished every 128 steps: a step is a launch.
// Plan     A thread block takes one sketch block of one row and KV head and copies the block's new
//          tokens in 16-byte chunks. If they complete the block, one thread per channel finds its
//          range over the 128 tokens in their order (which decides the sign of a zero minimum),
//          then one thread per output word codes 8 (int4) or 4 (int8) channels of a token; keys
//          come from L1 the second time. Lengths are read on the device; the grid follows num_new.
#include "kvselect/kv_append.h"

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 512;
constexpr int kBlockTokens = static_cast<int>(kSketchBlockTokens);
static_assert(kThreads == kBlockTokens, "thread t looks after token t of the block");

struct Alignment {
    bool k, v, k_cache, v_cache;
};

template <typename T>
struct Shared {
    const T* rows[kBlockTokens];  // the block's keys, old ones in the cache and new ones
    float lo[kMaxHeadDim], step[kMaxHeadDim];
    int is_bad[kBlockTokens];  // new tokens with an element that is not finite
    int unusable;              // the block can have no codes
};

// New tokens [first, last) of one head into the cache; marks those that are not finite.
template <typename T>
__device__ void copy_rows(const KvAppendParams& p, bool keys, int64_t row, int64_t kv_head,
                          int64_t first, int64_t last, const Alignment& aligned, int* is_bad) {
    const int64_t chunks = p.head_dim / kElementsPerChunk<T>;
    const int64_t* strides = keys ? p.k_strides : p.v_strides;
    const KVView& cache = keys ? p.k_cache : p.v_cache;
    const T* from = static_cast<const T*>(keys ? p.k : p.v) + row * strides[0] +
                    (first - p.seqlens_before[row]) * strides[1] + kv_head * strides[2];
    T* to = static_cast<T*>(cache.data);
    for (int64_t i = threadIdx.x; i < (last - first) * chunks; i += kThreads) {
        const int64_t token = i / chunks, d = i % chunks * kElementsPerChunk<T>;
        const uint4 chunk = load_chunk(from + token * strides[1] + d, keys ? aligned.k : aligned.v);
        store_chunk(to + cache.offset(row, first + token, kv_head) + d, chunk,
                    keys ? aligned.k_cache : aligned.v_cache);
        if (any_nonfinite<T>(chunk)) is_bad[token] = 1;  // whoever writes, writes 1
    }
}

__device__ __forceinline__ int code_of(float key, float lo, float step, float levels) {
    if (!(step > 0.f)) return 0;  // a constant channel
    return static_cast<int>(fminf(fmaxf(rintf((key - lo) / step), 0.f), levels));
}

// The record of the block whose keys lie at shared.rows.
template <typename T, SketchFormat kFormat>
__device__ void write_record(const KvAppendParams& p, bool old_and_new_aligned, uint8_t* record,
                             Shared<T>& shared) {
    constexpr float kLevels = static_cast<float>(sketch_levels(kFormat));
    uint16_t* step_out = reinterpret_cast<uint16_t*>(record);
    uint16_t* lo_out = step_out + p.head_dim;
    const int head_dim = static_cast<int>(p.head_dim);
    for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kThreads) {
        float low = to_float(shared.rows[0][d]), high = low;
        bool finite = is_finite(low);
#pragma unroll 8
        for (int t = 1; t < kBlockTokens; ++t) {
            const float key = to_float(shared.rows[t][d]);
            finite = finite && is_finite(key);
            low = key < low ? key : low;  // the first of equal ones stays: -0 and 0 are equal
            high = key > high ? key : high;
        }
        const uint16_t lo = ptx::to_half(low), step = ptx::to_half((high - low) / kLevels);
        shared.lo[d] = ptx::from_half(lo);
        shared.step[d] = ptx::from_half(step);
        if (!finite || !is_finite(shared.lo[d]) || !is_finite(shared.step[d])) shared.unusable = 1;
    }
    __syncthreads();
    const bool usable = shared.unusable == 0;
    for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += kThreads) {
        constexpr uint16_t kNaN = 0x7e00;  // in step[0]: score this block from its keys
        step_out[d] = usable ? ptx::to_half(shared.step[d]) : (d == 0 ? kNaN : uint16_t{0});
        lo_out[d] = usable ? ptx::to_half(shared.lo[d]) : uint16_t{0};
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(record + 4 * head_dim);
    constexpr int kChannels = kFormat == SketchFormat::kInt4 ? 8 : 4;  // per word
    const int lines = head_dim / kChannels;
    constexpr int kSub = static_cast<int>(kSketchSubBlockTokens);
    for (int i = static_cast<int>(threadIdx.x); i < kBlockTokens * lines; i += kThreads) {
        const int token = i / (kSub * lines) * kSub + i % kSub,
                  first = i / kSub % lines * kChannels;
        uint32_t word = 0;
        if (usable) {
            float keys[kChannels];
            const T* from = shared.rows[token] + first;
            if constexpr (kChannels % kElementsPerChunk<T> == 0) {
#pragma unroll
                for (int c = 0; c < kChannels; c += kElementsPerChunk<T>) {
                    const uint4 chunk = load_chunk(from + c, old_and_new_aligned);
#pragma unroll
                    for (int j = 0; j < kElementsPerChunk<T>; ++j)
                        keys[c + j] = element_of(chunk, j, T{});
                }
            } else {
#pragma unroll
                for (int c = 0; c < kChannels; ++c) keys[c] = to_float(from[c]);
            }
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                const uint32_t code = static_cast<uint32_t>(
                    code_of(keys[c], shared.lo[first + c], shared.step[first + c], kLevels));
                word |= code << (kFormat == SketchFormat::kInt4 ? c % 4 * 8 + c / 4 * 4 : c * 8);
            }
        }
        words[i] = word;
    }
}

template <typename T, SketchFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    kv_append_kernel(const KvAppendParams p, const Alignment aligned, int64_t blocks_per_row) {
    __shared__ Shared<T> shared;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t kv_head = blockIdx.x % p.num_kv_heads;
    const int64_t touched = blockIdx.x / p.num_kv_heads % blocks_per_row;
    const int64_t row = blockIdx.x / p.num_kv_heads / blocks_per_row;
    const int64_t before = p.seqlens_before[row];
    const int64_t wanted = before + (p.num_valid ? int64_t{p.num_valid[row]} : p.num_new);
    const int64_t after = wanted < p.capacity_tokens ? wanted : p.capacity_tokens;
    const int64_t start = p.starts ? p.starts[row] : 0;
    // Sketch blocks count from `start`; padding before it lies in blocks of negative index.
    const int64_t block =
        touched + (before >= start ? (before - start) / kBlockTokens
                                   : -((start - before + kBlockTokens - 1) / kBlockTokens));
    const int64_t begin = start + block * kBlockTokens, end = begin + kBlockTokens;
    const int64_t first = begin > before ? begin : before, last = end < after ? end : after;
    if (first >= last) return;  // the whole thread block

    shared.is_bad[thread] = 0;
    if (thread == 0) shared.unusable = 0;
    __syncthreads();
    copy_rows<T>(p, true, row, kv_head, first, last, aligned, shared.is_bad);
    copy_rows<T>(p, false, row, kv_head, first, last, aligned, shared.is_bad);
    const bool completes = kFormat != SketchFormat::kNone && block >= 0 && end <= after;
    if (completes) {
        const int64_t position = begin + thread;
        const T* old_row = static_cast<const T*>(p.k_cache.data);
        const T* new_row =
            static_cast<const T*>(p.k) + row * p.k_strides[0] + kv_head * p.k_strides[2];
        shared.rows[thread] = position < before ? old_row + p.k_cache.offset(row, position, kv_head)
                                                : new_row + (position - before) * p.k_strides[1];
    }
    __syncthreads();
    const unsigned bad = __ballot_sync(kAllLanes, shared.is_bad[thread] != 0);
    if (bad != 0 && thread % kWarpSize == 0)
        atomicAdd(
            reinterpret_cast<unsigned long long*>(p.num_nonfinite) + row * p.num_kv_heads + kv_head,
            static_cast<unsigned long long>(__popc(bad)));
    if constexpr (kFormat != SketchFormat::kNone) {
        if (completes)
            write_record<T, kFormat>(p, aligned.k && aligned.k_cache,
                                     p.sketch.block(row, kv_head, block), shared);
    }
}

__global__ void __launch_bounds__(kThreads)
    advance_seqlens_kernel(int32_t* cache_seqlens, const KvAppendParams p) {
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= p.batch) return;
    const int64_t before = cache_seqlens[row];
    const int64_t after = before + (p.num_valid ? int64_t{p.num_valid[row]} : p.num_new);
    if (before < p.capacity_tokens)
        cache_seqlens[row] =
            static_cast<int32_t>(after < p.capacity_tokens ? after : p.capacity_tokens);
}

}  // namespace

void kv_append(const KvAppendParams& p, const CudaLaunch& where) {
    // Rows may begin anywhere in a block, so `num_new` tokens touch up to this many.
    const int64_t blocks =
        p.num_new > 0 ? (p.num_new + kSketchBlockTokens - 2) / kSketchBlockTokens + 1 : 0;
    const auto aligned_rows = [&](const KVView& view) {
        return rows_are_aligned(p.dtype, view.data, view.page_stride, view.token_stride,
                                view.head_stride);
    };
    const Alignment aligned{
        rows_are_aligned(p.dtype, p.k, p.k_strides[0], p.k_strides[1], p.k_strides[2]),
        rows_are_aligned(p.dtype, p.v, p.v_strides[0], p.v_strides[1], p.v_strides[2]),
        aligned_rows(p.k_cache), aligned_rows(p.v_cache)};
    const int64_t grid = blocks * p.batch * p.num_kv_heads;
    with_element_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        const SketchFormat format = p.sketch.data ? p.sketch.format : SketchFormat::kNone;
        switch (format) {
            case SketchFormat::kNone:
                return launch(where, kv_append_kernel<T, SketchFormat::kNone>, grid, 1, kThreads, 0,
                              p, aligned, blocks);
            case SketchFormat::kInt4:
                return launch(where, kv_append_kernel<T, SketchFormat::kInt4>, grid, 1, kThreads, 0,
                              p, aligned, blocks);
            case SketchFormat::kInt8:
                return launch(where, kv_append_kernel<T, SketchFormat::kInt8>, grid, 1, kThreads, 0,
                              p, aligned, blocks);
        }
    });
}

void advance_seqlens(int32_t* cache_seqlens, const KvAppendParams& p, const CudaLaunch& where) {
    launch(where, advance_seqlens_kernel, ceil_div(p.batch, kThreads), 1, kThreads, 0,
           cache_seqlens, p);
}

}  // namespace kvselect::cuda
