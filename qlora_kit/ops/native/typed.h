/* The kernels that exist for each type of float; included by kernels.c with FLOAT, NAME, READ and WRITE defined. */

static inline float NAME(rounded)(float x) { return READ(WRITE(x)); }

/* y = w round(x / rms(x)), or with `rounds_once` y = (one + w) x / rms(x); `inverse` gets 1 / rms(x). */
void NAME(rms_norm)(const FLOAT *x, const FLOAT *w, float epsilon, int rounds_once, float one, int64_t rows,
                    int64_t width, FLOAT *y, float *inverse, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const FLOAT *from = x + row * width;
        FLOAT *to = y + row * width;
        float lanes[LANES] = {0}, scale;
        int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            for (int k = 0; k < LANES; k++) lanes[k] += READ(from[i + k]) * READ(from[i + k]);
        for (int64_t i = whole; i < width; i++) lanes[i - whole] += READ(from[i]) * READ(from[i]);
        inverse[row] = scale = 1.0f / sqrtf(total(lanes) / (float)width + epsilon);
        if (rounds_once)
            for (int64_t i = 0; i < width; i++) to[i] = WRITE(READ(from[i]) * scale * (one + READ(w[i])));
        else
            for (int64_t i = 0; i < width; i++) to[i] = WRITE(NAME(rounded)(READ(from[i]) * scale) * READ(w[i]));
    }
}

/* dx = inverse * (g w - x inverse^2 mean(g w x)), with one + w for w */
void NAME(rms_norm_backward)(const FLOAT *g, const FLOAT *x, const FLOAT *w, const float *inverse, float one,
                             int64_t rows, int64_t width, FLOAT *dx, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const FLOAT *grad = g + row * width, *from = x + row * width;
        FLOAT *to = dx + row * width;
        float lanes[LANES] = {0}, scale = inverse[row];
        int64_t whole = width / LANES * LANES;
        for (int64_t i = 0; i < whole; i += LANES)
            for (int k = 0; k < LANES; k++)
                lanes[k] += READ(grad[i + k]) * (one + READ(w[i + k])) * READ(from[i + k]);
        for (int64_t i = whole; i < width; i++) lanes[i - whole] += READ(grad[i]) * (one + READ(w[i])) * READ(from[i]);
        float along = total(lanes) / (float)width * scale * scale;
        for (int64_t i = 0; i < width; i++)
            to[i] = WRITE(scale * (READ(grad[i]) * (one + READ(w[i])) - READ(from[i]) * along));
    }
}

/* out = round(gate(g)) * u; gate is SiLU, or with `is_gelu` GELU by its tanh formula. */
void NAME(gated)(const FLOAT *g, const FLOAT *u, int is_gelu, int64_t count, FLOAT *out, int threads) {
    (void)threads;
    if (is_gelu) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < count; i++) {
            float x = READ(g[i]);
            float share = 1.0f / (1.0f + exponential(-2.0f * 0.79788456f * (x + 0.044715f * x * x * x)));
            out[i] = WRITE(NAME(rounded)(x * share) * READ(u[i]));
        }
    } else {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < count; i++) {
            float x = READ(g[i]);
            out[i] = WRITE(NAME(rounded)(x / (1.0f + exponential(-x))) * READ(u[i]));
        }
    }
}

/* From the gradient of out those of g and u. */
void NAME(gated_backward)(const FLOAT *grad, const FLOAT *g, const FLOAT *u, int is_gelu, int64_t count, FLOAT *dg,
                          FLOAT *du, int threads) {
    (void)threads;
    if (is_gelu) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < count; i++) {
            float gate = READ(g[i]), d = READ(grad[i]);
            float x = gate > 16.0f ? 16.0f : gate; /* from where on the slope is 1, and soon x^3 no number */
            x = x < -16.0f ? -16.0f : x;
            float e = exponential(-2.0f * 0.79788456f * (x + 0.044715f * x * x * x));
            float share = 1.0f / (1.0f + e), rest = 1.0f / (1.0f + 1.0f / e);
            float slope = 2.0f * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
            du[i] = WRITE(d * NAME(rounded)(gate * share));
            dg[i] = WRITE(d * READ(u[i]) * (share + x * share * rest * slope));
        }
    } else {
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < count; i++) {
            float x = READ(g[i]), d = READ(grad[i]), share = 1.0f / (1.0f + exponential(-x));
            du[i] = WRITE(d * NAME(rounded)(x * share));
            dg[i] = WRITE(d * READ(u[i]) * share * (1.0f + x * (1.0f - share)));
        }
    }
}

/* out = code * absmax[row] * (1 / 127), rounded to fp32 after each product. */
void NAME(decode_int8)(const int8_t *codes, const float *absmax, int64_t rows, int64_t width, FLOAT *out, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * width; i < (row + 1) * width; i++)
            out[i] = WRITE((float)codes[i] * absmax[row] * (float)(1.0 / 127));
}
