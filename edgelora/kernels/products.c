// The product that torch lacks on a CPU: of bfloat16 matrices, summed and given in float32.
//
// c (m, n) = a (m, k) b (n, k)^T by AVX-512's instruction for pairs of bfloat16 numbers. A panel of b is turned, so that
// the pairs of its rows lie side by side, and all rows of a meet it: as fast as oneDNN's products, which round to
// bfloat16, and twice as fast as its float32 ones.

#include "products.h"

#define PANEL 64   // rows of b
#define TURN 32    // of k: the pairs of so many that registers turn at once
#define DEPTH 640  // of k at a time, so that a panel (80 KiB) stays in the second cache

#if PAIRS

// 16 rows of 16 pairs → their transpose, in rows of PANEL pairs.
INLINE void turn(const uint16_t *from, int64_t ld, uint32_t *to) {
    __m512i one[16], two[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) one[i] = _mm512_loadu_si512(from + i * ld);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(one[i], one[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(one[i], one[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            one[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
            one[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
    // a quarter q of one[4 g + c] now holds the column 4 q + c of the rows from 4 g on
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512i even = _mm512_shuffle_i32x4(one[c], one[4 + c], 0x88), odd = _mm512_shuffle_i32x4(one[c], one[4 + c], 0xdd);
        __m512i evens = _mm512_shuffle_i32x4(one[8 + c], one[12 + c], 0x88);
        __m512i odds = _mm512_shuffle_i32x4(one[8 + c], one[12 + c], 0xdd);
        _mm512_storeu_si512(to + c * PANEL, _mm512_shuffle_i32x4(even, evens, 0x88));
        _mm512_storeu_si512(to + (4 + c) * PANEL, _mm512_shuffle_i32x4(odd, odds, 0x88));
        _mm512_storeu_si512(to + (8 + c) * PANEL, _mm512_shuffle_i32x4(even, evens, 0xdd));
        _mm512_storeu_si512(to + (12 + c) * PANEL, _mm512_shuffle_i32x4(odd, odds, 0xdd));
    }
}

int64_t narrow_panel(void) { return PANEL; }

// Panels [first, last) of the product. k is a multiple of TURN; rows of c lie ldc apart.
void narrow_product(const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t k, int64_t ldc, int64_t first,
                    int64_t last) {
    uint32_t panel[PANEL * DEPTH / 2];
    for (int64_t n = first * PANEL; n < last * PANEL; n += PANEL)
        for (int64_t from = 0; from < k; from += DEPTH) {
            int64_t deep = k - from < DEPTH ? k - from : DEPTH;
            for (int64_t j = 0; j < PANEL; j += LANES)
                for (int64_t p = 0; p < deep; p += TURN) turn(b + (n + j) * k + from + p, k, panel + p / 2 * PANEL + j);
            Left rows = rows_of(a + from, k / 2);
            if (from)
                strip(1, 1, WIDE, rows, panel, PANEL, c + n, ldc, m, deep / 2);
            else
                strip(1, 0, WIDE, rows, panel, PANEL, c + n, ldc, m, deep / 2);
        }
}

#else

int64_t narrow_panel(void) { return 0; }  // there is none

void narrow_product(const uint16_t *a, const uint16_t *b, float *c, int64_t m, int64_t k, int64_t ldc, int64_t first,
                    int64_t last) {}

#endif
