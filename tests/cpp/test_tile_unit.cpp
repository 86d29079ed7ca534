// The emulated tile unit itself: what it computes against plain loops, and what it refuses.
#include "tile_unit.h"

#include <limits>

#include "check.h"
#include "cpu/element_types.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::test;

namespace {

constexpr int kSum = 2, kA = 5, kB = 7;

cpu::TileConfig config_of(int64_t m, int64_t k, int64_t n) {  // channels k, tokens n
    cpu::TileConfig config{};
    config.palette = 1;
    const auto shape = [&](int tile, int64_t rows, int64_t row_bytes) {
        config.rows[tile] = static_cast<uint8_t>(rows);
        config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    };
    shape(kSum, m, 4 * n), shape(kA, m, k), shape(kB, k / 4, 4 * n);
    return config;
}

template <typename Call>
std::string fault_of(Call call) {
    try {
        call();
    } catch (const Failure& fault) {
        return fault.what();
    }
    return "no fault";
}

}  // namespace

TEST_ONCE(tile_unit_multiplies_like_plain_loops) {
    Random random(1);
    for (int round = 0; round < 300; ++round) {
        const int64_t m = 1 + random.below(16), k = 4 * (1 + random.below(16)),
                      n = 1 + random.below(16);
        const int64_t a_stride = k + random.below(9), b_stride = 4 * n + random.below(9),
                      c_stride = 4 * n + 4 * random.below(5);
        // Blocks of exactly the bytes that the shapes promise: the sanitizer sees one too many.
        std::vector<int8_t> a(static_cast<size_t>((m - 1) * a_stride + k));
        std::vector<uint8_t> b(static_cast<size_t>((k / 4 - 1) * b_stride + 4 * n));
        std::vector<uint8_t> c(static_cast<size_t>((m - 1) * c_stride + 4 * n));
        for (int8_t& x : a) x = static_cast<int8_t>(random.bits());
        for (uint8_t& x : b) x = static_cast<uint8_t>(random.bits());
        for (uint8_t& x : c) x = static_cast<uint8_t>(random.bits());
        const std::vector<uint8_t> before = c;

        TileUnit unit;
        const cpu::TileConfig config = config_of(m, k, n);
        unit.configure(&config);
        unit.load(kSum, c.data(), c_stride);
        unit.load(kA, a.data(), a_stride);
        unit.load(kB, b.data(), b_stride);
        unit.dot_signed_unsigned(kSum, kA, kB);
        unit.store(kSum, c.data(), c_stride);
        for (int64_t row = 0; row < m; ++row)
            for (int64_t col = 0; col < n; ++col) {
                int32_t start, got;
                std::memcpy(&start, before.data() + row * c_stride + 4 * col, 4);
                std::memcpy(&got, c.data() + row * c_stride + 4 * col, 4);
                int64_t want = start;
                for (int64_t channel = 0; channel < k; ++channel)
                    want += int64_t{a[row * a_stride + channel]} *
                            b[channel / 4 * b_stride + 4 * col + channel % 4];
                EXPECT(got == static_cast<int32_t>(want), m, " x ", k, " x ", n);
            }
        for (size_t i = 0; i < c.size(); ++i)  // the gaps between rows
            if (static_cast<int64_t>(i) % c_stride >= 4 * n) EXPECT(c[i] == before[i]);

        unit.zero(kSum);
        unit.store(kSum, c.data(), c_stride);
        EXPECT(c[0] == 0 && c.back() == 0);
        EXPECT(unit.configured() && unit.num_dots() == 1);
        unit.release();
        EXPECT(!unit.configured());
    }
}

// Numbers whose products and sums are exact in any order, so that it does not matter how a unit
// adds.
TEST_ONCE(tile_unit_multiplies_bfloat16_pairs) {
    Random random(2);
    for (int round = 0; round < 100; ++round) {
        const int64_t m = 1 + random.below(16), k = 2 * (1 + random.below(16)),
                      n = 1 + random.below(16);
        std::vector<uint16_t> a(static_cast<size_t>(m * k)), b(static_cast<size_t>(k * n));
        const auto fill = [&](std::vector<uint16_t>& values) {
            for (uint16_t& x : values) {
                cpu::BFloat16 number;
                cpu::element::from_float(static_cast<float>(random.below(31) - 15), &number);
                x = number.bits;
                if (random.below(20) == 0) x = 0x8001;  // subnormal: counts as 0
            }
        };
        fill(a), fill(b);
        std::vector<float> c(static_cast<size_t>(m * n), 3.f);
        TileUnit unit;
        const cpu::TileConfig config = config_of(m, 2 * k, n);
        unit.configure(&config);
        unit.load(kSum, c.data(), 4 * n);
        unit.load(kA, a.data(), 2 * k);
        unit.load(kB, b.data(), 4 * n);
        unit.dot_bfloat16(kSum, kA, kB);
        unit.store(kSum, c.data(), 4 * n);
        const auto value = [](uint16_t bits) {
            return bits == 0x8001 ? 0.f : cpu::element::to_float(cpu::BFloat16{bits});
        };
        for (int64_t row = 0; row < m; ++row)
            for (int64_t col = 0; col < n; ++col) {
                float want = 3.f;
                for (int64_t i = 0; i < k; ++i)
                    want += value(a[row * k + i]) * value(b[i / 2 * 2 * n + 2 * col + i % 2]);
                EXPECT(c[row * n + col] == want, m, " x ", k, " x ", n);
            }
    }
}

TEST_ONCE(tile_unit_faults_where_the_hardware_does) {
    TileUnit unit;
    uint8_t memory[1024] = {};
    const auto refuses = [&](const char* why, auto call) {
        const std::string text = fault_of(call);
        EXPECT(text.find(why) != std::string::npos, text, ", expected ", why);
    };
    refuses("#UD: no palette", [&] { unit.zero(kSum); });
    const auto configure = [&](auto change) {
        cpu::TileConfig config = config_of(4, 8, 16);
        change(config);
        unit.configure(&config);
    };
    using C = cpu::TileConfig;
    refuses("#GP: palette 2", [&] { configure([](C& c) { c.palette = 2; }); });
    refuses("#GP: start_row", [&] { configure([](C& c) { c.start_row = 16; }); });
    refuses("#GP: reserved", [&] { configure([](C& c) { c.reserved[13] = 1; }); });
    refuses("#GP: tile 8 does not", [&] { configure([](C& c) { c.rows[8] = 1; }); });
    refuses("#GP: tile 15 does not", [&] { configure([](C& c) { c.row_bytes[15] = 4; }); });
    refuses("#GP: tile 0 has 17",
            [&] { configure([](C& c) { c.rows[0] = 17, c.row_bytes[0] = 4; }); });
    refuses("of 65 bytes", [&] { configure([](C& c) { c.rows[0] = 1, c.row_bytes[0] = 65; }); });
    refuses("of 0 bytes", [&] { configure([](C& c) { c.rows[0] = 1; }); });
    EXPECT(!unit.configured());

    configure([](C&) {});
    unit.load(kA, memory, 64);
    refuses("#UD: tile 0 is not", [&] { unit.load(0, memory, 64); });
    refuses("#UD: tile 8 is not", [&] { unit.zero(8); });
    refuses("#UD: a tile twice", [&] { unit.dot_signed_unsigned(kSum, kA, kA); });
    refuses("#UD: a tile twice", [&] { unit.dot_bfloat16(kSum, kSum, kB); });
    refuses("#UD: [8, 64] += [4, 8] . [2, 64]", [&] {
        configure([](C& c) { c.rows[kSum] = 8; });
        unit.dot_signed_unsigned(kSum, kA, kB);
    });
    refuses("#UD: [4, 64] += [4, 8] . [3, 64]", [&] {
        configure([](C& c) { c.rows[kB] = 3; });
        unit.dot_signed_unsigned(kSum, kA, kB);
    });
    configure([](C& c) { c.row_bytes[kA] = 7; });
    refuses("#UD: tile 5 has no whole dwords", [&] { unit.load(kA, memory, 64); });
    refuses("#UD: tile 5 has no whole dwords", [&] { unit.dot_signed_unsigned(kSum, kA, kB); });
    configure([](C& c) { c.palette = 0; });
    EXPECT(!unit.configured());
}
