#include "cuda/architectures.h"

#include <cstdlib>
#include <sstream>

namespace kvselect::cuda {

bool runs_on(const std::string& built, int major, int minor) {
    std::istringstream list(built);
    for (std::string entry; std::getline(list, entry, ',');) {
        char* suffix = nullptr;
        const long number = std::strtol(entry.c_str(), &suffix, 10);
        const long its_major = number / 10, its_minor = number % 10;
        const std::string rest(suffix);
        const bool specific = !rest.empty() && rest[0] == 'a';
        const bool real = rest.find("-virtual") == std::string::npos;
        const bool ptx = rest.find("-real") == std::string::npos;
        const bool same = its_major == major && its_minor == minor;
        if (specific ? same : real && its_major == major && its_minor <= minor) return true;
        if (ptx && !specific && number <= 10 * major + minor) return true;
    }
    return false;
}

}  // namespace kvselect::cuda
