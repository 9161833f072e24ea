#include "quant/q4_0/q4_0.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q4_0 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 16; j++) {
            dst[i + j] = d * ((b->qs[j] & 15) - 8);
            dst[i + j + 16] = d * ((b->qs[j] >> 4) - 8);
        }
    }
}

/* The value of largest magnitude becomes -8, the end of the range that reaches further. */
static void pack(const float *src, void *dst, size_t n) {
    q_block_q4_0 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float max = 0;
        for (int j = 0; j < 32; j++)
            if (fabsf(q_finite(src[i + j])) > fabsf(max))
                max = q_finite(src[i + j]);
        b->d = q_scale_f16(max / -8);
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 16; j++) {
            int lo = q_nearest(q_finite(src[i + j]), d, -8, 7) + 8;
            int hi = q_nearest(q_finite(src[i + j + 16]), d, -8, 7) + 8;
            b->qs[j] = (uint8_t)(hi << 4 | lo);
        }
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q4_0, row, x, n); }

const q_traits q_traits_q4_0 = {Q_Q4_0, "Q4_0", 32, sizeof(q_block_q4_0), unpack, pack, dot};
