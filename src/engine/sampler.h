/* engine/sampler.h: from logits to one token. May include base and backend. Order of application: logit bias,
 * repetition, presence and frequency penalties on the raw logits, mask; then temperature, top-k, top-p, min-p, draw.
 * Temperature 0 is the argmax (lowest id on ties) and skips everything after the mask. Draws come from Philox(seed,
 * draw index) and run through what is left in order of id. */
#ifndef ORCD_ENGINE_SAMPLER_H
#define ORCD_ENGINE_SAMPLER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/backend.h"

typedef struct samp_params {
    float temperature;        /* 0..2; 0 = greedy */
    float top_p;              /* 0..1, 1 = off; 0 keeps only the best */
    float min_p;              /* 0..1, 0 = off: keep p >= min_p * p_max */
    int32_t top_k;            /* 0 = off */
    float repetition_penalty; /* > 0, 1 = off: divides positive logits of seen tokens, multiplies negative ones */
    float presence_penalty, frequency_penalty; /* -2..2, 0 = off; over generated tokens */
    uint64_t seed;
} samp_params;

#define SAMP_DEFAULTS ((samp_params){.temperature = 1, .top_p = 1, .repetition_penalty = 1})

/* Draws the largest, whatever the seed. */
bool samp_is_greedy(const samp_params *p);

typedef struct samp samp;

/* Working memory for one vocabulary; one per engine thread. */
orcd_status samp_open(int32_t n_vocab, samp **out, orcd_error *err) ORCD_MUST_USE;
void samp_close(samp *s);

typedef struct samp_input {
    const float *logits; /* [n_vocab], not modified */
    const samp_params *params;
    uint64_t draw;           /* index of this draw within the sequence */
    const int32_t *seen;     /* prompt then generated ids: repetition penalty looks at all of them */
    size_t n_seen, n_prompt; /* seen[n_prompt..n_seen) were generated: presence and frequency */
    const uint32_t *bias_id;
    const float *bias;
    int n_bias;
    const uint32_t *mask; /* bitset of allowed ids or NULL */
} samp_input;

/* ORCD_ERR_INTERNAL when the logits hold NaN or nothing is allowed ("numerical error"). */
orcd_status samp_draw(samp *s, const samp_input *in, int32_t *id, orcd_error *err) ORCD_MUST_USE;
/* Of `id` and of the n best, at most BE_MAX_TOP, under the unmodified logits; where there are fewer, ids are -1. */
void samp_likely(const float *logits, int32_t n_vocab, int32_t id, int n, be_likely *out);
/* The logarithm of what likelihoods add up to: a log-probability is a logit less it. */
float samp_log_sum(const be_likely *l);

#endif
