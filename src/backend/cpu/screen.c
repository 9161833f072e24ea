/* The largest logits without reading the whole head. A copy of the head with 5 bits a weight (kernels.h) bounds every
 * logit from above: |w . x - w' . x| <= sum over blocks of |w - w'| |x| (Cauchy and Schwarz), where the first factor is
 * stored with the copy. The panel with the largest bound is computed exactly; what can reach its largest logit is
 * computed exactly too, by the kernels and with the bits of the whole head, and everything else is -INFINITY. */
#include <math.h>
#include <string.h>

#include "backend/cpu/internal.h"

/* Exact kernels round too: integer ones hardly, float ones by up to 2^-24 for each of half the columns, and their rows
 * are not the 16-bit rows that the screen reads. Both are less than these shares of |scale| |x| (MAX_COLS). */
enum { SLACK_INT = 1, SLACK_FLOAT = 3, MAX_COLS = 8192, RUN = 8, LONGEST_PAUSE = 64 };

bool cpu_has_screen(const cpu_device *d, const be_load *l, cpu_fmt fmt) {
    int64_t n_col = (int64_t)l->part[0].n_col;
    bool one = l->n_part == 1 && l->part[0].n_mat == 1 && !l->has_bias[0];
    bool exact_rows = cpu_fmt_is_int(fmt) || d->base.params.act_bits != 8;
    return l->head && d->k->screen && one && exact_rows && n_col <= MAX_COLS &&
           cpu_panel_bytes(fmt, n_col) * 2 >= cpu_screen_bytes(n_col) * 3;
}

void cpu_screen_pack(const cpu_device *d, const cpu_part *part, const uint8_t *rows, size_t row_bytes, int n,
                     int64_t n_col, float *row, uint8_t *panel) {
    int64_t n64 = cpu_n64(n_col), len = part->src->block_len, whole = (n_col + len - 1) / len * len;
    for (int r = 0; r < n; r++) {
        part->src->unpack(rows + (size_t)r * row_bytes, row, (size_t)whole);
        for (int64_t k = n_col; k < n64 * 64; k++)
            row[k] = 0;
        d->k->screen_row(row, n64, r, cpu_fmt_is_int(part->fmt) ? SLACK_INT : SLACK_FLOAT, panel);
    }
}

bool cpu_screen_now(cpu_step *s, const cpu_weight *w, int64_t n_row) {
    if (!w->screen || !s->base.batch.best || n_row < 1 || n_row > CPU_FEW)
        return false;
    if (s->dev->screening.pause == 0)
        return true;
    s->dev->screening.pause--;
    return false;
}

/* Norms of a row's blocks of 64, rounded upwards; where all are rounded away, of more than was there. */
static void block_norms(const uint8_t *q, int64_t n64, bool few_bits, float *norm) {
    const int8_t *high = (const int8_t *)q, *low = high + n64 * 64;
    for (int64_t b = 0; b < n64; b++) {
        double sum = 0;
        for (int64_t k = b * 64; k < b * 64 + 64; k++) {
            double v = few_bits ? high[k] : high[k] * 256 + low[k];
            sum += v * v;
        }
        norm[b] = (float)sqrt(sum) * cpu_q_scale(q, n64)[b] * 1.0001f + 2e-26f;
    }
}

/* What the logits of all panels do not exceed, for each row, to shared.peak. */
static void bound_panels(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, int n) {
    cpu_device *d = s->dev;
    cpu_local *l = &d->local[thread];
    int64_t n_col = c->w->base.n_col, n64 = cpu_n64(n_col), n_panel = c->w->n_panel, runs = (n_panel + RUN - 1) / RUN;
    const void *q[CPU_FEW];
    const float *norm[CPU_FEW];
    for (int t = 0; t < n; t++) {
        q[t] = x->q + (size_t)t * x->q_stride;
        norm[t] = l->row + t * n64;
        block_norms(q[t], n64, d->base.params.act_bits == 8, l->row + t * n64);
    }
    cpu_turns turns = cpu_turns_of(&c->next[0], runs, thread, d->n_thread);
    for (int64_t i; (i = cpu_turn(&turns)) < runs;)
        for (int64_t p = i * RUN; p < (i + 1) * RUN && p < n_panel; p++) {
            d->k->screen(c->w->screen + p * cpu_screen_bytes(n_col), n_col, q, norm, n, l->y);
            for (int t = 0; t < n; t++)
                d->shared.peak[t * n_panel + p] = l->y[t];
        }
}

/* The largest logit of the panel that promises most: the largest of all is not below. */
static float floor_of(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, int t) {
    cpu_device *d = s->dev;
    cpu_local *l = &d->local[thread];
    const cpu_part *part = &c->w->part[0];
    int64_t n_panel = c->w->n_panel, best = 0;
    const float *peak = d->shared.peak + t * n_panel;
    for (int64_t p = 1; p < n_panel; p++)
        best = peak[p] > peak[best] ? p : best;
    const void *row = cpu_row_of(x, cpu_fmt_is_int(part->fmt), t);
    d->k->dot[part->fmt](cpu_panel(part, c->w->base.n_col, 0, best, l), c->w->base.n_col, &row, 1, l->y, l->dot);
    int64_t left = part->n_row - best * CPU_PANEL;
    float most = -INFINITY;
    for (int64_t r = 0; r < left && r < CPU_PANEL; r++) {
        if (l->y[r] != l->y[r])
            return -INFINITY;
        most = l->y[r] > most ? l->y[r] : most;
    }
    return most;
}

void cpu_run_screen(cpu_step *s, cpu_cmd *c, int thread) {
    cpu_device *d = s->dev;
    int n = (int)c->x->base.n_row;
    int64_t n_panel = c->w->n_panel, runs = (n_panel + RUN - 1) / RUN;
    float least[CPU_FEW], nothing[CPU_PANEL];
    for (int r = 0; r < CPU_PANEL; r++)
        nothing[r] = -INFINITY;
    cpu_rows x;
    cpu_prepare(s, thread, &c->norm, c->x->data, n, c->w->base.n_col, true, &x);
    bound_panels(s, c, thread, &x, n);
    pool_barrier(d->pool);
    for (int t = 0; t < n; t++)
        least[t] = floor_of(s, c, thread, &x, t);
    for (int64_t i; (i = atomic_fetch_add_explicit(&c->next[1], 1, memory_order_relaxed)) < runs;)
        for (int64_t p = i * RUN; p < (i + 1) * RUN && p < n_panel; p++) {
            bool reaches = false;
            for (int t = 0; t < n; t++)
                reaches |= d->shared.peak[t * n_panel + p] >= least[t];
            if (reaches) {
                cpu_linear_panel(s, c, thread, &x, 0, n, p);
                atomic_fetch_add_explicit(&c->next[2], 1, memory_order_relaxed);
                continue;
            }
            int64_t left = c->w->base.n_row - p * CPU_PANEL, lanes = left < CPU_PANEL ? left : CPU_PANEL;
            for (int t = 0; t < n; t++)
                memcpy(c->y->data + t * c->y->stride + p * CPU_PANEL, nothing, (size_t)lanes * sizeof *nothing);
        }
    pool_barrier(d->pool);
    if (thread > 0)
        return;
    bool paid = atomic_load_explicit(&c->next[2], memory_order_relaxed) < n_panel / 4 + 1;
    cpu_screening *g = &d->screening;
    g->length = paid ? 0 : g->length < LONGEST_PAUSE ? g->length * 2 + 1 : g->length;
    g->pause = g->length;
}
