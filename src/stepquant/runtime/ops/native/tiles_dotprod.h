// The products of tiles.h with the dot products of Armv8.2: four signed products in 32 bits.
#pragma once

#include <arm_neon.h>

namespace {

const bool kInspected = false;
const int32_t kShift = 128;  // both factors have to be signed
int64_t inspect(const int8_t*, int64_t, int64_t) { return 0; }

void begin_tiles() {}
void end_tiles() {}

const int kVectors = 4;              // of four columns each
const int kMostRowsInRegisters = 4;  // whose sums half of the registers hold
const int kCodes = 16;               // that a vector holds, of four groups

// The products of one group: the codes in number `lane` of four.
template <int R, int lane>
INLINE void add_group(const int8x16_t (&codes)[R], const int8_t* weight,
                      int32x4_t (&total)[R][kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
        const int8x16_t four_columns = vld1q_s8(weight + lane * kTileColumns * kGroup + v * 16);
        for (int r = 0; r < R; ++r)
            total[r][v] = vdotq_laneq_s32(total[r][v], four_columns, codes[r], lane);
    }
}

template <int R>
void add_rows(const CodeRows& a, int64_t row, const ColumnTile& tile, bool first, int32_t* sums) {
    const uint8x16_t shift = vdupq_n_u8(kShift);
    int32x4_t total[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            total[r][v] = first ? vdupq_n_s32(0) : vld1q_s32(sums + r * kBlockColumns + v * 4);
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* at = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = tile.values + k * kTileBytes;
        for (int64_t i = 0; i < kChunk; i += kCodes, weight += kCodes * kTileColumns) {
            int8x16_t codes[R];
            for (int r = 0; r < R; ++r) {
                const uint8x16_t unsigned_codes = vld1q_u8(at + r * a.stride + i);
                codes[r] = vreinterpretq_s8_u8(veorq_u8(unsigned_codes, shift));
            }
            add_group<R, 0>(codes, weight, total);
            add_group<R, 1>(codes, weight, total);
            add_group<R, 2>(codes, weight, total);
            add_group<R, 3>(codes, weight, total);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            vst1q_s32(sums + r * kBlockColumns + v * 4, total[r][v]);
}

void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    for (int64_t c = 0; c < count; ++c) {
        int32_t* to = sums + c * kTileColumns;
        in_blocks<kMostRowsInRegisters>(a.count, [&](int64_t r, auto rows) {
            add_rows<rows>(a, r, tiles[c], first, to + r * kBlockColumns);
        });
    }
}

}  // namespace
