/* What eager torch does in many passes over memory, in one: for a CPU, compiled where it runs (see __init__.py).

   Each function has a twin in plain torch beside the operator that calls it. Pointers are to contiguous memory; counts
   and widths are in elements. A 16-bit float is bfloat16. Nothing here checks its arguments: the operators do. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

enum { LANES = 16 };  /* partial sums, so that a sum of floats fills a vector register without -ffast-math */
enum { STREAMED = 48 << 20 }; /* bytes that a core's share of the caches does not keep: 90 MB lost by it, 33 gained */
enum { PART = 1024 }; /* floats whose sum is fp32; longer sums are of these, in double */

typedef uint16_t bf16;

#ifdef __FMA__
#define FMA(a, b, c) fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; what is no number stays so, whatever its payload. */
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

/* e^y to about one unit in the last place: 2^n times a Taylor polynomial on |r| <= ln(2) / 2. */
static inline float exponential(float y) {
    float x = y < -87.0f ? -87.0f : y;
    x = x > 88.0f ? 88.0f : x;
    float n = FMA(x, 1.44269504f, 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float r = FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, x));
    float sum = FMA(r, 1.0f / 5040, 1.0f / 720);
    sum = FMA(sum, r, 1.0f / 120);
    sum = FMA(sum, r, 1.0f / 24);
    sum = FMA(sum, r, 1.0f / 6);
    sum = FMA(sum, r, 0.5f);
    sum = FMA(sum, r, 1.0f);
    sum = FMA(sum, r, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y > 88.0f ? INFINITY : sum * power;
}

/* e^y of a softmax, whose y is at most 0: nothing of what is masked out. */
static inline float share(float y) { return y < -87.0f ? 0.0f : exponential(y); }

/* tanh(x); near zero by its series, where the difference of two halves would lose them. */
static inline float tangent(float x) {
    float s = x * x;
    float series = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
    return s < 0.0625f ? series : 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
}

/* Of a logit in the product that it was made of. */
static inline float slope(float z, float scale, float cap) {
    return cap > 0.0f ? scale * (1.0f - z / cap * (z / cap)) : scale;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float total(const float *lanes) {
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

#define FLOAT bf16
#define NAME(name) name##_bf16
#define READ(x) wide(x)
#define WRITE(x) narrow(x)
#include "typed.h"
#undef FLOAT
#undef NAME
#undef READ
#undef WRITE

#define FLOAT float
#define NAME(name) name##_fp32
#define READ(x) (x)
#define WRITE(x) (x)
#include "typed.h"

/* 1 where decode_4bit_bf16 is faster than bitsandbytes' function, which has vector code for more processors. */
int decodes_fast(void) {
#ifdef __AVX512BW__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BW__
/* `narrow` of 16 numbers, twice, for an index of five bits whose first says nothing. */
static inline __m512i twice_narrow(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
}
#endif

/* One block to `to`; past the caches if it `streams`: a line that is written whole is then not read first. */
static inline void decode_block(const uint8_t *from, float constant, const float *table4, int64_t block, int streams,
                                bf16 *to) {
#ifdef __AVX512BW__
    __m512i table = twice_narrow(_mm512_mul_ps(_mm512_loadu_ps(table4), _mm512_set1_ps(constant)));
    for (int64_t i = 0; i < block / 2; i += 16) {
        __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + i)));
        __m512i both = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
        __m512i made = _mm512_permutexvar_epi16(both, table);
        if (streams)
            _mm512_stream_si512((__m512i *)(to + 2 * i), made);
        else
            _mm512_storeu_si512(to + 2 * i, made);
    }
#else
    (void)streams;
    bf16 values[16];
    for (int i = 0; i < 16; i++) values[i] = narrow(table4[i] * constant);
    for (int64_t i = 0; i < block / 2; i++) {
        to[2 * i] = values[from[i] >> 4];
        to[2 * i + 1] = values[from[i] & 15];
    }
#endif
}

/* A 4-bit matrix to bfloat16, each value rounded once from the fp32 product of table entry and constant.
   Constants are `absmax8` (table8[absmax8] * scale[of 256] + offset) or, where that is null, `absmax`. */
void decode_4bit_bf16(const uint8_t *codes, const uint8_t *absmax8, const float *scale, const float *offset,
                      const float *table8, const float *absmax, const float *table4, int64_t blocks, int64_t block,
                      bf16 *out, int threads) {
    (void)threads;
    int streams = blocks * block * (int64_t)sizeof(bf16) > STREAMED && (uintptr_t)out % 64 == 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t b = 0; b < blocks; b++) {
            float constant = absmax8 ? table8[absmax8[b]] * scale[b / 256] + *offset : absmax[b];
            decode_block(codes + b * block / 2, constant, table4, block, streams, out + b * block);
        }
#ifdef __AVX512BW__
        if (streams) _mm_sfence(); /* what another thread is to read next is there */
#endif
    }
}
