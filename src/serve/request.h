/* serve/request.h: what the bodies of the generating endpoints have in common: JSON, sampling, stop strings, bias. May
 * include engine and below. */
#ifndef ORCD_SERVE_REQUEST_H
#define ORCD_SERVE_REQUEST_H

#include <jansson.h>

#include "engine/engine.h"
#include "serve/fields.h"

enum { MAX_STOPS = 16, MAX_STOP_BYTES = 256, MAX_BIAS = 1024, MAX_N = 16 };

typedef struct req_error { /* of the first fault; status 0 = none */
    int status;
    const char *code;
    char param[80], message[240];
} req_error;
bool req_fail(req_error *e, int status, const char *code, const char *param, const char *fmt, ...) ORCD_PRINTF(5, 6);

/* A JSON object, or NULL with the error filled. Integers beyond 2^63 - 1 become negative ones with the same 64 bits,
 * as FIELD_U64 reads them. */
json_t *req_parse(const char *body, size_t len, req_error *err);

/* Fields of a table; false with the first error. */
bool req_fields(const json_t *body, const field *table, void *into, req_error *err);

/* The options of every OpenAI-like generation. */
typedef struct req_options {
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int64_t top_k, n, max_tokens;
    uint64_t seed;
    bool has_seed, stream, include_usage, ignore_eos;
    const char *stop[MAX_STOPS]; /* into the JSON */
    size_t n_stop;
    uint32_t bias_id[MAX_BIAS];
    float bias[MAX_BIAS];
    int n_bias;
} req_options;

/* n_vocab bounds the ids of logit_bias; max_tokens keeps its value when absent. */
bool req_read_options(const json_t *body, int32_t n_vocab, req_options *o, req_error *err);
/* The part of an engine request that they decide. The arrays stay in `o`. */
void req_apply(const req_options *o, int32_t n_vocab, eng_request *r);

#endif
