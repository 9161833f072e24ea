/* quant/f16: IEEE 754 half precision, little-endian, no block structure. */
#ifndef ORCD_QUANT_F16_H
#define ORCD_QUANT_F16_H

#include <assert.h>
#include <stdint.h>

/*  |15 14....10 9..........0|
 *  | s exponent   mantissa  |   one value, 2 bytes; exponent bias 15 */
typedef struct q_block_f16 {
    uint16_t bits;
} q_block_f16;
static_assert(sizeof(q_block_f16) == 2, "an F16 block is 2 bytes");

#endif
