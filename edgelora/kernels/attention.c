// Causal attention inside the segments of a packed row, forward and backward, on a CPU.
//
// FlashAttention (arXiv:2205.14135; the backward is that of arXiv:2307.08691, section 3.1): a tile of queries meets its
// keys block by block, the softmax is kept up as they pass, and no scores leave the cache. nn/attention.py says what is
// computed; nn/flash.py calls this once for each thread, which takes its share of the tiles by itself.
//
// Scores, their softmax and all sums are float32. Where the processor multiplies pairs of bfloat16 numbers (products.h)
// and the tensors are bfloat16, so are the factors of products: q, k, v and the gradient of the output as they come, the
// probabilities and the gradients of scores rounded, as on a GPU. They stand in words: numbers of a row beside each
// other, or those of two rows, one above the other. Elsewhere factors are float32, and a word is a number.

#include <string.h>

#include "products.h"

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
    int64_t n_segments, prefix, tokens, heads, kv_heads, dim, window, scratch_floats, threads;
    float scale, softcap;   // softcap 0: none; window 0: none
    int32_t narrow;
} Attention;

// c (m, n) += a (m, k) b (k, n), k counted in words. n is a multiple of LANES.
static void multiply(int narrow, Left a, const void *b, int64_t ldb, float *c, int64_t ldc, int64_t m, int64_t n,
                     int64_t k) {
    const uint32_t *right = b;
    int64_t j = 0;
    for (; n - j >= WIDE * LANES; j += WIDE * LANES)
        if (narrow)
            strip(1, 1, WIDE, a, right + j, ldb, c + j, ldc, m, k);
        else
            strip(0, 1, WIDE, a, right + j, ldb, c + j, ldc, m, k);
    for (; n - j >= LANES; j += LANES)
        if (narrow)
            strip(1, 1, 1, a, right + j, ldb, c + j, ldc, m, k);
        else
            strip(0, 1, 1, a, right + j, ldb, c + j, ldc, m, k);
}

INLINE int paired(const Attention *w) { return PAIRS && w->narrow; }

// How many words n numbers are.
INLINE int64_t words(const Attention *w, int64_t n) { return paired(w) ? (n + 1) / 2 : n; }

// ---- keys and values of a segment, in the order of their positions: the shared prefix first, then its own

typedef struct {
    int64_t kv, begin, end, shared;  // tokens [begin, end), after `shared` of the prefix
    int64_t n_blocks;
    // in words: those of (n, d) as two rows make them, and blocks of (d, KEYS) as one row makes them
    uint32_t *k, *v, *k_columns, *v_columns;
    float *dk, *dv;  // (n, d)
} Segment;

INLINE int64_t token_of(const Segment *s, int64_t position) {
    return position < s->shared ? position : s->begin + position - s->shared;
}

// Where a key or value stands, in numbers.
INLINE int64_t at_key(const Attention *w, const Segment *s, int64_t position) {
    return (token_of(s, position) * w->kv_heads + s->kv) * w->dim;
}

// A row of d numbers in words, as factors have them.
INLINE void fetch_row(const Attention *w, const void *from, int64_t at, uint32_t *to) {
    if (paired(w))
        memcpy(to, (const uint16_t *)from + at, w->dim * sizeof(uint16_t));
    else
        for (int64_t c = 0; c < w->dim; c += LANES) store((float *)to + c, read(from, at + c, w->narrow));
}

static void gather_rows(const Attention *w, const void *from, const Segment *s, uint32_t *rows) {
    int64_t d = w->dim, n = s->shared + s->end - s->begin, used = words(w, n), all_rows = words(w, s->n_blocks * KEYS);
    for (int64_t i = 0; i < used; i++)
        for (int64_t c = 0; c < d; c += LANES)
            if (paired(w)) {
                const uint16_t *numbers = from, *second = numbers + at_key(w, s, 2 * i + 1) + c;
                *(uvec *)(rows + i * d + c) = both(numbers + at_key(w, s, 2 * i) + c, 2 * i + 1 < n ? second : 0);
            } else
                store((float *)rows + i * d + c, read(from, at_key(w, s, i) + c, w->narrow));
    memset(rows + used * d, 0, (all_rows - used) * d * sizeof *rows);
}

static void gather_columns(const Attention *w, const void *from, const Segment *s, uint32_t *columns) {
    int64_t d = w->dim, n = s->shared + s->end - s->begin, deep = words(w, d);
    memset(columns + (s->n_blocks - 1) * KEYS * deep, 0, KEYS * deep * sizeof *columns);
    uint32_t row[d];
    for (int64_t i = 0; i < n; i++) {
        uint32_t *to = columns + i / KEYS * KEYS * deep + i % KEYS;
        fetch_row(w, from, at_key(w, s, i), row);
        for (int64_t c = 0; c < deep; c++) to[c * KEYS] = row[c];
    }
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
    int64_t head, first, n;       // tokens [first, first + n)
    int64_t position;             // of the first of them
    uint32_t *q, *d_out;          // (ROWS, d) in words of one row: queries, and the gradient of the output
    uint32_t *q_pairs, *d_pairs;  // the same in words of two rows; with float32 the same memory
    float *sums;                  // (ROWS, d): output, or gradient of q
    float *scores, *slopes;       // (ROWS, KEYS)
} Tile;

INLINE int64_t at_row(const Attention *w, const Tile *t, int64_t i) {
    return ((t->first + i) * w->heads + t->head) * w->dim;
}

static void fetch(const Attention *w, const Tile *t, const void *from, uint32_t *rows, uint32_t *pairs) {
    int64_t d = w->dim, deep = words(w, d);
    for (int64_t i = 0; i < t->n; i++) fetch_row(w, from, at_row(w, t, i), rows + i * deep);
    for (int64_t i = 0; pairs != rows && i < t->n; i += 2)
        for (int64_t c = 0; c < d; c += LANES) {
            const uint16_t *first = (const uint16_t *)(rows + i * deep) + c;
            *(uvec *)(pairs + i / 2 * d + c) = both(first, i + 1 < t->n ? first + d : 0);
        }
}

// Rows of KEYS floats become words of two rows in bfloat16, in their own memory.
static void pair(float *rows, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t c = 0; c < width; c += LANES) {
            uvec low = rounded(load(rows + i * KEYS + c));
            uvec high = i + 1 < n ? rounded(load(rows + (i + 1) * KEYS + c)) : (uvec){0};
            *(uvec *)(rows + i / 2 * KEYS + c) = low | high << 16;
        }
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

// rows (n, d) of the tile against columns [from, from + width) of its segment
static void against(const Attention *w, const Tile *t, const uint32_t *rows, const uint32_t *columns, int64_t from,
                    int64_t width, float *to) {
    int64_t deep = words(w, w->dim);
    memset(to, 0, t->n * KEYS * sizeof *to);
    multiply(paired(w), rows_of(rows, deep), columns + from * deep, KEYS, to, KEYS, t->n, width, deep);
}

// scores (n, width) of the tile against keys [from, from + width), bent below softcap; `slopes` is its derivative
static void score(const Attention *w, const Tile *t, int64_t from, int64_t width, float *slopes) {
    against(w, t, t->q, t->segment->k_columns, from, width, t->scores);
    for (int64_t i = 0; i < t->n; i++) {
        float *row = t->scores + i * KEYS;
        for (int64_t c = 0; c < width; c += LANES) store(row + c, load(row + c) * w->scale);
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
    float top[ROWS], now[ROWS], kept[ROWS];
    vec sums[ROWS];  // of probabilities, lane by lane
    fetch(w, t, w->q, t->q, t->q);
    memset(t->sums, 0, t->n * d * sizeof(float));
    for (int64_t i = 0; i < ROWS; i++) top[i] = now[i] = HIDDEN, sums[i] = all(0);
    for (int64_t from = first_seen(w, t->position) / KEYS * KEYS, width; (width = width_of(t, from)); from += KEYS) {
        score(w, t, from, width, 0);
        for (int64_t i = 0; i < t->n; i++) {
            vec tops = all(top[i]);
            for (int64_t c = 0; c < width; c += LANES) tops = larger(load(t->scores + i * KEYS + c), tops);
            now[i] = largest(tops);
        }
        for (int64_t i = 0; i < ROWS; i += LANES) store(kept + i, exponential(load(top + i) - load(now + i)));
        for (int64_t i = 0; i < t->n; i++) {
            float *row = t->scores + i * KEYS;
            sums[i] *= kept[i];
            for (int64_t c = 0; c < width; c += LANES) {
                vec p = exponential(load(row + c) - now[i]);
                write(row, c, paired(w), p);  // in the row's own memory: no number is written before it was read
                sums[i] += p;
            }
            if (top[i] != now[i])
                for (int64_t c = 0; c < d; c += LANES) store(t->sums + i * d + c, load(t->sums + i * d + c) * kept[i]);
            top[i] = now[i];
        }
        multiply(paired(w), rows_of(t->scores, KEYS), t->segment->v + words(w, from) * d, d, t->sums, d, t->n, d,
                 words(w, width));
    }
    for (int64_t i = 0; i < t->n; i++) {
        float total = top[i] == HIDDEN ? NAN : sum(sums[i]);  // nothing that it sees has a finite score
        w->lse[(t->first + i) * w->heads + t->head] = top[i] + logf(total);
        put(w, t, w->out, i, 1.0f / total);
    }
}

static void tile_backward(const Attention *w, Tile *t) {
    int64_t d = w->dim;
    const Segment *s = t->segment;
    float lse[ROWS], inner[ROWS];  // inner: d_out · out of each query
    fetch(w, t, w->q, t->q, t->q_pairs);
    fetch(w, t, w->d_out, t->d_out, t->d_pairs);
    memset(t->sums, 0, t->n * d * sizeof(float));
    for (int64_t i = 0; i < t->n; i++) {
        vec products = all(0);
        for (int64_t c = 0; c < d; c += LANES)
            products += read(w->d_out, at_row(w, t, i) + c, w->narrow) * read(w->out, at_row(w, t, i) + c, w->narrow);
        inner[i] = sum(products), lse[i] = w->lse[(t->first + i) * w->heads + t->head];
    }
    float *p = t->scores, *ds = t->slopes;
    float bends[ROWS * KEYS];
    for (int64_t from = first_seen(w, t->position) / KEYS * KEYS, width; (width = width_of(t, from)); from += KEYS) {
        score(w, t, from, width, bends);
        against(w, t, t->d_out, s->v_columns, from, width, ds);
        for (int64_t i = 0; i < t->n; i++)
            for (int64_t c = i * KEYS; c < i * KEYS + width; c += LANES) {
                store(p + c, exponential(load(p + c) - lse[i]));
                vec slope = load(p + c) * (load(ds + c) - inner[i]) * w->scale;
                if (w->softcap != 0) slope *= load(bends + c);
                store(ds + c, slope);
                if (paired(w)) write(bends + i * KEYS, c - i * KEYS, 1, slope);
            }
        const float *ds_rows = paired(w) ? bends : ds;
        if (paired(w)) pair(p, t->n, width), pair(ds, t->n, width);
        int64_t deep = words(w, t->n);
        multiply(paired(w), columns_of(p, KEYS), t->d_pairs, d, s->dv + from * d, d, width, d, deep);
        multiply(paired(w), columns_of(ds, KEYS), t->q_pairs, d, s->dk + from * d, d, width, d, deep);
        multiply(paired(w), rows_of(ds_rows, KEYS), s->k + words(w, from) * d, d, t->sums, d, t->n, d,
                 words(w, width));
    }
    for (int64_t i = 0; i < t->n; i++) put(w, t, w->dq, i, 1.0f);
}

// ---- a thread's share: tiles in the order of key-value heads, segments and tokens, cut where the work is even

static int64_t cost(const Attention *w, int64_t position) {  // of a tile: the keys it meets
    return position + ROWS - first_seen(w, position);
}

static void share(const Attention *w, int64_t thread, int backward) {
    int64_t d = w->dim, group = w->heads / w->kv_heads, whole = 0, done = 0, longest = 0;
    for (int64_t s = 0; s < w->n_segments; s++) {
        int64_t begin = w->borders[s], shared = begin >= w->prefix ? w->prefix : 0;
        int64_t n = w->borders[s + 1] - begin;
        for (int64_t i = 0; i < n; i += ROWS) whole += cost(w, shared + i);
        longest = shared + n > longest ? shared + n : longest;
    }
    whole *= w->kv_heads;
    int64_t from = whole * thread / w->threads, to = whole * (thread + 1) / w->threads;
    int64_t room = (longest + KEYS - 1) / KEYS * KEYS * d;
    uint32_t *memory = (uint32_t *)(w->scratch + thread * w->scratch_floats);
    Segment segment = {.v = memory, .k_columns = memory + room};
    if (backward) {
        segment.k = memory, segment.v = 0, segment.v_columns = memory + 2 * room;
        segment.dk = (float *)memory + 3 * room, segment.dv = (float *)memory + 4 * room;
    }
    memory += 5 * room;
    Tile tile = {.segment = &segment, .q = memory, .d_out = memory + ROWS * d, .sums = (float *)memory + 2 * ROWS * d};
    tile.scores = tile.sums + ROWS * d, tile.slopes = tile.scores + ROWS * KEYS;
    tile.q_pairs = paired(w) ? tile.q + ROWS * d / 2 : tile.q;  // of bfloat16 numbers both fit in
    tile.d_pairs = paired(w) ? tile.d_out + ROWS * d / 2 : tile.d_out;

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
                    gather_columns(w, w->k, &segment, segment.k_columns);
                    gather_rows(w, backward ? w->k : w->v, &segment, backward ? segment.k : segment.v);
                    if (backward) gather_columns(w, w->v, &segment, segment.v_columns);
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
    return 5 * ((longest + KEYS - 1) / KEYS * KEYS * dim) + 3 * ROWS * dim + 2 * ROWS * KEYS;
}

void attention_forward(const Attention *w, int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) share(w, thread, 0);
}

void attention_backward(const Attention *w, int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; thread++) share(w, thread, 1);
}
