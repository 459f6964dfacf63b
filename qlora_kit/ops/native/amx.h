/* What the code for processors that multiply tiles (Intel AMX) shares; TILES is defined where that is compiled.

   `tiles`: a matrix of rows and terms in tiles of 16 rows and 32 terms, those of a row of tiles one after another.
   `panel`: 32 columns of a matrix of terms and columns; of every 32 terms two tiles, 16 columns each, in whose rows the
   values of two terms take turns.
   `sums`: of rows and 32 columns, for every 16 rows two tiles of floats. */

/* clang 14 calls it __AMXBF16__. */
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#define TILES
#define _GNU_SOURCE
#include <immintrin.h>
#endif
#include <stdint.h>

typedef uint16_t bf16;

#ifdef TILES
/* gcc 12's intrinsics do not say that a tile is read from memory: what was stored there must stand before it. */
#define WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")

enum { TILE = 512, SUM = 256 }; /* elements: 16 rows of 32 bfloat16, 16 of 16 floats */

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Two vectors of 16 floats as bfloat16, in turn: a0 b0 a1 b1 ... */
static inline __m512i in_turn(__m512 a, __m512 b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

/* 16 vectors of 16 words, rows and columns exchanged. */
static inline void turn(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + k + 2]);
            r[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + k + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k += 8) {
            t[i + k] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0x88);
            t[i + k + 4] = _mm512_shuffle_i32x4(r[i + k], r[i + k + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* All tiles of this thread are 16 rows of 64 bytes from here on. */
static inline void begin_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    WRITTEN(&shape);
    _tile_loadconfig(&shape);
}

/* Rows in tiles. */
static inline int64_t whole_tiles(int64_t rows) { return (rows + 15) / 16 * 16; }

/* Some terms of x in tiles of 16 rows and 32 terms; rows that are not there, up to `whole`, are zero. */
static inline void pack(const bf16 *x, int64_t stride, int64_t rows, int64_t whole, int64_t depth, bf16 *tiles) {
    for (int64_t r = 0; r < whole; r++) {
        bf16 *to = tiles + r / 16 * 16 * depth + r % 16 * 32;
        for (int64_t k = 0; k < depth; k += 32) {
            __m512i values = r < rows ? _mm512_loadu_si512(x + r * stride + k) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + k * 16, values);
        }
    }
}

#define ALL(DO) DO(0, 0) DO(1, 1) DO(2, 2) DO(3, 3)
#define CLEAR(tile, place) _tile_zero(tile);
#define LOAD(tile, place) _tile_loadd(tile, sums + place * SUM, 64);
#define STORE(tile, place) _tile_stored(tile, sums + place * SUM, 64);

/* 32 rows and 32 columns of sums, and their next terms; a row of tiles has `stride` of them in all. */
static inline void multiply_four(const bf16 *tiles, int64_t stride, const bf16 *panel, int64_t depth, int is_first,
                                 float *sums) {
    const bf16 *below = tiles + 16 * stride;
    if (is_first) { ALL(CLEAR) } else { ALL(LOAD) }
    for (int64_t k = 0; k < depth / 32; k++) {
        _tile_loadd(6, panel + 2 * k * TILE, 64);
        _tile_loadd(4, tiles + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + (2 * k + 1) * TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + k * TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    ALL(STORE)
}

/* The same of 16 rows. */
static inline void multiply_two(const bf16 *tiles, const bf16 *panel, int64_t depth, int is_first, float *sums) {
    if (is_first) { CLEAR(0, 0) CLEAR(1, 1) } else { LOAD(0, 0) LOAD(1, 1) }
    for (int64_t k = 0; k < depth / 32; k++) {
        _tile_loadd(4, tiles + k * TILE, 64);
        _tile_loadd(6, panel + 2 * k * TILE, 64);
        _tile_loadd(7, panel + (2 * k + 1) * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    STORE(0, 0) STORE(1, 1)
}

static inline void multiply_panel(const bf16 *tiles, int64_t rows, const bf16 *panel, int64_t depth, int is_first,
                                  float *sums) {
    int64_t r = 0;
    for (; r + 16 < rows; r += 32) multiply_four(tiles + r * depth, depth, panel, depth, is_first, sums + r * 32);
    if (r < rows) multiply_two(tiles + r * depth, panel, depth, is_first, sums + r * 32);
}

#endif
