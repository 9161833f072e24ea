/* backend/cpu/kernels.h: what runs in the inner loops, once per instruction set. May include base.
 *
 * Weights are stored in PANELS of 16 rows, interleaved so that one vector lane is one row and no sum is ever taken
 * across lanes. Every kernel computes, for one panel and n activation rows, y[t][16] = panel . x[t], and does the
 * same arithmetic in the same order for each t whatever n is: that is what makes results independent of the batch. */
#ifndef ORCD_BACKEND_CPU_KERNELS_H
#define ORCD_BACKEND_CPU_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/cpu.h"

#define CPU_PANEL 16     /* rows of a panel */
#define CPU_TOKENS 128   /* activation rows that a kernel is called with at most */
#define CPU_ATTN_ROWS 64 /* query rows that share a KV head's page in one call */
#define CPU_PAGE 64

typedef enum cpu_fmt {
    /* [n_col][16] f32 / f16;  bf16: [n_col / 2][16][2], a last odd column padded with zero */
    CPU_F32,
    CPU_F16,
    CPU_BF16,
    /* Integers, columns in groups of 64 (the last padded with zeros). Bytes of a group of 4 columns lie together for
     * each row, [16 rows][4 columns] = 64 bytes, as vpdpbusd wants them.
     * I8: per 64 columns f16 scale[2][16], then 16 groups of (weight + 128) */
    CPU_I8,
    /* MXFP4. Head: per 64 columns u16[16] = e << 8 | s1 << 4 | s0: the two blocks of 32 have exponents e + s0 and
     * e + s1, so that w << s are integers of one common scale. Then a byte `wide` (some s > 3: w << s leaves a byte).
     * Then per 64 columns 8 vectors of 64 bytes, vector j: low nibble = group 2j, high nibble = group 2j + 1 */
    CPU_MX4,
    /* Codes with a scale and a minimum (value = scale * code - min) per 32 columns: nibbles as in MX4, 256 bytes, and
     * for codes of 5 bits 64 bytes of high bits, bit g of a byte belongs to group g.
     * Q4_1, Q5_1: per 32 columns f16 d[16], min[16], nibbles, high bits.
     * Q4_K, Q5_K: per 256 columns f16 d[16], dmin[16], u8 scale[8][16], min[8][16], 8 blocks' nibbles, their high
     * bits. Only the blocks that n_col asks for are read of the last 256 */
    CPU_Q41,
    CPU_Q51,
    CPU_Q4K,
    CPU_Q5K,
    /* Q6_K: per 256 columns f16 d[16], 32 unused bytes, i8 scale[16][16], low nibbles as in MX4 (2,048 bytes), then
     * 16 vectors of 64 bytes for the high bits, vector h: bits 2f, 2f+1 of a byte belong to group 4h + f */
    CPU_Q6K,
    CPU_N_FMTS
} cpu_fmt;

/* An activation row as 16-bit integers, blocks of 64 columns sharing a scale, kept as two planes of bytes:
 * x = scale * (256 * high + low). One row of n64 blocks:
 *   int8 high[n64 * 64], low[n64 * 64], float scale[n64], int32 c64[n64], c32[n64 * 2], c16[n64 * 4]
 * where c64 and c32 are -128 x the sums of 64 and 32 integers and c16 is -32 x the sums of 16: what takes the offset
 * of unsigned weights out again. Eight bits are less than the golden tests ask for: their 0.5 % of noise turns close
 * calls of the router. As an option of the device (act_bits) only `high` is filled: x = scale * high. */
static inline int64_t cpu_n64(int64_t n_col) { return (n_col + 63) / 64; }
static inline size_t cpu_qrow_bytes(int64_t n_col) { return ((size_t)cpu_n64(n_col) * 160 + 63) & ~(size_t)63; }
static inline const float *cpu_q_scale(const uint8_t *row, int64_t n64) { return (const float *)(row + n64 * 128); }
static inline const int32_t *cpu_q_c64(const uint8_t *row, int64_t n64) { return (const int32_t *)(row + n64 * 132); }
static inline const int32_t *cpu_q_c32(const uint8_t *row, int64_t n64) { return (const int32_t *)(row + n64 * 136); }
static inline const int32_t *cpu_q_c16(const uint8_t *row, int64_t n64) { return (const int32_t *)(row + n64 * 144); }

static inline size_t cpu_mx4_head(int64_t n64) { return ((size_t)n64 * 32 + 1 + 63) & ~(size_t)63; }

/* Formats with a minimum: bytes of 32 columns (Q4_1, Q5_1) or of 256. */
static inline bool cpu_min_fifth(cpu_fmt f) { return f == CPU_Q51 || f == CPU_Q5K; }
static inline size_t cpu_min_stride(cpu_fmt f) {
    return f <= CPU_Q51 ? 64 + 256 + (f == CPU_Q51 ? 64 : 0) : 64 + 256 + 2048 + (f == CPU_Q5K ? 512 : 0);
}

/* Where block b of 32 columns lies, and its scales and minima. */
typedef struct cpu_min_block {
    const uint8_t *d;     /* f16 d[16], min[16] */
    const uint8_t *scale; /* u8[16], the minima 128 bytes further; NULL: d and min are meant as they are */
    const uint8_t *nibbles, *high;
} cpu_min_block;

static inline cpu_min_block cpu_min_at(cpu_fmt f, const uint8_t *panel, int64_t b) {
    if (f <= CPU_Q51) {
        panel += (size_t)b * cpu_min_stride(f);
        return (cpu_min_block){panel, NULL, panel + 64, panel + 64 + 256};
    }
    panel += (size_t)(b / 8) * cpu_min_stride(f);
    return (cpu_min_block){panel, panel + 64 + b % 8 * 16, panel + 320 + b % 8 * 256, panel + 2368 + b % 8 * 64};
}

/* Bytes of one panel. */
static inline size_t cpu_panel_bytes(cpu_fmt f, int64_t n_col) {
    size_t n = (size_t)n_col, n64 = (size_t)cpu_n64(n_col), n256 = (n + 255) / 256;
    switch (f) {
    case CPU_F32:
        return n * 64;
    case CPU_F16:
        return (n * 32 + 63) & ~(size_t)63;
    case CPU_BF16:
        return (n + 1) / 2 * 64;
    case CPU_I8:
        return n64 * (64 + 1024);
    case CPU_MX4:
        return cpu_mx4_head(cpu_n64(n_col)) + n64 * 512;
    case CPU_Q41:
    case CPU_Q51:
        return n64 * 2 * cpu_min_stride(f);
    case CPU_Q4K:
    case CPU_Q5K:
        return n256 * cpu_min_stride(f);
    case CPU_Q6K:
        return n256 * (64 + 256 + 2048 + 1024);
    default:
        return 0;
    }
}

static inline bool cpu_fmt_is_int(cpu_fmt f) { return f >= CPU_I8; }

/* Scratch that a dot kernel may use: a panel's integers and scales. */
static inline size_t cpu_dot_scratch(int64_t n_col) { return (size_t)cpu_n64(n_col) * (1024 + 64); }

/* x: n rows, floats for the float formats and integer rows (above) for the others. n <= CPU_TOKENS. */
typedef void (*cpu_dot_fn)(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y /* [n][16] */,
                           uint8_t *scratch);

/* One page of one KV head against some query rows: K transposed [head_dim][64], V [64][head_dim]. */
typedef struct cpu_attn_tile {
    int n, head_dim;
    float scale;
    const float *q[CPU_ATTN_ROWS]; /* [head_dim] */
    int first[CPU_ATTN_ROWS],
        last[CPU_ATTN_ROWS];                      /* visible positions of the page, both included; none: last < first */
    float max[CPU_ATTN_ROWS], sum[CPU_ATTN_ROWS]; /* running softmax */
    float *acc[CPU_ATTN_ROWS];                    /* [head_dim] running weighted sum of values */
} cpu_attn_tile;

/* A screen of 5 bits beside the panels of the head, in panels too: what bounds 16 products from above at 0.67 bytes a
 * weight. Head: per 64 columns f16 scale[16], u8 slack[16], in all a multiple of 64 bytes. Then per 32 columns 256
 * bytes of nibbles as in MX4, 64 of fifth bits, bit g of a byte belonging to group g. A weight is about scale * (code -
 * 16); what a row's 64 miss has a norm of at most |scale| * slack / CPU_SLACK_ONE. */
#define CPU_SCREEN_HEAD 48
#define CPU_SLACK_ONE 32
static inline size_t cpu_screen_head(int64_t n64) { return ((size_t)n64 * CPU_SCREEN_HEAD + 63) & ~(size_t)63; }
static inline size_t cpu_screen_bytes(int64_t n_col) {
    size_t n64 = (size_t)cpu_n64(n_col);
    return cpu_screen_head(cpu_n64(n_col)) + n64 * 640;
}

typedef struct cpu_kernels {
    cpu_dot_fn dot[CPU_N_FMTS];
    cpu_dot_fn pair_mx4; /* two neighbouring panels of MX4, y[2][n][16], scratch twice; or NULL: no faster than one */
    /* bound[t] >= the panel's 16 products as the exact kernel computes them, infinite where nothing can be said. x: n
     * <= CPU_FEW integer rows; norm: at least the norm of each of their blocks of 64, in which slack is meant. NULL:
     * the exact products cost no more */
    void (*screen)(const uint8_t *panel, int64_t n_col, const void *const *x, const float *const *norm, int n,
                   float *bound);
    /* One row of n64 * 64 floats into row r of a screen's panel; rounding: what is added to each slack */
    void (*screen_row)(const float *w, int64_t n64, int r, int rounding, uint8_t *panel);
    void (*quantise)(const float *x, int64_t n, uint8_t *row); /* to an integer row */
    void (*rms_norm)(const float *x, const float *weight, float eps, int64_t n, float *y);
    void (*layer_norm)(const float *x, const float *weight, const float *bias /* or NULL */, float eps, int64_t n,
                       float *y);
    /* y = g * sigmoid(alpha g) * (u + 1), g and u clamped; n a multiple of 16; y may be g */
    void (*glu)(const float *g, const float *u, int64_t n, float alpha, float limit, float *y);
    void (*gelu_tanh)(float *y, int64_t n); /* n a multiple of 16 */
    /* y = dot + bias[16] (+ y) for n rows of 16; y may be dot */
    void (*put)(const float *dot, const float *bias, int64_t n, bool add, float *y, int64_t stride);
    /* y[16] += sum over k of weight[2 k] * x[k * stride + 0..15], in the order of k */
    void (*combine)(const float *x, int64_t stride, const float *weight, int n, float *y);
    /* rotary positions of one head: turn holds `half` cosines, then `half` sines */
    void (*rotate)(float *x, const float *turn, int half);
    void (*attn_f16)(cpu_attn_tile *t, const void *k, const void *v);
    void (*attn_f32)(cpu_attn_tile *t, const void *k, const void *v);
} cpu_kernels;

/* Never NULL: the best table that was compiled for `tier` or below. few_bits: with 8-bit activations and
 * attention in bf16, where the tier has them (AVX-512). */
const cpu_kernels *cpu_kernels_for(cpu_tier tier, bool few_bits);

extern const cpu_kernels cpu_kernels_portable;
#if defined(__x86_64__)
extern const cpu_kernels cpu_kernels_avx2, cpu_kernels_avxvnni, cpu_kernels_avx512, cpu_kernels_avx512_8,
    cpu_kernels_amx, cpu_kernels_amx_8;

/* Between the AVX-512 and the AMX kernels. A panel of MXFP4 unpacked for many rows: per 64 columns float scale[16] and
 * 16 groups of (weight << s) + 128. */
void cpu_mx4_unpack(const uint8_t *panel, int64_t n64, uint8_t *out);
void cpu_amx_i8_16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch);
void cpu_amx_i8_8(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch);
void cpu_amx_mx4_16(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch);
void cpu_amx_mx4_8(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch);
#endif

#endif
