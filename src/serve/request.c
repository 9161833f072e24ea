#include "serve/request.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool req_fail(req_error *e, int status, const char *code, const char *param, const char *fmt, ...) {
    va_list args;
    if (e->status)
        return false;
    *e = (req_error){.status = status, .code = code};
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_start(args, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, args);
    va_end(args);
    return false;
}

/* ---- JSON ---- */

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* The number that n <= 20 digits spell, if it is from 2^63 to 2^64 - 1; else 0. */
static uint64_t beyond_int64(const char *s, size_t n) {
    char digits[24] = "";
    memcpy(digits, s, n);
    errno = 0;
    unsigned long long v = strtoull(digits, NULL, 10);
    return errno || v <= INT64_MAX ? 0 : v;
}

/* The JSON in `s` into `out`, which has room for len + len / 19 + 1 bytes; its length. jansson has no unsigned
 * integers: numbers from 2^63 to 2^64 - 1, as random seeds are, become the negative number of the same bits, which may
 * be one character longer. Digits inside strings stay. */
static size_t wrap_u64(const char *s, size_t len, char *out) {
    bool string = false;
    size_t n = 0;
    for (size_t i = 0; i < len;) {
        if (string) {
            string = s[i] != '"';
            for (int k = s[i] == '\\' && i + 1 < len ? 2 : 1; k > 0; k--)
                out[n++] = s[i++];
            continue;
        }
        string = s[i] == '"';
        size_t from = i;
        while (i < len && is_digit(s[i]))
            i++;
        i += i == from;
        bool whole = i - from >= 19 && i - from <= 20 && !(from > 0 && strchr("-.+eE", s[from - 1])) &&
                     !(i < len && strchr(".eE", s[i]));
        uint64_t big = whole ? beyond_int64(s + from, i - from) : 0;
        if (big) {
            n += (size_t)sprintf(out + n, "%lld", (long long)big);
        } else {
            memcpy(out + n, s + from, i - from);
            n += i - from;
        }
    }
    return n;
}

json_t *req_parse(const char *body, size_t len, req_error *err) {
    json_error_t e;
    char *copy = malloc(len + len / 19 + 2); /* and the NUL that ends a number */
    if (!copy) {
        req_fail(err, 503, "out_of_memory", NULL, "out of memory");
        return NULL;
    }
    len = wrap_u64(body, len, copy);
    json_t *o = json_loadb(copy, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    free(copy);
    if (!o)
        req_fail(err, 400, "invalid_json", NULL, "the body is no valid JSON: %s (at byte %d)", e.text, e.position);
    else if (!json_is_object(o)) {
        req_fail(err, 400, "invalid_json", NULL, "the body must be a JSON object");
        json_decref(o);
        o = NULL;
    }
    return o;
}

bool req_fields(const json_t *body, const field *table, void *into, req_error *err) {
    field_error e;
    if (fields_read(body, table, into, &e, 1) == 0)
        return true;
    return req_fail(err, 400,
                    strcmp(e.constraint, "type") == 0    ? "invalid_type"
                    : strcmp(e.constraint, "range") == 0 ? "invalid_value"
                                                         : "missing_required_parameter",
                    e.field, "%s", e.message);
}

/* ---- options ---- */

#define AT(member) offsetof(req_options, member), FIELD_NO_FLAG, false

static const field table[] = {
    {"temperature", FIELD_NUM, 0, 2, AT(temperature)},
    {"top_p", FIELD_NUM, 0, 1, AT(top_p)},
    {"min_p", FIELD_NUM, 0, 1, AT(min_p)},
    {"top_k", FIELD_INT, -1, 1e9, AT(top_k)},
    {"repetition_penalty", FIELD_NUM, 1e-3, 2, AT(repetition_penalty)},
    {"presence_penalty", FIELD_NUM, -2, 2, AT(presence_penalty)},
    {"frequency_penalty", FIELD_NUM, -2, 2, AT(frequency_penalty)},
    {"seed", FIELD_U64, 0, 0, offsetof(req_options, seed), offsetof(req_options, has_seed), false},
    {"n", FIELD_INT, 1, MAX_N, AT(n)},
    {"max_tokens", FIELD_INT, 1, 1e9, AT(max_tokens)},
    {"max_completion_tokens", FIELD_INT, 1, 1e9, AT(max_tokens)},
    {"stream", FIELD_BOOL, 0, 0, AT(stream)},
    {"ignore_eos", FIELD_BOOL, 0, 0, AT(ignore_eos)},
    {0},
};

static const field stream_table[] = {{"include_usage", FIELD_BOOL, 0, 0, AT(include_usage)}, {0}};

static bool add_stop(const json_t *v, req_options *o, req_error *err) {
    size_t n = json_string_length(v);
    const char *s = json_string_value(v);
    if (!s)
        return req_fail(err, 400, "invalid_type", "stop", "stop must be a string or an array of strings");
    if (n < 1 || n > MAX_STOP_BYTES || strlen(s) != n)
        return req_fail(err, 400, "invalid_value", "stop", "each stop string must have 1 to %d bytes and no NUL",
                        MAX_STOP_BYTES);
    if (o->n_stop == MAX_STOPS)
        return req_fail(err, 400, "invalid_value", "stop", "at most %d stop strings are taken", MAX_STOPS);
    o->stop[o->n_stop++] = s;
    return true;
}

static bool read_stop(const json_t *v, req_options *o, req_error *err) {
    size_t i;
    json_t *item;
    if (!v || json_is_null(v))
        return true;
    if (!json_is_array(v))
        return add_stop(v, o, err);
    json_array_foreach(v, i, item) if (!add_stop(item, o, err)) return false;
    return true;
}

static bool read_bias(const json_t *v, int32_t n_vocab, req_options *o, req_error *err) {
    const char *key;
    json_t *item;
    if (!v || json_is_null(v))
        return true;
    if (!json_is_object(v))
        return req_fail(err, 400, "invalid_type", "logit_bias", "logit_bias must be an object of token ids to numbers");
    if (json_object_size(v) > MAX_BIAS)
        return req_fail(err, 400, "invalid_value", "logit_bias", "logit_bias takes at most %d tokens", MAX_BIAS);
    json_object_foreach((json_t *)(uintptr_t)v, key, item) {
        char *end;
        long id = strtol(key, &end, 10);
        double b = json_number_value(item);
        if (end == key || *end || !is_digit(*key) || id >= n_vocab)
            return req_fail(err, 400, "invalid_value", "logit_bias",
                            "logit_bias has the key \"%.40s\"; ids go from 0 to %d", key, n_vocab - 1);
        if (!json_is_number(item) || !(b >= -100 && b <= 100))
            return req_fail(err, 400, "invalid_value", "logit_bias", "logit_bias of token %ld must be -100 to 100", id);
        o->bias_id[o->n_bias] = (uint32_t)id;
        o->bias[o->n_bias++] = (float)b;
    }
    return true;
}

bool req_read_options(const json_t *body, int32_t n_vocab, req_options *o, req_error *err) {
    const json_t *so = json_object_get(body, "stream_options");
    o->temperature = o->top_p = o->repetition_penalty = 1;
    o->n = 1;
    if (so && !json_is_null(so) && !json_is_object(so))
        return req_fail(err, 400, "invalid_type", "stream_options", "stream_options must be an object");
    return req_fields(body, table, o, err) && req_fields(so, stream_table, o, err) &&
           read_stop(json_object_get(body, "stop"), o, err) &&
           read_bias(json_object_get(body, "logit_bias"), n_vocab, o, err);
}

void req_apply(const req_options *o, int32_t n_vocab, eng_request *r) {
    r->sampling = (samp_params){.temperature = (float)o->temperature,
                                .top_p = (float)o->top_p,
                                .min_p = (float)o->min_p,
                                .top_k = o->top_k <= 0 || o->top_k >= n_vocab ? 0 : (int32_t)o->top_k,
                                .repetition_penalty = (float)o->repetition_penalty,
                                .presence_penalty = (float)o->presence_penalty,
                                .frequency_penalty = (float)o->frequency_penalty,
                                .seed = o->seed};
    r->has_seed = o->has_seed;
    r->ignore_eos = o->ignore_eos;
    r->max_new = o->max_tokens > INT32_MAX ? INT32_MAX : (int32_t)o->max_tokens;
    r->bias_id = o->bias_id;
    r->bias = o->bias;
    r->n_bias = o->n_bias;
}
