#include "quant/q8_0/q8_0.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q8_0 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 32; j++)
            dst[i + j] = d * b->q[j];
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_q8_0 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float max = 0;
        for (int j = 0; j < 32; j++)
            max = fmaxf(max, fabsf(q_finite(src[i + j])));
        b->d = q_scale_f16(max / 127);
        float d = f32_from_f16(b->d);
        for (int j = 0; j < 32; j++)
            b->q[j] = (int8_t)q_nearest(q_finite(src[i + j]), d, -127, 127);
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q8_0, row, x, n); }

const q_traits q_traits_q8_0 = {Q_Q8_0, "Q8_0", 32, sizeof(q_block_q8_0), unpack, pack, dot};
