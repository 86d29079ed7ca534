#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

#include "kvselect/check.h"

namespace kvselect::cpu {
namespace {

// Slowest first, so the last one is the one to use. __builtin_cpu_supports reads CPUID *and* XCR0:
// a CPU whose operating system does not save the wide registers counts as lacking them.
std::vector<const Implementation*> detect() {
    std::vector<const Implementation*> found{&scalar_implementation()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (avx2) found.push_back(&avx2_implementation());
    if (avx512) found.push_back(&avx512_implementation());
    if (avx512_bf16) found.push_back(&avx512_bf16_implementation());
#endif
    return found;
}

const std::vector<const Implementation*>& available() {
    static const std::vector<const Implementation*> found = detect();
    return found;
}

const Implementation& find(const char* asked_by, const std::string& name) {
    if (name == "auto") return *available().back();
    std::string names = "auto";
    for (const Implementation* implementation : available()) {
        if (name == implementation->name) return *implementation;
        names += std::string(", ") + implementation->name;
    }
    fail(asked_by, ": got '", name, "', allowed: on this CPU ", names);
}

// Read once. A bad name throws again at every use, because a static that throws stays
// uninitialised.
const Implementation& from_environment() {
    static const Implementation& chosen = [&]() -> const Implementation& {
        const char* name = std::getenv("KVSELECT_CPU");
        return find("KVSELECT_CPU", name ? name : "auto");
    }();
    return chosen;
}

std::atomic<const Implementation*> forced{nullptr};

}  // namespace

std::vector<std::string> available_implementations() {
    std::vector<std::string> names;
    for (const Implementation* implementation : available()) names.push_back(implementation->name);
    return names;
}

const Implementation& current_implementation() {
    const Implementation* chosen = forced.load(std::memory_order_acquire);
    return chosen ? *chosen : from_environment();
}

void force_implementation(const std::string& name) {
    forced.store(&find("CPU implementation", name), std::memory_order_release);
}

}  // namespace kvselect::cpu
