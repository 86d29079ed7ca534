// Soft-capped logits: cap * tanh(logit / cap), for models that bound their attention logits.
//
// tanh(z) = t / (t + 2) with t = e^(2z) - 1 = 2^n q + (2^n - 1), where 2z / ln 2 = n + f, n whole,
// |f| <= 1/2, q = 2^f - 1: small logits keep their relative precision. The polynomial is a minimax
// fit of (2^f - 1) / f, relative error below 2e-8.

constexpr float kLargestExponent = 30.f;  // tanh is 1 in float32 long before

// `to_exponent` = 2 / cap and `top` = cap * log2 e for logits in units of ln 2. A logit that is not
// finite becomes NaN: the cap would make an ordinary number of an infinite one.
inline F32 soft_capped(F32 x, F32 to_exponent, F32 top) {
    const F32 w =
        min(broadcast(kLargestExponent), max(broadcast(-kLargestExponent), mul(x, to_exponent)));
    const F32 n = round_even(w), f = sub(w, n);
    F32 q = broadcast(1.545316295e-4f);
    q = fma(q, f, broadcast(1.339086336e-3f));
    q = fma(q, f, broadcast(9.618082557e-3f));
    q = fma(q, f, broadcast(5.550357114e-2f));
    q = fma(q, f, broadcast(2.402265092e-1f));
    q = fma(q, f, broadcast(6.931471880e-1f));
    const F32 power = scale_or_zero(broadcast(1.f), n, w, -126.f);
    const F32 t = fma(mul(power, f), q, sub(power, broadcast(1.f)));
    const F32 tanh = div(t, add(t, broadcast(2.f)));
    return fma(x, broadcast(0.f), mul(top, tanh));
}

// Logits in units of ln 2, in place; softcap 0: as they are.
inline void cap_logits(float* logits, int64_t count, float softcap) {
    if (softcap == 0.f) return;
    const F32 to_exponent = broadcast(2.f / softcap), top = broadcast(softcap * kLog2E);
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        store(logits + i, soft_capped(load(logits + i), to_exponent, top));
    if (whole == count) return;
    float rest[kLanes] = {};
    for (int64_t i = whole; i < count; ++i) rest[i - whole] = logits[i];
    store(rest, soft_capped(load(rest), to_exponent, top));
    for (int64_t i = whole; i < count; ++i) logits[i] = rest[i - whole];
}

// log2 of 2^log2_sum + e^sink: a softmax with one more logit, of a value that is 0. Nothing is
// added to an empty sum.
inline float with_sink(float log2_sum, float sink) {
    const float other = sink * kLog2E;
    if (log2_sum == -INFINITY || other == -INFINITY) return log2_sum;
    const float top = other > log2_sum ? other : log2_sum;
    return top + std::log2(exp2(log2_sum - top) + exp2(other - top));
}
