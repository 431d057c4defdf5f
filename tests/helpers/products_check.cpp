// Compares a native library's integer products and roundings with plain loops: a program for the
// machine that the library is for, or for its emulator.
//
//     products_check LIBRARY NAMES...
//
// prints the bits of `product_levels` and checks those of the names of product levels, in their
// order, whose bit is set. The exit status is 1 where a result differs.
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "abi.h"

namespace {

using Products = int32_t(const Codes*, const Weight*, const Grid*, const Result*, const Encoded*,
                         int32_t);
using EncodeFlat = int32_t(const void*, int32_t, int64_t, int64_t, int32_t, const Grid*, uint8_t*,
                           int32_t);

struct Case {
    int64_t batch, height, width, channels, taps, stride, columns;
    bool four_bits;
};

// Where all are extreme: the code, and whether weights are the largest or the lowest.
enum Values { kRandom, kLargestUp, kLargestDown, kZeroUp, kZeroDown, kAlternating, kValues };

// Rows in place and gathered, one pass and several, whole and started blocks and tiles.
const Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 1, false},     {2, 1, 77, 192, 1, 1, 100, false},
    {1, 1, 64, 320, 1, 1, 64, true},  {1, 1, 3, 4160, 1, 1, 40, false},
    {1, 1, 40, 4200, 1, 1, 24, true}, {2, 5, 18, 64, 3, 1, 40, false},
    {1, 7, 50, 64, 3, 1, 33, false},  {1, 7, 34, 128, 3, 2, 16, true},
    {1, 10, 18, 256, 3, 1, 70, false}, {2, 7, 9, 17, 3, 1, 24, false},
    {1, 7, 9, 136, 3, 2, 35, true},
};

std::mt19937 generator(5);

int draw(int low, int high) { return low + int(generator() % uint32_t(high - low + 1)); }

void* found(void* library, const std::string& name) {
    void* function = dlsym(library, name.c_str());
    if (!function) {
        fprintf(stderr, "there is no %s\n", name.c_str());
        exit(1);
    }
    return function;
}

// As in tiles.h, or in weights.h; `weight` is [columns, length].
std::vector<int8_t> tiled(const std::vector<int8_t>& weight, int64_t columns, int64_t length,
                          bool four_bits) {
    const int64_t tiles = (columns + 15) / 16, chunks = (length + 63) / 64;
    const int64_t bytes = four_bits ? 64 + chunks * 512 : chunks * 1024;
    std::vector<int8_t> laid_out(tiles * bytes);
    for (int64_t c = 0; c < columns; ++c) {
        int8_t* tile = laid_out.data() + c / 16 * bytes;
        const int8_t* row = weight.data() + c * length;
        int8_t lowest = 0;  // also of the values that fill up the last chunk
        for (int64_t k = 0; k < length; ++k) lowest = row[k] < lowest ? row[k] : lowest;
        for (int64_t k = 0; k < chunks * 64; ++k) {
            const int8_t value = k < length ? row[k] : 0;
            const int64_t group = k / 4, byte = c % 16 * 4 + k % 4;
            if (four_bits) {
                tile[byte] = lowest;
                tile[64 + group / 2 * 64 + byte] |= (value - lowest) << (group % 2 * 4);
            } else {
                tile[group * 64 + byte] = value;
            }
        }
    }
    return laid_out;
}

int64_t wrong_products(Products* products, const Case& x, Values values, int threads) {
    const int64_t height = (x.height - x.taps) / x.stride + 1;
    const int64_t width = (x.width - x.taps) / x.stride + 1, length = x.taps * x.taps * x.channels;
    const int most = x.four_bits ? 7 : 127, lowest = x.four_bits ? -8 : -128;
    std::vector<uint8_t> codes(x.batch * x.height * x.width * x.channels);
    std::vector<int8_t> weight(x.columns * length);
    const int constant = values == kZeroUp || values == kZeroDown ? 0 : 255;
    for (uint8_t& code : codes) code = values == kRandom ? draw(0, 255) : constant;
    for (size_t i = 0; i < weight.size(); ++i) {
        const bool up =
            values == kLargestUp || values == kZeroUp || (values == kAlternating && i % 3);
        weight[i] = values == kRandom ? draw(lowest, most) : up ? most : lowest;
    }
    if (values == kAlternating)
        for (size_t i = 0; i < codes.size(); i += 3) codes[i] = 0;
    const std::vector<int8_t> laid_out = tiled(weight, x.columns, length, x.four_bits);
    std::vector<int32_t> sums(x.columns);
    for (size_t i = 0; i < weight.size(); ++i) sums[i / length] += weight[i];
    const std::vector<float> ones(x.columns, 1.0f);
    const float scale = 1.0f;
    const uint8_t zero_point = draw(0, 255);
    const int64_t row = x.width * x.channels;
    const Codes image = {codes.data(),  x.batch,    height,         width,
                         x.channels,    x.height * row, x.stride * row, x.stride * x.channels,
                         x.taps,        x.taps,     row,            x.channels};
    const Weight held = {laid_out.data(), x.four_bits, x.columns, ones.data(),
                         sums.data(),     nullptr,     nullptr};
    const Grid grid = {&scale, &zero_point, nullptr, 1, 255, nullptr};
    std::vector<float> y(x.batch * height * width * x.columns);
    const Result result = {y.data(), 0, nullptr, 0, nullptr, 0};
    if (products(&image, &held, &grid, &result, nullptr, threads) != kDone) return -1;
    int64_t wrong = 0;
    for (size_t i = 0; i < y.size(); ++i) {
        const int64_t c = i % x.columns, pixel = i / x.columns;
        const int64_t b = pixel / (height * width), h = pixel / width % height, w = pixel % width;
        int64_t sum = 0;
        for (int64_t k = 0; k < length; ++k) {
            const int64_t tap = k / x.channels;
            const int64_t at = (b * x.height + h * x.stride + tap / x.taps) * row +
                               (w * x.stride + tap % x.taps) * x.channels + k % x.channels;
            sum += (int64_t(codes[at]) - zero_point) * weight[c * length + k];
        }
        wrong += y[i] != float(sum);
    }
    return wrong;
}

double activated(int kind, double x) {
    if (kind == kSilu) return x / (1.0 + std::exp(-x));
    if (kind == kGelu) return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
    const double inner = std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    return kind == kGeluTanh ? 0.5 * x * (1.0 + std::tanh(inner)) : x;
}

// Codes further than half a step from the exact value, of 1000 values.
int64_t wrong_codes(EncodeFlat* encode, int kind) {
    const int64_t count = 1000;
    const float scale = 0.03f;
    const uint8_t zero_point = 100;
    const Grid grid = {&scale, &zero_point, nullptr, 1, 255, nullptr};
    std::vector<float> x(count);
    std::vector<uint8_t> codes(count);
    for (float& each : x) each = float(draw(-100000, 100000)) / 20000.0f;
    if (encode(x.data(), 0, count, count, kind, &grid, codes.data(), 1) != kDone) return -1;
    int64_t wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double place = activated(kind, x[i]) / scale + zero_point;
        const double nearest = place < 0 ? 0 : place > 255 ? 255 : place;
        wrong += std::fabs(codes[i] - nearest) > 0.5 + 1e-3;
    }
    return wrong;
}

}  // namespace

int main(int count, char** arguments) {
    void* library = count > 1 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
    if (!library) {
        fprintf(stderr, "no library: %s\n", count > 1 ? dlerror() : "none was named");
        return 1;
    }
    const int bits = reinterpret_cast<int (*)()>(found(library, "product_levels"))();
    printf("%d\n", bits);
    int status = 0;
    for (int i = 2; i < count; ++i) {
        if (!(bits >> (i - 2) & 1)) continue;
        const std::string name = std::string("products_") + arguments[i];
        Products* products = reinterpret_cast<Products*>(found(library, name));
        for (const Case& each : kCases)
            for (int values = 0; values < kValues; ++values) {
                const int64_t wrong = wrong_products(products, each, Values(values), 1 + values % 2);
                if (!wrong) continue;
                fprintf(stderr, "%s, case %d, values %d: %d results differ\n", name.c_str(),
                        int(&each - kCases), values, int(wrong));
                status = 1;
            }
    }
    EncodeFlat* encode = reinterpret_cast<EncodeFlat*>(found(library, "encode_flat_base"));
    for (int kind : {kNone, kSilu, kGelu, kGeluTanh})
        if (const int64_t wrong = wrong_codes(encode, kind)) {
            fprintf(stderr, "activation %d: %d codes differ\n", kind, int(wrong));
            status = 1;
        }
    return status;
}
