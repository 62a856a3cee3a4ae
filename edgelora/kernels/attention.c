// Causal attention inside the segments of a packed row, forward and backward, in float32 on a CPU.
//
// FlashAttention (arXiv:2205.14135; the backward is that of arXiv:2307.08691, section 3.1): a tile of queries meets its
// keys block by block, the softmax is kept up as they pass, and no scores leave the cache. nn/attention.py says what is
// computed; nn/flash.py calls this once for each thread, which takes its share of the tiles by itself.

#include <string.h>

#include "vectors.h"

#define ROWS 32   // queries of a tile
#define KEYS 64   // keys of a block
#define HIDDEN -1e30f  // the score of a key that a query may not see; finite, so that no difference of two is a NaN

typedef struct {
    const void *q, *k, *v;  // (T, H, d), (T, KV, d), (T, KV, d): float32, or bfloat16 if `narrow`
    void *out;              // (T, H, d), as they are
    float *lse;             // (T, H): log sum exp of the scores of each query
    const void *d_out;      // (T, H, d), as they are
    void *dq;               // (T, H, d), as they are
    float *dk, *dv;         // (threads + KV - 1, T, d): a thread's part of a head's gradient, at `thread + kv`
    int64_t *owners;        // (threads + KV - 1,): the head that such a part belongs to; stays as it was where none is
    float *scratch;         // (threads, scratch_floats)
    const int64_t *borders; // (n_segments + 1,): segment s is the tokens [borders[s], borders[s + 1])
    int64_t n_segments, prefix, tokens, heads, kv_heads, dim, window, scratch_floats;
    float scale, softcap;   // softcap 0: none; window 0: none
    int32_t narrow;
} Attention;

// ---- products: c (m, n) += a (m, k) b (k, n). n is a multiple of LANES; a's rows and columns may lie anywhere.

typedef struct {
    const float *at;
    int64_t row, column;  // strides
} Left;

INLINE void block(const int height, const int width, Left a, const float *b, int64_t ldb, float *c, int64_t ldc,
                  int64_t k) {
    vec sums[6][WIDE];
#pragma GCC unroll 6
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) sums[i][j] = load(c + i * ldc + j * LANES);
    for (int64_t p = 0; p < k; p++) {
        vec right[WIDE];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) right[j] = load(b + p * ldb + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < height; i++) {
            float left = a.at[i * a.row + p * a.column];
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < height; i++)
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) store(c + i * ldc + j * LANES, sums[i][j]);
}

INLINE void strip(const int width, Left a, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t k) {
    for (; m >= 6; m -= 6, a.at += 6 * a.row, c += 6 * ldc) block(6, width, a, b, ldb, c, ldc, k);
    if (m >= 4) {
        block(4, width, a, b, ldb, c, ldc, k);
        m -= 4, a.at += 4 * a.row, c += 4 * ldc;
    }
    if (m >= 2) {
        block(2, width, a, b, ldb, c, ldc, k);
        m -= 2, a.at += 2 * a.row, c += 2 * ldc;
    }
    if (m) block(1, width, a, b, ldb, c, ldc, k);
}

static void multiply(Left a, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t n, int64_t k) {
    int64_t j = 0;
    for (; n - j >= WIDE * LANES; j += WIDE * LANES) strip(WIDE, a, b + j, ldb, c + j, ldc, m, k);
    for (; n - j >= LANES; j += LANES) strip(1, a, b + j, ldb, c + j, ldc, m, k);
}

INLINE Left rows_of(const float *a, int64_t lda) { return (Left){a, lda, 1}; }
INLINE Left columns_of(const float *a, int64_t lda) { return (Left){a, 1, lda}; }

// ---- keys and values of a segment, in the order of their positions: the shared prefix first, then its own

typedef struct {
    int64_t kv, begin, end, shared;  // tokens [begin, end), after `shared` of the prefix
    int64_t n_blocks;
    float *k, *v, *k_columns, *v_columns;  // (n, d), (n, d); blocks of (d, KEYS)
    float *dk, *dv;                        // (n, d)
} Segment;

INLINE int64_t token_of(const Segment *s, int64_t position) {
    return position < s->shared ? position : s->begin + position - s->shared;
}

static void gather(const Attention *w, const void *from, const Segment *s, float *rows, float *columns) {
    int64_t d = w->dim, n = s->shared + s->end - s->begin, padded = s->n_blocks * KEYS;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = (token_of(s, i) * w->kv_heads + s->kv) * d;
        for (int64_t c = 0; c < d; c += LANES) store(rows + i * d + c, read(from, at + c, w->narrow));
    }
    memset(rows + n * d, 0, (padded - n) * d * sizeof(float));
    for (int64_t b = 0; columns && b < padded; b += KEYS)
        for (int64_t c = 0; c < d; c++)
            for (int64_t i = 0; i < KEYS; i++) columns[b * d + c * KEYS + i] = rows[(b + i) * d + c];
}

static void scatter(const Attention *w, const Segment *s, const float *rows, float *part) {
    int64_t d = w->dim, n = s->shared + s->end - s->begin;
    for (int64_t i = 0; i < n; i++) {
        float *to = part + token_of(s, i) * d;
        for (int64_t c = 0; c < d; c += LANES) store(to + c, load(to + c) + load(rows + i * d + c));
    }
}

// Shares follow one another in the order of heads, so thread + kv is different for every pair of them that meets.
static void hand_over(const Attention *w, const Segment *s, int64_t thread) {
    int64_t slot = thread + s->kv, size = w->tokens * w->dim;
    float *dk = w->dk + slot * size, *dv = w->dv + slot * size;
    if (w->owners[slot] != s->kv) {
        memset(dk, 0, size * sizeof(float));
        memset(dv, 0, size * sizeof(float));
        w->owners[slot] = s->kv;
    }
    scatter(w, s, s->dk, dk);
    scatter(w, s, s->dv, dv);
}

// ---- a tile: up to ROWS queries of one segment and head

typedef struct {
    const Segment *segment;
    int64_t head, first, n;  // tokens [first, first + n)
    int64_t position;        // of the first of them
    float *q, *d_out, *sums; // (ROWS, d): queries times scale; the gradient of the output; output, or gradient of q
    float *scores, *slopes;  // (ROWS, KEYS)
} Tile;

INLINE int64_t at_row(const Attention *w, const Tile *t, int64_t i) {
    return ((t->first + i) * w->heads + t->head) * w->dim;
}

static void fetch(const Attention *w, const Tile *t, const void *from, float *to, float scale) {
    for (int64_t i = 0; i < t->n; i++)
        for (int64_t c = 0; c < w->dim; c += LANES)
            store(to + i * w->dim + c, read(from, at_row(w, t, i) + c, w->narrow) * scale);
}

static void put(const Attention *w, const Tile *t, void *to, int64_t i, float scale) {
    for (int64_t c = 0; c < w->dim; c += LANES)
        write(to, at_row(w, t, i) + c, w->narrow, load(t->sums + i * w->dim + c) * scale);
}

INLINE int64_t first_seen(const Attention *w, int64_t position) {
    return w->window && position >= w->window ? position - w->window + 1 : 0;
}

// Keys [from, from + the result) that some query of the tile may see, a multiple of LANES; 0: no more.
INLINE int64_t width_of(const Tile *t, int64_t from) {
    int64_t left = t->position + t->n - from;
    return left <= 0 ? 0 : left >= KEYS ? KEYS : (left + LANES - 1) / LANES * LANES;
}

// scores (n, width) of the tile against keys [from, from + width), bent below softcap; `slopes` is its derivative
static void score(const Attention *w, const Tile *t, int64_t from, int64_t width, float *slopes) {
    memset(t->scores, 0, t->n * KEYS * sizeof(float));
    multiply(rows_of(t->q, w->dim), t->segment->k_columns + from * w->dim, KEYS, t->scores, KEYS, t->n, width, w->dim);
    for (int64_t i = 0; i < t->n; i++) {
        float *row = t->scores + i * KEYS;
        int64_t position = t->position + i, low = first_seen(w, position) - from, high = position + 1 - from;
        for (int64_t c = 0; w->softcap != 0 && c < width; c += LANES) {
            vec bent = tangent(load(row + c) / w->softcap);
            store(row + c, bent * w->softcap);
            if (slopes) store(slopes + i * KEYS + c, 1.0f - bent * bent);
        }
        for (int64_t c = 0; c < low && c < width; c++) row[c] = HIDDEN;
        for (int64_t c = high > 0 ? high : 0; c < width; c++) row[c] = HIDDEN;
    }
}

static void tile_forward(const Attention *w, Tile *t) {
    int64_t d = w->dim;
    float top[ROWS], total[ROWS];
    fetch(w, t, w->q, t->q, w->scale);
    memset(t->sums, 0, t->n * d * sizeof(float));
    for (int64_t i = 0; i < t->n; i++) top[i] = HIDDEN, total[i] = 0;
    for (int64_t from = first_seen(w, t->position) / KEYS * KEYS, width; (width = width_of(t, from)); from += KEYS) {
        score(w, t, from, width, 0);
        for (int64_t i = 0; i < t->n; i++) {
            float *row = t->scores + i * KEYS;
            vec tops = all(top[i]), sums = all(0);
            for (int64_t c = 0; c < width; c += LANES) tops = larger(load(row + c), tops);
            float now = largest(tops), kept = exponential(all(top[i] - now))[0];
            for (int64_t c = 0; c < width; c += LANES) {
                vec p = exponential(load(row + c) - now);
                store(row + c, p);
                sums += p;
            }
            total[i] = total[i] * kept + sum(sums);
            if (top[i] != now)
                for (int64_t c = 0; c < d; c += LANES) store(t->sums + i * d + c, load(t->sums + i * d + c) * kept);
            top[i] = now;
        }
        multiply(rows_of(t->scores, KEYS), t->segment->v + from * d, d, t->sums, d, t->n, d, width);
    }
    for (int64_t i = 0; i < t->n; i++) {
        if (top[i] == HIDDEN) total[i] = NAN;  // nothing that it sees has a finite score
        w->lse[(t->first + i) * w->heads + t->head] = top[i] + logf(total[i]);
        put(w, t, w->out, i, 1.0f / total[i]);
    }
}

static void tile_backward(const Attention *w, Tile *t) {
    int64_t d = w->dim;
    const Segment *s = t->segment;
    float lse[ROWS], inner[ROWS];  // inner: d_out · out of each query
    fetch(w, t, w->q, t->q, w->scale);
    fetch(w, t, w->d_out, t->d_out, 1.0f);
    memset(t->sums, 0, t->n * d * sizeof(float));
    for (int64_t i = 0; i < t->n; i++) {
        vec products = all(0);
        for (int64_t c = 0; c < d; c += LANES)
            products += load(t->d_out + i * d + c) * read(w->out, at_row(w, t, i) + c, w->narrow);
        inner[i] = sum(products), lse[i] = w->lse[(t->first + i) * w->heads + t->head];
    }
    float *p = t->scores, *ds = t->slopes;
    float bends[ROWS * KEYS];
    for (int64_t from = first_seen(w, t->position) / KEYS * KEYS, width; (width = width_of(t, from)); from += KEYS) {
        score(w, t, from, width, bends);
        memset(ds, 0, t->n * KEYS * sizeof(float));
        multiply(rows_of(t->d_out, d), s->v_columns + from * d, KEYS, ds, KEYS, t->n, width, d);
        for (int64_t i = 0; i < t->n; i++)
            for (int64_t c = i * KEYS; c < i * KEYS + width; c += LANES) {
                store(p + c, exponential(load(p + c) - lse[i]));
                vec slope = load(p + c) * (load(ds + c) - inner[i]);
                if (w->softcap != 0) slope *= load(bends + c);
                store(ds + c, slope);
            }
        multiply(columns_of(p, KEYS), t->d_out, d, s->dv + from * d, d, width, d, t->n);
        multiply(columns_of(ds, KEYS), t->q, d, s->dk + from * d, d, width, d, t->n);
        multiply(rows_of(ds, KEYS), s->k + from * d, d, t->sums, d, t->n, d, width);
    }
    for (int64_t i = 0; i < t->n; i++) put(w, t, w->dq, i, w->scale);
}

// ---- a thread's share: tiles in the order of key-value heads, segments and tokens, cut where the work is even

static int64_t cost(const Attention *w, int64_t position) {  // of a tile: the keys it meets
    return position + ROWS - first_seen(w, position);
}

static void share(const Attention *w, int64_t thread, int64_t threads, int backward) {
    int64_t d = w->dim, group = w->heads / w->kv_heads, whole = 0, done = 0, longest = 0;
    for (int64_t s = 0; s < w->n_segments; s++) {
        int64_t begin = w->borders[s], shared = begin >= w->prefix ? w->prefix : 0;
        int64_t n = w->borders[s + 1] - begin;
        for (int64_t i = 0; i < n; i += ROWS) whole += cost(w, shared + i);
        longest = shared + n > longest ? shared + n : longest;
    }
    whole *= w->kv_heads;
    int64_t from = whole * thread / threads, to = whole * (thread + 1) / threads;
    int64_t room = (longest + KEYS - 1) / KEYS * KEYS * d;
    float *memory = w->scratch + thread * w->scratch_floats;
    Segment segment = {.k = memory, .k_columns = memory + room, .v = memory + 2 * room};
    if (backward) segment.v_columns = memory + 3 * room, segment.dk = memory + 4 * room, segment.dv = memory + 5 * room;
    memory += (backward ? 6 : 3) * room;
    Tile tile = {.segment = &segment, .q = memory, .d_out = memory + ROWS * d, .sums = memory + 2 * ROWS * d};
    tile.scores = memory + 3 * ROWS * d, tile.slopes = tile.scores + ROWS * KEYS;

    for (segment.kv = 0; segment.kv < w->kv_heads; segment.kv++)
        for (int64_t s = 0; s < w->n_segments; s++) {
            segment.begin = w->borders[s], segment.end = w->borders[s + 1];
            segment.shared = segment.begin >= w->prefix ? w->prefix : 0;
            segment.n_blocks = (segment.shared + segment.end - segment.begin + KEYS - 1) / KEYS;
            int gathered = 0;
            for (int64_t i = segment.begin; i < segment.end; i += ROWS) {
                tile.position = segment.shared + i - segment.begin;
                int64_t middle = done + cost(w, tile.position) / 2;
                done += cost(w, tile.position);
                if (middle < from || middle >= to) continue;
                if (!gathered) {
                    gather(w, w->k, &segment, segment.k, segment.k_columns);
                    gather(w, w->v, &segment, segment.v, segment.v_columns);
                    if (backward) memset(segment.dk, 0, 2 * room * sizeof(float));
                    gathered = 1;
                }
                tile.first = i, tile.n = segment.end - i < ROWS ? segment.end - i : ROWS;
                for (int64_t g = 0; g < group; g++) {
                    tile.head = segment.kv * group + g;
                    (backward ? tile_backward : tile_forward)(w, &tile);
                }
            }
            if (backward && gathered) hand_over(w, &segment, thread);
        }
}

int64_t attention_bytes(void) { return sizeof(Attention); }

// floats that a thread needs of `scratch`, for segments of up to `longest` tokens with their prefix
int64_t attention_scratch(int64_t longest, int64_t dim) {
    return 6 * ((longest + KEYS - 1) / KEYS * KEYS * dim) + 3 * ROWS * dim + 2 * ROWS * KEYS;
}

void attention_forward(const Attention *w, int64_t thread, int64_t threads) { share(w, thread, threads, 0); }
void attention_backward(const Attention *w, int64_t thread, int64_t threads) { share(w, thread, threads, 1); }
