// Host twins of csrc/cuda/device/ptx.cuh: found before it on the include path of the emulated
// kernels.
#pragma once

#include <cuda_runtime.h>

#include <deque>
#include <vector>

#include "cpu/element_types.h"

namespace kvselect::cuda::ptx {

inline void* dynamic_shared_memory() { return emulation::dynamic_shared_memory(); }

// --- conversions

inline float from_half(uint16_t bits) { return cpu::element::to_float(cpu::Float16{bits}); }
inline uint16_t to_half(float x) {
    cpu::Float16 half;
    cpu::element::from_float(x, &half);
    return half.bits;
}
inline uint32_t to_half2(float low, float high) {
    return to_half(low) | static_cast<uint32_t>(to_half(high)) << 16;
}
inline uint16_t to_bfloat(float x) {
    cpu::BFloat16 out;
    cpu::element::from_float(x, &out);
    return out.bits;
}
inline uint32_t to_bfloat2(float low, float high) {
    return to_bfloat(low) | static_cast<uint32_t>(to_bfloat(high)) << 16;
}
// Nearest with 10 bits of fraction, ties away from zero.
inline uint32_t to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
    return (bits + 0x1000u) & ~0x1fffu;
}
inline float exp2_approximate(float x) { return std::exp2(x); }

// --- tensor cores: d += a * b, fragments as the PTX manual lays them out

namespace twin {
// Element (row, k) of A or (k, column) of B lies in a register of a lane; `word` reads it there.
template <int kRegisters>
uint32_t word(unsigned lane, int reg) {
    uint32_t words[kRegisters];
    std::memcpy(words, emulation::lane_slot(lane), sizeof words);
    return words[reg];
}
inline float half_of(uint32_t pair, int which) {
    return from_half(static_cast<uint16_t>(pair >> 16 * which));
}
inline float bfloat_of(uint32_t pair, int which) {
    return cpu::element::to_float(cpu::BFloat16{static_cast<uint16_t>(pair >> 16 * which)});
}

// m16n8k16 of 16-bit elements, `element(pair, which)` to float.
template <typename Element>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* what,
            Element element) {
    uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::meet_warp(what, words, sizeof words);
    const unsigned lane = emulation::lane_number(), group = lane / 4, quad = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const unsigned row = group + (i >= 2 ? 8 : 0), column = quad * 2 + i % 2;
        double sum = d[i];
        for (unsigned k = 0; k < 16; ++k) {
            const int reg_a = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0), reg_b = 4 + (k >= 8 ? 1 : 0);
            const unsigned lane_a = row % 8 * 4 + k % 8 / 2, lane_b = column * 4 + k % 8 / 2;
            sum += double{element(word<6>(lane_a, reg_a), k % 2)} *
                   double{element(word<6>(lane_b, reg_b), k % 2)};
        }
        d[i] = static_cast<float>(sum);
    }
}
}  // namespace twin

inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    twin::mma_16(d, a, b, "mma_half", twin::half_of);
}
inline void mma_bfloat(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    twin::mma_16(d, a, b, "mma_bfloat", twin::bfloat_of);
}
// m16n8k8; the unit ignores the low 13 bits of each element.
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::meet_warp("mma_tf32", words, sizeof words);
    const unsigned lane = emulation::lane_number(), group = lane / 4, quad = lane % 4;
    const auto element = [](unsigned lane, int reg) {
        return double{__uint_as_float(twin::word<6>(lane, reg) & ~0x1fffu)};
    };
    for (int i = 0; i < 4; ++i) {
        const unsigned row = group + (i >= 2 ? 8 : 0), column = quad * 2 + i % 2;
        double sum = d[i];
        for (unsigned k = 0; k < 8; ++k)
            sum += element(row % 8 * 4 + k % 4, (row >= 8 ? 1 : 0) + (k >= 4 ? 2 : 0)) *
                   element(column * 4 + k % 4, 4 + (k >= 4 ? 1 : 0));
        d[i] = static_cast<float>(sum);
    }
}

inline void forget(int&) {}
inline void forget(float&) {}

// --- memory

inline uint4 load_streaming(const void* address) {
    uint4 out;
    std::memcpy(&out, __builtin_assume_aligned(address, 16), sizeof out);
    return out;
}

// --- shared memory. A copy is made when it is waited for and not before, so that a missing wait
// shows.

namespace twin {
struct Copy {
    void* to;
    const void* from;
    bool exists;
};
struct Copies {  // of one thread
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
inline Copies& copies() {
    static std::vector<Copies> of_thread;
    const unsigned thread = emulation::linear_thread();
    if (of_thread.size() <= thread) of_thread.resize(thread + 1);
    return of_thread[thread];
}
// Words of a matrix's row that some lane brought.
inline uint32_t word_of_row(unsigned lane, unsigned word) {
    const unsigned char* row;
    std::memcpy(&row, emulation::lane_slot(lane), sizeof row);
    uint32_t out;
    std::memcpy(&out,
                static_cast<const unsigned char*>(__builtin_assume_aligned(row, 16)) + 4 * word,
                sizeof out);
    return out;
}
}  // namespace twin

// Where it lies from the beginning of dynamic shared memory on.
inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) -
                                 static_cast<const char*>(dynamic_shared_memory()));
}
inline void copy_to_shared(void* to, const void* from, bool exists) {
    twin::copies().open.push_back({to, from, exists});
}
inline void end_copies() {
    twin::Copies& own = twin::copies();
    own.groups.push_back(std::exchange(own.open, {}));
}
template <int kPending>
inline void wait_for_copies() {
    twin::Copies& own = twin::copies();
    for (; own.groups.size() > static_cast<size_t>(kPending); own.groups.pop_front())
        for (const twin::Copy& copy : own.groups.front()) {
            void* const to = __builtin_assume_aligned(copy.to, 16);
            if (copy.exists)
                std::memcpy(to, __builtin_assume_aligned(copy.from, 16), 16);
            else
                std::memset(to, 0, 16);
        }
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
    emulation::meet_warp("load_matrices", &row, sizeof row);
    const unsigned lane = emulation::lane_number();
    for (unsigned i = 0; i < 4; ++i) out[i] = twin::word_of_row(8 * i + lane / 4, lane % 4);
    emulation::meet_warp("load_matrices, done");
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    emulation::meet_warp("load_matrices_transposed", &row, sizeof row);
    const unsigned lane = emulation::lane_number(), column = lane / 4;
    for (unsigned i = 0; i < 4; ++i) {
        uint32_t halves[2];
        for (unsigned j = 0; j < 2; ++j)
            halves[j] =
                twin::word_of_row(8 * i + 2 * (lane % 4) + j, column / 2) >> 16 * (column % 2) &
                0xffffu;
        out[i] = halves[0] | halves[1] << 16;
    }
    emulation::meet_warp("load_matrices_transposed, done");
}

// --- programmatic dependent launch: kernels run one after another

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

}  // namespace kvselect::cuda::ptx
