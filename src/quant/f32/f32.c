#include "quant/f32/f32.h"

#include "quant/block.h"

static void unpack(const void *src, float *dst, size_t n) { memcpy(dst, src, n * sizeof *dst); }

static void pack(const float *src, void *dst, size_t n) { memcpy(dst, src, n * sizeof *src); }

static double dot(const void *row, const float *x, size_t n) { return q_dot_by_block(&q_traits_f32, row, x, n); }

const q_traits q_traits_f32 = {Q_F32, "F32", 1, sizeof(q_block_f32), unpack, pack, dot};
