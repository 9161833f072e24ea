#include "quant/q5_1/q5_1.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q5_1 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float d = f32_from_f16(b->d), m = f32_from_f16(b->m);
        for (int j = 0; j < 16; j++) {
            int lo = (b->qs[j] & 15) | (b->qh >> j & 1) << 4;
            int hi = b->qs[j] >> 4 | (b->qh >> (j + 16) & 1) << 4;
            dst[i + j] = d * lo + m;
            dst[i + j + 16] = d * hi + m;
        }
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_q5_1 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float min = q_finite(src[i]), max = min;
        for (int j = 1; j < 32; j++) {
            min = fminf(min, q_finite(src[i + j]));
            max = fmaxf(max, q_finite(src[i + j]));
        }
        b->d = q_scale_f16(((double)max - min) / 31);
        b->m = q_scale_f16(min);
        float d = f32_from_f16(b->d), m = f32_from_f16(b->m);
        b->qh = 0;
        for (int j = 0; j < 16; j++) {
            uint32_t lo = (uint32_t)q_nearest((double)q_finite(src[i + j]) - m, d, 0, 31);
            uint32_t hi = (uint32_t)q_nearest((double)q_finite(src[i + j + 16]) - m, d, 0, 31);
            b->qs[j] = (uint8_t)((hi & 15) << 4 | (lo & 15));
            b->qh |= lo >> 4 << j | hi >> 4 << (j + 16);
        }
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q5_1, row, x, n); }

const q_traits q_traits_q5_1 = {Q_Q5_1, "Q5_1", 32, sizeof(q_block_q5_1), unpack, pack, dot};
