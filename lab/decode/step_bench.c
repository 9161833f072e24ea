/* lab/decode/step_bench.c: steps of a whole model through backend.h, without the engine: prefill, then decode with
 * sampling on the device, each id fed to the next step there.
 *
 *     step_bench MODEL BACKEND [prefill=512,2048,8192] [decode=128] [depth=0,8192,32768] [batch=1,8,32] [kv=f16|f8]
 *
 * Depth is taken as given: the cache holds zeros there, which costs what real keys cost. Prints medians and minima. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch/arch.h"

#define CHECK(expr)                                                                                                    \
    do {                                                                                                               \
        if ((expr) != ORCD_OK) {                                                                                       \
            fprintf(stderr, "%s\n", err.message);                                                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static orcd_error err;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct world {
    be_device *dev;
    const be_ops *ops;
    arch_model *model;
    arch_config cfg;
    be_kv *kv;
    int max_tok, max_out;
} world;

static void open_kv(world *w, int n_slot, int n_ctx, be_kv_type type) {
    if (w->kv)
        w->ops->kv_close(w->dev, w->kv);
    int n_entry = (n_ctx + BE_PAGE - 1) / BE_PAGE, win = 64; /* window pages are reused: what they hold is no matter */
    be_kv_spec s = {.type = type,
                    .n_slot = n_slot,
                    .n_ctx = n_ctx,
                    .n_page = {n_slot * n_entry, n_slot * win},
                    .max_tok = w->max_tok,
                    .max_out = w->max_out};
    arch_kv_spec(&w->cfg, &s);
    CHECK(w->ops->kv_open(w->dev, &s, &w->kv, &err));
    for (int slot = 0; slot < n_slot; slot++)
        for (int i = 0; i < n_entry; i++) {
            w->ops->kv_map(w->kv, 0, slot, i, slot * n_entry + i);
            w->ops->kv_map(w->kv, 1, slot, i, slot * win + i % win);
        }
}

static double prefill(world *w, int n) {
    int32_t *v = calloc((size_t)n * 4, sizeof *v);
    double t0 = now();
    for (int at = 0; at < n; at += w->max_tok) {
        int m = n - at < w->max_tok ? n - at : w->max_tok, last = m - 1;
        for (int i = 0; i < m; i++) {
            v[i] = (at + i) * 7919 % w->cfg.n_vocab;
            v[n + i] = at + i;
        }
        be_batch b = {m, v, v + n, v + 2 * n, at + m == n, &last};
        be_step *s;
        CHECK(w->ops->step_begin(w->dev, w->kv, &b, &s, &err));
        arch_forward(w->model, s);
        CHECK(w->ops->step_end(s, &err));
    }
    double t = now() - t0;
    free(v);
    return t;
}

/* Seconds a step, sorted. */
static void decode(world *w, int batch, int depth, int steps, double *out) {
    int32_t token[256], pos[256], slot[256], row[256], id[256];
    be_sample sample[256] = {{0}};
    for (int k = -8; k < steps; k++) {
        double t0 = now();
        for (int i = 0; i < batch; i++) {
            token[i] = k == -8 ? 1000 + 37 * i : BE_TOKEN_OF(i);
            pos[i] = depth + 8 + k;
            slot[i] = row[i] = i;
        }
        be_batch b = {batch, token, pos, slot, batch, row};
        be_step *s;
        CHECK(w->ops->step_begin(w->dev, w->kv, &b, &s, &err));
        be_act *logits = arch_forward(w->model, s);
        if (w->ops->sample)
            w->ops->sample(s, logits, sample);
        CHECK(w->ops->step_end(s, &err));
        if (w->ops->sample)
            CHECK(w->ops->sampled(w->dev, id, &err));
        else
            memset(id, 0, sizeof id);
        if (k >= 0)
            out[k] = now() - t0;
    }
    qsort(out, (size_t)steps, sizeof *out, compare);
}

static const char *list_of(int argc, char **argv, const char *name, const char *fallback) {
    size_t n = strlen(name);
    for (int i = 3; i < argc; i++)
        if (strncmp(argv[i], name, n) == 0 && argv[i][n] == '=')
            return argv[i] + n + 1;
    return fallback;
}

static int numbers(const char *s, int out[16]) {
    int n = 0;
    while (*s && n < 16) {
        out[n++] = atoi(s);
        s += strcspn(s, ",");
        s += *s == ',';
    }
    return n;
}

int main(int argc, char **argv) {
    mf_file *f;
    const arch *a;
    world w = {0};
    int pre[16], depth[16], batch[16];
    if (argc < 3)
        return 2;
    int n_pre = numbers(list_of(argc, argv, "prefill", "512,2048,8192"), pre);
    int n_depth = numbers(list_of(argc, argv, "depth", "0,8192,32768"), depth);
    int n_batch = numbers(list_of(argc, argv, "batch", "1"), batch), steps = atoi(list_of(argc, argv, "decode", "128"));
    be_kv_type type = strcmp(list_of(argc, argv, "kv", "f16"), "f8") == 0 ? BE_KV_F8 : BE_KV_F16;
    int most = 1, far = 0;
    for (int i = 0; i < n_batch; i++)
        most = batch[i] > most ? batch[i] : most;
    for (int i = 0; i < n_pre; i++)
        far = pre[i] > far ? pre[i] : far;
    CHECK(mf_open(argv[1], &f, &err));
    CHECK(arch_identify(f, &a, &err));
    CHECK(arch_config_read(a, f, &w.cfg, &err));
    w.ops = be_find(argv[2]);
    if (!w.ops)
        return 2;
    CHECK(w.ops->open(&(be_params){0}, &w.dev, &err));
    w.max_tok = atoi(list_of(argc, argv, "chunk", "2048"));
    w.max_out = most;
    double t0 = now();
    CHECK(arch_load(a, f, &w.cfg, w.dev, w.max_tok, w.max_out, NULL, NULL, &w.model, &err));
    double t = now() - t0;
    uint64_t total, avail;
    w.ops->memory(w.dev, &total, &avail);
    printf("load: %.2f s, %.2f GB/s of the file; device: %.2f GiB in use\n", t, (double)mf_bytes(f) / t / 1e9,
           (double)(total - avail) / 1073741824);
    if (far)
        open_kv(&w, 1, far + 64, type);
    for (int i = 0; i < n_pre; i++) {
        double best = 1e9;
        for (int k = 0; k < 3; k++) {
            double one = prefill(&w, pre[i]);
            best = one < best ? one : best;
        }
        printf("prefill %5d: %8.1f ms  %8.0f tok/s (best of 3)\n", pre[i], 1e3 * best, pre[i] / best);
    }
    double *s = calloc((size_t)steps + 1, sizeof *s);
    for (int d = 0; d < n_depth; d++)
        for (int i = 0; i < n_batch; i++) {
            open_kv(&w, batch[i], depth[d] + steps + 64, type);
            decode(&w, batch[i], depth[d], steps, s);
            printf("decode depth %6d batch %3d: median %8.1f us min %8.1f us  %8.0f tok/s\n", depth[d], batch[i],
                   1e6 * s[steps / 2], 1e6 * s[0], batch[i] / s[steps / 2]);
        }
    free(s);
    w.ops->kv_close(w.dev, w.kv);
    arch_unload(w.model);
    w.ops->close(w.dev);
    mf_close(f);
    return 0;
}
