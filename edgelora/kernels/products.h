// Products whose part of the result stays in registers while what is summed over passes.
//
// Their factors are words of 32 bits: a float32, or, where `narrow` says so, a pair of bfloat16 numbers that are
// neighbours along what is summed over. Sums are float32.

#include "vectors.h"

#if defined(__AVX512BF16__)
#define PAIRS 1  // there is an instruction for them; taking them apart would be slower than floats are
#else
#define PAIRS 0
#endif

// Words of two rows of bfloat16 numbers, the first in their lower halves; `second` 0: zeros.
INLINE uvec both(const uint16_t *first, const uint16_t *second) {
    uvec high = second ? __builtin_convertvector(*(const hvec *)second, uvec) << 16 : (uvec){0};
    return high | __builtin_convertvector(*(const hvec *)first, uvec);
}

#define AHEAD 32  // words

typedef struct {
    const void *at;
    int64_t row, column;  // strides, in words
} Left;

INLINE Left rows_of(const void *a, int64_t lda) { return (Left){a, lda, 1}; }
INLINE Left columns_of(const void *a, int64_t lda) { return (Left){a, 1, lda}; }

// sums + left right, of a word that all lanes of `left` hold.
INLINE vec summed(const int narrow, vec sums, uint32_t left, uvec right) {
    uvec word = left - (uvec){0};
    if (!narrow) return sums + (vec)word * (vec)right;
#if PAIRS
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)word, (__m512bh)right);
#endif
    return sums;  // never: nothing is narrow without PAIRS
}

// c (height, width vectors) = a (height, k) b (k, width vectors), after what stood there if `add`.
INLINE void block(const int narrow, const int add, const int height, const int width, Left a, const void *b,
                  int64_t ldb, float *c, int64_t ldc, int64_t k) {
    vec sums[12][WIDE];
    const uint32_t *left = a.at, *right = b;
#pragma GCC unroll 12
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) sums[i][j] = all(0);
    for (int64_t p = 0, stop; p < k; p = stop) {
        stop = p + 16 < k ? p + 16 : k;
        if (a.column == 1)  // rows that lie far apart, of which a line each is needed at once
#pragma GCC unroll 12
            for (int i = 0; i < height; i++) __builtin_prefetch(left + i * a.row + p + AHEAD);
        for (int64_t at = p; at < stop; at++) {
            uvec passing[WIDE];
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) passing[j] = *(const uvec *)(right + at * ldb + j * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < height; i++)
#pragma GCC unroll 4
                for (int j = 0; j < width; j++)
                    sums[i][j] = summed(narrow, sums[i][j], left[i * a.row + at * a.column], passing[j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            float *to = c + i * ldc + j * LANES;
            vec sum = sums[i][j];
            if (add) sum += load(to);  // at last: a long sum loses less in parts
            store(to, sum);
        }
}

INLINE Left below(Left a, int64_t rows) { return (Left){(const uint32_t *)a.at + rows * a.row, a.row, a.column}; }

// The same for m rows.
INLINE void strip(const int narrow, const int add, const int width, Left a, const void *b, int64_t ldb, float *c,
                  int64_t ldc, int64_t m, int64_t k) {
    if (width <= 2 && LANES == 16)  // 32 registers: as many sums as hide what one takes
        for (; m >= 12; m -= 12, a = below(a, 12), c += 12 * ldc) block(narrow, add, 12, width, a, b, ldb, c, ldc, k);
    for (; m >= 6; m -= 6, a = below(a, 6), c += 6 * ldc) block(narrow, add, 6, width, a, b, ldb, c, ldc, k);
    if (m >= 4) {
        block(narrow, add, 4, width, a, b, ldb, c, ldc, k);
        m -= 4, a = below(a, 4), c += 4 * ldc;
    }
    if (m >= 2) {
        block(narrow, add, 2, width, a, b, ldb, c, ldc, k);
        m -= 2, a = below(a, 2), c += 2 * ldc;
    }
    if (m) block(narrow, add, 1, width, a, b, ldb, c, ldc, k);
}
