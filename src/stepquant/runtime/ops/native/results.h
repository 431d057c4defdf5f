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
    const int32_t* shares;    // [column tiles * 16]: zero point less kShift, times the weight's sum
    const int64_t* offsets;   // [chunks]
    int64_t image, pixels;    // rows of one image, and of all
    int64_t chunks, column_tiles;
    int64_t pairs, second;    // of column tiles; how many tiles after the first the other one comes
    int64_t stride;           // bytes between rows
    int64_t most;             // of two weights' magnitudes, whose products with codes 16 bits hold
    bool gathered, even;      // even: all rows of the image lie equally far apart
};

// To the nearest, ties to even. Rounding could carry a NaN's bits over to a number, so those are cut.
INLINE uint16_t bf16_of(float y) {
    const uint32_t bits = bits_of(y), rounded = bits + (bits >> 16 & 1) + 0x7fff;
    return uint16_t((y == y ? rounded : bits | 0x400000) >> 16);
}

// The values of a column tile in a row, from their sums.
INLINE void values_of(const Product& product, const int32_t* sums, int64_t tile, float* values) {
    const float *scales = product.scales + tile * kTileColumns,
                *biases = product.biases + tile * kTileColumns;
    const int32_t* shares = product.shares + tile * kTileColumns;
#pragma omp simd
    for (int64_t c = 0; c < kTileColumns; ++c)
        values[c] = madd(float(sums[c] - shares[c]), scales[c], biases[c]);
}

// The first `count` values of a column tile in a row; `at` is the number of the first.
INLINE void write_row(const Result& y, int64_t at, int64_t count, const float* gate, float* values) {
    if (gate)
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) values[c] *= gate[c];
    if (y.added && y.added_bf16) {
        const uint16_t* added = static_cast<const uint16_t*>(y.added) + at;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) values[c] += load(added, c);
    } else if (y.added) {
        const float* added = static_cast<const float*>(y.added) + at;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) values[c] += added[c];
    }
    if (y.bf16) {
        uint16_t* to = static_cast<uint16_t*>(y.data) + at;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) to[c] = bf16_of(values[c]);
    } else {
        float* to = static_cast<float*>(y.data) + at;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) to[c] = values[c];
    }
}

void write_floats(const Product& product, const int32_t* sums, const Piece& piece, int64_t tile,
                  int64_t tiles) {
    const Result& y = *product.y;
    const int64_t channels = product.weight->out_channels;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t c = (tile + t) * kTileColumns, left = channels - c;
        for (int64_t r = 0; r < piece.rows; ++r) {
            float values[kTileColumns];
            values_of(product, sums + r * kBlockColumns + t * kTileColumns, tile + t, values);
            const int64_t at = (piece.first + r) * channels + c;
            const int64_t sample = (piece.first + r) / product.image;
            const float* gate = y.gate ? y.gate + sample * y.gate_stride + c : nullptr;
            // A whole tile is a number that the compiler knows.
            if (left >= kTileColumns)
                write_row(y, at, kTileColumns, gate, values);
            else
                write_row(y, at, left, gate, values);
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
    for (int64_t r = 0; r < piece.rows; ++r, sums += kBlockColumns) {
        values_of(product, sums, tile, values + r * width);
        float* other = gated ? gates + r * width : values + r * width + kTileColumns;
        if (tiles > 1)
            values_of(product, sums + kTileColumns, tile + product.second, other);
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
