// What becomes of the integer sums of a product: floats with a gate and a residual, or codes.
#pragma once

#include "elementwise.h"
#include "tiles.h"

namespace {

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Piece {  // rows of the product that lie equally far apart, at most kBlockRows
    const uint8_t* codes;
    int64_t first, rows;
};

struct Product {
    const Codes* x;
    const Weight* weight;
    const Result* y;
    const Encoded* encoded;   // or null
    Levels levels;            // of `encoded`
    const float* scales;      // [column tiles * 16]
    const float* biases;      // [column tiles * 16]
    const int32_t* shares;    // [column tiles * 16]: zero point times the weight's sum
    const int64_t* offsets;   // [chunks]
    int64_t image, pixels;    // rows of one image, and of all
    int64_t chunks, column_tiles;
    int64_t pairs, second;    // of column tiles; how many tiles after the first the other one comes
    int64_t stride;           // bytes between rows
    bool gathered, even;      // even: all rows of the image lie equally far apart
};

INLINE __m512 added_to(const Result& y, int64_t at, __mmask16 mask) {
    if (!y.added_bf16)
        return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(y.added) + at);
    const __m256i halves =
        _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(y.added) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// To the nearest, ties to even.
INLINE __m256i bf16_of(__m512 y) {
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, half), 16));
}

// What turns the sums of a column tile into values.
struct Column {
    __m512 scale, bias;
    __m512i share;

    Column(const Product& product, int64_t tile) {
        const int64_t c = tile * kTileColumns;
        scale = _mm512_loadu_ps(product.scales + c);
        bias = _mm512_loadu_ps(product.biases + c);
        share = _mm512_loadu_si512(product.shares + c);
    }

    __m512 values(const int32_t* sums) const {
        const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums), share);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias);
    }
};

void write_floats(const Product& product, const int32_t* sums, const Piece& piece, int64_t tile,
                  int64_t tiles) {
    const Result& y = *product.y;
    const int64_t channels = product.weight->out_channels;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t c = (tile + t) * kTileColumns, left = channels - c;
        const __mmask16 mask = left >= kTileColumns ? 0xffff : __mmask16((1u << left) - 1);
        const Column column(product, tile + t);
        for (int64_t r = 0; r < piece.rows; ++r) {
            __m512 value = column.values(sums + r * kBlockColumns + t * kTileColumns);
            const int64_t at = (piece.first + r) * channels + c;
            if (y.gate) {
                const float* gate = y.gate + (piece.first + r) / product.image * y.gate_stride + c;
                value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, gate));
            }
            if (y.added) value = _mm512_add_ps(value, added_to(y, at, mask));
            if (y.bf16)
                _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y.data) + at, mask, bf16_of(value));
            else
                _mm512_mask_storeu_ps(static_cast<float*>(y.data) + at, mask, value);
        }
    }
}

// All values of a block before any code: the loops are long enough for the compiler's vectors to
// overlap.
template <int kind>
void write_codes(const Product& product, const int32_t* sums, const Piece& piece, int64_t tile,
                 int64_t tiles) {
    float values[kBlockRows * kBlockColumns], gates[kBlockRows * kTileColumns];
    uint8_t codes[kBlockRows * kBlockColumns];
    const bool gated = product.encoded->gated;
    const int64_t width = gated ? kTileColumns : tiles * kTileColumns, count = piece.rows * width;
    const Column first(product, tile), second(product, tile + (tiles > 1 ? product.second : 0));
    for (int64_t r = 0; r < piece.rows; ++r, sums += kBlockColumns) {
        _mm512_storeu_ps(values + r * width, first.values(sums));
        float* other = gated ? gates + r * width : values + r * width + kTileColumns;
        if (tiles > 1) _mm512_storeu_ps(other, second.values(sums + kTileColumns));
    }
    if (gated) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] *= activate<kind>(gates[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) values[i] = activate<kind>(values[i]);
    }
    if (const float* factors = product.levels.factors)
        for (int64_t r = 0; r < piece.rows; ++r)
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                values[r * width + i] *= factors[tile * kTileColumns + i];
    Levels levels = product.levels;
    levels.factors = nullptr;  // done
    encode_floats(values, count, levels, codes);
    const int64_t channels = product.weight->out_channels / (gated ? 2 : 1);
    uint8_t* row = product.encoded->codes + piece.first * channels + tile * kTileColumns;
    for (int64_t r = 0; r < piece.rows; ++r) memcpy(row + r * channels, codes + r * width, width);
}

void finish(const Product& product, const int32_t* sums, const Piece& piece, int64_t tile,
            int64_t tiles) {
    if (!product.encoded) return write_floats(product, sums, piece, tile, tiles);
    switch (product.encoded->activation) {
        case kSilu: return write_codes<kSilu>(product, sums, piece, tile, tiles);
        case kGelu: return write_codes<kGelu>(product, sums, piece, tile, tiles);
        case kGeluTanh: return write_codes<kGeluTanh>(product, sums, piece, tile, tiles);
        default: return write_codes<kNone>(product, sums, piece, tile, tiles);
    }
}

}  // namespace
