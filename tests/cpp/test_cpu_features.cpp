#include "cpu/cpu_features.h"

#include <algorithm>
#include <sstream>

#include "check.h"

using namespace kvselect;

namespace {

// The bits that matter, as the Intel SDM numbers them (volume 2A, CPUID).
constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
constexpr uint32_t kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
constexpr uint32_t kAvx512Vnni = 1u << 11;
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
constexpr uint32_t kAvxVnni = 1u << 4, kAvx512Bf16 = 1u << 5;
constexpr uint64_t kX87Sse = 0x3, kYmm = 0x4, kZmm = 0xe0, kTiles = 0x60000;

constexpr uint32_t kHaswellLeaf1 = kFma | kOsxsave | kAvx | kF16c;
constexpr cpu::CpuFeatures kOld{.leaf1_ecx = 0,
                                .leaf7_ebx = 0,
                                .leaf7_ecx = 0,
                                .leaf7_edx = 0,
                                .leaf7_1_eax = 0,
                                .xcr0 = 0,
                                .tile_permission = false};
constexpr cpu::CpuFeatures kHaswell{.leaf1_ecx = kHaswellLeaf1,
                                    .leaf7_ebx = kAvx2,
                                    .leaf7_ecx = 0,
                                    .leaf7_edx = 0,
                                    .leaf7_1_eax = 0,
                                    .xcr0 = kX87Sse | kYmm,
                                    .tile_permission = false};
constexpr cpu::CpuFeatures kSapphireRapids{.leaf1_ecx = kHaswellLeaf1,
                                           .leaf7_ebx = kAvx2 | kAvx512,
                                           .leaf7_ecx = kAvx512Vnni,
                                           .leaf7_edx = kAmxBf16 | kAmxTile | kAmxInt8,
                                           .leaf7_1_eax = kAvxVnni | kAvx512Bf16,
                                           .xcr0 = kX87Sse | kYmm | kZmm | kTiles,
                                           .tile_permission = true};

template <typename Change>
cpu::CpuFeatures with(cpu::CpuFeatures f, Change change) {
    change(f);
    return f;
}

template <typename Names>
std::string joined(const Names& names) {
    std::ostringstream out;
    const char* separator = "";
    for (const auto& name : names) {
        out << separator << name;
        separator = " ";
    }
    return out.str();
}
std::string names(const cpu::CpuFeatures& f) { return joined(cpu::implementations_for(f)); }

}  // namespace

TEST_ONCE(implementations_of_known_machines) {
    using F = cpu::CpuFeatures;
    EXPECT(names(kOld) == "scalar");
    EXPECT(names(kHaswell) == "scalar avx2");
    EXPECT(names(with(kHaswell, [](F& f) { f.leaf7_1_eax = kAvxVnni; })) ==
           "scalar avx2 avx2_vnni");  // Alder Lake
    const F skylake = with(kHaswell, [](F& f) { f.leaf7_ebx |= kAvx512, f.xcr0 |= kZmm; });
    EXPECT(names(skylake) == "scalar avx2");  // AVX-512 without VNNI
    const F ice_lake = with(skylake, [](F& f) { f.leaf7_ecx = kAvx512Vnni; });
    EXPECT(names(ice_lake) == "scalar avx2 avx512");
    const F zen4 = with(ice_lake, [](F& f) { f.leaf7_1_eax = kAvx512Bf16; });
    EXPECT(names(zen4) == "scalar avx2 avx512 avx512_bf16");
    const F zen5 = with(zen4, [](F& f) { f.leaf7_1_eax |= kAvxVnni; });
    EXPECT(names(zen5) == "scalar avx2 avx2_vnni avx512 avx512_bf16");
    EXPECT(names(kSapphireRapids) == "scalar avx2 avx2_vnni avx512 avx512_bf16 amx");
}

TEST_ONCE(implementations_need_a_kernel_that_saves_their_registers) {
    using F = cpu::CpuFeatures;
    const auto saving = [](uint64_t xcr0) {
        return names(with(kSapphireRapids, [&](F& f) { f.xcr0 = xcr0; }));
    };
    EXPECT(saving(0) == "scalar");
    EXPECT(saving(kX87Sse) == "scalar");
    EXPECT(saving(kX87Sse | kYmm) == "scalar avx2 avx2_vnni");
    EXPECT(saving(kX87Sse | kYmm | kTiles) == "scalar avx2 avx2_vnni");
    const std::string without_tiles = "scalar avx2 avx2_vnni avx512 avx512_bf16";
    EXPECT(saving(kX87Sse | kYmm | kZmm) == without_tiles);
    EXPECT(saving(kX87Sse | kYmm | kZmm | 0x20000) == without_tiles);  // TILECFG alone
    EXPECT(saving(kX87Sse | kYmm | kZmm | 0x40000) == without_tiles);  // TILEDATA alone
    EXPECT(names(with(kSapphireRapids, [](F& f) { f.tile_permission = false; })) == without_tiles);
}

// Taking away any single bit takes away exactly what needs it.
TEST_ONCE(implementations_need_every_one_of_their_bits) {
    using F = cpu::CpuFeatures;
    const std::string avx2 = "scalar avx2 avx2_vnni", bf16 = avx2 + " avx512 avx512_bf16";
    for (uint32_t needed : {kFma, kAvx, kF16c})
        EXPECT(names(with(kSapphireRapids, [&](F& f) { f.leaf1_ecx &= ~needed; })) == "scalar",
               needed);
    EXPECT(names(with(kSapphireRapids, [](F& f) { f.leaf7_ebx &= ~kAvx2; })) == "scalar");
    for (int index : {16, 17, 30, 31})
        EXPECT(names(with(kSapphireRapids, [&](F& f) { f.leaf7_ebx &= ~(1u << index); })) == avx2,
               index);
    EXPECT(names(with(kSapphireRapids, [](F& f) { f.leaf7_ecx = 0; })) == avx2);
    EXPECT(names(with(kSapphireRapids, [](F& f) { f.leaf7_1_eax = kAvxVnni; })) ==
           avx2 + " avx512");
    EXPECT(names(with(kSapphireRapids, [](F& f) { f.leaf7_1_eax = kAvx512Bf16; })) ==
           "scalar avx2 avx512 avx512_bf16 amx");
    for (uint32_t needed : {kAmxBf16, kAmxTile, kAmxInt8})
        EXPECT(names(with(kSapphireRapids, [&](F& f) { f.leaf7_edx &= ~needed; })) == bf16, needed);
}

TEST_ONCE(this_machine_is_read_the_same_twice_and_as_the_compiler_reads_it) {
    const cpu::CpuFeatures f = cpu::read_cpu_features(), again = cpu::read_cpu_features();
    EXPECT(names(f) == names(again));
    EXPECT(f.xcr0 == again.xcr0 && f.tile_permission == again.tile_permission);
    const std::string listed = joined(cpu::available_implementations());
    EXPECT(listed == names(f), listed);
#if defined(__x86_64__)
    // What __builtin_cpu_supports of GCC 12 knows; it looks at XCR0 too.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const auto has = [&](const char* name) {
        const auto all = cpu::available_implementations();
        return std::find(all.begin(), all.end(), name) != all.end();
    };
    EXPECT(has("avx2") == avx2);
    EXPECT(has("avx512") == avx512);
    EXPECT(has("avx512_bf16") == bf16);
#endif
}
