/* quant/kscale.h: scales and minima of Q4_K and Q5_K. Private to quant/.
 *
 * 256 values are 8 sub-blocks of 32: value = (d * sc[s]) * q - (dmin * m[s]), sc and m of 6 bits in 12 bytes:
 *
 *  byte 0..3    |m0' sc0| ... sc[s] in the low 6 bits, the top 2 bits of sc[s + 4] above them     s = 0..3
 *  byte 4..7    the same for m[s] and m[s + 4]
 *  byte 8..11   low 4 bits of sc[s + 4] in the low nibble, low 4 bits of m[s + 4] in the high one */
#ifndef ORCD_QUANT_KSCALE_H
#define ORCD_QUANT_KSCALE_H

#include <stdint.h>

typedef struct q_kscale {
    uint16_t d, dmin; /* f16 */
    uint8_t sc[8], m[8];
} q_kscale;

void q_kscale_unpack(const uint8_t bytes[12], uint8_t sc[8], uint8_t m[8]);
void q_kscale_pack(const uint8_t sc[8], const uint8_t m[8], uint8_t bytes[12]);

/* Choose everything for 256 values with codes 0..q_max; values are finite. */
void q_kscale_fit(const float *value, int q_max, q_kscale *out, uint8_t q[256]);

#endif
