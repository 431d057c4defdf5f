// Structures that Python passes to the kernels. Every field is 8 bytes wide, so that `struct.pack`
// makes them; native/structures.py repeats the definitions, and the loader compares the two
// (`layout` in level.cpp). Strides count values, not bytes.
#pragma once

#include <cstdint>

struct Image {  // [B, channels, H, W] of float32, or of bfloat16 where bf16 is 1
    const void* data;
    int64_t bf16;
    int64_t channels;
    int64_t stride_b, stride_c, stride_h, stride_w;
};

struct Shape {
    int64_t batch, channels, height, width;
};

struct Grid {
    const float* scale;         // [rows]
    const uint8_t* zero_point;  // [rows]
    const int64_t* row;         // [1], or null for row 0
    int64_t rows;
    int64_t largest;
    const float* factors;  // [channels], of values before they are rounded; or null
};

struct Output {  // [B, channels, H + 2 pad_h, W + 2 pad_w], channels last
    uint8_t* codes;
    int64_t start, channels;
    int64_t pad_h, pad_w;
    Grid grid;
};

struct Rows {  // [batch, count, channels], contiguous
    const void* data;
    int64_t bf16;
    int64_t batch, count, channels;
};

struct Codes {  // of an image between its border, channels last; strides count bytes
    const uint8_t* codes;
    int64_t batch, height, width, channels;  // height and width of the result
    int64_t stride_b, stride_h, stride_w;    // between the first taps of the result's pixels
    int64_t taps_h, taps_w, tap_h, tap_w;    // the kernel's size, and strides between its taps
};

struct Weight {
    const int8_t* tiles;  // see tiles.h; columns and the last chunk are filled up with zeros
    int64_t four_bits;    // 1: the tiles are as weights.h says
    int64_t out_channels;
    const float* scale;      // [out_channels]
    const int32_t* sums;     // [out_channels]
    const float* bias;       // [out_channels], or null
    const float* step_bias;  // [rows of the grid, out_channels], or null
};

struct Result {  // [batch, height, width, out_channels] of float32, or of bfloat16 where bf16 is 1
    void* data;
    int64_t bf16;
    const void* added;  // as `data`, or null
    int64_t added_bf16;
    const float* gate;  // [batch, out_channels], a factor of all but what is added; or null
    int64_t gate_stride;
};

struct Encoded {  // codes in the place of a result, [batch, height, width, columns]
    uint8_t* codes;
    int64_t activation;
    int64_t gated;  // 1: the first half of the columns times the activation of the second
    Grid grid;
};

struct Attention {  // of bfloat16 [batch, queries or keys, heads * head_dim], strides between rows
    const void *q, *k, *v;
    int64_t query_stride, key_stride, value_stride;
    int64_t batch, heads, head_dim, queries, keys;
    uint8_t* codes;  // [batch, queries, heads * head_dim]
    Grid grid;
};

// Results of the functions. kNotFinite: all is computed, but a float that was to become a code was
// NaN or infinite, or its sum or square was.
enum Status : int32_t { kDone = 0, kRowOutside = 1, kNoMemory = 2, kNotFinite = 3 };

// Activations, as in structures.ACTIVATIONS.
enum Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3 };
