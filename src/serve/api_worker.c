/* The endpoints of the worker contract: /execute with its events, /cancel, /shutdown. */
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "serve/job.h"
#include "serve/request.h"

enum { PROMPT_CHARS = 32768, TOKENS_OUT = 2048, STOPS = 4, STOP_TOKENS = 32, ID_CHARS = 128 };

typedef struct execute {
    const char *job_id, *prompt;
    int64_t max_tokens, top_k, metrics_ms;
    double temperature, top_p, min_p, repetition_penalty;
    uint64_t seed;
    bool has_seed;
    const char *stop[STOPS];
    size_t n_stop;
    ids ids;
    int64_t n_event;
} execute;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- validation: every error is collected ---- */

static void add_error(json_t *errors, const char *name, const char *constraint, const char *message, json_t *value) {
    json_t *o = json_pack("{s:s, s:s, s:s}", "field", name, "constraint", constraint, "message", message);
    if (value && !(json_is_string(value) && json_string_length(value) > 100))
        json_object_set(o, "value", value);
    json_array_append_new(errors, o);
}

static void read_fields(const job *j, execute *e, json_t *errors) {
    int64_t most_out = j->s->p.max_out ? j->s->p.max_out : TOKENS_OUT;
    const field table[] = {
        {"job_id", FIELD_STR, 1, ID_CHARS, offsetof(execute, job_id), FIELD_NO_FLAG, true},
        {"prompt", FIELD_STR, 1, PROMPT_CHARS, offsetof(execute, prompt), FIELD_NO_FLAG, true},
        {"max_tokens", FIELD_INT, 1, (double)most_out, offsetof(execute, max_tokens), FIELD_NO_FLAG, false},
        {"temperature", FIELD_NUM, 0, 2, offsetof(execute, temperature), FIELD_NO_FLAG, false},
        {"top_p", FIELD_NUM, 0, 1, offsetof(execute, top_p), FIELD_NO_FLAG, false},
        {"top_k", FIELD_INT, 0, j->s->info->n_vocab, offsetof(execute, top_k), FIELD_NO_FLAG, false},
        {"min_p", FIELD_NUM, 0, 1, offsetof(execute, min_p), FIELD_NO_FLAG, false},
        {"repetition_penalty", FIELD_NUM, 1e-6, 2, offsetof(execute, repetition_penalty), FIELD_NO_FLAG, false},
        {"seed", FIELD_U64, 0, 0, offsetof(execute, seed), offsetof(execute, has_seed), false},
        {"metrics_interval_ms", FIELD_INT, 250, 1000, offsetof(execute, metrics_ms), FIELD_NO_FLAG, false},
        {0},
    };
    field_error error[ORCD_COUNT(table)];
    *e = (execute){.max_tokens = most_out, .temperature = 1, .top_p = 1, .repetition_penalty = 1};
    int n = fields_read(j->body, table, e, error, ORCD_COUNT(error));
    for (int i = 0; i < n; i++)
        add_error(errors, error[i].field, error[i].constraint, error[i].message, error[i].value);
}

static void read_stops(const job *j, execute *e, json_t *errors) {
    json_t *list = json_object_get(j->body, "stop"), *v;
    size_t i;
    if (!list || json_is_null(list))
        return;
    if (!json_is_array(list)) {
        add_error(errors, "stop", "type", "stop must be an array of strings", list);
        return;
    }
    if (json_array_size(list) > STOPS)
        add_error(errors, "stop", "count", "stop takes at most 4 strings", NULL);
    json_array_foreach(list, i, v) {
        ids id = {0};
        size_t len = json_string_length(v);
        if (!json_is_string(v) || len == 0 || strlen(json_string_value(v)) != len)
            add_error(errors, "stop", "type", "each stop must be a non-empty string without NUL", v);
        else if (tok_encode(j->s->tok, json_string_value(v), len, false, &id) != ORCD_OK || id.n > STOP_TOKENS)
            add_error(errors, "stop", "length", "each stop string must have at most 32 tokens", v);
        else if (e->n_stop < STOPS)
            e->stop[e->n_stop++] = json_string_value(v);
        ids_free(&id);
    }
}

static void read_prompt(const job *j, execute *e, json_t *errors) {
    char text[160];
    size_t most = (size_t)j->s->info->n_ctx - 1;
    if (j->s->p.max_in > 0 && (size_t)j->s->p.max_in < most)
        most = (size_t)j->s->p.max_in;
    if (!e->prompt)
        return;
    if (tok_encode(j->s->tok, e->prompt, strlen(e->prompt), false, &e->ids) != ORCD_OK || e->ids.n == 0)
        add_error(errors, "prompt", "encoding", "the prompt could not be encoded", NULL);
    else if (e->ids.n > most) {
        snprintf(text, sizeof text, "the prompt has %zu tokens; at most %zu are taken", e->ids.n, most);
        add_error(errors, "prompt", "context", text, NULL);
    }
}

/* X-Deadline: Unix seconds or milliseconds, or RFC 3339 in UTC. Seconds from now in *left; false: not understood. */
static bool read_deadline(const char *s, double *left) {
    struct timespec t;
    struct tm tm = {0};
    char *end;
    clock_gettime(CLOCK_REALTIME, &t);
    double at = strtod(s, &end);
    if (end == s || *end) {
        end = strptime(s, "%Y-%m-%dT%H:%M:%S", &tm);
        if (!end)
            return false;
        at = (double)timegm(&tm);
        if (*end == '.')
            at += strtod(end, &end);
        if (strcmp(end, "Z") != 0 && strcmp(end, "+00:00") != 0)
            return false;
    } else if (at > 1e11)
        at /= 1000;
    *left = at - ((double)t.tv_sec + (double)t.tv_nsec * 1e-9);
    return true;
}

static void execute_begin(job *j) {
    req_error bad = {0};
    double timeout = j->s->p.inference_timeout_s, left;
    size_t len;
    const char *body = http_body(j->x, &len);
    execute *e = j->data = calloc(1, sizeof *e);
    json_t *errors = json_array();
    j->body = req_parse(body, len, &bad);
    if (!e)
        job_refuse(j, 503, "INTERNAL", NULL, "out of memory");
    else if (!j->body) {
        add_error(errors, "body", "json", bad.message, NULL);
    } else {
        read_fields(j, e, errors);
        read_stops(j, e, errors);
        read_prompt(j, e, errors);
    }
    if (j->deadline[0] && !read_deadline(j->deadline, &left))
        add_error(errors, "X-Deadline", "format", "X-Deadline must be Unix time or RFC 3339 in UTC", NULL);
    else if (j->deadline[0] && (timeout <= 0 || left < timeout))
        timeout = left;
    if (j->refusal)
        json_decref(errors);
    else if (json_array_size(errors)) {
        j->refusal = "INVALID_REQUEST";
        http_reply_json(j->x, 400, json_pack("{s:o}", "errors", errors), NULL);
        return;
    } else if (j->deadline[0] && timeout <= 0) {
        json_decref(errors);
        job_refuse(j, 504, "INFERENCE_TIMEOUT", NULL, "the deadline has passed already");
    } else if (!job_claim_id(j, e->job_id)) {
        json_decref(errors);
        job_refuse(j, 409, "INVALID_REQUEST", "job_id", "a job with this job_id is running");
    } else {
        json_decref(errors);
        if (!e->has_seed)
            randombytes_buf(&e->seed, sizeof e->seed);
        j->stream = true;
        const job_plan plan = {.gen = {.request = {.max_new = (int32_t)e->max_tokens,
                                                   .sampling = {.temperature = (float)e->temperature,
                                                                .top_p = (float)e->top_p,
                                                                .min_p = (float)e->min_p,
                                                                .top_k = (int32_t)e->top_k,
                                                                .repetition_penalty = (float)e->repetition_penalty,
                                                                .seed = e->seed},
                                                   .has_seed = true,
                                                   .top_logprobs = -1,
                                                   .deadline_s = timeout > 0 ? timeout : 0},
                                       .stop = e->stop,
                                       .n_stop = e->n_stop},
                               .prompt = &e->ids,
                               .n_prompt = 1,
                               .n = 1};
        job_start(j, &plan);
    }
}

/* ---- events ---- */

static void execute_running(choice *c) {
    job *j = c->job;
    execute *e = j->data;
    char at[40], seconds[24];
    struct timespec t;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &utc);
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(at, sizeof at, "%s.%03dZ", seconds, (int)(t.tv_nsec / 1000000));
    c->t_event = now();
    job_send_json_seed(j, "started",
                       json_pack("{s:s, s:s, s:s}", "job_id", j->id, "model", j->s->p.model_id, "started_at", at),
                       e->seed);
}

static double vram(const server *s) { return (double)(s->info->weight_bytes + s->info->kv_bytes + s->info->act_bytes); }

static void execute_event(choice *c, const gen_event *ev) {
    job *j = c->job;
    execute *e = j->data;
    if (ev->kind == GEN_TOKEN) {
        double t = now(), begun = c->t_first;
        if (e->metrics_ms == 0 || t - c->t_event < (double)e->metrics_ms * 1e-3)
            return;
        c->t_event = t;
        job_send_json(j, "metrics",
                      json_pack("{s:I, s:f, s:f, s:I}", "tokens_out", (json_int_t)c->n_token, "decode_time_ms",
                                (t - begun) * 1e3, "tokens_per_sec",
                                t > begun ? (double)(c->n_token - 1) / (t - begun) : 0.0, "vram_bytes",
                                (json_int_t)vram(j->s)));
    } else if (ev->kind == GEN_CONTENT)
        job_send_json(j, "token", json_pack("{s:s%, s:I}", "t", ev->text, ev->len, "i", (json_int_t)e->n_event++));
}

static void execute_ended(choice *c) {
    job *j = c->job;
    execute *e = j->data;
    job_failure f;
    if (!j->streaming)
        return;
    if (job_failed(c, &f)) {
        job_send_json(j, "error",
                      json_pack("{s:s, s:s, s:b}", "code", f.code, "message", f.message, "retriable", f.retriable));
        return;
    }
    gen_finish why = c->done.finish;
    json_t *o = json_pack("{s:i, s:f, s:s}", "tokens_out", (int)c->result.n_new, "decode_time_ms",
                          c->result.decode_s * 1e3, "stop_reason",
                          why == GEN_FINISH_LENGTH ? "MAX_TOKENS"
                          : why == GEN_FINISH_STOP ? "STOP_SEQUENCE"
                                                   : "EOS");
    if (why == GEN_FINISH_STOP && c->done.stop_matched >= 0)
        json_object_set_new(o, "stop_sequence_matched", json_string(e->stop[c->done.stop_matched]));
    job_send_json_seed(j, "end", o, e->seed);
}

/* Only what ended before its stream began is left to answer. */
static void execute_finish(job *j) {
    job_failure f = {500, "INTERNAL", "the job ended without starting", true};
    if (j->streaming)
        return;
    job_failed(&j->choice[0], &f);
    http_reply_error(j->x, f.status, NULL, f.code, NULL, f.message);
}

static void execute_free(job *j) {
    execute *e = j->data;
    if (e)
        ids_free(&e->ids);
    free(e);
}

const dialect api_execute = {.name = "execute",
                             .worker_codes = true,
                             .begin = execute_begin,
                             .running = execute_running,
                             .event = execute_event,
                             .ended = execute_ended,
                             .finish = execute_finish,
                             .free = execute_free};

/* ---- control ---- */

void api_cancel(http_exchange *x, void *ctx) {
    server *s = ctx;
    size_t len;
    req_error bad = {0};
    const char *text = http_body(x, &len);
    json_t *body = req_parse(text, len, &bad);
    const char *id = json_string_value(json_object_get(body, "job_id"));
    if (!id || !*id) {
        json_decref(body);
        http_reply_json(x, 400,
                        json_pack("{s:[{s:s, s:s, s:s}]}", "errors", "field", "job_id", "constraint", "required",
                                  "message", "job_id must be a non-empty string"),
                        NULL);
        return;
    }
    pthread_mutex_lock(&s->lock);
    for (job *j = s->live; j; j = j->next)
        if (strcmp(j->id, id) == 0)
            job_cancel(j);
    pthread_mutex_unlock(&s->lock);
    http_reply_json(x, 202, json_pack("{s:s, s:s}", "job_id", id, "status", "cancelling"), NULL);
    json_decref(body);
}

void api_shutdown(http_exchange *x, void *ctx) {
    server *s = ctx;
    atomic_store(&s->stop_asked, true);
    http_reply_json(x, 202, json_pack("{s:s}", "status", "draining"), NULL);
}
