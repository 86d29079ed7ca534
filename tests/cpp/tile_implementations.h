// Implementations that only the tests have or only they can run.
#pragma once

#include "cpu/dispatch.h"

namespace kvselect::test {

// Portable C++ with an emulated tile unit: runs everywhere.
const cpu::Implementation& scalar_tiles_implementation();

// The "amx" of this build, machine code and all. On a machine that has AMX it simply runs; where
// only the tile unit is missing, the CPU refuses its instructions one by one and a signal handler
// decodes and executes each on tile_unit(). nullptr where neither is possible.
const cpu::Implementation* amx_implementation_to_test();

}  // namespace kvselect::test
