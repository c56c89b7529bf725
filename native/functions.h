// Functions of a vector of numbers, by polynomials, or by tables and shorter ones where a CPU looks 16 numbers up at
// once: 2^x for softmax, and GELU. Second of six files.
#pragma once
#include "vectors.h"

// 1.5 * 2^23: a float of that size has no bits for a fraction, so that adding it rounds, half to even.
constexpr float ROUNDING = 12582912.0f;

#if defined(TABLES)
struct Powers {
    alignas(64) float of[16];
    Powers() {
        for (int i = 0; i < 16; i++) of[i] = (float)std::exp2(i / 16.0);
    }
};
static const Powers POWERS;

// 2^x for x <= 0, relative error 2e-7: 2^(whole sixteenths) by the table, times a polynomial on [-1/32, 1/32].
static inline floats exp2(floats x) {
    const floats rounding = broadcast(ROUNDING / 16);
    floats place = x + rounding, whole = place - rounding, f = x - whole, power = look_up(POWERS.of, place);
    return scale_by(((f * 5.55041087e-2f + 2.40226507e-1f) * f + 6.93147181e-1f) * (f * power) + power, whole);
}

// Phi(x) - 1/2 = a + b t + c t^2 + d t^3 around sixteen x, t apart from the nearest: its derivatives, and of the fourth
// one what Chebyshev's polynomial of that degree has of t^2 and 1.
struct Normal {
    static constexpr float WIDTH = 10.0f / 31;                      // from one x to the next; the last is 4.84
    alignas(64) float a[16], b[16], c[16], d[16];
    Normal() {
        for (int i = 0; i < 16; i++) {
            double x = i * WIDTH, r = WIDTH / 2.0, density = std::exp(-x * x / 2) / std::sqrt(8 * std::atan(1.0));
            double fourth = (3 * x - x * x * x) * density / 24;
            a[i] = (float)(std::erf(x / std::sqrt(2.0)) / 2 - fourth * r * r * r * r / 8);
            b[i] = (float)density;
            c[i] = (float)(-x * density / 2 + fourth * r * r);
            d[i] = (float)((x * x - 1) * density / 6);
        }
    }
};
static const Normal NORMAL;

// x Phi(x). Absolute error 2e-6, and 3e-7 |x| beyond 5.
static inline floats gelu(floats x) {
    const floats rounding = broadcast(ROUNDING);
    floats size = (floats)((ints)x & 0x7fffffff), t = least(size, broadcast(4.999f));
    floats place = t * (1 / Normal::WIDTH) + rounding;
    t -= (place - rounding) * Normal::WIDTH;
    floats p = (look_up(NORMAL.d, place) * t + look_up(NORMAL.c, place)) * t + look_up(NORMAL.b, place);
    return size * (p * t + look_up(NORMAL.a, place)) + x * 0.5f;
}
#else
// 2^x for x <= 0, relative error 2e-7: 2^whole by its exponent bits, 2^fraction by a polynomial on [-1/2, 1/2].
static inline floats exp2(floats x) {
    const floats rounding = broadcast(ROUNDING);
    x = most(x, broadcast(-126.0f));
    floats whole = (x + rounding) - rounding, f = x - whole, p = broadcast(1.54035304e-4f);
    for (float k : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        p = p * f + k;
    return (floats)((ints)p + (__builtin_convertvector(whole, ints) << 23));
}

// x Phi(x). Phi(c) - 1/2 is c times a polynomial in c^2, which interpolates it at Chebyshev's points of |c| <= 5.
// Absolute error 2e-6, and 3e-7 |x| beyond 5.
static inline floats gelu(floats x) {
    floats c = least(most(x, broadcast(-5.0f)), broadcast(5.0f)), s = c * c * 0.08f - 1.0f;
    floats p = broadcast(7.05952991e-4f);
    for (float k : {-1.67403098e-3f, 1.46263157e-3f, -2.53432234e-3f, 6.66780895e-3f, -1.12997434e-2f, 1.62870702e-2f,
                    -2.32163442e-2f, 3.14648720e-2f, -4.04507113e-2f, 5.15189416e-2f, -7.02959372e-2f, 1.41363805e-1f})
        p = p * s + k;
    return x * (c * p + 0.5f);
}
#endif
