// The intrinsics of ARM's NEON, with its dot and matrix products, that the integer products use, in
// plain C++: see immintrin.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

template <typename T, int N>
struct Vector {
    T lane[N];
};

using int8x8_t = Vector<int8_t, 8>;
using uint8x8_t = Vector<uint8_t, 8>;
using int8x16_t = Vector<int8_t, 16>;
using uint8x16_t = Vector<uint8_t, 16>;
using int16x8_t = Vector<int16_t, 8>;
using int32x2_t = Vector<int32_t, 2>;
using int32x4_t = Vector<int32_t, 4>;
using uint32x4_t = Vector<uint32_t, 4>;

template <typename V, typename T>
V vector_from(const T* at) {
    V x;
    memcpy(&x, at, sizeof x);
    return x;
}

template <typename V, typename T>
V vector_of(T value) {
    V x;
    for (T& each : x.lane) each = value;
    return x;
}

template <typename V, typename U>
V same_bits(const U& x) {
    static_assert(sizeof(V) == sizeof(U), "vectors of one size");
    return vector_from<V>(&x);
}

template <typename T, int N>
Vector<T, N / 2> half_of(const Vector<T, N>& x, int half) {
    return vector_from<Vector<T, N / 2>>(x.lane + half * N / 2);
}

template <typename T, int N>
Vector<T, 2 * N> both_halves(const Vector<T, N>& low, const Vector<T, N>& high) {
    Vector<T, 2 * N> x;
    memcpy(x.lane, &low, sizeof low);
    memcpy(x.lane + N, &high, sizeof high);
    return x;
}

inline int8x16_t vld1q_s8(const int8_t* at) { return vector_from<int8x16_t>(at); }
inline uint8x16_t vld1q_u8(const uint8_t* at) { return vector_from<uint8x16_t>(at); }
inline uint8x8_t vld1_u8(const uint8_t* at) { return vector_from<uint8x8_t>(at); }
inline int32x4_t vld1q_s32(const int32_t* at) { return vector_from<int32x4_t>(at); }
inline void vst1q_s32(int32_t* at, const int32x4_t& x) { memcpy(at, &x, sizeof x); }

inline uint8x16_t vdupq_n_u8(uint8_t value) { return vector_of<uint8x16_t>(value); }
inline int32x4_t vdupq_n_s32(int32_t value) { return vector_of<int32x4_t>(value); }
inline uint32x4_t vdupq_n_u32(uint32_t value) { return vector_of<uint32x4_t>(value); }

inline int8x16_t vreinterpretq_s8_u8(const uint8x16_t& x) { return same_bits<int8x16_t>(x); }
inline int8x16_t vreinterpretq_s8_u32(const uint32x4_t& x) { return same_bits<int8x16_t>(x); }
inline int8x16_t vreinterpretq_s8_s32(const int32x4_t& x) { return same_bits<int8x16_t>(x); }
inline int32x4_t vreinterpretq_s32_s8(const int8x16_t& x) { return same_bits<int32x4_t>(x); }

inline int8x8_t vget_low_s8(const int8x16_t& x) { return half_of(x, 0); }
inline int32x2_t vget_low_s32(const int32x4_t& x) { return half_of(x, 0); }
inline int32x2_t vget_high_s32(const int32x4_t& x) { return half_of(x, 1); }
inline uint8x16_t vcombine_u8(const uint8x8_t& low, const uint8x8_t& high) {
    return both_halves(low, high);
}
inline int32x4_t vcombine_s32(const int32x2_t& low, const int32x2_t& high) {
    return both_halves(low, high);
}

inline uint8x16_t veorq_u8(const uint8x16_t& a, const uint8x16_t& b) {
    uint8x16_t y;
    for (int i = 0; i < 16; ++i) y.lane[i] = a.lane[i] ^ b.lane[i];
    return y;
}

inline int32x4_t vaddq_s32(const int32x4_t& a, const int32x4_t& b) {
    int32x4_t y;
    for (int i = 0; i < 4; ++i) y.lane[i] = int32_t(uint32_t(a.lane[i]) + uint32_t(b.lane[i]));
    return y;
}

inline int32x4_t vpaddq_s32(const int32x4_t& a, const int32x4_t& b) {
    const int32x4_t even = {a.lane[0], a.lane[2], b.lane[0], b.lane[2]};
    const int32x4_t odd = {a.lane[1], a.lane[3], b.lane[1], b.lane[3]};
    return vaddq_s32(even, odd);
}

inline int32x4_t vzip1q_s32(const int32x4_t& a, const int32x4_t& b) {
    return {a.lane[0], b.lane[0], a.lane[1], b.lane[1]};
}

inline int32x4_t vzip2q_s32(const int32x4_t& a, const int32x4_t& b) {
    return {a.lane[2], b.lane[2], a.lane[3], b.lane[3]};
}

// Sums in 16 bits wrap around.
inline int16x8_t vmlal_s8(const int16x8_t& sum, const int8x8_t& a, const int8x8_t& b) {
    int16x8_t y;
    for (int i = 0; i < 8; ++i) y.lane[i] = int16_t(sum.lane[i] + a.lane[i] * b.lane[i]);
    return y;
}

inline int16x8_t vmull_s8(const int8x8_t& a, const int8x8_t& b) {
    return vmlal_s8(vector_of<int16x8_t>(int16_t(0)), a, b);
}

inline int16x8_t vmlal_high_s8(const int16x8_t& sum, const int8x16_t& a, const int8x16_t& b) {
    return vmlal_s8(sum, half_of(a, 1), half_of(b, 1));
}

inline int16x8_t vmull_high_s8(const int8x16_t& a, const int8x16_t& b) {
    return vmull_s8(half_of(a, 1), half_of(b, 1));
}

inline int32x4_t vpadalq_s16(const int32x4_t& sum, const int16x8_t& x) {
    int32x4_t pairs;
    for (int i = 0; i < 4; ++i) pairs.lane[i] = x.lane[2 * i] + x.lane[2 * i + 1];
    return vaddq_s32(sum, pairs);
}

inline int32x4_t vdotq_laneq_s32(const int32x4_t& sum, const int8x16_t& a, const int8x16_t& b,
                                 int lane) {
    int32x4_t fours;
    for (int i = 0; i < 4; ++i) {
        fours.lane[i] = 0;
        for (int j = 0; j < 4; ++j) fours.lane[i] += a.lane[4 * i + j] * b.lane[4 * lane + j];
    }
    return vaddq_s32(sum, fours);
}

// [2, 8] times [2, 8] transposed: [2, 2].
inline int32x4_t vusmmlaq_s32(const int32x4_t& sum, const uint8x16_t& a, const int8x16_t& b) {
    int32x4_t eights;
    for (int i = 0; i < 4; ++i) {
        eights.lane[i] = 0;
        for (int j = 0; j < 8; ++j)
            eights.lane[i] += a.lane[i / 2 * 8 + j] * b.lane[i % 2 * 8 + j];
    }
    return vaddq_s32(sum, eights);
}

}  // namespace
