/* engine/softmax_generic.h: the passes of softmax.h in vectors of LANES floats. Each softmax_<isa>.c defines, before it
 * includes this: LANES; the types vecf, veci (LANES elements) and vecn; larger(vecf, vecf), largest(vecf) -> float;
 * not_negative(veci); unordered(vecf, vecf) -> vecn, true where one is NaN, and any(vecn); reaches(vecf, float) -> the
 * bits of the lanes that are not smaller. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "engine/softmax.h"

#define WIDE 16 /* lanes of a sum, whatever the machine has */
#define SPLIT (WIDE / LANES)

typedef float vecf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias)); /* in memory */

static inline vecf load(const float *x) { return (vecf) * (const vecf_any *)x; }

/* The block itself or, when it has less than 256 values, a copy in `room` that -infinity fills up. */
static const float *whole(const float *x, int n, float room[SOFTMAX_BLOCK]) {
    if (n >= SOFTMAX_BLOCK)
        return x;
    memcpy(room, x, (size_t)n * sizeof *x);
    for (int i = n; i < SOFTMAX_BLOCK; i++)
        room[i] = -INFINITY;
    return room;
}

static float peaks(const float *x, int32_t n, float *peak) {
    float room[SOFTMAX_BLOCK], max = -INFINITY;
    vecn nan = {0};
    for (int32_t at = 0; at < n; at += SOFTMAX_BLOCK) {
        const float *b = whole(x + at, n - at, room);
        vecf m[4] = {load(b), load(b + LANES), load(b + 2 * LANES), load(b + 3 * LANES)}; /* four chains */
        nan |= unordered(m[0], m[1]) | unordered(m[2], m[3]);
        for (int i = 4 * LANES; i < SOFTMAX_BLOCK; i += 4 * LANES) {
            vecf v[4] = {load(b + i), load(b + i + LANES), load(b + i + 2 * LANES), load(b + i + 3 * LANES)};
            nan |= unordered(v[0], v[1]) | unordered(v[2], v[3]);
            for (int k = 0; k < 4; k++)
                m[k] = larger(v[k], m[k]);
        }
        float top = largest(larger(larger(m[0], m[1]), larger(m[2], m[3])));
        max = top > max ? top : max;
        if (peak)
            peak[at / SOFTMAX_BLOCK] = top;
    }
    return any(nan) ? NAN : max;
}

/* exp of values <= 0: 2^k times a polynomial in the rest, relative error below 2e-7; 0 from -88 on. */
static inline vecf exp_neg(vecf x) {
    const float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f, round = 12582912.0f;
    x = larger(x, (vecf){0} - 200.0f); /* -infinity must not reach the arithmetic below */
    vecf shifted = x * log2e + round, k = shifted - round;
    vecf r = x - k * ln2_hi - k * ln2_lo;
    vecf p = r * 1.9875691e-4f + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    veci exponent = (veci)shifted - 0x4b400000; /* k: the low bits, once those of `round` are taken off */
    return p * (vecf)(not_negative(exponent + 127) << 23);
}

static void weights(const float *x, int n, float max, float inv_t, float e[SOFTMAX_BLOCK]) {
    float room[SOFTMAX_BLOCK];
    const float *b = whole(x, n, room);
    for (int i = 0; i < SOFTMAX_BLOCK; i += LANES)
        *(vecf_any *)(e + i) = (vecf_any)exp_neg((load(b + i) - max) * inv_t);
}

static double block_sum(const float *b, float max, float inv_t) {
    vecf sum[SPLIT] = {{0}};
    for (int i = 0; i < SOFTMAX_BLOCK; i += WIDE)
        for (int k = 0; k < SPLIT; k++)
            sum[k] += exp_neg((load(b + i + k * LANES) - max) * inv_t);
    float s[WIDE];
    memcpy(s, sum, sizeof s);
    for (int l = 0; l < 8; l++)
        s[l] += s[l + 8];
    for (int l = 0; l < 4; l++)
        s[l] += s[l + 4];
    return ((double)s[0] + s[1]) + ((double)s[2] + s[3]);
}

static double sum(const float *x, int32_t n, float max, float inv_t, double *mass) {
    float room[SOFTMAX_BLOCK];
    double total = 0;
    for (int32_t at = 0; at < n; at += SOFTMAX_BLOCK) {
        double m = block_sum(whole(x + at, n - at, room), max, inv_t);
        if (mass)
            mass[at / SOFTMAX_BLOCK] = m;
        total += m;
    }
    return total;
}

static void reach(const float *x, int n, float bound, uint32_t bits[SOFTMAX_BLOCK / 32]) {
    float room[SOFTMAX_BLOCK];
    const float *b = whole(x, n, room);
    for (int w = 0; w < SOFTMAX_BLOCK / 32; w++) {
        bits[w] = 0;
        for (int i = 0; i < 32; i += LANES)
            bits[w] |= (uint32_t)reaches(load(b + w * 32 + i), bound) << i;
    }
    for (int i = n; i < SOFTMAX_BLOCK; i++) /* where the bound is -infinity too */
        bits[i / 32] &= ~(1u << (i % 32));
}

#define SOFTMAX_TABLE                                                                                                  \
    { peaks, sum, weights, reach }
