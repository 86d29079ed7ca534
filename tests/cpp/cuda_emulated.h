// The CUDA kernels, run on host fibres (cuda_emulation/), behind the table of the CPU's: every test
// of an op runs on them too.
#pragma once

#include "cpu/dispatch.h"

namespace kvselect::test {

const cpu::Implementation& cuda_emulated_implementation();

}  // namespace kvselect::test
