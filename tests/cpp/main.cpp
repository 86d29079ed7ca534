#include <cstdio>

#include "check.h"
#include "cuda_emulated.h"
#include "cuda_emulation/fibres.h"
#include "tile_implementations.h"

namespace kvselect::test {

std::vector<Test>& all_tests() {
    static std::vector<Test> tests;
    return tests;
}

namespace {
long long num_checks = 0;
}
void count_check() { ++num_checks; }

}  // namespace kvselect::test

namespace {

using kvselect::emulation::Order;

struct Subject {
    std::string label;
    const kvselect::cpu::Implementation& ops;
    Order order = Order::kForwards;  // of emulated threads
};

// What runs here, slowest first; "amx" as far as it can be made to run; the CUDA kernels on host
// fibres.
std::vector<Subject> subjects() {
    using namespace kvselect;
    std::vector<Subject> found;
    for (const std::string& name : cpu::available_implementations())
        for (const cpu::Implementation* compiled : cpu::compiled_implementations())
            if (name == compiled->name) found.push_back({name, *compiled, {}});
    const cpu::Implementation* amx = test::amx_implementation_to_test();
    if (amx && found.back().label != amx->name) found.push_back({"amx, tiles emulated", *amx, {}});
    found.push_back({"cuda, emulated", test::cuda_emulated_implementation(), Order::kShuffled});
    return found;
}

}  // namespace

// Runs everything, or the tests whose name contains the first argument.
int main(int argc, char** argv) {
    using namespace kvselect;
    int passed = 0, failed = 0;
    bool first = true;
    for (const Subject& subject : subjects()) {
        emulation::set_order(subject.order);
        for (const test::Test& one : test::all_tests()) {
            if (one.once && !first) continue;
            const std::string full =
                one.once ? one.name : std::string(one.name) + "[" + subject.label + "]";
            if (argc > 1 && full.find(argv[1]) == std::string::npos) continue;
            try {
                one.run(subject.ops);
                ++passed;
            } catch (const std::exception& error) {
                ++failed;
                std::printf("FAILED %s\n    %s\n", full.c_str(), error.what());
            }
        }
        first = false;
    }
    std::printf("%d passed, %d failed (%lld checks)\n", passed, failed, test::num_checks);
    return failed == 0 && passed > 0 ? 0 : 1;
}
