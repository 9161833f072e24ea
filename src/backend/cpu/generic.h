/* backend/cpu/generic.h: every kernel in plain C, written so that a compiler vectorises the 16 lanes. Each
 * kernels_<isa>.c includes it, compiled for its instruction set, and replaces what it has a better form of.
 * GEN_DOT32, when defined before, is the integer primitive of that instruction set. */
#ifndef ORCD_BACKEND_CPU_GENERIC_H
#define ORCD_BACKEND_CPU_GENERIC_H

#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "backend/cpu/kernels.h"
#include "base/half.h"

/* acc[r] += sum over 32 columns; w: [8 groups][16 rows][4 columns] */
#ifndef GEN_DOT32
static inline void gen_dot32(const int8_t *w, const int8_t *q, int32_t *acc) {
    for (int g = 0; g < 8; g++)
        for (int r = 0; r < 16; r++) {
            const int8_t *a = w + g * 64 + r * 4, *b = q + g * 4;
            acc[r] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
        }
}
#define GEN_DOT32 gen_dot32
#endif

/* acc[r] = sum over 32 columns of weight * (256 * high + low) of columns col, col + 1, ... of an integer row */
static inline void gen_dot32_16(const int8_t *w, const void *row, int64_t n64, int64_t col, int32_t *acc) {
    int32_t high[16] = {0}, low[16] = {0};
    GEN_DOT32(w, (const int8_t *)row + col, high);
    GEN_DOT32(w, (const int8_t *)row + n64 * 64 + col, low);
    for (int r = 0; r < 16; r++)
        acc[r] = high[r] * 256 + low[r];
}

/* 16 halves */
static inline void gen_f16x16(const void *h, float *f) {
#ifdef __F16C__
    for (int i = 0; i < 2; i++)
        _mm256_storeu_ps(f + i * 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h + i)));
#else
    for (int i = 0; i < 16; i++)
        f[i] = f32_from_f16(((const uint16_t *)h)[i]);
#endif
}

static inline void gen_dot_f32(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                               uint8_t *scratch) {
    (void)scratch;
    const float *w = (const float *)panel;
    for (int t = 0; t < n; t++) {
        const float *v = x[t];
        float a[2][16] = {{0}};
        for (int64_t k = 0; k < n_col; k++)
            for (int r = 0; r < 16; r++)
                a[k & 1][r] += w[k * 16 + r] * v[k];
        for (int r = 0; r < 16; r++)
            y[t * 16 + r] = a[0][r] + a[1][r];
    }
}

static inline void gen_dot_f16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                               uint8_t *scratch) {
    (void)scratch;
    const uint16_t *w = (const uint16_t *)panel;
    for (int t = 0; t < n; t++) {
        const float *v = x[t];
        float a[2][16] = {{0}}, f[16];
        for (int64_t k = 0; k < n_col; k++) {
            gen_f16x16(w + k * 16, f);
            for (int r = 0; r < 16; r++)
                a[k & 1][r] += f[r] * v[k];
        }
        for (int r = 0; r < 16; r++)
            y[t * 16 + r] = a[0][r] + a[1][r];
    }
}

static inline void gen_dot_bf16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                                uint8_t *scratch) {
    (void)scratch;
    const uint32_t *w = (const uint32_t *)panel;
    for (int t = 0; t < n; t++) {
        const float *v = x[t];
        float a[2][16] = {{0}};
        for (int64_t k = 0; k < n_col; k += 2) {
            const uint32_t *p = w + k / 2 * 16;
            float v1 = k + 1 < n_col ? v[k + 1] : 0;
            for (int r = 0; r < 16; r++) {
                a[0][r] += f32_from_bits(p[r] << 16) * v[k];
                a[1][r] += f32_from_bits(p[r] & 0xffff0000u) * v1;
            }
        }
        for (int r = 0; r < 16; r++)
            y[t * 16 + r] = a[0][r] + a[1][r];
    }
}

static inline void gen_dot_i8(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                              uint8_t *scratch) {
    (void)scratch;
    int64_t n64 = cpu_n64(n_col);
    memset(y, 0, (size_t)n * 64);
    for (int64_t b = 0; b < n64; b++, panel += 1088) {
        int8_t w[1024];
        float ws[32];
        for (int i = 0; i < 1024; i++)
            w[i] = (int8_t)(panel[64 + i] ^ 0x80);
        gen_f16x16(panel, ws);
        gen_f16x16(panel + 32, ws + 16);
        for (int t = 0; t < n; t++) {
            float s = cpu_q_scale(x[t], n64)[b];
            int32_t a0[16], a1[16];
            gen_dot32_16(w, x[t], n64, b * 64, a0);
            gen_dot32_16(w + 512, x[t], n64, b * 64 + 32, a1);
            for (int r = 0; r < 16; r++)
                y[t * 16 + r] += ((float)a0[r] * ws[r] + (float)a1[r] * ws[16 + r]) * s;
        }
    }
}

/* 4 vectors of nibbles to 8 groups; value[16] is what a nibble means */
static inline void gen_nibbles(const uint8_t *p, const int8_t *value, int8_t *w) {
#ifdef __AVX2__
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)value));
    const __m256i low4 = _mm256_set1_epi8(15);
    for (int i = 0; i < 8; i++, p += 32, w += i % 2 ? 32 : 96) {
        __m256i v = _mm256_loadu_si256((const __m256i *)p), high = _mm256_srli_epi16(v, 4);
        _mm256_storeu_si256((__m256i *)w, _mm256_shuffle_epi8(table, _mm256_and_si256(v, low4)));
        _mm256_storeu_si256((__m256i *)(w + 64), _mm256_shuffle_epi8(table, _mm256_and_si256(high, low4)));
    }
#else
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 64; i++) {
            w[j * 128 + i] = value[p[j * 64 + i] & 15];
            w[j * 128 + 64 + i] = value[p[j * 64 + i] >> 4];
        }
#endif
}

static const int8_t gen_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int8_t gen_identity[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline void gen_dot_mx4(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                               uint8_t *scratch) {
    (void)scratch;
    int64_t n64 = cpu_n64(n_col);
    const uint16_t *head = (const uint16_t *)panel;
    const uint8_t *p = panel + cpu_mx4_head(n64);
    memset(y, 0, (size_t)n * 64);
    for (int64_t b = 0; b < n64; b++, head += 16, p += 512) {
        int8_t w[1024];
        gen_nibbles(p, gen_e2m1, w);
        gen_nibbles(p + 256, gen_e2m1, w + 512);
        for (int t = 0; t < n; t++) {
            float s = cpu_q_scale(x[t], n64)[b];
            int32_t a0[16], a1[16];
            gen_dot32_16(w, x[t], n64, b * 64, a0);
            gen_dot32_16(w + 512, x[t], n64, b * 64 + 32, a1);
            for (int r = 0; r < 16; r++) {
                float ws = f32_from_bits(((uint32_t)(head[r] >> 8) - 1) << 23);
                float a =
                    (float)a0[r] * (float)(1 << (head[r] & 15)) + (float)a1[r] * (float)(1 << (head[r] >> 4 & 15));
                y[t * 16 + r] += a * (ws * s);
            }
        }
    }
}

/* Bits from `shift` on, as many as are set in mask, of 64 bytes become the bits from 4 on of a group's codes. */
static inline void gen_add_bits(int8_t *w, const uint8_t *bits, int shift, uint64_t mask) {
    uint64_t v, b;
    for (int i = 0; i < 64; i += 8) {
        memcpy(&v, w + i, 8);
        memcpy(&b, bits + i, 8);
        v |= (b >> shift & mask * 0x0101010101010101u) << 4;
        memcpy(w + i, &v, 8);
    }
}

static inline void gen_dot_min(cpu_fmt f, const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y) {
    int64_t n64 = cpu_n64(n_col);
    memset(y, 0, (size_t)n * 64);
    for (int64_t b = 0; b < n_col / 32; b++) {
        cpu_min_block at = cpu_min_at(f, panel, b);
        int8_t w[512];
        float ws[16], ms[16];
        gen_nibbles(at.nibbles, gen_identity, w);
        for (int g = 0; cpu_min_fifth(f) && g < 8; g++)
            gen_add_bits(w + g * 64, at.high, g, 1);
        gen_f16x16(at.d, ws);
        gen_f16x16(at.d + 32, ms);
        for (int r = 0; at.scale && r < 16; r++) {
            ws[r] *= (float)at.scale[r];
            ms[r] *= (float)at.scale[128 + r];
        }
        for (int t = 0; t < n; t++) {
            float s = cpu_q_scale(x[t], n64)[b / 2];
            float sum = (float)cpu_q_c32(x[t], n64)[b] * (s * (1.0f / 128));
            int32_t a[16];
            gen_dot32_16(w, x[t], n64, b * 32, a);
            for (int r = 0; r < 16; r++)
                y[t * 16 + r] = (y[t * 16 + r] + (float)a[r] * (ws[r] * s)) + ms[r] * sum;
        }
    }
}

/* A dot kernel of one format with a minimum, from a function for all of them. */
#define GEN_MIN(name, format, rows)                                                                                    \
    static inline void name(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,                \
                            uint8_t *scratch) {                                                                        \
        (void)scratch;                                                                                                 \
        rows(format, panel, n_col, x, n, y);                                                                           \
    }
GEN_MIN(gen_dot_q41, CPU_Q41, gen_dot_min)
GEN_MIN(gen_dot_q51, CPU_Q51, gen_dot_min)
GEN_MIN(gen_dot_q4k, CPU_Q4K, gen_dot_min)
GEN_MIN(gen_dot_q5k, CPU_Q5K, gen_dot_min)

static inline void gen_dot_q6k(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y,
                               uint8_t *scratch) {
    (void)scratch;
    int64_t n64 = cpu_n64(n_col);
    memset(y, 0, (size_t)n * 64);
    for (int64_t b = 0; b < n_col / 32; b++) {
        const uint8_t *head = panel + b / 8 * 3392, *low = head + 320 + b % 8 * 256;
        const uint8_t *high = head + 320 + 2048 + b % 8 * 128;
        const int8_t *sc = (const int8_t *)head + 64 + b % 8 * 32;
        int8_t w[512], half[2][512];
        float d[16];
        gen_f16x16(head, d);
        gen_nibbles(low, gen_identity, w);
        for (int g = 0; g < 8; g++)
            gen_add_bits(w + g * 64, high + g / 4 * 64, g % 4 * 2, 3);
        for (int i = 0; i < 512; i++)
            w[i] = (int8_t)(w[i] - 32);
        memset(half, 0, sizeof half);
        memcpy(half[0], w, 256);
        memcpy(half[1] + 256, w + 256, 256);
        for (int t = 0; t < n; t++) {
            float s = cpu_q_scale(x[t], n64)[b / 2];
            for (int h = 0; h < 2; h++) {
                int32_t a[16];
                gen_dot32_16(half[h], x[t], n64, b * 32, a);
                for (int r = 0; r < 16; r++)
                    y[t * 16 + r] += (float)a[r] * (d[r] * (float)sc[h * 16 + r] * s);
            }
        }
    }
}

/* ---- activations ---- */

/* Round to nearest even without a library call; |x| < 2^22. */
static inline float gen_round(float x) { return (x + 12582912.0f) - 12582912.0f; }

static inline void gen_quantise(const float *x, int64_t n, uint8_t *row) {
    int64_t n64 = cpu_n64(n);
    int32_t *c64 = (int32_t *)(row + n64 * 132), *c32 = (int32_t *)(row + n64 * 136),
            *c16 = (int32_t *)(row + n64 * 144);
    for (int64_t b = 0; b < n64; b++) {
        float v[64] = {0}, lane[16] = {0}, broken[16] = {0}, top = 0;
        memcpy(v, x + b * 64, (size_t)(n - b * 64 < 64 ? n - b * 64 : 64) * sizeof *v);
        for (int i = 0; i < 64; i += 16)
            for (int r = 0; r < 16; r++) {
                float a = fabsf(v[i + r]);
                lane[r] = a > lane[r] ? a : lane[r];
                broken[r] += a * 0; /* NaN for a NaN or an infinity */
            }
        for (int i = 0; i < 16; i++) {
            top = lane[i] > top ? lane[i] : top;
            broken[0] += broken[i];
        }
        float inv = 32512 / top;
        if (!(top > 1e-30f)) /* nothing worth keeping */
            top = inv = 0;
        if (broken[0] != 0 || top > 1e30f) { /* codes of zeros under a scale of NaN: the outputs are NaN */
            memset(v, 0, sizeof v);
            inv = 0;
            top = NAN;
        }
        int32_t q[64], sum[4] = {0};
        for (int i = 0; i < 64; i++) {
            q[i] = (int32_t)gen_round(v[i] * inv);
            q[i] += (q[i] & 255) == 128; /* no byte is -128: AVX2 code negates them */
            row[b * 64 + i] = (uint8_t)((q[i] + 128) >> 8);
            row[(n64 + b) * 64 + i] = (uint8_t)q[i];
        }
        for (int i = 0; i < 64; i++)
            sum[i / 16] += q[i];
        ((float *)(row + n64 * 128))[b] = top / 32512;
        c64[b] = -128 * (sum[0] + sum[1] + sum[2] + sum[3]);
        c32[b * 2] = -128 * (sum[0] + sum[1]);
        c32[b * 2 + 1] = -128 * (sum[2] + sum[3]);
        for (int i = 0; i < 4; i++)
            c16[b * 4 + i] = -32 * sum[i];
    }
}

/* Sum of 16 partial sums in a fixed order. */
static inline float gen_sum16(const float *lane) {
    float s[8];
    for (int i = 0; i < 8; i++)
        s[i] = lane[i] + lane[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

static inline float gen_sum(const float *x, int64_t n) {
    float lane[16] = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        for (int i = 0; i < 16; i++)
            lane[i] += x[k + i];
    for (; k < n; k++)
        lane[k % 16] += x[k];
    return gen_sum16(lane);
}

static inline float gen_sum_squares(const float *x, float mean, int64_t n) {
    float lane[16] = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        for (int i = 0; i < 16; i++)
            lane[i] += (x[k + i] - mean) * (x[k + i] - mean);
    for (; k < n; k++)
        lane[k % 16] += (x[k] - mean) * (x[k] - mean);
    return gen_sum16(lane);
}

static inline void gen_rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    float inv = 1.0f / sqrtf(gen_sum_squares(x, 0, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        y[i] = x[i] * inv * weight[i];
}

static inline void gen_layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t n,
                                  float *y) {
    float mean = gen_sum(x, n) / (float)n;
    float inv = 1.0f / sqrtf(gen_sum_squares(x, mean, n) / (float)n + eps);
    for (int64_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * inv * weight[i] + (bias ? bias[i] : 0);
}

/* e^x to about 2 ulp; 0 below -87, capped above 88. */
static inline float gen_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = gen_round(x * 1.44269504f);
    float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * f32_from_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline void gen_glu(const float *g, const float *u, int64_t n, float alpha, float limit, float *y) {
    for (int64_t i = 0; i < n; i++) {
        float a = g[i] < limit ? g[i] : limit;
        float b = u[i] < limit ? u[i] : limit;
        b = b > -limit ? b : -limit;
        y[i] = a / (1.0f + gen_exp(-alpha * a)) * (b + 1.0f);
    }
}

static inline void gen_gelu_tanh(float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) { /* 1 + tanh z = 2 / (1 + e^-2z) */
        float z = 0.7978845608f * (y[i] + 0.044715f * y[i] * y[i] * y[i]);
        y[i] = y[i] / (1.0f + gen_exp(-2.0f * z));
    }
}

static inline void gen_put(const float *dot, const float *bias, int64_t n, bool add, float *y, int64_t stride) {
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < 16; r++)
            y[i * stride + r] = dot[i * 16 + r] + bias[r] + (add ? y[i * stride + r] : 0);
}

static inline void gen_combine(const float *x, int64_t stride, const float *weight, int n, float *y) {
    float sum[16] = {0};
    for (int k = 0; k < n; k++)
        for (int r = 0; r < 16; r++)
            sum[r] += weight[k * 2] * x[k * stride + r];
    for (int r = 0; r < 16; r++)
        y[r] += sum[r];
}

static inline void gen_rotate(float *restrict x, const float *restrict turn, int half) {
    float *restrict x1 = x + half;
    for (int j = 0; j < half; j++) {
        float a = x[j], b = x1[j];
        x[j] = a * turn[j] - b * turn[half + j];
        x1[j] = b * turn[j] + a * turn[half + j];
    }
}

/* ---- attention ---- */

/* Online softmax of one page's scores: s[64] becomes weights, invisible ones 0. Returns the factor of what was
 * accumulated before. */
static inline float gen_softmax(cpu_attn_tile *t, int i, float *s) {
    float lane[16], top = t->max[i];
    for (int r = 0; r < 16; r++)
        lane[r] = -INFINITY;
    for (int k = 0; k < CPU_PAGE; k++) {
        s[k] = k >= t->first[i] && k <= t->last[i] ? s[k] * t->scale : -INFINITY;
        lane[k % 16] = s[k] > lane[k % 16] ? s[k] : lane[k % 16];
    }
    for (int r = 0; r < 16; r++)
        top = lane[r] > top ? lane[r] : top;
    float keep = t->max[i] == -INFINITY ? 0 : gen_exp(t->max[i] - top), add[16] = {0};
    for (int k = 0; k < CPU_PAGE; k++) {
        s[k] = s[k] == -INFINITY ? 0 : gen_exp(s[k] - top);
        add[k % 16] += s[k];
    }
    t->max[i] = top;
    t->sum[i] = t->sum[i] * keep + gen_sum16(add);
    return keep;
}

static inline void gen_attn_row(cpu_attn_tile *t, int i, const float *k, const float *v) {
    float s[CPU_PAGE] = {0};
    int hd = t->head_dim;
    if (t->last[i] < t->first[i])
        return;
    for (int d = 0; d < hd; d++)
        for (int p = 0; p < CPU_PAGE; p++)
            s[p] += t->q[i][d] * k[d * CPU_PAGE + p];
    float keep = gen_softmax(t, i, s), *acc = t->acc[i];
    for (int d = 0; d < hd; d++)
        acc[d] *= keep;
    for (int p = t->first[i]; p <= t->last[i]; p++)
        for (int d = 0; d < hd; d++)
            acc[d] += s[p] * v[p * hd + d];
}

static inline void gen_attn_f32(cpu_attn_tile *t, const void *k, const void *v) {
    for (int i = 0; i < t->n; i++)
        gen_attn_row(t, i, k, v);
}

#define GEN_MAX_HEAD 256 /* head_dim at most */

static inline void gen_attn_f16(cpu_attn_tile *t, const void *k, const void *v) {
    float fk[GEN_MAX_HEAD * CPU_PAGE], fv[GEN_MAX_HEAD * CPU_PAGE];
    for (int i = 0; i < t->head_dim * CPU_PAGE; i += 16) {
        gen_f16x16((const uint16_t *)k + i, fk + i);
        gen_f16x16((const uint16_t *)v + i, fv + i);
    }
    for (int i = 0; i < t->n; i++)
        gen_attn_row(t, i, fk, fv);
}

#define GEN_TABLE                                                                                                      \
    .dot = {[CPU_F32] = gen_dot_f32, [CPU_F16] = gen_dot_f16, [CPU_BF16] = gen_dot_bf16, [CPU_I8] = gen_dot_i8,        \
            [CPU_MX4] = gen_dot_mx4, [CPU_Q41] = gen_dot_q41, [CPU_Q51] = gen_dot_q51,   [CPU_Q4K] = gen_dot_q4k,      \
            [CPU_Q5K] = gen_dot_q5k, [CPU_Q6K] = gen_dot_q6k},                                                         \
    .quantise = gen_quantise, .rms_norm = gen_rms_norm, .layer_norm = gen_layer_norm, .glu = gen_glu,                  \
    .gelu_tanh = gen_gelu_tanh, .put = gen_put, .combine = gen_combine, .rotate = gen_rotate,                          \
    .attn_f16 = gen_attn_f16, .attn_f32 = gen_attn_f32

#endif
