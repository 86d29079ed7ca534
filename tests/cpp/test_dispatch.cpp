#include <algorithm>

#include "check.h"

using namespace kvselect;

TEST_ONCE(dispatch_lists_scalar_first_and_the_forced_one_is_current) {
    const auto names = cpu::available_implementations();
    EXPECT(names.front() == "scalar");
    for (const std::string& name : names) {
        cpu::force_implementation(name);
        EXPECT(cpu::current_implementation().name == name);
        cpu::force_implementation("auto");
        EXPECT(cpu::current_implementation().name == names.back());
    }
}

TEST_ONCE(dispatch_refuses_an_unknown_name_and_says_what_there_is) {
    const auto names = cpu::available_implementations();
    std::vector<std::string> refused{"sse9"};
    for (const cpu::Implementation* compiled : cpu::compiled_implementations())
        if (std::find(names.begin(), names.end(), compiled->name) == names.end())
            refused.push_back(compiled->name);  // compiled, but not for this machine
    std::string allowed = "auto";
    for (const std::string& name : names) allowed += ", " + name;
    for (const std::string& name : refused) {
        cpu::force_implementation("scalar");
        std::string text = "accepted";
        try {
            cpu::force_implementation(name);
        } catch (const std::invalid_argument& error) {
            text = error.what();
        }
        EXPECT(text == "CPU implementation: got '" + name + "', allowed: on this CPU " + allowed,
               text);
        EXPECT(std::string(cpu::current_implementation().name) == "scalar");
        cpu::force_implementation("auto");
    }
}

TEST_ONCE(dispatch_knows_a_machine_for_everything_that_is_compiled) {
    const auto& compiled = cpu::compiled_implementations();
    const auto names = cpu::available_implementations();
    auto next = compiled.begin();
    for (const std::string& name : names) {  // the same order, with gaps
        next =
            std::find_if(next, compiled.end(), [&](const auto* one) { return one->name == name; });
        EXPECT(next != compiled.end(), name);
    }
    for (const cpu::Implementation* one : compiled)  // all have met their hardware
        EXPECT(one->note == nullptr, one->name);
}
