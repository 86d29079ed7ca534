// merge_splits: one attention result out of the parts of a split context.
//
// Problem  lse = logsumexp_s partial_lse[s]
//          out = sum_s exp(partial_lse[s] - lse) * partial_out[s]
// Floor    4 * num_rows * (num_splits + 1) * (head_dim + 1) bytes, half a FLOP per byte.
//          batch 1, 32 heads, 16 splits of 128 channels: 0.3 MB, hence latency: one launch.
// Plan     One warp per row; lane i owns channels i, i + 32, ... (coalesced), up to eight of them,
//          so that sums stay in registers. The few lse's of a row are read three times: they hit
//          L1, which is cheaper than shared memory and a barrier.
#include "kvselect/merge_splits.h"

#include "cuda/device/launch.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/device/warp_reduce.cuh"

namespace kvselect::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kColumnsPerLane = 8;  // rows of more than 256 channels take several rounds

__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    merge_splits_kernel(const MergeSplitsParams p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t row =
        int64_t{blockIdx.x} * kWarpsPerBlock + static_cast<int>(threadIdx.x) / kWarpSize;
    ptx::wait_for_previous_kernel();
    ptx::allow_next_kernel();
    if (row >= p.num_rows) return;  // whole warps leave, and no barrier follows

    float peak = -INFINITY;
    bool defect = false;
    for (int64_t s = lane; s < p.num_splits; s += kWarpSize) {
        const float lse = p.partial_lse[s * p.num_rows + row];
        peak = fmaxf(peak, lse);  // of a number and NaN, the number
        defect = defect || lse != lse;
    }
    peak = reduce_max(peak);
    // A part that is not a number makes the whole not a number.
    const bool is_nan = __any_sync(kAllLanes, defect);
    const bool empty = peak == -INFINITY;

    // Double for a few terms per row, as on the CPU: weights of splits far apart keep all their
    // bits.
    double total = 0.0;
    for (int64_t s = lane; s < p.num_splits; s += kWarpSize) {
        const float lse = p.partial_lse[s * p.num_rows + row];
        if (lse != -INFINITY) total += exp(double{lse} - double{peak});
    }
    total = reduce_add(total);
    if (lane == 0)
        p.lse[row] = is_nan  ? NAN
                     : empty ? -INFINITY
                             : static_cast<float>(double{peak} + log(total));

    for (int64_t begin = 0; begin < p.head_dim; begin += kColumnsPerLane * kWarpSize) {
        float sum[kColumnsPerLane] = {};
        for (int64_t s = 0; s < p.num_splits && !is_nan; ++s) {
            const int64_t part = s * p.num_rows + row;
            const float lse = p.partial_lse[part];
            if (lse == -INFINITY) continue;  // its partial_out is not read: it may hold anything
            const float weight = static_cast<float>(exp(double{lse} - double{peak}) / total);
#pragma unroll
            for (int i = 0; i < kColumnsPerLane; ++i) {
                const int64_t d = begin + i * kWarpSize + lane;
                if (d < p.head_dim)
                    sum[i] = fmaf(weight, p.partial_out[part * p.head_dim + d], sum[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kColumnsPerLane; ++i) {
            const int64_t d = begin + i * kWarpSize + lane;
            if (d < p.head_dim) p.out[row * p.head_dim + d] = is_nan ? NAN : sum[i];
        }
    }
}

}  // namespace

void merge_splits(const MergeSplitsParams& p, const CudaLaunch& where) {
    launch(where, merge_splits_kernel, ceil_div(p.num_rows, kWarpsPerBlock), 1,
           kWarpsPerBlock * kWarpSize, 0, p);
}

}  // namespace kvselect::cuda
