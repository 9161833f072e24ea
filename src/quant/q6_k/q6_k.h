/* quant/q6_k: 256 values of 6 bits in 16 sub-blocks with an 8-bit scale each: value = (d * sc) * (q - 32).
 * 6.5625 bits per weight. */
#ifndef ORCD_QUANT_Q6_K_H
#define ORCD_QUANT_Q6_K_H

#include <assert.h>
#include <stdint.h>

/*  byte  0         128      192          208 210
 *       | ql[128] | qh[64] | scales[16] | d |      scales: int8, one per 16 values
 *  Element 128h + 32k + l (h = 0, 1; k = 0..3; l = 0..31):
 *    low 4 bits  ql[64h + 32(k & 1) + l], low nibble for k < 2, high nibble for k >= 2
 *    high 2 bits bits 2k, 2k + 1 of qh[32h + l] */
typedef struct __attribute__((packed)) q_block_q6_k {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d; /* f16 */
} q_block_q6_k;
static_assert(sizeof(q_block_q6_k) == 210, "a Q6_K block is 210 bytes");

#endif
