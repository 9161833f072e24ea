#include "quant/q5_0/q5_0.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q5_0 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 16; j++) {
            int lo = (b->qs[j] & 15) | (b->qh >> j & 1) << 4;
            int hi = b->qs[j] >> 4 | (b->qh >> (j + 16) & 1) << 4;
            dst[i + j] = d * (lo - 16);
            dst[i + j + 16] = d * (hi - 16);
        }
    }
}

/* The value of largest magnitude becomes -16, the end of the range that reaches further. */
static void pack(const float *src, void *dst, size_t n) {
    q_block_q5_0 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float max = 0;
        for (int j = 0; j < 32; j++)
            if (fabsf(q_finite(src[i + j])) > fabsf(max))
                max = q_finite(src[i + j]);
        b->d = q_scale_f16(max / -16);
        float d = f32_from_f16(b->d);
        b->qh = 0;
        for (int j = 0; j < 16; j++) {
            uint32_t lo = (uint32_t)(q_nearest(q_finite(src[i + j]), d, -16, 15) + 16);
            uint32_t hi = (uint32_t)(q_nearest(q_finite(src[i + j + 16]), d, -16, 15) + 16);
            b->qs[j] = (uint8_t)((hi & 15) << 4 | (lo & 15));
            b->qh |= lo >> 4 << j | hi >> 4 << (j + 16);
        }
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q5_0, row, x, n); }

const q_traits q_traits_q5_0 = {Q_Q5_0, "Q5_0", 32, sizeof(q_block_q5_0), unpack, pack, dot};
