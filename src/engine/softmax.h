/* engine/softmax.h: the passes over a row of logits that sampling is made of, for each instruction set. May include
 * base. Every variant gives the same bits: exponentials are made of separate multiplications and additions, and a block
 * of 256 is summed in 16 lanes (lane l takes elements l, l + 16, ...) that are then added in one fixed order. */
#ifndef ORCD_ENGINE_SOFTMAX_H
#define ORCD_ENGINE_SOFTMAX_H

#include <stdint.h>

#include "base/cpu.h"

#define SOFTMAX_BLOCK 256

typedef struct softmax_ops {
    /* Maximum of x[0..n), NaN when one of them is; peak, if not NULL: of each block. */
    float (*peaks)(const float *x, int32_t n, float *peak);
    /* Sum of exp((x - max) * inv_t) over n values, none above max; mass, if not NULL: of each block. */
    double (*sum)(const float *x, int32_t n, float max, float inv_t, double *mass);
    /* e[i] = exp((x[i] - max) * inv_t) for n <= 256 values; 0 beyond them. */
    void (*weights)(const float *x, int n, float max, float inv_t, float e[SOFTMAX_BLOCK]);
    /* Bit i of `bits`: x[i] >= bound, for n <= 256 values. */
    void (*reach)(const float *x, int n, float bound, uint32_t bits[SOFTMAX_BLOCK / 32]);
} softmax_ops;

const softmax_ops *softmax_for(cpu_tier tier);

extern const softmax_ops softmax_portable, softmax_avx2, softmax_avx512;

#endif
