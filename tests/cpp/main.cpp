#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

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
    found.push_back({"scalar, tiles emulated", test::scalar_tiles_implementation(), {}});
    found.push_back({"cuda, emulated", test::cuda_emulated_implementation(), Order::kShuffled});
    return found;
}

}  // namespace

// Runs everything, or the tests whose name contains the argument that is no option. `--part I/N`
// runs every Nth of them, from the Ith (from 0): N processes share the work. `--durations` names
// the slowest.
int main(int argc, char** argv) {
    using namespace kvselect;
    using Clock = std::chrono::steady_clock;
    std::string wanted;
    int part = 0, parts = 1;
    bool durations = false;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument == "--durations") {
            durations = true;
        } else if (argument == "--part") {
            if (++i == argc || std::sscanf(argv[i], "%d/%d", &part, &parts) != 2 || part < 0 ||
                part >= parts) {
                std::printf("--part: got %s, allowed: I/N with 0 <= I < N\n",
                            i < argc ? argv[i] : "nothing");
                return 2;
            }
        } else {
            wanted = argument;
        }
    }

    int passed = 0, failed = 0, index = 0;
    bool first = true;
    std::vector<std::pair<double, std::string>> seconds;
    for (const Subject& subject : subjects()) {
        emulation::set_order(subject.order);
        for (const test::Test& one : test::all_tests()) {
            if (one.once && !first) continue;
            const std::string full =
                one.once ? one.name : std::string(one.name) + "[" + subject.label + "]";
            if (full.find(wanted) == std::string::npos) continue;
            if (index++ % parts != part) continue;
            const auto begin = Clock::now();
            try {
                one.run(subject.ops);
                ++passed;
            } catch (const std::exception& error) {
                ++failed;
                std::printf("FAILED %s\n    %s\n", full.c_str(), error.what());
            }
            seconds.emplace_back(std::chrono::duration<double>(Clock::now() - begin).count(), full);
        }
        first = false;
    }
    if (durations) {
        std::sort(seconds.rbegin(), seconds.rend());
        for (size_t i = 0; i < std::min<size_t>(seconds.size(), 20); ++i)
            std::printf("%7.1f s  %s\n", seconds[i].first, seconds[i].second.c_str());
    }
    std::printf("%d passed, %d failed (%lld checks)\n", passed, failed, test::num_checks);
    return failed == 0 && passed > 0 ? 0 : 1;
}
