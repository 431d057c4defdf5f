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
    const uint8_t* lowest = packed;
    packed += kLowestBytes;
    for (int64_t i = 0; i < chunks * kHalfTileBytes; i += 64, packed += 64, tile += 128)
#pragma omp simd
        for (int64_t j = 0; j < 64; ++j) {
            tile[j] = int8_t((packed[j] & 15) + lowest[j]);
            tile[j + 64] = int8_t((packed[j] >> 4) + lowest[j]);
        }
}

// Where tile `tile` lies, if it is of four bits.
const uint8_t* packed_tile(const Product& product, int64_t tile) {
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(product.weight->tiles);
    return packed + tile * (kLowestBytes + product.chunks * kHalfTileBytes);
}

int64_t tile_of(const Product& product, int64_t pair) {
    return product.second == 1 ? 2 * pair : pair;
}

class Tiles {  // some pairs of column tiles
public:
    // Those of the pairs `from` to `to`. `room` holds them where they have to be unpacked, and
    // `together` two numbers for each pair.
    Tiles(const Product& product, int64_t from, int64_t to, int8_t* room, int64_t* together)
        : from_(from), first_(room), together_(together) {
        const int64_t bytes = product.chunks * kTileBytes, step = product.second == 1 ? 2 : 1;
        pair_stride_ = 2 * bytes;
        second_stride_ = bytes;
        if (!product.weight->four_bits) {
            first_ = product.weight->tiles + from * step * bytes;
            pair_stride_ = step * bytes;
            second_stride_ = product.second * bytes;
        }
        for (int64_t pair = from; pair < to; ++pair)
            for (int64_t t = 0; t < 2; ++t) {
                const int64_t tile = tile_of(product, pair) + t * product.second;
                if (tile < product.column_tiles) get_ready(product, pair, t, tile, room);
            }
    }

    // Tile 0 or 1 of a pair, from chunk `skipped` on.
    ColumnTile of(int64_t pair, int64_t t, int64_t skipped) const {
        const int64_t together = kInspected ? together_[2 * (pair - from_) + t] : 0;
        return {values(pair, t) + skipped * kTileBytes, together};
    }

private:
    int64_t from_, pair_stride_, second_stride_;
    const int8_t* first_;
    int64_t* together_;

    const int8_t* values(int64_t pair, int64_t t) const {
        return first_ + (pair - from_) * pair_stride_ + t * second_stride_;
    }

    void get_ready(const Product& product, int64_t pair, int64_t t, int64_t tile, int8_t* room) {
        const int64_t chunks = product.chunks;
        if (product.weight->four_bits)
            unpack(packed_tile(product, tile), chunks, room + (values(pair, t) - first_));
        if (kInspected)
            together_[2 * (pair - from_) + t] = inspect(values(pair, t), chunks, product.most);
    }
};

}  // namespace
