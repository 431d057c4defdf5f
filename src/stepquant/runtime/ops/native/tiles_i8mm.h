// The products of tiles.h with the matrix products of Armv8.6, which take codes as they are.
//
// An instruction multiplies two rows of eight codes with two columns of eight weights. The weights of
// two neighbouring groups are put together for it as they are read.
#pragma once

#include <arm_neon.h>

namespace {

const bool kInspected = false;
const int32_t kShift = 0;
int64_t inspect(const int8_t*, int64_t, int64_t) { return 0; }

void begin_tiles() {}
void end_tiles() {}

const int kHalf = kTileColumns / 2, kColumnPairs = kHalf / 2;
const int kMostRowsInRegisters = 8;  // whose sums with half of a tile half of the registers hold
const int64_t kValues = 8;           // of a sum: two groups

// Eight values of each of eight columns, in pairs of columns.
INLINE void load_weight(const int8_t* at, int8x16_t (&weight)[kColumnPairs]) {
    for (int v = 0; v < kColumnPairs; v += 2) {
        const int32x4_t group = vreinterpretq_s32_s8(vld1q_s8(at + v * 8));
        const int32x4_t next = vreinterpretq_s32_s8(vld1q_s8(at + kTileColumns * kGroup + v * 8));
        weight[v] = vreinterpretq_s8_s32(vzip1q_s32(group, next));
        weight[v + 1] = vreinterpretq_s8_s32(vzip2q_s32(group, next));
    }
}

INLINE void store_four(int32x4_t four_columns, bool first, int32_t* to) {
    vst1q_s32(to, first ? four_columns : vaddq_s32(vld1q_s32(to), four_columns));
}

// Sums of R rows with half of a tile's columns. An odd row is multiplied twice.
template <int R>
void add_rows(const CodeRows& a, int64_t row, const int8_t* values, bool first, int32_t* sums) {
    const int pairs = (R + 1) / 2;
    int32x4_t total[pairs][kColumnPairs];  // two columns of the first row, then of the second
    for (int p = 0; p < pairs; ++p)
        for (int v = 0; v < kColumnPairs; ++v) total[p][v] = vdupq_n_s32(0);
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = values + k * kTileBytes;
        for (int64_t i = 0; i < kChunk; i += kValues, weight += kValues * kTileColumns) {
            int8x16_t columns[kColumnPairs];
            load_weight(weight, columns);
            for (int p = 0; p < pairs; ++p) {
                const int second = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
                const uint8x16_t rows = vcombine_u8(vld1_u8(codes + 2 * p * a.stride + i),
                                                    vld1_u8(codes + second * a.stride + i));
                for (int v = 0; v < kColumnPairs; ++v)
                    total[p][v] = vusmmlaq_s32(total[p][v], rows, columns[v]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kColumnPairs; v += 2) {
            const int32x4_t one = total[r / 2][v], other = total[r / 2][v + 1];
            const int32x4_t four_columns =
                r % 2 ? vcombine_s32(vget_high_s32(one), vget_high_s32(other))
                      : vcombine_s32(vget_low_s32(one), vget_low_s32(other));
            store_four(four_columns, first, sums + r * kBlockColumns + v * 2);
        }
}

void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    for (int64_t c = 0; c < count; ++c)
        for (int64_t column = 0; column < kTileColumns; column += kHalf) {
            const int8_t* values = tiles[c].values + column * kGroup;
            int32_t* to = sums + c * kTileColumns + column;
            in_blocks<kMostRowsInRegisters>(a.count, [&](int64_t r, auto rows) {
                add_rows<rows>(a, r, values, first, to + r * kBlockColumns);
            });
        }
}

}  // namespace
