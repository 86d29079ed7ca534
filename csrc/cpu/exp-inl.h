// 2^x for x <= 0 (and a little above): relative error below 2e-7; 0 below -126, so exp2(-inf) = 0.
//
// x = n + f with n whole and |f| <= 1/2; the polynomial is a minimax fit of 2^f with p(0) = 1.
// Logits are kept in units of ln 2 (scaled by log2 e when they are made): no argument reduction.

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

inline F32 exp2(F32 x) {
    const F32 clamped = max(broadcast(-126.f), x);
    const F32 n = round_even(clamped);
    const F32 f = sub(clamped, n);
    F32 p = broadcast(1.326472707e-3f);
    p = fma(p, f, broadcast(9.671512649e-3f));
    p = fma(p, f, broadcast(5.550733744e-2f));
    p = fma(p, f, broadcast(2.402224209e-1f));
    p = fma(p, f, broadcast(6.931469776e-1f));
    p = fma(p, f, broadcast(1.f));
    return scale_or_zero(p, n, x, -126.f);
}

// 2^x for any x: relative error below 2e-7 from -126 to 127; less than 2^-125 below, more than
// 2^126 above. Fewer instructions than exp2(): the polynomial is a minimax fit of 2^f on [0, 1],
// and p(0) is not exactly 1.
inline F32 exp2_by_floor(F32 x) {
    const F32 n = round_down(x), f = sub(x, n);
    F32 p = broadcast(1.877576675e-3f);
    p = fma(p, f, broadcast(8.989340091e-3f));
    p = fma(p, f, broadcast(5.582631805e-2f));
    p = fma(p, f, broadcast(2.401536170e-1f));
    p = fma(p, f, broadcast(6.931530732e-1f));
    p = fma(p, f, broadcast(9.999999251e-1f));
    return scale_by_power(p, n);
}

// out[i] = 2^(x[i] - reference) for whole registers of entries; returns their sum.
inline float exp2_against(const float* x, float reference, int64_t count, float* out) {
    F32 total = broadcast(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const F32 power = exp2_by_floor(sub(load(x + i), broadcast(reference)));
        store(out + i, power);
        total = add(total, power);
    }
    return reduce_add(total);
}

inline float exp2(float x) {
    float out[kLanes];
    store(out, exp2(broadcast(x)));
    return out[0];
}
