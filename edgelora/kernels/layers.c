// What lies between the products of a layer, on a CPU: each reads its tensors once and rounds once.
//
// Rows [first, last) of contiguous tensors, whose columns are a multiple of LANES. A number is float32, or bfloat16
// where `narrow` says so; everything is computed in float32. activations.py, norm.py, rotary.py and loss.py say what.
// What a function is given are the fields of its struct, in their order (kernels/load.py).

#include <string.h>

#include "vectors.h"

INLINE vec sigmoid(vec x) {
    vec e = exponential((vec)((ivec)x | (int32_t)0x80000000));  // of -|x|: it cannot overflow
    ivec negative = (ivec)(x < 0.0f);
    vec top = (vec)(((ivec)e & negative) | ((ivec)all(1.0f) & ~negative));
    return top / (1.0f + e);
}

typedef struct {
    const void *gate, *up;
    void *out;
    int64_t columns, narrow;
} SwigluForward;

void swiglu_forward(const SwigluForward *j, int64_t first, int64_t last) {
    const int narrow = j->narrow != 0;
    for (int64_t i = first * j->columns; i < last * j->columns; i += LANES) {
        vec g = read(j->gate, i, narrow);
        write(j->out, i, narrow, g * sigmoid(g) * read(j->up, i, narrow));
    }
}

typedef struct {
    const void *d_out, *gate, *up;
    void *d_gate, *d_up;
    int64_t columns, narrow;
} SwigluBackward;

void swiglu_backward(const SwigluBackward *j, int64_t first, int64_t last) {
    const int narrow = j->narrow != 0;
    for (int64_t i = first * j->columns; i < last * j->columns; i += LANES) {
        vec g = read(j->gate, i, narrow), d = read(j->d_out, i, narrow), s = sigmoid(g);
        write(j->d_gate, i, narrow, d * read(j->up, i, narrow) * s * (1.0f + g * (1.0f - s)));
        write(j->d_up, i, narrow, d * g * s);
    }
}

// x and what is computed for it are `narrow_x`, the output and its gradient `narrow`.
typedef struct {
    const void *x;
    const float *weight;
    void *out;
    float *inverse_rms;
    int64_t columns, narrow_x, narrow;
    double eps;
} NormForward;

void rms_norm_forward(const NormForward *j, int64_t first, int64_t last) {
    const int64_t columns = j->columns;
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * columns;
        vec squares = all(0);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec value = read(j->x, at + c, j->narrow_x);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum(squares) / columns + (float)j->eps);
        j->inverse_rms[row] = scale;
        for (int64_t c = 0; c < columns; c += LANES)
            write(j->out, at + c, j->narrow, read(j->x, at + c, j->narrow_x) * scale * load(j->weight + c));
    }
}

INLINE vec normed(const void *kept, int64_t at, int narrow, int is_output, vec weight, float scale) {
    vec value = read(kept, at, narrow);
    return is_output ? value / weight : value * scale;
}

typedef struct {
    const void *d_out, *kept;  // x, or (`is_output`, where no weight is 0) the output
    const float *weight, *inverse_rms;
    void *dx;
    int64_t columns, narrow_x, narrow, is_output;
} NormBackward;

void rms_norm_backward(const NormBackward *j, int64_t first, int64_t last) {
    const int64_t columns = j->columns;
    const int is_output = j->is_output != 0, narrow = j->narrow != 0, narrow_kept = is_output ? narrow : j->narrow_x != 0;
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * columns;
        float scale = j->inverse_rms[row];
        vec products = all(0);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec w = load(j->weight + c);
            products += read(j->d_out, at + c, narrow) * w * normed(j->kept, at + c, narrow_kept, is_output, w, scale);
        }
        float along = sum(products) / columns;
        for (int64_t c = 0; c < columns; c += LANES) {
            vec w = load(j->weight + c);
            vec d = read(j->d_out, at + c, narrow) * w - normed(j->kept, at + c, narrow_kept, is_output, w, scale) * along;
            write(j->dx, at + c, j->narrow_x, d * scale);
        }
    }
}

typedef struct {
    const void *x;               // (T, heads, dim)
    const float *cosine, *sine;  // (T, half)
    void *out;                   // as x; numbers from 2 half on stay
    int64_t heads, dim, half, narrow;
    double sign;  // of the sines: which way it turns
} Rotary;

void rotary(const Rotary *j, int64_t first, int64_t last) {
    const int64_t heads = j->heads, dim = j->dim, half = j->half;
    const int narrow = j->narrow != 0;
    for (int64_t token = first; token < last; token++)
        for (int64_t at = token * heads * dim; at < (token + 1) * heads * dim; at += dim) {
            for (int64_t c = 0; c < half; c += LANES) {
                vec one = read(j->x, at + c, narrow), two = read(j->x, at + half + c, narrow);
                vec cos = load(j->cosine + token * half + c), sin = load(j->sine + token * half + c) * (float)j->sign;
                write(j->out, at + c, narrow, one * cos - two * sin);
                write(j->out, at + half + c, narrow, two * cos + one * sin);
            }
            for (int64_t c = 2 * half; c < dim; c += LANES) write(j->out, at + c, narrow, read(j->x, at + c, narrow));
        }
}

typedef struct {
    const float *x;
    const void *y;  // added to x, `multiplier` times
    float *out;
    int64_t columns, narrow;
    double multiplier;
} Residual;

void residual(const Residual *j, int64_t first, int64_t last) {
    const int narrow = j->narrow != 0;
    const float multiplier = (float)j->multiplier;
    for (int64_t i = first * j->columns; i < last * j->columns; i += LANES)
        store(j->out + i, load(j->x + i) + read(j->y, i, narrow) * multiplier);
}

typedef struct {
    const float *from;
    void *to;
    int64_t n;
    double scale;
} Copy;

typedef struct {
    const Copy *list;
    int64_t narrow;
} Copies;

// The copies [first, last): each number times the scale.
void scaled_copies(const Copies *j, int64_t first, int64_t last) {
    for (const Copy *c = j->list + first; c < j->list + last; c++) {
        const float scale = (float)c->scale;
        int64_t i = 0;
        for (; i + LANES <= c->n; i += LANES) write(c->to, i, j->narrow, load(c->from + i) * scale);
        if (i < c->n) {
            float end[LANES] = {0};
            char to[LANES * sizeof(float)];
            int64_t size = j->narrow ? 2 : 4;
            memcpy(end, c->from + i, (c->n - i) * sizeof *end);
            write(to, 0, j->narrow, load(end) * scale);
            memcpy((char *)c->to + i * size, to, (c->n - i) * size);
        }
    }
}

// -log p(label) of each row of logits z (P, V), and in the place of z what it changes by: p - 1 at the label, p
// elsewhere. With `narrow` that is bfloat16, in the first half of the row's memory.
typedef struct {
    float *z;
    const int64_t *labels;
    float *nll;
    int64_t columns, narrow;
} CrossEntropy;

void cross_entropy(const CrossEntropy *j, int64_t first, int64_t last) {
    const int64_t columns = j->columns;
    for (int64_t row = first; row < last; row++) {
        float *from = j->z + row * columns;
        float target = from[j->labels[row]];
        vec tops = load(from), sums = all(0);
        for (int64_t c = LANES; c < columns; c += LANES) tops = larger(load(from + c), tops);
        float top = largest(tops);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec p = exponential(load(from + c) - top);
            store(from + c, p);
            sums += p;
        }
        float total = sum(sums), share = 1.0f / total;
        j->nll[row] = top - target + logf(total);
        from[j->labels[row]] -= total;
        for (int64_t c = 0; c < columns; c += LANES)  // half as wide: no number is written before it was read
            write(from, c, j->narrow, load(from + c) * share);
    }
}
