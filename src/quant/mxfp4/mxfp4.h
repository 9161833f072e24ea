/* quant/mxfp4: OCP Microscaling FP4: 32 E2M1 values under one power of two: value = E2M1[q] * 2^(e - 127).
 * 4.25 bits per weight. Source: OCP Microscaling Formats (MX) v1.0; GGUF's layout. */
#ifndef ORCD_QUANT_MXFP4_H
#define ORCD_QUANT_MXFP4_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   1                    2                          16
 *       | e | q16<<4 | q0  (qs0) | q17<<4 | q1  (qs1) | ... | q31<<4 | q15 (qs15) |
 *  Byte j of qs holds element j in its low nibble and element j + 16 in its high one.
 *
 *  E2M1  |3   2 1    0|   code & 7:  0   1   2   3   4   5   6   7
 *        |s  exp  man |   magnitude: 0  .5   1 1.5   2   3   4   6
 *  E8M0  e = 0 is 2^-127, e = 255 makes the block NaN. */
typedef struct q_block_mxfp4 {
    uint8_t e;
    uint8_t qs[16];
} q_block_mxfp4;
static_assert(sizeof(q_block_mxfp4) == 17, "an MXFP4 block is 17 bytes");

#endif
