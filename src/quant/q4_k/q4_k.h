/* quant/q4_k: 256 values of 4 bits in 8 sub-blocks with 6-bit scale and minimum each (kscale.h). 4.5 bits per weight.
 */
#ifndef ORCD_QUANT_Q4_K_H
#define ORCD_QUANT_Q4_K_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2      4            16                                                        144
 *       | d | dmin | scales[12] | qs: 4 runs of 32 bytes                                  |
 *                               run r, byte l: element 64r + l (low nibble, sub-block 2r)
 *                                              element 64r + 32 + l (high nibble, sub-block 2r + 1)
 *  value = (d * sc) * q - (dmin * m) */
typedef struct __attribute__((packed)) q_block_q4_k {
    uint16_t d, dmin; /* f16 */
    uint8_t scales[12];
    uint8_t qs[128];
} q_block_q4_k;
static_assert(sizeof(q_block_q4_k) == 144, "a Q4_K block is 144 bytes");

#endif
