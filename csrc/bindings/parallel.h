// Work items of an op over torch's threads, each thread with scratch memory that it keeps between
// calls.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>

namespace kvselect::bindings {

// A thread's scratch floats, 64-byte aligned. It grows by half at least and is kept between calls:
// a fresh mapping would cost a page fault for each 4 KiB that a decode step touches. Only what no
// decode step needs (many scoring vectors over a long context) is given back at once.
class Scratch {
public:
    static float* get(int64_t num_floats) {
        Scratch& own = of_this_thread();
        if (num_floats > own.capacity_) {
            const int64_t capacity = std::max(num_floats, own.capacity_ + own.capacity_ / 2);
            own.release();
            own.data_.reset(static_cast<float*>(
                ::operator new(static_cast<size_t>(capacity) * sizeof(float), kAlignment)));
            own.capacity_ = capacity;
        }
        return own.data_.get();
    }
    static void give_back_if_large() {
        constexpr int64_t kKeptFloats = int64_t{16} << 20;  // 64 MiB
        if (of_this_thread().capacity_ > kKeptFloats) of_this_thread().release();
    }

private:
    static Scratch& of_this_thread() {
        thread_local Scratch scratch;
        return scratch;
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

// Runs work(begin, end, scratch) over [0, num_items). An exception (only memory can run out) is
// carried out of the region and thrown again here: torch would turn it into text on stderr and a
// nameless error.
template <typename Work>
void run_parallel(int64_t num_items, int64_t scratch_floats, const Work& work) {
    std::exception_ptr error;
    std::mutex error_mutex;
    torch::stable::parallel_for(0, num_items, 1, [&](int64_t begin, int64_t end) {
        try {
            work(begin, end, Scratch::get(scratch_floats));
            Scratch::give_back_if_large();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(error_mutex);
            error = std::current_exception();
        }
    });
    if (error) std::rethrow_exception(error);
}

}  // namespace kvselect::bindings
