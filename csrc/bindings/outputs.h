// Where ops put their results: fresh contiguous tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "bindings/checks.h"
#include "bindings/huge_pages.h"

namespace kvselect::bindings {

inline std::vector<int64_t> contiguous_strides(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(sizes[i], 1);
    }
    return strides;
}

// Memory that nobody has written to. torch::stable::new_empty looks aten's op up by name and boxes
// six arguments at every call: 1.0 us instead of 0.4, and a decode step makes six outputs.
inline torch::stable::Tensor new_output(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                        torch::headeronly::ScalarType dtype, Place place = {}) {
    namespace detail = torch::stable::detail;
    const std::vector<int64_t> strides = contiguous_strides(sizes);
    AtenTensorHandle output = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        detail::to<int32_t>(detail::from(dtype)),
        place.is_cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), place.index,
        &output));
    return torch::stable::Tensor(output);
}

// Blocks that outputs of a megabyte and more live in, used again when their tensor is gone. malloc
// gives such memory back to the system, and a step would pay a page fault for every 4 KiB of its
// scores: at 128K tokens and 8 KV heads 1024 of them, 1.5 ms. A block has room to spare, since a
// context grows by a token a step.
class OutputBlocks {
public:
    static constexpr size_t kPageBytes = size_t{2} << 20;
    static constexpr size_t kSmallest = size_t{1} << 20, kLargest = size_t{64} << 20;

    static void* take(size_t num_bytes) {
        for (std::atomic<Block*>& slot : slots_) {
            Block* const block = slot.exchange(nullptr, std::memory_order_acquire);
            if (!block) continue;
            if (block->num_bytes >= num_bytes) return block + 1;
            ::operator delete(block, kAlignment);  // the context has outgrown it
        }
        const size_t whole =
            (sizeof(Block) + num_bytes + num_bytes / 8 + kPageBytes - 1) / kPageBytes * kPageBytes;
        void* const memory = ::operator new(whole, kAlignment);
        advise_huge_pages(memory, static_cast<int64_t>(whole));
        return new (memory) Block{whole - sizeof(Block)} + 1;
    }
    static void give_back(void* data) {
        Block* block = static_cast<Block*>(data) - 1;
        for (std::atomic<Block*>& slot : slots_) {
            block = slot.exchange(block, std::memory_order_acq_rel);
            if (!block) return;
        }
        ::operator delete(block, kAlignment);
    }

private:
    struct alignas(64) Block {
        size_t num_bytes;
    };
    static constexpr std::align_val_t kAlignment{kPageBytes};
    // No lock: a process may fork while another thread holds it.
    static inline std::atomic<Block*> slots_[2] = {nullptr, nullptr};
};

// As new_output, for results that grow with the context.
inline torch::stable::Tensor new_long_output(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                             torch::headeronly::ScalarType dtype,
                                             size_t item_bytes) {
    size_t num_bytes = item_bytes;
    for (const int64_t size : sizes) num_bytes *= static_cast<size_t>(size);
    if (num_bytes < OutputBlocks::kSmallest || num_bytes > OutputBlocks::kLargest)
        return new_output(sizes, dtype);
    const std::vector<int64_t> strides = contiguous_strides(sizes);
    std::unique_ptr<void, void (*)(void*)> block(OutputBlocks::take(num_bytes),
                                                 &OutputBlocks::give_back);
    torch::stable::Tensor output = torch::stable::from_blob(
        block.get(), sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
        dtype, &OutputBlocks::give_back);
    (void)block.release();  // the tensor's now
    return output;
}

}  // namespace kvselect::bindings
