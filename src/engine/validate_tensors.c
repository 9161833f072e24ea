/* What one model file makes of the weights of another: error and cosine of every tensor, a few rows at a time. */
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/pool.h"
#include "engine/validate.h"

enum { BLOCK = 1 << 16 }; /* values that one thread takes at a time, at least a row */

typedef struct sums {
    double diff, aa, bb, ab;
} sums;

typedef struct scan {
    pool *threads;
    tensor_error *out;
    int n, cap;
    uint64_t done, total;
    arch_progress progress;
    void *progress_ctx;
} scan;

static void add_values(sums *s, const float *a, const float *b, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        double x = a[i], y = b[i];
        s->diff += (y - x) * (y - x);
        s->aa += x * x;
        s->bb += y * y;
        s->ab += x * y;
    }
}

/* ---- one matrix, by all threads ---- */

typedef struct work {
    const mf_tensor *a, *b;
    uint64_t step, blocks_per_mat, n_block; /* rows of a block; blocks */
    sums *part;                             /* [n_block]: added in order afterwards */
    atomic_ullong next;
    atomic_bool failed;
} work;

static void read_rows(const mf_tensor *t, uint64_t mat, uint64_t row, uint64_t n, void *raw, float *value) {
    mf_rows(t, mat, row, n, raw);
    q_find(t->type)->unpack(raw, value, n * t->n_col);
}

static void scan_blocks(void *arg, int thread, int n_threads) {
    work *w = arg;
    uint64_t n = w->step * w->a->n_col;
    float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b), *raw = malloc(n * sizeof *raw);
    (void)thread, (void)n_threads;
    if (!a || !b || !raw)
        atomic_store(&w->failed, true);
    for (uint64_t i; a && b && raw && (i = atomic_fetch_add(&w->next, 1)) < w->n_block;) {
        uint64_t mat = i / w->blocks_per_mat, row = i % w->blocks_per_mat * w->step, left = w->a->n_row - row;
        uint64_t rows = left < w->step ? left : w->step;
        read_rows(w->a, mat, row, rows, raw, a);
        read_rows(w->b, mat, row, rows, raw, b);
        add_values(&w->part[i], a, b, rows * w->a->n_col);
    }
    free(a);
    free(b);
    free(raw);
}

static orcd_status scan_matrix(scan *s, const mf_tensor *a, const mf_tensor *b, sums *out, orcd_error *err) {
    work w = {.a = a, .b = b, .step = BLOCK / a->n_col + 1};
    w.blocks_per_mat = (a->n_row + w.step - 1) / w.step;
    w.n_block = w.blocks_per_mat * a->n_mat;
    w.part = calloc(w.n_block, sizeof *w.part);
    if (!w.part)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", a->name);
    pool_run(s->threads, scan_blocks, &w);
    for (uint64_t i = 0; i < w.n_block; i++) {
        out->diff += w.part[i].diff;
        out->aa += w.part[i].aa;
        out->bb += w.part[i].bb;
        out->ab += w.part[i].ab;
    }
    free(w.part);
    mf_release(a);
    mf_release(b);
    return atomic_load(&w.failed) ? orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for rows of \"%s\"", a->name)
                                  : ORCD_OK;
}

/* Norms, biases, routers: small, and perhaps views without rows. */
static orcd_status scan_small(const mf_tensor *a, const mf_tensor *b, uint64_t n, sums *out, orcd_error *err) {
    float *value = malloc(2 * n * sizeof *value);
    if (!value)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", a->name);
    mf_floats(a, value);
    mf_floats(b, value + n);
    add_values(out, value, value + n, n);
    free(value);
    return ORCD_OK;
}

static bool same_bytes(const mf_tensor *a, const mf_tensor *b, uint64_t n) {
    const q_traits *q = q_find(a->type);
    return a->type == b->type && a->data && b->data && memcmp(a->data, b->data, q_row_bytes(q, n)) == 0;
}

static orcd_status scan_tensor(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    scan *s = ctx;
    const mf_tensor *a = data[0], *b = data[1];
    uint64_t n = a->n_mat * a->n_row * a->n_col;
    sums sum = {0};
    if (s->n == s->cap) {
        int cap = s->cap ? 2 * s->cap : 256;
        tensor_error *grown = realloc(s->out, (size_t)cap * sizeof *grown);
        if (!grown)
            return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %d tensors", cap);
        s->out = grown;
        s->cap = cap;
    }
    if (!same_bytes(a, b, n))
        ORCD_TRY(t->exact ? scan_small(a, b, n, &sum, err) : scan_matrix(s, a, b, &sum, err));
    tensor_error *e = &s->out[s->n++];
    *e = (tensor_error){.type = {a->type, b->type}, .n_value = n, .rel = 0, .cosine = 1};
    snprintf(e->name, sizeof e->name, "%s", t->name);
    if (sum.diff != 0) {
        e->rel = sqrt(sum.diff / sum.aa);
        e->cosine = sum.ab / sqrt(sum.aa * sum.bb);
    }
    if (s->progress)
        s->progress(s->progress_ctx, s->done += n, s->total);
    return ORCD_OK;
}

static orcd_status open_file(const char *path, mf_file **f, const arch **a, arch_config *c, orcd_error *err) {
    ORCD_TRY(mf_open(path, f, err));
    ORCD_TRY(arch_identify(*f, a, err));
    return arch_config_read(*a, *f, c, err);
}

orcd_status validate_tensors(const char *path_a, const char *path_b, int n_threads, arch_progress progress,
                             void *progress_ctx, tensor_error **out, int *n, orcd_error *err) {
    orcd_status st;
    mf_file *f[2] = {NULL, NULL};
    const arch *a, *b;
    arch_config c[2];
    arch_size size;
    scan s = {.progress = progress, .progress_ctx = progress_ctx};
    *out = NULL;
    *n = 0;
    ORCD_TRY_GOTO(st, done, open_file(path_a, &f[0], &a, &c[0], err));
    ORCD_TRY_GOTO(st, done, open_file(path_b, &f[1], &b, &c[1], err));
    if (a != b) {
        st = orcd_fail(err, ORCD_ERR_ARG, "%s is a %s model, %s a %s model: they cannot be compared", path_a,
                       arch_name(a), path_b, arch_name(b));
        goto done;
    }
    if (c[0].n_layer != c[1].n_layer) {
        st = orcd_fail(err, ORCD_ERR_ARG, "%s has %d layers, %s has %d: their weights cannot be compared", path_a,
                       c[0].n_layer, path_b, c[1].n_layer);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, arch_measure(a, f[0], &c[0], &size, err));
    s.total = size.n_param;
    ORCD_TRY_GOTO(st, done, pool_open(n_threads, &s.threads, err));
    ORCD_TRY_GOTO(st, done, arch_each_tensor(a, &c[0], 2, (const mf_file *const *)f, scan_tensor, &s, err));
    *out = s.out;
    *n = s.n;
    s.out = NULL;
done:
    pool_close(s.threads);
    mf_close(f[0]);
    mf_close(f[1]);
    free(s.out);
    return st;
}
