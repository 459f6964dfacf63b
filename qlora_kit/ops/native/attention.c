/* Causal attention over documents that lie end to end, forth and back, on processors that multiply tiles (Intel AMX).

       S = scale Q K^T       P = softmax(S), of a token and those of its document before it, up to a window
       O = P V               lse = log of the sum behind P

       dV = P^T dO           dP = dO V^T           dS = P (dP - sum_d(dO O))
       dQ = scale dS K       dK = scale dS^T Q

   A document is padded to whole tiles where it is packed, and nowhere else. Each is read by itself, its scores in blocks
   that the caches hold; which of them others lie beside, and how many threads there are, changes no bit of it. Products
   take bfloat16 and sum in fp32; P and dS are rounded to bfloat16 for theirs, all else is fp32.

   Several heads may share keys and values. Counts, widths and strides are in elements. Nothing here checks its
   arguments: ops/attention.py does. */

#include "amx.h"
#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* A tensor of (tokens, heads, width); values of a head lie side by side. */
typedef struct {
    bf16 *data;
    int64_t token, head;
} Heads;

typedef struct {
    Heads q, k, v, out, d_out, dq, dk, dv;
    float *lse; /* (tokens, heads) */
    const int64_t *starts; /* of each document, and where the last ends */
    int64_t documents, heads, groups, width, window;
    float scale;
} Attention;

#ifndef TILES

int64_t attention_room(int64_t tokens, int64_t width, int is_back) {
    (void)tokens, (void)width, (void)is_back;
    return 0;
}

void attend(const Attention *a, float *space, int64_t room, int threads) {
    (void)a, (void)space, (void)room, (void)threads;
}

void attend_back(const Attention *a, float *space, int64_t room, int threads) {
    (void)a, (void)space, (void)room, (void)threads;
}

#else

enum {
    QUERIES = 64, /* forth: rows of P at once */
    BLOCK = 128   /* back: rows and columns of P at once; its sums are 64 KiB, of 2 MiB in the second cache */
};

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t padded(int64_t tokens) { return (tokens + 31) / 32 * 32; }

static inline bf16 *at(Heads x, int64_t token, int64_t head) { return x.data + token * x.token + head * x.head; }

/* e^x of kernels.c by vectors, where that of a masked score must be nothing and cost nothing: zero before it is denormal,
   whose sums are slow. What is no number stays so. */
static inline __m512 exponential(__m512 x) {
    __mmask16 is_there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(is_there, sum, n);
}

static inline __m512i both(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

static inline __m512i row_of(const bf16 *x, int64_t stride, int64_t row, int64_t rows) {
    return row < rows ? _mm512_loadu_si512(x + row * stride) : _mm512_setzero_si512();
}

/* Panels of a head whose columns are its tokens and whose terms are the width. */
static void pack_columns(const bf16 *x, int64_t stride, int64_t tokens, int64_t width, bf16 *panels) {
    for (int64_t c = 0; c < padded(tokens); c += 16)
        for (int64_t k = 0; k < width; k += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = row_of(x + k, stride, c + i, tokens);
            turn(r);
            bf16 *to = panels + c / 32 * 32 * width + k / 32 * 2 * TILE + c % 32 / 16 * TILE;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 32 * i, r[i]);
        }
}

/* Panels of a head whose columns are the width and whose terms are its tokens. */
static void pack_terms(const bf16 *x, int64_t stride, int64_t tokens, int64_t width, bf16 *panels) {
    int64_t terms = padded(tokens);
    __m512i low, high;
    short order[32];
    for (int i = 0; i < 16; i++) order[2 * i] = (short)i, order[2 * i + 1] = (short)(i + 32);
    low = _mm512_loadu_si512(order);
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < terms; k += 2)
        for (int64_t c = 0; c < width; c += 32) {
            __m512i one = row_of(x + c, stride, k, tokens), other = row_of(x + c, stride, k + 1, tokens);
            bf16 *to = panels + c * terms + k / 32 * 2 * TILE + k % 32 / 2 * 32;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, low, other));
            _mm512_storeu_si512(to + TILE, _mm512_permutex2var_epi16(one, high, other));
        }
}

/* Of 16 places those from one to before another, which may lie outside. */
static inline __mmask16 between(int64_t begin, int64_t end) {
    begin = larger(0, begin), end = smaller(16, end);
    return end <= begin ? 0 : (__mmask16)((1u << end) - (1u << begin));
}

/* Of 16 keys from the first, those that a query sees. */
static inline __mmask16 seen(int64_t query, int64_t first, int64_t window) {
    return between(query - window + 1 - first, query + 1 - first);
}

/* Rows of sums, `part` of them a panel, each times its factor. */
static void give_rows(const float *sums, int64_t part, const float *factors, float factor, int64_t rows, int64_t width,
                      bf16 *y, int64_t stride) {
    for (int64_t r = 0; r < rows; r++) {
        __m512 times = _mm512_set1_ps(factors ? factors[r] : factor);
        for (int64_t c = 0; c < width; c += 32) {
            const float *from = sums + c * part + r / 16 * 2 * SUM + r % 16 * 16;
            __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from), times);
            __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + SUM), times);
            _mm512_storeu_si512(y + r * stride + c, both(low, high));
        }
    }
}

/* Scores of a query, whose sums lie `part` rows a panel, become its row of P, not yet divided by its sum. */
static void soften(const float *sums, int64_t part, int64_t query, int64_t first, int64_t end, int64_t window,
                   float scale, bf16 *row, float *factor, float *lse) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    for (int64_t k = first; k < end; k += 16) {
        __m512 s = _mm512_loadu_ps(sums + (k - first) / 32 * 32 * part + k % 32 / 16 * SUM);
        top = _mm512_mask_max_ps(top, seen(query, k, window), top, _mm512_mul_ps(s, by));
    }
    float most = _mm512_reduce_max_ps(top);
    for (int64_t k = first; k < end; k += 32) {
        __m512 p[2];
        for (int t = 0; t < 2; t++) {
            __m512 s = _mm512_loadu_ps(sums + (k - first) / 32 * 32 * part + t * SUM);
            s = exponential(_mm512_fmsub_ps(s, by, _mm512_set1_ps(most)));
            p[t] = _mm512_maskz_mov_ps(seen(query, k + 16 * t, window), s);
            total = _mm512_add_ps(total, p[t]);
        }
        _mm512_storeu_si512(row + (k - first) / 32 * TILE, both(p[0], p[1]));
    }
    float sum = _mm512_reduce_add_ps(total);
    *factor = 1.0f / sum;
    *lse = most + logf(sum);
}

/* Floats that `attend` works in, for documents of so many tokens. */
static int64_t room_forth(int64_t n, int64_t width) {
    return n * width + QUERIES * (width / 2 + n + n / 2 + width + 1);
}

static void attend_one(const Attention *a, int64_t document, int64_t group, float *space) {
    int64_t start = a->starts[document], tokens = a->starts[document + 1] - start, n = padded(tokens), d = a->width;
    int64_t shared = a->heads / a->groups;
    bf16 *k = (bf16 *)space, *v = k + n * d, *q = v + n * d, *p = q + QUERIES * d;
    float *s = (float *)(p + QUERIES * n), *o = s + QUERIES * n, *factors = o + QUERIES * d;
    pack_columns(at(a->k, start, group), a->k.token, tokens, d, k);
    pack_terms(at(a->v, start, group), a->v.token, tokens, d, v);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t r = 0; r < tokens; r += QUERIES) {
            int64_t rows = smaller(QUERIES, tokens - r), part = padded(rows), end = smaller(n, r + part);
            int64_t first = larger(0, r - a->window + 1) / 32 * 32, depth = end - first;
            pack(at(a->q, start + r, head), a->q.token, rows, part, d, q);
            WRITTEN(q);
            for (int64_t c = first; c < end; c += 32) multiply_panel(q, part, k + c * d, d, 1, s + (c - first) * part);
            for (int64_t i = 0; i < part; i++) {
                bf16 *row = p + i / 16 * 16 * depth + i % 16 * 32;
                if (i < rows)
                    soften(s + i / 16 * 2 * SUM + i % 16 * 16, part, r + i, first, end, a->window, a->scale, row,
                           factors + i, a->lse + (start + r + i) * a->heads + head);
                else
                    for (int64_t c = 0; c < depth; c += 32) memset(row + c / 32 * TILE, 0, 64);
            }
            WRITTEN(p);
            for (int64_t c = 0; c < d; c += 32)
                multiply_panel(p, part, v + c * n + first / 32 * 2 * TILE, depth, 1, o + c * part);
            give_rows(o, part, factors, 1, rows, d, at(a->out, start + r, head), a->out.token);
        }
}

typedef struct {
    bf16 *q, *k, *d_out, *q_columns, *d_out_columns, *k_rows, *v_rows; /* of a document, in panels or tiles */
    bf16 *p, *ds, *ds_back;                                           /* of a block: P^T, dS^T and dS */
    float *dq, *dk, *dv, *s, *dp, *lse, *delta;
} Back;

/* Floats that `attend_back` works in. */
static int64_t room_back(int64_t n, int64_t width) {
    return 7 * n * width / 2 + 3 * BLOCK * BLOCK / 2 + 3 * n * width + 2 * BLOCK * BLOCK + 2 * n;
}

static Back parts_of(float *space, int64_t n, int64_t width) {
    Back b;
    bf16 **packed[] = {&b.q, &b.k, &b.d_out, &b.q_columns, &b.d_out_columns, &b.k_rows, &b.v_rows};
    bf16 **blocks[] = {&b.p, &b.ds, &b.ds_back};
    float **sums[] = {&b.dq, &b.dk, &b.dv};
    for (int i = 0; i < 7; i++, space += n * width / 2) *packed[i] = (bf16 *)space;
    for (int i = 0; i < 3; i++, space += BLOCK * BLOCK / 2) *blocks[i] = (bf16 *)space;
    for (int i = 0; i < 3; i++, space += n * width) *sums[i] = space;
    b.s = space, b.dp = b.s + BLOCK * BLOCK, b.lse = b.dp + BLOCK * BLOCK, b.delta = b.lse + n;
    return b;
}

/* 32 keys and 32 queries of P^T and dS^T, in tiles that have `queries` terms a row, and of dS, which has `keys`. */
static void differentiate(const Attention *a, Back b, const float *s, const float *dp, int64_t key, int64_t query,
                          bf16 *p, bf16 *ds, int64_t queries, bf16 *ds_back, int64_t keys) {
    __m512 p_of[2][32], ds_of[2][32], scale = _mm512_set1_ps(a->scale);
    int is_whole = query >= key + 31 && query + 31 - key < a->window;
    for (int t = 0; t < 2; t++) {
        __m512 lse = _mm512_loadu_ps(b.lse + query + 16 * t), delta = _mm512_loadu_ps(b.delta + query + 16 * t);
        for (int i = 0; i < 32; i++) {
            int64_t from = i / 16 * 2 * SUM + t * SUM + i % 16 * 16, nearest = key + i - query - 16 * t;
            __m512 made = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(s + from), scale, lse));
            if (!is_whole) made = _mm512_maskz_mov_ps(between(nearest, nearest + a->window), made);
            p_of[t][i] = made;
            ds_of[t][i] = _mm512_mul_ps(made, _mm512_sub_ps(_mm512_loadu_ps(dp + from), delta));
        }
    }
    for (int i = 0; i < 32; i++) {
        int64_t to = i / 16 * 16 * queries + i % 16 * 32;
        _mm512_storeu_si512(p + to, both(p_of[0][i], p_of[1][i]));
        _mm512_storeu_si512(ds + to, both(ds_of[0][i], ds_of[1][i]));
    }
    for (int t = 0; t < 2; t++) {
        turn((__m512i *)ds_of[t]);
        turn((__m512i *)(ds_of[t] + 16));
        for (int i = 0; i < 16; i++)
            _mm512_storeu_si512(ds_back + t * 16 * keys + i * 32, both(ds_of[t][i], ds_of[t][i + 16]));
    }
}

/* What a block of keys, from the j-th, and one of queries, from the i-th, bring to each other. */
static void back_block(const Attention *a, Back b, int64_t n, int64_t j, int64_t i) {
    int64_t d = a->width, keys = smaller(BLOCK, n - j), queries = smaller(BLOCK, n - i);
    int is_diagonal = i == j; /* there the first queries do not see the last keys */
    for (int64_t c = 0; c < queries; c += 32)
        for (int64_t r = 0; r < (is_diagonal ? c + 32 : keys); r += 32) {
            float *s = b.s + c * keys + r * 32, *dp = b.dp + c * keys + r * 32;
            multiply_four(b.k_rows + (j + r) * d, d, b.q_columns + (i + c) * d, d, 1, s);
            multiply_four(b.v_rows + (j + r) * d, d, b.d_out_columns + (i + c) * d, d, 1, dp);
            differentiate(a, b, s, dp, j + r, i + c, b.p + r * queries + c / 32 * TILE,
                          b.ds + r * queries + c / 32 * TILE, queries, b.ds_back + c * keys + r / 32 * TILE, keys);
        }
    WRITTEN(b.p);
    for (int64_t c = 0; c < d; c += 32) {
        for (int64_t r = 0; r < keys; r += 32) {
            int64_t begin = is_diagonal ? r : 0, depth = queries - begin, from = c * n + (i + begin) / 32 * 2 * TILE;
            int64_t tile = r * queries + begin / 32 * TILE, to = c * n + (j + r) * 32;
            multiply_four(b.p + tile, queries, b.d_out + from, depth, 0, b.dv + to);
            multiply_four(b.ds + tile, queries, b.q + from, depth, 0, b.dk + to);
        }
        for (int64_t r = 0; r < queries; r += 32)
            multiply_four(b.ds_back + r * keys, keys, b.k + c * n + j / 32 * 2 * TILE, is_diagonal ? r + 32 : keys, 0,
                          b.dq + c * n + (i + r) * 32);
    }
}

static float product(const bf16 *x, const bf16 *y, int64_t width) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += 16) {
        __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(x + k)));
        __m512i other = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(y + k)));
        sum = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(one, 16), (__m512)_mm512_slli_epi32(other, 16), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

static void back_one(const Attention *a, int64_t document, int64_t group, float *space) {
    int64_t start = a->starts[document], tokens = a->starts[document + 1] - start, n = padded(tokens), d = a->width;
    int64_t shared = a->heads / a->groups;
    Back b = parts_of(space, n, d);
    pack(at(a->k, start, group), a->k.token, tokens, n, d, b.k_rows);
    pack(at(a->v, start, group), a->v.token, tokens, n, d, b.v_rows);
    pack_terms(at(a->k, start, group), a->k.token, tokens, d, b.k);
    memset(b.dk, 0, (size_t)(2 * n * d) * sizeof *b.dk); /* and dv */
    for (int64_t head = group * shared; head < (group + 1) * shared; head++) {
        const bf16 *q = at(a->q, start, head), *d_out = at(a->d_out, start, head), *out = at(a->out, start, head);
        pack_columns(q, a->q.token, tokens, d, b.q_columns);
        pack_columns(d_out, a->d_out.token, tokens, d, b.d_out_columns);
        pack_terms(q, a->q.token, tokens, d, b.q);
        pack_terms(d_out, a->d_out.token, tokens, d, b.d_out);
        for (int64_t r = 0; r < n; r++) { /* a query that is not there sees nothing */
            b.lse[r] = r < tokens ? a->lse[(start + r) * a->heads + head] : INFINITY;
            b.delta[r] = r < tokens ? product(d_out + r * a->d_out.token, out + r * a->out.token, d) : 0.0f;
        }
        memset(b.dq, 0, (size_t)(n * d) * sizeof *b.dq);
        WRITTEN(b.q);
        for (int64_t j = 0; j < n; j += BLOCK)
            for (int64_t i = j; i < n && i - j - BLOCK < a->window; i += BLOCK) back_block(a, b, n, j, i);
        give_rows(b.dq, n, NULL, a->scale, tokens, d, at(a->dq, start, head), a->dq.token);
    }
    give_rows(b.dk, n, NULL, a->scale, tokens, d, at(a->dk, start, group), a->dk.token);
    give_rows(b.dv, n, NULL, 1.0f, tokens, d, at(a->dv, start, group), a->dv.token);
}

static void over_all(const Attention *a, float *space, int64_t room, int threads,
                     void (*one)(const Attention *, int64_t, int64_t, float *)) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        float *own = space + omp_get_thread_num() * room;
#else
        float *own = space;
#endif
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a->documents * a->groups; i++) one(a, i / a->groups, i % a->groups, own);
        _tile_release();
    }
}

/* Floats that a thread works in where no document has more tokens: whole lines of the caches. */
int64_t attention_room(int64_t tokens, int64_t width, int is_back) {
    return ((is_back ? room_back : room_forth)(padded(tokens), width) + 15) / 16 * 16;
}

void attend(const Attention *a, float *space, int64_t room, int threads) {
    over_all(a, space, room, threads, attend_one);
}

void attend_back(const Attention *a, float *space, int64_t room, int threads) {
    over_all(a, space, room, threads, back_one);
}
#endif
