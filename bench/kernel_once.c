/* bench/kernel_once.c: one call of one CPU kernel, for bench/callgrind, which counts the instructions of `measured`.
 *   kernel_once TYPE ROWS    a panel of 16 rows of 2,880 (K-quants 2,816) columns times ROWS rows of activations
 *   kernel_once pack TYPE    the same panel made from a file's rows
 *   kernel_once quantise|rms_norm|glu|attention 1 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/internal.h"

enum { MOST_COLS = 2880, HEAD = 64 };

static struct {
    uint8_t rows[16 * MOST_COLS * 4], panel[16 * MOST_COLS * 4 + 4096], scratch[32 * MOST_COLS];
    uint8_t q[CPU_TOKENS][4 * MOST_COLS];
    float x[CPU_TOKENS][MOST_COLS], y[CPU_TOKENS * 16], weight[MOST_COLS];
    uint16_t key[HEAD * CPU_PAGE], value[HEAD * CPU_PAGE];
    float acc[CPU_ATTN_ROWS][HEAD];
} m __attribute__((aligned(64)));

static void fill(float *v, int n, float scale) {
    static uint32_t seed = 1;
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        v[i] = ((float)(seed >> 8) * 0x1p-24f - 0.5f) * scale;
    }
}

typedef struct job {
    const cpu_kernels *k;
    const q_traits *type;
    const char *name;
    int rows, n_col;
    const void *x[CPU_TOKENS];
    cpu_attn_tile tile;
} job;

__attribute__((noinline)) static void measured(job *j) {
    if (strcmp(j->name, "pack") == 0)
        cpu_pack(cpu_fmt_of(j->type->type), j->type, m.rows, q_row_bytes(j->type, (size_t)j->n_col), 16, j->n_col,
                 m.panel);
    else if (strcmp(j->name, "quantise") == 0)
        j->k->quantise(m.x[0], MOST_COLS, m.q[0]);
    else if (strcmp(j->name, "rms_norm") == 0)
        j->k->rms_norm(m.x[0], m.weight, 1e-5f, MOST_COLS, m.x[1]);
    else if (strcmp(j->name, "glu") == 0)
        j->k->glu(m.x[0], m.x[1], MOST_COLS, 1.702f, 7, m.x[2]);
    else if (strcmp(j->name, "attention") == 0)
        j->k->attn_f16(&j->tile, m.key, m.value);
    else
        j->k->dot[cpu_fmt_of(j->type->type)](m.panel, j->n_col, j->x, j->rows, m.y, m.scratch);
}

static void prepare(job *j) {
    j->n_col = j->type && j->type->block_len == 256 ? MOST_COLS / 256 * 256 : MOST_COLS;
    fill(m.x[0], CPU_TOKENS * MOST_COLS, 2);
    fill(m.weight, MOST_COLS, 1);
    for (int r = 0; j->type && r < 16; r++)
        j->type->pack(m.x[r], m.rows + (size_t)r * q_row_bytes(j->type, (size_t)j->n_col), (size_t)j->n_col);
    if (j->type && strcmp(j->name, "pack") != 0)
        cpu_pack(cpu_fmt_of(j->type->type), j->type, m.rows, q_row_bytes(j->type, (size_t)j->n_col), 16, j->n_col,
                 m.panel);
    for (int t = 0; t < CPU_TOKENS; t++) {
        j->k->quantise(m.x[t], MOST_COLS, m.q[t]);
        bool ints = j->type && cpu_fmt_is_int(cpu_fmt_of(j->type->type));
        j->x[t] = ints ? (const void *)m.q[t] : (const void *)m.x[t];
    }
    j->tile = (cpu_attn_tile){.n = CPU_ATTN_ROWS, .head_dim = HEAD, .scale = 0.125f};
    for (int r = 0; r < CPU_ATTN_ROWS; r++) {
        j->tile.q[r] = m.x[r];
        j->tile.last[r] = CPU_PAGE - 1;
        j->tile.max[r] = -1e30f;
        j->tile.acc[r] = m.acc[r];
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: kernel_once TYPE ROWS | pack TYPE | quantise 1 | rms_norm 1 | glu 1 | attention 1\n");
        return 2;
    }
    job j = {.k = cpu_kernels_for(cpu_tier_best(), false), .name = argv[1], .rows = atoi(argv[2])};
    j.type = q_find_name(strcmp(argv[1], "pack") == 0 ? argv[2] : argv[1]);
    prepare(&j);
    measured(&j);
    return 0;
}
