// Sums of products of a block of codes with a block of the weight, in integers.
//
// Both come in chunks of 64 values of a sum. A row of codes is uint8; chunk k of it begins offsets[k]
// bytes after its start. A tile of the weight has 16 columns, int8 [chunks][16][16 columns][4]: four
// values of the sum side by side, a group. `sums` is int32 [32 rows][32 columns].
//
// Each instruction set has a file with
//     begin_tiles, end_tiles    around all of a thread's products
//     add_products              of some rows with one or two tiles; adds to `sums` unless `first`
//     inspect                   what add_products has to know of a tile's values
// and says in kInspected whether it needs the last, and in kShift how much less than the codes the
// numbers are that it multiplies.
#pragma once

#include <cstdint>
#include <cstring>

#include "elementwise.h"

namespace {

const int64_t kTileRows = 16, kTileColumns = 16, kChunk = 64, kGroup = 4;
const int64_t kGroups = kChunk / kGroup;
const int64_t kBlockRows = 2 * kTileRows, kBlockColumns = 2 * kTileColumns;
const int64_t kTileBytes = kTileColumns * kChunk;
const int64_t kSumBytes = kBlockColumns * sizeof(int32_t);  // of a row

struct CodeRows {
    const uint8_t* first;
    int64_t count, stride;  // at most kBlockRows; bytes between rows
    const int64_t* offsets;
    int64_t chunks;
};

struct ColumnTile {
    const int8_t* values;
    int64_t together;  // what `inspect` returned
};

template <int R>
struct Count {  // a number that the compiler knows
    constexpr operator int() const { return R; }
};

// Calls `add(first row, Count)` for N rows at a time, then once for those that are left.
template <int N, typename Add>
INLINE void in_blocks(int64_t rows, const Add& add, int64_t done = 0) {
    for (; done + N <= rows; done += N) add(done, Count<N>());
    if constexpr (N > 1) in_blocks<N - 1>(rows, add, done);
}

}  // namespace

#if defined(__AMX_INT8__)
#include "tiles_amx.h"
#elif defined(__AVX512VNNI__)
#include "tiles_avx512.h"
#elif defined(__AVXVNNI__)
#include "tiles_avx_vnni.h"
#elif defined(__AVX2__)
#include "tiles_avx2.h"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "tiles_i8mm.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "tiles_dotprod.h"
#elif defined(__ARM_NEON)
#include "tiles_neon.h"
#endif
