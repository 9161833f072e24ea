/* Loading: weights are read once, panel by panel, into their own huge pages, and the file's pages are let go, so
 * that two copies never exist. */
#include <stdlib.h>
#include <string.h>

#include "backend/cpu/internal.h"
#include "base/checked.h"

/* What becomes of a part's rows. */
typedef enum keep {
    KEEP_FILE,  /* nothing: they are read from the map, and packed, whenever they are used */
    KEEP_ROWS,  /* a copy as they are stored, for looking single rows up */
    KEEP_PANELS /* panels, of another type perhaps */
} keep;

/* The type that a part is packed from: the stored one, or a smaller one that was asked for. */
static const q_traits *type_of(const be_params *p, const be_load *l, const mf_tensor *t) {
    const q_traits *stored = q_find(t->type), *small = q_find(p->dense_type);
    bool smaller = small->block_bytes * stored->block_len < stored->block_bytes * small->block_len;
    return l->dense && p->dense_type != Q_F32 && smaller ? small : stored;
}

static keep keep_of(const be_params *p, const be_load *l, const mf_tensor *t) {
    if (p->no_repack && t->data && type_of(p, l, t)->type == t->type)
        return KEEP_FILE;
    return l->use == BE_USE_LINEAR || l->use == BE_USE_GATE_UP || l->use == BE_USE_DOWN ? KEEP_PANELS : KEEP_ROWS;
}

static bool part_bytes(const be_params *params, const be_load *l, const mf_tensor *t, uint64_t *out) {
    uint64_t rows, bytes;
    *out = 0;
    if (l->use == BE_USE_VECTOR)
        return ck_mul(t->n_col, sizeof(float), out);
    switch (keep_of(params, l, t)) {
    case KEEP_PANELS:
        bytes = cpu_panel_bytes(cpu_fmt_of(type_of(params, l, t)->type), (int64_t)t->n_col);
        return ck_mul((t->n_row + CPU_PANEL - 1) / CPU_PANEL, bytes, &bytes) && ck_mul(bytes, t->n_mat, out);
    case KEEP_ROWS:
        return ck_mul(t->n_row, t->n_mat, &rows) && ck_mul(rows, mf_row_bytes(t), out);
    default:
        return true;
    }
}

static uint64_t bias_count(const mf_tensor *t) { return t->n_row * t->n_mat; }

static cpu_fmt fmt_of(const be_params *p, const be_load *l, int i) {
    return cpu_fmt_of(type_of(p, l, &l->part[i])->type);
}

static bool has_screen(const cpu_device *d, const be_load *l) {
    const be_params *p = &d->base.params;
    return keep_of(p, l, &l->part[0]) == KEEP_PANELS && cpu_has_screen(d, l, fmt_of(p, l, 0));
}

static size_t screen_bytes(int64_t n_row, int64_t n_col) {
    return (size_t)((n_row + CPU_PANEL - 1) / CPU_PANEL) * cpu_screen_bytes(n_col);
}

static bool load_bytes(const cpu_device *d, const be_load *l, uint64_t *total) {
    const be_params *params = &d->base.params;
    *total = 0;
    if (has_screen(d, l))
        *total = screen_bytes((int64_t)l->part[0].n_row, (int64_t)l->part[0].n_col);
    for (int i = 0; i < l->n_part; i++) {
        uint64_t b;
        if (!part_bytes(params, l, &l->part[i], &b) || !ck_add(*total, b, total))
            return false;
        if (l->has_bias[i] && (!ck_mul(bias_count(&l->part[i]), sizeof(float), &b) || !ck_add(*total, b, total)))
            return false;
    }
    return true;
}

uint64_t cpu_load_bytes(be_device *d, const be_load *l) {
    uint64_t n;
    return load_bytes((const cpu_device *)d, l, &n) ? n : UINT64_MAX;
}

/* ---- packing and copying, by all threads ---- */

typedef struct packing {
    const cpu_device *dev;
    cpu_part *part;
    uint8_t *screen; /* or NULL */
    const mf_tensor *src;
    bool requantise;
    size_t row_bytes; /* of what is packed */
    atomic_llong next;
} packing;

enum { PACK_RUN = 8 }; /* panels taken at a time */

/* Memory of one thread: a panel's rows as stored, one row as floats, and as they are packed. Each may be absent. */
typedef struct pack_memory {
    uint8_t *stored, *small;
    float *value;
} pack_memory;

/* Blocks of 256 that the row does not fill end with zeros. */
static const uint8_t *requantised(const packing *p, const uint8_t *rows, int n, const pack_memory *m) {
    size_t n_col = p->src->n_col, len = p->part->src->block_len, whole = (n_col + len - 1) / len * len;
    const q_traits *stored = q_find(p->src->type);
    memset(m->value, 0, whole * sizeof *m->value);
    for (int i = 0; i < n; i++) {
        stored->unpack(rows + (size_t)i * mf_row_bytes(p->src), m->value, n_col);
        p->part->src->pack(m->value, m->small + (size_t)i * p->row_bytes, whole);
    }
    return m->small;
}

static void pack_rows(const packing *p, uint64_t mat, uint64_t row, int n, const pack_memory *m, uint8_t *panel) {
    const mf_tensor *t = p->src;
    const uint8_t *from = m->stored;
    if (t->data)
        from = t->data + (mat * t->n_row + row) * mf_row_bytes(t);
    else
        mf_rows(t, mat, row, (uint64_t)n, m->stored);
    if (p->requantise)
        from = requantised(p, from, n, m);
    cpu_pack(p->part->fmt, p->part->src, from, p->row_bytes, n, (int64_t)t->n_col, panel);
    if (p->screen)
        cpu_screen_pack(p->dev, p->part, from, p->row_bytes, n, (int64_t)t->n_col, m->value,
                        p->screen + row / CPU_PANEL * cpu_screen_bytes((int64_t)t->n_col));
}

/* Up to PACK_RUN panels of a matrix, or a copy of as many rows. */
static void pack_run(const packing *p, int64_t mat, int64_t run, const pack_memory *m) {
    cpu_part *part = p->part;
    int64_t row = run * PACK_RUN * CPU_PANEL, left = part->n_row - row, n = PACK_RUN * CPU_PANEL;
    n = left < n ? left : n;
    mf_expect(p->src, (uint64_t)mat, (uint64_t)row, (uint64_t)n);
    if (part->rows) {
        mf_rows(p->src, (uint64_t)mat, (uint64_t)row, (uint64_t)n,
                part->rows + (size_t)(mat * part->n_row + row) * p->row_bytes);
        return;
    }
    uint8_t *panel = part->data + (size_t)(mat * part->n_panel + run * PACK_RUN) * part->panel_bytes;
    for (int64_t end = row + n; row < end; row += CPU_PANEL, panel += part->panel_bytes)
        pack_rows(p, (uint64_t)mat, (uint64_t)row, end - row < CPU_PANEL ? (int)(end - row) : CPU_PANEL, m, panel);
}

static int64_t runs_of(const packing *p) { return (p->part->n_panel + PACK_RUN - 1) / PACK_RUN; }

static void pack_thread(void *arg, int thread, int n_threads) {
    (void)thread;
    (void)n_threads;
    packing *p = arg;
    bool stored = !p->src->data && !p->part->rows, value = p->requantise || p->screen;
    pack_memory m = {0};
    if (stored)
        m.stored = malloc(mf_row_bytes(p->src) * CPU_PANEL);
    if (p->requantise)
        m.small = malloc(p->row_bytes * CPU_PANEL);
    if (value)
        m.value = malloc((p->src->n_col + 256) * sizeof *m.value);
    if ((m.stored || !stored) && (m.small || !p->requantise) && (m.value || !value))
        for (int64_t i, runs = runs_of(p); (i = atomic_fetch_add(&p->next, 1)) < runs * (int64_t)p->src->n_mat;)
            pack_run(p, i / runs, i % runs, &m);
    free(m.stored);
    free(m.small);
    free(m.value);
}

static orcd_status load_part(cpu_device *d, const be_load *l, const mf_tensor *t, cpu_part *part, uint8_t *screen,
                             orcd_error *err) {
    const q_traits *type = type_of(&d->base.params, l, t);
    size_t n_row = t->n_row * t->n_mat, bytes;
    *part = (cpu_part){.fmt = cpu_fmt_of(type->type),
                       .src = type,
                       .n_row = (int64_t)t->n_row,
                       .n_panel = ((int64_t)t->n_row + CPU_PANEL - 1) / CPU_PANEL,
                       .panel_bytes = cpu_panel_bytes(cpu_fmt_of(type->type), (int64_t)t->n_col),
                       .file = *t};
    packing p = {.dev = d,
                 .part = part,
                 .screen = screen,
                 .src = t,
                 .requantise = type->type != t->type,
                 .row_bytes = (t->n_col + type->block_len - 1) / type->block_len * type->block_bytes};
    switch (keep_of(&d->base.params, l, t)) {
    case KEEP_FILE:
        return ORCD_OK;
    case KEEP_ROWS:
        bytes = n_row * p.row_bytes;
        part->rows = cpu_take(d, bytes);
        break;
    default:
        bytes = (size_t)part->n_panel * t->n_mat * part->panel_bytes;
        part->data = cpu_take(d, bytes);
        break;
    }
    if (!part->rows && !part->data)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu MiB of weight %s", bytes >> 20, t->name);
    if (d->base.params.dry)
        return ORCD_OK;
    pool_run(d->pool, pack_thread, &p);
    if (atomic_load(&p.next) < runs_of(&p) * (int64_t)t->n_mat)
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
    if (w->screen)
        cpu_widen(&d->dims.n_screen, w->n_panel);
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
    if (l->n_part < 1 || l->n_part > CPU_MAX_PARTS || !load_bytes(d, l, &bytes))
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
    if (has_screen(d, l) && !(w->screen = cpu_take(d, screen_bytes((int64_t)l->part[0].n_row, w->base.n_col)))) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the screen of weight %s", l->part[0].name);
        goto done;
    }
    for (int i = 0; i < l->n_part; i++) {
        const mf_tensor *t = &l->part[i];
        w->base.n_row += (int64_t)t->n_row;
        if (l->use == BE_USE_VECTOR) {
            ORCD_TRY_GOTO(st, done, load_floats(d, t, &w->vector, err));
            continue;
        }
        ORCD_TRY_GOTO(st, done, load_part(d, l, t, &w->part[i], w->screen, err));
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
    cpu_give(d, w->screen, screen_bytes(w->part[0].n_row, w->base.n_col));
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
