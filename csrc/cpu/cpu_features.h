// What a machine says about itself, and which implementations that allows.
#pragma once

#include <cstdint>
#include <vector>

namespace kvselect::cpu {

struct CpuFeatures {
    uint32_t leaf1_ecx;  // CPUID words; 0 where the CPU has no such leaf
    uint32_t leaf7_ebx, leaf7_ecx, leaf7_edx;
    uint32_t leaf7_1_eax;  // leaf 7, subleaf 1
    uint64_t xcr0;  // register state that the kernel saves; 0 if it does not say (no OSXSAVE)
    bool tile_permission;  // the kernel lets this process use tile data
};

// Of this machine. Where CPU and kernel have tiles, asks the kernel to let this process use them:
// Linux saves the 8 KB of a thread's tile data only in a process that asked, and from then on
// refuses alternate signal stacks that could not hold them. Threads and forks inherit the answer;
// asking twice changes nothing.
CpuFeatures read_cpu_features();

// Names of the x86-64 implementations, "scalar" included, that such a machine can run, slowest
// first.
std::vector<const char*> implementations_for(const CpuFeatures& features);

}  // namespace kvselect::cpu
