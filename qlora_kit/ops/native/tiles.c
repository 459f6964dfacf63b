/* Products with a quantised matrix that never stands decoded in memory, on processors that multiply tiles (Intel AMX).

   A few columns of the result at a time, the weights behind them are decoded into the first cache, in the pairs that
   the tile unit reads, and multiplied there: each value as the decoders give it, rounded once from fp32 to bfloat16
   (what is below 2^-126 becomes zero, as in all products of that unit).
   Sums are fp32, in an order that does not depend on how many rows are multiplied, or by how many threads.

   Axes of W: out, in. Forward, y = x W^T, columns of the result are outputs and sums run over inputs; back, y = x W, it
   is the other way round. In what follows a sum has `depth` terms. Pointers are to contiguous memory, counts and widths
   in elements. Nothing here checks its arguments: base/multiply.py does, and holds the twin in plain torch. */

#include "amx.h"
#ifdef TILES
#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* A stored matrix. 4 bits: two codes a byte, the even one high, and constants as in kernels.c. int8: `codes` and
   `absmax` of each row; `table4` is null. */
typedef struct {
    const uint8_t *codes, *absmax8;
    const float *scale, *offset, *table8, *absmax, *table4;
    int64_t out, in, shift; /* a block has 2^shift weights */
} Stored;

#ifndef TILES

int multiplies_tiles(void) { return 0; }

int multiply_stored(const bf16 *x, int64_t rows, const Stored *w, int back, const bf16 *bias, bf16 *space, bf16 *y,
                    int threads) {
    (void)x, (void)rows, (void)w, (void)back, (void)bias, (void)space, (void)y, (void)threads;
    return 1;
}

#else

enum {
    DEPTH = 256,   /* terms of a sum that are decoded at once: with PANEL columns 32 KiB, of 48 in the first cache */
    PANEL = 64,    /* columns that are decoded at once */
    ROWS = 512,    /* rows of x that are multiplied at once; more decode the matrix again */
    SUMS = 1 << 18 /* sums that wait for their next terms: 1 MiB, of 2 in the second cache */
};
typedef struct {
    bf16 panel[PANEL * DEPTH];
    float sums[SUMS];
} Scratch;

static pthread_key_t kept;

static void drop(void *own) { munmap(own, sizeof(Scratch)); }

static void keep(void) { pthread_key_create(&kept, drop); }

/* One a thread, until it ends: 1 MiB, whose pages would cost more than they bring if it were a new one each time. */
static Scratch *scratch(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, keep);
    Scratch *own = pthread_getspecific(kept);
    if (own) return own;
    own = mmap(NULL, sizeof *own, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (own == MAP_FAILED) return NULL;
    pthread_setspecific(kept, own);
    return own;
}

static inline float constant_of(Stored w, int64_t b) {
    return w.absmax8 ? w.table8[w.absmax8[b]] * w.scale[b / 256] + *w.offset : w.absmax[b];
}

static inline int64_t block_of(Stored w, int64_t row, int64_t column) { return (row * w.in + column) >> w.shift; }

/* Where in a panel the pairs of term k of the next 16 columns lie; tiles of 32 terms, two beside each other. */
static inline bf16 *pairs(bf16 *panel, int64_t column, int64_t k) {
    return panel + column / 32 * 32 * DEPTH + k / 32 * 2 * TILE + column % 32 / 16 * TILE + k % 32 / 2 * 32;
}

/* 4 bits, forward: 16 outputs, 128 inputs at a time, whose codes are turned so that a vector holds 8 of each output. */
static void forward4(Stored w, int64_t o, int64_t column, int64_t k0, int64_t depth, bf16 *panel) {
    const __m512 table = _mm512_loadu_ps(w.table4);
    for (int64_t k = 0; k < depth; k += 128) {
        int words = (int)smaller(depth - k, 128) / 8;
        __m512i r[16];
        float factors[2][16];
        int64_t block = block_of(w, o, k0 + k), next = block_of(w, o, k0 + k + 64), a_row = w.in >> w.shift;
        for (int n = 0; n < 16; n++) {
            const uint8_t *codes = w.codes + ((o + n) * w.in + k0 + k) / 2;
            r[n] = _mm512_maskz_loadu_epi32((__mmask16)((1u << words) - 1), codes);
            _mm_prefetch(codes + PANEL * w.in / 2, _MM_HINT_T1); /* of the next panel: short rows are no stream */
            factors[0][n] = constant_of(w, block + n * a_row);
            if (words > 8) factors[1][n] = constant_of(w, next + n * a_row);
        }
        turn(r);
        for (int d = 0; d < words; d++) {
            __m512 factor = _mm512_loadu_ps(factors[d / 8]);
            bf16 *to = pairs(panel, column, k + 8 * d);
            for (int j = 0; j < 4; j++) {
                __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(r[d], 8 * j + 4), table);
                __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(r[d], 8 * j), table);
                _mm512_store_si512(to + 32 * j, in_turn(_mm512_mul_ps(even, factor), _mm512_mul_ps(odd, factor)));
            }
        }
    }
}

/* int8, forward: 16 outputs, 64 inputs at a time, turned so that a vector holds 4 of each output. */
static void forward8(Stored w, int64_t o, int64_t column, int64_t k0, int64_t depth, bf16 *panel) {
    const __m512 constants = _mm512_loadu_ps(w.absmax + o), part = _mm512_set1_ps(1.0f / 127);
    for (int64_t k = 0; k < depth; k += 64) {
        __m512i r[16];
        for (int n = 0; n < 16; n++) {
            const uint8_t *codes = w.codes + (o + n) * w.in + k0 + k;
            r[n] = _mm512_loadu_si512(codes);
            _mm_prefetch(codes + PANEL * w.in, _MM_HINT_T1);
        }
        turn(r);
        for (int d = 0; d < 16; d++) {
            __m512 value[4];
            for (int j = 0; j < 4; j++) {
                __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(r[d], 24 - 8 * j), 24);
                value[j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(code), constants), part);
            }
            bf16 *to = pairs(panel, column, k + 4 * d);
            _mm512_store_si512(to, in_turn(value[0], value[1]));
            _mm512_store_si512(to + 32, in_turn(value[2], value[3]));
        }
    }
}

/* 32 values of a row of 4-bit codes, of one block whose 16 values are `table`. */
static inline __m512i values4(Stored w, int64_t row, int64_t column, __m512i table) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w.codes + (row * w.in + column) / 2)));
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16)), table);
}

static inline __m512i table_of(Stored w, int64_t row, int64_t column) {
    __m512 made = _mm512_mul_ps(_mm512_loadu_ps(w.table4), _mm512_set1_ps(constant_of(w, block_of(w, row, column))));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(made));
}

/* 4 bits, back: 64 inputs. Of every 32 the even ones come first, then the odd ones, as halves of a word bring them. */
static void back4(Stored w, int64_t i, int64_t o0, int64_t depth, bf16 *panel) {
    for (int64_t k = 0; k < depth; k += 2) {
        __m512i one = table_of(w, o0 + k, i), other = table_of(w, o0 + k + 1, i);
        _mm_prefetch(w.codes + ((o0 + k) * w.in + i + 2 * PANEL) / 2, _MM_HINT_T1);
        _mm_prefetch(w.codes + ((o0 + k + 1) * w.in + i + 2 * PANEL) / 2, _MM_HINT_T1);
        for (int p = 0; p < PANEL; p += 32) {
            __m512i a = values4(w, o0 + k, i + p, one), b = values4(w, o0 + k + 1, i + p, other);
            _mm512_store_si512(pairs(panel, p, k), _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
            __m512i odd = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
            _mm512_store_si512(pairs(panel, p + 16, k), odd);
        }
    }
}

static inline __m512 values8(Stored w, int64_t row, int64_t column) {
    __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w.codes + row * w.in + column)));
    __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(w.absmax[row]));
    return _mm512_mul_ps(product, _mm512_set1_ps(1.0f / 127));
}

/* int8, back: 64 inputs. */
static void back8(Stored w, int64_t i, int64_t o0, int64_t depth, bf16 *panel) {
    for (int64_t k = 0; k < depth; k += 2) {
        _mm_prefetch(w.codes + (o0 + k) * w.in + i + PANEL, _MM_HINT_T1);
        _mm_prefetch(w.codes + (o0 + k + 1) * w.in + i + PANEL, _MM_HINT_T1);
        for (int p = 0; p < PANEL; p += 16)
            _mm512_store_si512(pairs(panel, p, k), in_turn(values8(w, o0 + k, i + p), values8(w, o0 + k + 1, i + p)));
    }
}

/* `columns` columns of W, from the n-th: 64, or forward 32 where no more are left. */
static void decode_panel(const Stored *w, int back, int64_t n, int64_t columns, int64_t k0, int64_t depth,
                         bf16 *panel) {
    if (back) {
        (w->table4 ? back4 : back8)(*w, n, k0, depth, panel);
        return;
    }
    for (int64_t c = 0; c < columns; c += 16) (w->table4 ? forward4 : forward8)(*w, n + c, c, k0, depth, panel);
}

/* 32 columns of the result, rounded. */
static void give(const float *sums, int64_t rows, int is_in_turn, const bf16 *bias, bf16 *y, int64_t stride) {
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias) {
        low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bias)), 16);
        high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bias + 16))), 16);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float *from = sums + r / 16 * 2 * SUM + r % 16 * 16;
        __m512 a = _mm512_add_ps(_mm512_load_ps(from), low), b = _mm512_add_ps(_mm512_load_ps(from + SUM), high);
        _mm512_storeu_si512(y + r * stride, is_in_turn ? in_turn(a, b) : (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
}

/* Columns n0 to `end` of some rows of the result, of which x is given in tiles, DEPTH terms after others. */
static void multiply_block(const bf16 *tiles, int64_t rows, const Stored *w, int back, const bf16 *bias, int64_t n0,
                           int64_t end, Scratch *s, bf16 *y) {
    int64_t depth = back ? w->out : w->in, width = back ? w->in : w->out, padded = (rows + 31) / 32 * 32;
    for (int64_t k0 = 0; k0 < depth; k0 += DEPTH) {
        int64_t terms = smaller(depth - k0, DEPTH);
        for (int64_t n = n0; n < end; n += PANEL) {
            int64_t columns = smaller(end - n, PANEL);
            decode_panel(w, back, n, columns, k0, terms, s->panel);
            WRITTEN(s->panel);
            for (int64_t c = 0; c < columns; c += 32)
                multiply_panel(tiles + k0 * whole_tiles(rows), rows, s->panel + c * DEPTH, terms, k0 == 0,
                               s->sums + padded * (n - n0 + c));
        }
    }
    for (int64_t n = n0; n < end; n += 32)
        give(s->sums + padded * (n - n0), rows, back && w->table4, bias ? bias + n : bias, y + n, width);
}

/* 1 if the processor multiplies tiles, and the system lets this process. */
int multiplies_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

/* y = x W^T + bias or, with `back`, y = x W. Inputs are a multiple of 64 and of the block, which is a multiple of 64;
   outputs are a multiple of 32. `space` is of the size of the decoded matrix. Not 0 where there is no memory. */
int multiply_stored(const bf16 *x, int64_t rows, const Stored *w, int back, const bf16 *bias, bf16 *space, bf16 *y,
                    int threads) {
    if (rows == 0) return 0;
    int64_t width = back ? w->in : w->out, depth = back ? w->out : w->in;
    int64_t at_once = smaller(smaller(rows, ROWS), width); /* in tiles no more than `space` holds */
    int64_t fitting = SUMS / ((at_once + 31) / 32 * 32) / PANEL * PANEL;
    int64_t share = (width + threads - 1) / threads;
    int64_t block = smaller(fitting, (share + PANEL - 1) / PANEL * PANEL);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch *s = scratch();
        begin_tiles();
        if (!s) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t r = 0; r < rows; r += at_once) {
            int64_t part = smaller(rows - r, at_once);
#pragma omp for
            for (int64_t k = 0; k < depth; k += DEPTH)
                pack(x + r * depth + k, depth, part, whole_tiles(part), smaller(depth - k, DEPTH),
                     space + k * whole_tiles(part));
#pragma omp for
            for (int64_t n = 0; n < width; n += block)
                if (s) multiply_block(space, part, w, back, bias, n, smaller(n + block, width), s, y + r * width);
        }
        _tile_release();
    }
    return failed;
}
#endif
