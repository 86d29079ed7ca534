// Host twins of csrc/cuda/device/hopper_ptx.cuh. Copies arrive late and in any order, and products
// read their operands at once or not before they are waited for (fibres.h, Order): what is given
// back too early, or read too early, shows. What they cannot show: whether the hardware reads
// descriptors and swizzled tiles as the twins do, and memory ordering.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/device/ptx.cuh"
#include "cuda/device/tensor_map.h"

namespace kvselect::cuda::ptx {

namespace twin {
[[noreturn]] inline void wrong(const char* what) { throw std::logic_error(what); }
// Shared memory by its address, as descriptors and the copy engine have it.
inline unsigned char* shared_byte(uint32_t address) {
    return static_cast<unsigned char*>(emulation::dynamic_shared_memory()) + address;
}
// Chunks of 16 bytes are turned by the row of 128 bytes that they lie in, eight rows a turn.
inline uint32_t turned(uint32_t address) {
    const uint32_t chunk = address / 16 % 8, row = address / 128 % 8;
    return address - chunk * 16 + (chunk ^ row) * 16;
}
// Grows whenever the asynchronous units may see other bytes: what they read before is kept.
inline unsigned long epoch = 0;
}  // namespace twin

// --- barriers in shared memory

struct Barrier {
    int arrivals, missing;
    int64_t bytes;
    uint32_t phase;
};
namespace twin {
inline void end_phase(Barrier* barrier) {
    if (barrier->missing > 0 || barrier->bytes != 0) return;
    ++barrier->phase;
    barrier->missing = barrier->arrivals;
}
}  // namespace twin
inline void init_barrier(Barrier* barrier, int arrivals) { *barrier = {arrivals, arrivals, 0, 0}; }
inline void publish_barriers() {}
inline void arrive_expecting(Barrier* barrier, int bytes) {
    if (barrier->missing < 1) twin::wrong("a barrier gets more arrivals than it waits for");
    --barrier->missing;
    barrier->bytes += bytes;
    twin::end_phase(barrier);
}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }
inline bool phase_is_over(Barrier* barrier, uint32_t parity) {
    return (barrier->phase & 1u) != parity;
}
inline uint64_t nanoseconds() { return 0; }
inline void fault() { twin::wrong("a wait that never ends"); }
inline void wait_for_phase(Barrier* barrier, uint32_t parity) {
    emulation::wait_until([=] { return phase_is_over(barrier, parity); });
}

// --- barriers by number

namespace twin {
struct Numbered {
    int threads = 0, arrived = 0;
    unsigned long round = 0;
    bool any = false, result = false;
};
inline Numbered& numbered(int barrier, int threads) {
    static std::array<Numbered, 16> barriers;
    static unsigned long block = 0;
    if (block != emulation::block_number()) barriers = {};
    block = emulation::block_number();
    Numbered& own = barriers.at(static_cast<size_t>(barrier));
    if (own.arrived > 0 && own.threads != threads) wrong("a barrier is met by two counts");
    own.threads = threads;
    return own;
}
inline void come_to(Numbered& own) {
    if (++own.arrived < own.threads) return;
    own.arrived = 0;
    ++own.round;
    own.result = own.any;
    own.any = false;
}
}  // namespace twin
inline bool any_at(int barrier, int threads, bool mine) {
    twin::Numbered& own = twin::numbered(barrier, threads);
    const unsigned long round = own.round;
    own.any = own.any || mine;
    twin::come_to(own);
    emulation::wait_until([&] { return own.round != round; });
    return own.result;
}
inline void meet_at(int barrier, int threads) { any_at(barrier, threads, false); }
inline void pass_by(int barrier, int threads) { twin::come_to(twin::numbered(barrier, threads)); }

// --- the copy engine

inline void copy_box(void* to, const TensorMap& from, int channel, int token, int head, int row,
                     Barrier* barrier) {
    const uint32_t begin = shared_address(to);
    if (begin % 1024 != 0) twin::wrong("a box does not begin where its swizzle does");
    emulation::do_later([=, &from] {
        const TensorExtent& x = from.of;
        for (int t = 0; t < from.box_tokens; ++t)
            for (int c = 0; c < 64; ++c) {
                const bool exists = channel + c < x.channels && token + t < x.tokens &&
                                    head < x.heads && row < x.rows && token >= 0;
                uint16_t element = 0;
                if (exists)
                    std::memcpy(&element,
                                static_cast<const uint16_t*>(x.data) + channel + c +
                                    int64_t{token + t} * x.token_stride +
                                    int64_t{head} * x.head_stride + int64_t{row} * x.row_stride,
                                sizeof element);
                std::memcpy(
                    twin::shared_byte(twin::turned(begin + static_cast<uint32_t>(128 * t + 2 * c))),
                    &element, sizeof element);
            }
        ++twin::epoch;
        barrier->bytes -= 128 * from.box_tokens;
        if (barrier->bytes < 0) twin::wrong("more bytes come than a barrier was told of");
        twin::end_phase(barrier);
    });
}
inline void leave_to_async() { ++twin::epoch; }

// --- registers of a warpgroup

template <int kRegisters>
inline void give_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void take_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

// --- products of a warpgroup

namespace twin {
struct Product {
    float* d;
    unsigned columns;
    const uint32_t* a_registers;  // or nullptr: a
    uint64_t a, b;
    bool b_by_rows, accumulate, is_bfloat;
};
struct Products {  // of one thread
    unsigned long block = 0;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
};
inline Products& products(unsigned thread) {
    static std::vector<Products> of_thread(1024);
    Products& own = of_thread.at(thread);
    if (own.block != emulation::block_number()) own = {emulation::block_number(), {}, {}};
    return own;
}
struct Descriptor {
    uint32_t start, leading, stride;
    explicit Descriptor(uint64_t bits)
        : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
          leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4) {
        if (bits >> 62 != 1 || (bits >> 46 & 0xffff) != 0)
            wrong("a descriptor of another swizzle, or with a base offset");
    }
    // Element (i, k) of an operand whose k lies along the 128-byte rows,
    uint32_t along_rows(uint32_t i, uint32_t k) const {
        return turned(start + i / 8 * stride + i % 8 * 128 + 2 * k);
    }
    // or whose i does, in panels of 64.
    uint32_t across_rows(uint32_t i, uint32_t k) const {
        return turned(start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128);
    }
};
inline float element_at(uint32_t address, bool is_bfloat) {
    uint16_t bits;
    std::memcpy(&bits, shared_byte(address), sizeof bits);
    return is_bfloat ? bfloat_of(bits, 0) : half_of(bits, 0);
}
// The second operand, [column][k]: the same for all threads, so it is read once an epoch.
inline const std::vector<float>& second_operand(const Product& p) {
    using Key = std::tuple<uint64_t, unsigned, bool>;
    static std::map<Key, std::vector<float>> read;
    static unsigned long of_epoch = 0, of_block = 0;
    if (of_epoch != epoch || of_block != emulation::block_number()) read.clear();
    of_epoch = epoch;
    of_block = emulation::block_number();
    std::vector<float>& found = read[{p.b, p.columns, p.b_by_rows}];
    if (found.empty()) {
        const Descriptor b(p.b);
        for (unsigned column = 0; column < p.columns; ++column)
            for (unsigned k = 0; k < 16; ++k)
                found.push_back(element_at(
                    p.b_by_rows ? b.across_rows(column, k) : b.along_rows(column, k), p.is_bfloat));
    }
    return found;
}
// This thread's share; all lanes of the warp have brought the same product as number `i` of `group`
// (or of what is open).
inline void multiply(const Product& p, int group, size_t i) {
    const unsigned thread = emulation::linear_thread(), lane = thread % 32;
    const unsigned warp = thread / 32 % 4, quad = lane % 4;
    const std::vector<float>& b = second_operand(p);
    for (unsigned half = 0; half < 2; ++half) {
        float a[16];
        const unsigned row = warp * 16 + lane / 4 + 8 * half;
        for (unsigned k = 0; k < 16; ++k) {
            if (!p.a_registers) {
                a[k] = element_at(Descriptor(p.a).along_rows(row, k), p.is_bfloat);
                continue;
            }
            const unsigned holder = thread - quad + k % 8 / 2;
            const Products& other = products(holder);
            const Product& same =
                group < 0 ? other.open.at(i) : other.groups.at(static_cast<size_t>(group)).at(i);
            const uint32_t pair = same.a_registers[half + (k >= 8 ? 2 : 0)];
            a[k] = p.is_bfloat ? bfloat_of(pair, k % 2) : half_of(pair, k % 2);
        }
        for (unsigned j = 0; j < p.columns / 8; ++j)
            for (unsigned one = 0; one < 2; ++one) {
                float& d = p.d[4 * j + 2 * half + one];
                const float* const column = &b[(8 * j + 2 * quad + one) * 16];
                double sum = p.accumulate ? d : 0.f;
                for (unsigned k = 0; k < 16; ++k) sum += double{a[k]} * double{column[k]};
                d = static_cast<float>(sum);
            }
    }
}
inline void begin(const Product& p) {
    Products& own = products(emulation::linear_thread());
    own.open.push_back(p);
    if (emulation::order() != emulation::Order::kForwards) return;
    emulation::meet_warp("a product");
    multiply(p, -1, own.open.size() - 1);
    emulation::meet_warp("a product, done");
}
}  // namespace twin

inline void begin_products() { emulation::meet_warp("begin_products"); }
inline void end_products() {
    twin::Products& own = twin::products(emulation::linear_thread());
    own.groups.push_back(std::exchange(own.open, {}));
}
template <int kPending>
inline void wait_for_products() {
    twin::Products& own = twin::products(emulation::linear_thread());
    if (!own.open.empty()) twin::wrong("products are waited for that no group has");
    const size_t done = own.groups.size() > kPending ? own.groups.size() - kPending : 0;
    // Others go on meanwhile: into what this warp's products still read, if they may.
    if (emulation::order() != emulation::Order::kForwards && done > 0)
        emulation::wait_until([rounds = 8]() mutable { return rounds-- == 0; });
    emulation::meet_warp("wait_for_products");
    if (emulation::order() != emulation::Order::kForwards)
        for (size_t group = 0; group < done; ++group)
            for (size_t i = 0; i < own.groups[group].size(); ++i)
                twin::multiply(own.groups[group][i], static_cast<int>(group), i);
    emulation::meet_warp("wait_for_products, done");
    own.groups.erase(own.groups.begin(), own.groups.begin() + static_cast<std::ptrdiff_t>(done));
}
template <int kCount>
inline void keep_in_place(float (&)[kCount]) {}
template <int kCount>
inline void keep_in_place(uint32_t (&)[kCount][4]) {}

template <bool kBFloat, int kCount>
inline void multiply_tiles(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
    twin::begin({d, 2 * kCount, nullptr, a, b, false, accumulate, kBFloat});
}
template <bool kBFloat, int kCount>
inline void multiply_by_rows(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
    twin::begin({d, 2 * kCount, a, 0, b, true, true, kBFloat});
}

}  // namespace kvselect::cuda::ptx
