/* engine/validate.h: how well a model predicts a text, under teacher forcing.
 * May include teacher.h and below. */
#ifndef ORCD_ENGINE_VALIDATE_H
#define ORCD_ENGINE_VALIDATE_H

#include "engine/teacher.h"

/* Negative log likelihoods (natural logarithm) of scored tokens: their mean and its standard error, as if tokens were
 * independent. */
typedef struct nll_sum {
    int64_t n;
    double mean, sq; /* sq: sum of squared distances from the mean */
} nll_sum;

void nll_add(nll_sum *s, double nll);
double nll_stderr(const nll_sum *s);
double perplexity_of(const nll_sum *s);
double perplexity_stderr(const nll_sum *s);

/* log sum exp(x[i]), in double; not finite when a logit is no number. */
double log_sum_exp(const float *x, size_t n);

/* Windows of ctx tokens, each `stride` (1 to ctx - 1) further on; every token but the first is scored once, in the
 * first window that holds it. progress counts tokens, not bytes. */
orcd_status perplexity_run(teacher *t, const int32_t *ids, int64_t n, int64_t ctx, int64_t stride,
                           arch_progress progress, void *progress_ctx, nll_sum *out, orcd_error *err) ORCD_MUST_USE;

#endif
