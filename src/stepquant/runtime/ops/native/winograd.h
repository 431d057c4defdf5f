// Convolutions of 3 x 3 taps by minimal filtering, exact in integers: 16 products for four pixels
// where taps take 36.
//
// F(2 x 2, 3 x 3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016),
// section 4.1, in their symbols: Y = A^T [(G g G^T) (B^T d B)] A for a tile of four pixels, with the
// products summed over in-channels for each of 16 points. G has halves, so the weights are
// transformed by 2 G, and sums are four times too large: whole numbers, divided by four in the end.
// Sums may wrap on the way, as all is added modulo 2^32 and the end fits (`suits`).
//
// Codes and weights are taken in groups of four channels: channels 0 and 2 of each group side by
// side, in 16 bits, and apart from them channels 1 and 3, as they come out of bytes without shuffles.
#pragma once

#include "weights.h"

namespace {

const int64_t kPoints = 16;
const int64_t kRunTiles = kBlockRows / 2;  // side by side, whose upper pixels are a piece of rows
const int64_t kMostTiles = 64, kFewestTiles = 16, kInputBytes = 768 << 10;
const int64_t kMostChannels = 1792;  // 4 * 9 * 255 * 128 * channels < 2^31
const int64_t kCodesInVector = 32;

bool suits(const Product& product) {
    const Codes& x = *product.x;
    const bool three = x.taps_h == 3 && x.taps_w == 3 && x.tap_w == x.channels;
    const bool dense = x.stride_w == x.channels && x.stride_h == x.tap_h;  // no stride or dilation
    // With few tiles the weight's transform counts; taps of four bits are fast without it.
    const int64_t fewest = product.weight->four_bits ? kMostTiles : kFewestTiles;
    return three && dense && x.height % 2 == 0 && x.width % 2 == 0 && !product.encoded &&
           x.channels % kCodesInVector == 0 && x.channels <= kMostChannels &&
           product.pixels >= 4 * fewest;
}

// The tiles of an image in runs, row by row.
struct Runs {
    int64_t across, in_row, down, count;

    explicit Runs(const Codes& x)
        : across(x.width / 2),
          in_row(parts_of(x.width / 2, kRunTiles)),
          down(x.height / 2),
          count(x.batch * (x.height / 2) * parts_of(x.width / 2, kRunTiles)) {}

    int64_t tiles() const { return least(across, kRunTiles); }  // at most, of a run
};

struct Run {
    int64_t image, row, first, tiles;  // `row` and `first`: of tiles

    Run(const Runs& runs, int64_t number) {
        const int64_t part = number % runs.in_row;
        image = number / (runs.in_row * runs.down);
        row = number / runs.in_row % runs.down;
        first = part * kRunTiles;
        tiles = least(kRunTiles, runs.across - first);
    }
};

// x -> B^T x
INLINE void transform_codes(const __m256i x[4], __m256i y[4]) {
    y[0] = _mm256_sub_epi16(x[0], x[2]);
    y[1] = _mm256_add_epi16(x[1], x[2]);
    y[2] = _mm256_sub_epi16(x[2], x[1]);
    y[3] = _mm256_sub_epi16(x[1], x[3]);
}

// Channels 0 and 2 of groups, or 1 and 3.
INLINE __m256i codes_in_16_bits(__m256i codes, int part) {
    return part ? _mm256_srli_epi16(codes, 8) : _mm256_and_si256(codes, _mm256_set1_epi16(255));
}

INLINE __m256i weights_in_16_bits(__m256i weights, int part) {
    return _mm256_srai_epi16(part ? weights : _mm256_slli_epi16(weights, 8), 8);
}

// B^T d B of a tile: [16 points, `point` values apart][2 parts][channels / 2].
void transform_input(const Codes& x, const uint8_t* from, int64_t point, int16_t* to) {
    for (int64_t c = 0; c < x.channels; c += kCodesInVector)
        for (int part = 0; part < 2; ++part) {
            __m256i columns[4][4];
            for (int j = 0; j < 4; ++j) {
                __m256i d[4];
                for (int i = 0; i < 4; ++i) {
                    const uint8_t* at = from + i * x.stride_h + j * x.channels + c;
                    d[i] = codes_in_16_bits(load_vector(at), part);
                }
                transform_codes(d, columns[j]);
            }
            int16_t* at = to + part * (x.channels / 2) + c / 2;
            for (int i = 0; i < 4; ++i) {
                const __m256i row[] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
                __m256i v[4];
                transform_codes(row, v);
                for (int j = 0; j < 4; ++j) store_vector(at + (4 * i + j) * point, v[j]);
            }
        }
}

// x -> 2 G x
INLINE void transform_taps(const __m256i x[3], __m256i y[4]) {
    const __m256i outer = _mm256_add_epi16(x[0], x[2]);
    y[0] = _mm256_add_epi16(x[0], x[0]);
    y[1] = _mm256_add_epi16(outer, x[1]);
    y[2] = _mm256_sub_epi16(outer, x[1]);
    y[3] = _mm256_add_epi16(x[2], x[2]);
}

// (2 G) g (2 G)^T of a column tile: [16 points][channels / 4][2 parts][16 columns][2].
void transform_weight(const int8_t* tile, int64_t channels, int16_t* to) {
    const int64_t point = channels * kTileColumns;
    for (int64_t c = 0; c < channels; c += kGroup)
        for (int part = 0; part < 2; ++part)
            for (int v = 0; v < kVectors; ++v) {
                __m256i columns[3][4];
                for (int j = 0; j < 3; ++j) {
                    __m256i g[3];
                    for (int i = 0; i < 3; ++i) {
                        const int64_t value = (3 * i + j) * channels + c;
                        const int8_t* at = tile + value * kTileColumns + v * 32;
                        g[i] = weights_in_16_bits(load_vector(at), part);
                    }
                    transform_taps(g, columns[j]);
                }
                int16_t* at = to + ((c / kGroup * 2 + part) * kVectors + v) * 16;
                for (int i = 0; i < 4; ++i) {
                    const __m256i row[] = {columns[0][i], columns[1][i], columns[2][i]};
                    __m256i u[4];
                    transform_taps(row, u);
                    for (int j = 0; j < 4; ++j) store_vector(at + (4 * i + j) * point, u[j]);
                }
            }
}

// Sums over the channels at one point: R tiles with 16 columns.
template <int R>
void multiply_point(const int16_t* input, const int16_t* weight, int64_t channels, int32_t* sums) {
    __m256i total[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) total[r][v] = _mm256_setzero_si256();
    for (int64_t c = 0; c < channels; c += kGroup)
        for (int part = 0; part < 2; ++part, weight += 32)
            add_wide_pairs<R>(input + part * (channels / 2) + c / 2, channels, weight, total);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v)
            store_vector(sums + r * kTileColumns + v * kColumnsInVector, total[r][v]);
}

// x -> A^T x
INLINE void transform_sums(const __m256i x[4], __m256i y[2]) {
    y[0] = _mm256_add_epi32(_mm256_add_epi32(x[0], x[1]), x[2]);
    y[1] = _mm256_sub_epi32(_mm256_sub_epi32(x[1], x[2]), x[3]);
}

// The sums of a tile's pixels: two in the rows `upper`, two in the rows `lower`.
void transform_output(const int32_t* from, int64_t point, int32_t* upper, int32_t* lower) {
    for (int64_t v = 0; v < kTileColumns; v += kColumnsInVector) {
        __m256i columns[4][2];
        for (int j = 0; j < 4; ++j) {
            __m256i m[4];
            for (int i = 0; i < 4; ++i) m[i] = load_vector(from + (4 * i + j) * point + v);
            transform_sums(m, columns[j]);
        }
        for (int i = 0; i < 2; ++i) {
            const __m256i row[] = {columns[0][i], columns[1][i], columns[2][i], columns[3][i]};
            __m256i y[2];
            transform_sums(row, y);
            int32_t* to = (i ? lower : upper) + v;
            store_vector(to, _mm256_srai_epi32(y[0], 2));
            store_vector(to + kBlockColumns, _mm256_srai_epi32(y[1], 2));
        }
    }
}

// A thread's work: `runs` runs at a time, each block of them in `parts` parts of the columns.
struct WinogradShares {
    int64_t runs, blocks, parts, tiles;

    WinogradShares(const Product& product, const Runs& all, int64_t threads) {
        const int64_t bytes = kPoints * product.x->channels * int64_t(sizeof(int16_t));
        int64_t most = least(kMostTiles, kInputBytes / bytes);
        most = most < kFewestTiles ? kFewestTiles : most;
        blocks = parts_of(all.count, most < all.tiles() ? 1 : most / all.tiles());
        parts = blocks < threads ? threads : 1;
        if (parts == 1) blocks = parts_of(blocks, threads) * threads;
        runs = parts_of(all.count, blocks);
        blocks = parts_of(all.count, runs);
        tiles = runs * all.tiles();
    }
};

struct WinogradRoom {  // of a thread, in bytes from its start
    int64_t weight, products, sums, unpacked, all;

    WinogradRoom(const Product& product, const WinogradShares& shares) {
        const int64_t channels = product.x->channels;
        weight = kPoints * shares.tiles * channels * int64_t(sizeof(int16_t));
        products = weight + kPoints * kTileColumns * channels * int64_t(sizeof(int16_t));
        sums = products + kPoints * shares.tiles * kTileColumns * int64_t(sizeof(int32_t));
        unpacked = sums + 2 * kBlockRows * kSumBytes;
        all = unpacked + (product.weight->four_bits ? product.chunks * kTileBytes : 0);
    }
};

class WinogradBlock {  // some runs
public:
    WinogradBlock(const Product& product, const Runs& runs, const WinogradShares& shares, char* at)
        : product_(product), runs_(runs), room_(product, shares) {
        input_ = reinterpret_cast<int16_t*>(at);
        weight_ = reinterpret_cast<int16_t*>(at + room_.weight);
        products_ = reinterpret_cast<int32_t*>(at + room_.products);
        sums_ = reinterpret_cast<int32_t*>(at + room_.sums);
        unpacked_ = reinterpret_cast<int8_t*>(at + room_.unpacked);
    }

    void take(int64_t from, int64_t to) {
        from_ = from;
        to_ = to;
        tiles_ = 0;
        for (int64_t number = from; number < to; ++number) tiles_ += Run(runs_, number).tiles;
        const Codes& x = *product_.x;
        int16_t* at = input_;
        for (int64_t number = from; number < to; ++number) {
            const Run run(runs_, number);
            const uint8_t* codes = x.codes + run.image * x.stride_b + 2 * run.row * x.stride_h;
            for (int64_t t = 0; t < run.tiles; ++t, at += x.channels)
                transform_input(x, codes + 2 * (run.first + t) * x.channels, tiles_ * x.channels,
                                at);
        }
    }

    void multiply(int64_t tile) {
        const int64_t channels = product_.x->channels;
        transform_weight(values_of_tile(tile), channels, weight_);
        for (int64_t p = 0; p < kPoints; ++p) {
            const int16_t* weight = weight_ + p * channels * kTileColumns;
            in_blocks<4>(tiles_, [&](int64_t r, auto rows) {
                const int64_t row = p * tiles_ + r;
                multiply_point<rows>(input_ + row * channels, weight, channels,
                                     products_ + row * kTileColumns);
            });
        }
        int64_t first = 0;
        for (int64_t number = from_; number < to_; ++number) {
            const Run run(runs_, number);
            write(run, products_ + first * kTileColumns, tile);
            first += run.tiles;
        }
    }

private:
    const Product& product_;
    const Runs& runs_;
    WinogradRoom room_;
    int64_t from_, to_, tiles_;
    int16_t *input_, *weight_;
    int32_t *products_, *sums_;
    int8_t* unpacked_;

    const int8_t* values_of_tile(int64_t tile) const {
        const int64_t chunks = product_.chunks;
        if (!product_.weight->four_bits) return product_.weight->tiles + tile * chunks * kTileBytes;
        unpack(packed_tile(product_, tile), chunks, unpacked_);
        return unpacked_;
    }

    void write(const Run& run, const int32_t* products, int64_t tile) const {
        const Codes& x = *product_.x;
        int32_t *upper = sums_, *lower = sums_ + kBlockRows * kBlockColumns;
        for (int64_t t = 0; t < run.tiles; ++t) {
            const int64_t at = 2 * t * kBlockColumns;
            transform_output(products + t * kTileColumns, tiles_ * kTileColumns, upper + at,
                             lower + at);
        }
        const int64_t pixel = (run.image * x.height + 2 * run.row) * x.width + 2 * run.first;
        finish(product_, upper, {nullptr, pixel, 2 * run.tiles}, tile, 1);
        finish(product_, lower, {nullptr, pixel + x.width, 2 * run.tiles}, tile, 1);
    }
};

// Bytes for each thread.
int64_t winograd_room(const Product& product, int threads) {
    const Runs runs(*product.x);
    return WinogradRoom(product, WinogradShares(product, runs, threads)).all;
}

void run_winograd(const Product& product, int threads, char* memory) {
    const Runs runs(*product.x);
    const WinogradShares shares(product, runs, threads);
    const WinogradRoom room(product, shares);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        WinogradBlock own(product, runs, shares, memory + omp_get_thread_num() * room.all);
        int64_t ready = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < shares.blocks * shares.parts; ++i) {
            const int64_t block = i / shares.parts, part = i % shares.parts;
            const int64_t first = block * shares.runs;
            if (ready != block) own.take(first, least(first + shares.runs, runs.count));
            ready = block;
            const int64_t end = product.column_tiles * (part + 1) / shares.parts;
            for (int64_t tile = product.column_tiles * part / shares.parts; tile < end; ++tile)
                own.multiply(tile);
        }
    }
}

}  // namespace
