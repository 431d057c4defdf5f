// Attention in bfloat16 on AMX: softmax(Q K^T * scale) V, rounded to the next layer's codes.
//
// Keys and values are laid out for the tiles once. Then blocks of queries pass over blocks of keys,
// with the largest score so far and the sum of exponentials for each query.
#include "elementwise.h"
#include "threads.h"
#include "tiles.h"

namespace {

const int64_t kQueries = 32;  // of a block: two tiles
const int64_t kKeys = 256;    // of a block
const int64_t kDeep = 32;     // bfloat16 values in a tile's row
const int64_t kTile = 16;
const float kSlack = 8.0f;
const float kLowest = -1e30f;  // below any score, but -kLowest is a number
const float kLog2E = 1.44269504088896341f;

int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of 16 places.
INLINE __mmask16 mask_of(int64_t count) {
    return count >= kTile ? 0xffff : (count > 0 ? __mmask16((1u << count) - 1) : __mmask16(0));
}

struct Plan {
    const Attention* x;
    int64_t deep, wide;        // head_dim filled up to whole tiles of keys, and of values
    int64_t keys;              // filled up to 32
    int64_t key_bytes, value_bytes;  // of a head
    char* laid_out;            // [batch * heads][keys, then values]
    float scale;               // of scores, times log2(e)
    const Levels* levels;
};

struct Block {  // of a thread
    uint16_t* queries;   // [kQueries, deep]
    float* scores;       // [kQueries, kKeys]
    uint16_t* weights;   // [kQueries, kKeys], bfloat16
    float* sums;         // [kQueries, wide]
    float* total;        // [kQueries, 16]: of the exponentials, in 16 parts
    float shift[kQueries];
};

// Tiles of 16 keys: [deep / 32][16 pairs of dimensions][16 keys][2].
void lay_out_keys(const Plan& plan, const uint16_t* keys, int64_t first, uint16_t* tiles) {
    const Attention& x = *plan.x;
    const int64_t left = x.keys - first, stride = x.key_stride / 2;
    const __mmask16 mask = mask_of(left);
    const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i places = _mm512_mullo_epi32(numbers, _mm512_set1_epi32(int(stride)));
    const int32_t* pairs = reinterpret_cast<const int32_t*>(keys + first * x.key_stride);
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t d = 0; d < plan.deep / 2; ++d) {
        const __m512i pair = d < x.head_dim / 2
                                 ? _mm512_mask_i32gather_epi32(zero, mask, places, pairs + d, 4)
                                 : zero;
        _mm512_storeu_si512(tiles + d * kDeep, pair);
    }
}

INLINE __m512i dimensions(const uint16_t* value, __mmask16 mask) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, value));
}

// Tiles of 32 values: [wide / 16][16 pairs of values][16 dimensions][2].
void lay_out_values(const Plan& plan, const uint16_t* values, int64_t first, uint16_t* tiles) {
    const Attention& x = *plan.x;
    for (int64_t d = 0; d < plan.wide; d += kTile, tiles += kTile * kDeep) {
        const __mmask16 mask = mask_of(x.head_dim - d);
        for (int64_t pair = 0; pair < kTile; ++pair) {
            const int64_t n = first + 2 * pair;
            const uint16_t* value = values + n * x.value_stride + d;
            const __m512i even = dimensions(value, n < x.keys ? mask : 0);
            const __m512i odd = dimensions(value + x.value_stride, n + 1 < x.keys ? mask : 0);
            const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
            _mm512_storeu_si512(tiles + pair * kDeep, both);
        }
    }
}

void lay_out(const Plan& plan, int64_t head, int64_t first) {  // of 32 keys and values
    const Attention& x = *plan.x;
    const int64_t b = head / x.heads, column = head % x.heads * x.head_dim;
    char* own = plan.laid_out + head * (plan.key_bytes + plan.value_bytes);
    const uint16_t* keys = static_cast<const uint16_t*>(x.k) + b * x.keys * x.key_stride + column;
    const uint16_t* values =
        static_cast<const uint16_t*>(x.v) + b * x.keys * x.value_stride + column;
    uint16_t* key_tiles = reinterpret_cast<uint16_t*>(own);
    uint16_t* value_tiles = reinterpret_cast<uint16_t*>(own + plan.key_bytes);
    for (int64_t n = first; n < first + kDeep; n += kTile)
        lay_out_keys(plan, keys, n, key_tiles + n * plan.deep);
    lay_out_values(plan, values, first, value_tiles + first * plan.wide);
}

// Scores of the block's queries with `count` keys, a multiple of 32.
void score(const Plan& plan, const Block& block, const char* keys, int64_t count) {
    const int64_t steps = plan.deep / kDeep, key_tile = steps * kTileBytes;
    const int64_t stride = plan.deep * 2, row = kKeys * 4;
    const char* queries = reinterpret_cast<const char*>(block.queries);
    for (int64_t n = 0; n < count; n += 2 * kTile) {
        const char* b = keys + n / kTile * key_tile;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < steps; ++k) {
            _tile_loadd(4, queries + k * 64, stride);
            _tile_loadd(5, queries + k * 64 + kTile * stride, stride);
            _tile_loadd(6, b + k * kTileBytes, 64);
            _tile_loadd(7, b + k * kTileBytes + key_tile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float* to = block.scores + n;
        _tile_stored(0, to, row);
        _tile_stored(1, to + kTile, row);
        _tile_stored(2, to + kTile * kKeys, row);
        _tile_stored(3, to + kTile * kKeys + kTile, row);
    }
}

// 2^x for x below 128, to 1e-4 of it: the result is rounded to bfloat16.
INLINE __m512 exp2_of(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0558011f), f, _mm512_set1_ps(0.2402284f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931448f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Brings what was summed of a row to another shift of its exponents.
void move(const Plan& plan, const Block& block, int64_t row, float shift) {
    const __m512 factor = _mm512_set1_ps(exp2f(block.shift[row] - shift));
    float *total = block.total + row * kTile, *sums = block.sums + row * plan.wide;
    _mm512_storeu_ps(total, _mm512_mul_ps(_mm512_loadu_ps(total), factor));
    for (int64_t d = 0; d < plan.wide; d += kTile)
        _mm512_storeu_ps(sums + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), factor));
}

// Exponentials of a row's scores with `real` keys. The shift is the largest score so far or up to
// kSlack below it: float32 holds sums of exponentials up to 2^kSlack as precisely.
void weigh(const Plan& plan, Block& block, int64_t row, int64_t count, int64_t real) {
    float* scores = block.scores + row * kKeys;
    uint16_t* weights = block.weights + row * kKeys;
    for (int64_t n = real; n < count; ++n) scores[n] = kLowest;  // no keys, but filled up
    __m512 most = _mm512_loadu_ps(scores);
    for (int64_t n = kTile; n < count; n += kTile)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + n));
    const __m512 scale = _mm512_set1_ps(plan.scale);
    const __m512 bound = _mm512_set1_ps(block.shift[row] + kSlack);
    if (_mm512_cmp_ps_mask(_mm512_mul_ps(most, scale), bound, _CMP_GT_OQ)) {
        const float shift = _mm512_reduce_max_ps(most) * plan.scale;
        move(plan, block, row, shift);
        block.shift[row] = shift;
    }
    const __m512 shift = _mm512_set1_ps(-block.shift[row]);
    __m512 total = _mm512_loadu_ps(block.total + row * kTile);
    for (int64_t n = 0; n < count; n += 2 * kTile) {
        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(scores + n), scale, shift);
        const __m512 z = _mm512_fmadd_ps(_mm512_loadu_ps(scores + n + kTile), scale, shift);
        const __m512 y = exp2_of(x), w = exp2_of(z);
        total = _mm512_add_ps(total, _mm512_add_ps(y, w));
        _mm512_storeu_si512(weights + n, (__m512i)_mm512_cvtne2ps_pbh(w, y));
    }
    _mm512_storeu_ps(block.total + row * kTile, total);
}

// Adds the weighted values; `count` keys, a multiple of 32.
template <bool two>
void add_values(const Plan& plan, const Block& block, const char* values, int64_t count,
                int64_t d) {
    const int64_t row = plan.wide * 4, stride = kKeys * 2;
    const char* weights = reinterpret_cast<const char*>(block.weights);
    float *upper = block.sums + d, *lower = upper + kTile * plan.wide;
    _tile_loadd(0, upper, row);
    _tile_loadd(2, lower, row);
    if (two) {
        _tile_loadd(1, upper + kTile, row);
        _tile_loadd(3, lower + kTile, row);
    }
    for (int64_t n = 0; n < count; n += kDeep) {
        const char* b = values + n * plan.wide * 2 + d / kTile * kTileBytes;
        _tile_loadd(4, weights + n * 2, stride);
        _tile_loadd(5, weights + n * 2 + kTile * stride, stride);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (two) {
            _tile_loadd(7, b + kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, upper, row);
    _tile_stored(2, lower, row);
    if (two) {
        _tile_stored(1, upper + kTile, row);
        _tile_stored(3, lower + kTile, row);
    }
}

void attend(const Plan& plan, Block& block, int64_t head, int64_t first) {
    const Attention& x = *plan.x;
    const int64_t b = head / x.heads, column = head % x.heads * x.head_dim;
    const int64_t rows = least(kQueries, x.queries - first);
    const char* keys = plan.laid_out + head * (plan.key_bytes + plan.value_bytes);
    const char* values = keys + plan.key_bytes;
    const uint16_t* queries =
        static_cast<const uint16_t*>(x.q) + (b * x.queries + first) * x.query_stride + column;
    memset(block.queries, 0, kQueries * plan.deep * 2);
    for (int64_t r = 0; r < rows; ++r)
        memcpy(block.queries + r * plan.deep, queries + r * x.query_stride, x.head_dim * 2);
    memset(block.sums, 0, kQueries * plan.wide * 4);
    memset(block.total, 0, kQueries * kTile * 4);
    for (int64_t r = 0; r < kQueries; ++r) block.shift[r] = kLowest;
    for (int64_t n = 0; n < plan.keys; n += kKeys) {
        const int64_t count = least(kKeys, plan.keys - n);
        score(plan, block, keys + n * plan.deep * 2, count);
        for (int64_t r = 0; r < rows; ++r) weigh(plan, block, r, count, least(count, x.keys - n));
        const char* own = values + n * plan.wide * 2;
        int64_t d = 0;
        for (; d + kTile < plan.wide; d += 2 * kTile) add_values<true>(plan, block, own, count, d);
        if (d < plan.wide) add_values<false>(plan, block, own, count, d);
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* y = block.sums + r * plan.wide;
        const float inverse = 1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(block.total + r * kTile));
#pragma omp simd
        for (int64_t d = 0; d < x.head_dim; ++d) y[d] *= inverse;
        uint8_t* codes = x.codes + ((b * x.queries + first + r) * x.heads) * x.head_dim + column;
        encode_floats(y, x.head_dim, *plan.levels, codes, column);
    }
}

}  // namespace

// See native/attention.py.
EXPORT int32_t NAME(attention)(const Attention* x, float scale, int32_t threads) {
    Levels levels;
    if (!levels_of(x->grid, &levels)) return kRowOutside;
    Plan plan = {x};
    plan.deep = up(x->head_dim, kDeep);
    plan.wide = up(x->head_dim, kTile);
    plan.keys = up(x->keys, kDeep);
    plan.key_bytes = plan.keys * plan.deep * 2;
    plan.value_bytes = plan.keys * plan.wide * 2;
    plan.scale = scale * kLog2E;
    plan.levels = &levels;
    const int64_t heads = x->batch * x->heads, blocks = up(x->queries, kQueries) / kQueries;
    const int64_t groups = plan.keys / kDeep;
    const int64_t own = kQueries * (plan.deep * 2 + kKeys * 6 + plan.wide * 4 + kTile * 4);
    const int64_t shared = heads * (plan.key_bytes + plan.value_bytes);
    char* memory = static_cast<char*>(malloc(64 + shared + threads * own));
    if (!memory) return kNoMemory;
    plan.laid_out = memory + 64 - reinterpret_cast<uintptr_t>(memory) % 64;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char* at = plan.laid_out + shared + omp_get_thread_num() * own;
        Block block;
        block.scores = reinterpret_cast<float*>(at);
        block.sums = block.scores + kQueries * kKeys;
        block.total = block.sums + kQueries * plan.wide;
        block.weights = reinterpret_cast<uint16_t*>(block.total + kQueries * kTile);
        block.queries = block.weights + kQueries * kKeys;
        // Rows of no query, which are never read, are numbers all the same.
        memset(block.weights, 0, kQueries * kKeys * 2);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * groups; ++i)
            lay_out(plan, i / groups, i % groups * kDeep);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * blocks; ++i)
            attend(plan, block, i / blocks, i % blocks * kQueries);
        end_tiles();
    }
    free(memory);
    return kDone;
}
