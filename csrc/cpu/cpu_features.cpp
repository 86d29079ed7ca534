#include "cpu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// CPUID is read by hand: __builtin_cpu_supports of GCC 12 knows neither AVX-VNNI nor what the
// kernel says about tiles, and its answers cannot be tested on any machine but this one.

namespace kvselect::cpu {
namespace {

// Bits of CPUID and XCR0 as the Intel SDM numbers them.
constexpr bool bit(uint64_t word, int index) { return word >> index & 1; }
constexpr uint64_t kAvxState = 0x6;       // XMM, high halves of YMM
constexpr uint64_t kAvx512State = 0xe6;   // ... mask registers, high halves of ZMM, ZMM16-31
constexpr uint64_t kTileState = 0x60000;  // TILECFG, TILEDATA
constexpr int kTileDataComponent = 18;    // of XCR0: the number that permission is asked for

bool saves(const CpuFeatures& f, uint64_t state) { return (f.xcr0 & state) == state; }

bool has_avx2(const CpuFeatures& f) {
    const bool fma = bit(f.leaf1_ecx, 12), avx = bit(f.leaf1_ecx, 28), f16c = bit(f.leaf1_ecx, 29);
    const bool avx2 = bit(f.leaf7_ebx, 5);
    return saves(f, kAvxState) && avx && avx2 && fma && f16c;
}
bool has_avx_vnni(const CpuFeatures& f) { return bit(f.leaf7_1_eax, 4); }
bool has_avx512(const CpuFeatures& f) {
    const bool foundation = bit(f.leaf7_ebx, 16), dq = bit(f.leaf7_ebx, 17),
               bw = bit(f.leaf7_ebx, 30), vl = bit(f.leaf7_ebx, 31), vnni = bit(f.leaf7_ecx, 11);
    return saves(f, kAvx512State) && foundation && dq && bw && vl && vnni;
}
bool has_avx512_bf16(const CpuFeatures& f) { return bit(f.leaf7_1_eax, 5); }
bool has_tiles(const CpuFeatures& f) {
    const bool bf16 = bit(f.leaf7_edx, 22), tile = bit(f.leaf7_edx, 24),
               int8 = bit(f.leaf7_edx, 25);
    return saves(f, kTileState) && bf16 && tile && int8;
}

#if defined(__x86_64__)

bool ask_for_tile_permission() {
#if defined(__linux__)
    constexpr long kArchGetXcompPerm = 0x1022, kArchReqXcompPerm = 0x1023;  // <asm/prctl.h>
    uint64_t allowed = 0;
    // Refused by kernels before 5.16 and where a thread's alternate signal stack is too small for
    // tile data.
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileDataComponent) == 0 &&
           syscall(SYS_arch_prctl, kArchGetXcompPerm, &allowed) == 0 &&
           bit(allowed, kTileDataComponent);
#else
    return false;
#endif
}

uint64_t read_xcr0() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

#endif

}  // namespace

CpuFeatures read_cpu_features() {
    CpuFeatures f{};
#if defined(__x86_64__)
    uint32_t eax, ebx, ecx, edx;
    if (__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx)) f.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        f.leaf7_ebx = ebx, f.leaf7_ecx = ecx, f.leaf7_edx = edx;
        const uint32_t last_subleaf = eax;
        if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx))
            f.leaf7_1_eax = eax;
    }
    const bool osxsave = bit(f.leaf1_ecx, 27);  // without it, xgetbv is no instruction
    if (osxsave) f.xcr0 = read_xcr0();
    f.tile_permission = has_tiles(f) && ask_for_tile_permission();
#endif
    return f;
}

std::vector<const char*> implementations_for(const CpuFeatures& f) {
    const bool avx2 = has_avx2(f), avx512 = avx2 && has_avx512(f),
               avx512_bf16 = avx512 && has_avx512_bf16(f);
    std::vector<const char*> names{"scalar"};
    if (avx2) names.push_back("avx2");
    if (avx2 && has_avx_vnni(f)) names.push_back("avx2_vnni");
    if (avx512) names.push_back("avx512");
    if (avx512_bf16) names.push_back("avx512_bf16");
    if (avx512_bf16 && has_tiles(f) && f.tile_permission) names.push_back("amx");
    return names;
}

}  // namespace kvselect::cpu
