// exp(x) for x <= 0 (and a little above): relative error below 2e-7, 0 below -87.3, so exp(-inf) =
// 0.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is the classic degree-six one for e^r in
// float32.

inline F32 exp(F32 x) {
    const F32 clamped = max(broadcast(-87.3f), min(broadcast(88.f), x));
    const F32 n = round_even(mul(clamped, broadcast(1.44269504088896341f)));
    F32 r = fma(n, broadcast(-0.693359375f), clamped);
    r = fma(n, broadcast(2.12194440e-4f), r);
    F32 p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, broadcast(1.f)));
    return zero_where_below(times_power_of_two(p, n), x, -87.3f);
}

inline float exp(float x) {
    float out[kLanes];
    store(out, exp(broadcast(x)));
    return out[0];
}
