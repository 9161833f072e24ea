/* backend/cuda/pack.cuh: rows of f16 in the order in which wide.cuh and flow.cuh copy them, written where they are
 * made.
 *
 * [unit of 64 columns][row][128 bytes]; see wide.cuh. */
#ifndef ORCD_BACKEND_CUDA_PACK_CUH
#define ORCD_BACKEND_CUDA_PACK_CUH

#include "backend/cuda/cuda.h"

/* Bytes from a row's start in its unit: column (0..63) of row i. */
static __device__ __forceinline__ int wide_at(int col, int64_t i) {
    const int piece = (col >> 5) * 4 + (col >> 1 & 3);
    return ((piece ^ (int)(i & 7)) << 4) + (col >> 3 & 3) * 4 + (col & 1) * 2;
}

#define PACK_LEAST 17 /* rows of a step: fewer go through other kernels, of more a copy is as soon done */
#define PACK_MOST 128
struct pack_to {
    uint8_t *at; /* NULL: nobody wants them so */
    int64_t ld;  /* rows */
    /* Where column `col` of a row belongs, and the one after it where col is even. */
    __device__ __forceinline__ uint8_t *of(int64_t row, int col) const {
        return at + (col / 64 * ld + row) * 128 + wide_at(col % 64, row);
    }
};

/* The rows that a command writes into y, for the command after it, where that may be a product by wgmma. There is room
 * for so many bytes. */
static inline pack_to pack_rows(cuda_run *r, const cuda_act *y, int rows, void *at, size_t room) {
    const size_t bytes = (size_t)round_up(rows, 8) * (size_t)y->ld * 2;
    if (!cuda_has_wide(r->dev) || rows < PACK_LEAST || rows > PACK_MOST || !y->f16 || y->ld != y->base.width ||
        bytes > room)
        return {NULL, 0};
    r->packed = y;
    r->pack = (uint8_t *)at;
    return {r->pack, round_up(rows, 8)};
}

#endif
