// Arithmetic on single values, written so that the compiler makes vectors of it.
//
// What includes this is compiled once for each instruction set. So everything here has
// internal linkage, and no template of the standard library is used: the linker would keep one copy
// of it for all of them, perhaps one with instructions that the machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "abi.h"

#define INLINE static inline __attribute__((always_inline))

// Adding it leaves the nearest whole number, ties to even, in a float's low bits (|x| < 2^22).
static const float kRounder = 12582912.0f;  // 1.5 * 2^23; its low byte is 0

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Grows with |x|; from kNotFiniteSize on, x is infinite or NaN. Loops keep the largest: a check of
// each value would cost more.
INLINE int32_t size_of(float x) { return int32_t(bits_of(x) & 0x7FFFFFFFu); }

static const int32_t kNotFiniteSize = 0x7F800000;

INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

INLINE float load(const float* x, int64_t i) { return x[i]; }
INLINE float load(const uint16_t* x, int64_t i) { return float_of(uint32_t(x[i]) << 16); }

// Contraction is off for the whole file, as torch rounds each product; this is where it is wanted.
INLINE float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Cephes' expf: a relative error below 1e-7, but no infinities and no subnormal numbers.
INLINE float exp_of(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    const float shifted = madd(x, 1.44269504088896341f, kRounder);
    const float n = shifted - kRounder;
    float r = madd(n, -0.693359375f, x);
    r = madd(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = madd(p, r, 1.3981999507e-3f);
    p = madd(p, r, 8.3334519073e-3f);
    p = madd(p, r, 4.1665795894e-2f);
    p = madd(p, r, 1.6666665459e-1f);
    p = madd(p, r, 5.0000001201e-1f);
    p = madd(p, r * r, r) + 1.0f;
    return p * float_of((bits_of(shifted) << 23) + 0x3F800000u);  // times 2^n
}

// x / (1 + e^-exponent). `exp_of` stops growing at 88, so below -88 the quotient must not grow either.
INLINE float over_one_plus_exp(float x, float exponent) {
    return (x > -88.0f ? x : -88.0f) / (1.0f + exp_of(-exponent));
}

INLINE float silu_of(float x) { return over_one_plus_exp(x, x); }

// Abramowitz and Stegun 7.1.26, as in torch's own vectors: an absolute error below 2e-7.
INLINE float erf_of(float x) {
    const float a = std::fabs(x);
    const float t = 1.0f / madd(0.3275911f, a, 1.0f);
    float p = 1.061405429f;
    p = madd(p, t, -1.453152027f);
    p = madd(p, t, 1.421413741f);
    p = madd(p, t, -0.284496736f);
    p = madd(p, t, 0.254829592f);
    return std::copysign(1.0f - p * t * exp_of(-a * a), x);
}

INLINE float gelu_of(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f)); }

// 0.5 * x * (1 + tanh(u)) = x * sigmoid(2 u)
INLINE float gelu_tanh_of(float x) {
    const float u = 0.79788456080286536f * madd(0.044715f * x * x, x, x);
    return over_one_plus_exp(x, 2.0f * u);
}

template <int kind>
INLINE float activate(float x) {
    if (kind == kSilu) return silu_of(x);
    if (kind == kGelu) return gelu_of(x);
    if (kind == kGeluTanh) return gelu_tanh_of(x);
    return x;
}

// A row of a grid, ready for use.
struct Levels {
    float inverse, low, high;
    uint32_t zero;
    const float* factors;  // of neighbouring channels, or null
};

INLINE bool levels_of(const Grid& grid, Levels* levels) {
    const int64_t row = grid.row ? *grid.row : 0;
    if (row < 0 || row >= grid.rows) return false;
    const int zero = grid.zero_point[row];
    *levels = {1.0f / grid.scale[row], float(-zero), float(grid.largest - zero), uint32_t(zero),
               grid.factors};
    return true;
}

// clamp(round(y / scale) + zero, 0, largest). Clamping first, to whole numbers, gives the same.
INLINE uint8_t code_of(float y, const Levels& levels) {
    float v = y * levels.inverse;
    v = v > levels.low ? v : levels.low;
    v = v < levels.high ? v : levels.high;
    return uint8_t(bits_of(v + kRounder) + levels.zero);
}

// Values of neighbouring channels, of which `channel` is the first.
INLINE void encode_floats(const float* y, int64_t count, const Levels& levels, uint8_t* codes,
                          int64_t channel = 0) {
    const Levels g = levels;
    if (g.factors) {
        const float* factors = g.factors + channel;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) codes[i] = code_of(y[i] * factors[i], g);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) codes[i] = code_of(y[i], g);
}

// Activations go through a small buffer: vectors of bytes would leave long tails of single values.
static const int64_t kSpan = 512;

// Whether all `x` are finite.
template <int kind, typename T>
INLINE bool activate_span(const T* x, int64_t count, float* y) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
        const float v = load(x, i);
        largest = larger(largest, size_of(v));
        y[i] = activate<kind>(v);
    }
    return largest < kNotFiniteSize;
}

// `values` from number `start`, activated, into `y`; whether all are finite.
static bool activate_values(const void* values, bool bf16, int64_t start, int64_t count, int kind,
                            float* y) {
    const float* f = static_cast<const float*>(values) + start;
    const uint16_t* h = static_cast<const uint16_t*>(values) + start;
    switch (kind * 2 + bf16) {
        case 2 * kNone: return activate_span<kNone>(f, count, y);
        case 2 * kNone + 1: return activate_span<kNone>(h, count, y);
        case 2 * kSilu: return activate_span<kSilu>(f, count, y);
        case 2 * kSilu + 1: return activate_span<kSilu>(h, count, y);
        case 2 * kGelu: return activate_span<kGelu>(f, count, y);
        case 2 * kGelu + 1: return activate_span<kGelu>(h, count, y);
        case 2 * kGeluTanh: return activate_span<kGeluTanh>(f, count, y);
        default: return activate_span<kGeluTanh>(h, count, y);
    }
}

// `values` from number `start`, activated and encoded; with factors they are those of a pixel or of
// a row, from channel 0. Whether all are finite.
static bool encode_values(const void* values, bool bf16, int64_t start, int64_t count, int kind,
                          const Levels& levels, uint8_t* codes) {
    float y[kSpan];
    bool finite = true;
    for (int64_t i = 0; i < count; i += kSpan) {
        const int64_t n = count - i < kSpan ? count - i : kSpan;
        finite &= activate_values(values, bf16, start + i, n, kind, y);
        encode_floats(y, n, levels, codes + i, i);
    }
    return finite;
}

INLINE bool is_finite(double x) { return x - x == 0.0; }

// Where so few values are to be done, waking other threads takes longer than the work.
static const int64_t kSmall = 16384;

INLINE int threads_for(int64_t values, int threads) { return values < kSmall ? 1 : threads; }

// Each instruction set's functions have its name: NAME(encode) is encode_avx512, say.
#define JOIN_(name, isa) name##_##isa
#define JOIN(name, isa) JOIN_(name, isa)
#define NAME(name) JOIN(name, ISA)
#define EXPORT extern "C" __attribute__((visibility("default")))
