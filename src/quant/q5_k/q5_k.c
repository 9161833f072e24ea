#include "quant/q5_k/q5_k.h"

#include "quant/block.h"
#include "quant/kscale.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q5_k *b = src;
    for (size_t i = 0; i < n; i += 256, b++) {
        uint8_t sc[8], m[8];
        q_kscale_unpack(b->scales, sc, m);
        for (int s = 0; s < 8; s++) {
            float d = f32_from_f16(b->d) * sc[s], min = f32_from_f16(b->dmin) * m[s];
            for (int l = 0; l < 32; l++) {
                int q = (b->qs[s / 2 * 32 + l] >> s % 2 * 4 & 15) | (b->qh[l] >> s & 1) << 4;
                dst[i + 32 * s + l] = d * q - min;
            }
        }
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_q5_k *b = dst;
    for (size_t i = 0; i < n; i += 256, b++) {
        float x[256];
        uint8_t q[256];
        q_kscale k;
        for (int j = 0; j < 256; j++)
            x[j] = q_finite(src[i + j]);
        q_kscale_fit(x, 31, &k, q);
        b->d = k.d;
        b->dmin = k.dmin;
        q_kscale_pack(k.sc, k.m, b->scales);
        memset(b->qh, 0, sizeof b->qh);
        for (int j = 0; j < 256; j++)
            b->qh[j % 32] |= (uint8_t)(q[j] >> 4 << j / 32);
        for (int r = 0; r < 4; r++)
            for (int l = 0; l < 32; l++)
                b->qs[32 * r + l] = (uint8_t)((q[64 * r + l] & 15) | (q[64 * r + 32 + l] & 15) << 4);
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q5_k, row, x, n); }

const q_traits q_traits_q5_k = {Q_Q5_K, "Q5_K", 256, sizeof(q_block_q5_k), unpack, pack, dot};
