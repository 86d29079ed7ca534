// The sketch codec by its definition (csrc/include/kvselect/sketch.h), one element at a time.
#pragma once

#include <algorithm>

#include "inputs.h"
#include "kvselect/sketch.h"

namespace kvselect::test {

inline uint16_t half_bits(float value) {
    cpu::Float16 half;
    cpu::element::from_float(value, &half);
    return half.bits;
}
inline float half_value(uint16_t bits) { return cpu::element::to_float(cpu::Float16{bits}); }

// The codec's definition: one block of keys into its record, byte for byte.
inline std::vector<uint8_t> encode(const std::vector<float>& keys, int64_t head_dim,
                                   SketchFormat format) {
    std::vector<uint8_t> record(sketch_block_bytes(format, head_dim));
    std::vector<uint16_t> step(head_dim), lo(head_dim);
    const float levels = static_cast<float>(sketch_levels(format));
    bool usable = true;
    for (int64_t d = 0; d < head_dim; ++d) {
        float low = keys[d], high = keys[d];
        for (int64_t t = 0; t < kSketchBlockTokens; ++t) {
            const float x = keys[t * head_dim + d];
            usable = usable && std::isfinite(x);
            low = std::min(low, x);
            high = std::max(high, x);
        }
        step[d] = half_bits((high - low) / levels);
        lo[d] = half_bits(low);
        usable = usable && std::isfinite(half_value(step[d])) && std::isfinite(half_value(lo[d]));
    }
    if (!usable) {
        record[0] = 0x00, record[1] = 0x7e;  // step[0] = NaN
        return record;
    }
    std::memcpy(record.data(), step.data(), 2 * head_dim);
    std::memcpy(record.data() + 2 * head_dim, lo.data(), 2 * head_dim);
    for (int64_t t = 0; t < kSketchBlockTokens; ++t) {
        for (int64_t d = 0; d < head_dim; ++d) {
            const float s = half_value(step[d]);
            const float level =
                s == 0.f ? 0.f : std::nearbyint((keys[t * head_dim + d] - half_value(lo[d])) / s);
            const uint8_t code = static_cast<uint8_t>(std::clamp(level, 0.f, levels));
            const int64_t sub_block = t / kSketchSubBlockTokens, slot = t % kSketchSubBlockTokens;
            uint8_t* codes = record.data() + 4 * head_dim;
            if (format == SketchFormat::kInt8) {
                codes[(sub_block * (head_dim / 4) + d / 4) * 64 + slot * 4 + d % 4] = code;
            } else {
                uint8_t& byte = codes[(sub_block * (head_dim / 8) + d / 8) * 64 + slot * 4 + d % 4];
                byte = static_cast<uint8_t>(byte | (d % 8 < 4 ? code : code << 4));
            }
        }
    }
    return record;
}

inline bool has_codes(const uint8_t* record) {
    uint16_t step;
    std::memcpy(&step, record, 2);
    return std::isfinite(half_value(step));
}

// One stored channel of a block: key = lo + step * code.
struct Channel {
    double step, lo;
    int code;
    double value() const { return lo + step * code; }
};
inline Channel channel(const uint8_t* record, int64_t head_dim, SketchFormat format, int64_t t,
                       int64_t d) {
    uint16_t step, lo;
    std::memcpy(&step, record + 2 * d, 2);
    std::memcpy(&lo, record + 2 * (head_dim + d), 2);
    const int64_t sub_block = t / kSketchSubBlockTokens, slot = t % kSketchSubBlockTokens;
    const uint8_t* codes = record + 4 * head_dim;
    int code;
    if (format == SketchFormat::kInt8) {
        code = codes[(sub_block * (head_dim / 4) + d / 4) * 64 + slot * 4 + d % 4];
    } else {
        const int byte = codes[(sub_block * (head_dim / 8) + d / 8) * 64 + slot * 4 + d % 4];
        code = d % 8 < 4 ? byte & 15 : byte >> 4;
    }
    return {half_value(step), half_value(lo), code};
}

// The sketch of a filled cache: records of its complete blocks, counted from each row's first real
// token; memory without a record holds 0xab.
struct Sketch {
    Sketch(Cache& cache, SketchFormat format, const std::vector<int32_t>& starts)
        : format(format), head_dim(cache.head_dim) {
        int64_t longest = 0;
        for (int32_t length : cache.seqlens) longest = std::max<int64_t>(longest, length);
        const int64_t max_blocks = longest / kSketchBlockTokens,
                      block_bytes = sketch_block_bytes(format, head_dim);
        bytes.assign(static_cast<int64_t>(cache.seqlens.size()) * cache.num_kv_heads * max_blocks *
                         block_bytes,
                     0xab);
        view = SketchView{bytes.data(), format, cache.num_kv_heads * max_blocks * block_bytes,
                          max_blocks * block_bytes, block_bytes};
        for (int64_t row = 0; row < static_cast<int64_t>(cache.seqlens.size()); ++row) {
            const int64_t start = starts.empty() ? 0 : starts[row];
            const int64_t num_blocks = (cache.seqlens[row] - start) / kSketchBlockTokens;
            for (int64_t h = 0; h < cache.num_kv_heads; ++h)
                for (int64_t block = 0; block < num_blocks; ++block) {
                    std::vector<float> keys;
                    for (int64_t t = 0; t < kSketchBlockTokens; ++t)
                        for (int64_t d = 0; d < head_dim; ++d)
                            keys.push_back(static_cast<float>(
                                cache.key(row, start + block * kSketchBlockTokens + t, h, d)));
                    const std::vector<uint8_t> record = encode(keys, head_dim, format);
                    std::copy(record.begin(), record.end(), view.block(row, h, block));
                }
        }
    }
    SketchFormat format;
    int64_t head_dim;
    std::vector<uint8_t> bytes;
    SketchView view;
};

// Records that lie with pages, as a serving engine's do: pages in reverse, one that nobody has
// between any two, and a table with a stride of its own. Memory without a record holds 0xab.
struct PagedRecords {
    PagedRecords(SketchFormat format, int64_t head_dim, int64_t batch, int64_t num_kv_heads,
                 int64_t max_blocks, int64_t page_blocks)
        : batch(batch),
          num_kv_heads(num_kv_heads),
          max_blocks(max_blocks),
          block_bytes(sketch_block_bytes(format, head_dim)) {
        const int64_t row_pages = (max_blocks + page_blocks - 1) / page_blocks;
        const int64_t num_pages = 2 * batch * row_pages;
        table.assign(static_cast<size_t>(batch * (row_pages + 1)), -1);
        for (int64_t row = 0; row < batch; ++row)
            for (int64_t page = 0; page < row_pages; ++page)
                table[static_cast<size_t>(row * (row_pages + 1) + page)] =
                    static_cast<int32_t>(num_pages - 1 - 2 * (row * row_pages + page));
        const int64_t head_bytes = page_blocks * block_bytes;
        bytes.assign(static_cast<size_t>(num_pages * num_kv_heads * head_bytes), 0xab);
        view = SketchView{bytes.data(),  format,      num_kv_heads * head_bytes,
                          head_bytes,    block_bytes, table.data(),
                          row_pages + 1, page_blocks};
    }
    // Of rows that have them to themselves.
    void fill(const SketchView& rows) {
        for (int64_t row = 0; row < batch; ++row)
            for (int64_t h = 0; h < num_kv_heads; ++h)
                for (int64_t block = 0; block < max_blocks; ++block)
                    std::memcpy(view.block(row, h, block), rows.block(row, h, block),
                                static_cast<size_t>(block_bytes));
    }
    int64_t batch, num_kv_heads, max_blocks, block_bytes;
    std::vector<int32_t> table;
    std::vector<uint8_t> bytes;
    SketchView view;
};

}  // namespace kvselect::test
