// The intrinsics of AVX-VNNI, AVX-512 VNNI and AMX that the integer products use, in plain C++.
//
// Found in the place of the compiler's header, it lets the products of these instruction sets run on
// machines without them. Using a tile in a way that the CPU would refuse ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

template <int N>
struct Lanes {
    int32_t lane[N];
};

using __m256i = Lanes<8>;
using __m512i = Lanes<16>;

template <typename V>
V lanes_from(const void* at) {
    V x;
    memcpy(&x, at, sizeof x);
    return x;
}

template <typename V>
V lanes_of(int32_t value) {
    V x;
    for (int32_t& each : x.lane) each = value;
    return x;
}

// Four products of a uint8 with an int8, added to `sum`, which wraps around.
inline int32_t with_four(int32_t sum, const void* codes, const void* weights) {
    const uint8_t* code = static_cast<const uint8_t*>(codes);
    const int8_t* weight = static_cast<const int8_t*>(weights);
    int32_t four = 0;
    for (int i = 0; i < 4; ++i) four += code[i] * weight[i];
    return int32_t(uint32_t(sum) + uint32_t(four));
}

template <typename V>
V with_fours(const V& sum, const V& codes, const V& weights) {
    V y;
    for (size_t i = 0; i < sizeof(V) / 4; ++i)
        y.lane[i] = with_four(sum.lane[i], codes.lane + i, weights.lane + i);
    return y;
}

inline __m256i _mm256_setzero_si256() { return lanes_of<__m256i>(0); }
inline __m256i _mm256_set1_epi32(int32_t value) { return lanes_of<__m256i>(value); }
inline __m256i _mm256_loadu_si256(const __m256i* at) { return lanes_from<__m256i>(at); }
inline void _mm256_storeu_si256(__m256i* at, const __m256i& x) {
    memcpy(static_cast<void*>(at), &x, sizeof x);
}
inline __m256i _mm256_dpbusd_avx_epi32(const __m256i& sum, const __m256i& codes,
                                       const __m256i& weights) {
    return with_fours(sum, codes, weights);
}

inline __m512i _mm512_setzero_si512() { return lanes_of<__m512i>(0); }
inline __m512i _mm512_set1_epi32(int32_t value) { return lanes_of<__m512i>(value); }
inline __m512i _mm512_loadu_si512(const void* at) { return lanes_from<__m512i>(at); }
inline void _mm512_storeu_si512(void* at, const __m512i& x) { memcpy(at, &x, sizeof x); }
inline __m512i _mm512_dpbusd_epi32(const __m512i& sum, const __m512i& codes,
                                   const __m512i& weights) {
    return with_fours(sum, codes, weights);
}

struct Tile {
    int rows, bytes;  // of a row
    uint8_t data[16][64];
};

struct TileRegisters {
    bool configured;
    Tile tile[8];
};

inline TileRegisters& tile_registers() {
    static thread_local TileRegisters registers;
    return registers;
}

inline void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "emulated AMX: %s\n", what);
    abort();
}

inline Tile& tile_number(int number) {
    TileRegisters& all = tile_registers();
    require(all.configured, "no tile is configured");
    require(all.tile[number].rows > 0, "a tile of no rows");
    return all.tile[number];
}

inline void _tile_loadconfig(const void* at) {
    const uint8_t* bytes = static_cast<const uint8_t*>(at);
    require(bytes[0] == 1 && bytes[1] == 0, "the palette is not 1, or rows are skipped");
    TileRegisters& all = tile_registers();
    memset(&all, 0, sizeof all);
    all.configured = true;
    for (int i = 0; i < 8; ++i) {
        uint16_t row_bytes;
        memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
        all.tile[i].bytes = row_bytes;
        all.tile[i].rows = bytes[48 + i];
        require(row_bytes <= 64 && bytes[48 + i] <= 16, "a tile is too large");
    }
}

inline void _tile_release() { memset(&tile_registers(), 0, sizeof(TileRegisters)); }

inline void _tile_zero(int number) {
    Tile& tile = tile_number(number);
    memset(tile.data, 0, sizeof tile.data);
}

inline void _tile_loadd(int number, const void* at, int64_t stride) {
    _tile_zero(number);
    Tile& tile = tile_number(number);
    for (int r = 0; r < tile.rows; ++r)
        memcpy(tile.data[r], static_cast<const char*>(at) + r * stride, tile.bytes);
}

inline void _tile_stored(int number, void* at, int64_t stride) {
    const Tile& tile = tile_number(number);
    for (int r = 0; r < tile.rows; ++r)
        memcpy(static_cast<char*>(at) + r * stride, tile.data[r], tile.bytes);
}

inline void _tile_dpbusd(int sums, int codes, int weights) {
    Tile& y = tile_number(sums);
    const Tile &a = tile_number(codes), &b = tile_number(weights);
    require(sums != codes && sums != weights && codes != weights, "a tile is used twice");
    require(y.rows == a.rows && y.bytes == b.bytes && a.bytes == 4 * b.rows,
            "tiles do not fit one another");
    for (int r = 0; r < y.rows; ++r)
        for (int k = 0; k < b.rows; ++k)
            for (int c = 0; c < y.bytes; c += 4) {
                int32_t sum;
                memcpy(&sum, y.data[r] + c, sizeof sum);
                sum = with_four(sum, a.data[r] + 4 * k, b.data[k] + c);
                memcpy(y.data[r] + c, &sum, sizeof sum);
            }
}

}  // namespace
