/* engine/validate.h: how well a model predicts a text, and how far two models or two backends are apart, under teacher
 * forcing. May include teacher.h and below. */
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

/* ---- two models side by side ---- */

extern const char validate_text[]; /* half a thousand words to compare on when there is nothing better */

typedef struct agreement {
    int64_t n, n_same;              /* positions; of them with the same likeliest token */
    double cos_mean, cos_worst;     /* of the logits less their mean: probabilities do not see a common constant */
    double kl_mean, kl_p99, kl_max; /* KL(A || B) in nats */
    int64_t cos_at, kl_at;          /* position of the worst */
    nll_sum a, b;                   /* every token but the first of each window */
    float *kl;                      /* [n] by position */
} agreement;

/* Both models over windows of ctx tokens, each from an empty context. Positions count through all windows. Memory: two
 * rows of logits and a float per position. ORCD_ERR_ARG when the vocabularies differ. */
orcd_status validate_logits(teacher *a, teacher *b, const int32_t *ids, int64_t n, int64_t ctx, arch_progress progress,
                            void *progress_ctx, agreement *out, orcd_error *err) ORCD_MUST_USE;
void agreement_free(agreement *g);

/* What B's file makes of each weight of A's. */
typedef struct tensor_error {
    char name[96];
    q_type type[2];
    uint64_t n_value;
    double rel;    /* ||B - A|| / ||A||; 0 when equal */
    double cosine; /* 1 when equal */
} tensor_error;

/* In the order of the model; *out is freed with free(). Reads a few rows at a time, by n_threads. */
orcd_status validate_tensors(const char *path_a, const char *path_b, int n_threads, arch_progress progress,
                             void *progress_ctx, tensor_error **out, int *n, orcd_error *err) ORCD_MUST_USE;

/* The named intermediates of both models (arch_set_tap), while validate_logits runs. */
typedef struct tap_error {
    char name[32];
    int layer;        /* -1: before the first */
    double rel;       /* ||B - A|| / ||A|| over all positions */
    double rel_worst; /* of one position */
    int64_t at;       /* that one */
} tap_error;

typedef struct taps taps;
/* From now on, until taps_close, both models are listened to. Memory: one step's intermediates of A. Both teachers
 * must have the same chunk. */
orcd_status taps_open(teacher *a, teacher *b, taps **out, orcd_error *err) ORCD_MUST_USE;
void taps_close(taps *t); /* before the teachers; accepts NULL */
/* In the order in which the model computes them; free() *out. Fails when memory ran out on the way, or when the models
 * name different things. */
orcd_status taps_result(const taps *t, tap_error **out, int *n, orcd_error *err) ORCD_MUST_USE;

#endif
