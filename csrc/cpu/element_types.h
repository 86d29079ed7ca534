// The 16-bit element types of a cache, as bits, with portable conversions that round to nearest
// even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvselect::cpu {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

namespace element {

[[gnu::always_inline]] inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
[[gnu::always_inline]] inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
[[gnu::always_inline]] inline bool is_finite(float value) {
    return (bits_of(value) & 0x7f800000u) != 0x7f800000u;
}

// What the exponent's bits read when all are set: a magnitude from here on is infinity or NaN.
[[gnu::always_inline]] inline constexpr uint32_t infinity_bits(float) { return 0x7f800000u; }
[[gnu::always_inline]] inline constexpr uint32_t infinity_bits(Float16) { return 0x7c00u; }
[[gnu::always_inline]] inline constexpr uint32_t infinity_bits(BFloat16) { return 0x7f80u; }

[[gnu::always_inline]] inline float to_float(float value) { return value; }
[[gnu::always_inline]] inline float to_float(BFloat16 value) {
    return float_of(uint32_t{value.bits} << 16);
}
[[gnu::always_inline]] inline float to_float(Float16 value) {
    const uint32_t sign = uint32_t{value.bits} >> 15 << 31;
    const uint32_t exponent = (value.bits >> 10) & 31u;
    const uint32_t mantissa = value.bits & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return float_of(sign | bits_of(magnitude));
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

[[gnu::always_inline]] inline void from_float(float value, float* out) { *out = value; }
[[gnu::always_inline]] inline void from_float(float value, BFloat16* out) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // keep a NaN a NaN
    } else {
        out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
}
[[gnu::always_inline]] inline void from_float(float value, Float16* out) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits >> 31 << 15;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (magnitude <
               0x38800000u) {  // below 2^-14: a multiple of 2^-24; the addition rounds to even
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace element
}  // namespace kvselect::cpu
