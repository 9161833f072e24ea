/* Speed of the CPU backend's product kernels on one thread, in processor time (other processes disturb little):
 * streaming one activation row over weights larger than the caches, in GB/s of weights, and many rows over a panel, in
 * 1e9 multiply-adds a second; and the ceilings of the machine. Build and run: make bench && build/bench/cpu_kernels [8]
 * where 8 asks for 8-bit activations. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend/cpu/internal.h"

enum { REPS = 7, BYTES = 192 << 20 };

static double cpu_time(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double read_bandwidth(const uint8_t *p) {
    double best = 1e9;
    for (int r = 0; r < REPS; r++) {
        uint64_t sum[8] = {0};
        double t0 = cpu_time();
        for (size_t i = 0; i < BYTES; i += 64)
            for (int k = 0; k < 8; k++)
                sum[k] ^= *(const uint64_t *)(const void *)(p + i + k * 8);
        __asm__ volatile("" ::"r"(sum) : "memory");
        double t = cpu_time() - t0;
        best = t < best ? t : best;
    }
    return BYTES / best / 1e9;
}

/* Panels of zero weights are as slow as any. */
static void measure(const cpu_kernels *k, const char *name, cpu_fmt f, int64_t n_col, uint8_t *weights) {
    size_t panel = cpu_panel_bytes(f, n_col), n_panel = BYTES / panel;
    uint8_t *rows = cpu_alloc(CPU_TOKENS * cpu_qrow_bytes(n_col)), *scratch = cpu_alloc(cpu_dot_scratch(n_col));
    float *x = cpu_alloc(CPU_TOKENS * (size_t)n_col * sizeof *x), *y = cpu_alloc(CPU_TOKENS * 16 * sizeof *y);
    const void *ptr[CPU_TOKENS];
    for (int64_t i = 0; i < CPU_TOKENS * n_col; i++)
        x[i] = (float)(i * 7919 % 2001 - 1000) * 1e-3f;
    for (int t = 0; t < CPU_TOKENS; t++) {
        uint8_t *row = rows + (size_t)t * cpu_qrow_bytes(n_col);
        k->quantise(x + t * n_col, n_col, row);
        ptr[t] = cpu_fmt_is_int(f) ? (const void *)row : (const void *)(x + t * n_col);
    }
    memset(weights, 0, BYTES);
    for (size_t i = 0; f == CPU_MX4 && i < n_panel; i++)
        for (int64_t b = 0; b < cpu_n64(n_col) * 16; b++)
            weights[i * panel + (size_t)b * 2 + 1] = 120;
    static const int tokens[] = {1, 2, 4, 8, 16, 64, 128};
    printf("%-6s %5d", name, (int)n_col);
    for (size_t c = 0; c < ORCD_COUNT(tokens); c++) {
        int n = tokens[c];
        size_t used = n <= 4 ? n_panel : 4 + 256 / (size_t)n;
        double best = 1e9;
        for (int r = 0; r < REPS; r++) {
            double t0 = cpu_time();
            for (size_t i = 0; i < used; i++)
                k->dot[f](weights + i * panel, n_col, ptr, n, y, scratch);
            double t = (cpu_time() - t0) / (double)used;
            best = t < best ? t : best;
        }
        if (n <= 4)
            printf("  x%d %5.1f GB/s", n, (double)panel / best / 1e9);
        else
            printf("  x%d %5.1f", n, 16.0 * (double)n_col * n / best / 1e9);
    }
    printf("\n");
    cpu_free(rows, CPU_TOKENS * cpu_qrow_bytes(n_col));
    cpu_free(scratch, cpu_dot_scratch(n_col));
    cpu_free(x, CPU_TOKENS * (size_t)n_col * sizeof *x);
    cpu_free(y, CPU_TOKENS * 16 * sizeof *y);
}

static void measure_rows(const cpu_kernels *k) {
    enum { N = 2880 };
    static float x[N], y[N], w[N];
    static uint8_t q[N * 4];
    for (int i = 0; i < N; i++)
        x[i] = w[i] = (float)(i % 17) - 8;
    double t0 = cpu_time();
    for (int i = 0; i < 2000; i++)
        k->quantise(x, N, q);
    double t1 = cpu_time();
    for (int i = 0; i < 2000; i++)
        k->rms_norm(x, w, 1e-5f, N, y);
    double t2 = cpu_time();
    for (int i = 0; i < 2000; i++)
        k->glu(x, w, N, 1.702f, 7, y);
    double t3 = cpu_time();
    printf("rows of %d: to integers %.2f us, rms norm %.2f us, glu %.2f us\n", N, (t1 - t0) * 500, (t2 - t1) * 500,
           (t3 - t2) * 500);
}

static void measure_attention(const cpu_kernels *k) {
    enum { PAGES = 64, HD = 64 };
    uint16_t *kv = cpu_alloc(PAGES * HD * 128 * 2);
    float acc[8][HD], q[8][HD];
    for (int n = 1; n <= 8; n *= 8) {
        cpu_attn_tile t = {.n = n, .head_dim = HD, .scale = 0.125f};
        for (int i = 0; i < n; i++) {
            t.q[i] = q[i];
            t.acc[i] = acc[i];
            t.last[i] = 63;
            t.max[i] = 0;
            for (int d = 0; d < HD; d++)
                q[i][d] = acc[i][d] = 0.01f * (float)d;
        }
        double t0 = cpu_time();
        for (int r = 0; r < 100; r++)
            for (int p = 0; p < PAGES; p++)
                k->attn_f16(&t, kv + p * HD * 128, kv + p * HD * 128 + HD * 64);
        double s = (cpu_time() - t0) / (100 * PAGES);
        printf("attention, %d query rows: %.2f us a page, %.1f GB/s, %.1f G multiply-adds/s\n", n, s * 1e6,
               HD * 256 / s / 1e9, 2.0 * HD * 64 * n / s / 1e9);
    }
    cpu_free(kv, PAGES * HD * 128 * 2);
}

int main(int argc, char **argv) {
    const cpu_kernels *k = cpu_kernels_for(cpu_tier_best(), argc > 1 && strcmp(argv[1], "8") == 0);
    uint8_t *weights = cpu_alloc(BYTES);
    if (!weights)
        return 1;
    memset(weights, 1, BYTES);
    printf("%s, one thread; reading %.1f GB/s\n", cpu_tier_name(cpu_tier_best()), read_bandwidth(weights));
    measure(k, "MXFP4", CPU_MX4, 2880, weights);
    measure(k, "Q8_0", CPU_I8, 2880, weights);
    measure(k, "Q4_K", CPU_Q4K, 3072, weights);
    measure(k, "Q6_K", CPU_Q6K, 3072, weights);
    measure(k, "BF16", CPU_BF16, 2880, weights);
    measure(k, "F16", CPU_F16, 2880, weights);
    measure(k, "F32", CPU_F32, 2880, weights);
    measure_rows(k);
    measure_attention(k);
    return 0;
}
