// A test is a function of one implementation; main.cpp runs every test on every implementation, and
// once what concerns none.
#pragma once

#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace kvselect::test {

using TestFn = void (*)(const cpu::Implementation&);
struct Test {
    const char* name;
    TestFn run;
    bool once;
};
std::vector<Test>& all_tests();
void count_check();

struct Register {
    Register(const char* name, TestFn run, bool once = false) {
        all_tests().push_back({name, run, once});
    }
};

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <typename... Parts>
void check(bool holds, const char* file, int line, const char* text, const Parts&... parts) {
    count_check();
    if (holds) return;
    std::ostringstream message;
    message << file << ":" << line << ": " << text << "  ";
    static_cast<void>((message << ... << parts));
    throw Failure(message.str());
}

}  // namespace kvselect::test

#define TEST(name)                                                      \
    static void name(const kvselect::cpu::Implementation&);             \
    static const kvselect::test::Register register_##name(#name, name); \
    static void name([[maybe_unused]] const kvselect::cpu::Implementation& ops)

#define TEST_ONCE(name)                                                     \
    static void name();                                                     \
    static const kvselect::test::Register register_##name(                  \
        #name, [](const kvselect::cpu::Implementation&) { name(); }, true); \
    static void name()

// Extra arguments are printed when the condition does not hold.
#define EXPECT(condition, ...) \
    kvselect::test::check((condition), __FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__)
