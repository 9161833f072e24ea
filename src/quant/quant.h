/* quant/quant.h: the weight types. One folder per type; quant.c holds the list. May include base.
 *
 * A row of n values is n / block_len blocks of block_bytes each, in GGUF's layout ("canonical").
 * Numbers of the types are GGUF's. Safetensors MXFP4 is turned into canonical blocks by format/. */
#ifndef ORCD_QUANT_QUANT_H
#define ORCD_QUANT_QUANT_H

#include <stddef.h>
#include <stdint.h>

typedef enum q_type {
    Q_F32 = 0,
    Q_F16 = 1,
    Q_Q4_0 = 2,
    Q_Q4_1 = 3,
    Q_Q5_0 = 6,
    Q_Q5_1 = 7,
    Q_Q8_0 = 8,
    Q_Q4_K = 12,
    Q_Q5_K = 13,
    Q_Q6_K = 14,
    Q_BF16 = 30,
    Q_MXFP4 = 39,
} q_type;

typedef struct q_traits {
    q_type type;
    const char *name;     /* "MXFP4", as `inspect` prints it */
    uint32_t block_len;   /* values per block: 1, 32 or 256 */
    uint32_t block_bytes; /* bytes per block */
    /* n is a multiple of block_len. src and dst do not overlap; no alignment is assumed. */
    void (*unpack)(const void *src, float *dst, size_t n);
    void (*pack)(const float *src, void *dst, size_t n);
    /* sum of row[i] * x[i] in double, in index order: the reference that fast kernels are judged by */
    double (*dot)(const void *row, const float *x, size_t n);
} q_traits;

/* NULL when the number is none of ours. Thread-safe, constant data. */
const q_traits *q_find(uint32_t type);
const q_traits *q_find_name(const char *name); /* case-insensitive */
size_t q_count(void);
const q_traits *q_at(size_t i); /* i < q_count(), in ascending type number */

/* Bytes of a row of n values; n must be a multiple of the block length. */
static inline size_t q_row_bytes(const q_traits *t, size_t n) { return n / t->block_len * t->block_bytes; }

#endif
