#include "quant/q6_k/q6_k.h"

#include <emmintrin.h>

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q6_k *b = src;
    for (size_t i = 0; i < n; i += 256, b++) {
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 256; j++) {
            int h = j / 128, k = j / 32 % 4, l = j % 32;
            int lo = b->ql[64 * h + 32 * (k & 1) + l] >> k / 2 * 4 & 15, hi = b->qh[32 * h + l] >> 2 * k & 3;
            dst[i + j] = d * b->scales[j / 16] * ((hi << 4 | lo) - 32);
        }
    }
}

/* The best scale of 16 values with codes -32..31: scales around the one that maps the largest magnitude to -32,
 * each refitted by least squares to its own codes. The sign is free. */
static double fit_sub(const float *value) {
    double max = 0, x[16];
    for (int j = 0; j < 16; j++)
        x[j] = value[j];
    for (int j = 0; j < 16; j++)
        if (fabs(x[j]) > fabs(max))
            max = x[j];
    if (max == 0)
        return 0;
    double best = 0, best_gain = -1;
    for (int step = -8; step <= 8; step++) {
        const __m128d inv = _mm_set1_pd((-32 + step * 0.25) / max), magic = _mm_set1_pd(0x1.8p52);
        __m128d vxq = {0}, vqq = {0};
        for (int j = 0; j < 16; j += 2) { /* q_nearest of two values; adding `magic` rounds to an integer */
            __m128d v = _mm_loadu_pd(x + j), q = _mm_mul_pd(v, inv);
            q = _mm_min_pd(_mm_max_pd(q, _mm_set1_pd(-32)), _mm_set1_pd(31));
            q = _mm_sub_pd(_mm_add_pd(q, magic), magic);
            vxq = _mm_add_pd(vxq, _mm_mul_pd(v, q));
            vqq = _mm_add_pd(vqq, _mm_mul_pd(q, q));
        }
        double xq = vxq[0] + vxq[1], qq = vqq[0] + vqq[1];
        if (qq > 0 && xq * xq / qq > best_gain) { /* error = sum of x^2 - gain */
            best_gain = xq * xq / qq;
            best = xq / qq;
        }
    }
    return best;
}

static void pack_block(const float *x, q_block_q6_k *b) {
    double scale[16], max = 0;
    for (int s = 0; s < 16; s++) {
        scale[s] = fit_sub(x + 16 * s);
        max = fmax(max, fabs(scale[s]));
    }
    memset(b, 0, sizeof *b);
    b->d = q_scale_f16(max / 127);
    float d = f32_from_f16(b->d);
    for (int s = 0; s < 16; s++)
        b->scales[s] = (int8_t)q_nearest(scale[s], d, -127, 127);
    for (int j = 0; j < 256; j++) {
        int h = j / 128, k = j / 32 % 4, l = j % 32;
        int q = q_nearest(x[j], d * b->scales[j / 16], -32, 31) + 32;
        b->ql[64 * h + 32 * (k & 1) + l] |= (uint8_t)((q & 15) << k / 2 * 4);
        b->qh[32 * h + l] |= (uint8_t)(q >> 4 << 2 * k);
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_q6_k *b = dst;
    for (size_t i = 0; i < n; i += 256, b++) {
        float x[256];
        for (int j = 0; j < 256; j++)
            x[j] = q_finite(src[i + j]);
        pack_block(x, b);
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q6_k, row, x, n); }

const q_traits q_traits_q6_k = {Q_Q6_K, "Q6_K", 256, sizeof(q_block_q6_k), unpack, pack, dot};
