// Sums of products of a block of codes with a block of the weight, in integers.
//
// Both come in chunks of 64 values of a sum. `a` is the block's first row of codes, uint8; rows lie
// `stride` bytes apart, and chunk k of a row begins offsets[k] bytes after it. A tile of the weight,
// `b`, has 16 columns: [chunks][16][16 columns][4], 4 values of the sum side by side. `sums` is
// int32 [32 rows][32 columns], added to unless `first`.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace {

const int64_t kTileRows = 16, kTileColumns = 16, kChunk = 64;
const int64_t kBlockRows = 2 * kTileRows, kBlockColumns = 2 * kTileColumns;
const int64_t kTileBytes = kTileColumns * kChunk;
const int64_t kSumBytes = kBlockColumns * sizeof(int32_t);  // of a row

#ifdef __AMX_INT8__

// All eight tile registers hold 16 rows of 64 bytes.
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

void begin_tiles() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = kChunk;
        config.rows[i] = kTileRows;
    }
    _tile_loadconfig(&config);
}

void end_tiles() { _tile_release(); }

// Row tiles R and column tiles C are 1 or 2. Sums in registers 0 to 3, codes in 4 and 5.
template <int R, int C>
void add_products(const uint8_t* a, int64_t stride, const int64_t* offsets, int64_t chunks,
                  const int8_t* b, int64_t b_stride, bool first, int32_t* sums) {
    int32_t* lower = sums + kTileRows * kBlockColumns;
    if (first) {
        _tile_zero(0);
        if (C > 1) _tile_zero(1);
        if (R > 1) _tile_zero(2);
        if (R > 1 && C > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, kSumBytes);
        if (C > 1) _tile_loadd(1, sums + kTileColumns, kSumBytes);
        if (R > 1) _tile_loadd(2, lower, kSumBytes);
        if (R > 1 && C > 1) _tile_loadd(3, lower + kTileColumns, kSumBytes);
    }
    for (int64_t k = 0; k < chunks; ++k, b += kTileBytes) {
        const uint8_t* codes = a + offsets[k];
        _tile_loadd(6, b, kChunk);
        _tile_loadd(4, codes, stride);
        if (C > 1) _tile_loadd(7, b + b_stride, kChunk);
        _tile_dpbusd(0, 4, 6);
        if (C > 1) _tile_dpbusd(1, 4, 7);
        if (R > 1) {
            _tile_loadd(5, codes + kTileRows * stride, stride);
            _tile_dpbusd(2, 5, 6);
            if (C > 1) _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, kSumBytes);
    if (C > 1) _tile_stored(1, sums + kTileColumns, kSumBytes);
    if (R > 1) _tile_stored(2, lower, kSumBytes);
    if (R > 1 && C > 1) _tile_stored(3, lower + kTileColumns, kSumBytes);
}

#else

void begin_tiles() {}
void end_tiles() {}

const int kRowsAtATime = 8;  // whose sums, in two tiles, half of the registers hold

template <int C>
void add_rows(const uint8_t* a, int64_t stride, const int64_t* offsets, int64_t chunks,
              const int8_t* b, int64_t b_stride, bool first, int32_t* sums) {
    __m512i total[kRowsAtATime][C];
    for (int r = 0; r < kRowsAtATime; ++r)
        for (int c = 0; c < C; ++c)
            total[r][c] = first ? _mm512_setzero_si512()
                                : _mm512_loadu_si512(sums + r * kBlockColumns + c * kTileColumns);
    for (int64_t k = 0; k < chunks; ++k, b += kTileBytes) {
        const uint8_t* codes = a + offsets[k];
        for (int64_t i = 0; i < kChunk; i += 4) {
            __m512i weight[C];
            for (int c = 0; c < C; ++c)
                weight[c] = _mm512_loadu_si512(b + c * b_stride + i * kTileColumns);
            for (int r = 0; r < kRowsAtATime; ++r) {
                int32_t four;
                memcpy(&four, codes + r * stride + i, sizeof four);
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

template <int R, int C>
void add_products(const uint8_t* a, int64_t stride, const int64_t* offsets, int64_t chunks,
                  const int8_t* b, int64_t b_stride, bool first, int32_t* sums) {
    for (int64_t r = 0; r < R * kTileRows; r += kRowsAtATime)
        add_rows<C>(a + r * stride, stride, offsets, chunks, b, b_stride, first,
                    sums + r * kBlockColumns);
}

#endif

}  // namespace
