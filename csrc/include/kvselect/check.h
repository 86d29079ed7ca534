// The one way in which kvselect's C++ reports bad input: an exception whose text carries the
// values.
#pragma once

#include <sstream>
#include <stdexcept>

namespace kvselect {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// What went wrong while running: RuntimeError in Python, not ValueError.
template <typename... Parts>
[[noreturn]] void fail_at_run_time(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

}  // namespace kvselect

#define KVS_CHECK(condition, ...)                        \
    do {                                                 \
        if (!(condition)) ::kvselect::fail(__VA_ARGS__); \
    } while (false)
