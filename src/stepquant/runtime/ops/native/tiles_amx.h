// The products of tiles.h in AMX's tile registers.
#pragma once

#include <immintrin.h>

namespace {

const bool kInspected = false;
const int32_t kShift = 0;
int64_t inspect(const int8_t*, int64_t, int64_t) { return 0; }

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
void add_blocks(const CodeRows& a, const ColumnTile* tiles, bool first, int32_t* sums) {
    int32_t* lower = sums + kTileRows * kBlockColumns;
    const int8_t *b = tiles[0].values, *c = tiles[C - 1].values;
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
    for (int64_t k = 0; k < a.chunks; ++k, b += kTileBytes, c += kTileBytes) {
        const uint8_t* codes = a.first + a.offsets[k];
        _tile_loadd(6, b, kChunk);
        _tile_loadd(4, codes, a.stride);
        if (C > 1) _tile_loadd(7, c, kChunk);
        _tile_dpbusd(0, 4, 6);
        if (C > 1) _tile_dpbusd(1, 4, 7);
        if (R > 1) {
            _tile_loadd(5, codes + kTileRows * a.stride, a.stride);
            _tile_dpbusd(2, 5, 6);
            if (C > 1) _tile_dpbusd(3, 5, 7);
        }
    }
    _tile_stored(0, sums, kSumBytes);
    if (C > 1) _tile_stored(1, sums + kTileColumns, kSumBytes);
    if (R > 1) _tile_stored(2, lower, kSumBytes);
    if (R > 1 && C > 1) _tile_stored(3, lower + kTileColumns, kSumBytes);
}

// Reads whole tiles of rows: 16, or 32.
void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    const auto add = a.count > kTileRows ? (count > 1 ? add_blocks<2, 2> : add_blocks<2, 1>)
                                         : (count > 1 ? add_blocks<1, 2> : add_blocks<1, 1>);
    add(a, tiles, first, sums);
}

}  // namespace
