/* quant/q4_0: 32 values of 4 bits under one half-precision scale: value = d * (q - 8). 4.5 bits per weight. */
#ifndef ORCD_QUANT_Q4_0_H
#define ORCD_QUANT_Q4_0_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2                    3                          17
 *       | d | q16<<4 | q0  (qs0) | q17<<4 | q1  (qs1) | ... | q31<<4 | q15 (qs15) |
 *  Byte j of qs holds element j in its low nibble and element j + 16 in its high one. */
typedef struct __attribute__((packed)) q_block_q4_0 {
    uint16_t d; /* f16 */
    uint8_t qs[16];
} q_block_q4_0;
static_assert(sizeof(q_block_q4_0) == 18, "a Q4_0 block is 18 bytes");

#endif
