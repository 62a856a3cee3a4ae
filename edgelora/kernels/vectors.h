// Numbers in vectors: GCC's and Clang's own, so that one source serves AVX-512, AVX2 and NEON.

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// A vector is one register; WIDE of them, in 6 rows, are the part of a product that stays in registers.
#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX2__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#if defined(__aarch64__)
#define WIDE 4
#else
#define WIDE 2
#endif
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bvec __attribute__((vector_size(LANES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }

// Bytes as integers, by way of 16 bits: GCC takes the lanes of a wider step one at a time.
INLINE ivec unsigned_at(const uint8_t *p) {
    return __builtin_convertvector(__builtin_convertvector(*(const bvec *)p, hvec), ivec);
}

INLINE vec read(const void *p, int64_t at, int narrow) {
    if (!narrow) return load((const float *)p + at);
    return (vec)(__builtin_convertvector(*(const hvec *)((const uint16_t *)p + at), uvec) << 16);
}

// bfloat16 in the lower halves.
INLINE uvec rounded(vec x) {
    uvec bits = (uvec)x, nan = (uvec)(x != x);
    uvec nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    return (nearest & ~nan) | (nan & 0x7fc0);
}

INLINE void write(void *p, int64_t at, int narrow, vec x) {
    if (narrow)
#if defined(__AVX512BF16__)
        _mm256_storeu_si256((void *)((uint16_t *)p + at), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
        *(hvec *)((uint16_t *)p + at) = __builtin_convertvector(rounded(x), hvec);
#endif
    else
        store((float *)p + at, x);
}

// e^x for x <= 88, to about 1e-7 of it: x = n ln 2 + r, and a polynomial in r (Cephes). 0 below -87; NaN stays NaN.
INLINE vec exponential(vec x) {
    vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer n stands in the lowest bits
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uvec bits = (uvec)p + (((uvec)shifted - 0x4b400000) << 23);
    bits &= ~(uvec)(x < -87.0f);
    return (vec)(bits | (uvec)(x != x));  // all ones are a NaN
}

INLINE vec tangent(vec x) {  // tanh
    vec e = exponential(-2.0f * (vec)((ivec)x & 0x7fffffff));
    return (vec)((ivec)((1.0f - e) / (1.0f + e)) | ((ivec)x & (int32_t)0x80000000));
}

INLINE vec larger(vec a, vec b) {
    ivec keep = (ivec)(a > b);
    return (vec)(((ivec)a & keep) | ((ivec)b & ~keep));
}

#if defined(__AVX512F__)
INLINE float sum(vec x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest(vec x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE float sum(vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

INLINE float largest(vec x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}
#endif
