/* The CPU backend's product kernels of every instruction set that this machine runs, against the reference dot product
 * of each weight type: values, and bits that do not depend on how many rows go together. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "backend/cpu/internal.h"
#include "base/half.h"

enum { N_COL = 512, ROWS = 16, TOKENS = 29 };

static const q_type types[] = {Q_F32,  Q_F16,  Q_BF16,  Q_Q8_0, Q_Q4_0, Q_Q4_1,
                               Q_Q5_0, Q_Q5_1, Q_MXFP4, Q_Q4_K, Q_Q5_K, Q_Q6_K};

static float uniform(uint32_t *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    return (float)(*seed >> 8) / 8388608.0f - 1.0f;
}

typedef struct fixture {
    uint8_t rows[ROWS * N_COL * 4], panel[ROWS * N_COL * 4 + 4096] __attribute__((aligned(64)));
    float x[TOKENS * N_COL], weight[N_COL], y[TOKENS * 16], row[N_COL];
    uint8_t q[TOKENS][N_COL * 4] __attribute__((aligned(64)));
    uint8_t scratch[N_COL * 40] __attribute__((aligned(64)));
} fixture;

static fixture f;

/* Random activations of very different sizes, some of them large. */
static void fill_x(void) {
    uint32_t seed = 7;
    for (int i = 0; i < TOKENS * N_COL; i++)
        f.x[i] = uniform(&seed) * (i % 97 == 0 ? 8.0f : 1.0f);
}

static void fill_rows(const q_traits *t, int n_col) {
    uint32_t seed = 11 + (uint32_t)t->type;
    for (int r = 0; r < ROWS; r++) {
        for (int k = 0; k < n_col; k++)
            f.weight[k] = uniform(&seed);
        t->pack(f.weight, f.rows + (size_t)r * q_row_bytes(t, (size_t)n_col), (size_t)n_col);
    }
}

/* Largest difference from the reference, relative to the size of the sums. Rows are taken in steps: they need not lie
 * at equal distances. */
static double error_of(const cpu_kernels *k, const q_traits *t, int n_col, int n_row, int step) {
    cpu_fmt fmt = cpu_fmt_of(t->type);
    size_t row_bytes = q_row_bytes(t, (size_t)n_col);
    const void *ptr[TOKENS];
    double worst = 0, norm = 0;
    cpu_pack(fmt, t, f.rows, row_bytes, n_row, n_col, f.panel);
    for (int i = 0; i < TOKENS; i++) {
        int at = i * step % TOKENS;
        k->quantise(f.x + i * N_COL, n_col, f.q[at]);
        ptr[i] = cpu_fmt_is_int(fmt) ? (const void *)f.q[at] : (const void *)(f.x + i * N_COL);
    }
    k->dot[fmt](f.panel, n_col, ptr, TOKENS, f.y, f.scratch);
    for (int i = 0; i < TOKENS; i++) {
        for (int n = 1; n <= 5 && i + n <= TOKENS; n++) { /* alone and in any company: the same bits */
            float few[5 * 16];
            k->dot[fmt](f.panel, n_col, ptr + i, n, few, f.scratch);
            assert_memory_equal(few, f.y + i * 16, (size_t)n * 16 * sizeof(float));
        }
        for (int r = 0; r < 16; r++) {
            double want = r < n_row ? t->dot(f.rows + (size_t)r * row_bytes, f.x + i * N_COL, (size_t)n_col) : 0;
            worst = fmax(worst, fabs(f.y[i * 16 + r] - want));
            norm += want * want / (TOKENS * n_row);
        }
    }
    return worst / sqrt(norm);
}

static void on_every_tier(void (*check)(const cpu_kernels *k, double bound)) {
    for (int tier = CPU_PORTABLE; tier <= (int)cpu_tier_best(); tier++) {
        if (tier == CPU_AVXVNNI && cpu_tier_best() != CPU_AVXVNNI)
            continue; /* an AVX-512 machine need not have it */
        const cpu_kernels *k = cpu_kernels_for((cpu_tier)tier, false), *k8 = cpu_kernels_for((cpu_tier)tier, true);
        check(k, 1e-3);
        if (k8 != k)
            check(k8, 8e-2); /* the largest of some hundred errors of about 1 % */
    }
}

static void check_types(const cpu_kernels *k, double bound) {
    for (size_t i = 0; i < ORCD_COUNT(types); i++) {
        const q_traits *t = q_find(types[i]);
        fill_rows(t, N_COL);
        double e = error_of(k, t, N_COL, ROWS, 1);
        if (!(e <= bound))
            fail_msg("%s: error %.2e of %.2e", t->name, e, bound);
    }
}

static void test_every_type_on_every_tier(void **state) {
    (void)state;
    on_every_tier(check_types);
}

static void check_tails(const cpu_kernels *k, double bound) {
    static const q_type short_types[] = {Q_Q8_0, Q_Q4_0, Q_Q4_1, Q_Q5_1, Q_MXFP4, Q_BF16, Q_F16, Q_F32};
    for (size_t i = 0; i < ORCD_COUNT(short_types); i++) {
        const q_traits *t = q_find(short_types[i]);
        for (int n_col = t->block_len == 1 ? 1 : 32; n_col <= 160; n_col += t->block_len == 1 ? 53 : 64) {
            fill_rows(t, n_col);
            double e = error_of(k, t, n_col, 5, 1); /* lanes past the last row are zero */
            if (!(e <= bound))
                fail_msg("%s, %d columns: error %.2e of %.2e", t->name, n_col, e, bound);
        }
    }
}

static void test_columns_and_rows_that_do_not_fill_a_block(void **state) {
    (void)state;
    on_every_tier(check_tails);
}

/* Neighbouring blocks whose exponents are 0 to 30 apart, blocks of zeros, and exponents 0 and 1. */
static void check_exponents(const cpu_kernels *k, double bound) {
    const q_traits *t = q_find(Q_MXFP4);
    for (int apart = 0; apart <= 30; apart++) {
        fill_rows(t, N_COL);
        for (int b = 0; b < ROWS * N_COL / 32; b++) {
            uint8_t *block = f.rows + b * 17;
            block[0] = (uint8_t)(b % 2 ? 120 : b % 5 ? 120 - apart : b % 3);
            if (b % 7 == 0)
                memset(block + 1, 0, 16);
        }
        double e = error_of(k, t, N_COL, ROWS, 1);
        if (!(e <= bound))
            fail_msg("exponents %d apart: error %.2e of %.2e", apart, e, bound);
    }
}

static void test_mxfp4_exponents_far_apart(void **state) {
    (void)state;
    on_every_tier(check_exponents);
}

/* Two panels at once have the bits of each alone, whatever the number of rows; exponents far apart too. */
static void check_pairs(const cpu_kernels *k, double bound) {
    (void)bound;
    const q_traits *t = q_find(Q_MXFP4);
    size_t row_bytes = q_row_bytes(t, N_COL), panel = cpu_panel_bytes(CPU_MX4, N_COL);
    static float two[2 * TOKENS * 16], one[TOKENS * 16];
    const void *ptr[TOKENS];
    for (int i = 0; i < TOKENS; i++) {
        k->quantise(f.x + i * N_COL, N_COL, f.q[i]);
        ptr[i] = f.q[i];
    }
    for (int far = 0; k->pair_mx4 && far < 2; far++) {
        fill_rows(t, N_COL);
        cpu_pack(CPU_MX4, t, f.rows, row_bytes, ROWS, N_COL, f.panel);
        f.rows[row_bytes] = far ? 90 : f.rows[row_bytes];
        cpu_pack(CPU_MX4, t, f.rows + row_bytes, row_bytes, ROWS - 1, N_COL, f.panel + panel);
        for (int n = 1; n <= TOKENS; n++) {
            k->pair_mx4(f.panel, N_COL, ptr, n, two, f.scratch);
            for (int i = 0; i < 2; i++) {
                k->dot[CPU_MX4](f.panel + i * panel, N_COL, ptr, n, one, f.scratch);
                assert_memory_equal(two + i * n * 16, one, (size_t)n * 16 * sizeof *one);
            }
        }
    }
}

static void test_mxfp4_two_panels_at_once(void **state) {
    (void)state;
    on_every_tier(check_pairs);
}

static void check_zero(const cpu_kernels *k, double bound) {
    (void)bound;
    uint8_t q[1024] __attribute__((aligned(64)));
    float x[64] = {0};
    k->quantise(x, 64, q);
    assert_true(cpu_q_scale(q, 1)[0] == 0 && q[0] == 0);
    x[5] = 1e-39f; /* subnormal: too small to keep, too small to divide by */
    k->quantise(x, 64, q);
    assert_true(isfinite(cpu_q_scale(q, 1)[0]));
}

static void test_activations_of_zero(void **state) {
    (void)state;
    on_every_tier(check_zero);
}

/* ---- attention to one page ---- */

enum { HEAD = 64, QUERIES = 21, SEEN_FIRST = 3, SEEN_LAST = 54 };

static struct {
    float q[QUERIES][HEAD], k[HEAD][CPU_PAGE], v[CPU_PAGE][HEAD], acc[QUERIES][HEAD];
    uint16_t k16[HEAD][CPU_PAGE], v16[CPU_PAGE][HEAD];
} page;

/* What nobody sees is not a number. */
static void fill_page(void) {
    uint32_t seed = 3;
    for (int i = 0; i < QUERIES * HEAD; i++)
        page.q[i / HEAD][i % HEAD] = 2 * uniform(&seed);
    for (int p = 0; p < CPU_PAGE; p++)
        for (int d = 0; d < HEAD; d++) {
            bool seen = p >= SEEN_FIRST && p <= SEEN_LAST;
            page.k16[d][p] = seen ? f16_from_f32(uniform(&seed)) : 0x7e00;
            page.v16[p][d] = seen ? f16_from_f32(uniform(&seed)) : 0x7e00;
            page.k[d][p] = f32_from_f16(page.k16[d][p]);
            page.v[p][d] = f32_from_f16(page.v16[p][d]);
        }
}

/* n rows from row `at` on, every fifth of which sees nothing. */
static void attend(const cpu_kernels *k, bool f16, int at, int n, cpu_attn_tile *t) {
    *t = (cpu_attn_tile){.n = n, .head_dim = HEAD, .scale = 0.125f};
    for (int i = 0; i < n; i++) {
        int row = at + i;
        t->q[i] = page.q[row];
        t->first[i] = row % 2 ? SEEN_FIRST : SEEN_FIRST + row;
        t->last[i] = row % 5 == 4 ? -1 : SEEN_LAST - row;
        t->max[i] = -INFINITY;
        t->acc[i] = memset(page.acc[row], 0, sizeof page.acc[row]);
    }
    (f16 ? k->attn_f16 : k->attn_f32)(t, f16 ? (void *)page.k16 : page.k, f16 ? (void *)page.v16 : page.v);
}

static double attention_error(const cpu_attn_tile *t, int row) {
    double want[HEAD] = {0}, sum = 0, worst = 0;
    for (int p = t->first[row]; p <= t->last[row]; p++) {
        double s = 0;
        for (int d = 0; d < HEAD; d++)
            s += (double)page.q[row][d] * page.k[d][p];
        s = exp(s * t->scale);
        sum += s;
        for (int d = 0; d < HEAD; d++)
            want[d] += s * page.v[p][d];
    }
    for (int d = 0; sum > 0 && d < HEAD; d++)
        worst = fmax(worst, fabs(t->acc[row][d] / t->sum[row] - want[d] / sum));
    return sum > 0 ? worst : fabs(t->acc[row][0]);
}

static void check_attention(const cpu_kernels *k, double bound) {
    float all[QUERIES][HEAD];
    cpu_attn_tile t;
    for (int f16 = 0; f16 < 2; f16++) {
        attend(k, f16, 0, QUERIES, &t);
        for (int row = 0; row < QUERIES; row++)
            if (!(attention_error(&t, row) <= bound * 0.05))
                fail_msg("row %d: error %.2e of %.2e", row, attention_error(&t, row), bound * 0.05);
        memcpy(all, page.acc, sizeof all);
        for (int row = 0; row < QUERIES; row++) { /* alone and in any company: the same bits */
            attend(k, f16, row, row + 3 < QUERIES ? 1 + row % 3 : 1, &t);
            assert_memory_equal(page.acc[row], all[row], sizeof all[row]);
        }
    }
}

static void test_attention_on_every_tier(void **state) {
    (void)state;
    fill_page();
    on_every_tier(check_attention);
}

/* The tiles of AMX and the vectors of AVX-512 do the same arithmetic. */
static void test_amx_has_the_bits_of_avx512(void **state) {
    (void)state;
#if defined(__x86_64__)
    static const q_type tile_types[] = {Q_Q8_0, Q_MXFP4};
    static float want[TOKENS * 16];
    if (cpu_tier_best() < CPU_AMX) {
        print_message("SKIP: this machine does not execute AMX\n");
        skip();
    }
    for (int few_bits = 0; few_bits < 2; few_bits++)
        for (size_t i = 0; i < ORCD_COUNT(tile_types); i++) {
            const q_traits *t = q_find(tile_types[i]);
            fill_rows(t, N_COL);
            error_of(cpu_kernels_for(CPU_AVX512, few_bits), t, N_COL, ROWS, 1);
            memcpy(want, f.y, sizeof want);
            for (int step = 1; step < 4; step++) {
                error_of(cpu_kernels_for(CPU_AMX, few_bits), t, N_COL, ROWS, step);
                assert_memory_equal(f.y, want, sizeof want);
            }
        }
#endif
}

static int setup(void **state) {
    (void)state;
    fill_x();
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_type_on_every_tier),
        cmocka_unit_test(test_columns_and_rows_that_do_not_fill_a_block),
        cmocka_unit_test(test_mxfp4_exponents_far_apart),
        cmocka_unit_test(test_mxfp4_two_panels_at_once),
        cmocka_unit_test(test_activations_of_zero),
        cmocka_unit_test(test_attention_on_every_tier),
        cmocka_unit_test(test_amx_has_the_bits_of_avx512),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
