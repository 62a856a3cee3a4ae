// GGUF blocks as floats, on a CPU: bit for bit what ggml's dequantize_row_* gives, in whole vectors, and as bfloat16
// without a stop at float32. Products and sums stay apart, as they do in ggml. Q8_0, Q4_K and Q5_K are missing: ggml's
// own loops over these are as fast.

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <string.h>

#include "vectors.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if LANES == 16
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
static const ivec LANE = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const ivec LANE = {0, 1, 2, 3};
#endif

INLINE vec floats(ivec x) { return __builtin_convertvector(x, vec); }

INLINE float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                             : ldexpf((float)(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    return h >> 15 ? -x : x;
#endif
}

INLINE uint32_t word_at(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}

// A function over n weights, in blocks of `weights` that take `size` bytes: to float32, or bfloat16 if `narrow`.
#define BLOCKS(name, weights, size)                                                          \
    void name##_blocks(const uint8_t *blocks, void *to, int64_t narrow, int64_t n) {         \
        if (narrow)                                                                          \
            for (int64_t i = 0; i < n; i += weights, blocks += size) name(blocks, to, i, 1); \
        else                                                                                 \
            for (int64_t i = 0; i < n; i += weights, blocks += size) name(blocks, to, i, 0); \
    }

// -- blocks of 32: a scale d, in some an offset m, in some a fifth bit of each weight, and 16 bytes of low halves of
// the first 16 weights and high halves of the others -----------------------------------------------------------------

INLINE void q4_0(const uint8_t *b, void *to, int64_t at, int narrow) {
    float d = half_at(b);
    for (int c = 0; c < 16; c += LANES) {
        ivec pair = unsigned_at(b + 2 + c);
        write(to, at + c, narrow, floats((pair & 15) - 8) * d);
        write(to, at + 16 + c, narrow, floats((pair >> 4) - 8) * d);
    }
}

INLINE void q4_1(const uint8_t *b, void *to, int64_t at, int narrow) {
    float d = half_at(b), m = half_at(b + 2);
    for (int c = 0; c < 16; c += LANES) {
        ivec pair = unsigned_at(b + 4 + c);
        write(to, at + c, narrow, floats(pair & 15) * d + m);
        write(to, at + 16 + c, narrow, floats(pair >> 4) * d + m);
    }
}

INLINE void five_bits(const uint8_t *b, uint32_t fifth, int from, float d, float m, int has_m, void *to, int64_t at,
                      int narrow) {
    for (int c = 0; c < 16; c += LANES) {
        ivec pair = unsigned_at(b + c);
        ivec low = (pair & 15) | (((((ivec){0} + (int32_t)(fifth & 0xffff)) >> (LANE + c)) & 1) << 4);
        ivec high = (pair >> 4) | (((((ivec){0} + (int32_t)(fifth >> 16)) >> (LANE + c)) & 1) << 4);
        vec first = floats(low - from) * d, second = floats(high - from) * d;
        if (has_m) first += m, second += m;
        write(to, at + c, narrow, first);
        write(to, at + 16 + c, narrow, second);
    }
}

INLINE void q5_0(const uint8_t *b, void *to, int64_t at, int narrow) {
    five_bits(b + 6, word_at(b + 2), 16, half_at(b), 0, 0, to, at, narrow);
}

INLINE void q5_1(const uint8_t *b, void *to, int64_t at, int narrow) {
    five_bits(b + 8, word_at(b + 4), 0, half_at(b), half_at(b + 2), 1, to, at, narrow);
}

// -- blocks of 256: parts of 16 have scales of their own, in a few bits, times d; in some offsets likewise -----------

INLINE void q6_K(const uint8_t *b, void *to, int64_t at, int narrow) {
    const uint8_t *low = b, *high = b + 128;
    const int8_t *scales = (const int8_t *)b + 192;
    float d = half_at(b + 208);
    for (int half = 0; half < 2; half++, low += 64, high += 32, scales += 8, at += 128)
        for (int c = 0; c < 32; c += LANES) {
            ivec a = unsigned_at(low + c), z = unsigned_at(low + 32 + c), top = unsigned_at(high + c);
            const int8_t *s = scales + c / 16;
            write(to, at + c, narrow, floats(((a & 15) | (top & 3) << 4) - 32) * (d * (float)s[0]));
            write(to, at + 32 + c, narrow, floats(((z & 15) | (top >> 2 & 3) << 4) - 32) * (d * (float)s[2]));
            write(to, at + 64 + c, narrow, floats((a >> 4 | (top >> 4 & 3) << 4) - 32) * (d * (float)s[4]));
            write(to, at + 96 + c, narrow, floats((z >> 4 | (top >> 6) << 4) - 32) * (d * (float)s[6]));
        }
}

INLINE void q2_K(const uint8_t *b, void *to, int64_t at, int narrow) {
    const uint8_t *scales = b, *q = b + 16;
    float d = half_at(b + 80), m = half_at(b + 82);
    for (int half = 0; half < 2; half++, q += 32)
        for (int shift = 0; shift < 8; shift += 2)
            for (int part = 0; part < 2; part++, scales++, at += 16) {
                float scale = d * (float)(*scales & 15), offset = m * (float)(*scales >> 4);
                for (int c = 0; c < 16; c += LANES)
                    write(to, at + c, narrow, floats(unsigned_at(q + 16 * part + c) >> shift & 3) * scale - offset);
            }
}

INLINE void q3_K(const uint8_t *b, void *to, int64_t at, int narrow) {
    const uint8_t *high = b, *q = b + 32, *packed = b + 96;
    float d = half_at(b + 108);
    for (int part = 0; part < 16; part++, at += 16) {  // of 16 weights; a scale has 4 low bits here and 2 high there
        int low = part < 8 ? packed[part] & 15 : packed[part - 8] >> 4;
        float scale = d * (float)((low | (packed[8 + part % 4] >> part / 4 * 2 & 3) << 4) - 32);
        const uint8_t *own = q + part / 8 * 32 + part % 2 * 16, *top = high + part % 2 * 16;
        int shift = part / 2 % 4 * 2, bit = part / 2;
        for (int c = 0; c < 16; c += LANES) {
            ivec value = (unsigned_at(own + c) >> shift & 3) | (unsigned_at(top + c) >> bit & 1) << 2;
            write(to, at + c, narrow, floats(value - 4) * scale);
        }
    }
}

BLOCKS(q4_0, 32, 18)
BLOCKS(q4_1, 32, 20)
BLOCKS(q5_0, 32, 22)
BLOCKS(q5_1, 32, 24)
BLOCKS(q2_K, 256, 84)
BLOCKS(q3_K, 256, 110)
BLOCKS(q6_K, 256, 210)
