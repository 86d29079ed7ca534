// Which GPUs a build has code for.
#pragma once

#include <string>

namespace kvselect::cuda {

// `built`: CMAKE_CUDA_ARCHITECTURES with commas, for example "80-real,90a-real,120". Machine code
// ("-real") runs on later minor versions of its major version, with an "a" on that very version;
// PTX (without "-real", or "-virtual") is compiled by the driver for anything later, with an "a"
// for nothing else.
bool runs_on(const std::string& built, int major, int minor);

}  // namespace kvselect::cuda
