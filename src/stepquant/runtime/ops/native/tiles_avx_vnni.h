// The products of tiles.h with AVX-VNNI: AVX-512 VNNI's instruction in vectors of 256 bits.
#pragma once

#include <immintrin.h>

namespace {

const bool kInspected = false;
const int32_t kShift = 0;
int64_t inspect(const int8_t*, int64_t, int64_t) { return 0; }

void begin_tiles() {}
void end_tiles() {}

// An instruction takes five cycles, and two begin in each: from ten sums on, none waits for another.
const int kVectors = 2, kMostRowsInRegisters = 6;

template <int R>
void add_rows(const CodeRows& a, int64_t row, const ColumnTile& tile, bool first, int32_t* sums) {
    __m256i total[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) {
            const void* from = sums + r * kBlockColumns + v * 8;
            total[r][v] = first ? _mm256_setzero_si256()
                                : _mm256_loadu_si256(static_cast<const __m256i*>(from));
        }
    for (int64_t k = 0; k < a.chunks; ++k) {
        const uint8_t* codes = a.first + row * a.stride + a.offsets[k];
        const int8_t* weight = tile.values + k * kTileBytes;
        for (int64_t i = 0; i < kGroups; ++i, codes += kGroup, weight += kTileColumns * kGroup) {
            const __m256i* of_group = reinterpret_cast<const __m256i*>(weight);
            const __m256i lower = _mm256_loadu_si256(of_group);
            const __m256i upper = _mm256_loadu_si256(of_group + 1);
            for (int r = 0; r < R; ++r) {
                int32_t four;
                memcpy(&four, codes + r * a.stride, sizeof four);
                const __m256i code = _mm256_set1_epi32(four);
                total[r][0] = _mm256_dpbusd_avx_epi32(total[r][0], code, lower);
                total[r][1] = _mm256_dpbusd_avx_epi32(total[r][1], code, upper);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) {
            void* to = sums + r * kBlockColumns + v * 8;
            _mm256_storeu_si256(static_cast<__m256i*>(to), total[r][v]);
        }
}

void add_products(const CodeRows& a, const ColumnTile* tiles, int64_t count, bool first,
                  int32_t* sums) {
    const int64_t parts = (a.count + kMostRowsInRegisters - 1) / kMostRowsInRegisters;
    for (int64_t c = 0; c < count; ++c)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t r = a.count * part / parts, rows = a.count * (part + 1) / parts - r;
            int32_t* to = sums + r * kBlockColumns + c * kTileColumns;
            switch (rows) {
                case 6: add_rows<6>(a, r, tiles[c], first, to); break;
                case 5: add_rows<5>(a, r, tiles[c], first, to); break;
                case 4: add_rows<4>(a, r, tiles[c], first, to); break;
                case 3: add_rows<3>(a, r, tiles[c], first, to); break;
                case 2: add_rows<2>(a, r, tiles[c], first, to); break;
                default: add_rows<1>(a, r, tiles[c], first, to); break;
            }
        }
}

}  // namespace
