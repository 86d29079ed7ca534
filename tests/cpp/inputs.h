// Inputs of the C++ tests: seeded numbers, tensors of any element type, caches in every layout.
// Every buffer is a heap block of exactly the size that is promised, so that the address sanitizer
// sees each element read too many, and everything that no kernel may read holds NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/element_types.h"
#include "kvselect/kv_view.h"
#include "kvselect/query_blocks.h"
#include "kvselect/rope.h"

namespace kvselect::test {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
constexpr int64_t kHeadDims[] = {32, 64, 80, 96, 128, 160, 192, 256, 512};

class Random {  // splitmix64
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    double normal() {  // Irwin-Hall: close enough, and the same on every machine
        double sum = -6.0;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }

private:
    uint64_t state_;
};

inline size_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Elements of one of the cache's types, read and written as double.
class Elements {
public:
    Elements(DType dtype, int64_t count)
        : dtype_(dtype), bytes_(element_bytes(dtype) * static_cast<size_t>(count)) {
        for (int64_t i = 0; i < count; ++i) set(i, kNaN);
    }
    double get(int64_t i) const {
        if (dtype_ == DType::kFloat32) return read<float>(i);
        if (dtype_ == DType::kFloat16) return cpu::element::to_float(read<cpu::Float16>(i));
        return cpu::element::to_float(read<cpu::BFloat16>(i));
    }
    void set(int64_t i, double value) {
        if (dtype_ == DType::kFloat32) return write<float>(i, value);
        if (dtype_ == DType::kFloat16) return write<cpu::Float16>(i, value);
        write<cpu::BFloat16>(i, value);
    }
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    const std::vector<uint8_t>& bytes() const { return bytes_; }

private:
    template <typename T>
    T read(int64_t i) const {
        T value;
        std::memcpy(&value, bytes_.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
        return value;
    }
    template <typename T>
    void write(int64_t i, double value) {
        T element;
        cpu::element::from_float(static_cast<float>(value), &element);
        std::memcpy(bytes_.data() + static_cast<size_t>(i) * sizeof(T), &element, sizeof(T));
    }

    DType dtype_;
    std::vector<uint8_t> bytes_;
};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

enum class Layout { kHeadMajor, kTokenMajor, kPaged };
constexpr Layout kLayouts[] = {Layout::kHeadMajor, Layout::kTokenMajor, Layout::kPaged};

// Keys and values of a batch; positions [0, seqlens[row]) are filled by fill(), the rest holds NaN.
struct Cache {
    Cache(DType dtype, Layout layout, std::vector<int32_t> lengths, int64_t num_kv_heads,
          int64_t head_dim, int64_t capacity = 0)
        : dtype(dtype),
          num_kv_heads(num_kv_heads),
          head_dim(head_dim),
          seqlens(std::move(lengths)),
          k(dtype, 0),
          v(dtype, 0) {
        const int64_t batch = static_cast<int64_t>(seqlens.size());
        for (int32_t length : seqlens) capacity = std::max<int64_t>(capacity, length);
        capacity = std::max<int64_t>(capacity, 1);
        int64_t pages = batch;
        page_block_size = capacity;
        if (layout == Layout::kPaged) {  // pages of 16 tokens, dealt out backwards
            page_block_size = 16;
            table_width = (capacity + 15) / 16;
            pages = batch * table_width;
            for (int64_t i = 0; i < pages; ++i) {
                block_table.push_back(static_cast<int32_t>(pages - 1 - i));
            }
        }
        if (layout == Layout::kHeadMajor) {
            token_stride = head_dim;
            head_stride = page_block_size * head_dim;
        } else {
            token_stride = num_kv_heads * head_dim;
            head_stride = head_dim;
        }
        page_stride = page_block_size * num_kv_heads * head_dim;
        k = Elements(dtype, pages * page_stride);
        v = Elements(dtype, pages * page_stride);
    }

    void fill(Random& random) {
        for (int64_t row = 0; row < static_cast<int64_t>(seqlens.size()); ++row) {
            for (int64_t t = 0; t < seqlens[row]; ++t) {
                for (int64_t h = 0; h < num_kv_heads; ++h) {
                    for (int64_t d = 0; d < head_dim; ++d) {
                        k.set(keys().offset(row, t, h) + d, random.normal());
                        v.set(keys().offset(row, t, h) + d, random.normal());
                    }
                }
            }
        }
    }
    KVView keys() { return view(k); }
    KVView values() { return view(v); }
    double key(int64_t row, int64_t t, int64_t h, int64_t d) {
        return k.get(keys().offset(row, t, h) + d);
    }
    double value(int64_t row, int64_t t, int64_t h, int64_t d) {
        return v.get(keys().offset(row, t, h) + d);
    }
    // A token that must not be read: NaN in key and value of every head.
    void poison(int64_t row, int64_t t) {
        for (int64_t h = 0; h < num_kv_heads; ++h) {
            for (int64_t d = 0; d < head_dim; ++d) {
                k.set(keys().offset(row, t, h) + d, kNaN);
                v.set(keys().offset(row, t, h) + d, kNaN);
            }
        }
    }

    DType dtype;
    int64_t num_kv_heads, head_dim, page_block_size = 0, table_width = 0;
    int64_t page_stride = 0, token_stride = 0, head_stride = 0;
    std::vector<int32_t> seqlens, block_table;
    Elements k, v;

private:
    KVView view(Elements& elements) {
        return KVView{elements.data(), page_stride,
                      token_stride,    head_stride,
                      page_block_size, block_table.empty() ? nullptr : block_table.data(),
                      table_width};
    }
};

// A rotation table, and the same rotation in double.
struct RopeTable {
    RopeTable(int64_t num_positions, int64_t num_pairs, int64_t start, bool interleaved)
        : num_positions(num_positions),
          num_pairs(num_pairs),
          start(start),
          interleaved(interleaved) {
        for (int64_t p = 0; p < num_positions; ++p) {
            for (int64_t i = 0; i < num_pairs; ++i) {
                const double angle =
                    static_cast<double>(p) *
                    std::pow(100.0, -static_cast<double>(i) / static_cast<double>(num_pairs));
                cos.push_back(static_cast<float>(std::cos(angle)));
                sin.push_back(static_cast<float>(std::sin(angle)));
            }
        }
    }
    RopeView view() const {
        return RopeView{cos.data(), sin.data(), num_positions, num_pairs, start, interleaved};
    }
    std::vector<double> rotate(std::vector<double> x, int64_t position) const {
        for (int64_t i = 0; i < num_pairs; ++i) {
            const size_t a = static_cast<size_t>(start + (interleaved ? 2 * i : i));
            const size_t b = a + static_cast<size_t>(interleaved ? 1 : num_pairs);
            const size_t at = static_cast<size_t>(position * num_pairs + i);
            const double xa = x[a], xb = x[b];
            x[a] = xa * double{cos[at]} - xb * double{sin[at]};
            x[b] = xb * double{cos[at]} + xa * double{sin[at]};
        }
        return x;
    }
    std::vector<float> cos, sin;
    int64_t num_positions, num_pairs, start;
    bool interleaved;
};

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0.0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

// Error of a tensor as the whole project measures it: |got - want| / |want|.
class RelativeError {
public:
    void add(double got, double want) {
        difference_ += (got - want) * (got - want);
        norm_ += want * want;
    }
    double value() const {
        return norm_ > 0 ? std::sqrt(difference_ / norm_) : std::sqrt(difference_);
    }

private:
    double difference_ = 0.0, norm_ = 0.0;
};

inline double tolerance(DType dtype) {
    return dtype == DType::kFloat32 ? 2e-6 : (dtype == DType::kFloat16 ? 2e-3 : 1.6e-2);
}

}  // namespace kvselect::test
