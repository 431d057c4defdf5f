// The products of tiles.h with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

namespace {

const bool kInspected = false;
const int32_t kShift = 0;
int64_t inspect(const int8_t*, int64_t, int64_t) { return 0; }

void begin_tiles() {}
void end_tiles() {}

const int kRowsAtATime = 8;  // whose sums, in two tiles, half of the registers hold

template <int C>
void add_rows(const CodeRows& a, int64_t row, const ColumnTile* tiles, bool first, int32_t* sums) {
    __m512i total[kRowsAtATime][C];
    for (int r = 0; r < kRowsAtATime; ++r)
        for (int c = 0; c < C; ++c)
            total[r][c] = first ? _mm512_setzero_si512()
                                : _mm512_loadu_si512(sums + r * kBlockColumns + c * kTileColumns);
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        for (int64_t i = 0; i < kChunk; i += kGroup) {
            __m512i weight[C];
            for (int c = 0; c < C; ++c)
                weight[c] =
                    _mm512_loadu_si512(tiles[c].values + k * kTileBytes + i * kTileColumns);
            for (int r = 0; r < kRowsAtATime; ++r) {
                int32_t four;
                memcpy(&four, codes + r * a.stride + i, sizeof four);
                const __m512i code = _mm512_set1_epi32(four);
                for (int c = 0; c < C; ++c)
                    total[r][c] = _mm512_dpbusd_epi32(total[r][c], code, weight[c]);
            }
        }
    }
    for (int r = 0; r < kRowsAtATime; ++r)
        for (int c = 0; c < C; ++c)
            _mm512_storeu_si512(sums + r * kBlockColumns + c * kTileColumns, total[r][c]);
}

// Reads rows in eights.
void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    for (int64_t r = 0; r < a.count; r += kRowsAtATime, sums += kRowsAtATime * kBlockColumns) {
        if (count > 1)
            add_rows<2>(a, r, tiles, first, sums);
        else
            add_rows<1>(a, r, tiles, first, sums);
    }
}

}  // namespace
