// Convolutions and linear layers of codes: matrix products in integers, and what follows on them.
//
// An output pixel is a row of the product: the codes under the kernel, tap after tap. Where channels
// come in whole chunks and 16 pixels lie equally far apart, rows are read where they lie in the
// padded image; else they are gathered in a panel first.
#include <omp.h>

#include "elementwise.h"
#include "tiles.h"

namespace {

// What a thread reads again for each pair of column tiles: some of its second-level cache.
const int64_t kPanelBytes = 512 << 10, kImageBytes = 1 << 20;
const int64_t kMostRows = 1024;
const int64_t kDeep = 14;         // chunks of two column tiles that stay in the first-level cache
const int64_t kSmallProduct = 1 << 20;  // not worth a second thread

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
    const float* scales;      // [column tiles * 16]
    const float* biases;      // [column tiles * 16]
    const int32_t* shares;    // [column tiles * 16]: zero point times the weight's sum
    const int64_t* offsets;   // [chunks]
    int64_t image, pixels;    // rows of one image, and of all
    int64_t chunks, column_tiles;
    int64_t stride;           // bytes between rows
    bool gathered, even;      // even: all rows of the image lie equally far apart
};

struct Scratch {  // of a thread
    int32_t* sums;
    Piece* pieces;
    uint8_t* panel;
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

void finish(const Product& product, const int32_t* sums, const Piece& piece, int64_t tile,
            int64_t tiles) {
    const Result& y = *product.y;
    const int64_t channels = product.weight->out_channels;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t c = (tile + t) * kTileColumns, left = channels - c;
        const __mmask16 mask = left >= kTileColumns ? 0xffff : __mmask16((1u << left) - 1);
        const __m512 scale = _mm512_loadu_ps(product.scales + c);
        const __m512 bias = _mm512_loadu_ps(product.biases + c);
        const __m512i share = _mm512_loadu_si512(product.shares + c);
        for (int64_t r = 0; r < piece.rows; ++r) {
            __m512i sum = _mm512_loadu_si512(sums + r * kBlockColumns + t * kTileColumns);
            sum = _mm512_sub_epi32(sum, share);
            __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, bias);
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

// All pieces with column tiles `from` to `to`. Some chunks of two tiles at a time, so that they are
// read from the nearest cache; the sums of the pieces wait.
void multiply(const Product& product, const Scratch& own, int64_t count, int64_t from, int64_t to) {
    const int64_t tile_stride = product.chunks * kTileBytes, stride = product.stride;
    const int64_t passes = count > 1 ? parts_of(product.chunks, kDeep) : 1;
    for (int64_t tile = from; tile < to; tile += 2) {
        const bool two = tile + 1 < to;
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t start = product.chunks * pass / passes;
            const int64_t chunks = product.chunks * (pass + 1) / passes - start;
            const int64_t* offsets = product.offsets + start;
            const int8_t* b = product.weight->tiles + tile * tile_stride + start * kTileBytes;
            for (int64_t i = 0; i < count; ++i) {
                const Piece& piece = own.pieces[i];
                int32_t* sums = own.sums + (passes > 1 ? i * kBlockRows * kBlockColumns : 0);
                const bool tall = piece.rows > kTileRows, first = pass == 0;
                const auto add = tall ? (two ? add_products<2, 2> : add_products<2, 1>)
                                      : (two ? add_products<1, 2> : add_products<1, 1>);
                add(piece.codes, stride, offsets, chunks, b, tile_stride, first, sums);
                if (pass == passes - 1) finish(product, sums, piece, tile, two ? 2 : 1);
            }
        }
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
    const bool many_columns = parts_of(product.column_tiles, 2) >= threads;
    // With parted columns each thread reads only some of the weight, but gathers all rows.
    if (blocks == 1 && many_columns &&
        (!product.gathered || product.pixels < product.weight->out_channels))
        parts = threads;
    else
        blocks = parts_of(blocks, threads) * threads;
    rows = parts_of(parts_of(product.pixels, blocks), kBlockRows) * kBlockRows;
    return {rows, parts_of(product.pixels, rows), parts};
}

void run(const Product& product, const Shares& shares, int threads, char* memory,
         int64_t own_bytes) {
    const int64_t most_pieces = shares.rows / kTileRows;
    const int64_t pairs = parts_of(product.column_tiles, 2);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* at = memory + omp_get_thread_num() * own_bytes;
        const Scratch own = {
            reinterpret_cast<int32_t*>(at),
            reinterpret_cast<Piece*>(at + most_pieces * kBlockRows * kSumBytes),
            reinterpret_cast<uint8_t*>(at + most_pieces * (kBlockRows * kSumBytes + sizeof(Piece)))};
        int64_t ready = -1, count = 0;
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < shares.blocks * shares.parts; ++i) {
            const int64_t block = i / shares.parts, part = i % shares.parts;
            const int64_t first = block * shares.rows;
            if (ready != block)
                count = cut(product, first, least(shares.rows, product.pixels - first), own);
            ready = block;
            const int64_t from = 2 * (pairs * part / shares.parts);
            const int64_t to = 2 * (pairs * (part + 1) / shares.parts);
            multiply(product, own, count, from, least(to, product.column_tiles));
        }
        end_tiles();
    }
}

}  // namespace

// See fused.products.
EXPORT int32_t NAME(products)(const Codes* x, const Weight* weight, const Grid* grid,
                              const Result* y, int32_t threads) {
    const int64_t row = grid->row ? *grid->row : 0;
    if (row < 0 || row >= grid->rows) return kRowOutside;
    Product product = {x, weight, y};
    product.image = x->height * x->width;
    product.pixels = x->batch * product.image;
    product.chunks = parts_of(x->taps_h * x->taps_w * x->channels, kChunk);
    product.column_tiles = parts_of(weight->out_channels, kTileColumns);
    product.even = x->stride_h == x->width * x->stride_w &&
                   (x->batch == 1 || x->stride_b == x->height * x->stride_h);
    product.gathered = x->channels % kChunk != 0 ||
                       (product.even ? product.pixels : x->width) % kTileRows != 0;
    product.stride = product.gathered ? product.chunks * kChunk : x->stride_w;
    if (product.pixels * product.chunks * product.column_tiles * kTileBytes < kSmallProduct)
        threads = 1;
    const Shares shares = share_out(product, threads);

    const int64_t columns = product.column_tiles * kTileColumns, most_pieces = shares.rows / kTileRows;
    int64_t own_bytes = most_pieces * (kBlockRows * kSumBytes + sizeof(Piece));
    own_bytes += product.gathered ? shares.rows * product.stride : 0;
    own_bytes = parts_of(own_bytes, 64) * 64;
    const int64_t shared_bytes = columns * 12 + product.chunks * 8 + 64;
    char* memory = static_cast<char*>(malloc(shared_bytes + threads * own_bytes));
    if (!memory) return kNoMemory;
    float *scales = reinterpret_cast<float*>(memory), *biases = scales + columns;
    int32_t* zero_shares = reinterpret_cast<int32_t*>(biases + columns);
    int64_t* offsets = reinterpret_cast<int64_t*>(zero_shares + columns);

    const float scale = grid->scale[row];
    const int32_t zero = grid->zero_point[row];
    const float* step_bias = weight->step_bias + (weight->step_bias ? row * weight->out_channels : 0);
    for (int64_t c = 0; c < columns; ++c) {
        const bool inside = c < weight->out_channels;
        scales[c] = inside ? scale * weight->scale[c] : 0.0f;
        zero_shares[c] = inside ? zero * weight->sums[c] : 0;
        biases[c] = inside && weight->bias ? weight->bias[c] : 0.0f;
        if (inside && weight->step_bias) biases[c] += step_bias[c];
    }
    const int64_t per_tap = x->channels / kChunk;
    for (int64_t k = 0; k < product.chunks; ++k) {
        const int64_t tap = product.gathered ? 0 : k / per_tap;
        offsets[k] = product.gathered ? k * kChunk
                                      : tap / x->taps_w * x->tap_h + tap % x->taps_w * x->tap_w +
                                            k % per_tap * kChunk;
    }
    product.scales = scales;
    product.biases = biases;
    product.shares = zero_shares;
    product.offsets = offsets;
    char* own = reinterpret_cast<char*>(offsets + product.chunks);
    own += 64 - reinterpret_cast<uintptr_t>(own) % 64;
    run(product, shares, threads, own, own_bytes);
    free(memory);
    return kDone;
}
