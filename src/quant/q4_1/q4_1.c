#include "quant/q4_1/q4_1.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_q4_1 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float d = f32_from_f16(b->d), m = f32_from_f16(b->m);
        for (int j = 0; j < 16; j++) {
            dst[i + j] = d * (b->qs[j] & 15) + m;
            dst[i + j + 16] = d * (b->qs[j] >> 4) + m;
        }
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_q4_1 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float min = q_finite(src[i]), max = min;
        for (int j = 1; j < 32; j++) {
            min = fminf(min, q_finite(src[i + j]));
            max = fmaxf(max, q_finite(src[i + j]));
        }
        b->d = q_scale_f16(((double)max - min) / 15);
        b->m = q_scale_f16(min);
        float d = f32_from_f16(b->d), m = f32_from_f16(b->m);
        for (int j = 0; j < 16; j++) {
            int lo = q_nearest((double)q_finite(src[i + j]) - m, d, 0, 15);
            int hi = q_nearest((double)q_finite(src[i + j + 16]) - m, d, 0, 15);
            b->qs[j] = (uint8_t)(hi << 4 | lo);
        }
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_q4_1, row, x, n); }

const q_traits q_traits_q4_1 = {Q_Q4_1, "Q4_1", 32, sizeof(q_block_q4_1), unpack, pack, dot};
