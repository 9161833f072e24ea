#include "engine/validate.h"

#include <math.h>
#include <stdlib.h>

void nll_add(nll_sum *s, double nll) {
    double off = nll - s->mean;
    s->mean += off / (double)++s->n;
    s->sq += off * (nll - s->mean);
}

double nll_stderr(const nll_sum *s) { return s->n > 1 ? sqrt(s->sq / (double)(s->n - 1) / (double)s->n) : 0; }

double perplexity_of(const nll_sum *s) { return exp(s->mean); }

double perplexity_stderr(const nll_sum *s) { return perplexity_of(s) * nll_stderr(s); }

double log_sum_exp(const float *x, size_t n) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++)
        if (!(x[i] <= top)) /* a NaN becomes the top and stays in the sum */
            top = x[i];
    for (size_t i = 0; i < n; i++)
        sum += exp((double)x[i] - top);
    return top + log(sum);
}

typedef struct window {
    const int32_t *ids; /* of the window */
    int64_t base, total;
    size_t n_vocab;
    nll_sum *sum;
    arch_progress progress;
    void *progress_ctx;
    int64_t bad; /* token whose likelihood is no number, -1 */
} window;

static bool score_row(void *ctx, int64_t pos, const float *logits) {
    window *w = ctx;
    double nll = log_sum_exp(logits, w->n_vocab) - logits[w->ids[pos + 1]];
    if (!isfinite(nll)) {
        w->bad = w->base + pos + 1;
        return false;
    }
    nll_add(w->sum, nll);
    if (w->progress)
        w->progress(w->progress_ctx, (uint64_t)w->sum->n, (uint64_t)w->total);
    return true;
}

static orcd_status not_finite(int64_t token, orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_FORMAT, "the logits at token %lld are not finite; orcd verify looks for the cause",
                     (long long)token);
}

orcd_status perplexity_run(teacher *t, const int32_t *ids, int64_t n, int64_t ctx, int64_t stride,
                           arch_progress progress, void *progress_ctx, nll_sum *out, orcd_error *err) {
    *out = (nll_sum){0};
    if (n < 2 || ctx < 2 || stride < 1 || stride >= ctx)
        return orcd_fail(err, ORCD_ERR_ARG,
                         "perplexity needs at least 2 tokens and a stride from 1 to the context - 1; there are %lld "
                         "tokens, context %lld, stride %lld",
                         (long long)n, (long long)ctx, (long long)stride);
    window w = {.total = n - 1,
                .n_vocab = (size_t)teacher_config(t)->n_vocab,
                .sum = out,
                .progress = progress,
                .progress_ctx = progress_ctx,
                .bad = -1};
    int64_t scored = 1; /* tokens before this one are done */
    for (w.base = 0; scored < n; w.base += stride) {
        int64_t end = w.base + ctx < n ? w.base + ctx : n;
        w.ids = ids + w.base;
        ORCD_TRY(teacher_run(t, w.ids, end - w.base - 1, scored - w.base - 1, score_row, &w, err));
        if (w.bad >= 0)
            return not_finite(w.bad, err);
        scored = end;
    }
    return ORCD_OK;
}

/* ---- two models side by side ---- */

static size_t argmax(const float *x, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (x[i] > x[best])
            best = i;
    return best;
}

static double mean_of(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i];
    return sum / (double)n;
}

static double cosine_of(const float *a, const float *b, size_t n) {
    double ma = mean_of(a, n), mb = mean_of(b, n), aa = 0, bb = 0, ab = 0;
    for (size_t i = 0; i < n; i++) {
        aa += (a[i] - ma) * (a[i] - ma);
        bb += (b[i] - mb) * (b[i] - mb);
        ab += (a[i] - ma) * (b[i] - mb);
    }
    if (aa == bb && ab == aa)
        return 1;
    return aa > 0 && bb > 0 ? ab / sqrt(aa * bb) : 0;
}

static double kl_of(const float *a, double lse_a, const float *b, double lse_b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double la = a[i] - lse_a;
        sum += exp(la) * (la - (b[i] - lse_b));
    }
    return sum > 0 ? sum : 0; /* below zero by rounding only */
}

/* Position `at` of the whole text; target: the token that follows in the window, or -1. */
static bool add_row(agreement *g, int64_t at, const float *a, const float *b, size_t n_vocab, int32_t target) {
    double lse_a = log_sum_exp(a, n_vocab), lse_b = log_sum_exp(b, n_vocab);
    if (!isfinite(lse_a) || !isfinite(lse_b))
        return false;
    double cosine = cosine_of(a, b, n_vocab), kl = kl_of(a, lse_a, b, lse_b, n_vocab);
    g->n_same += argmax(a, n_vocab) == argmax(b, n_vocab);
    g->kl[g->n++] = (float)kl;
    g->cos_mean += (cosine - g->cos_mean) / (double)g->n;
    g->kl_mean += (kl - g->kl_mean) / (double)g->n;
    if (g->n == 1 || cosine < g->cos_worst)
        g->cos_worst = cosine, g->cos_at = at;
    if (g->n == 1 || kl > g->kl_max)
        g->kl_max = kl, g->kl_at = at;
    if (target >= 0) {
        nll_add(&g->a, lse_a - a[target]);
        nll_add(&g->b, lse_b - b[target]);
    }
    return true;
}

static int by_float(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* The smallest value that 99 of 100 do not exceed. */
static orcd_status percentile_99(const float *v, int64_t n, double *out, orcd_error *err) {
    float *sorted = malloc((size_t)n * sizeof *sorted);
    if (!sorted)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %lld values", (long long)n);
    for (int64_t i = 0; i < n; i++)
        sorted[i] = v[i];
    qsort(sorted, (size_t)n, sizeof *sorted, by_float);
    *out = sorted[(n * 99 + 99) / 100 - 1];
    free(sorted);
    return ORCD_OK;
}

orcd_status validate_logits(teacher *a, teacher *b, const int32_t *ids, int64_t n, int64_t ctx, arch_progress progress,
                            void *progress_ctx, agreement *out, orcd_error *err) {
    orcd_status st = ORCD_OK;
    int n_vocab = teacher_config(a)->n_vocab;
    *out = (agreement){0};
    if (teacher_config(b)->n_vocab != n_vocab)
        return orcd_fail(err, ORCD_ERR_ARG, "the models have %d and %d tokens: they cannot be compared", n_vocab,
                         teacher_config(b)->n_vocab);
    if (n < 2 || ctx < 2)
        return orcd_fail(err, ORCD_ERR_ARG, "a comparison needs at least 2 tokens; there are %lld, windows of %lld",
                         (long long)n, (long long)ctx);
    out->kl = malloc((size_t)n * sizeof *out->kl);
    if (!out->kl)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %lld positions", (long long)n);
    for (int64_t base = 0; base < n; base += ctx) {
        int64_t len = n - base < ctx ? n - base : ctx, pos;
        const float *la, *lb;
        ORCD_TRY_GOTO(st, done, teacher_start(a, ids + base, len, 0, err));
        ORCD_TRY_GOTO(st, done, teacher_start(b, ids + base, len, 0, err));
        for (int64_t i = 0; i < len; i++) {
            ORCD_TRY_GOTO(st, done, teacher_next(a, &pos, &la, err));
            ORCD_TRY_GOTO(st, done, teacher_next(b, &pos, &lb, err));
            if (!add_row(out, base + i, la, lb, (size_t)n_vocab, i + 1 < len ? ids[base + i + 1] : -1))
                ORCD_TRY_GOTO(st, done, not_finite(base + i, err));
            if (progress)
                progress(progress_ctx, (uint64_t)out->n, (uint64_t)n);
        }
    }
    st = percentile_99(out->kl, n, &out->kl_p99, err);
done:
    if (st != ORCD_OK)
        agreement_free(out);
    return st;
}

void agreement_free(agreement *g) {
    free(g->kl);
    *g = (agreement){0};
}
