// The products of tiles.h with the NEON of every 64-bit ARM CPU, which multiplies bytes into 16 bits.
//
// Both factors have to be signed, so codes are less 128 (kShift). As many groups of a tile as 16 bits
// hold are added there before they go to 32: 16 groups of weights up to 15, two of up to 127. All
// sums are exact.
#pragma once

#include <arm_neon.h>

namespace {

const bool kInspected = true;
const int32_t kShift = 128;

void begin_tiles() {}
void end_tiles() {}

// Half of a tile's columns in two vectors, whose products take four.
const int kHalf = kTileColumns / 2, kProducts = 4;
const int kMostRowsInRegisters = 2;

// How many groups of a tile 16 bits hold: 16, 8, 4, 2, or 1. Each adds one product of a code.
int64_t inspect(const int8_t* tile, int64_t chunks, int64_t) {
    int largest = 0;
    for (int64_t i = 0; i < chunks * kTileBytes; ++i) {
        const int magnitude = tile[i] < 0 ? -tile[i] : tile[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    int64_t together = kGroups;
    while (together * kShift * largest > INT16_MAX) together /= 2;
    return together;
}

// Four codes of each row, over and over.
template <int R>
INLINE void load_codes(const uint8_t* at, int64_t stride, int8x16_t (&codes)[R]) {
    for (int r = 0; r < R; ++r) {
        uint32_t four;
        memcpy(&four, at + r * stride, sizeof four);
        codes[r] = vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
    }
}

// The products of a group in 16 bits, in place of `total` or added to it.
template <int R, bool first>
INLINE void add_group(const uint8_t* at, int64_t stride, const int8_t* weight,
                      int16x8_t (&total)[R][kProducts]) {
    int8x16_t codes[R];
    load_codes<R>(at, stride, codes);
    for (int v = 0; v < kProducts; v += 2) {
        const int8x16_t four_columns = vld1q_s8(weight + v * 8);
        const int8x8_t lower = vget_low_s8(four_columns);
        for (int r = 0; r < R; ++r) {
            const int8x8_t code = vget_low_s8(codes[r]);
            if (first) {
                total[r][v] = vmull_s8(code, lower);
                total[r][v + 1] = vmull_high_s8(codes[r], four_columns);
            } else {
                total[r][v] = vmlal_s8(total[r][v], code, lower);
                total[r][v + 1] = vmlal_high_s8(total[r][v + 1], codes[r], four_columns);
            }
        }
    }
}

// Sums of R rows with half of a tile's columns. Two neighbouring lanes make up a column.
template <int R>
void add_rows(const CodeRows& a, int64_t row, const int8_t* values, int64_t together, bool first,
              int32_t* sums) {
    int32x4_t total[R][kProducts];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kProducts; ++v) total[r][v] = vdupq_n_s32(0);
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = values + k * kTileBytes;
        for (int64_t done = 0; done < kGroups; done += together) {
            int16x8_t of_groups[R][kProducts];
            add_group<R, true>(codes, a.stride, weight, of_groups);
            codes += kGroup, weight += kTileColumns * kGroup;
            for (int64_t i = 1; i < together; ++i, codes += kGroup, weight += kTileColumns * kGroup)
                add_group<R, false>(codes, a.stride, weight, of_groups);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < kProducts; ++v)
                    total[r][v] = vpadalq_s16(total[r][v], of_groups[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kProducts; v += 2) {
            int32_t* to = sums + r * kBlockColumns + v * 2;
            const int32x4_t four_columns = vpaddq_s32(total[r][v], total[r][v + 1]);
            vst1q_s32(to, first ? four_columns : vaddq_s32(vld1q_s32(to), four_columns));
        }
}

void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    for (int64_t c = 0; c < count; ++c)
        for (int64_t column = 0; column < kTileColumns; column += kHalf) {
            const int8_t* values = tiles[c].values + column * kGroup;
            int32_t* to = sums + c * kTileColumns + column;
            in_blocks<kMostRowsInRegisters>(a.count, [&](int64_t r, auto rows) {
                add_rows<rows>(a, r, values, tiles[c].together, first, to + r * kBlockColumns);
            });
        }
}

}  // namespace
