/* quant/q5_k: 256 values of 5 bits in 8 sub-blocks with 6-bit scale and minimum each (kscale.h). 5.5 bits per weight.
 */
#ifndef ORCD_QUANT_Q5_K_H
#define ORCD_QUANT_Q5_K_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2      4            16       48                                               176
 *       | d | dmin | scales[12] | qh[32] | qs: 4 runs of 32 bytes                         |
 *                                         run r, byte l: element 64r + l (low nibble, sub-block 2r)
 *                                                        element 64r + 32 + l (high nibble, sub-block 2r + 1)
 *  Bit s of qh[l] is bit 4 of element l of sub-block s.   value = (d * sc) * q - (dmin * m) */
typedef struct __attribute__((packed)) q_block_q5_k {
    uint16_t d, dmin; /* f16 */
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
} q_block_q5_k;
static_assert(sizeof(q_block_q5_k) == 176, "a Q5_K block is 176 bytes");

#endif
