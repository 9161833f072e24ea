/* quant/f32: IEEE 754 single precision, little-endian, no block structure. */
#ifndef ORCD_QUANT_F32_H
#define ORCD_QUANT_F32_H

#include <assert.h>

/*  |31 30......23 22....................0|
 *  | s  exponent        mantissa         |   one value, 4 bytes */
typedef struct q_block_f32 {
    float value;
} q_block_f32;
static_assert(sizeof(q_block_f32) == 4, "an F32 block is 4 bytes");

#endif
