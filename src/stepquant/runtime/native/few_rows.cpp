// A linear layer of a few rows, such as a time embedding: a matrix kernel's set-up takes longer.
#include <omp.h>

#include "elementwise.h"

namespace {

const int64_t kOutChunk = 32;  // out-channels that a thread takes at a time

int32_t dot(const int16_t* x, const int8_t* w, int64_t count) {
    int32_t total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < count; ++k) total += int32_t(x[k]) * int32_t(w[k]);
    return total;
}

}  // namespace

// See fused.linear_of_few_rows. `y` is [batch * count, out_channels].
EXPORT int32_t NAME(linear_of_few_rows)(const Rows* x, int32_t kind, const Grid* grid,
                                        const int8_t* weight, const float* weight_scale,
                                        const float* bias, int64_t out_channels, float* y,
                                        int32_t threads) {
    const int64_t rows = x->batch * x->count, channels = x->channels;
    Levels levels;
    if (!levels_of(*grid, &levels)) return kRowOutside;
    const float scale = grid->scale[grid->row ? *grid->row : 0];
    uint8_t* codes = static_cast<uint8_t*>(malloc(rows * channels * 3));
    if (!codes) return kNoMemory;
    int16_t* differences = reinterpret_cast<int16_t*>(codes);
    codes += 2 * rows * channels;
    encode_values(x->data, x->bf16, 0, rows * channels, kind, levels, codes);
    const int16_t zero = int16_t(levels.zero);
    for (int64_t i = 0; i < rows * channels; ++i) differences[i] = int16_t(codes[i] - zero);
    threads = threads_for(rows * channels * out_channels / 64, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < out_channels; start += kOutChunk) {
        const int64_t stop = start + kOutChunk < out_channels ? start + kOutChunk : out_channels;
        for (int64_t o = start; o < stop; ++o)
            for (int64_t r = 0; r < rows; ++r) {
                const int32_t total =
                    dot(differences + r * channels, weight + o * channels, channels);
                y[r * out_channels + o] = float(total) * (scale * weight_scale[o]) + bias[o];
            }
    }
    free(differences);
    return kDone;
}
