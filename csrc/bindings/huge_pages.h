// Advice to back memory by huge pages: a decode step walks tens of MiB in strides, and with 4 KiB
// pages it waits for address translation as much as for data.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kvselect::bindings {

// Below this a block of memory need not hold two whole huge pages, wherever it begins.
constexpr int64_t kHugeAdviceBytes = int64_t{6} << 20;

// Before the memory is touched for the first time. Only advice: where the system has no
// transparent huge pages, or does not let processes ask for them, nothing changes.
inline void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (num_bytes < kHugeAdviceBytes) return;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const auto end =
        (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(num_bytes)) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)num_bytes;
#endif
}

}  // namespace kvselect::bindings
