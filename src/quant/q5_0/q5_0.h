/* quant/q5_0: 32 values of 5 bits under one half-precision scale: value = d * (q - 16). 5.5 bits per weight. */
#ifndef ORCD_QUANT_Q5_0_H
#define ORCD_QUANT_Q5_0_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2    6                                      21
 *       | d | qh | q16 & 15 | q0 & 15 (high|low) | ... | q31 & 15 | q15 & 15 |
 *  Bit j of qh (little-endian, 32 bits) is bit 4 of element j. */
typedef struct __attribute__((packed)) q_block_q5_0 {
    uint16_t d; /* f16 */
    uint32_t qh;
    uint8_t qs[16];
} q_block_q5_0;
static_assert(sizeof(q_block_q5_0) == 22, "a Q5_0 block is 22 bytes");

#endif
