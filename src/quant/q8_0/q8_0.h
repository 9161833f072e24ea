/* quant/q8_0: 32 signed bytes under one half-precision scale: value = d * q. 8.5 bits per weight. */
#ifndef ORCD_QUANT_Q8_0_H
#define ORCD_QUANT_Q8_0_H

#include <assert.h>
#include <stdint.h>

/*  byte  0   2    3    4          33
 *       | d | q0 | q1 | q2 | ... | q31 |   d: f16, q: int8 */
typedef struct __attribute__((packed)) q_block_q8_0 {
    uint16_t d; /* f16 */
    int8_t q[32];
} q_block_q8_0;
static_assert(sizeof(q_block_q8_0) == 34, "a Q8_0 block is 34 bytes");

#endif
