#include <cstdio>

#include "check.h"

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

// Runs everything, or the tests whose name contains the first argument.
int main(int argc, char** argv) {
    using namespace kvselect;
    int passed = 0, failed = 0;
    for (const std::string& name : cpu::available_implementations()) {
        cpu::force_implementation(name);
        for (const test::Test& one : test::all_tests()) {
            const std::string full = std::string(one.name) + "[" + name + "]";
            if (argc > 1 && full.find(argv[1]) == std::string::npos) continue;
            try {
                one.run(cpu::current_implementation());
                ++passed;
            } catch (const std::exception& error) {
                ++failed;
                std::printf("FAILED %s\n    %s\n", full.c_str(), error.what());
            }
        }
    }
    std::printf("%d passed, %d failed (%lld checks)\n", passed, failed, test::num_checks);
    return failed == 0 && passed > 0 ? 0 : 1;
}
