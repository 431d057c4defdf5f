// Convolutions and linear layers of codes: matrix products in integers, and what follows on them.
//
// An output pixel is a row of the product: the codes under the kernel, tap after tap. Where channels
// come in whole chunks and 16 pixels lie equally far apart, rows are read where they lie in the
// padded image; else they are gathered in a panel first.
#include "threads.h"
#include "weights.h"
#ifdef WINOGRAD
#include "winograd.h"
#endif

namespace {

// A thread's blocks of rows and of the weight, which share its second-level cache.
const int64_t kPanelBytes = 512 << 10, kImageBytes = 1 << 20, kWeightBytes = 768 << 10;
const int64_t kMostRows = 1024;
const int64_t kDeepPair = 14, kDeepPiece = 10;  // chunks that stay in the first-level cache
const int64_t kManyChunks = 64;                 // of which the weight is best read in its order
const int64_t kSmallProduct = 1 << 20;          // not worth a second thread

struct Scratch {  // of a thread
    int32_t* sums;
    Piece* pieces;
    uint8_t* panel;
    int8_t* weight;
    int64_t* together;
};

const uint8_t* codes_of(const Codes& x, int64_t pixel) {
    const int64_t w = pixel % x.width, h = pixel / x.width % x.height;
    return x.codes + pixel / (x.width * x.height) * x.stride_b + h * x.stride_h + w * x.stride_w;
}

// Rows `first` to `first + rows` one after another, each with zeros up to a whole chunk.
void gather(const Product& product, int64_t first, int64_t rows, uint8_t* panel) {
    const Codes& x = *product.x;
    const bool dense = x.tap_w == x.channels;  // a row of taps lies side by side
    const int64_t runs = dense ? 1 : x.taps_w, run = dense ? x.taps_w * x.channels : x.channels;
    const int64_t filled = x.taps_h * x.taps_w * x.channels;
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* from = codes_of(x, first + r);
        uint8_t* to = panel + r * product.stride;
        for (int64_t i = 0; i < x.taps_h; ++i)
            for (int64_t j = 0; j < runs; ++j, to += run)
                memcpy(to, from + i * x.tap_h + j * x.tap_w, run);
        memset(to, 0, product.stride - filled);
    }
}

int64_t cut(const Product& product, int64_t first, int64_t rows, const Scratch& own) {
    if (product.gathered) gather(product, first, rows, own.panel);
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++count) {
        int64_t here = least(rows - r, kBlockRows);
        const uint8_t* codes = own.panel + r * product.stride;
        if (!product.gathered) {
            codes = codes_of(*product.x, first + r);
            const int64_t width = product.x->width;
            if (!product.even) here = least(here, width - (first + r) % width);
        }
        own.pieces[count] = {codes, first + r, here};
        r += here;
    }
    return count;
}

// The order of a thread's work. A pair of column tiles meets a piece of rows in passes over their
// chunks, so that what is read again lies in the nearest cache; sums wait between passes.
struct Order {
    bool pairs_first;  // each pair meets all pieces before the next one does; else the other way
    int64_t passes;
    int64_t pairs;     // that a piece meets before the next one does, as many as stay in the cache

    Order(const Product& product, int64_t pieces) {
        // Neighbouring taps read the same codes, which so stay near by themselves.
        const bool overlapping = !product.gathered && product.x->taps_h * product.x->taps_w > 1;
        pairs_first = overlapping || product.chunks >= kManyChunks;
        passes = pieces == 1 ? 1 : parts_of(product.chunks, pairs_first ? kDeepPair : kDeepPiece);
        pairs = kWeightBytes / (2 * product.chunks * kTileBytes);
        pairs = pairs < 1 ? 1 : least(pairs, product.pairs);
        // What is unpacked for a single piece is best used at once.
        if (pairs_first || (pieces == 1 && product.weight->four_bits)) pairs = 1;
    }

    int64_t waiting(int64_t pieces) const {  // blocks of sums
        return passes == 1 ? 1 : (pairs_first ? pieces : pairs);
    }
};

void add_pass(const Product& product, const Order& order, const Tiles& tiles, const Piece& piece,
              int64_t pair, int64_t pass, int32_t* sums) {
    const int64_t tile = tile_of(product, pair);
    const int64_t skipped = product.chunks * pass / order.passes;
    const int64_t chunks = product.chunks * (pass + 1) / order.passes - skipped;
    const int64_t count = tile + product.second < product.column_tiles ? 2 : 1;
    const CodeRows rows = {piece.codes, piece.rows, product.stride, product.offsets + skipped,
                           chunks};
    ColumnTile of_pair[2];
    for (int64_t t = 0; t < count; ++t) of_pair[t] = tiles.of(pair, t, skipped);
    add_products(rows, of_pair, count, pass == 0, sums);
    if (pass == order.passes - 1) finish(product, sums, piece, tile, count);
}

// All pieces with the pairs of column tiles `from` to `to`.
void multiply(const Product& product, const Scratch& own, int64_t count, int64_t from, int64_t to) {
    const Order order(product, count);
    const int64_t block = order.passes == 1 ? 0 : kBlockRows * kBlockColumns;
    for (int64_t start = from; start < to; start += order.pairs) {
        const int64_t end = least(start + order.pairs, to);
        const Tiles tiles(product, start, end, own.weight, own.together);
        if (order.pairs_first) {
            for (int64_t pass = 0; pass < order.passes; ++pass)
                for (int64_t i = 0; i < count; ++i)
                    add_pass(product, order, tiles, own.pieces[i], start, pass,
                             own.sums + i * block);
            continue;
        }
        for (int64_t i = 0; i < count; ++i)
            for (int64_t pass = 0; pass < order.passes; ++pass)
                for (int64_t pair = start; pair < end; ++pair)
                    add_pass(product, order, tiles, own.pieces[i], pair, pass,
                             own.sums + (pair - start) * block);
    }
}

// Shares of the work: blocks of `rows` rows, each in `parts` parts of its columns.
struct Shares {
    int64_t rows, blocks, parts;
};

Shares share_out(const Product& product, int64_t threads) {
    const int64_t row_bytes = product.gathered ? product.stride : product.x->channels;
    int64_t rows = (product.gathered ? kPanelBytes : kImageBytes) / row_bytes;
    rows = rows < kBlockRows ? kBlockRows : least(rows, kMostRows);
    int64_t blocks = parts_of(product.pixels, rows), parts = 1;
    const bool many_columns = product.pairs >= threads;
    // With parted columns each thread reads only some of the weight, but gathers all rows.
    if (blocks == 1 && many_columns &&
        (!product.gathered || product.pixels < product.weight->out_channels))
        parts = threads;
    else
        blocks = parts_of(blocks, threads) * threads;
    rows = parts_of(parts_of(product.pixels, blocks), kBlockRows) * kBlockRows;
    return {rows, parts_of(product.pixels, rows), parts};
}

// Bytes of `Scratch`, and where its parts begin.
struct Room {
    int64_t pieces, panel, weight, together, all;

    Room(const Product& product, const Shares& shares) {
        const int64_t most = shares.rows / kTileRows;
        const Order order(product, most);
        pieces = order.waiting(most) * kBlockRows * kSumBytes;
        panel = pieces + parts_of(most * sizeof(Piece), 64) * 64;
        weight = panel + (product.gathered ? shares.rows * product.stride : 0);
        const int64_t unpacked = 2 * order.pairs * product.chunks * kTileBytes;
        together = weight + (product.weight->four_bits ? unpacked : 0);
        all = together + parts_of(2 * order.pairs * sizeof(int64_t), 64) * 64;
    }
};

void run(const Product& product, const Shares& shares, int threads, char* memory) {
    const Room room(product, shares);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* at = memory + omp_get_thread_num() * room.all;
        const Scratch own = {reinterpret_cast<int32_t*>(at),
                             reinterpret_cast<Piece*>(at + room.pieces),
                             reinterpret_cast<uint8_t*>(at + room.panel),
                             reinterpret_cast<int8_t*>(at + room.weight),
                             reinterpret_cast<int64_t*>(at + room.together)};
        int64_t ready = -1, count = 0;
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < shares.blocks * shares.parts; ++i) {
            const int64_t block = i / shares.parts, part = i % shares.parts;
            const int64_t first = block * shares.rows;
            if (ready != block)
                count = cut(product, first, least(shares.rows, product.pixels - first), own);
            ready = block;
            multiply(product, own, count, product.pairs * part / shares.parts,
                     product.pairs * (part + 1) / shares.parts);
        }
        end_tiles();
    }
}

// Everything of `product` that depends on the shapes alone.
void measure(Product& product) {
    const Codes& x = *product.x;
    product.image = x.height * x.width;
    product.pixels = x.batch * product.image;
    product.chunks = parts_of(x.taps_h * x.taps_w * x.channels, kChunk);
    product.column_tiles = parts_of(product.weight->out_channels, kTileColumns);
    product.pairs = parts_of(product.column_tiles, 2);
    product.second = product.encoded && product.encoded->gated ? product.column_tiles / 2 : 1;
    product.even = x.stride_h == x.width * x.stride_w &&
                   (x.batch == 1 || x.stride_b == x.height * x.stride_h);
    const int64_t together = product.even ? product.pixels : x.width;
    product.gathered = x.channels % kChunk != 0 || together % kTileRows != 0;
    product.stride = product.gathered ? product.chunks * kChunk : x.stride_w;
}

void set_columns(const Weight& weight, const Grid& grid, int64_t columns, float* scales,
                 float* biases, int32_t* shares) {
    const int64_t row = grid.row ? *grid.row : 0;
    const float scale = grid.scale[row];
    const int32_t zero = grid.zero_point[row] - kShift;
    const float* of_step = weight.step_bias ? weight.step_bias + row * weight.out_channels : nullptr;
    for (int64_t c = 0; c < columns; ++c) {
        const bool inside = c < weight.out_channels;
        scales[c] = inside ? scale * weight.scale[c] : 0.0f;
        shares[c] = inside ? zero * weight.sums[c] : 0;
        biases[c] = inside && weight.bias ? weight.bias[c] : 0.0f;
        if (inside && of_step) biases[c] += of_step[c];
    }
}

void set_offsets(const Product& product, int64_t* offsets) {
    const Codes& x = *product.x;
    const int64_t per_tap = x.channels / kChunk;
    for (int64_t k = 0; k < product.chunks; ++k) {
        const int64_t tap = product.gathered ? 0 : k / per_tap;
        const int64_t inside = product.gathered ? k : k % per_tap;
        offsets[k] = tap / x.taps_w * x.tap_h + tap % x.taps_w * x.tap_w + inside * kChunk;
    }
}

}  // namespace

// See kernels/native.py. Where `encoded` is given, nothing is written to `y`, which adds nothing; then
// columns come in whole tiles, and in pairs of tiles where they are gated.
EXPORT int32_t NAME(products)(const Codes* x, const Weight* weight, const Grid* grid,
                              const Result* y, const Encoded* encoded, int32_t threads) {
    Product product = {x, weight, y, encoded};
    product.most = INT16_MAX / (grid->largest > 0 ? grid->largest : 1);
    Levels levels;
    if (!levels_of(*grid, &levels)) return kRowOutside;
    if (encoded && !levels_of(encoded->grid, &product.levels)) return kRowOutside;
    measure(product);
    if (product.pixels == 0) return kDone;
    if (product.pixels * product.chunks * product.column_tiles * kTileBytes < kSmallProduct)
        threads = 1;
    const Shares shares = share_out(product, threads);
    int64_t room = Room(product, shares).all;
#ifdef WINOGRAD
    const bool minimal = suits(product);
    if (minimal) room = winograd_room(product, threads);
#endif
    const int64_t columns = product.column_tiles * kTileColumns;
    const int64_t own = parts_of(columns * 12 + product.chunks * 8, 64) * 64;
    char* memory = static_cast<char*>(malloc(64 + own + threads * room));
    if (!memory) return kNoMemory;
    char* at = memory + 64 - reinterpret_cast<uintptr_t>(memory) % 64;
    int64_t* offsets = reinterpret_cast<int64_t*>(at);
    float* scales = reinterpret_cast<float*>(offsets + product.chunks);
    float* biases = scales + columns;
    int32_t* zero_shares = reinterpret_cast<int32_t*>(biases + columns);
    set_columns(*weight, *grid, columns, scales, biases, zero_shares);
    set_offsets(product, offsets);
    product.scales = scales;
    product.biases = biases;
    product.shares = zero_shares;
    product.offsets = offsets;
#ifdef WINOGRAD
    if (minimal)
        run_winograd(product, threads, at + own);
    else
#endif
        run(product, shares, threads, at + own);
    free(memory);
    return kDone;
}
