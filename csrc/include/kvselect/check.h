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

}  // namespace kvselect

#define KVS_CHECK(condition, ...)                        \
    do {                                                 \
        if (!(condition)) ::kvselect::fail(__VA_ARGS__); \
    } while (false)
