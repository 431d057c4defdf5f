// Where the weight of a product lies, and how one of four bits becomes the bytes that products take.
//
// A column tile of four bits has 64 bytes with the lowest value of each column, four times over, and
// then [chunks][8][64]: a byte of row r has in its halves what lies there in rows 2 r (the lower) and
// 2 r + 1 of the chunk (see tiles.h), less the lowest value.
#pragma once

#include "results.h"

namespace {

const int64_t kLowestBytes = 64, kHalfTileBytes = kTileBytes / 2;

void unpack(const uint8_t* packed, int64_t chunks, int8_t* tile) {
    const __m512i lowest = _mm512_loadu_si512(packed), mask = _mm512_set1_epi8(15);
    packed += kLowestBytes;
    for (int64_t i = 0; i < chunks * kHalfTileBytes; i += 64, tile += 128) {
        const __m512i both = _mm512_loadu_si512(packed + i);
        const __m512i even = _mm512_and_si512(both, mask);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        _mm512_storeu_si512(tile, _mm512_add_epi8(even, lowest));
        _mm512_storeu_si512(tile + 64, _mm512_add_epi8(odd, lowest));
    }
}

int64_t tile_of(const Product& product, int64_t pair) {
    return product.second == 1 ? 2 * pair : pair;
}

struct Tiles {  // of some pairs of column tiles
    const int8_t* first;
    int64_t pair, pair_stride, second_stride;

    const int8_t* of(int64_t other) const { return first + (other - pair) * pair_stride; }
};

// Those of the pairs `from` to `to`; `room` holds them where they have to be unpacked.
Tiles tiles_of(const Product& product, int64_t from, int64_t to, int8_t* room) {
    const int64_t bytes = product.chunks * kTileBytes, step = product.second == 1 ? 2 : 1;
    const int8_t* all = product.weight->tiles;
    if (!product.weight->four_bits)
        return {all + from * step * bytes, from, step * bytes, product.second * bytes};
    const int64_t packed_bytes = kLowestBytes + product.chunks * kHalfTileBytes;
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(all);
    int8_t* at = room;
    for (int64_t pair = from; pair < to; ++pair, at += 2 * bytes) {
        const int64_t tile = tile_of(product, pair), other = tile + product.second;
        unpack(packed + tile * packed_bytes, product.chunks, at);
        if (other < product.column_tiles)
            unpack(packed + other * packed_bytes, product.chunks, at + bytes);
    }
    return {room, from, 2 * bytes, bytes};
}

}  // namespace
