/* base/checked.h: arithmetic on sizes that came from a file or a request. True means it fitted. */
#ifndef ORCD_BASE_CHECKED_H
#define ORCD_BASE_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

static inline bool ck_add(uint64_t a, uint64_t b, uint64_t *sum) { return !__builtin_add_overflow(a, b, sum); }

static inline bool ck_mul(uint64_t a, uint64_t b, uint64_t *product) { return !__builtin_mul_overflow(a, b, product); }

/* Round up to a power of two `align`; false when it is no power of two or the sum wraps. */
static inline bool ck_align(uint64_t a, uint64_t align, uint64_t *out) {
    if (align == 0 || (align & (align - 1)) != 0 || __builtin_add_overflow(a, align - 1, out))
        return false;
    *out &= ~(align - 1);
    return true;
}

#endif
