// The emulation itself: what it runs, and that it says what it could not run on a GPU.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device/ptx.cuh"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;
using emulation::run_grid;
namespace ptx = kvselect::cuda::ptx;

namespace {

template <typename Body>
std::string reported(unsigned threads, const Body& body) {
    try {
        run_grid(dim3(1), dim3(threads), 0, body);
    } catch (const std::logic_error& error) {
        return error.what();
    }
    return "";
}

// Each of a and b as the fragments of a warp, by the tables of the PTX manual for m16n8k16.
struct Fragments {
    uint32_t a[32][4] = {}, b[32][2] = {};
    void set_a(int row, int k, uint16_t bits) {
        const int lane = row % 8 * 4 + k % 8 / 2, reg = row / 8 + k / 8 * 2;
        a[lane][reg] |= uint32_t{bits} << 16 * (k % 2);
    }
    void set_b(int k, int column, uint16_t bits) {
        b[column * 4 + k % 8 / 2][k / 8] |= uint32_t{bits} << 16 * (k % 2);
    }
};

}  // namespace

TEST_ONCE(emulated_threads_see_their_place_and_shared_memory_in_every_order) {
    for (emulation::Order order :
         {emulation::Order::kForwards, emulation::Order::kBackwards, emulation::Order::kShuffled}) {
        emulation::set_order(order);
        std::vector<int> sums(6, 0);
        run_grid(dim3(3, 2), dim3(64), 64 * sizeof(int), [&] {
            int* shared = static_cast<int*>(ptx::dynamic_shared_memory());
            shared[threadIdx.x] = static_cast<int>(threadIdx.x);
            __syncthreads();
            const int other = shared[63 - threadIdx.x];
            const int sum = __shfl_xor_sync(0xffffffffu, other, 1) + other;
            if (threadIdx.x % 2 == 0) atomicAdd(&sums[blockIdx.y * gridDim.x + blockIdx.x], sum);
        });
        for (int sum : sums) EXPECT(sum == 64 * 63 / 2);
    }
    emulation::set_order(emulation::Order::kForwards);
}

TEST_ONCE(emulation_starts_shared_memory_as_nan) {
    run_grid(dim3(1), dim3(32), 256, [] {
        EXPECT(std::isnan(static_cast<float*>(ptx::dynamic_shared_memory())[threadIdx.x]));
    });
}

TEST_ONCE(emulation_gives_no_shared_memory_that_was_not_asked_for) {
    void (*const kernel)(int) = [](int) {};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(32);
    config.dynamicSmemBytes = 48 << 10;
    const auto ask = [&](int bytes) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    EXPECT(cudaLaunchKernelEx(&config, kernel, 0) == cudaErrorInvalidValue);
    EXPECT(ask(99 << 10) == cudaErrorInvalidValue);
    EXPECT(ask(48 << 10) == cudaSuccess);
    EXPECT(cudaLaunchKernelEx(&config, kernel, 0) == cudaSuccess);
}

TEST_ONCE(emulation_says_where_a_gpu_would_hang) {
    EXPECT(reported(64, [] {
               if (threadIdx.x < 32) __syncthreads();
           }).find("some threads wait") != std::string::npos);
    EXPECT(reported(32, [] {
               if (threadIdx.x != 7) __syncwarp();
           }).find("some threads wait") != std::string::npos);
    EXPECT(reported(32, [] {
               if (threadIdx.x < 16)
                   __syncwarp();
               else
                   __ballot_sync(0xffffffffu, true);
           }).find("different collectives") != std::string::npos);
    EXPECT(reported(64, [] { __syncthreads(); }).empty());
    EXPECT(reported(33, [] {}).find("whole warps") != std::string::npos);
}

TEST_ONCE(emulated_tensor_cores_multiply_matrices) {
    Random random(5);
    for (bool bfloat : {false, true}) {
        double a[16][16], b[16][8], c[16][8];
        Fragments fragments;
        const auto bits = [&](double* x) {
            const float value = static_cast<float>(*x);
            const uint16_t out = bfloat ? ptx::to_bfloat(value) : ptx::to_half(value);
            *x = bfloat ? cpu::element::to_float(cpu::BFloat16{out}) : ptx::from_half(out);
            return out;
        };
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k) {
                a[i][k] = random.normal();
                fragments.set_a(i, k, bits(&a[i][k]));
            }
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) {
                b[k][j] = random.normal();
                fragments.set_b(k, j, bits(&b[k][j]));
            }
        for (auto& row : c)
            for (double& x : row) x = double{static_cast<float>(random.normal())};
        run_grid(dim3(1), dim3(32), 0, [&] {
            const int lane = static_cast<int>(threadIdx.x), row = lane / 4, column = lane % 4 * 2;
            float d[4];
            for (int i = 0; i < 4; ++i)
                d[i] = static_cast<float>(c[row + i / 2 * 8][column + i % 2]);
            if (bfloat)
                ptx::mma_bfloat(d, fragments.a[lane], fragments.b[lane]);
            else
                ptx::mma_half(d, fragments.a[lane], fragments.b[lane]);
            for (int i = 0; i < 4; ++i) {
                const int r = row + i / 2 * 8, j = column + i % 2;
                double want = c[r][j];
                for (int k = 0; k < 16; ++k) want += a[r][k] * b[k][j];
                EXPECT(std::abs(d[i] - want) < 1e-5, "bfloat ", bfloat, " at ", r, ", ", j);
            }
        });
    }
    double a[16][8], b[8][8];
    for (auto& row : a)
        for (double& x : row) x = double{__uint_as_float(ptx::to_tf32(float(random.normal())))};
    for (auto& row : b)
        for (double& x : row) x = double{__uint_as_float(ptx::to_tf32(float(random.normal())))};
    run_grid(dim3(1), dim3(32), 0, [&] {
        const int lane = static_cast<int>(threadIdx.x), group = lane / 4, quad = lane % 4;
        const auto bits = [](double x) { return __float_as_uint(static_cast<float>(x)); };
        const uint32_t fragment_a[4] = {bits(a[group][quad]), bits(a[group + 8][quad]),
                                        bits(a[group][quad + 4]), bits(a[group + 8][quad + 4])};
        const uint32_t fragment_b[2] = {bits(b[quad][group]), bits(b[quad + 4][group])};
        float d[4] = {};
        ptx::mma_tf32(d, fragment_a, fragment_b);
        for (int i = 0; i < 4; ++i) {
            double want = 0.0;
            for (int k = 0; k < 8; ++k) want += a[group + i / 2 * 8][k] * b[k][quad * 2 + i % 2];
            EXPECT(std::abs(d[i] - want) < 1e-5);
        }
    });
}

TEST_ONCE(emulated_bytes_are_picked_as_prmt_does) {
    EXPECT(__byte_perm(0x33221100u, 0x77665544u, 0x7531u) == 0x77553311u);
    EXPECT(__byte_perm(0x00000007u, 0x64646464u, 0x4140u) == 0x64006407u);
}
