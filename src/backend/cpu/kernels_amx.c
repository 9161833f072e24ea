/* Products of many rows on AMX tiles. 64 columns of a panel, [16 groups][16 rows][4 columns], are a tile as they stand;
 * 16 activation rows are another, for each plane of bytes. Tiles add integers, which is exact, and the scales are
 * applied in the order of the AVX-512 kernels: the same bits, so that few rows may stay there. */
#include <immintrin.h>

#include "backend/cpu/kernels.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* gcc's tile intrinsics paste these into the assembler's text, and do not say which memory they read and write. */
#define SUM_HIGH 0
#define SUM_LOW 1
#define WEIGHTS 2
#define ACTS_HIGH 3
#define ACTS_LOW 4
#define USED(p) __asm__ volatile("" ::"r"(p) : "memory")

enum { ROWS = 16, WORTH = 6 /* rows: fewer are faster on AVX-512 */ };

/* Tiles of 16 rows of 64 bytes. Blocks of 32 columns: activations have 32 bytes, weights 8 rows. */
static void configure(bool by32) {
    uint8_t c[64] __attribute__((aligned(64))) = {1}; /* palette; from 16 on bytes of a row (u16), from 48 on rows */
    for (int i = 0; i <= ACTS_LOW; i++) {
        c[16 + 2 * i] = by32 && i >= ACTS_HIGH ? 32 : 64;
        c[48 + i] = by32 && i == WEIGHTS ? 8 : ROWS;
    }
    USED(c);
    _tile_loadconfig(c);
}

/* 64 columns on their way through the tiles. */
typedef struct stage {
    uint8_t act[2][ROWS][64];                                 /* activations by plane */
    int32_t sum[2][2][ROWS][16] __attribute__((aligned(64))); /* by block of 32 columns, and plane */
} stage __attribute__((aligned(64)));

/* Up to sixteen rows; those past the last repeat it, and nobody looks at their sums. */
typedef struct rows {
    const uint8_t *at[ROWS];
    int n;
    int64_t n64;
    ptrdiff_t stride; /* from each row to the next; 0: they lie anyhow, and tiles need copies of them */
} rows;

static void find_rows(const void *const *x, int n, int64_t n64, rows *r) {
    r->n = n < ROWS ? n : ROWS;
    r->n64 = n64;
    for (int t = 0; t < ROWS; t++)
        r->at[t] = x[t < r->n ? t : r->n - 1];
    r->stride = r->at[1] - r->at[0];
    for (int t = 1; t < ROWS; t++)
        r->stride = r->at[t] - r->at[t - 1] == r->stride ? r->stride : 0;
}

INLINE void gather(stage *s, const rows *r, int64_t b, const int planes) {
    UNROLL for (int t = 0; t < ROWS; t++) {
        _mm512_store_si512(s->act[0][t], _mm512_loadu_si512(r->at[t] + b * 64));
        if (planes == 2)
            _mm512_store_si512(s->act[1][t], _mm512_loadu_si512(r->at[t] + (r->n64 + b) * 64));
    }
}

/* w: 64 columns of unsigned bytes. */
INLINE void multiply(stage *s, const rows *r, int64_t b, const uint8_t *w, const bool by32, const int planes) {
    const uint8_t *high = r->stride ? r->at[0] + b * 64 : s->act[0][0];
    const uint8_t *low = r->stride ? r->at[0] + (r->n64 + b) * 64 : s->act[1][0];
    ptrdiff_t stride = r->stride ? r->stride : 64;
    USED(s);
    UNROLL for (int h = 0; h <= by32; h++) {
        _tile_zero(SUM_HIGH);
        _tile_loadd(WEIGHTS, w + h * 512, 64);
        _tile_loadd(ACTS_HIGH, high + h * 32, stride);
        _tile_dpbsud(SUM_HIGH, ACTS_HIGH, WEIGHTS);
        if (planes == 2) {
            _tile_zero(SUM_LOW);
            _tile_loadd(ACTS_LOW, low + h * 32, stride);
            _tile_dpbsud(SUM_LOW, ACTS_LOW, WEIGHTS);
            _tile_stored(SUM_LOW, s->sum[h][1], 64);
        }
        _tile_stored(SUM_HIGH, s->sum[h][0], 64);
    }
    USED(s);
}

/* One row's integers as a float: what begin_planes and join_planes of integer_avx512.h do. */
INLINE __m512 joined(const stage *s, int h, int t, int32_t offset, const int planes) {
    __m512i a = _mm512_add_epi32(_mm512_load_si512(s->sum[h][planes - 1][t]), _mm512_set1_epi32(offset));
    if (planes == 2)
        a = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(s->sum[h][0][t]), 8), a);
    return _mm512_cvtepi32_ps(a);
}

/* f[t] += block b of row t. head: f16 scales of both blocks of 32 columns, or a float scale of all 64. */
INLINE void scale(const stage *s, const rows *r, int64_t b, const uint8_t *head, const bool by32, const int planes,
                  __m512 *f) {
    __m512 w0 = by32 ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)head)) : _mm512_loadu_ps(head);
    __m512 w1 = by32 ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(head + 32))) : w0;
    UNROLL for (int t = 0; t < ROWS; t++) {
        const uint8_t *row = r->at[t];
        __m512 x = _mm512_set1_ps(cpu_q_scale(row, r->n64)[b]);
        if (by32) {
            const int32_t *offset = cpu_q_c32(row, r->n64) + b * 2;
            __m512 part = _mm512_mul_ps(joined(s, 0, t, offset[0], planes), w0);
            part = _mm512_fmadd_ps(joined(s, 1, t, offset[1], planes), w1, part);
            f[t] = _mm512_fmadd_ps(part, x, f[t]);
        } else {
            f[t] = _mm512_fmadd_ps(joined(s, 0, t, cpu_q_c64(row, r->n64)[b], planes), _mm512_mul_ps(w0, x), f[t]);
        }
    }
}

/* 64 columns take 1,088 bytes: scales and 16 groups. While the tiles have one block, the next is gathered and the one
 * before is scaled. */
INLINE void sixteen(const uint8_t *w, const rows *r, float *y, const bool by32, const int planes) {
    stage s[2];
    __m512 f[ROWS];
    UNROLL for (int t = 0; t < ROWS; t++) f[t] = _mm512_setzero_ps();
    if (!r->stride)
        gather(&s[0], r, 0, planes);
    for (int64_t b = 0; b <= r->n64; b++, w += 1088) {
        if (b + 1 < r->n64 && !r->stride)
            gather(&s[(b + 1) % 2], r, b + 1, planes);
        if (b < r->n64)
            multiply(&s[b % 2], r, b, w + 64, by32, planes);
        if (b > 0)
            scale(&s[(b - 1) % 2], r, b - 1, w - 1088, by32, planes, f);
    }
    UNROLL for (int t = 0; t < ROWS; t++) if (t < r->n) _mm512_storeu_ps(y + t * 16, f[t]);
}

/* Rows by sixteen as long as it is worth it; returns how many. */
INLINE int many(const uint8_t *w, int64_t n64, const void *const *x, int n, float *y, const bool by32,
                const int planes) {
    int at = 0;
    configure(by32);
    while (n - at >= WORTH) {
        rows r;
        find_rows(x + at, n - at, n64, &r);
        sixteen(w, &r, y + at * 16, by32, planes);
        at += r.n;
    }
    _tile_release();
    return at;
}

INLINE void dot_i8(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch,
                   const int planes, const cpu_kernels *few) {
    int done = n < WORTH ? 0 : many(panel, cpu_n64(n_col), x, n, y, true, planes);
    if (done < n)
        few->dot[CPU_I8](panel, n_col, x + done, n - done, y + done * 16, scratch);
}

/* Unpacked to bytes first, unless exponents are too far apart for that. */
INLINE void dot_mx4(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch,
                    const int planes, const cpu_kernels *few) {
    int64_t n64 = cpu_n64(n_col);
    int done = 0;
    if (n >= WORTH && !panel[n64 * 32]) {
        cpu_mx4_unpack(panel, n64, scratch);
        done = many(scratch, n64, x, n, y, false, planes);
    }
    if (done < n)
        few->dot[CPU_MX4](panel, n_col, x + done, n - done, y + done * 16, scratch);
}

#define KERNEL(name, dot, planes, few)                                                                                 \
    void name(const uint8_t *panel, int64_t n_col, const void *const *x, int n, float *y, uint8_t *scratch) {          \
        dot(panel, n_col, x, n, y, scratch, planes, &few);                                                             \
    }
KERNEL(cpu_amx_i8_16, dot_i8, 2, cpu_kernels_avx512)
KERNEL(cpu_amx_i8_8, dot_i8, 1, cpu_kernels_avx512_8)
KERNEL(cpu_amx_mx4_16, dot_mx4, 2, cpu_kernels_avx512)
KERNEL(cpu_amx_mx4_8, dot_mx4, 1, cpu_kernels_avx512_8)
