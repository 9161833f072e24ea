/* backend/cpu/pack.h: what packing for one instruction set and for all of them share. */
#ifndef ORCD_BACKEND_CPU_PACK_H
#define ORCD_BACKEND_CPU_PACK_H

#include <string.h>

#include "backend/cpu/kernels.h"

#define UNROLL _Pragma("GCC unroll 16")

/* The same block of 16 rows. A row that is not there has blocks of zeros, which every type takes for zeros. */
typedef struct blocks {
    const uint8_t *at[CPU_PANEL];
    size_t step[CPU_PANEL];
} blocks;

static const uint8_t nothing[256];

static inline blocks first_blocks(const uint8_t *rows, size_t row_bytes, int n_row, size_t block_bytes) {
    blocks b;
    for (int r = 0; r < CPU_PANEL; r++) {
        b.at[r] = r < n_row ? rows + (size_t)r * row_bytes : nothing;
        b.step[r] = r < n_row ? block_bytes : 0;
    }
    return b;
}

static inline void next_block(blocks *b) { UNROLL for (int r = 0; r < CPU_PANEL; r++) b->at[r] += b->step[r]; }

/* Rows follow each other, panels too: what is packed next. Reading 16 rows side by side the hardware does not see it.
 */
static inline const uint8_t *next_panel(const blocks *b) {
    return b->step[15] ? b->at[15] + (b->at[15] - b->at[14]) : nothing;
}

#define FETCH(p, bytes)                                                                                                \
    do {                                                                                                               \
        for (size_t i_ = 0; i_ < (bytes); i_ += 64)                                                                    \
            __builtin_prefetch((p) + i_, 0, 2);                                                                        \
    } while (0)

#if defined(__x86_64__)
void cpu_pack_mx4_avx512(blocks b, int64_t n_col, uint8_t *panel);
#endif

#endif
