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

static void NAME(turn)(const FLOAT *restrict x1, const FLOAT *restrict x2, const FLOAT *restrict cos1,
                       const FLOAT *restrict cos2, const FLOAT *restrict sin1, const FLOAT *restrict sin2, float sign,
                       int64_t half, FLOAT *restrict y1, FLOAT *restrict y2) {
    for (int64_t i = 0; i < half; i++) {
        float a = READ(x1[i]), b = READ(x2[i]);
        y1[i] = WRITE(NAME(rounded)(a * READ(cos1[i])) - NAME(rounded)(b * (sign * READ(sin1[i]))));
        y2[i] = WRITE(NAME(rounded)(b * READ(cos2[i])) + NAME(rounded)(a * (sign * READ(sin2[i]))));
    }
}

/* Halves of a head turned against each other by the angles of `turns` tokens, which come again and again; the way back
   turns by the same angles in the other direction. */
void NAME(rotary)(const FLOAT *x, const FLOAT *cos, const FLOAT *sin, int is_back, int64_t tokens, int64_t turns,
                  int64_t heads, int64_t width, FLOAT *y, int threads) {
    (void)threads;
    int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++) {
        const FLOAT *c = cos + token % turns * width, *s = sin + token % turns * width;
        for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
            const FLOAT *from = x + head * width;
            FLOAT *to = y + head * width;
            if (is_back)
                NAME(turn)(from, from + half, c, c + half, s + half, s, -1.0f, half, to, to + half);
            else
                NAME(turn)(from, from + half, c, c + half, s, s + half, 1.0f, half, to, to + half);
        }
    }
}

/* What a model makes of products: scaled and, where there is a cap, bent to stay below it. Behind the last of them, up to
   a multiple of LANES, stands what neither a maximum nor a sum of exponentials sees. */
static int64_t NAME(ruled)(const FLOAT *products, int64_t count, float scale, float cap, float *z) {
    int64_t whole = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = 0; i < count; i++) z[i] = READ(products[i]) * scale;
    if (cap > 0.0f)
        for (int64_t i = 0; i < count; i++) z[i] = cap * tangent(z[i] / cap);
    for (int64_t i = count; i < whole; i++) z[i] = -INFINITY;
    return whole;
}

/* Logits become the gradient of their loss, which goes to `losses`, both times `weight`; zero where a label is ignored. */
void NAME(softmax_gradient)(FLOAT *logits, const int64_t *labels, int64_t ignored, float weight, float scale, float cap,
                            int64_t rows, int64_t width, float *losses, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        FLOAT *from = logits + row * width;
        float z[PART], tops[LANES], top = -INFINITY, said, factor;
        double sum = 0.0;
        if (labels[row] == ignored) {
            memset(from, 0, (size_t)width * sizeof *from);
            losses[row] = 0.0f;
            continue;
        }
        NAME(ruled)(from + labels[row], 1, scale, cap, z);
        said = z[0];
        for (int k = 0; k < LANES; k++) tops[k] = top;
        for (int64_t begin = 0; begin < width; begin += PART) {
            int64_t count = NAME(ruled)(from + begin, smaller(PART, width - begin), scale, cap, z);
            for (int64_t i = 0; i < count; i += LANES)
                for (int k = 0; k < LANES; k++) tops[k] = z[i + k] > tops[k] ? z[i + k] : tops[k];
        }
        for (int k = 0; k < LANES; k++) top = tops[k] > top ? tops[k] : top;
        for (int64_t begin = 0; begin < width; begin += PART) {
            float lanes[LANES] = {0};
            int64_t count = NAME(ruled)(from + begin, smaller(PART, width - begin), scale, cap, z);
            for (int64_t i = 0; i < count; i += LANES)
                for (int k = 0; k < LANES; k++) lanes[k] += share(z[i + k] - top);
            sum += total(lanes);
        }
        factor = weight / (float)sum;
        for (int64_t begin = 0; begin < width; begin += PART) {
            int64_t count = smaller(PART, width - begin);
            NAME(ruled)(from + begin, count, scale, cap, z);
            if (cap > 0.0f)
                for (int64_t i = 0; i < count; i++)
                    from[begin + i] = WRITE(share(z[i] - top) * factor * slope(z[i], scale, cap));
            else
                for (int64_t i = 0; i < count; i++) from[begin + i] = WRITE(share(z[i] - top) * factor * scale);
        }
        from[labels[row]] = WRITE(weight * (share(said - top) / (float)sum - 1.0f) * slope(said, scale, cap));
        losses[row] = weight * ((float)log(sum) + (top - said));
    }
}
