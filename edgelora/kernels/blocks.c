// Frozen weights on their way into a product, on a CPU.

#include "vectors.h"

#ifndef KERNELS_DIGEST
#define KERNELS_DIGEST ""
#endif

const char *kernels_digest(void) { return KERNELS_DIGEST; }

// What a processor must have to run this, by its name in /proc/cpuinfo.
const char *kernels_need(void) {
#if defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512f";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "";
#endif
}

// bfloat16 of n float32 numbers, to the nearest.
void narrow_row(const float *from, uint16_t *to, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) write(to, i, 1, load(from + i));
    if (i < n) {
        float rest[LANES] = {0};
        uint16_t narrow[LANES];
        for (int64_t j = i; j < n; j++) rest[j - i] = from[j];
        write(narrow, 0, 1, load(rest));
        for (int64_t j = i; j < n; j++) to[j] = narrow[j - i];
    }
}

#define CHUNK 4096  // floats on their way: 16 KB stay in the cache

// Rows of GGUF blocks as float32, or as bfloat16 if `narrow`: by the function of dequantize.c for their type, or, where
// there is none, by ggml's, which knows no bfloat16 and so gives CHUNK at a time, which are `chunk_bytes` of blocks.
typedef struct {
    void (*own)(const void *, void *, int64_t, int64_t);
    void (*ggml)(const void *, float *, int64_t);
    const uint8_t *blocks;
    void *to;
    int64_t columns, row_bytes, chunk_bytes, narrow;
} Rows;

void block_rows(const Rows *j, int64_t first, int64_t last) {
    const uint8_t *blocks = j->blocks + first * j->row_bytes;
    uint16_t *narrowed = (uint16_t *)j->to + first * j->columns;
    float *to = (float *)j->to + first * j->columns, wide[CHUNK];
    int64_t n = (last - first) * j->columns;
    if (j->own)
        j->own(blocks, j->narrow ? (void *)narrowed : to, j->narrow, n);
    else if (!j->narrow)
        j->ggml(blocks, to, n);
    else
        for (int64_t i = 0; i < n; i += CHUNK, blocks += j->chunk_bytes) {
            int64_t some = n - i < CHUNK ? n - i : CHUNK;
            j->ggml(blocks, wide, some);
            narrow_row(wide, narrowed + i, some);
        }
}

// Blocks [first, last) of NF4: 32 bytes are 64 codes, the first of each two in the high bits; a code is one of 16 levels,
// times the scale of its block. `to` holds 64 float32 for each, or bfloat16 if `narrow`.
typedef struct {
    const uint8_t *codes;
    const float *scales, *levels;
    void *to;
    int64_t narrow;
} Nf4;

void nf4_blocks(const Nf4 *j, int64_t first, int64_t last) {
    const uint8_t *codes = j->codes;
    const float *scales = j->scales, *levels = j->levels;
    void *to = j->to;
    const int narrow = j->narrow != 0;
#if LANES == 16 && defined(__GNUC__) && !defined(__clang__)
    const ivec even = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    vec table = load(levels);
    for (int64_t block = first; block < last; block++)
        for (int64_t i = 0; i < 2; i++) {
            ivec pair = unsigned_at(codes + block * 32 + i * 16);
            vec high = __builtin_shuffle(table, pair >> 4) * scales[block];
            vec low = __builtin_shuffle(table, pair & 15) * scales[block];
            write(to, block * 64 + i * 32, narrow, __builtin_shuffle(high, low, even));
            write(to, block * 64 + i * 32 + 16, narrow, __builtin_shuffle(high, low, even + 8));
        }
#else
    for (int64_t block = first; block < last; block++) {
        float values[64];
        for (int64_t i = 0; i < 32; i++) {
            uint8_t pair = codes[block * 32 + i];
            values[2 * i] = levels[pair >> 4], values[2 * i + 1] = levels[pair & 15];
        }
        for (int64_t c = 0; c < 64; c += LANES) write(to, block * 64 + c, narrow, load(values + c) * scales[block]);
    }
#endif
}
