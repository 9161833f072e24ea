#include "quant/f16/f16.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) {
    const uint8_t *from = src;
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        dst[i] = f32_from_f16(bits);
    }
}

static void pack(const float *src, void *dst, size_t n) {
    uint8_t *to = dst;
    for (size_t i = 0; i < n; i++) {
        uint16_t bits = f16_from_f32(src[i]);
        memcpy(to + 2 * i, &bits, 2);
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_f16, row, x, n); }

const q_traits q_traits_f16 = {Q_F16, "F16", 1, sizeof(q_block_f16), unpack, pack, dot};
