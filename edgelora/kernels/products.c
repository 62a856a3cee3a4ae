// Sums of matrix products on a CPU with AVX-512: c (m, n) = before + a1 b1 + a2 b2 + ..., of float32 or of bfloat16.
//
// Sums are float32 from the first number to the last, and rounded once, when all terms are in: a LoRA beside its frozen
// weight, or the gradients that come from three matrices, cost no pass over the result of their own. A panel of b is
// brought into the order in which its words meet those of a (products.h), and many rows of a meet it.

#include "products.h"

#if LANES == 16

#include <string.h>

#define PANEL (WIDE * LANES)  // columns of c
#define DEPTH 256             // words of a panel: 64 KiB, in the second cache; a longer sum is one of such sums
#define ROWS 480              // rows of c whose sums lie beside it
#define TURNED_ROWS 64        // rows whose words are put in order too, where they are columns of a
#define SOON 8                // rows of words before they are read
#define UNIT 24               // rows that a thread takes at least

typedef struct {
    const void *left, *right;      // (m, k) and (k, n), or, transposed, (k, m) and (n, k)
    int64_t left_row, right_row;   // numbers from one row to the next
    int64_t k, left_transposed, right_transposed;
    int64_t right_narrow;          // bfloat16, whatever left is
} Term;

typedef struct {
    void *out;            // (m, n)
    const float *before;  // (m, n), may be `out`; 0: zeros
    int64_t out_row, before_row, m, n, n_terms, narrow_out;
} Product;

typedef struct {
    const Product *list;
    const Term *terms;  // those of the first, those of the second ...
    int64_t count, threads, narrow;
} Products;

// A matrix as words: pairs of bfloat16 numbers, float32 ones, or bfloat16 ones each of which becomes a float32.
enum { PAIRED, WHOLE, WIDENED };

INLINE uvec word(const int how, const void *from, int64_t at) {
    if (how == WIDENED) return (uvec)read(from, at, 1);
    return *(const uvec *)((const uint32_t *)from + at);
}

INLINE uint32_t one_word(const int how, const void *from, int64_t at) {
    return how == WIDENED ? (uint32_t)((const uint16_t *)from)[at] << 16 : ((const uint32_t *)from)[at];
}

// 16 rows of 16 words from `at` on → their transpose, in rows of PANEL words.
INLINE void turn(const int how, const void *from, int64_t at, int64_t row, uint32_t *to) {
    __m512i one[16], two[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) one[i] = (__m512i)word(how, from, at + i * row);
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

// The words [0, deep) of n columns, which are rows of `from`: to (deep, n) in rows of PANEL.
INLINE void turned(const int how, const void *from, int64_t row, int64_t n, int64_t deep, uint32_t *to) {
    int64_t j = 0;
    for (; n - j >= 16; j += 16) {
        int64_t p = 0;
        for (; deep - p >= 16; p += 16) turn(how, from, j * row + p, row, to + p * PANEL + j);
        for (; p < deep; p++)
            for (int64_t i = j; i < j + 16; i++) to[p * PANEL + i] = one_word(how, from, i * row + p);
    }
    if (j < n)
        for (int64_t p = 0; p < deep; p++)
            for (int64_t i = j; i < j + 16; i++) to[p * PANEL + i] = i < n ? one_word(how, from, i * row + p) : 0;
}

// Ask for the 64 columns of a row of words: such rows lie so far apart that no processor expects the next.
INLINE void fetch(const int how, const void *from, int64_t row, int64_t p) {
    const int size = how == WHOLE ? 4 : 2;
    const char *next = (const char *)from + size * row * (how == PAIRED ? 2 * p : p);
    __builtin_prefetch(next), __builtin_prefetch(next + 64);
    if (how == PAIRED) __builtin_prefetch(next + 2 * row), __builtin_prefetch(next + 2 * row + 64);
    if (how == WHOLE) __builtin_prefetch(next + 128), __builtin_prefetch(next + 192);
}

// Words of n columns of the rows [0, k) of a matrix: to (words, n) in rows of `width` words, a multiple of 16.
INLINE void stacked(const int how, const void *from, int64_t row, int64_t n, int64_t k, uint32_t *to, int64_t width) {
    const uint16_t *numbers = from;
    int64_t deep = how == PAIRED ? (k + 1) / 2 : k;
    for (int64_t p = 0; p < deep; p++, to += width) {
        int64_t j = 0;
        const uint16_t *first = numbers + 2 * p * row, *second = 2 * p + 1 < k ? first + row : 0;
        fetch(how, from, row, p + SOON);
        for (; n - j >= 16; j += 16)
            *(uvec *)(to + j) = how == PAIRED ? both(first + j, second ? second + j : 0) : word(how, from, p * row + j);
        if (j < n)
            for (int64_t i = j; i < j + 16; i++)
                to[i] = i >= n         ? 0
                        : how != PAIRED ? one_word(how, from, p * row + i)
                                        : first[i] | (second ? (uint32_t)second[i] << 16 : 0);
    }
}

// The columns of `right` in the order in which they meet a row of `left`.
INLINE void laid_out(const int how, const Term *t, int64_t from, int64_t k, int64_t column, int64_t n, uint32_t *panel) {
    const int64_t at = t->right_transposed ? column * t->right_row + from : from * t->right_row + column;
    const void *right = (const char *)t->right + at * (how == WHOLE ? 4 : 2);
    if (!t->right_transposed)
        stacked(how, right, t->right_row, n, k, panel, PANEL);
    else if (how == PAIRED)
        turned(how, right, t->right_row / 2, n, (k + 1) / 2, panel);
    else
        turned(how, right, t->right_row, n, k, panel);
}

INLINE const void *number(const int narrow, const void *at, int64_t n) { return (const char *)at + n * (narrow ? 2 : 4); }

// sums (m, width vectors) += one term, of the rows from `row` and the columns from `column` on.
INLINE void add_term(const int narrow, const Term *t, int begun, int64_t row, int64_t m, int64_t column, int64_t n, float *sums,
                     uint32_t *panel, uint32_t *rows) {
    const int64_t step = narrow ? 2 * DEPTH : DEPTH;
    for (int64_t from = 0; from < t->k; from += step, begun = 1) {
        int64_t k = t->k - from < step ? t->k - from : step, deep = narrow ? (k + 1) / 2 : k;
        if (narrow)
            laid_out(PAIRED, t, from, k, column, n, panel);
        else if (t->right_narrow)
            laid_out(WIDENED, t, from, k, column, n, panel);
        else
            laid_out(WHOLE, t, from, k, column, n, panel);
        Left left;
        if (!t->left_transposed)
            left = rows_of(number(narrow, t->left, row * t->left_row + from), narrow ? t->left_row / 2 : t->left_row);
        else {
            stacked(narrow ? PAIRED : WHOLE, number(narrow, t->left, from * t->left_row + row), t->left_row, m, k, rows, TURNED_ROWS);
            left = columns_of(rows, TURNED_ROWS);
        }
        switch ((n + LANES - 1) / LANES) {
        case 1: strip(narrow, begun, 1, left, panel, PANEL, sums, PANEL, m, deep); break;
        case 2: strip(narrow, begun, 2, left, panel, PANEL, sums, PANEL, m, deep); break;
        case 3: strip(narrow, begun, 3, left, panel, PANEL, sums, PANEL, m, deep); break;
        default: strip(narrow, begun, 4, left, panel, PANEL, sums, PANEL, m, deep);
        }
    }
}

static void narrow_term(const Term *t, int begun, int64_t row, int64_t m, int64_t column, int64_t n, float *sums,
                        uint32_t *panel, uint32_t *rows) {
#if PAIRS
    add_term(1, t, begun, row, m, column, n, sums, panel, rows);
#endif
}

static void wide_term(const Term *t, int begun, int64_t row, int64_t m, int64_t column, int64_t n, float *sums,
                      uint32_t *panel, uint32_t *rows) {
    add_term(0, t, begun, row, m, column, n, sums, panel, rows);
}

// The rows [first, last) of the columns from `column` on.
static void part(const Product *p, const Term *terms, int64_t narrow, int64_t column, int64_t first, int64_t last) {
    static _Thread_local float sums[ROWS * PANEL];  // no stack of a thread has to bear this
    static _Thread_local uint32_t panel[DEPTH * PANEL], rows[DEPTH * TURNED_ROWS];
    int64_t n = p->n - column < PANEL ? p->n - column : PANEL, at_once = ROWS;
    for (int64_t i = 0; i < p->n_terms; i++)
        if (terms[i].left_transposed) at_once = TURNED_ROWS;
    for (int64_t row = first; row < last; row += at_once) {
        int64_t m = last - row < at_once ? last - row : at_once;
        if (p->before)
            for (int64_t i = 0; i < m; i++)
                memcpy(sums + i * PANEL, p->before + (row + i) * p->before_row + column, n * sizeof *sums);
        for (int64_t i = 0; i < p->n_terms; i++)
            (narrow ? narrow_term : wide_term)(terms + i, i || p->before, row, m, column, n, sums, panel, rows);
        for (int64_t i = 0; i < m; i++) {
            int64_t at = (row + i) * p->out_row + column, j = 0;
            for (; n - j >= LANES; j += LANES) write(p->out, at + j, p->narrow_out, load(sums + i * PANEL + j));
            if (j < n) {
                char end[LANES * sizeof(float)];
                int64_t size = p->narrow_out ? 2 : 4;
                write(end, 0, p->narrow_out, load(sums + i * PANEL + j));
                memcpy((char *)p->out + (at + j) * size, end, (n - j) * size);
            }
        }
    }
}

INLINE int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }

// A thread's share of all products: they are cut into units of UNIT rows and PANEL columns, which it takes in a row.
static void share(const Products *j, int64_t thread) {
    int64_t total = 0;
    for (int pass = 0; pass < 2; pass++) {
        int64_t at = 0, begin = total * thread / j->threads, end = total * (thread + 1) / j->threads;
        const Term *own = j->terms;
        for (const Product *p = j->list; p < j->list + j->count; own += p->n_terms, p++) {
            int64_t k = 0, units = (p->m + UNIT - 1) / UNIT, panels = (p->n + PANEL - 1) / PANEL;
            for (int64_t i = 0; i < p->n_terms; i++) k += own[i].k;
            int64_t cost = k * less(p->n, PANEL) * less(p->m, UNIT), last = less(units * panels, (end - at + cost - 1) / cost);
            if (pass)
                for (int64_t unit = begin > at ? (begin - at + cost - 1) / cost : 0, stop; unit < last; unit = stop) {
                    int64_t column = unit / units, row = unit % units;
                    stop = less(last, (column + 1) * units);
                    part(p, own, j->narrow, column * PANEL, row * UNIT, less(p->m, (row + stop - unit) * UNIT));
                }
            at += cost * units * panels;
        }
        total = at;
    }
}

void products(const Products *j, int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) share(j, thread);
}

// Whether they are faster than what torch has: AMX is faster still.
int64_t products_pay(int64_t narrow) {
#if defined(__AMX_BF16__)
    return !narrow;
#else
    return !narrow || PAIRS;
#endif
}

// Whether there are any of numbers of this width.
int64_t products_of(int64_t narrow) { return !narrow || PAIRS; }

#else

void products(const void *job, int64_t first, int64_t last) {}
int64_t products_pay(int64_t narrow) { return 0; }
int64_t products_of(int64_t narrow) { return 0; }

#endif
