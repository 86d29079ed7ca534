// Vector operations in portable C++: eight floats that any compiler may map to whatever the machine
// has. Included inside the namespace of isa_scalar.cpp; the same names exist in vec_avx2.h and
// vec_avx512.h.

constexpr int kLanes = 8;
constexpr int kGemmRows = 2, kGemmVecs = 2;    // register tile of the prefill kernel
constexpr int kValueCols = 2, kValueVecs = 2;  // register tile of the decode kernel's weighted sum
constexpr int kSketchParts = 2;                // registers of tokens per pass over an int4 sketch

constexpr bool kFusedFma = false;  // whether fma() rounds once

struct F32 {
    float lane[kLanes];
};
struct I32 {
    int32_t lane[kLanes];
};

template <typename Fn>
inline F32 map_lanes(Fn fn) {
    F32 out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = fn(i);
    return out;
}
inline F32 broadcast(float x) {
    return map_lanes([=](int) { return x; });
}
inline F32 load(const float* p) {
    return map_lanes([=](int i) { return p[i]; });
}
inline F32 load(const BFloat16* p) {
    return map_lanes([=](int i) { return element::to_float(p[i]); });
}
inline F32 load(const Float16* p) {
    return map_lanes([=](int i) { return element::to_float(p[i]); });
}
template <typename T>
inline void store(T* p, F32 x) {
    for (int i = 0; i < kLanes; ++i) element::from_float(x.lane[i], p + i);
}
inline F32 add(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F32 sub(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F32 mul(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F32 div(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F32 fma(F32 a, F32 b, F32 c) {
    return map_lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// The second operand wins against a NaN in the first, as in the x86 instructions.
inline F32 max(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 min(F32 a, F32 b) {
    return map_lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F32 abs(F32 a) {
    return map_lanes(
        [&](int i) { return element::float_of(element::bits_of(a.lane[i]) & 0x7fffffffu); });
}
// max(|a|, b) of numbers, b not negative.
inline F32 max_abs(F32 a, F32 b) { return max(abs(a), b); }
inline F32 round_even(F32 a) {
    return map_lanes([&](int i) { return std::nearbyint(a.lane[i]); });
}
// a * 2^n, or 0 where x < bound; n whole, -126 .. 127, and NaN only where `a` is NaN too.
inline F32 scale_or_zero(F32 a, F32 n, F32 x, float bound) {
    return map_lanes([&](int i) {
        if (x.lane[i] < bound) return 0.f;
        const int32_t exponent = n.lane[i] == n.lane[i] ? static_cast<int32_t>(n.lane[i]) : 0;
        return a.lane[i] * element::float_of(static_cast<uint32_t>(exponent + 127) << 23);
    });
}
inline F32 round_down(F32 a) {
    return map_lanes([&](int i) { return std::floor(a.lane[i]); });
}
// a * 2^n, n whole; below 2^-125 * a from n = -127 down, at least 2^127 * a from n = 127 up.
inline F32 scale_by_power(F32 a, F32 whole) {
    return map_lanes([&](int i) {
        const float n = whole.lane[i];
        const int32_t exponent = n > 127.f ? 127 : n > -127.f ? static_cast<int32_t>(n) : -127;
        return a.lane[i] * element::float_of(static_cast<uint32_t>(exponent + 127) << 23);
    });
}
inline float reduce_add(F32 a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) +
           ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
}
inline float reduce_max(F32 a) {
    float out = a.lane[0];
    for (int i = 1; i < kLanes; ++i) out = a.lane[i] > out ? a.lane[i] : out;
    return out;
}
// Lane j of x[i] and lane i of x[j] change places.
inline void transpose(F32 x[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < i; ++j) {
            const float below = x[i].lane[j];
            x[i].lane[j] = x[j].lane[i];
            x[j].lane[i] = below;
        }
}
inline void reduce_add4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    out[0] = reduce_add(a), out[1] = reduce_add(b), out[2] = reduce_add(c), out[3] = reduce_add(d);
}
// out[c * stride + i] = scale * the sum of acc[c][i].
inline void reduce_add_4x4(const F32 acc[4][4], float scale, float* out, int64_t stride) {
    for (int c = 0; c < 4; ++c) {
        float sums[4];
        reduce_add4(acc[c][0], acc[c][1], acc[c][2], acc[c][3], sums);
        for (int i = 0; i < 4; ++i) out[c * stride + i] = scale * sums[i];
    }
}
inline void reduce_max4(F32 a, F32 b, F32 c, F32 d, float out[4]) {
    out[0] = reduce_max(a), out[1] = reduce_max(b), out[2] = reduce_max(c), out[3] = reduce_max(d);
}
inline uint32_t mask_ge(F32 a, F32 b) {
    uint32_t out = 0;
    for (int i = 0; i < kLanes; ++i) out |= static_cast<uint32_t>(a.lane[i] >= b.lane[i]) << i;
    return out;
}
// Bit i: low <= x <= high.
inline uint32_t mask_between(F32 x, F32 low, F32 high) {
    return mask_ge(x, low) & mask_ge(high, x);
}
// Writes base + i for every set bit i of the mask, ascending; returns how many. May write up to
// kLanes entries.
inline int64_t pack_positions(int32_t* out, int32_t base, uint32_t mask) {
    int64_t count = 0;
    for (int i = 0; i < kLanes; ++i) {
        out[count] = base + i;
        count += mask >> i & 1u;
    }
    return count;
}
// Writes in[i] for every set bit i of the mask, in order; returns how many. Reads kLanes entries
// and may write as many; `out` may be `in` or lie before it.
inline int64_t pack_words(int32_t* out, const int32_t* in, uint32_t mask) {
    int32_t words[kLanes];
    std::memcpy(words, in, sizeof words);
    int64_t count = 0;
    for (int i = 0; i < kLanes; ++i) {
        out[count] = words[i];
        count += mask >> i & 1u;
    }
    return count;
}
// Rounds each lane, already within [-128, 127], to an integer and stores it as a byte: 4 * kLanes
// bytes.
inline void store_signed_bytes(int8_t* p, F32 a, F32 b, F32 c, F32 d) {
    const F32 parts[4] = {a, b, c, d};
    for (int i = 0; i < 4 * kLanes; ++i)
        p[i] = static_cast<int8_t>(std::nearbyint(parts[i / kLanes].lane[i % kLanes]));
}

// Sketch codes: lane = token, four unsigned bytes each.
using Codes = I32;
inline Codes load_codes(const uint8_t* p) {
    Codes out;
    std::memcpy(out.lane, p, sizeof out.lane);
    return out;
}
inline Codes low_nibbles(Codes c) {
    Codes out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = c.lane[i] & 0x0f0f0f0f;
    return out;
}
inline Codes high_nibbles(Codes c) {
    Codes out;
    for (int i = 0; i < kLanes; ++i)
        out.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(c.lane[i]) >> 4 & 0x0f0f0f0fu);
    return out;
}
inline I32 zero_i32() { return I32{}; }
inline I32 count_ge(I32 acc, F32 a, F32 b) {  // acc[i] + (a[i] >= b[i])
    for (int i = 0; i < kLanes; ++i) acc.lane[i] += a.lane[i] >= b.lane[i];
    return acc;
}
inline int64_t reduce_add(I32 a) {
    int64_t out = 0;
    for (int i = 0; i < kLanes; ++i) out += a.lane[i];
    return out;
}
inline I32 dot4(I32 acc, Codes codes, int32_t q4) {
    int8_t q[4];
    std::memcpy(q, &q4, 4);
    for (int i = 0; i < kLanes; ++i) {
        uint8_t c[4];
        std::memcpy(c, &codes.lane[i], 4);
        acc.lane[i] += c[0] * q[0] + c[1] * q[1] + c[2] * q[2] + c[3] * q[3];
    }
    return acc;
}
inline I32 dot4_nibbles(I32 acc, Codes codes, int32_t q4) {  // dot4 of codes up to 15
    return dot4(acc, codes, q4);
}
// acc[i] += the four signed bytes at p + 4 i.
inline I32 add_byte_quads(I32 acc, const uint8_t* p) {
    for (int i = 0; i < 4 * kLanes; ++i) acc.lane[i / 4] += static_cast<int8_t>(p[i]);
    return acc;
}
inline I32 load(const int32_t* p) {
    I32 out;
    std::memcpy(out.lane, p, sizeof out.lane);
    return out;
}
inline F32 to_f32(I32 a) {
    return map_lanes([&](int i) { return static_cast<float>(a.lane[i]); });
}
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p); }
[[gnu::always_inline]] inline void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Bytes of a row on their way from one place to another.
constexpr int64_t kRawBytes = 32;
struct Raw {
    uint8_t byte[kRawBytes];
};
inline Raw load_raw(const void* p) {
    Raw out;
    std::memcpy(&out, p, sizeof out);
    return out;
}
inline void store_raw(void* p, Raw x) { std::memcpy(p, &x, sizeof x); }
// Past the caches; p is a multiple of kRawBytes, and stream_fence() comes before anyone is told.
inline void stream_raw(void* p, Raw x) { store_raw(p, x); }
inline void stream_fence() {}
inline Raw zero_raw() { return Raw{}; }
// Per element of type T the larger magnitude, as bits.
template <typename T>
inline Raw larger_magnitude(Raw a, Raw b) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    Bits x[kRawBytes / sizeof(T)], y[kRawBytes / sizeof(T)];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
    for (size_t i = 0; i < kRawBytes / sizeof(T); ++i) {
        const Bits magnitude = static_cast<Bits>(y[i] & (std::numeric_limits<Bits>::max() >> 1));
        x[i] = magnitude > x[i] ? magnitude : x[i];
    }
    std::memcpy(&a, x, sizeof a);
    return a;
}
// Bits of finite elements as signed integers of the same order (-0 below 0), and back.
template <typename T>
inline Raw ordered(Raw a) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
    Bits x[kRawBytes / sizeof(T)];
    std::memcpy(x, &a, sizeof a);
    for (Bits& bits : x)
        bits = static_cast<Bits>(bits < 0 ? bits ^ std::numeric_limits<Bits>::max() : bits);
    std::memcpy(&a, x, sizeof a);
    return a;
}
template <typename T>
inline void take_ordered(Raw a, Raw* low, Raw* high) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
    Bits x[kRawBytes / sizeof(T)], l[kRawBytes / sizeof(T)], h[kRawBytes / sizeof(T)];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(l, low, sizeof a);
    std::memcpy(h, high, sizeof a);
    for (size_t i = 0; i < kRawBytes / sizeof(T); ++i) {
        l[i] = x[i] < l[i] ? x[i] : l[i];
        h[i] = x[i] > h[i] ? x[i] : h[i];
    }
    std::memcpy(low, l, sizeof a);
    std::memcpy(high, h, sizeof a);
}
template <typename T>
inline bool any_nonfinite(Raw magnitudes) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    Bits x[kRawBytes / sizeof(T)];
    std::memcpy(x, &magnitudes, sizeof x);
    bool any = false;
    for (Bits bits : x) any |= bits >= element::infinity_bits(T{});
    return any;
}

// Levels of 4 tokens x kLanes channels as bytes: rounded to nearest even, clamped to [0, highest].
// 16 bytes m hold channels 4m .. 4m + 3 of token 0, then of token 1, 2, 3.
inline Codes pack_levels(F32 t0, F32 t1, F32 t2, F32 t3, uint8_t highest) {
    uint8_t bytes[sizeof(Codes)];
    const F32* tokens[4] = {&t0, &t1, &t2, &t3};
    for (int i = 0; i < kLanes; ++i) {
        for (int t = 0; t < 4; ++t) {
            const float level = std::nearbyint(tokens[t]->lane[i]);
            bytes[i / 4 * 16 + t * 4 + i % 4] =
                level >= highest ? highest : (level > 0.f ? static_cast<uint8_t>(level) : 0);
        }
    }
    return load_codes(bytes);
}
// Four of those, of 16 tokens, as kLanes / 4 lines of 64 bytes (sketch.h, int8).
inline void store_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    const Codes* quarters[4] = {&a, &b, &c, &d};
    for (int line = 0; line < kLanes / 4; ++line)
        for (int i = 0; i < 4; ++i)
            std::memcpy(p + line * 64 + i * 16,
                        reinterpret_cast<const uint8_t*>(quarters[i]) + line * 16, 16);
}
// The same as kLanes / 8 lines whose bytes hold two levels each, all below 16 (sketch.h, int4).
inline void store_nibble_lines(uint8_t* p, Codes a, Codes b, Codes c, Codes d) {
    uint8_t lines[kLanes / 4 * 64];
    store_lines(lines, a, b, c, d);
    for (int line = 0; line < kLanes / 8; ++line)
        for (int i = 0; i < 64; ++i)
            p[line * 64 + i] =
                static_cast<uint8_t>(lines[line * 128 + i] | lines[line * 128 + 64 + i] << 4);
}
