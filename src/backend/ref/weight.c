#include "backend/ref/ref.h"

#include <stdlib.h>
#include <string.h>

static uint64_t n_values(const mf_tensor *t) { return t->n_mat * t->n_row * t->n_col; }

static uint64_t sum_rows(const be_load *l) {
    uint64_t n = 0;
    for (int i = 0; i < l->n_part; i++)
        n += l->part[i].n_row;
    return n;
}

static bool is_experts(be_use use) { return use == BE_USE_GATE_UP || use == BE_USE_DOWN; }

/* Floats of `rows`: an expert is unpacked as a whole, anything else row by row. */
static uint64_t scratch_floats(const be_load *l) { return l->part[0].n_col * (is_experts(l->use) ? sum_rows(l) : 1); }

static orcd_status check_load(const be_load *l, orcd_error *err) {
    static const struct {
        int min, max;
    } parts[] = {[BE_USE_VECTOR] = {1, 1},
                 [BE_USE_EMBED] = {1, 1},
                 [BE_USE_LINEAR] = {1, 3},
                 [BE_USE_GATE_UP] = {2, 2},
                 [BE_USE_DOWN] = {1, 1}};
    const mf_tensor *p = l->part;
    if (l->n_part < parts[l->use].min || l->n_part > parts[l->use].max)
        return orcd_fail(err, ORCD_ERR_ARG, "%s: a weight of %d parts cannot serve this use", p->name, l->n_part);
    if (l->use == BE_USE_VECTOR && (p->n_row != 1 || p->n_mat != 1))
        return orcd_fail(err, ORCD_ERR_ARG, "%s: a vector has one row", p->name);
    for (int i = 0; i < l->n_part; i++) {
        const q_traits *q = q_find((uint32_t)p[i].type);
        if (!q)
            return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s: weight type %d is unknown", p[i].name, (int)p[i].type);
        if (p[i].n_col == 0 || p[i].n_row == 0 || p[i].n_mat == 0 || p[i].n_col % q->block_len)
            return orcd_fail(err, ORCD_ERR_ARG, "%s: rows of %llu are not whole blocks of %s", p[i].name,
                             (unsigned long long)p[i].n_col, q->name);
        if (p[i].n_col != p->n_col || p[i].n_mat != p->n_mat || (!is_experts(l->use) && p[i].n_mat != 1) ||
            (l->use == BE_USE_GATE_UP && p[i].n_row != p->n_row))
            return orcd_fail(err, ORCD_ERR_ARG, "%s: its shape does not fit %s", p[i].name, p->name);
        if (l->has_bias[i] && n_values(&l->bias[i]) != p[i].n_mat * p[i].n_row)
            return orcd_fail(err, ORCD_ERR_ARG, "%s: the bias has %llu values for %llu rows", p[i].name,
                             (unsigned long long)n_values(&l->bias[i]), (unsigned long long)(p[i].n_mat * p[i].n_row));
    }
    return ORCD_OK;
}

uint64_t ref_load_bytes(be_device *d, const be_load *l) {
    (void)d;
    uint64_t n_row = sum_rows(l), bias_and_hidden = l->part[0].n_mat * n_row + n_row;
    if (l->use == BE_USE_VECTOR)
        return l->part[0].n_col * sizeof(float);
    return (bias_and_hidden + scratch_floats(l)) * sizeof(float) + n_row * sizeof(double);
}

/* The biases of all parts as [n_mat][n_row]. */
static orcd_status load_bias(const be_load *l, ref_weight *w, orcd_error *err) {
    int64_t at = 0;
    for (int i = 0; i < l->n_part; at += (int64_t)l->part[i++].n_row) {
        if (!l->has_bias[i])
            continue;
        uint64_t n_row = l->part[i].n_row;
        float *all = malloc(n_values(&l->bias[i]) * sizeof *all);
        if (!all)
            return orcd_fail(err, ORCD_ERR_NOMEM, "%s: no memory for its bias", l->part[i].name);
        mf_floats(&l->bias[i], all);
        for (uint64_t m = 0; m < l->part[i].n_mat; m++)
            memcpy(w->bias + (int64_t)m * w->base.n_row + at, all + m * n_row, n_row * sizeof *all);
        free(all);
    }
    return ORCD_OK;
}

orcd_status ref_load(be_device *d, const be_load *l, be_weight **out, orcd_error *err) {
    *out = NULL;
    ORCD_TRY(check_load(l, err));
    orcd_status status = ORCD_OK;
    size_t row_bytes = 0;
    ref_weight *w = calloc(1, sizeof *w);
    if (!w)
        return orcd_fail(err, ORCD_ERR_NOMEM, "%s: no memory to load it", l->part[0].name);
    w->n_part = l->n_part;
    w->base = (be_weight){.use = l->use,
                          .type = l->part[0].type,
                          .n_col = (int64_t)l->part[0].n_col,
                          .n_row = (int64_t)sum_rows(l),
                          .n_mat = (int64_t)l->part[0].n_mat,
                          .bytes = ref_load_bytes(d, l)};
    for (int i = 0; i < l->n_part; i++) {
        w->part[i] = l->part[i];
        w->q[i] = q_find((uint32_t)l->part[i].type);
        size_t bytes = q_row_bytes(w->q[i], l->part[i].n_col);
        row_bytes = bytes > row_bytes ? bytes : row_bytes;
    }
    if (l->use == BE_USE_VECTOR) {
        w->vector = malloc(l->part[0].n_col * sizeof *w->vector);
    } else {
        w->bias = calloc(l->part[0].n_mat * sum_rows(l), sizeof *w->bias);
        w->bytes = malloc(row_bytes);
        w->rows = malloc(scratch_floats(l) * sizeof *w->rows);
        w->out = malloc(sum_rows(l) * sizeof *w->out);
        w->hidden = malloc(sum_rows(l) * sizeof *w->hidden);
    }
    if (l->use == BE_USE_VECTOR ? !w->vector : !w->bias || !w->bytes || !w->rows || !w->out || !w->hidden) {
        status = orcd_fail(err, ORCD_ERR_NOMEM, "%s: no memory to load it", l->part[0].name);
        goto done;
    }
    if (l->use == BE_USE_VECTOR)
        mf_floats(&l->part[0], w->vector);
    else
        ORCD_TRY_GOTO(status, done, load_bias(l, w, err));
    *out = &w->base;
    w = NULL;
done:
    ref_unload(d, w ? &w->base : NULL);
    return status;
}

void ref_unload(be_device *d, be_weight *weight) {
    (void)d;
    ref_weight *w = (ref_weight *)weight;
    if (!w)
        return;
    free(w->vector);
    free(w->bias);
    free(w->bytes);
    free(w->rows);
    free(w->out);
    free(w->hidden);
    free(w);
}

void ref_row(ref_weight *w, int64_t m, int64_t r, float *dst) {
    int i = 0;
    while (r >= (int64_t)w->part[i].n_row)
        r -= (int64_t)w->part[i++].n_row;
    const mf_tensor *t = &w->part[i];
    const uint8_t *row = w->bytes;
    if (t->data)
        row = t->data + ((uint64_t)m * t->n_row + (uint64_t)r) * q_row_bytes(w->q[i], t->n_col);
    else
        mf_rows(t, (uint64_t)m, (uint64_t)r, 1, w->bytes);
    w->q[i]->unpack(row, dst, t->n_col);
}
