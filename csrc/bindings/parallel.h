// Work items of an op over torch's threads, each thread with scratch memory that it keeps between
// calls.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

#include "bindings/huge_pages.h"

namespace kvselect::bindings {

// Floats of the calling thread, 64-byte aligned. They grow by half at least and are kept between
// calls: a fresh mapping would cost a page fault for each 4 KiB that a decode step touches. Only
// what no decode step needs (many scoring vectors over a long context) is given back at once.
template <int kPurpose>
class KeptMemory {
public:
    static float* get(int64_t num_floats) {
        KeptMemory& own = of_this_thread();
        if (num_floats > own.capacity_) {
            const int64_t capacity = std::max(num_floats, own.capacity_ + own.capacity_ / 2);
            own.release();
            own.data_.reset(static_cast<float*>(
                ::operator new(static_cast<size_t>(capacity) * sizeof(float), kAlignment)));
            own.capacity_ = capacity;
            advise_huge_pages(own.data_.get(), capacity * static_cast<int64_t>(sizeof(float)));
        }
        return own.data_.get();
    }
    static void give_back_if_large() {
        if (of_this_thread().capacity_ > kKeptFloats) of_this_thread().release();
    }

    static constexpr int64_t kKeptFloats = int64_t{16} << 20;  // 64 MiB

private:
    static KeptMemory& of_this_thread() {
        thread_local KeptMemory memory;
        return memory;
    }
    void release() {
        data_.reset();
        capacity_ = 0;
    }

    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(float* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<float, Delete> data_;
    int64_t capacity_ = 0;
};
using Scratch = KeptMemory<0>;          // of one thread's work
using SharedWorkspace = KeptMemory<1>;  // of the calling thread, lent to all of a region

using ConvertedQueries = KeptMemory<2>;  // float32 queries of the calling thread's op

inline int64_t whole_lines(int64_t num_floats) { return (num_floats + 15) / 16 * 16; }

// Runs work(begin, end, scratch) over [0, num_items), `grain` items at a time. Threads take what is
// next, not a share fixed beforehand: items differ in cost, and on a busy machine so do threads. An
// exception (only memory can run out) is carried out of the region and thrown again here: torch
// would turn it into text on stderr and a nameless error.
template <typename Work>
void run_parallel(int64_t num_items, int64_t scratch_floats, const Work& work, int64_t grain = 1) {
    const int64_t num_grains = (num_items + grain - 1) / grain;
    const int64_t num_workers = std::min<int64_t>(torch::stable::get_num_threads(), num_grains);
    if (num_workers <= 1) {  // no region, no atomics: a decode step on one thread is a plain loop
        if (num_items > 0) work(int64_t{0}, num_items, Scratch::get(scratch_floats));
        Scratch::give_back_if_large();
        return;
    }
    std::exception_ptr error;
    std::mutex error_mutex;
    std::atomic<int64_t> taken{0};
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t, int64_t) {
        try {
            for (int64_t mine; (mine = taken.fetch_add(1, std::memory_order_relaxed)) < num_grains;)
                work(mine * grain, std::min(num_items, (mine + 1) * grain),
                     Scratch::get(scratch_floats));
            Scratch::give_back_if_large();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(error_mutex);
            error = std::current_exception();
        }
    });
    if (error) std::rethrow_exception(error);
}

// Items that can be cut into parts, which need memory in common. Two ways, the same bits:
//   whole(item, workspace, scratch) for each item, or
//   part(item, part, workspace, scratch) for every part, then finish(...) for [0, num_finishes).
struct PartedWork {
    int64_t num_items, num_parts, num_finishes;
    int64_t workspace_floats;  // per item
    int64_t scratch_floats;    // per thread
    int64_t items_together;    // consecutive items whose same parts read the same memory
};

// Whether the second way pays: idle threads in the last round cost more than a second region.
inline bool splits(const PartedWork& work) {
    const int64_t threads = torch::stable::get_num_threads();
    if (work.num_parts == 1 ||
        work.num_items * whole_lines(work.workspace_floats) > SharedWorkspace::kKeptFloats)
        return false;
    if (work.items_together > 1) return true;
    return threads > 1 && work.num_items < 4 * threads && work.num_items % threads != 0;
}

template <typename Whole, typename Part, typename Finish>
void run_parted(const PartedWork& work, const Whole& whole, const Part& part,
                const Finish& finish) {
    const int64_t per_item = whole_lines(work.workspace_floats);
    if (!splits(work)) {
        return run_parallel(work.num_items, per_item + work.scratch_floats,
                            [&](int64_t begin, int64_t end, float* memory) {
                                for (int64_t item = begin; item < end; ++item)
                                    whole(item, memory, memory + per_item);
                            });
    }
    float* workspace = SharedWorkspace::get(work.num_items * per_item);
    const int64_t together = work.items_together;
    const auto in_order = [&](int64_t num_parts, const auto& stage) {
        run_parallel(
            work.num_items * num_parts, work.scratch_floats,
            [&](int64_t begin, int64_t end, float* scratch) {
                for (int64_t i = begin; i < end; ++i) {  // item group, part, item of the group
                    const int64_t item = i / (together * num_parts) * together + i % together;
                    stage(item, i / together % num_parts, workspace + item * per_item, scratch);
                }
            },
            together);
    };
    in_order(work.num_parts, part);
    in_order(work.num_finishes, finish);
    SharedWorkspace::give_back_if_large();  // it grows by half, past what is kept
}

}  // namespace kvselect::bindings
