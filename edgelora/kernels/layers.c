// What lies between the products of a layer, on a CPU: each reads its tensors once and rounds once.
//
// Rows [first, last) of contiguous tensors, whose columns are a multiple of LANES. A number is float32, or bfloat16
// where `narrow` says so; everything is computed in float32. activations.py, norm.py, rotary.py and loss.py say what.

#include "vectors.h"

INLINE vec sigmoid(vec x) {
    vec e = exponential((vec)((ivec)x | (int32_t)0x80000000));  // of -|x|: it cannot overflow
    ivec negative = (ivec)(x < 0.0f);
    vec top = (vec)(((ivec)e & negative) | ((ivec)all(1.0f) & ~negative));
    return top / (1.0f + e);
}

void swiglu_forward(const void *gate, const void *up, void *out, int64_t columns, int64_t narrow, int64_t first,
                    int64_t last) {
    for (int64_t i = first * columns; i < last * columns; i += LANES) {
        vec g = read(gate, i, narrow);
        write(out, i, narrow, g * sigmoid(g) * read(up, i, narrow));
    }
}

void swiglu_backward(const void *d_out, const void *gate, const void *up, void *d_gate, void *d_up, int64_t columns,
                     int64_t narrow, int64_t first, int64_t last) {
    for (int64_t i = first * columns; i < last * columns; i += LANES) {
        vec g = read(gate, i, narrow), d = read(d_out, i, narrow), s = sigmoid(g);
        write(d_gate, i, narrow, d * read(up, i, narrow) * s * (1.0f + g * (1.0f - s)));
        write(d_up, i, narrow, d * g * s);
    }
}

// x and what is computed for it are `narrow_x`, the output and its gradient `narrow`.
void rms_norm_forward(const void *x, const float *weight, void *out, float *inverse_rms, int64_t columns,
                      int64_t narrow_x, int64_t narrow, float eps, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * columns;
        vec squares = all(0);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec value = read(x, at + c, narrow_x);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum(squares) / columns + eps);
        inverse_rms[row] = scale;
        for (int64_t c = 0; c < columns; c += LANES)
            write(out, at + c, narrow, read(x, at + c, narrow_x) * scale * load(weight + c));
    }
}

INLINE vec normed(const void *kept, int64_t at, int narrow, int is_output, vec weight, float scale) {
    vec value = read(kept, at, narrow);
    return is_output ? value / weight : value * scale;
}

// What was kept: x, or (`is_output`, where no weight is 0) the output.
void rms_norm_backward(const void *d_out, const void *kept, const float *weight, const float *inverse_rms, void *dx,
                       int64_t columns, int64_t narrow_x, int64_t narrow, int64_t is_output, int64_t first,
                       int64_t last) {
    int narrow_kept = is_output ? narrow : narrow_x;
    for (int64_t row = first; row < last; row++) {
        int64_t at = row * columns;
        float scale = inverse_rms[row];
        vec products = all(0);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec w = load(weight + c);
            products += read(d_out, at + c, narrow) * w * normed(kept, at + c, narrow_kept, is_output, w, scale);
        }
        float along = sum(products) / columns;
        for (int64_t c = 0; c < columns; c += LANES) {
            vec w = load(weight + c);
            vec d = read(d_out, at + c, narrow) * w - normed(kept, at + c, narrow_kept, is_output, w, scale) * along;
            write(dx, at + c, narrow_x, d * scale);
        }
    }
}

// x, out (T, heads, dim); cosine and sine (T, half), of which `sign` turns the direction. Numbers from 2 half on stay.
void rotary(const void *x, const float *cosine, const float *sine, void *out, int64_t heads, int64_t dim, int64_t half,
            int64_t narrow, float sign, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token++)
        for (int64_t at = token * heads * dim; at < (token + 1) * heads * dim; at += dim) {
            for (int64_t c = 0; c < half; c += LANES) {
                vec one = read(x, at + c, narrow), two = read(x, at + half + c, narrow);
                vec cos = load(cosine + token * half + c), sin = load(sine + token * half + c) * sign;
                write(out, at + c, narrow, one * cos - two * sin);
                write(out, at + half + c, narrow, two * cos + one * sin);
            }
            for (int64_t c = 2 * half; c < dim; c += LANES) write(out, at + c, narrow, read(x, at + c, narrow));
        }
}

// -log p(label) of each row of logits z (P, V), and in the place of z what it changes by: p - 1 at the label, p
// elsewhere. With `narrow` that is bfloat16, in the first half of the row's memory.
void cross_entropy(float *z, const int64_t *labels, float *nll, int64_t columns, int64_t narrow, int64_t first,
                   int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float *from = z + row * columns;
        float target = from[labels[row]];
        vec tops = load(from), sums = all(0);
        for (int64_t c = LANES; c < columns; c += LANES) tops = larger(load(from + c), tops);
        float top = largest(tops);
        for (int64_t c = 0; c < columns; c += LANES) {
            vec p = exponential(load(from + c) - top);
            store(from + c, p);
            sums += p;
        }
        float total = sum(sums), share = 1.0f / total;
        nll[row] = top - target + logf(total);
        from[labels[row]] -= total;
        for (int64_t c = 0; c < columns; c += LANES)  // half as wide: no number is written before it was read
            write(from, c, narrow, load(from + c) * share);
    }
}
