// The CUDA kernels, run on host fibres (cuda_emulation/), behind the table of the CPU's: every test
// of an op runs on them too.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cpu/dispatch.h"

namespace kvselect::test {

// The GPU that is played, for as long as this lives.
class PlayedDevice {
public:
    explicit PlayedDevice(const emulation::Device& device)
        : before_(std::exchange(emulation::device, device)) {}
    ~PlayedDevice() { emulation::device = before_; }
    PlayedDevice(const PlayedDevice&) = delete;
    PlayedDevice& operator=(const PlayedDevice&) = delete;

private:
    emulation::Device before_;
};

const cpu::Implementation& cuda_emulated_implementation();
// Of sm_90a's own kernels; every other op is the scalar one.
const cpu::Implementation& cuda_emulated_sm90a_implementation();

}  // namespace kvselect::test
