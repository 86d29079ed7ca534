#include "fibres.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

kvselect::emulation::Index3 threadIdx, blockIdx;
kvselect::emulation::Size3 blockDim, gridDim;

namespace kvselect::emulation {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

// --- switching stacks. swapcontext makes two system calls a switch and kernels meet at every
// shuffle, so on x86-64 the registers that a call preserves are swapped by hand; other processors
// use swapcontext.

#if defined(__x86_64__)
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void kvselect_switch_stack(void** save, void* load);
asm(R"(
.text
.globl kvselect_switch_stack
.hidden kvselect_switch_stack
.type kvselect_switch_stack, @function
kvselect_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvselect_switch_stack, .-kvselect_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");
void switch_context(Context* from, Context* to) {
    kvselect_switch_stack(&from->stack_pointer, to->stack_pointer);
}
void make_context(Context* context, char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) &
                                             ~uintptr_t{15});
    *--top = 0;  // where a caller's return address would lie: entry() never returns
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context->stack_pointer = top;
}
#else
struct Context {
    ucontext_t registers;
};
void switch_context(Context* from, Context* to) { swapcontext(&from->registers, &to->registers); }
void make_context(Context* context, char* stack, void (*entry)()) {
    getcontext(&context->registers);
    context->registers.uc_stack.ss_sp = stack;
    context->registers.uc_stack.ss_size = kStackBytes;
    context->registers.uc_link = nullptr;
    makecontext(&context->registers, entry, 0);
}
#endif

enum class State { kReady, kAtWarp, kAtBlock, kPolling, kDone };

struct Fibre {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* fake_stack = nullptr;
    State state = State::kReady;
    Index3 index;
    const char* meets_at = "";
    const std::function<bool()>* until = nullptr;    // kPolling
    alignas(16) unsigned char slots[2][kSlotBytes];  // of this collective and the one before
    unsigned turn = 0;
};

struct Scheduler {
    Context context;
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
    std::vector<std::unique_ptr<Fibre>> fibres;
    unsigned num_threads = 0, current = 0;
    const std::function<void()>* body = nullptr;
    std::vector<unsigned char> shared;
    std::vector<unsigned> warp_order, lane_order;  // of the running block
    Order order = Order::kForwards;
    uint64_t seed = 1;
    unsigned long block_number = 0;
    std::vector<std::function<void()>> later;
    std::exception_ptr error;  // thrown by a thread of the running block
};
Scheduler scheduler;

void begin_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                  [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
}
void end_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(saved, bottom, bytes);
#endif
}

Fibre& fibre() { return *scheduler.fibres[scheduler.current]; }

void back_to_scheduler(bool for_good) {
    Fibre& self = fibre();
    begin_switch(for_good ? nullptr : &self.fake_stack, scheduler.stack_bottom,
                 scheduler.stack_bytes);
    switch_context(&self.context, &scheduler.context);
    end_switch(self.fake_stack, &scheduler.stack_bottom, &scheduler.stack_bytes);
}

void fibre_main() {
    end_switch(nullptr, &scheduler.stack_bottom, &scheduler.stack_bytes);
    try {
        (*scheduler.body)();
    } catch (...) {
        scheduler.error = std::current_exception();
    }
    fibre().state = State::kDone;
    back_to_scheduler(true);
}

void resume(unsigned thread) {
    scheduler.current = thread;
    Fibre& next = fibre();
    threadIdx = next.index;
    begin_switch(&scheduler.fake_stack, next.stack.get(), kStackBytes);
    switch_context(&scheduler.context, &next.context);
    end_switch(scheduler.fake_stack, nullptr, nullptr);
}

unsigned random_below(unsigned count) {
    scheduler.seed = scheduler.seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((scheduler.seed >> 33) % count);
}

std::vector<unsigned> turns(unsigned count) {
    std::vector<unsigned> out(count);
    std::iota(out.begin(), out.end(), 0u);
    if (scheduler.order == Order::kBackwards) std::reverse(out.begin(), out.end());
    if (scheduler.order == Order::kShuffled)
        for (unsigned i = count; i > 1; --i) std::swap(out[i - 1], out[random_below(i)]);
    return out;
}

[[noreturn]] void hang(const char* why, unsigned warp) {
    std::ostringstream text;
    text << "a GPU would hang: " << why << ", block (" << blockIdx.x << ", " << blockIdx.y << ", "
         << blockIdx.z << "), warp " << warp;
    throw std::logic_error(text.str());
}

// Lets a warp's lanes go on if all of them meet; false if some have not come yet.
bool release_warp(unsigned warp) {
    const unsigned begin = warp * kWarpThreads,
                   end = std::min(begin + kWarpThreads, scheduler.num_threads);
    for (unsigned i = begin; i < end; ++i)
        if (scheduler.fibres[i]->state != State::kAtWarp) return false;
    for (unsigned i = begin; i < end; ++i) {
        if (std::strcmp(scheduler.fibres[i]->meets_at, scheduler.fibres[begin]->meets_at) != 0)
            hang("lanes meet at different collectives", warp);
        scheduler.fibres[i]->state = State::kReady;
    }
    return true;
}

bool can_run(Fibre& fibre) {
    if (fibre.state == State::kPolling && (*fibre.until)()) fibre.state = State::kReady;
    return fibre.state == State::kReady;
}

// One of what was put off, if there is any.
bool do_one() {
    auto& later = scheduler.later;
    if (later.empty()) return false;
    const size_t chosen = scheduler.order == Order::kShuffled
                              ? random_below(static_cast<unsigned>(later.size()))
                              : later.size() - 1;
    const std::function<void()> action = std::move(later[chosen]);
    later.erase(later.begin() + static_cast<std::ptrdiff_t>(chosen));
    action();
    return true;
}

bool all_are(State state) {
    for (unsigned i = 0; i < scheduler.num_threads; ++i)
        if (scheduler.fibres[i]->state != state) return false;
    return true;
}

void run_block() {
    scheduler.warp_order = turns((scheduler.num_threads + kWarpThreads - 1) / kWarpThreads);
    scheduler.lane_order = turns(kWarpThreads);
    constexpr int kPatience = 32;  // what is polled may count how often it is asked
    int idle = 0;
    for (;;) {
        bool went_on = false;
        for (unsigned warp : scheduler.warp_order) {
            for (;;) {
                const unsigned begin = warp * kWarpThreads,
                               lanes = std::min(kWarpThreads, scheduler.num_threads - begin);
                bool ran = false;
                for (unsigned lane : scheduler.lane_order)
                    if (lane < lanes && can_run(*scheduler.fibres[begin + lane])) {
                        resume(begin + lane);
                        if (scheduler.error)
                            std::rethrow_exception(std::exchange(scheduler.error, nullptr));
                        ran = true;
                    }
                went_on = went_on || ran;
                if (!release_warp(warp) && !ran) break;
            }
        }
        if (all_are(State::kDone)) {
            if (!scheduler.later.empty())
                hang("copies are under way into the memory of a block that is over", 0);
            return;
        }
        if (scheduler.order == Order::kShuffled && random_below(4) == 0) went_on |= do_one();
        if (all_are(State::kAtBlock)) {
            for (unsigned i = 0; i < scheduler.num_threads; ++i)
                scheduler.fibres[i]->state = State::kReady;
        } else if (went_on || do_one()) {
            idle = 0;
        } else if (++idle > kPatience) {
            hang("some threads wait where others never come", 0);
        }
    }
}

}  // namespace

void set_order(Order order) { scheduler.order = order; }
Order order() { return scheduler.order; }
unsigned long block_number() { return scheduler.block_number; }

void wait_until(const std::function<bool()>& done) {
    if (done()) return;
    Fibre& self = fibre();
    self.until = &done;
    self.state = State::kPolling;
    back_to_scheduler(false);
}

void do_later(std::function<void()> action) {
    if (scheduler.order == Order::kForwards)
        action();
    else
        scheduler.later.push_back(std::move(action));
}

void run_grid(Size3 grid, Size3 block, size_t dynamic_shared_bytes,
              const std::function<void()>& body) {
    Scheduler& s = scheduler;
    s.num_threads = block.x * block.y * block.z;
    s.body = &body;
    if (s.num_threads % kWarpThreads != 0) throw std::logic_error("blocks are whole warps");
    while (s.fibres.size() < s.num_threads) s.fibres.push_back(std::make_unique<Fibre>());
    gridDim = grid;
    blockDim = block;
    for (unsigned number : turns(grid.x * grid.y * grid.z)) {
        blockIdx = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        s.shared.assign(dynamic_shared_bytes + 128, 0xff);
        s.shared.shrink_to_fit();
        s.later.clear();  // of a block that failed
        ++s.block_number;
        for (unsigned i = 0; i < s.num_threads; ++i) {
            Fibre& f = *s.fibres[i];
            f.state = State::kReady;
            f.turn = 0;
            f.fake_stack = nullptr;
            f.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
            make_context(&f.context, f.stack.get(), fibre_main);
        }
        run_block();
    }
}

unsigned linear_thread() { return scheduler.current; }

void* dynamic_shared_memory() {
    const auto address = reinterpret_cast<uintptr_t>(scheduler.shared.data());
    return reinterpret_cast<void*>((address + 127) & ~uintptr_t{127});
}

void wait_for_block() {
    fibre().state = State::kAtBlock;
    back_to_scheduler(false);
}

void meet_warp(const char* what, const void* data, size_t bytes) {
    Fibre& self = fibre();
    self.turn ^= 1;
    if (bytes > kSlotBytes) throw std::logic_error("a lane brings at most 64 bytes");
    if (bytes > 0) std::memcpy(self.slots[self.turn], data, bytes);
    self.meets_at = what;
    self.state = State::kAtWarp;
    back_to_scheduler(false);
}

const void* lane_slot(unsigned lane) {
    const unsigned first = scheduler.current / kWarpThreads * kWarpThreads;
    return scheduler.fibres[first + lane % kWarpThreads]->slots[fibre().turn];
}

}  // namespace kvselect::emulation
