#include <math.h>
#include <string.h>

#include "backend/cpu/internal.h"

enum { LINEAR_RUN = 8 /* panels taken at a time */ };

void cpu_widen(int64_t *have, int64_t want) { *have = want > *have ? want : *have; }

cpu_cmd *cpu_record(be_step *base, void (*run)(cpu_step *, cpu_cmd *, int)) {
    cpu_step *s = (cpu_step *)base;
    if (s->n_cmd == s->cap_cmd) {
        orcd_fail(&s->error, ORCD_ERR_LIMIT, "a step of the cpu backend holds at most %d operations", s->cap_cmd);
        s->n_cmd--; /* overwrite the last: the step fails as a whole */
    }
    cpu_cmd *c = &s->cmd[s->n_cmd++];
    memset(c, 0, sizeof *c);
    c->run = run;
    return c;
}

/* ---- preparing rows for the kernels ---- */

static void norm_row(const cpu_device *d, const be_norm *n, const float *x, int64_t width, float *y) {
    const float *weight = ((const cpu_weight *)n->weight)->vector;
    const float *bias = n->bias ? ((const cpu_weight *)n->bias)->vector : NULL;
    if (n->kind == BE_NORM_RMS)
        d->k->rms_norm(x, weight, n->eps, width, y);
    else
        d->k->layer_norm(x, weight, bias, n->eps, width, y);
}

bool cpu_wants_ints(const cpu_weight *w) {
    bool ints = false;
    for (int i = 0; i < w->n_part; i++)
        ints |= cpu_fmt_is_int(w->part[i].fmt);
    return ints;
}

/* Few rows: every thread makes its own. Many: each makes some, and all wait. Same numbers either way. */
void cpu_prepare(cpu_step *s, int thread, const be_norm *n, const float *x, int64_t n_row, int64_t width, bool ints,
                 cpu_rows *out) {
    cpu_device *d = s->dev;
    bool few = n_row <= CPU_FEW;
    *out = (cpu_rows){.f = x, .f_stride = width, .q_stride = cpu_qrow_bytes(width)};
    float *normed = few ? d->local[thread].norm : d->shared.norm;
    uint8_t *q = few ? d->local[thread].q : d->shared.q;
    if (n && n->weight)
        out->f = normed;
    out->q = q;
    for (int64_t i = few ? 0 : thread; i < n_row; i += few ? 1 : d->n_thread) {
        const float *row = x + i * width;
        if (out->f == normed) {
            norm_row(d, n, row, width, normed + i * width);
            row = normed + i * width;
        }
        if (ints)
            d->k->quantise(row, width, q + (size_t)i * out->q_stride);
    }
    if (!few && (ints || out->f == normed))
        pool_barrier(d->pool);
}

/* ---- linear ---- */

typedef struct product { /* a panel's outputs for some rows */
    const cpu_part *part;
    const float *bias; /* of the panel's first row, or NULL */
    int64_t row, n;    /* activation rows */
    int64_t col;       /* first output */
    int n_lane;
} product;

static void finish_linear(const cpu_device *d, const cpu_cmd *c, const product *p, float *dot) {
    cpu_act *y = c->y;
    float bias[CPU_PANEL] = {0}, *out = y->data + p->row * y->stride + p->col;
    bool add = c->epilogue == BE_EPI_ADD;
    if (p->bias)
        memcpy(bias, p->bias, (size_t)p->n_lane * sizeof *bias);
    if (p->n_lane == CPU_PANEL && (add || c->epilogue == BE_EPI_NONE)) {
        d->k->put(dot, bias, p->n, add, out, y->stride);
        return;
    }
    d->k->put(dot, bias, p->n, false, dot, CPU_PANEL);
    if (c->epilogue == BE_EPI_GELU_TANH)
        d->k->gelu_tanh(dot, p->n * CPU_PANEL);
    for (int64_t i = 0; c->epilogue == BE_EPI_GELU_ERF && i < p->n * CPU_PANEL; i++)
        dot[i] = 0.5f * dot[i] * (1.0f + erff(dot[i] * 0.70710678f));
    for (int64_t i = 0; i < p->n; i++)
        for (int r = 0; r < p->n_lane; r++)
            out[i * y->stride + r] = dot[i * CPU_PANEL + r] + (add ? out[i * y->stride + r] : 0);
}

/* Find panel `index` of the stacked parts. */
static void locate(const cpu_weight *w, int64_t *index, int *part, int64_t *row0) {
    *part = 0;
    *row0 = 0;
    while (*index >= w->part[*part].n_panel) {
        *index -= w->part[*part].n_panel;
        *row0 += w->part[*part].n_row;
        ++*part;
    }
}

void cpu_linear_panel(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, int64_t row, int64_t n, int64_t index) {
    cpu_device *d = s->dev;
    cpu_local *l = &d->local[thread];
    int i;
    int64_t row0;
    locate(c->w, &index, &i, &row0);
    const cpu_part *part = &c->w->part[i];
    bool ints = cpu_fmt_is_int(part->fmt);
    const void *ptr[CPU_TOKENS];
    for (int64_t t = 0; t < n; t++)
        ptr[t] = cpu_row_of(x, ints, row + t);
    const uint8_t *panel = cpu_panel(part, c->w->base.n_col, 0, index, l);
    d->k->dot[part->fmt](panel, c->w->base.n_col, ptr, (int)n, l->y, l->dot);
    int64_t left = part->n_row - index * CPU_PANEL;
    product p = {.part = part,
                 .bias = c->w->bias[i] ? c->w->bias[i] + index * CPU_PANEL : NULL,
                 .row = row,
                 .n = n,
                 .col = row0 + index * CPU_PANEL,
                 .n_lane = left < CPU_PANEL ? (int)left : CPU_PANEL};
    finish_linear(d, c, &p, l->y);
}

static void run_linear(cpu_step *s, cpu_cmd *c, int thread) {
    int64_t n = c->x->base.n_row, n_col = c->w->base.n_col;
    bool ints = cpu_wants_ints(c->w);
    cpu_rows x;
    cpu_prepare(s, thread, &c->norm, c->x->data, n, n_col, ints, &x);
    int64_t block = CPU_TOKENS, n_block = (n + block - 1) / block;
    int64_t n_run = (c->w->n_panel + LINEAR_RUN - 1) / LINEAR_RUN;
    cpu_turns turns = cpu_turns_of(&c->next[0], n_block * n_run, thread, s->dev->n_thread);
    for (int64_t i; (i = cpu_turn(&turns)) < n_block * n_run;) {
        int64_t row = i / n_run * block, panel = i % n_run * LINEAR_RUN;
        int64_t rows = n - row < block ? n - row : block;
        for (int64_t p = panel; p < panel + LINEAR_RUN && p < c->w->n_panel; p++)
            cpu_linear_panel(s, c, thread, &x, row, rows, p);
    }
}

void cpu_norm_linear(be_step *s, const be_norm *n, const be_weight *w, const be_act *x, be_act *tmp, be_act *y,
                     be_epilogue e) {
    (void)tmp;
    cpu_device *d = ((cpu_step *)s)->dev;
    bool screen = e == BE_EPI_NONE && cpu_screen_now((cpu_step *)s, (const cpu_weight *)w, x->n_row);
    cpu_cmd *c = cpu_record(s, screen ? cpu_run_screen : run_linear);
    c->w = (const cpu_weight *)w;
    c->x = (const cpu_act *)x;
    c->y = (cpu_act *)y;
    c->epilogue = e;
    if (n)
        c->norm = *n;
    y->n_row = x->n_row;
    cpu_widen(&d->dims.max_tok, x->n_row);
}

void cpu_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e) {
    cpu_norm_linear(s, NULL, w, x, NULL, y, e);
}

/* ---- row by row ---- */

static void run_embed(cpu_step *s, cpu_cmd *c, int thread) {
    const be_batch *b = &s->base.batch;
    int64_t n_col = c->w->base.n_col;
    float *second = s->dev->local[thread].row;
    for (int i = thread; i < b->n_tok; i += s->dev->n_thread) {
        const cpu_part *p = &c->w->part[0];
        size_t bytes = q_row_bytes(p->src, (size_t)n_col);
        float *y = c->y->data + i * c->y->stride;
        p->src->unpack((p->rows ? p->rows : p->file.data) + (size_t)b->token[i] * bytes, y, (size_t)n_col);
        if (!c->w2)
            continue;
        p = &c->w2->part[0];
        bytes = q_row_bytes(p->src, (size_t)n_col);
        p->src->unpack((p->rows ? p->rows : p->file.data) + (size_t)b->pos[i] * bytes, second, (size_t)n_col);
        for (int64_t k = 0; k < n_col; k++)
            y[k] += second[k];
    }
}

void cpu_embed(be_step *base, const be_weight *table, const be_weight *pos_table, be_act *y) {
    cpu_step *s = (cpu_step *)base;
    const be_batch *b = &base->batch;
    y->n_row = b->n_tok;
    for (int i = 0; i < b->n_tok; i++) {
        if (b->token[i] < 0 || b->token[i] >= table->n_row) {
            orcd_fail(&s->error, ORCD_ERR_ARG, "token %d of the batch is %d: outside the vocabulary of %lld", i,
                      b->token[i], (long long)table->n_row);
            return;
        }
        if (pos_table && (b->pos[i] < 0 || b->pos[i] >= pos_table->n_row)) {
            orcd_fail(&s->error, ORCD_ERR_ARG, "position %d is outside the model's %lld", b->pos[i],
                      (long long)pos_table->n_row);
            return;
        }
    }
    cpu_cmd *c = cpu_record(base, run_embed);
    c->w = (const cpu_weight *)table;
    c->w2 = (const cpu_weight *)pos_table;
    c->y = (cpu_act *)y;
}

static void run_norm(cpu_step *s, cpu_cmd *c, int thread) {
    for (int64_t i = thread; i < c->x->base.n_row; i += s->dev->n_thread)
        norm_row(s->dev, &c->norm, c->x->data + i * c->x->stride, c->x->base.width, c->y->data + i * c->y->stride);
}

void cpu_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y) {
    cpu_cmd *c = cpu_record(s, run_norm);
    c->norm = *n;
    c->x = (const cpu_act *)x;
    c->y = (cpu_act *)y;
    y->n_row = x->n_row;
}

static void run_gather(cpu_step *s, cpu_cmd *c, int thread) {
    const be_batch *b = &s->base.batch;
    for (int i = thread; i < b->n_out; i += s->dev->n_thread)
        memcpy(c->y->data + i * c->y->stride, c->x->data + b->out_row[i] * c->x->stride,
               (size_t)c->x->stride * sizeof(float));
}

void cpu_gather_out(be_step *s, const be_act *x, be_act *y) {
    cpu_cmd *c = cpu_record(s, run_gather);
    c->x = (const cpu_act *)x;
    c->y = (cpu_act *)y;
    y->n_row = s->batch.n_out;
}

static void run_tap(cpu_step *s, cpu_cmd *c, int thread) {
    (void)s;
    if (thread == 0)
        c->tap.fn(c->tap.ctx, c->tap.name, c->tap.layer, c->x->base.n_row, c->x->stride, c->x->data);
}

void cpu_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx) {
    cpu_cmd *c = cpu_record(s, run_tap);
    c->x = (const cpu_act *)a;
    c->tap.name = name;
    c->tap.layer = layer;
    c->tap.fn = fn;
    c->tap.ctx = ctx;
}
