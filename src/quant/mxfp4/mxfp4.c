#include "quant/mxfp4/mxfp4.h"

#include "quant/block.h"

static const float e2m1[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

static void unpack(const void *src, float *dst, size_t n) {
    const q_block_mxfp4 *b = src;
    for (size_t i = 0; i < n; i += 32, b++) {
        float scale = f32_from_e8m0(b->e);
        for (int j = 0; j < 16; j++) {
            dst[i + j] = e2m1[b->qs[j] & 15] * scale;
            dst[i + j + 16] = e2m1[b->qs[j] >> 4] * scale;
        }
    }
}

/* The code nearest to x: of two equally near the one with an even mantissa, beyond 6 the largest. */
static uint8_t nearest_code(double x) {
    static const double upto[7] = {.25, .75, 1.25, 1.75, 2.5, 3.5, 5}; /* midpoints of neighbours */
    double m = fabs(x);
    uint8_t code = 0;
    while (code < 7 && (m > upto[code] || (m == upto[code] && code % 2 == 1)))
        code++;
    return signbit(x) ? code | 8 : code;
}

/* Codes of 32 values under scale e; returns the sum of squared errors, infinite when a value would be. */
static double encode(const float *x, int e, uint8_t code[32]) {
    float scale = f32_from_e8m0((uint8_t)e);
    double error = 0;
    for (int j = 0; j < 32; j++) {
        code[j] = nearest_code((double)x[j] / scale);
        double miss = (double)(e2m1[code[j]] * scale) - x[j];
        error += miss * miss;
    }
    return error;
}

/* The scale that puts the largest value into [4, 8), or a neighbour of it that is nearer in squared error. */
static void pack_block(const float *x, q_block_mxfp4 *b) {
    float max = 0;
    for (int j = 0; j < 32; j++)
        max = fmaxf(max, fabsf(x[j]));
    int middle = max > 0 ? ilogbf(max) - 2 + 127 : 0;
    double best = INFINITY;
    memset(b, 0, sizeof *b);
    for (int e = middle - 1; e <= middle + 1; e++) {
        uint8_t code[32];
        int scale = e < 0 ? 0 : e;
        double error = encode(x, scale, code);
        if (error >= best)
            continue;
        best = error;
        b->e = (uint8_t)scale;
        for (int j = 0; j < 16; j++)
            b->qs[j] = (uint8_t)(code[j + 16] << 4 | code[j]);
    }
}

static void pack(const float *src, void *dst, size_t n) {
    q_block_mxfp4 *b = dst;
    for (size_t i = 0; i < n; i += 32, b++) {
        float x[32];
        for (int j = 0; j < 32; j++)
            x[j] = q_finite(src[i + j]);
        pack_block(x, b);
    }
}

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_mxfp4, row, x, n); }

const q_traits q_traits_mxfp4 = {Q_MXFP4, "MXFP4", 32, sizeof(q_block_mxfp4), unpack, pack, dot};
