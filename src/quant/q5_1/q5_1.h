/* quant/q5_1: 32 values of 5 bits under a half-precision scale and minimum: value = d * q + m. 6 bits per weight. */
#ifndef ORCD_QUANT_Q5_1_H
#define ORCD_QUANT_Q5_1_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2   4    8                                      23
 *       | d | m | qh | q16 & 15 | q0 & 15 (high|low) | ... | q31 & 15 | q15 & 15 |
 *  Bit j of qh (little-endian, 32 bits) is bit 4 of element j. */
typedef struct __attribute__((packed)) q_block_q5_1 {
    uint16_t d, m; /* f16 */
    uint32_t qh;
    uint8_t qs[16];
} q_block_q5_1;
static_assert(sizeof(q_block_q5_1) == 24, "a Q5_1 block is 24 bytes");

#endif
