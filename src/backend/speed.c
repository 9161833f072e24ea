#include "backend/speed.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/bandwidth.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- memory ---- */

/* Copies pages of 128 MiB of a cache that is made for it. The last layer has a window, and so a small pool of its own:
 * reading its page waits for the copies before it. */
static orcd_status copy_speed(be_device *d, double *bytes_per_s, orcd_error *err) {
    enum { LAYERS = 65, COPIES = 32, REPS = 3 };
    orcd_status st;
    int window[LAYERS] = {[LAYERS - 1] = 1};
    be_kv_spec s = {.n_layer = LAYERS,
                    .n_kv_head = 64,
                    .head_dim = 128,
                    .window = window,
                    .type = BE_KV_F16,
                    .n_slot = 1,
                    .n_ctx = BE_PAGE,
                    .n_page = {4, 1},
                    .max_tok = 1,
                    .max_out = 1};
    be_kv *kv = NULL;
    uint8_t *page = NULL;
    double best = 0;
    ORCD_TRY_GOTO(st, done, d->ops->kv_open(d, &s, &kv, err));
    page = malloc(kv->page_bytes[BE_POOL_WINDOW]);
    if (!page) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for measuring the device's memory");
        goto done;
    }
    for (int r = 0; r <= REPS; r++) { /* the first warms up */
        double t0 = now();
        for (int i = 0; i < COPIES; i++)
            d->ops->kv_copy_page(kv, BE_POOL_FULL, i % 2, 2 + i % 2);
        ORCD_TRY_GOTO(st, done, d->ops->kv_read_page(kv, BE_POOL_WINDOW, 0, page, err));
        double rate = 2.0 * COPIES * (double)kv->page_bytes[BE_POOL_FULL] / (now() - t0);
        best = r > 0 && rate > best ? rate : best;
    }
done:
    *bytes_per_s = best;
    free(page);
    if (kv)
        d->ops->kv_close(d, kv);
    return st;
}

orcd_status be_read_speed(be_device *d, double *bytes_per_s, orcd_error *err) {
    if (d->ops->resident)
        return copy_speed(d, bytes_per_s, err);
    return mem_bandwidth(d->params.n_threads > 0 ? d->params.n_threads : 1, bytes_per_s, err);
}

/* ---- products ---- */

/* One random row of the type, over and over: products take as long with equal rows. */
static uint8_t *make_rows(const q_traits *q, int64_t n_col, int64_t n_row) {
    size_t row = q_row_bytes(q, (size_t)n_col);
    float *value = malloc((size_t)n_col * sizeof *value);
    uint8_t *data = malloc(row * (size_t)n_row);
    uint32_t seed = 1;
    for (int64_t i = 0; value && i < n_col; i++) {
        seed = seed * 1664525u + 1013904223u;
        value[i] = (float)(seed >> 8) * 0x1p-24f - 0.5f;
    }
    if (value && data) {
        q->pack(value, data, (size_t)n_col);
        for (int64_t i = 1; i < n_row; i++)
            memcpy(data + (size_t)i * row, data, row);
    }
    free(value);
    if (!value) {
        free(data);
        return NULL;
    }
    return data;
}

/* What one product needs around it. */
typedef struct product {
    be_weight *w;
    be_act *x, *y;
    be_kv *kv; /* sizes the device's scratch memory */
    int32_t *zero;
} product;

static orcd_status step(be_device *d, const product *p, int rows, double *seconds, orcd_error *err) {
    int repeats = d->ops->resident ? 8 : 1; /* on a GPU one product is short beside its launch */
    be_step *s;
    double t0 = now();
    ORCD_TRY(d->ops->step_begin(d, p->kv, &(be_batch){rows, p->zero, p->zero, p->zero, 0, p->zero, false}, &s, err));
    for (int i = 0; i < repeats; i++)
        d->ops->linear(s, p->w, p->x, p->y, BE_EPI_NONE);
    ORCD_TRY(d->ops->step_end(s, err));
    *seconds = (now() - t0) / repeats;
    return ORCD_OK;
}

static orcd_status open_product(be_device *d, const be_product *b, int most, product *p, orcd_error *err) {
    const q_traits *q = q_find(b->type);
    const int no_window = 0;
    be_kv_spec s = {.n_layer = 1,
                    .n_kv_head = 1,
                    .head_dim = 64,
                    .window = &no_window,
                    .type = BE_KV_F16,
                    .n_slot = 1,
                    .n_ctx = BE_PAGE,
                    .n_page = {1, 1},
                    .max_tok = most,
                    .max_out = 1};
    be_load l = {.use = BE_USE_LINEAR, .n_part = 1};
    orcd_status st;
    uint8_t *data = make_rows(q, b->n_col, b->n_row);
    float *x = calloc((size_t)most * (size_t)b->n_col, sizeof *x);
    p->zero = calloc((size_t)most, sizeof *p->zero);
    if (!data || !x || !p->zero) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %lld rows of weights", (long long)b->n_row);
        goto done;
    }
    for (int64_t i = 0; i < most * b->n_col; i++)
        x[i] = (float)(i * 7919 % 2001 - 1000) * 1e-3f;
    l.part[0] = (mf_tensor){.name = "a measured product",
                            .type = b->type,
                            .n_col = (uint64_t)b->n_col,
                            .n_row = (uint64_t)b->n_row,
                            .n_mat = 1,
                            .pos = ORCD_POS_NONE};
    /* a view, not `data`: then nobody keeps or releases its pages */
    l.part[0].view.base = data;
    l.part[0].view.row_bytes = q_row_bytes(q, (size_t)b->n_col);
    l.part[0].view.mat_bytes = l.part[0].view.row_bytes * (uint64_t)b->n_row;
    l.part[0].view.row_step = 1;
    ORCD_TRY_GOTO(st, done, d->ops->load(d, &l, &p->w, err));
    ORCD_TRY_GOTO(st, done, d->ops->act_new(d, BE_ACT_FREE, most, b->n_col, &p->x, err));
    ORCD_TRY_GOTO(st, done, d->ops->act_new(d, BE_ACT_FREE, most, b->n_row, &p->y, err));
    ORCD_TRY_GOTO(st, done, d->ops->kv_open(d, &s, &p->kv, err));
    st = d->ops->act_write(d, p->x, 0, most, x, err);
done:
    free(data);
    free(x);
    return st;
}

static void close_product(be_device *d, product *p) {
    if (p->kv)
        d->ops->kv_close(d, p->kv);
    d->ops->act_free(d, p->y);
    d->ops->act_free(d, p->x);
    d->ops->unload(d, p->w);
    free(p->zero);
}

orcd_status be_time_product(be_device *d, be_product *b, orcd_error *err) {
    enum { REPS = 8, ENOUGH_S = 1 };
    orcd_status st;
    product p = {0};
    int most = 1;
    for (int i = 0; i < b->n; i++)
        most = b->rows[i] > most ? b->rows[i] : most;
    ORCD_TRY_GOTO(st, done, open_product(d, b, most, &p, err));
    b->bytes = p.w->bytes;
    for (int i = 0; i < b->n; i++) {
        double best = INFINITY, t, t0 = now();
        p.x->n_row = b->rows[i];
        for (int r = 0; r <= REPS && (r < 2 || now() - t0 < ENOUGH_S); r++) { /* the first warms up */
            ORCD_TRY_GOTO(st, done, step(d, &p, b->rows[i], &t, err));
            best = r > 0 && t < best ? t : best;
        }
        b->seconds[i] = best;
    }
done:
    close_product(d, &p);
    return st;
}
