// What this GPU takes for the pieces that the step model of our kernels is made of.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a bench/gpu/micro.cu -o
//     build/gpu/micro build/gpu/micro             measures; prints one JSON object build/gpu/micro
//     --expect    the same rows without times, as modelled for an H200; needs no GPU
//
// Streaming reads and their start-up, gathers of rows, gaps between the kernels of a graph,
// barriers, and a vote that special functions bound. Beside each time stands what the model
// expects: bytes / copy bandwidth of this run + the fixed time that the model books for the stage.
// Medians of kSamples; whatever reads memory starts with an L2 that holds none of it. No torch, no
// library.
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define CHECK(call)                                                                               \
    do {                                                                                          \
        const cudaError_t status = (call);                                                        \
        if (status != cudaSuccess) {                                                              \
            std::fprintf(stderr, "micro: %s in %s, line %d\n", cudaGetErrorString(status), #call, \
                         __LINE__);                                                               \
            std::exit(1);                                                                         \
        }                                                                                         \
    } while (false)

namespace {

constexpr int kSamples = 60;
constexpr int64_t kTokens = 131072;
constexpr int kHeads = 8, kGroup = 4;
constexpr int64_t kScanBytes = 544 * kTokens;   // the int4 sketch of 8 heads of 128
constexpr int64_t kKeysBytes = 2048 * kTokens;  // the same keys in 16 bits
constexpr int64_t kCopyBytes = int64_t{1} << 30;
constexpr int kChain = 64;      // kernels of one graph
constexpr int kBarriers = 256;  // of one kernel
constexpr int kSpinCycles = 3000;
constexpr int kExpRounds = 16;
constexpr int kThreads = 256;
constexpr int kTileBytes = 48 << 10,
              kStages = 2;  // of a gather into shared memory: 96 KiB fit everywhere

// ---------------------------------------------------------------- kernels

__device__ __forceinline__ uint32_t mixed(uint4 x) { return x.x ^ x.y ^ x.z ^ x.w; }

// Never true of random data, and the compiler cannot know: the loads stay.
__device__ __forceinline__ void keep(uint32_t x, uint32_t* sink) {
    if (x == 0x9e3779b9u) *sink = x;
}

__global__ void fill_kernel(uint32_t* words, int64_t count, uint32_t seed) {
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
         i += int64_t{gridDim.x} * blockDim.x) {
        uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
        x ^= x >> 16;
        x *= 0x85ebca6bu;
        x ^= x >> 13;
        words[i] = x;
    }
}

// Past the caches as far as that goes; without kPast as anything that is read, which fills L2.
template <bool kPast>
__device__ __forceinline__ uint4 load(const uint4* from) {
    return kPast ? __ldcs(from) : *from;
}

// Four independent 16-byte loads per thread and turn.
template <bool kPast>
__global__ void __launch_bounds__(kThreads)
    stream_kernel(const uint4* data, int64_t count, uint32_t* sink) {
    constexpr int kInFlight = 4;
    const int64_t step = int64_t{gridDim.x} * kThreads;
    uint32_t sum = 0;
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
        uint4 x[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) x[j] = load<kPast>(data + i + j * step);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) sum ^= mixed(x[j]);
    }
    for (; i < count; i += step) sum ^= mixed(load<kPast>(data + i));
    keep(sum, sink);
}

// Row `r` of the gather starts at base + offsets[r].
template <int kRowBytes>
__global__ void __launch_bounds__(kThreads)
    gather_plain_kernel(const char* base, const int64_t* offsets, int num_rows, uint32_t* sink) {
    constexpr int kPieces = kRowBytes / 16, kInFlight = 4;
    const int64_t count = int64_t{num_rows} * kPieces, step = int64_t{gridDim.x} * kThreads;
    uint32_t sum = 0;
    int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    for (; i < count; i += kInFlight * step) {
        uint4 x[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t at = i + j * step;
            x[j] = make_uint4(0, 0, 0, 0);
            if (at < count)
                x[j] = __ldcs(reinterpret_cast<const uint4*>(base + offsets[at / kPieces]) +
                              at % kPieces);
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) sum ^= mixed(x[j]);
    }
    keep(sum, sink);
}

struct Tiles {  // rows [begin, end) of this CTA, in tiles
    int begin, end, rows_per_tile;
    __device__ int count() const { return (end - begin + rows_per_tile - 1) / rows_per_tile; }
    __device__ int first(int tile) const { return begin + tile * rows_per_tile; }
    __device__ int rows(int tile) const { return min(rows_per_tile, end - first(tile)); }
};

template <int kRowBytes>
__device__ __forceinline__ Tiles tiles_of_block(int num_rows) {
    const int share = (num_rows + gridDim.x - 1) / gridDim.x;
    const int begin = min(static_cast<int>(blockIdx.x) * share, num_rows);
    return {begin, min(begin + share, num_rows), kTileBytes / kRowBytes};
}

template <int kRowBytes>
__device__ __forceinline__ uint32_t consume(const char* tile, int rows) {
    uint32_t sum = 0;
    for (int i = threadIdx.x; i < rows * (kRowBytes / 16); i += kThreads)
        sum ^= mixed(reinterpret_cast<const uint4*>(tile)[i]);
    return sum;
}

// 16-byte cp.async into shared memory, two tiles deep.
template <int kRowBytes>
__global__ void __launch_bounds__(kThreads)
    gather_async_kernel(const char* base, const int64_t* offsets, int num_rows, uint32_t* sink) {
    extern __shared__ uint4 shared[];
    char* stages = reinterpret_cast<char*>(shared);
    constexpr int kPieces = kRowBytes / 16;
    const Tiles tiles = tiles_of_block<kRowBytes>(num_rows);
    const int count = tiles.count();
    auto fetch = [&](int tile) {
        if (tile < count) {
            char* to = stages + tile % kStages * kTileBytes;
            for (int i = threadIdx.x; i < tiles.rows(tile) * kPieces; i += kThreads) {
                const char* from =
                    base + offsets[tiles.first(tile) + i / kPieces] + i % kPieces * 16;
                const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to + i * 16));
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from)
                             : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    uint32_t sum = 0;
    fetch(0);
    for (int tile = 0; tile < count; ++tile) {
        fetch(tile + 1);
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        sum ^= consume<kRowBytes>(stages + tile % kStages * kTileBytes, tiles.rows(tile));
        __syncthreads();  // the stage is free before anyone fetches into it
    }
    keep(sum, sink);
}

// One cp.async.bulk per row, a barrier per stage that counts bytes.
template <int kRowBytes>
__global__ void __launch_bounds__(kThreads)
    gather_bulk_kernel(const char* base, const int64_t* offsets, int num_rows, uint32_t* sink) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ uint4 shared[];
    __shared__ alignas(8) uint64_t arrived[kStages];
    char* stages = reinterpret_cast<char*>(shared);
    const Tiles tiles = tiles_of_block<kRowBytes>(num_rows);
    const int count = tiles.count();
    auto barrier = [&](int tile) {
        return static_cast<uint32_t>(__cvta_generic_to_shared(arrived + tile % kStages));
    };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier(stage)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    auto fetch = [&](int tile) {  // warp 0
        if (tile >= count || threadIdx.x >= 32) return;
        const int rows = tiles.rows(tile);
        if (threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier(tile)),
                         "r"(rows * kRowBytes)
                         : "memory");
        __syncwarp();
        char* to = stages + tile % kStages * kTileBytes;
        for (int row = threadIdx.x; row < rows; row += 32) {
            const char* from = base + offsets[tiles.first(tile) + row];
            const auto address =
                static_cast<uint32_t>(__cvta_generic_to_shared(to + row * kRowBytes));
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
                "[%3];" ::"r"(address),
                "l"(from), "n"(kRowBytes), "r"(barrier(tile))
                : "memory");
        }
    };
    uint32_t sum = 0;
    fetch(0);
    for (int tile = 0; tile < count; ++tile) {
        fetch(tile + 1);
        const uint32_t parity = tile / kStages & 1;
        uint32_t done = 0;
        while (!done)
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, "
                "0, p; }"
                : "=r"(done)
                : "r"(barrier(tile)), "r"(parity)
                : "memory");
        sum ^= consume<kRowBytes>(stages + tile % kStages * kTileBytes, tiles.rows(tile));
        __syncthreads();  // the stage is free before anyone fetches into it
    }
    keep(sum, sink);
#else
    (void)base, (void)offsets, (void)num_rows, (void)sink;
#endif
}

__global__ void empty_kernel() {}

// Spins; with `overlap` it lets its successor start at once, which waits for this one's end.
__global__ void spin_kernel(int cycles, bool overlap) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (overlap) {
        cudaTriggerProgrammaticLaunchCompletion();
        cudaGridDependencySynchronize();
    }
#else
    (void)overlap;
#endif
    const long long begin = clock64();
    while (clock64() - begin < cycles) {
    }
}

__global__ void grid_barrier_kernel(int count) {
    const auto grid = cooperative_groups::this_grid();
    for (int i = 0; i < count; ++i) grid.sync();
}

__global__ void cluster_barrier_kernel(int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (int i = 0; i < count; ++i) {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
#else
    (void)count;
#endif
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// scores[head][t] = sum over the group of 2^(logit - lse), `rounds` times: [heads][tokens][4]
// logits.
__global__ void __launch_bounds__(kThreads)
    vote_kernel(const uint2* logits, const float* lse, float* scores, int rounds) {
    const int64_t count = kHeads * kTokens;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
         i += int64_t{gridDim.x} * kThreads) {
        const uint2 four = logits[i];
        const float2 low = __half22float2(reinterpret_cast<const __half2&>(four.x));
        const float2 high = __half22float2(reinterpret_cast<const __half2&>(four.y));
        const float* shift = lse + i / kTokens * kGroup;
        float sum = 0.f;
#pragma unroll 4
        for (int round = 0; round < rounds; ++round) {
            const float far = static_cast<float>(round);
            sum += exp2_approximate(low.x - shift[0] - far) +
                   exp2_approximate(low.y - shift[1] - far) +
                   exp2_approximate(high.x - shift[2] - far) +
                   exp2_approximate(high.y - shift[3] - far);
        }
        scores[i] = sum;
    }
}

// ---------------------------------------------------------------- machine and clock

struct Machine {
    std::string name = "NVIDIA H200 (modelled)";
    int capability = 90, sms = 132, clock_khz = 1980000, driver = 0, runtime = CUDART_VERSION;
    int64_t l2_bytes = int64_t{60} << 20;
    double copy_gb_per_s = 4300;
    bool measured = false;
};

struct Samples {
    double median = 0, p20 = 0, p80 = 0;
};

Samples of(std::vector<double> us) {
    std::sort(us.begin(), us.end());
    const auto at = [&](double share) {
        return us[static_cast<size_t>(share * (us.size() - 1) + 0.5)];
    };
    return {at(0.5), at(0.2), at(0.8)};
}

void launched() { CHECK(cudaGetLastError()); }

class Bench {
public:
    explicit Bench(Machine machine) : machine(machine) {}
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;

    void set_up() {
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaEventCreate(&begin));
        CHECK(cudaEventCreate(&end));
        CHECK(cudaMalloc(&sink, 256));
        flush_bytes = 4 * machine.l2_bytes;
        CHECK(cudaMalloc(&flushed, static_cast<size_t>(flush_bytes)));
        fill(flushed, flush_bytes, 1);
    }

    void* buffer(int64_t bytes) {
        void* data = nullptr;
        CHECK(cudaMalloc(&data, static_cast<size_t>(bytes)));
        fill(data, bytes, 2);
        return data;
    }

    void fill(void* data, int64_t bytes, uint32_t seed) {
        fill_kernel<<<1024, 256, 0, stream>>>(static_cast<uint32_t*>(data), bytes / 4, seed);
        launched();
        CHECK(cudaStreamSynchronize(stream));
    }

    // Microseconds of `call` between two events. L2 is flushed by reads: lines that a flush had
    // written would be on their way to memory while the call runs. The flush before it keeps the
    // GPU busy while the host enqueues, so that the host's pace is not in the time.
    Samples time(const std::function<void()>& call, bool cold) {
        std::vector<double> us;
        for (int sample = -3; sample < kSamples; ++sample) {
            if (cold) {
                stream_kernel<false><<<4 * machine.sms, kThreads, 0, stream>>>(
                    static_cast<uint4*>(flushed), flush_bytes / 16, sink);
            } else {
                spin_kernel<<<1, 1, 0, stream>>>(100000, false);
            }
            launched();
            CHECK(cudaEventRecord(begin, stream));
            call();
            CHECK(cudaEventRecord(end, stream));
            CHECK(cudaEventSynchronize(end));
            float ms = 0;
            CHECK(cudaEventElapsedTime(&ms, begin, end));
            if (sample >= 0) us.push_back(1e3 * ms);
        }
        return of(us);
    }

    // One replay of a graph of kChain kernels, microseconds per kernel.
    Samples time_chain(const std::function<void()>& launch_one) {
        cudaGraph_t graph;
        cudaGraphExec_t ready;
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        for (int i = 0; i < kChain; ++i) launch_one();
        CHECK(cudaStreamEndCapture(stream, &graph));
        CHECK(cudaGraphInstantiate(&ready, graph, 0));
        Samples found = time([&] { CHECK(cudaGraphLaunch(ready, stream)); }, false);
        CHECK(cudaGraphExecDestroy(ready));
        CHECK(cudaGraphDestroy(graph));
        return {found.median / kChain, found.p20 / kChain, found.p80 / kChain};
    }

    void launch_spin(int cycles, bool overlap) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(machine.sms));
        config.blockDim = dim3(kThreads);
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = overlap ? 1 : 0;
        CHECK(cudaLaunchKernelEx(&config, spin_kernel, cycles, overlap));
    }

    // Each spins as long as the last: what a chain of them takes beyond the spinning.
    Samples gap(bool overlap) {
        const Samples once = time_chain([&] { launch_spin(kSpinCycles, overlap); });
        const Samples twice = time_chain([&] { launch_spin(2 * kSpinCycles, overlap); });
        return {2 * once.median - twice.median, 2 * once.p20 - twice.p20, 2 * once.p80 - twice.p80};
    }

    Machine machine;
    cudaStream_t stream = nullptr;
    cudaEvent_t begin = nullptr, end = nullptr;
    uint32_t* sink = nullptr;
    void* flushed = nullptr;
    int64_t flush_bytes = 0;
};

// Positions of `rows` of kTokens, ascending and distinct, as byte offsets.
std::vector<int64_t> offsets_of(int rows, int64_t row_bytes, int heads, int64_t head_stride,
                                int64_t values_at) {
    std::vector<int64_t> offsets;
    std::mt19937 generator(7);
    for (const int64_t base : {int64_t{0}, values_at}) {
        for (int head = 0; head < heads; ++head) {
            std::vector<int32_t> all(kTokens);
            for (int64_t i = 0; i < kTokens; ++i)
                all[static_cast<size_t>(i)] = static_cast<int32_t>(i);
            std::shuffle(all.begin(), all.end(), generator);
            all.resize(static_cast<size_t>(rows));
            std::sort(all.begin(), all.end());
            for (const int32_t token : all)
                offsets.push_back(base + head * head_stride + token * row_bytes);
        }
    }
    return offsets;
}

// ---------------------------------------------------------------- rows

struct Row {
    std::string name;
    int64_t bytes;       // read; 0 where bytes are not the point
    double expected_us;  // < 0: the model has no figure
    std::string expected_from;
    int least_capability;
    std::function<Samples(Bench&)> measure;
};

using GatherKernel = void (*)(const char*, const int64_t*, int, uint32_t*);

Samples gather(Bench& bench, GatherKernel kernel, int rows, bool head_major, bool shared) {
    const int64_t row_bytes = head_major ? 256 : 2048, head_stride = kTokens * row_bytes;
    const std::vector<int64_t> offsets =
        offsets_of(rows, row_bytes, head_major ? kHeads : 1, head_stride, kKeysBytes);
    const char* data = static_cast<const char*>(bench.buffer(2 * kKeysBytes));
    int64_t* listed = static_cast<int64_t*>(bench.buffer(static_cast<int64_t>(offsets.size()) * 8));
    CHECK(cudaMemcpy(listed, offsets.data(), offsets.size() * 8, cudaMemcpyHostToDevice));
    const int bytes = shared ? kTileBytes * kStages : 0;
    if (shared)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const int blocks = bench.machine.sms * (shared ? 2 : 8);
    const Samples found = bench.time(
        [&] {
            kernel<<<blocks, kThreads, bytes, bench.stream>>>(
                data, listed, static_cast<int>(offsets.size()), bench.sink);
            launched();
        },
        true);
    CHECK(cudaFree(const_cast<char*>(data)));
    CHECK(cudaFree(listed));
    return found;
}

Samples stream(Bench& bench, int64_t bytes) {
    void* data = bench.buffer(bytes);
    const Samples found = bench.time(
        [&] {
            stream_kernel<true><<<bench.machine.sms * 8, kThreads, 0, bench.stream>>>(
                static_cast<uint4*>(data), bytes / 16, bench.sink);
            launched();
        },
        true);
    CHECK(cudaFree(data));
    return found;
}

Samples vote(Bench& bench, int rounds) {
    void* logits = bench.buffer(kHeads * kGroup * kTokens * 2);
    // 0x3xxx as fp16: logits in [0.125, 2), nothing special.
    std::vector<uint16_t> drawn(static_cast<size_t>(kHeads * kGroup * kTokens));
    std::mt19937 generator(11);
    for (uint16_t& x : drawn) x = static_cast<uint16_t>(0x3000 + generator() % 0x1000);
    CHECK(cudaMemcpy(logits, drawn.data(), drawn.size() * 2, cudaMemcpyHostToDevice));
    const std::vector<float> shift(kHeads * kGroup, 12.f);
    float* lse = static_cast<float*>(bench.buffer(kHeads * kGroup * 4));
    CHECK(cudaMemcpy(lse, shift.data(), shift.size() * 4, cudaMemcpyHostToDevice));
    float* scores = static_cast<float*>(bench.buffer(kHeads * kTokens * 4));
    const Samples found = bench.time(
        [&] {
            vote_kernel<<<bench.machine.sms * 8, kThreads, 0, bench.stream>>>(
                static_cast<uint2*>(logits), lse, scores, rounds);
            launched();
        },
        false);
    CHECK(cudaFree(logits));
    CHECK(cudaFree(lse));
    CHECK(cudaFree(scores));
    return found;
}

Samples difference(Samples more, Samples less, double divisor) {
    return {(more.median - less.median) / divisor, (more.p20 - less.p20) / divisor,
            (more.p80 - less.p80) / divisor};
}

Samples grid_barrier(Bench& bench) {
    const auto run = [&](int count) {
        return bench.time(
            [&] {
                void* arguments[] = {&count};
                CHECK(cudaLaunchCooperativeKernel(grid_barrier_kernel,
                                                  dim3(static_cast<unsigned>(bench.machine.sms)),
                                                  dim3(kThreads), arguments, 0, bench.stream));
            },
            false);
    };
    return difference(run(kBarriers), run(0), kBarriers);
}

Samples cluster_barrier(Bench& bench) {
    const auto run = [&](int count) {
        return bench.time(
            [&] {
                cudaLaunchAttribute attribute{};
                attribute.id = cudaLaunchAttributeClusterDimension;
                attribute.val.clusterDim.x = 8;
                attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
                cudaLaunchConfig_t config{};
                config.gridDim = dim3(static_cast<unsigned>(bench.machine.sms / 8 * 8));
                config.blockDim = dim3(kThreads);
                config.stream = bench.stream;
                config.attrs = &attribute;
                config.numAttrs = 1;
                CHECK(cudaLaunchKernelEx(&config, cluster_barrier_kernel, count));
            },
            false);
    };
    return difference(run(kBarriers), run(0), kBarriers);
}

std::vector<Row> rows_for(const Machine& machine) {
    const double us_per_byte = 1e-3 / machine.copy_gb_per_s;
    const double exps_us = 32.0 * kTokens / (16.0 * machine.sms * machine.clock_khz * 1e-3);
    const std::string start = "bytes / copy bandwidth + 4 us (fixed time of a scan)";
    std::vector<Row> rows;
    const auto streams = [&](const char* what, int64_t bytes) {
        rows.push_back({std::string("streaming read, ") + what, bytes, bytes * us_per_byte + 4,
                        start, 0, [bytes](Bench& bench) { return stream(bench, bytes); }});
    };
    streams("71 MB (int4 sketch at 128K)", kScanBytes);
    streams("268 MB (16-bit keys at 128K)", kKeysBytes);
    rows.push_back(
        {"streaming read, start-up (71 MB less what its bytes take beyond 268 MB's rate)", 0, 4,
         "4 us (fixed time of a scan)", 0, [](Bench& bench) {
             const Samples small = stream(bench, kScanBytes), large = stream(bench, kKeysBytes);
             const double share = static_cast<double>(kScanBytes) / (kKeysBytes - kScanBytes);
             const auto rest = [&](double a, double b) { return a - (b - a) * share; };
             return Samples{rest(small.median, large.median), rest(small.p20, large.p20),
                            rest(small.p80, large.p80)};
         }});
    for (const int count : {2688, 8192}) {
        const int64_t bytes = int64_t{4096} * count;
        for (const bool head_major : {true, false}) {
            const std::string of =
                std::to_string(count) + (head_major ? " tokens, rows of 256 B (head-major)"
                                                    : " tokens, rows of 2 KB (token-major)");
            const auto add = [&](const char* how, GatherKernel kernel, bool shared, int least) {
                rows.push_back({"gather K and V, " + of + ", " + how, bytes,
                                bytes * us_per_byte + 4, start, least, [=](Bench& bench) {
                                    return gather(bench, kernel, count, head_major, shared);
                                }});
            };
            add("plain loads", head_major ? gather_plain_kernel<256> : gather_plain_kernel<2048>,
                false, 0);
            add("cp.async", head_major ? gather_async_kernel<256> : gather_async_kernel<2048>, true,
                80);
            add("cp.async.bulk", head_major ? gather_bulk_kernel<256> : gather_bulk_kernel<2048>,
                true, 90);
        }
    }
    rows.push_back(
        {"empty kernel, one CTA per SM, in a graph", 0, 2, "1 to 2 us", 0, [](Bench& bench) {
             return bench.time_chain([&] {
                 empty_kernel<<<bench.machine.sms, kThreads, 0, bench.stream>>>();
                 launched();
             });
         }});
    rows.push_back({"gap between kernels of a graph", 0, 3, "about 3 us per kernel", 0,
                    [](Bench& bench) { return bench.gap(false); }});
    rows.push_back({"gap between kernels of a graph, programmatic dependent launch", 0, -1,
                    "no figure", 90, [](Bench& bench) { return bench.gap(true); }});
    rows.push_back({"cooperative grid barrier, one CTA per SM", 0, 1,
                    "two kernels of 3 us become two barriers and save 4 us: 1 us each", 70,
                    [](Bench& bench) { return grid_barrier(bench); }});
    rows.push_back({"cluster barrier, 8 CTAs", 0, -1, "no figure", 90,
                    [](Bench& bench) { return cluster_barrier(bench); }});
    rows.push_back({"vote at 128K, logits in L2", kHeads * kGroup * kTokens * 2, 3,
                    "3 us (vote and histogram)", 0, [](Bench& bench) { return vote(bench, 1); }});
    rows.push_back({"exponentials of one vote at 128K", 0, exps_us, "32 N at 16 per clock and SM",
                    0, [](Bench& bench) {
                        return difference(vote(bench, 1 + kExpRounds), vote(bench, 1), kExpRounds);
                    }});
    return rows;
}

Machine this_machine() {
    Machine found;
    found.measured = true;
    cudaDeviceProp properties{};
    CHECK(cudaGetDeviceProperties(&properties, 0));
    found.name = properties.name;
    found.capability = 10 * properties.major + properties.minor;
    found.sms = properties.multiProcessorCount;
    found.l2_bytes = properties.l2CacheSize;
    CHECK(cudaDeviceGetAttribute(&found.clock_khz, cudaDevAttrClockRate, 0));
    CHECK(cudaDriverGetVersion(&found.driver));
    CHECK(cudaRuntimeGetVersion(&found.runtime));
    return found;
}

// Bytes read plus bytes written.
double copy_gb_per_s(Bench& bench) {
    void* from = bench.buffer(kCopyBytes);
    void* to = bench.buffer(kCopyBytes);
    const Samples found = bench.time(
        [&] {
            CHECK(cudaMemcpyAsync(to, from, kCopyBytes, cudaMemcpyDeviceToDevice, bench.stream));
        },
        true);
    CHECK(cudaFree(from));
    CHECK(cudaFree(to));
    return 2e-3 * kCopyBytes / found.median;
}

}  // namespace

int main(int argc, char** argv) {
    const bool expect = argc == 2 && std::strcmp(argv[1], "--expect") == 0;
    if (argc > 1 && !expect) {
        std::fprintf(stderr, "arguments: got %s, allowed: none or --expect\n", argv[1]);
        return 2;
    }
    Bench bench(expect ? Machine{} : this_machine());
    if (!expect) {
        bench.set_up();
        bench.machine.copy_gb_per_s = copy_gb_per_s(bench);
    }
    const Machine& machine = bench.machine;
    std::printf(
        "{\n \"question\": \"What does this GPU take for the pieces of the step model?\",\n");
    std::printf(
        " \"gpu\": {\"name\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, "
        "\"clock_khz\": %d, "
        "\"l2_bytes\": %lld, \"driver\": %d, \"runtime\": %d},\n",
        machine.name.c_str(), machine.capability / 10, machine.capability % 10, machine.sms,
        machine.clock_khz, static_cast<long long>(machine.l2_bytes), machine.driver,
        machine.runtime);
    std::printf(" \"measured\": %s,\n \"samples\": %d,\n \"copy_gb_per_s\": %.1f,\n \"results\": [",
                machine.measured ? "true" : "false", machine.measured ? kSamples : 0,
                machine.copy_gb_per_s);
    const char* separator = "\n";
    for (const Row& row : rows_for(machine)) {
        std::printf("%s  {\"name\": \"%s\", \"bytes\": %lld, \"expected_from\": \"%s\"", separator,
                    row.name.c_str(), static_cast<long long>(row.bytes), row.expected_from.c_str());
        separator = ",\n";
        if (row.expected_us >= 0) std::printf(", \"expected_us\": %.2f", row.expected_us);
        if (machine.capability < row.least_capability) {
            std::printf(", \"skipped\": \"not on this GPU: needs compute capability %d.%d\"}",
                        row.least_capability / 10, row.least_capability % 10);
        } else if (!machine.measured) {
            std::printf("}");
        } else {
            const Samples found = row.measure(bench);
            std::printf(", \"median_us\": %.3f, \"p20_us\": %.3f, \"p80_us\": %.3f", found.median,
                        found.p20, found.p80);
            if (row.bytes) std::printf(", \"gb_per_s\": %.1f", 1e-3 * row.bytes / found.median);
            if (row.expected_us >= 0)
                std::printf(", \"over_expected\": %.3f", found.median / row.expected_us);
            std::printf("}");
        }
        std::fflush(stdout);
    }
    std::printf("\n ]\n}\n");
    return 0;
}
