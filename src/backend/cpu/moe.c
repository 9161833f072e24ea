#include <math.h>
#include <string.h>

#include "backend/cpu/internal.h"

enum { RUN_FEW = 4, RUN_MANY = 12 /* panels taken at a time */ };

/* ---- router ---- */

/* The top_k largest of logits, lower id first among equals, and the softmax over them. */
static void choose(const float *logits, int n, int top_k, float *route) {
    float top = 0, sum = 0;
    for (int k = 0; k < top_k; k++) {
        int best = -1;
        for (int e = 0; e < n; e++) {
            bool taken = false;
            for (int j = 0; j < k; j++)
                taken |= (int)route[j * 2] == e;
            if (!taken && (best < 0 || logits[e] > logits[best]))
                best = e;
        }
        if (k == 0)
            top = logits[best];
        route[k * 2] = (float)best;
        route[k * 2 + 1] = expf(logits[best] - top);
        sum += route[k * 2 + 1];
    }
    for (int k = 0; k < top_k; k++)
        route[k * 2 + 1] /= sum;
}

static void route_panel(cpu_step *s, const cpu_cmd *c, cpu_local *l, const cpu_rows *x, int64_t row, int64_t n,
                        int64_t index) {
    const cpu_part *part = &c->w->part[0];
    bool ints = cpu_fmt_is_int(part->fmt);
    const void *ptr[CPU_TOKENS];
    for (int64_t t = 0; t < n; t++)
        ptr[t] = cpu_row_of(x, ints, row + t);
    const uint8_t *panel = cpu_panel(part, c->w->base.n_col, 0, index, l);
    s->dev->k->dot[part->fmt](panel, c->w->base.n_col, ptr, (int)n, l->y, l->dot);
    int64_t stride = c->w->n_panel * CPU_PANEL;
    for (int64_t t = 0; t < n; t++)
        for (int64_t r = 0; r < CPU_PANEL && index * CPU_PANEL + r < part->n_row; r++) {
            float v = l->y[t * CPU_PANEL + r];
            s->dev->shared.logits[(row + t) * stride + index * CPU_PANEL + r] =
                v + (c->w->bias[0] ? c->w->bias[0][index * CPU_PANEL + r] : 0);
        }
}

static void run_route(cpu_step *s, cpu_cmd *c, int thread) {
    cpu_device *d = s->dev;
    int64_t n = c->x->base.n_row;
    bool ints = cpu_wants_ints(c->w);
    cpu_rows x;
    cpu_prepare(s, thread, &c->norm, c->x->data, n, c->w->base.n_col, ints, &x);
    int64_t block = CPU_TOKENS, n_block = (n + block - 1) / block, total = n_block * c->w->n_panel;
    for (int64_t i; (i = atomic_fetch_add_explicit(&c->next[0], 1, memory_order_relaxed)) < total;) {
        int64_t row = i / c->w->n_panel * block;
        route_panel(s, c, &d->local[thread], &x, row, n - row < block ? n - row : block, i % c->w->n_panel);
    }
    pool_barrier(d->pool);
    for (int64_t t = thread; t < n; t += d->n_thread)
        choose(d->shared.logits + t * c->w->n_panel * CPU_PANEL, (int)c->w->base.n_row, c->top_k,
               c->route->data + t * c->route->stride);
}

void cpu_route(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route) {
    cpu_device *d = ((cpu_step *)s)->dev;
    cpu_cmd *c = cpu_record(s, run_route);
    c->w = (const cpu_weight *)w;
    c->x = (const cpu_act *)x;
    c->route = (cpu_act *)route;
    c->top_k = top_k;
    route->n_row = x->n_row;
    cpu_widen(&d->dims.max_tok, x->n_row);
    cpu_widen(&d->dims.n_expert, w->n_row);
    cpu_widen(&d->dims.top_k, top_k);
}

/* ---- experts ---- */

/* Which (row, slot) entries go to which expert: entry = row * top_k + slot, ascending within an expert. */
typedef struct groups {
    int32_t *start;  /* [n_expert + 1] into entry */
    int32_t *entry;  /* [rows * top_k] */
    int32_t *active; /* experts that have any */
    int n_active;
} groups;

static void group(const cpu_act *route, int64_t n, int top_k, int n_expert, int32_t *memory, groups *g) {
    g->start = memory;
    g->active = memory + n_expert + 1;
    g->entry = g->active + n_expert;
    g->n_active = 0;
    memset(g->start, 0, (size_t)(n_expert + 1) * sizeof(int32_t));
    for (int64_t t = 0; t < n; t++)
        for (int k = 0; k < top_k; k++)
            g->start[(int)route->data[t * route->stride + k * 2] + 1]++;
    for (int e = 0; e < n_expert; e++) {
        if (g->start[e + 1])
            g->active[g->n_active++] = e;
        g->start[e + 1] += g->start[e];
    }
    for (int64_t i = 0; i < n * top_k; i++) /* start[e] walks to its end, */
        g->entry[g->start[(int)route->data[i / top_k * route->stride + i % top_k * 2]]++] = (int32_t)i;
    memmove(g->start + 1, g->start, (size_t)n_expert * sizeof(int32_t)); /* which is the next one's beginning */
    g->start[0] = 0;
}

/* How many of `left` neighbouring panels are computed at once. */
static int together(const cpu_step *s, const cpu_weight *w, int64_t left) {
    bool pair = s->dev->k->pair_mx4 && left > 1;
    for (int i = 0; i < w->n_part; i++)
        pair &= w->part[i].fmt == CPU_MX4 && w->part[i].data;
    return pair ? 2 : 1;
}

/* y[count][n][16] */
static void dot_panels(cpu_step *s, int thread, const cpu_weight *w, int part, int64_t mat, int64_t index, int count,
                       const void *const *x, int n, float *y) {
    const cpu_part *p = &w->part[part];
    const cpu_kernels *k = s->dev->k;
    cpu_local *l = &s->dev->local[thread];
    const uint8_t *panel = cpu_panel(p, w->base.n_col, mat, index, l);
    (count == 2 ? k->pair_mx4 : k->dot[p->fmt])(panel, w->base.n_col, x, n, y, l->dot);
    for (; w->bias[part] && count > 0; count--, index++, y += n * CPU_PANEL) {
        float bias[CPU_PANEL] = {0};
        int64_t left = p->n_row - index * CPU_PANEL;
        memcpy(bias, w->bias[part] + mat * p->n_row + index * CPU_PANEL,
               (size_t)(left < CPU_PANEL ? left : CPU_PANEL) * sizeof *bias);
        k->put(y, bias, n, false, y, CPU_PANEL);
    }
}

/* y[count][n][16] to 16 * count values of each entry's row */
static void scatter(const float *y, const int32_t *entry, int n, int count, float *out, int64_t stride) {
    for (int c = 0; c < count; c++, out += CPU_PANEL)
        for (int i = 0; i < n; i++, y += CPU_PANEL)
            memcpy(out + entry[i] * stride, y, CPU_PANEL * sizeof *y);
}

/* Some of an expert's entries and panels. Rows change last: they stay in the cache while the panels go by. */
typedef struct share {
    int expert, at, n;      /* entries at, at + 1, .. of the groups */
    int64_t panel, n_panel; /* panels panel .. n_panel - 1 */
} share;

static int next_rows(const groups *g, const share *a) {
    int left = g->start[a->expert + 1] - a->at;
    return left < CPU_TOKENS ? left : CPU_TOKENS;
}

/* hidden[entry][16 of a panel] = glu(gate, up) */
static void gate_up_rows(cpu_step *s, const cpu_cmd *c, int thread, const cpu_rows *x, const groups *g,
                         const share *a) {
    cpu_device *d = s->dev;
    const cpu_weight *w = c->w;
    float *gate = d->local[thread].y, *up = gate + 2 * CPU_TOKENS * CPU_PANEL;
    const void *ptr[2][CPU_TOKENS];
    for (int i = 0; i < a->n; i++)
        for (int p = 0; p < 2; p++)
            ptr[p][i] = cpu_row_of(x, cpu_fmt_is_int(w->part[p].fmt), g->entry[a->at + i] / c->top_k);
    for (int64_t p = a->panel, count; p < a->n_panel; p += count) {
        count = together(s, w, a->n_panel - p);
        dot_panels(s, thread, w, 0, a->expert, p, (int)count, ptr[0], a->n, gate);
        dot_panels(s, thread, w, 1, a->expert, p, (int)count, ptr[1], a->n, up);
        d->k->glu(gate, up, count * a->n * CPU_PANEL, c->glu.alpha, c->glu.limit, gate);
        scatter(gate, g->entry + a->at, a->n, (int)count, d->shared.hidden + p * CPU_PANEL, d->sized.n_ff);
    }
}

/* out[entry * out_stride + 16 of a panel] = down . hidden + bias; the first panel's are at out */
static void down_rows(cpu_step *s, const cpu_cmd *c, int thread, const cpu_rows *x, const groups *g, const share *a,
                      float *out, int64_t out_stride) {
    bool ints = cpu_fmt_is_int(c->w2->part[0].fmt);
    float *y = s->dev->local[thread].y;
    const void *ptr[CPU_TOKENS];
    for (int i = 0; i < a->n; i++)
        ptr[i] = cpu_row_of(x, ints, g->entry[a->at + i]);
    for (int64_t p = a->panel, count; p < a->n_panel; p += count, out += count * CPU_PANEL) {
        count = together(s, c->w2, a->n_panel - p);
        dot_panels(s, thread, c->w2, 0, a->expert, p, (int)count, ptr, a->n, y);
        scatter(y, g->entry + a->at, a->n, (int)count, out, out_stride);
    }
}

/* The panels of run `run` of an expert: as many as are taken at a time. */
static share share_of(const groups *g, int expert, int64_t run, int64_t size, int64_t n_panel) {
    share a = {.expert = expert, .at = g->start[expert], .panel = run * size, .n_panel = (run + 1) * size};
    a.n_panel = a.n_panel < n_panel ? a.n_panel : n_panel;
    return a;
}

/* y += sum over slots of weight * out, in slot order */
static void combine(const cpu_device *d, const cpu_cmd *c, int64_t row, const float *out, int64_t out_stride,
                    int64_t col, int64_t n) {
    const float *weight = c->route->data + row * c->route->stride + 1;
    float *y = c->y->data + row * c->y->stride + col, last[CPU_PANEL] = {0};
    int64_t i = 0;
    for (; i + CPU_PANEL <= n; i += CPU_PANEL)
        d->k->combine(out + i, out_stride, weight, c->top_k, y + i);
    if (i == n)
        return;
    memcpy(last, y + i, (size_t)(n - i) * sizeof *last);
    d->k->combine(out + i, out_stride, weight, c->top_k, last);
    memcpy(y + i, last, (size_t)(n - i) * sizeof *last);
}

/* Few rows: entries are few enough that each thread finishes the outputs of its panels. */
static void down_few(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, const groups *g) {
    int64_t n = c->x->base.n_row, n_panel = c->w2->part[0].n_panel, n_row = c->w2->base.n_row;
    float *out = s->dev->local[thread].y + CPU_TOKENS * CPU_PANEL; /* [entry][16] */
    int64_t runs = (n_panel + RUN_FEW - 1) / RUN_FEW;
    cpu_turns turns = cpu_turns_of(&c->next[1], runs, thread, s->dev->n_thread);
    for (int64_t i; (i = cpu_turn(&turns)) < runs;)
        for (int64_t p = i * RUN_FEW; p < (i + 1) * RUN_FEW && p < n_panel; p++) {
            for (int e = 0; e < g->n_active; e++) {
                share a = share_of(g, g->active[e], p, 1, n_panel);
                a.n = next_rows(g, &a);
                down_rows(s, c, thread, x, g, &a, out, CPU_PANEL);
            }
            int64_t lanes = n_row - p * CPU_PANEL < CPU_PANEL ? n_row - p * CPU_PANEL : CPU_PANEL;
            for (int64_t t = 0; t < n; t++)
                combine(s->dev, c, t, out + t * c->top_k * CPU_PANEL, CPU_PANEL, p * CPU_PANEL, lanes);
        }
}

static void down_many(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, const groups *g) {
    cpu_device *d = s->dev;
    int64_t n_panel = c->w2->part[0].n_panel, runs = (n_panel + RUN_MANY - 1) / RUN_MANY, stride = d->sized.n_ff;
    for (int64_t i; (i = atomic_fetch_add_explicit(&c->next[1], 1, memory_order_relaxed)) < runs * g->n_active;)
        for (share a = share_of(g, g->active[i / runs], i % runs, RUN_MANY, n_panel); (a.n = next_rows(g, &a)) > 0;
             a.at += a.n)
            down_rows(s, c, thread, x, g, &a, d->shared.down + a.panel * CPU_PANEL, stride);
    pool_barrier(d->pool);
    for (int64_t t = thread; t < c->x->base.n_row; t += d->n_thread)
        combine(d, c, t, d->shared.down + t * c->top_k * stride, stride, 0, c->w2->base.n_row);
}

static void run_experts(cpu_step *s, cpu_cmd *c, int thread) {
    cpu_device *d = s->dev;
    int64_t n = c->x->base.n_row, entries = n * c->top_k, stride = d->sized.n_ff;
    bool few = n <= CPU_FEW && entries <= CPU_MAX_EXPERTS_FEW;
    groups g;
    cpu_rows x;
    /* Grouping is cheap against the products: every thread makes its own. */
    group(c->route, n, c->top_k, (int)c->w->base.n_mat, d->local[thread].list, &g);
    cpu_prepare(s, thread, &c->norm, c->x->data, n, c->w->base.n_col, cpu_wants_ints(c->w), &x);
    int64_t run = few ? RUN_FEW : RUN_MANY, n_panel = c->w->part[0].n_panel, runs = (n_panel + run - 1) / run;
    /* with many rows experts have unequal shares of them: nobody owns any in advance */
    cpu_turns turns = cpu_turns_of(&c->next[0], few ? runs * g.n_active : 0, thread, d->n_thread);
    for (int64_t i; (i = cpu_turn(&turns)) < runs * g.n_active;)
        for (share a = share_of(&g, g.active[i / runs], i % runs, run, n_panel); (a.n = next_rows(&g, &a)) > 0;
             a.at += a.n)
            gate_up_rows(s, c, thread, &x, &g, &a);
    pool_barrier(d->pool);

    bool ints = cpu_wants_ints(c->w2);
    x = (cpu_rows){.f = d->shared.hidden, .f_stride = stride, .q_stride = cpu_qrow_bytes(c->w2->base.n_col)};
    uint8_t *q = few ? d->local[thread].q : d->shared.q;
    x.q = q;
    for (int64_t i = few ? 0 : thread; ints && i < entries; i += few ? 1 : d->n_thread)
        d->k->quantise(d->shared.hidden + i * stride, c->w2->base.n_col, q + (size_t)i * x.q_stride);
    if (few) {
        down_few(s, c, thread, &x, &g);
        return;
    }
    pool_barrier(d->pool);
    down_many(s, c, thread, &x, &g);
}

void cpu_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                 const be_act *route, be_act *y) {
    cpu_device *d = ((cpu_step *)s)->dev;
    cpu_cmd *c = cpu_record(s, run_experts);
    c->w = (const cpu_weight *)gate_up;
    c->w2 = (const cpu_weight *)down;
    c->glu = *g;
    c->x = (const cpu_act *)x;
    c->y = (cpu_act *)y;
    c->route = (cpu_act *)route;
    c->top_k = (int)route->width;
    cpu_widen(&d->dims.max_tok, x->n_row);
    cpu_widen(&d->dims.top_k, route->width);
}
