/* text/utf8.h: strict UTF-8 (no overlong forms, no surrogates, at most U+10FFFF). Includes nothing of orcd. */
#ifndef ORCD_TEXT_UTF8_H
#define ORCD_TEXT_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define UTF8_BAD UINT32_MAX

/* Bytes of a sequence by its first byte; 0 when no sequence starts with it. */
static inline size_t utf8_length(uint8_t lead) {
    return lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/* Whether `byte` may follow at index `i` (1..3) of the sequence that starts with `lead` (Unicode 15, table 3-7). */
static inline bool utf8_continues(uint8_t lead, size_t i, uint8_t byte) {
    uint8_t low = 0x80, high = 0xbf;
    if (i == 1) {
        low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    }
    return byte >= low && byte <= high;
}

/* The character at s, n > 0: returns its length. A byte that starts none is UTF8_BAD, length 1. */
static inline size_t utf8_next(const uint8_t *s, size_t n, uint32_t *c) {
    size_t len = utf8_length(s[0]);
    *c = UTF8_BAD;
    if (len == 0 || len > n)
        return 1;
    uint32_t v = len == 1 ? s[0] : s[0] & (0x7fu >> len);
    for (size_t i = 1; i < len; i++) {
        if (!utf8_continues(s[0], i, s[i]))
            return 1;
        v = v << 6 | (s[i] & 0x3fu);
    }
    *c = v;
    return len;
}

#endif
