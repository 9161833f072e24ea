/* quant/q4_1: 32 values of 4 bits under a half-precision scale and minimum: value = d * q + m. 5 bits per weight. */
#ifndef ORCD_QUANT_Q4_1_H
#define ORCD_QUANT_Q4_1_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2   4                    5                          19
 *       | d | m | q16<<4 | q0  (qs0) | q17<<4 | q1  (qs1) | ... | q31<<4 | q15 (qs15) | */
typedef struct __attribute__((packed)) q_block_q4_1 {
    uint16_t d, m; /* f16 */
    uint8_t qs[16];
} q_block_q4_1;
static_assert(sizeof(q_block_q4_1) == 20, "a Q4_1 block is 20 bytes");

#endif
