/* quant/block.h: what the folders of the weight types share. Private to quant/.
 *
 * pack never fails: a NaN is packed as 0, an infinity as the largest float, a scale beyond half precision as the
 * largest half. The 16- and 32-bit types keep NaN and infinity as they are. */
#ifndef ORCD_QUANT_BLOCK_H
#define ORCD_QUANT_BLOCK_H

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "base/half.h"
#include "quant/quant.h"

#define Q_MAX_BLOCK_LEN 256

#define QUANT(name) extern const q_traits q_traits_##name;
#include "quant/list.def"
#undef QUANT

static inline float q_finite(float x) {
    if (isnan(x))
        return 0;
    return x > FLT_MAX ? FLT_MAX : x < -FLT_MAX ? -FLT_MAX : x;
}

/* A scale as a half, saturating. */
static inline uint16_t q_scale_f16(double d) {
    return f16_from_f32(d > 65504.0 ? 65504.0f : d < -65504.0 ? -65504.0f : (float)d);
}

/* The integer nearest to x / d in [lo, hi]; lo <= 0 <= hi, and 0 when d is 0. */
static inline int q_nearest(double x, double d, int lo, int hi) {
    double q = d != 0 ? nearbyint(x / d) : 0;
    return q < lo ? lo : q > hi ? hi : (int)q;
}

/* q_traits.dot of any type: unpack a block, multiply, go on. */
static inline double q_dot_by_block(const q_traits *t, const void *row, const float *x, size_t n) {
    float v[Q_MAX_BLOCK_LEN];
    const uint8_t *block = row;
    double sum = 0;
    for (size_t i = 0; i < n; i += t->block_len, block += t->block_bytes) {
        t->unpack(block, v, t->block_len);
        for (size_t j = 0; j < t->block_len; j++)
            sum += (double)v[j] * x[i + j];
    }
    return sum;
}

#endif
