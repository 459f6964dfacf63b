/* 4-bit and int8 codes of a matrix, bit for bit as bitsandbytes computes them in torch (see base/quantizer.py).

   Compiled at the first use (see __init__.py), without contraction (-ffp-contract=off): a fused multiply-add would round
   once where torch rounds twice. Loops are written for the compiler to vectorise; sizes are checked by the caller. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { MOST = 4096, BOUNDS = 15, FP32 = 0, BF16 = 1, FP16 = 2 };

static const float LEAST = 1e-38f; /* below it bitsandbytes divides by this */

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The exponent is moved from a bias of 15 to one of 127. A subnormal is read beside 2^-14, which is taken off again,
   so that no operand is a subnormal of fp32: those are zero where a process flushes them. */
static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
    const uint32_t exponent = rest & 0x0f800000u;
    const float subnormal = as_float(rest + (113u << 23)) - as_float(113u << 23);
    const uint32_t normal = rest + ((exponent == 0x0f800000u ? 224u : 112u) << 23);
    return as_float((exponent == 0 ? as_bits(subnormal) : normal) | sign);
}

static void read_values(const void *weights, int dtype, int64_t begin, int64_t count, float *x) {
    if (dtype == FP32) {
        memcpy(x, (const float *)weights + begin, (size_t)count * sizeof *x);
    } else if (dtype == BF16) {
        const uint16_t *from = (const uint16_t *)weights + begin;
        for (int64_t i = 0; i < count; i++) x[i] = as_float((uint32_t)from[i] << 16);
    } else {
        const uint16_t *from = (const uint16_t *)weights + begin;
        for (int64_t i = 0; i < count; i++) x[i] = from_half(from[i]);
    }
}

/* The largest magnitude: as bits, since those sort like the numbers, and a NaN lies above all. */
static float largest(const float *x, int64_t count) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t magnitude = as_bits(x[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
    }
    return as_float(most);
}

/* A NaN is above all bounds here, as it is in torch.bucketize. */
static void count_bounds(const float *x, int64_t count, const float *bounds, uint8_t *codes) {
    for (int64_t i = 0; i < count; i++) {
        int32_t below = 0;
        for (int k = 0; k < BOUNDS; k++) below += !(bounds[k] >= x[i]);
        codes[i] = (uint8_t)below;
    }
}

static float clamped(float x) {
    x = x < -1.0f ? -1.0f : x;
    return x > 1.0f ? 1.0f : x;
}

/* weights: `count` values of `dtype`; bounds: 15, ascending; order: the code of each interval, 16;
   packed: (count + 1) / 2 bytes; absmax: one for each block. block: even, at most 4096. */
void qlora_kit_quantize_4bit(const void *weights, int dtype, int64_t count, int64_t block, const float *bounds,
                             const uint8_t *order, uint8_t *packed, float *absmax, int threads) {
    float limits[BOUNDS];
    uint8_t pairs[256];
    memcpy(limits, bounds, sizeof limits);
    for (int i = 0; i < 256; i++) pairs[i] = (uint8_t)(order[i >> 4] << 4 | order[i & 15]);
    int is_sorted = 1;
    for (int i = 0; i < 16; i++) is_sorted &= order[i] == i;

    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < count; begin += block) {
        float x[MOST];
        uint8_t codes[MOST];
        const int is_whole = begin + block <= count;
        const int64_t size = is_whole ? block : count - begin;
        read_values(weights, dtype, begin, size, x);
        const float most = largest(x, size), divisor = most < LEAST ? LEAST : most, factor = 1.0f / divisor;
        if (is_whole) {
            for (int64_t i = 0; i < size; i++) x[i] = clamped(x[i] * factor);
        } else {
            for (int64_t i = 0; i < size; i++) x[i] = clamped(x[i] / divisor);
        }
        if (size % 2) x[size] = 0.0f;
        const int64_t even = size + size % 2;
        count_bounds(x, even, limits, codes);
        uint8_t *out = packed + begin / 2;
        for (int64_t i = 0; i < even / 2; i++) out[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
        if (!is_sorted) {
            for (int64_t i = 0; i < even / 2; i++) out[i] = pairs[out[i]];
        }
        absmax[begin / block] = is_whole ? most : divisor;
    }
}

/* halves: rows * width values of fp16; codes: as many; absmax: one for each row. A NaN becomes 0, as in torch. */
void qlora_kit_quantize_int8(const uint16_t *halves, int64_t rows, int64_t width, int8_t *codes, float *absmax,
                             int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *from = halves + row * width;
        int8_t *to = codes + row * width;
        uint16_t most = 0;
        for (int64_t i = 0; i < width; i++) {
            const uint16_t magnitude = from[i] & 0x7fffu;
            most = magnitude > most ? magnitude : most;
        }
        absmax[row] = from_half(most);
        const float factor = 1.0f / absmax[row] * 127.0f;
        for (int64_t i = 0; i < width; i++) {
            const float code = rintf(from_half(from[i]) * factor);
            to[i] = (int8_t)(code == code ? (int32_t)code : 0);
        }
    }
}
