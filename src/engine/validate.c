#include "engine/validate.h"

#include <math.h>

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
