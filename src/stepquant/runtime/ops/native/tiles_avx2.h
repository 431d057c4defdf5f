// The products of tiles.h with AVX2, which has no instruction that adds four products in 32 bits.
//
// `vpmaddubsw` adds two products of a uint8 with an int8 in 16 bits, where sums saturate. So a tile is
// inspected first. Where no sum of pairs can exceed 16 bits, `vpmaddubsw` multiplies, and several
// groups are added before they go to 32 bits. Where one can, codes and weights are widened to 16 bits
// for `vpmaddwd`, which adds in 32. All sums are exact.
#pragma once

#include <immintrin.h>

namespace {

const bool kInspected = true;
const int32_t kShift = 0;
#define WINOGRAD

void begin_tiles() {}
void end_tiles() {}

// 16 columns of a group: two vectors of eight columns.
const int kVectors = 2, kColumnsInVector = 8;

INLINE __m256i load_vector(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

INLINE void store_vector(void* at, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), value);
}

INLINE __m256i four_codes(const uint8_t* at) {
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm256_set1_epi32(four);
}

// Keeps the compiler from adding in another order, which takes more registers than there are.
INLINE void in_this_order(__m256i& sum) { asm("" : "+x"(sum)); }

INLINE __m256i pair_sums(__m256i codes, __m256i weight) {
    return _mm256_maddubs_epi16(codes, weight);
}

// How many groups of a tile 16 bits hold: 16, 8, 1, or 0, where a single pair can exceed them.
// `most`: the largest sum of two weights' magnitudes whose products with codes they hold.
int64_t inspect(const int8_t* tile, int64_t chunks, int64_t most) {
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < chunks * kTileBytes; i += 32) {
        // As uint8, the magnitude of -128 is 128.
        const __m256i magnitudes = _mm256_abs_epi8(load_vector(tile + i));
        largest = _mm256_max_epi16(largest, _mm256_maddubs_epi16(magnitudes, ones));
    }
    int16_t lanes[16];
    store_vector(lanes, largest);
    int64_t of_tile = 0;
    for (int i = 0; i < 16; ++i) of_tile = lanes[i] > of_tile ? lanes[i] : of_tile;
    return of_tile * 16 <= most ? 16 : of_tile * 8 <= most ? 8 : of_tile <= most ? 1 : 0;
}

// Sums of R rows with a tile, of which `together` groups at a time fit in 16 bits.
template <int R>
void add_together(const CodeRows& a, int64_t row, const ColumnTile& tile, int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int64_t together = tile.together;
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = tile.values + k * kTileBytes;
        for (int64_t end = together; end <= kGroups; end += together) {
            __m256i total[R][kVectors];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v) total[r][v] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int64_t i = 0; i < together; ++i, codes += kGroup, weight += 64) {
                const __m256i first = load_vector(weight), second = load_vector(weight + 32);
                for (int r = 0; r < R; ++r) {
                    const __m256i code = four_codes(codes + r * a.stride);
                    total[r][0] = _mm256_add_epi16(total[r][0], pair_sums(code, first));
                    total[r][1] = _mm256_add_epi16(total[r][1], pair_sums(code, second));
                    in_this_order(total[r][0]);
                    in_this_order(total[r][1]);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kVectors; ++v) {
                    int32_t* to = sums + r * kBlockColumns + v * kColumnsInVector;
                    const __m256i both = _mm256_madd_epi16(total[r][v], ones);
                    store_vector(to, _mm256_add_epi32(load_vector(to), both));
                }
        }
    }
}

// A group of pairs of weights that are small enough.
template <int R>
INLINE void add_pairs(const uint8_t* codes, int64_t stride, const int8_t* weight,
                      __m256i (&total)[R][kVectors]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i first = load_vector(weight), second = load_vector(weight + 32);
    for (int r = 0; r < R; ++r) {
        const __m256i code = four_codes(codes + r * stride);
        const __m256i a = _mm256_madd_epi16(pair_sums(code, first), ones);
        const __m256i b = _mm256_madd_epi16(pair_sums(code, second), ones);
        total[r][0] = _mm256_add_epi32(total[r][0], a);
        total[r][1] = _mm256_add_epi32(total[r][1], b);
        in_this_order(total[r][0]);
        in_this_order(total[r][1]);
    }
}

// Sums of R rows with a tile, of which a single group fits in 16 bits.
template <int R>
void add_groups(const CodeRows& a, int64_t row, const ColumnTile& tile, int32_t* sums) {
    __m256i total[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            total[r][v] = load_vector(sums + r * kBlockColumns + v * kColumnsInVector);
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = tile.values + k * kTileBytes;
        for (int64_t i = 0; i < kGroups; ++i)
            add_pairs<R>(codes + i * kGroup, a.stride, weight + i * 64, total);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            store_vector(sums + r * kBlockColumns + v * kColumnsInVector, total[r][v]);
}

// Rows or a tile in 16 bits: values 0 and 2 of each group, and apart from them values 1 and 3.
struct Widened {
    int16_t codes[kBlockRows][2][kGroups][2];
    int16_t weight[kGroups][2][kVectors][16];
};

void widen_codes(const CodeRows& a, int64_t chunk, Widened& to) {
    const __m256i low = _mm256_set1_epi16(255);
    for (int64_t r = 0; r < a.count; ++r) {
        const uint8_t* codes = a.first + r * a.stride + a.offsets[chunk];
        for (int half = 0; half < 2; ++half) {
            const __m256i both = load_vector(codes + half * 32);
            store_vector(to.codes[r][0][half * 8], _mm256_and_si256(both, low));
            store_vector(to.codes[r][1][half * 8], _mm256_srli_epi16(both, 8));
        }
    }
}

void widen_weight(const int8_t* weight, Widened& to) {
    for (int64_t i = 0; i < kGroups; ++i)
        for (int v = 0; v < kVectors; ++v, weight += 32) {
            const __m256i both = load_vector(weight);
            store_vector(to.weight[i][0][v], _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8));
            store_vector(to.weight[i][1][v], _mm256_srai_epi16(both, 8));
        }
}

// Two values of R rows, `stride` values apart, with two values of 16 columns; all in 16 bits.
template <int R>
INLINE void add_wide_pairs(const int16_t* codes, int64_t stride, const int16_t* weight,
                           __m256i (&total)[R][kVectors]) {
    const __m256i first = load_vector(weight), second = load_vector(weight + 16);
    for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, codes + r * stride, sizeof pair);
        const __m256i code = _mm256_set1_epi32(pair);
        total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(code, first));
        total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(code, second));
        in_this_order(total[r][0]);
        in_this_order(total[r][1]);
    }
}

template <int R>
void multiply_widened(const Widened& x, int64_t row, int32_t* sums) {
    __m256i total[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            total[r][v] = load_vector(sums + r * kBlockColumns + v * kColumnsInVector);
    for (int64_t i = 0; i < kGroups; ++i)
        for (int part = 0; part < 2; ++part)
            add_wide_pairs<R>(x.codes[row][part][i], sizeof x.codes[0] / sizeof(int16_t),
                              x.weight[i][part][0], total);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            store_vector(sums + r * kBlockColumns + v * kColumnsInVector, total[r][v]);
}

void add_widened(const CodeRows& a, const ColumnTile* tiles, int64_t count, int32_t* sums) {
    alignas(64) Widened x;
    for (int64_t k = 0; k < a.chunks; ++k) {
        widen_codes(a, k, x);
        for (int64_t c = 0; c < count; ++c) {
            widen_weight(tiles[c].values + k * kTileBytes, x);
            int32_t* to = sums + c * kTileColumns;
            in_blocks<4>(a.count, [&](int64_t r, auto rows) {
                multiply_widened<rows>(x, r, to + r * kBlockColumns);
            });
        }
    }
}

void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    if (first)
        for (int64_t r = 0; r < a.count; ++r) memset(sums + r * kBlockColumns, 0, kSumBytes);
    if (count == 2 && !tiles[0].together && !tiles[1].together)
        return add_widened(a, tiles, 2, sums);
    for (int64_t c = 0; c < count; ++c) {
        const ColumnTile& tile = tiles[c];
        int32_t* to = sums + c * kTileColumns;
        if (!tile.together)
            add_widened(a, &tile, 1, to);
        else if (tile.together == 1)
            in_blocks<4>(a.count, [&](int64_t r, auto rows) {
                add_groups<rows>(a, r, tile, to + r * kBlockColumns);
            });
        else
            in_blocks<4>(a.count, [&](int64_t r, auto rows) {
                add_together<rows>(a, r, tile, to + r * kBlockColumns);
            });
    }
}

}  // namespace
