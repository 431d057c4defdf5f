// Kernels that make codes of rows of channels (transformers), and the arguments of a layer's call.
#include "elementwise.h"
#include "threads.h"

namespace {

struct LayerNorm {
    Rows x;
    const float* weight;
    const float* bias;
    double eps;
    const float* scale;
    int64_t scale_stride;
    const float* shift;
    int64_t shift_stride;
    float* factors;  // [batch, 2, C]: y = factor * normed + offset
};

// Whether scale and shift of sample `b` are finite.
bool set_factors(const LayerNorm& norm, int64_t b) {
    const int64_t channels = norm.x.channels;
    float *factor = norm.factors + 2 * b * channels, *offset = factor + channels;
    const float* scale = norm.scale ? norm.scale + b * norm.scale_stride : nullptr;
    const float* shift = norm.shift ? norm.shift + b * norm.shift_stride : nullptr;
    const float *weight = norm.weight, *bias = norm.bias;
    int32_t largest = 0;
    for (int64_t c = 0; c < channels; ++c) {
        const float f = scale ? 1.0f + scale[c] : 1.0f;
        factor[c] = weight ? weight[c] * f : f;
        offset[c] = madd(bias ? bias[c] : 0.0f, f, shift ? shift[c] : 0.0f);
        largest = larger(larger(largest, size_of(factor[c])), size_of(offset[c]));
    }
    return largest < kNotFiniteSize;
}

// Row `r`, normed and modulated, into `y`; whether it is finite.
template <typename T>
bool norm_row(const LayerNorm& norm, int64_t r, float* y) {
    const int64_t channels = norm.x.channels;
    const T* x = static_cast<const T*>(norm.x.data) + r * channels;
    const float* factor = norm.factors + 2 * (r / norm.x.count) * channels;
    const float* offset = factor + channels;
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < channels; ++c) sum += load(x, c);
    const float mean = sum / float(channels);
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < channels; ++c) {
        const float d = load(x, c) - mean;
        square = madd(d, d, square);
    }
    const float inverse = float(1.0 / std::sqrt(double(square) / double(channels) + norm.eps));
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
        y[c] = madd((load(x, c) - mean) * inverse, factor[c], offset[c]);
    return is_finite(square);
}

// A row's first half times its activated second half. Whether the gates and products are finite.
template <int kind, typename T>
bool gate_row(const T* x, int64_t channels, const Levels& levels, uint8_t* codes) {
    float y[kSpan];
    int32_t largest = 0;
    for (int64_t start = 0; start < channels; start += kSpan) {
        const int64_t n = channels - start < kSpan ? channels - start : kSpan;
        const T *values = x + start, *gates = values + channels;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < n; ++i) {
            const float gate = load(gates, i);
            y[i] = load(values, i) * activate<kind>(gate);
            largest = larger(larger(largest, size_of(gate)), size_of(y[i]));
        }
        encode_floats(y, n, levels, codes + start, start);
    }
    return largest < kNotFiniteSize;
}

template <typename T>
bool gate_row(const T* x, int64_t channels, int kind, const Levels& levels, uint8_t* codes) {
    switch (kind) {
        case kSilu: return gate_row<kSilu>(x, channels, levels, codes);
        case kGelu: return gate_row<kGelu>(x, channels, levels, codes);
        case kGeluTanh: return gate_row<kGeluTanh>(x, channels, levels, codes);
        default: return gate_row<kNone>(x, channels, levels, codes);
    }
}

}  // namespace

// See fused.layer_norm_encode. `codes` has the address of each result, [batch, count, channels].
EXPORT int32_t NAME(layer_norm_encode)(const Rows* x, const float* weight, const float* bias,
                                       double eps, const float* scale, int64_t scale_stride,
                                       const float* shift, int64_t shift_stride, const Grid* grids,
                                       uint8_t* const* codes, int64_t grid_count, int32_t threads) {
    const int64_t rows = x->batch * x->count, channels = x->channels;
    threads = threads_for(rows * channels, threads);
    const int64_t floats = (2 * x->batch + threads) * channels;
    char* memory =
        static_cast<char*>(malloc(sizeof(Levels) * grid_count + sizeof(float) * floats));
    if (!memory) return kNoMemory;
    Levels* levels = reinterpret_cast<Levels*>(memory);
    float* factors = reinterpret_cast<float*>(levels + grid_count);
    float* scratch = factors + 2 * x->batch * channels;
    int32_t status = kDone;
    for (int64_t g = 0; g < grid_count; ++g)
        if (!levels_of(grids[g], levels + g)) status = kRowOutside;
    const LayerNorm norm = {*x,    weight,       bias,    eps, scale, scale_stride,
                            shift, shift_stride, factors};
    if (status == kDone) {
        bool finite = true;
        for (int64_t b = 0; b < x->batch; ++b) finite &= set_factors(norm, b);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
        for (int64_t r = 0; r < rows; ++r) {
            float* y = scratch + omp_get_thread_num() * channels;
            finite = (x->bf16 ? norm_row<uint16_t>(norm, r, y) : norm_row<float>(norm, r, y)) &&
                     finite;
            for (int64_t g = 0; g < grid_count; ++g)
                encode_floats(y, channels, levels[g], codes[g] + r * channels);
        }
        if (!finite) status = kNotFinite;
    }
    free(memory);
    return status;
}

// See fused.gated_encode. A row of `x` has 2 * channels values, one of `codes` has channels.
EXPORT int32_t NAME(gated_encode)(const Rows* x, int32_t kind, const Grid* grid, uint8_t* codes,
                                  int32_t threads) {
    const int64_t rows = x->batch * x->count, channels = x->channels;
    Levels levels;
    if (!levels_of(*grid, &levels)) return kRowOutside;
    threads = threads_for(rows * channels, threads);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t from = 2 * r * channels;
        uint8_t* to = codes + r * channels;
        const auto *h = static_cast<const uint16_t*>(x->data) + from;
        const auto *f = static_cast<const float*>(x->data) + from;
        finite = (x->bf16 ? gate_row(h, channels, kind, levels, to)
                          : gate_row(f, channels, kind, levels, to)) &&
                 finite;
    }
    return finite ? kDone : kNotFinite;
}

// See fused.encode, for anything but images: `count` values, `channels` in a row.
EXPORT int32_t NAME(encode_flat)(const void* x, int32_t bf16, int64_t count, int64_t channels,
                                 int32_t kind, const Grid* grid, uint8_t* codes,
                                 int32_t threads) {
    Levels levels;
    if (!levels_of(*grid, &levels)) return kRowOutside;
    threads = threads_for(count, threads);
    const int64_t chunk = levels.factors ? channels : 4096;
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
    for (int64_t start = 0; start < count; start += chunk) {
        const int64_t n = count - start < chunk ? count - start : chunk;
        finite = encode_values(x, bf16, start, n, kind, levels, codes + start) && finite;
    }
    return finite ? kDone : kNotFinite;
}

// See fused.epilogue. `y` is [channels + 1]: the bias, then the scale. `sums` is null where the
// zero point's share is not wanted.
EXPORT int32_t NAME(epilogue)(const Grid* grid, const float* sums, const float* bias,
                              const float* step_bias, int64_t channels, float* y) {
    const int64_t row = grid->row ? *grid->row : 0;
    if (row < 0 || row >= grid->rows) return kRowOutside;
    const float scale = grid->scale[row], share = scale * float(grid->zero_point[row]);
    const float* step = step_bias ? step_bias + row * channels : nullptr;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        const float of_bias = bias ? bias[c] : 0.0f;
        const float sum = step ? of_bias + step[c] : of_bias;
        y[c] = sums ? sum - share * sums[c] : sum;
    }
    y[channels] = scale;
    return kDone;
}
