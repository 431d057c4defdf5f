// Kernels that make codes of images: group norm with what surrounds it, and plain encoding.
#include "elementwise.h"
#include "threads.h"

namespace {

const int64_t kBlockPixels = 64;

// The rows above and below row `h` of image `b` that are border, and its own two ends.
void fill_border(const Output& out, const Levels& levels, const Shape& shape, int64_t b,
                 int64_t h) {
    if (!out.pad_h && !out.pad_w) return;
    const int64_t pixels = shape.width + 2 * out.pad_w, row = pixels * out.channels;
    uint8_t* image = out.codes + b * (shape.height + 2 * out.pad_h) * row;
    uint8_t* own = image + (h + out.pad_h) * row;
    const int zero = int(levels.zero);
    memset(own, zero, out.pad_w * out.channels);
    memset(own + (shape.width + out.pad_w) * out.channels, zero, out.pad_w * out.channels);
    if (h == 0) memset(image, zero, out.pad_h * row);
    if (h == shape.height - 1) memset(own + row, zero, out.pad_h * row);
}

uint8_t* inner_row(const Output& out, const Shape& shape, int64_t b, int64_t h) {
    const int64_t pixels = shape.width + 2 * out.pad_w;
    const int64_t row = b * (shape.height + 2 * out.pad_h) + h + out.pad_h;
    return out.codes + (row * pixels + out.pad_w) * out.channels;
}

struct GroupNorm {
    Shape shape;
    const Image* parts;
    int64_t part_count;
    const float* added;
    const float* weight;
    const float* bias;
    int64_t groups;
    double eps;
    const Output* outputs;
    const Levels* levels;
    int64_t output_count;
    int64_t block_rows, blocks;
    double* moments;  // [B, blocks, groups, 2]: sum and sum of squares
    float* factors;   // [B, 2, C]: y = factor * x + offset
};

// Sums of `d = x - shift` and of `d * d` for each channel. With a shift that is close to the mean
// float32 suffices for them.
template <typename T>
void add_sums(const T* x, const Image& part, int64_t rows, int64_t width, float* shift, float* sum,
              float* square) {
    const int64_t channels = part.channels, step = part.stride_w;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
        shift[c] = load(x, c);
        sum[c] = square[c] = 0.0f;
    }
    for (int64_t h = 0; h < rows; ++h) {
        const T* at = x + h * part.stride_h;
        int64_t w = 0;
        for (; w + 4 <= width; w += 4, at += 4 * step) {
            const T *x1 = at + step, *x2 = at + 2 * step, *x3 = at + 3 * step;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) {
                const float k = shift[c];
                const float d0 = load(at, c) - k, d1 = load(x1, c) - k;
                const float d2 = load(x2, c) - k, d3 = load(x3, c) - k;
                sum[c] += (d0 + d1) + (d2 + d3);
                square[c] += madd(d0, d0, d1 * d1) + madd(d2, d2, d3 * d3);
            }
        }
        for (; w < width; ++w, at += step) {
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) {
                const float d = load(at, c) - shift[c];
                sum[c] += d;
                square[c] = madd(d, d, square[c]);
            }
        }
    }
}

template <typename T>
const T* pixel_row(const Image& part, int64_t b, int64_t h) {
    return static_cast<const T*>(part.data) + b * part.stride_b + h * part.stride_h;
}

// Moments of a block of rows for each group. `added` is the same in all pixels: it moves the shift.
void measure(const GroupNorm& norm, int64_t b, int64_t block, float* scratch) {
    const int64_t channels = norm.shape.channels;
    float *shift = scratch, *sum = shift + channels, *square = sum + channels;
    const int64_t start = block * norm.block_rows, left = norm.shape.height - start;
    const int64_t rows = left < norm.block_rows ? left : norm.block_rows;
    for (int64_t p = 0, c = 0; p < norm.part_count; c += norm.parts[p++].channels) {
        const Image& part = norm.parts[p];
        if (part.bf16)
            add_sums(pixel_row<uint16_t>(part, b, start), part, rows, norm.shape.width, shift + c,
                     sum + c, square + c);
        else
            add_sums(pixel_row<float>(part, b, start), part, rows, norm.shape.width, shift + c,
                     sum + c, square + c);
    }
    const double pixels = double(rows * norm.shape.width);
    const int64_t size = channels / norm.groups;
    double* moments = norm.moments + (b * norm.blocks + block) * norm.groups * 2;
    for (int64_t g = 0, c = 0; g < norm.groups; ++g) {
        double total = 0.0, squares = 0.0;
        for (; c < (g + 1) * size; ++c) {
            const double s = double(shift[c]) + (norm.added ? norm.added[b * channels + c] : 0.0f);
            total += pixels * s + sum[c];
            squares += square[c] + s * (2.0 * sum[c] + pixels * s);
        }
        moments[2 * g] = total;
        moments[2 * g + 1] = squares;
    }
}

// Whether the group's values are finite.
bool set_factors(const GroupNorm& norm, int64_t b, int64_t g) {
    const int64_t channels = norm.shape.channels, size = channels / norm.groups;
    double total = 0.0, squares = 0.0;
    for (int64_t block = 0; block < norm.blocks; ++block) {
        const double* moments = norm.moments + ((b * norm.blocks + block) * norm.groups + g) * 2;
        total += moments[0];
        squares += moments[1];
    }
    const double count = double(size * norm.shape.height * norm.shape.width);
    const double mean = total / count, variance = squares / count - mean * mean;
    const double inverse = 1.0 / std::sqrt((variance > 0.0 ? variance : 0.0) + norm.eps);
    float *factor = norm.factors + 2 * b * channels, *offset = factor + channels;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        const double f = norm.weight ? inverse * norm.weight[c] : inverse;
        const double a = norm.added ? norm.added[b * channels + c] : 0.0;
        factor[c] = float(f);
        offset[c] = float((norm.bias ? norm.bias[c] : 0.0) + (a - mean) * f);
    }
    return is_finite(squares);
}

template <int kind, typename T>
INLINE void apply(const T* x, int64_t channels, const float* factor, const float* offset,
                  float* y) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
        y[c] = activate<kind>(madd(load(x, c), factor[c], offset[c]));
}

template <int kind>
void encode_row(const GroupNorm& norm, int64_t b, int64_t h, float* y) {
    const int64_t channels = norm.shape.channels;
    const float *factor = norm.factors + 2 * b * channels, *offset = factor + channels;
    for (int64_t o = 0; o < norm.output_count; ++o)
        fill_border(norm.outputs[o], norm.levels[o], norm.shape, b, h);
    for (int64_t w = 0; w < norm.shape.width; ++w) {
        for (int64_t p = 0, c = 0; p < norm.part_count; c += norm.parts[p++].channels) {
            const Image& part = norm.parts[p];
            const int64_t at = w * part.stride_w;
            if (part.bf16)
                apply<kind>(pixel_row<uint16_t>(part, b, h) + at, part.channels, factor + c,
                            offset + c, y + c);
            else
                apply<kind>(pixel_row<float>(part, b, h) + at, part.channels, factor + c,
                            offset + c, y + c);
        }
        for (int64_t o = 0; o < norm.output_count; ++o) {
            const Output& out = norm.outputs[o];
            encode_floats(y + out.start, out.channels, norm.levels[o],
                          inner_row(out, norm.shape, b, h) + w * out.channels);
        }
    }
}

void encode_row(const GroupNorm& norm, int64_t b, int64_t h, int kind, float* y) {
    if (kind == kSilu)
        encode_row<kSilu>(norm, b, h, y);
    else
        encode_row<kNone>(norm, b, h, y);
}

// The same blocks for any number of threads, so that the sums, and the codes, are the same. Whether
// all values are finite.
bool run(const GroupNorm& norm, int kind, int threads, float* scratch) {
    bool finite = true;
    const int64_t batch = norm.shape.batch, height = norm.shape.height;
    // Whole images stay in a core's own cache between the two passes.
    const bool whole = batch % threads == 0 || batch >= 4 * threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : finite)
    {
        float* own = scratch + omp_get_thread_num() * 3 * norm.shape.channels;
        if (whole) {
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < batch; ++b) {
                for (int64_t block = 0; block < norm.blocks; ++block) measure(norm, b, block, own);
                for (int64_t g = 0; g < norm.groups; ++g)
                    finite = set_factors(norm, b, g) && finite;
                for (int64_t h = 0; h < height; ++h) encode_row(norm, b, h, kind, own);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < batch * norm.blocks; ++i)
                measure(norm, i / norm.blocks, i % norm.blocks, own);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < batch * norm.groups; ++i)
                finite = set_factors(norm, i / norm.groups, i % norm.groups) && finite;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < batch * height; ++i)
                encode_row(norm, i / height, i % height, kind, own);
        }
    }
    return finite;
}

// Row `h` of an image whose channels do not lie side by side, encoded channel by channel. Whether
// its values are finite.
bool encode_transposed(const Image& x, const Shape& shape, int64_t b, int64_t h, int kind,
                       const Levels& levels, uint8_t* row) {
    float y[kSpan];
    uint8_t codes[kSpan];
    bool finite = true;
    Levels own = levels;  // what is side by side here is of one channel
    own.factors = nullptr;
    for (int64_t c = 0; c < shape.channels; ++c) {
        const int64_t from = b * x.stride_b + c * x.stride_c + h * x.stride_h;
        for (int64_t start = 0; start < shape.width; start += kSpan) {
            const int64_t left = shape.width - start, n = left < kSpan ? left : kSpan;
            finite &= activate_values(x.data, x.bf16, from + start, n, kind, y);
            if (levels.factors)
                for (int64_t i = 0; i < n; ++i) y[i] *= levels.factors[c];
            encode_floats(y, n, own, codes);
            uint8_t* to = row + start * shape.channels + c;
            for (int64_t i = 0; i < n; ++i) to[i * shape.channels] = codes[i];
        }
    }
    return finite;
}

}  // namespace

// See fused.group_norm_encode. `stride_c` of each part is 1.
EXPORT int32_t NAME(group_norm_encode)(const Shape* shape, const Image* parts, int64_t part_count,
                                       const float* added, int64_t groups, const float* weight,
                                       const float* bias, double eps, int32_t kind,
                                       const Output* outputs, int64_t output_count,
                                       int32_t threads) {
    const int64_t channels = shape->channels, height = shape->height, width = shape->width;
    const int64_t block_rows = width < kBlockPixels ? (kBlockPixels + width - 1) / width : 1;
    const int64_t blocks = (height + block_rows - 1) / block_rows;
    threads = threads_for(shape->batch * height * width * channels, threads);
    const size_t moment_bytes = sizeof(double) * 2 * shape->batch * blocks * groups;
    const size_t factor_bytes = sizeof(float) * 2 * shape->batch * channels;
    const size_t scratch_bytes = sizeof(float) * 3 * threads * channels;
    const size_t level_bytes = sizeof(Levels) * output_count;
    char* memory =
        static_cast<char*>(malloc(moment_bytes + factor_bytes + scratch_bytes + level_bytes));
    if (!memory) return kNoMemory;
    Levels* levels = reinterpret_cast<Levels*>(memory);
    double* moments = reinterpret_cast<double*>(memory + level_bytes);
    float* factors = reinterpret_cast<float*>(memory + level_bytes + moment_bytes);
    float* scratch = reinterpret_cast<float*>(memory + level_bytes + moment_bytes + factor_bytes);
    int32_t status = kDone;
    for (int64_t o = 0; o < output_count; ++o)
        if (!levels_of(outputs[o].grid, levels + o)) status = kRowOutside;
    const GroupNorm norm = {*shape,  parts,  part_count,   added,      weight, bias,    groups,
                            eps,     outputs, levels,      output_count, block_rows, blocks, moments,
                            factors};
    if (status == kDone && !run(norm, kind, threads, scratch)) status = kNotFinite;
    free(memory);
    return status;
}

// See fused.encode, for images. Either `stride_c` or `stride_w` of `x` is 1.
EXPORT int32_t NAME(encode_image)(const Shape* shape, const Image* x, int32_t kind,
                                  const Output* output, int32_t threads) {
    const int64_t height = shape->height, width = shape->width, channels = shape->channels;
    Levels levels;
    if (!levels_of(output->grid, &levels)) return kRowOutside;
    const bool pixels = x->stride_c == 1 || channels == 1;
    const bool dense = pixels && (x->stride_w == channels || width == 1) && !levels.factors;
    threads = threads_for(shape->batch * height * width * channels, threads);
    bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
    for (int64_t i = 0; i < shape->batch * height; ++i) {
        const int64_t b = i / height, h = i % height;
        fill_border(*output, levels, *shape, b, h);
        uint8_t* row = inner_row(*output, *shape, b, h);
        const int64_t from = b * x->stride_b + h * x->stride_h;
        if (!pixels)
            finite = encode_transposed(*x, *shape, b, h, kind, levels, row) && finite;
        else if (dense)
            finite = encode_values(x->data, x->bf16, from, width * channels, kind, levels, row) &&
                     finite;
        else
            for (int64_t w = 0; w < width; ++w)
                finite = encode_values(x->data, x->bf16, from + w * x->stride_w, channels, kind,
                                       levels, row + w * channels) &&
                         finite;
    }
    return finite ? kDone : kNotFinite;
}
