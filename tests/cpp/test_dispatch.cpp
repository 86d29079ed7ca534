#include "check.h"

TEST(dispatch_lists_scalar_first_and_the_forced_one_is_current) {
    const auto names = kvselect::cpu::available_implementations();
    EXPECT(names.front() == "scalar");
    EXPECT(std::string(kvselect::cpu::current_implementation().name) == ops.name);
    kvselect::cpu::force_implementation("auto");
    EXPECT(kvselect::cpu::current_implementation().name == names.back());
    kvselect::cpu::force_implementation(ops.name);
}

TEST(dispatch_refuses_an_unknown_name_and_says_what_there_is) {
    try {
        kvselect::cpu::force_implementation("sse9");
    } catch (const std::invalid_argument& error) {
        const std::string text = error.what();
        EXPECT(text.find("got 'sse9', allowed: ") != std::string::npos, text);
        EXPECT(text.find("scalar") != std::string::npos, text);
        EXPECT(std::string(kvselect::cpu::current_implementation().name) == ops.name);
        return;
    }
    EXPECT(false, "force_implementation accepted sse9");
}
