#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

#include "cpu/cpu_features.h"
#include "kvselect/check.h"

namespace kvselect::cpu {
namespace {

// Slowest first, so the last one is the one to use.
std::vector<const Implementation*> detect() {
    std::vector<const Implementation*> found;
    for (const std::string name : implementations_for(read_cpu_features()))
        for (const Implementation* implementation : compiled_implementations())
            if (name == implementation->name) found.push_back(implementation);
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

const std::vector<const Implementation*>& compiled_implementations() {
    static const std::vector<const Implementation*> compiled{
        &scalar_implementation(),
#if defined(__x86_64__)
        &avx2_implementation(),        &avx2_vnni_implementation(), &avx512_implementation(),
        &avx512_bf16_implementation(), &amx_implementation(),
#endif
    };
    return compiled;
}

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
