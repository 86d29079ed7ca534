#include "check.h"
#include "inputs.h"

using namespace kvselect;
using namespace kvselect::cpu;

TEST(every_float16_widens_exactly_and_comes_back) {
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const Float16 half{static_cast<uint16_t>(bits)};
        const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const float got = element::to_float(half);
        if (exponent == 31 && mantissa) {
            EXPECT(std::isnan(got), bits);
            continue;
        }
        double want = exponent == 31 ? test::kInf
                      : exponent == 0
                          ? std::ldexp(mantissa, -24)
                          : std::ldexp(1024 + mantissa, static_cast<int>(exponent) - 25);
        if (bits >> 15) want = -want;
        EXPECT(double{got} == want, bits);
        Float16 back;
        element::from_float(got, &back);
        EXPECT(back.bits == half.bits, bits);
    }
}

// Between two neighbours of the narrow type: nearest, and to the even one of two equally near.
template <typename T>
static void expect_nearest(float value) {
    T got;
    element::from_float(value, &got);
    const double rounded = element::to_float(got);
    for (int step : {-1, 1}) {
        const T other{static_cast<uint16_t>(got.bits + step)};
        const double neighbour = element::to_float(other);
        if (!std::isfinite(neighbour) || !std::isfinite(rounded)) continue;
        const double mine = std::abs(rounded - double{value}),
                     its = std::abs(neighbour - double{value});
        EXPECT(mine < its || (mine == its && got.bits % 2 == 0), value, " became ", rounded);
    }
}

TEST(narrowing_rounds_to_nearest_even) {
    test::Random random(7);
    for (int i = 0; i < 20000; ++i) {
        const float value = static_cast<float>(random.normal() * std::exp2(random.normal() * 6.0));
        expect_nearest<Float16>(value);
        expect_nearest<BFloat16>(value);
    }
    for (float value : {1.f + 0x1p-11f, 1.f + 3 * 0x1p-11f, 0x1p-25f, 3 * 0x1p-25f, 65519.f}) {
        expect_nearest<Float16>(value);
    }
    for (float value : {1.f + 0x1p-8f, 1.f + 3 * 0x1p-8f}) expect_nearest<BFloat16>(value);
    Float16 half;
    element::from_float(65520.f, &half);
    EXPECT(half.bits == 0x7c00);
    element::from_float(NAN, &half);
    EXPECT(std::isnan(element::to_float(half)));
}
