// selection_cache_step: which lists of a decode step may be reused, and what to remember of it.
//
// Floor    8 * num_q_heads * head_dim bytes of query and anchor per row, whatever the length:
//          32 KB from L2. A launch.
// Plan     A thread block per row. A warp takes a list; its lanes take the eight sums of one
//          product each four times over (the definition in the header fixes their order, not who
//          adds them), and the row's numbers are added at the end.
#include "kvselect/selection_cache_step.h"

#include "cuda/device/element.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

template <typename T>
__device__ __forceinline__ const T* query_of(const SelectionCacheStepParams& p, int64_t row,
                                             int64_t head) {
    return static_cast<const T*>(p.q) + row * p.q_strides[0] + head * p.q_strides[1];
}

// Sum i % 8 of each product is lane i's (and lanes i + 8, + 16, + 24 compute the same): ((0 + 4) +
// (2 + 6)) + ((1 + 5) + (3 + 7)), in every lane, since a + b is b + a.
__device__ __forceinline__ double in_order(double sum) {
    sum += __shfl_xor_sync(kAllLanes, sum, 4);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// By a whole warp.
template <typename T>
__device__ bool is_similar(const SelectionCacheStepParams& p, int64_t row, int64_t list) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t num_heads = p.num_q_heads / p.num_lists;
    int64_t left = p.similarity == Similarity::kQ10 ? (num_heads - 1) / 10 : 0;
    double qq = 0.0, aa = 0.0, qa = 0.0;
    for (int64_t h = 0; h < num_heads; ++h) {
        const int64_t head = list * num_heads + h;
        const T* q = query_of<T>(p, row, head);
        const float* anchor = p.anchor_query + (row * p.num_q_heads + head) * p.head_dim;
        for (int64_t d = lane % 8; d < p.head_dim; d += 8) {
            const double x = to_float(q[d]), a = anchor[d];
            qq += x * x;
            aa += a * a;
            qa += x * a;
        }
        if (p.similarity == Similarity::kFlat && h + 1 < num_heads) continue;
        const double norm = sqrt(in_order(qq) * in_order(aa)), dot = in_order(qa);
        const bool reaches = norm > 0.0 && norm < static_cast<double>(INFINITY) &&
                             dot >= p.similarity_threshold * norm;
        if (!reaches && left-- == 0) return false;
        qq = aa = qa = 0.0;
    }
    return true;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    selection_cache_step_kernel(const SelectionCacheStepParams p) {
    __shared__ int num_hits;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize,
              lane = thread % kWarpSize;
    const int64_t row = blockIdx.x;
    const int64_t q_heads = p.num_q_heads / p.num_lists, kv_heads = p.num_kv_heads / p.num_lists;
    const int32_t seqlen = p.cache_seqlens[row];
    const bool grew_by_one = p.expected_seqlens[row] == seqlen;
    if (thread == 0) num_hits = 0;
    __syncthreads();
    for (int64_t list = warp; list < p.num_lists; list += kWarps) {
        const int64_t at = row * p.num_lists + list;
        int64_t defects = 0;
        for (int64_t h = 0; h < kv_heads; ++h)
            defects += p.num_nonfinite[row * p.num_kv_heads + list * kv_heads + h];
        const int32_t age = p.age[at];
        const bool hit = grew_by_one && age < p.max_age && p.known_nonfinite[at] == defects &&
                         is_similar<T>(p, row, list);
        __syncwarp();  // all lanes have read what the first one now changes
        if (lane == 0) {
            p.hit[at] = hit;
            p.age[at] = hit ? age + 1 : 0;
            p.known_nonfinite[at] = defects;
            if (hit) atomicAdd(&num_hits, 1);
        }
        if (hit) continue;
        for (int64_t head = list * q_heads; head < (list + 1) * q_heads; ++head)
            for (int64_t d = lane; d < p.head_dim; d += kWarpSize)
                p.anchor_query[(row * p.num_q_heads + head) * p.head_dim + d] =
                    to_float(query_of<T>(p, row, head)[d]);
    }
    __syncthreads();
    if (thread != 0) return;
    const int64_t real = seqlen - (p.starts ? p.starts[row] : 0);
    p.expected_seqlens[row] = real > p.dense_limit ? seqlen + 1 : -1;
    // Whole numbers of all rows add up in any order.
    auto* counts = reinterpret_cast<unsigned long long*>(p.reuse_counts);
    atomicAdd(counts, static_cast<unsigned long long>(num_hits));
    atomicAdd(counts + 1,
              static_cast<unsigned long long>(num_hits * kv_heads * (real > 0 ? real : 0)));
}

}  // namespace

void selection_cache_step(const SelectionCacheStepParams& p, const CudaLaunch& where) {
    with_element_type(p.dtype, [&](auto element) {
        launch(where, selection_cache_step_kernel<decltype(element)>, p.batch, 1, kThreads, 0, p);
    });
}

}  // namespace kvselect::cuda
