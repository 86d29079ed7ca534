// Threads of a CUDA block as fibres of one host thread.
//
// A fibre runs until it waits for its warp or its block, so that what the others have not written
// yet is not there yet. Blocks run one after another, and each of `Order` is a schedule that the
// GPU may also choose: results that depend on it lack a barrier or an ordering. What this shows:
// indices, masks, reductions, barriers, fragment layouts. What it cannot show: data races inside
// one instruction, memory ordering, time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace kvselect::emulation {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};
struct Size3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr Size3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

constexpr unsigned kWarpThreads = 32;
constexpr size_t kSlotBytes = 64;

// In which order warps, lanes and blocks get their turns.
enum class Order { kForwards, kBackwards, kShuffled };
void set_order(Order order);

Order order();

// Runs body() once per thread of the grid. Throws std::logic_error where a GPU would hang: a
// barrier that some threads never reach, or a warp whose lanes meet at different collectives.
// Dynamic shared memory starts as 0xff bytes, which are NaN in every float format.
void run_grid(Size3 grid, Size3 block, size_t dynamic_shared_bytes,
              const std::function<void()>& body);

unsigned linear_thread();  // of the running fibre
void* dynamic_shared_memory();

void wait_for_block();
// Waits for all 32 lanes. Each brings `bytes` that every lane may read through lane_slot() until
// its next collective; `what` names the collective, which must be the same in all lanes.
void meet_warp(const char* what, const void* data = nullptr, size_t bytes = 0);
const void* lane_slot(unsigned lane);

// Waits until done() says so; it is asked again and again.
void wait_until(const std::function<bool()>& done);
// What a unit beside the threads does, some time later: at once in kForwards, not before all
// threads wait in kBackwards. All of it is done before the block may end.
void do_later(std::function<void()> action);
unsigned long block_number();  // of all blocks that ever ran

}  // namespace kvselect::emulation

// CUDA's names for where the running fibre is.
extern kvselect::emulation::Index3 threadIdx, blockIdx;
extern kvselect::emulation::Size3 blockDim, gridDim;
