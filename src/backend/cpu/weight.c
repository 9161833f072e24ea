/* Loading: weights are read once, panel by panel, into their own huge pages, and the file's pages are let go, so
 * that two copies never exist. */
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/internal.h"
#include "base/checked.h"

static bool is_matrix(be_use u) { return u == BE_USE_LINEAR || u == BE_USE_GATE_UP || u == BE_USE_DOWN; }

/* Types without a panel format of their own stay as they are stored and are unpacked to float panels when used. */
static bool has_panels(const be_params *p, const mf_tensor *t, cpu_fmt f) {
    if (f == CPU_F32 && t->type != Q_F32)
        return false;
    return !(p->no_repack && t->data);
}

static bool part_bytes(const be_params *params, be_use use, const mf_tensor *t, uint64_t *out) {
    cpu_fmt f = cpu_fmt_of(t->type);
    uint64_t rows, bytes;
    *out = 0;
    if (use == BE_USE_VECTOR)
        return ck_mul(t->n_col, sizeof(float), out);
    if (params->no_repack && t->data)
        return true;
    if (is_matrix(use) && has_panels(params, t, f))
        return ck_mul((t->n_row + CPU_PANEL - 1) / CPU_PANEL, cpu_panel_bytes(f, (int64_t)t->n_col), &bytes) &&
               ck_mul(bytes, t->n_mat, out);
    return ck_mul(t->n_row, t->n_mat, &rows) && ck_mul(rows, mf_row_bytes(t), out);
}

static uint64_t bias_count(const mf_tensor *t) { return t->n_row * t->n_mat; }

static bool load_bytes(const be_params *params, const be_load *l, uint64_t *total) {
    *total = 0;
    for (int i = 0; i < l->n_part; i++) {
        uint64_t b;
        if (!part_bytes(params, l->use, &l->part[i], &b) || !ck_add(*total, b, total))
            return false;
        if (l->has_bias[i] && (!ck_mul(bias_count(&l->part[i]), sizeof(float), &b) || !ck_add(*total, b, total)))
            return false;
    }
    return true;
}

uint64_t cpu_load_bytes(be_device *d, const be_load *l) {
    uint64_t n;
    return load_bytes(&d->params, l, &n) ? n : UINT64_MAX;
}

/* ---- packing, by all threads ---- */

typedef struct packing {
    cpu_device *dev;
    cpu_part *part;
    const mf_tensor *src;
    atomic_llong next;
} packing;

enum { PACK_RUN = 8 }; /* panels taken at a time */

static void pack_rows(packing *p, int64_t mat, int64_t row, int n, uint8_t *rows, uint8_t *panel) {
    const mf_tensor *t = p->src;
    size_t row_bytes = mf_row_bytes(t);
    const uint8_t *from = rows;
    if (t->data)
        from = t->data + ((size_t)mat * t->n_row + (size_t)row) * row_bytes;
    else
        mf_rows(t, (uint64_t)mat, (uint64_t)row, (uint64_t)n, rows);
    cpu_pack(p->part->fmt, p->part->src, from, row_bytes, n, (int64_t)t->n_col, panel);
}

static void pack_thread(void *arg, int thread, int n_threads) {
    (void)thread;
    (void)n_threads;
    packing *p = arg;
    cpu_part *part = p->part;
    uint8_t *rows = p->src->data ? NULL : malloc(mf_row_bytes(p->src) * CPU_PANEL);
    int64_t runs = (part->n_panel + PACK_RUN - 1) / PACK_RUN, total = runs * (int64_t)p->src->n_mat;
    if (rows || p->src->data)
        for (int64_t i; (i = atomic_fetch_add(&p->next, 1)) < total;) {
            int64_t mat = i / runs, first = i % runs * PACK_RUN, row = first * CPU_PANEL;
            int64_t left = part->n_row - row, most = PACK_RUN * CPU_PANEL;
            uint8_t *panel = part->data + (size_t)(mat * part->n_panel + first) * part->panel_bytes;
            mf_expect(p->src, (uint64_t)mat, (uint64_t)row, (uint64_t)(left < most ? left : most));
            for (; left > 0 && most > 0; left -= CPU_PANEL, most -= CPU_PANEL, row += CPU_PANEL) {
                pack_rows(p, mat, row, left < CPU_PANEL ? (int)left : CPU_PANEL, rows, panel);
                panel += part->panel_bytes;
            }
        }
    free(rows);
}

static orcd_status load_part(cpu_device *d, be_use use, const mf_tensor *t, cpu_part *part, orcd_error *err) {
    part->fmt = cpu_fmt_of(t->type);
    part->src = q_find(t->type);
    part->n_row = (int64_t)t->n_row;
    part->n_panel = (part->n_row + CPU_PANEL - 1) / CPU_PANEL;
    part->panel_bytes = cpu_panel_bytes(part->fmt, (int64_t)t->n_col);
    part->file = *t;
    if (d->base.params.no_repack && t->data)
        return ORCD_OK;
    if (!is_matrix(use) || !has_panels(&d->base.params, t, part->fmt)) {
        size_t bytes = t->n_row * t->n_mat * mf_row_bytes(t);
        part->rows = cpu_take(d, bytes);
        if (!part->rows)
            return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu MiB of weight %s", bytes >> 20, t->name);
        if (d->base.params.dry)
            return ORCD_OK;
        for (uint64_t m = 0; m < t->n_mat; m++)
            mf_rows(t, m, 0, t->n_row, part->rows + m * t->n_row * mf_row_bytes(t));
        return ORCD_OK;
    }
    size_t bytes = (size_t)part->n_panel * t->n_mat * part->panel_bytes;
    part->data = cpu_take(d, bytes);
    if (!part->data)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu MiB of weight %s", bytes >> 20, t->name);
    if (d->base.params.dry)
        return ORCD_OK;
    packing p = {.dev = d, .part = part, .src = t};
    pool_run(d->pool, pack_thread, &p);
    if (atomic_load(&p.next) < (part->n_panel + PACK_RUN - 1) / PACK_RUN * (int64_t)t->n_mat)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory while packing weight %s", t->name);
    mf_release(t);
    return ORCD_OK;
}

static uint64_t values(const mf_tensor *t) { return t->n_mat * t->n_row * t->n_col; }

static orcd_status load_floats(cpu_device *d, const mf_tensor *t, float **out, orcd_error *err) {
    *out = cpu_take(d, values(t) * sizeof **out);
    if (!*out)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for weight %s", t->name);
    if (!d->base.params.dry)
        mf_floats(t, *out);
    return ORCD_OK;
}

static void note_dims(cpu_device *d, const cpu_weight *w) {
    cpu_widen(&d->dims.n_col, w->base.n_col);
    if (w->base.use == BE_USE_GATE_UP) {
        cpu_widen(&d->dims.n_expert, w->base.n_mat);
        cpu_widen(&d->dims.n_ff, (w->part[0].n_row + 15) / 16 * 16);
    }
    if (w->base.use == BE_USE_DOWN)
        cpu_widen(&d->dims.n_ff, (w->base.n_row + 15) / 16 * 16);
}

orcd_status cpu_load(be_device *dev, const be_load *l, be_weight **out, orcd_error *err) {
    cpu_device *d = (cpu_device *)dev;
    orcd_status st = ORCD_OK;
    *out = NULL;
    uint64_t bytes;
    if (l->n_part < 1 || l->n_part > CPU_MAX_PARTS || !load_bytes(&d->base.params, l, &bytes))
        return orcd_fail(err, ORCD_ERR_ARG, "weight %s has %d parts or a size past all memory", l->part[0].name,
                         l->n_part);
    cpu_weight *w = calloc(1, sizeof *w);
    if (!w)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for weight %s", l->part[0].name);
    w->base = (be_weight){.use = l->use,
                          .type = l->part[0].type,
                          .n_col = (int64_t)l->part[0].n_col,
                          .n_mat = (int64_t)l->part[0].n_mat,
                          .bytes = bytes};
    w->n_part = l->n_part;
    for (int i = 0; i < l->n_part; i++) {
        const mf_tensor *t = &l->part[i];
        w->base.n_row += (int64_t)t->n_row;
        if (l->use == BE_USE_VECTOR) {
            ORCD_TRY_GOTO(st, done, load_floats(d, t, &w->vector, err));
            continue;
        }
        ORCD_TRY_GOTO(st, done, load_part(d, l->use, t, &w->part[i], err));
        w->n_panel += w->part[i].n_panel;
        if (l->has_bias[i])
            ORCD_TRY_GOTO(st, done, load_floats(d, &l->bias[i], &w->bias[i], err));
    }
    note_dims(d, w);
    *out = &w->base;
    w = NULL;
done:
    cpu_unload(dev, w ? &w->base : NULL);
    return st;
}

void cpu_unload(be_device *dev, be_weight *weight) {
    cpu_device *d = (cpu_device *)dev;
    cpu_weight *w = (cpu_weight *)weight;
    if (!w)
        return;
    for (int i = 0; i < w->n_part; i++) {
        cpu_part *p = &w->part[i];
        cpu_give(d, p->data, (size_t)p->n_panel * (size_t)w->base.n_mat * p->panel_bytes);
        if (p->rows)
            cpu_give(d, p->rows, (size_t)(p->n_row * w->base.n_mat) * mf_row_bytes(&p->file));
        cpu_give(d, w->bias[i], (size_t)(p->n_row * w->base.n_mat) * sizeof(float));
    }
    cpu_give(d, w->vector, (size_t)w->base.n_col * sizeof(float));
    free(w);
}

const uint8_t *cpu_panel(const cpu_part *p, int64_t n_col, int64_t mat, int64_t index, cpu_local *l) {
    if (p->data)
        return p->data + (size_t)(mat * p->n_panel + index) * p->panel_bytes;
    size_t row_bytes = q_row_bytes(p->src, (size_t)n_col);
    const uint8_t *rows = (p->rows ? p->rows : p->file.data) + (size_t)(mat * p->n_row + index * CPU_PANEL) * row_bytes;
    int64_t left = p->n_row - index * CPU_PANEL;
    cpu_pack(p->fmt, p->src, rows, row_bytes, left < CPU_PANEL ? (int)left : CPU_PANEL, n_col, l->panel);
    return l->panel;
}
