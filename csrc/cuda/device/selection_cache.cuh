// The selection cache of a decode step, in two halves: every thread block that would scan decides
// whether its list is reused, and one thread block of a later kernel writes what is remembered,
// when none reads it any more.
#pragma once

#include "cuda/device/element.cuh"
#include "cuda/device/warp_reduce.cuh"
#include "kvselect/selection_cache_step.h"

namespace kvselect::cuda {

template <typename T>
__device__ __forceinline__ const T* compared_query(const SelectionCacheStepParams& p, int64_t row,
                                                   int64_t head) {
    return static_cast<const T*>(p.q) + row * p.q_strides[0] + head * p.q_strides[1];
}
__device__ __forceinline__ float* anchor_of(const SelectionCacheStepParams& p, int64_t row,
                                            int64_t head) {
    return p.anchor_query + (row * p.num_q_heads + head) * p.head_dim;
}

// Sum i % 8 of each product is lane i's (and lanes i + 8, + 16, + 24 compute the same): ((0 + 4) +
// (2 + 6)) + ((1 + 5) + (3 + 7)), in every lane, since a + b is b + a.
__device__ __forceinline__ double in_order(double sum) {
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// The definition, bit for bit, of heads laid end to end; by a whole warp.
template <typename T>
__device__ __forceinline__ bool reaches_exactly(const T* q, int64_t q_stride, const float* anchor,
                                                int num_heads, int head_dim, double threshold) {
    double qq = 0.0, aa = 0.0, qa = 0.0;
    for (int head = 0; head < num_heads; ++head, q += q_stride, anchor += head_dim) {
        for (int d = static_cast<int>(threadIdx.x) % 8; d < head_dim; d += 8) {
            const double x = to_float(q[d]), a = anchor[d];
            qq += x * x;
            aa += a * a;
            qa += x * a;
        }
    }
    const double norm = sqrt(in_order(qq) * in_order(aa));
    return norm > 0.0 && norm < static_cast<double>(INFINITY) && in_order(qa) >= threshold * norm;
}

// The same sums in float32, which tell whether the threshold is reached unless it is close. Double
// takes 2 of the 128 lanes of an SM on some GPUs, and every thread block decides.
struct CosineEstimate {
    float qq = 0.f, aa = 0.f, qa = 0.f;

    template <typename T>
    __device__ __forceinline__ void add_head(const T* q, const float* anchor, int head_dim) {
#pragma unroll 4
        for (int d = static_cast<int>(threadIdx.x) % kWarpSize; d < head_dim; d += kWarpSize) {
            const float x = to_float(q[d]), a = anchor[d];
            qq = fmaf(x, x, qq);
            aa = fmaf(a, a, aa);
            qa = fmaf(x, a, qa);
        }
    }
    __device__ __forceinline__ CosineEstimate of_warp() const {
        return {reduce_add(qq), reduce_add(aa), reduce_add(qa)};
    }
    // 1: reached, 0: not, -1: only the definition can tell. `num_added`: terms that a lane added.
    // Each sum is off by at most num_added + 13 roundings (a lane's, a warp's, the warps') of its
    // size, or of sqrt(qq * aa) for qa, and what follows by a few more: qa - threshold * norm by
    // less than (2 * num_added + 34) * 2^-24 norms. Twice that is called close.
    __device__ __forceinline__ int reaches(float threshold, int num_added) const {
        constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;  // no product over- or underflows
        if (!(qq >= kLeast && qq <= kMost && aa >= kLeast && aa <= kMost)) return -1;
        const float norm = sqrtf(qq * aa), above = qa - threshold * norm;
        const float close = norm * static_cast<float>(num_added + 17) * 0x1p-22f;
        return above > close ? 1 : (above < -close ? 0 : -1);
    }
};

__device__ __forceinline__ int64_t defects_of(const SelectionCacheStepParams& p, int64_t row,
                                              int64_t list) {
    const int kv_heads = static_cast<int>(p.num_kv_heads) / static_cast<int>(p.num_lists);
    int64_t defects = 0;
    for (int h = 0; h < kv_heads; ++h)
        defects += p.num_nonfinite[row * p.num_kv_heads + list * kv_heads + h];
    return defects;
}

// Whether list `list` of a row is reused: the same in every thread of every block, and on the CPU.
// By all threads of a block; nothing is written.
template <typename T, int kWarps>
__device__ __forceinline__ bool may_reuse(const SelectionCacheStepParams& p, int64_t row,
                                          int64_t list) {
    __shared__ int num_different;
    __shared__ float of_warp[kWarps][3];
    const int64_t at = row * p.num_lists + list;
    // Needed at the end only, so that these reads and those of the vectors are under way together.
    const bool usable = p.expected_seqlens[row] == p.cache_seqlens[row] && p.age[at] < p.max_age &&
                        p.known_nonfinite[at] == defects_of(p, row, list);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize,
              lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int num_heads = static_cast<int>(p.num_q_heads / p.num_lists);
    const int head_dim = static_cast<int>(p.head_dim);
    const int per_head = (head_dim + kWarpSize - 1) / kWarpSize;
    const bool flat = p.similarity == Similarity::kFlat;
    const float threshold = static_cast<float>(p.similarity_threshold);
    const T* const q = compared_query<T>(p, row, list * num_heads);
    const float* const anchor = anchor_of(p, row, list * num_heads);
    if (threadIdx.x == 0) num_different = 0;
    __syncthreads();
    CosineEstimate sums;
#pragma unroll 1
    for (int head = warp; head < num_heads; head += kWarps) {
        sums.add_head(q + head * p.q_strides[1], anchor + int64_t{head} * head_dim, head_dim);
        if (flat) continue;
        int reached = sums.of_warp().reaches(threshold, per_head);
        if (reached < 0)
            reached =
                reaches_exactly<T>(q + head * p.q_strides[1], 0, anchor + int64_t{head} * head_dim,
                                   1, head_dim, p.similarity_threshold);
        if (lane == 0 && reached == 0) atomicAdd(&num_different, 1);
        sums = CosineEstimate{};
    }
    if (flat) {
        sums = sums.of_warp();
        if (lane == 0)
            of_warp[warp][0] = sums.qq, of_warp[warp][1] = sums.aa, of_warp[warp][2] = sums.qa;
    }
    __syncthreads();
    if (!flat) return usable && num_different <= may_differ(p);
    sums = CosineEstimate{};
    for (int i = 0; i < kWarps; ++i) {
        sums.qq += of_warp[i][0];
        sums.aa += of_warp[i][1];
        sums.qa += of_warp[i][2];
    }
    const int reached = sums.reaches(threshold, (num_heads + kWarps - 1) / kWarps * per_head);
    if (reached >= 0) return usable && reached == 1;
    return reaches_exactly<T>(q, p.q_strides[1], anchor, num_heads, head_dim,
                              p.similarity_threshold) &&
           usable;
}

// What the next step compares with, and the counts. By all threads of one block per list.
template <typename T, int kWarps>
__device__ __forceinline__ void remember_step(const SelectionCacheStepParams& p, int64_t row,
                                              int64_t list, bool hit) {
    const int thread = static_cast<int>(threadIdx.x);
    // In 32 bits: a division in 64 is a call, for which ptxas spills.
    const int num_lists = static_cast<int>(p.num_lists);
    const int64_t num_heads = static_cast<int>(p.num_q_heads) / num_lists,
                  first_head = list * num_heads;
    const int warp = thread / kWarpSize, lane = thread % kWarpSize;
    for (int64_t h = warp; !hit && h < num_heads; h += kWarps) {
        const T* const q = compared_query<T>(p, row, first_head + h);
        float* const anchor = anchor_of(p, row, first_head + h);
        for (int64_t d = lane; d < p.head_dim; d += kWarpSize) anchor[d] = to_float(q[d]);
    }
    if (thread != 0) return;
    const int64_t at = row * p.num_lists + list, seqlen = p.cache_seqlens[row];
    const int64_t real = seqlen - (p.starts ? p.starts[row] : 0);
    p.age[at] = hit ? p.age[at] + 1 : 0;
    p.known_nonfinite[at] = defects_of(p, row, list);
    if (list == 0)
        p.expected_seqlens[row] = real > p.dense_limit ? static_cast<int32_t>(seqlen) + 1 : -1;
    if (!hit) return;
    // Whole numbers add up in any order.
    const int64_t tokens = static_cast<int>(p.num_kv_heads) / num_lists * (real > 0 ? real : 0);
    auto* const counts = reinterpret_cast<unsigned long long*>(p.reuse_counts);
    atomicAdd(counts, 1ull);
    atomicAdd(counts + 1, static_cast<unsigned long long>(tokens));
}

}  // namespace kvselect::cuda
