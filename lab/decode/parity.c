/* lab/decode/parity.c: the same tokens one row a step (fused kernels) and in one prefill: are the logits the same bits?
 *
 *     parity MODEL BACKEND [N] */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/arch.h"

#define CHECK(expr)                                                                                                    \
    do {                                                                                                               \
        if ((expr) != ORCD_OK) {                                                                                       \
            fprintf(stderr, "%s\n", err.message);                                                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static orcd_error err;

int main(int argc, char **argv) {
    mf_file *f;
    const arch *a;
    arch_config cfg;
    arch_model *model;
    be_device *dev;
    be_kv *kv;
    int n = argc > 3 ? atoi(argv[3]) : 200;
    CHECK(mf_open(argv[1], &f, &err));
    CHECK(arch_identify(f, &a, &err));
    CHECK(arch_config_read(a, f, &cfg, &err));
    const be_ops *ops = be_find(argv[2]);
    CHECK(ops->open(&(be_params){0}, &dev, &err));
    CHECK(arch_load(a, f, &cfg, dev, n, n, NULL, NULL, &model, &err));
    int entry = (n + BE_PAGE - 1) / BE_PAGE;
    be_kv_spec s = {
        .type = BE_KV_F16, .n_slot = 2, .n_ctx = n, .n_page = {2 * entry, 2 * entry}, .max_tok = n, .max_out = n};
    arch_kv_spec(&cfg, &s);
    CHECK(ops->kv_open(dev, &s, &kv, &err));
    for (int i = 0; i < 2 * entry; i++)
        for (int p = 0; p < 2; p++)
            ops->kv_map(kv, p, i / entry, i % entry, i);
    int32_t *v = calloc((size_t)n * 4, sizeof *v);
    for (int i = 0; i < n; i++)
        v[i] = (int32_t)((i * 7919ll + 13) % cfg.n_vocab), v[n + i] = v[3 * n + i] = i;
    be_step *st;
    be_batch all = {n, v, v + n, v + 2 * n, n, v + 3 * n};
    CHECK(ops->step_begin(dev, kv, &all, &st, &err));
    be_act *logits = arch_forward(model, st);
    CHECK(ops->step_end(st, &err));
    size_t width = (size_t)cfg.n_vocab;
    float *want = malloc((size_t)n * width * 4), *got = malloc(width * 4);
    CHECK(ops->act_read(dev, logits, 0, n, want, &err));
    int same = 0, top = 0;
    double worst = 1, biggest = 0;
    for (int i = 0; i < n; i++) {
        int32_t one = 1, zero = 0;
        be_batch b = {1, v + i, v + n + i, &one, 1, &zero};
        CHECK(ops->step_begin(dev, kv, &b, &st, &err));
        logits = arch_forward(model, st);
        CHECK(ops->step_end(st, &err));
        CHECK(ops->act_read(dev, logits, 0, 1, got, &err));
        const float *w = want + (size_t)i * width;
        double xy = 0, xx = 0, yy = 0;
        size_t bx = 0, by = 0;
        for (size_t k = 0; k < width; k++) {
            xy += (double)w[k] * got[k], xx += (double)w[k] * w[k], yy += (double)got[k] * got[k];
            bx = w[k] > w[bx] ? k : bx, by = got[k] > got[by] ? k : by;
            biggest = fmax(biggest, fabs(w[k] - got[k]));
        }
        double c = xy / sqrt(xx * yy);
        worst = !(c >= worst) ? c : worst;
        top += bx == by;
        same += memcmp(w, got, width * 4) == 0;
        if (i < 3 || memcmp(w, got, width * 4) != 0)
            if (i < 12)
                printf("row %d: cosine %.9f, max difference %.3g, top %zu %zu\n", i, c, biggest, bx, by);
    }
    printf("%d rows: same bits %d, same top %d, worst cosine %.9f, largest difference %.3g\n", n, same, top, worst,
           biggest);
    return same != n;
}
