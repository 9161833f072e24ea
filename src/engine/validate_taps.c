/* Where two runs part: A's intermediates of a step are kept until B has computed the same step. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/validate.h"

typedef struct point { /* one named intermediate */
    tap_error e;
    double diff, norm; /* sums of squares over all positions */
    int64_t n_row;     /* positions compared */
    float *value;      /* A's rows of the step in hand */
    int64_t rows, width, cap;
} point;

struct taps {
    teacher *a, *b;
    point *p;
    int n, cap, at; /* at: the one that came last */
    bool failed, other;
};

static point *find(taps *t, const char *name, int layer) {
    for (int i = 0; i < t->n; i++) {
        int k = (t->at + 1 + i) % t->n; /* nearly always the next */
        if (t->p[k].e.layer == layer && strcmp(t->p[k].e.name, name) == 0) {
            t->at = k;
            return &t->p[k];
        }
    }
    return NULL;
}

static point *add(taps *t, const char *name, int layer) {
    if (t->n == t->cap) {
        int cap = t->cap ? 2 * t->cap : 64;
        point *grown = realloc(t->p, (size_t)cap * sizeof *grown);
        if (!grown)
            return NULL;
        t->p = grown;
        t->cap = cap;
    }
    t->at = t->n++;
    t->p[t->at] = (point){.e.layer = layer};
    snprintf(t->p[t->at].e.name, sizeof t->p->e.name, "%s", name);
    return &t->p[t->at];
}

static void keep(void *ctx, const char *name, int layer, int64_t n_row, int64_t width, const float *value) {
    taps *t = ctx;
    point *p = find(t, name, layer);
    if (!p)
        p = add(t, name, layer);
    if (p && n_row * width > p->cap) {
        free(p->value);
        p->cap = n_row * width;
        p->value = malloc((size_t)p->cap * sizeof *p->value);
    }
    if (!p || !p->value) {
        t->failed = true;
        return;
    }
    p->rows = n_row;
    p->width = width;
    memcpy(p->value, value, (size_t)(n_row * width) * sizeof *value);
}

static double ratio(double diff, double norm) { return diff == 0 ? 0 : sqrt(diff / norm); }

static void compare(void *ctx, const char *name, int layer, int64_t n_row, int64_t width, const float *value) {
    taps *t = ctx;
    point *p = find(t, name, layer);
    if (!p || !p->value || p->rows != n_row || p->width != width) {
        t->other = true;
        return;
    }
    for (int64_t r = 0; r < n_row; r++) {
        const float *a = p->value + r * width, *b = value + r * width;
        double diff = 0, norm = 0;
        for (int64_t i = 0; i < width; i++) {
            double d = (double)b[i] - a[i];
            diff += d * d;
            norm += (double)a[i] * a[i];
        }
        double rel = ratio(diff, norm);
        if (!(rel <= p->e.rel_worst)) {
            p->e.rel_worst = rel;
            p->e.at = p->n_row + r;
        }
        p->diff += diff;
        p->norm += norm;
    }
    p->n_row += n_row;
    p->e.rel = ratio(p->diff, p->norm);
}

orcd_status taps_open(teacher *a, teacher *b, taps **out, orcd_error *err) {
    taps *t = *out = calloc(1, sizeof *t);
    if (!t)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    t->a = a;
    t->b = b;
    arch_set_tap(teacher_model(a), keep, t);
    arch_set_tap(teacher_model(b), compare, t);
    return ORCD_OK;
}

void taps_close(taps *t) {
    if (!t)
        return;
    arch_set_tap(teacher_model(t->a), NULL, NULL);
    arch_set_tap(teacher_model(t->b), NULL, NULL);
    for (int i = 0; i < t->n; i++)
        free(t->p[i].value);
    free(t->p);
    free(t);
}

orcd_status taps_result(const taps *t, tap_error **out, int *n, orcd_error *err) {
    *n = 0;
    *out = NULL;
    if (t->other)
        return orcd_fail(err, ORCD_ERR_ARG, "the two models have different intermediates: they cannot be compared");
    if (!t->failed)
        *out = malloc((size_t)t->n * sizeof **out + 1);
    if (!*out)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the intermediates of a step");
    for (int i = 0; i < t->n; i++)
        (*out)[i] = t->p[i].e;
    *n = t->n;
    return ORCD_OK;
}
