// Advice to back memory with pages of 2 MiB: rows that are gathered lie anywhere in it, and a
// look-up of a 4 KiB page that the TLB does not hold costs as much as the row.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvselect::bindings {

constexpr size_t kHugePageBytes = size_t{2} << 20;

// For the whole huge pages within [data, data + num_bytes). No more than advice: a system without
// them, or that refuses, changes nothing.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t num_bytes) {
#if defined(__linux__)
    const uintptr_t begin =
        (reinterpret_cast<uintptr_t>(data) + kHugePageBytes - 1) & ~(kHugePageBytes - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePageBytes - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kvselect::bindings
