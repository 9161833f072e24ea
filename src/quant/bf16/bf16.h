/* quant/bf16: bfloat16, the upper half of an F32, little-endian, no block structure. */
#ifndef ORCD_QUANT_BF16_H
#define ORCD_QUANT_BF16_H

#include <assert.h>
#include <stdint.h>

/*  |15 14........7 6......0|
 *  | s   exponent  mantissa|   one value, 2 bytes; exponent bias 127 */
typedef struct q_block_bf16 {
    uint16_t bits;
} q_block_bf16;
static_assert(sizeof(q_block_bf16) == 2, "a BF16 block is 2 bytes");

#endif
