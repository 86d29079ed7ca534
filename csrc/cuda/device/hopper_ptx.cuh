// The instructions of sm_90a that our kernels ask for by name, one function each: barriers that
// copies report to, the bulk tensor copy, products of a warpgroup, registers moved between
// warpgroups. As for ptx.cuh, tests/cpp/cuda_emulation holds host twins of the same names.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/tensor_map.h"

namespace kvselect::cuda::ptx {

// --- barriers in shared memory

struct alignas(8) Barrier {
    uint64_t state;
};

// Every phase ends with this many arrivals, and the bytes that they announced.
__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}
// Barriers that were initialised can be seen by the copy engine. __syncthreads() comes after it.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// What the thread wrote before can be read by who waits for the phase.
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}
// Whether the phase of this parity is over; may wait for it, but not for long.
__device__ __forceinline__ bool phase_is_over(Barrier* barrier, uint32_t parity) {
    uint32_t over;
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return over != 0;
}
__device__ __forceinline__ uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
// Ends the kernel with an error, by writing where nothing may be written. Not a trap: with one in a
// branch ptxas gives no warpgroup more registers than all have at launch.
__device__ __forceinline__ void fault() {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(uint64_t{0}), "r"(0) : "memory");
}
// Until the phase of this parity is over. What never comes ends the kernel with an error: a GPU
// that hangs tells nobody why.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, uint32_t parity) {
    constexpr uint64_t kLongestWaitNs = 20ull * 1000 * 1000 * 1000;
    if (phase_is_over(barrier, parity)) return;
    const uint64_t begin = nanoseconds();
    while (!phase_is_over(barrier, parity))
        if (nanoseconds() - begin > kLongestWaitNs) fault();
}

// --- barriers by number (1..15), for some of a block's warps

__device__ __forceinline__ void meet_at(int barrier, int threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Counts towards it and goes on.
__device__ __forceinline__ void pass_by(int barrier, int threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Meets the others and says whether any of them brought `true`.
__device__ __forceinline__ bool any_at(int barrier, int threads, bool mine) {
    uint32_t any;
    asm volatile(
        "{.reg .pred p, q;\n"
        "setp.ne.u32 p, %3, 0;\n"
        "barrier.cta.red.or.aligned.pred q, %1, %2, p;\n"
        "selp.u32 %0, 1, 0, q;}"
        : "=r"(any)
        : "r"(barrier), "r"(threads), "r"(mine ? 1u : 0u)
        : "memory");
    return any != 0;
}

// --- the copy engine

// Begins to copy the box at channel, token, head and row (0 where the tensor has none) and reports
// its bytes, all of them, to the barrier. By one thread.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& from, int channel, int token,
                                         int head, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
        "l"(&from), "r"(shared_address(barrier)), "r"(channel), "r"(token), "r"(head), "r"(row)
        : "memory");
}
// Shared memory that this thread wrote or read by ordinary instructions is left to the copy engine
// and the tensor cores, once a barrier tells them.
__device__ __forceinline__ void leave_to_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- registers of a warpgroup: what one gives back, another takes

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- products of a warpgroup. Between begin_products() and the wait, nobody touches their
// registers and nobody writes their operands.

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all groups of products but the last kPending are done.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler computes them before and does not move them behind.
template <int kCount>
__device__ __forceinline__ void keep_in_place(float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keep_in_place(uint32_t (&values)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(values[i][j])::"memory");
}

#define KVS_IN_OUT_8(d, i)                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define KVS_IN_OUT_32(d, i) \
    KVS_IN_OUT_8(d, i), KVS_IN_OUT_8(d, i + 8), KVS_IN_OUT_8(d, i + 16), KVS_IN_OUT_8(d, i + 24)
#define KVS_REGISTERS_32                                     \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define KVS_REGISTERS_64                                               \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"           \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d = a b, or d += a b where `accumulate`; both operands in shared memory by descriptors, k along
// the 128-byte rows of either. 64 rows by 2 * kCount columns, 16 of k.
template <bool kBFloat, int kCount>
__device__ __forceinline__ void multiply_tiles(float (&d)[kCount], uint64_t a, uint64_t b,
                                               bool accumulate) {
    static_assert(kCount == 32 || kCount == 64, "64 or 128 columns");
    const uint32_t add = accumulate ? 1u : 0u;
    if constexpr (kCount == 32 && kBFloat)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" KVS_REGISTERS_32
            "}, %32, %33, p, 1, 1, 0, 0;}"
            : KVS_IN_OUT_32(d, 0)
            : "l"(a), "l"(b), "r"(add));
    else if constexpr (kCount == 32)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" KVS_REGISTERS_32
            "}, %32, %33, p, 1, 1, 0, 0;}"
            : KVS_IN_OUT_32(d, 0)
            : "l"(a), "l"(b), "r"(add));
    else if constexpr (kBFloat)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" KVS_REGISTERS_64
            "}, %64, %65, p, 1, 1, 0, 0;}"
            : KVS_IN_OUT_32(d, 0), KVS_IN_OUT_32(d, 32)
            : "l"(a), "l"(b), "r"(add));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" KVS_REGISTERS_64
            "}, %64, %65, p, 1, 1, 0, 0;}"
            : KVS_IN_OUT_32(d, 0), KVS_IN_OUT_32(d, 32)
            : "l"(a), "l"(b), "r"(add));
}
// d += a b: a in registers, as mma.m16n8k16 has it; b in shared memory, a row of channels (the
// product's columns) for each k.
template <bool kBFloat, int kCount>
__device__ __forceinline__ void multiply_by_rows(float (&d)[kCount], const uint32_t (&a)[4],
                                                 uint64_t b) {
    static_assert(kCount == 32 || kCount == 64, "64 or 128 columns");
    if constexpr (kCount == 32 && kBFloat)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" KVS_REGISTERS_32
            "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
            : KVS_IN_OUT_32(d, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));
    else if constexpr (kCount == 32)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %37, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" KVS_REGISTERS_32
            "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
            : KVS_IN_OUT_32(d, 0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));
    else if constexpr (kBFloat)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" KVS_REGISTERS_64
            "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"
            : KVS_IN_OUT_32(d, 0), KVS_IN_OUT_32(d, 32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));
    else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %69, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" KVS_REGISTERS_64
            "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}"
            : KVS_IN_OUT_32(d, 0), KVS_IN_OUT_32(d, 32)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(1));
}

#undef KVS_REGISTERS_64
#undef KVS_REGISTERS_32
#undef KVS_IN_OUT_32
#undef KVS_IN_OUT_8

}  // namespace kvselect::cuda::ptx
