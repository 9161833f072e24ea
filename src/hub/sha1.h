/* hub/sha1.h: SHA-1 (FIPS 180-4), because git names its blobs by it. Finds damage, proves nothing against an attacker.
 * Private to hub/. */
#ifndef ORCD_HUB_SHA1_H
#define ORCD_HUB_SHA1_H

#include <stddef.h>
#include <stdint.h>

typedef struct sha1 {
    uint32_t h[5];
    uint8_t block[64];
    uint64_t n; /* bytes so far */
} sha1;

void sha1_init(sha1 *s);
void sha1_update(sha1 *s, const void *bytes, size_t n);
void sha1_final(sha1 *s, uint8_t sum[20]);

#endif
