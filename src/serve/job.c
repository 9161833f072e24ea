#include "serve/job.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void job_make_id(char *out, size_t cap, const char *prefix) {
    static const char letter[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    size_t n = (size_t)snprintf(out, cap, "%s", prefix);
    for (size_t i = 0; i < 24 && n + 1 < cap; i++)
        out[n++] = letter[randombytes_uniform(sizeof letter - 1)];
    out[n] = '\0';
}

/* ---- the table and the desks' queue ---- */

static void desk_push(job *j) {
    server *s = j->s;
    pthread_mutex_lock(&s->lock);
    job **end = s->last ? &s->last->desk_next : &s->first;
    j->desk_next = NULL;
    *end = s->last = j;
    pthread_cond_signal(&s->wake);
    pthread_mutex_unlock(&s->lock);
}

static void enter(job *j) {
    server *s = j->s;
    pthread_mutex_lock(&s->lock);
    j->next = s->live;
    if (j->next)
        j->next->prev = j;
    s->live = j;
    s->n_live++;
    pthread_mutex_unlock(&s->lock);
}

static void leave(job *j) {
    server *s = j->s;
    pthread_mutex_lock(&s->lock);
    if (j->next)
        j->next->prev = j->prev;
    if (j->prev)
        j->prev->next = j->next;
    else
        s->live = j->next;
    s->n_live--;
    pthread_mutex_unlock(&s->lock);
}

bool job_claim_id(job *j, const char *id) {
    server *s = j->s;
    bool taken = false;
    pthread_mutex_lock(&s->lock);
    for (job *other = s->live; other && !taken; other = other->next)
        taken = other != j && strcmp(other->id, id) == 0;
    if (!taken)
        snprintf(j->id, sizeof j->id, "%s", id);
    pthread_mutex_unlock(&s->lock);
    return !taken;
}

static void free_choice(choice *c) {
    for (int i = 0; i < c->n_call; i++) {
        buf_free(&c->call[i].name);
        buf_free(&c->call[i].arguments);
    }
    free(c->call);
    buf_free(&c->content);
    buf_free(&c->reasoning);
    json_decref(c->logprob);
}

static void job_free(job *j) {
    if (j->d->free)
        j->d->free(j);
    for (int i = 0; i < j->n_choice; i++)
        free_choice(&j->choice[i]);
    free(j->choice);
    json_decref(j->body);
    pthread_mutex_destroy(&j->lock);
    free(j);
}

/* ---- ending ---- */

static const char *const finish_name[] = {
    [GEN_FINISH_EOS] = "eos",        [GEN_FINISH_STOP] = "stop",           [GEN_FINISH_LENGTH] = "length",
    [GEN_FINISH_TOOL] = "tool_call", [GEN_FINISH_CANCELLED] = "cancelled", [GEN_FINISH_DEADLINE] = "timeout",
    [GEN_FINISH_ERROR] = "error",
};

static outcome outcome_of(gen_finish f) {
    return f == GEN_FINISH_CANCELLED  ? OUTCOME_CANCELLED
           : f == GEN_FINISH_DEADLINE ? OUTCOME_TIMEOUT
           : f == GEN_FINISH_ERROR    ? OUTCOME_ERROR
                                      : OUTCOME_COMPLETED;
}

static void note_end(job *j) {
    metrics *m = &j->s->metrics;
    if (j->refusal) {
        atomic_fetch_add(&m->request[OUTCOME_REJECTED], 1);
        log_event(&j->s->p.log, "error", "s:s, s:s, s:s, s:s?", "api", j->d->name, "job_id", j->id, "correlation_id",
                  j->correlation, "code", j->refusal);
        return;
    }
    job_usage u = job_count(j);
    const choice *c = &j->choice[0];
    uint64_t hash = 0;
    size_t len = 0;
    for (int i = 0; i < j->n_choice; i++) {
        const gen_finish f = j->choice[i].done.finish;
        atomic_fetch_add(&m->request[outcome_of(f)], 1);
        hash ^= log_hash(j->choice[i].content.data, j->choice[i].content.len);
        len += j->choice[i].content.len;
        if (f != GEN_FINISH_CANCELLED)
            metrics_add_ms(&m->duration, (now() - j->t_submit) * 1e3);
        metrics_add_ms(&m->queue, j->choice[i].result.queue_s * 1e3);
    }
    log_event(&j->s->p.log, "execute_end", "s:s, s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f", "api",
              j->d->name, "job_id", j->id, "correlation_id", j->correlation, "finish", finish_name[c->done.finish],
              "tokens_in", (json_int_t)u.in, "tokens_cached", (json_int_t)u.cached, "tokens_out", (json_int_t)u.out,
              "text_bytes", (json_int_t)len, "text_hash", (json_int_t)(hash >> 1), "queue_ms", c->result.queue_s * 1e3,
              "prefill_ms", c->result.prefill_s * 1e3, "decode_ms", c->result.decode_s * 1e3, "total_ms",
              (now() - j->t_submit) * 1e3);
}

/* On a desk: every choice has ended. */
static void job_finish(job *j) {
    if (!j->refusal && !j->answered)
        j->d->finish(j);
    http_stream_end(j->x);
    http_release(j->x);
    if (!j->answered)
        note_end(j);
    leave(j);
    job_free(j);
}

void job_answer(job *j, int status, json_t *body) {
    j->answered = true;
    http_reply_json(j->x, status, body, NULL);
}

void job_refuse(job *j, int status, const char *code, const char *param, const char *message) {
    j->refusal = code ? code : "invalid_request";
    http_reply_error(j->x, status, NULL, code, param, message);
}

/* One that counted in n_open has ended. */
static void close_one(job *j) {
    pthread_mutex_lock(&j->lock);
    bool last = --j->n_open == 0;
    pthread_mutex_unlock(&j->lock);
    if (last)
        desk_push(j);
}

/* ---- events, on the engine thread ---- */

/* With the lock held. */
static void begin_stream(job *j) {
    if (j->streaming)
        return;
    http_stream_begin(j->x, NULL);
    j->streaming = true;
    j->t_sent = now();
}

bool job_send(job *j, const char *bytes, size_t len) {
    pthread_mutex_lock(&j->lock);
    bool ok = !j->refusal && !atomic_load(&j->gone);
    if (ok) {
        begin_stream(j);
        ok = http_stream_send(j->x, bytes, len);
    }
    j->t_sent = now();
    pthread_mutex_unlock(&j->lock);
    return ok;
}

void job_ping(job *j, double silent_since) {
    pthread_mutex_lock(&j->lock);
    if (j->streaming && j->t_sent < silent_since) {
        http_stream_send(j->x, ": ping\n\n", 8);
        j->t_sent = now();
    }
    pthread_mutex_unlock(&j->lock);
}

static bool send_json(job *j, const char *event, json_t *steals_o, const char *member) {
    char *text = json_dumps(steals_o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    size_t len = text ? strlen(text) : 0;
    buf b = {0};
    json_decref(steals_o);
    if (event)
        buf_printf(&b, "event: %s\n", event);
    buf_str(&b, "data: ");
    buf_add(&b, text, len ? len - 1 : 0);
    buf_str(&b, member);
    buf_str(&b, "}\n\n");
    bool ok = len && !b.failed && job_send(j, b.data, b.len);
    buf_free(&b);
    free(text);
    return ok;
}

bool job_send_json(job *j, const char *event, json_t *o) { return send_json(j, event, o, ""); }

bool job_send_json_seed(job *j, const char *event, json_t *o, uint64_t seed) {
    char member[40];
    snprintf(member, sizeof member, ",\"seed\":%llu", (unsigned long long)seed);
    return send_json(j, event, o, member);
}

static void add_logprob(choice *c, const eng_token *t) {
    json_t *entry = c->job->d->logprob(c, t);
    if (entry && !c->logprob)
        c->logprob = json_array();
    if (entry)
        json_array_append_new(c->logprob, entry);
}

static void on_prompt(void *ctx, const eng_token *t) { add_logprob(ctx, t); }

static void take_token(choice *c, const gen_event *e) {
    job *j = c->job;
    metrics *m = &j->s->metrics;
    double t = now();
    if (c->t_last > 0)
        metrics_add_ms(&m->inter_token, (t - c->t_last) * 1e3);
    else {
        metrics_add_ms(&m->first_token, (t - j->t_submit) * 1e3);
        c->t_first = t;
    }
    c->t_last = t;
    c->n_token++;
    if (e->answer && j->d->logprob)
        add_logprob(c, e->token);
}

static void take_call(choice *c, const gen_event *e) {
    job_call *more = realloc(c->call, (size_t)(c->n_call + 1) * sizeof *more);
    if (!more)
        return;
    c->call = more;
    more[c->n_call] = (job_call){0};
    snprintf(more[c->n_call].id, sizeof more->id, "%s", e->tool_id);
    buf_str(&more[c->n_call++].name, e->tool_name);
}

static bool on_event(void *ctx, const gen_event *e) {
    choice *c = ctx;
    job *j = c->job;
    switch (e->kind) {
    case GEN_TOKEN:
        take_token(c, e);
        break;
    case GEN_CONTENT:
        buf_add(&c->content, e->text, e->len);
        break;
    case GEN_REASONING:
        buf_add(&c->reasoning, e->text, e->len);
        break;
    case GEN_TOOL_BEGIN:
        take_call(c, e);
        break;
    case GEN_TOOL_ARGS:
        if (c->n_call)
            buf_add(&c->call[c->n_call - 1].arguments, e->text, e->len);
        break;
    case GEN_TOOL_END:
        break;
    }
    if (j->stream || j->d->whole)
        j->d->event(c, e);
    return !atomic_load(&j->gone);
}

static void on_running(void *ctx, int32_t n_cached, int32_t n_prompt) {
    choice *c = ctx;
    c->result.n_cached = n_cached;
    c->result.n_prompt = n_prompt;
    if ((c->job->stream || c->job->d->whole) && c->job->d->running)
        c->job->d->running(c);
}

static void on_done(void *ctx, const gen_done *d) {
    choice *c = ctx;
    job *j = c->job;
    c->done = *d;
    c->result = *d->result;
    c->done.result = &c->result;
    if (d->turn && c->n_call) {
        const job_call *k = &c->call[c->n_call - 1];
        replay_put(j->s->replay, http_key_hash(j->x), k->id, k->name.data ? k->name.data : "",
                   k->arguments.data ? k->arguments.data : "", d->turn, d->n_turn);
    }
    c->done.turn = NULL;
    if (d->looped)
        log_event(&j->s->p.log, "loop", "s:s, s:s, s:i, s:s", "api", j->d->name, "job_id", j->id, "tokens_out",
                  (int)d->result->n_new, "message", "the model repeated itself without end; cut as too long");
    pthread_mutex_lock(&j->lock); /* until job_start is through */
    c->gen = NULL;
    pthread_mutex_unlock(&j->lock);
    if (j->stream || j->d->whole)
        j->d->ended(c);
    close_one(j);
}

/* ---- starting ---- */

static void refuse_submit(job *j, const orcd_error *err) {
    static const struct {
        orcd_status code;
        int status;
        const char *openai, *worker;
    } row[] = {
        {ORCD_ERR_LIMIT, 400, "context_length_exceeded", "INVALID_REQUEST"},
        {ORCD_ERR_CANCELLED, 503, "shutting_down", "DRAINING"},
        {ORCD_ERR_TIMEOUT, 499, "cancelled", "CANCELLED"},
        {ORCD_ERR_ARG, 400, "invalid_value", "INVALID_REQUEST"},
        {ORCD_ERR_DEVICE, 503, "device_error", "CUDA_ERROR"},
        {ORCD_ERR_NOMEM, 503, "out_of_memory", "INSUFFICIENT_VRAM"},
    };
    bool worker = j->d->worker_codes;
    if (err->code == ORCD_ERR_LIMIT && err->pos == 1) {
        job_refuse(j, 503, worker ? "QUEUE_FULL" : "queue_full", NULL, err->message);
        return;
    }
    for (size_t i = 0; i < ORCD_COUNT(row); i++)
        if (row[i].code == err->code) {
            const char *param = err->code == ORCD_ERR_LIMIT ? "prompt" : NULL;
            job_refuse(j, row[i].status, worker ? row[i].worker : row[i].openai, param, err->message);
            return;
        }
    job_refuse(j, 500, worker ? "INTERNAL" : "internal_error", NULL, err->message);
}

static orcd_status start_choice(job *j, const job_plan *p, int i, orcd_error *err) {
    choice *c = &j->choice[i];
    gen_params g = p->gen;
    const ids *prompt = &p->prompt[i / p->n];
    *c = (choice){.job = j, .index = i};
    g.request.prompt = prompt->data;
    g.request.n_prompt = prompt->n;
    g.request.sampling.seed += (uint64_t)(i % p->n);
    g.request.cache_salt = http_key_hash(j->x);
    g.on_event = on_event;
    g.on_running = on_running;
    g.on_prompt = p->score_prompt ? on_prompt : NULL;
    g.on_done = on_done;
    g.ctx = c;
    ORCD_TRY(gen_start(j->s->engine, &g, &c->gen, err));
    j->n_choice++;
    j->n_open++;
    return ORCD_OK;
}

/* The engine thread waits at the lock when it has an event of this job before all choices are submitted. */
void job_start(job *j, const job_plan *p) {
    orcd_error err;
    orcd_status st = ORCD_OK;
    int n = p->n_prompt * p->n;
    j->t_submit = now();
    j->per_prompt = p->n;
    pthread_mutex_lock(&j->lock);
    j->choice = calloc((size_t)n, sizeof *j->choice);
    if (!j->choice)
        st = orcd_fail(&err, ORCD_ERR_NOMEM, "out of memory");
    if (j->cancelled)
        st = orcd_fail(&err, ORCD_ERR_TIMEOUT, "the request was cancelled");
    for (int i = 0; i < n && st == ORCD_OK; i++)
        st = start_choice(j, p, i, &err);
    if (st != ORCD_OK) {
        for (int i = 0; i < j->n_choice; i++)
            gen_cancel(j->choice[i].gen);
        refuse_submit(j, &err);
    } else if (j->stream && !j->d->running)
        begin_stream(j);
    pthread_mutex_unlock(&j->lock);
    if (st == ORCD_OK) {
        size_t in = p->prompt[0].n;
        log_event(&j->s->p.log, "execute_start", "s:s, s:s, s:s, s:i, s:I", "api", j->d->name, "job_id", j->id,
                  "correlation_id", j->correlation, "choices", n, "tokens_in", (json_int_t)in);
    }
}

void job_cancel(job *j) {
    pthread_mutex_lock(&j->lock);
    j->cancelled = true;
    for (int i = 0; i < j->n_choice; i++)
        if (j->choice[i].gen)
            gen_cancel(j->choice[i].gen);
    pthread_mutex_unlock(&j->lock);
}

static void client_gone(void *ctx) {
    job *j = ctx;
    atomic_store(&j->gone, true);
    job_cancel(j);
}

static void copy_header(const http_exchange *x, const char *name, char *out, size_t cap) {
    const char *v = http_header(x, name);
    size_t n = v ? strlen(v) : 0;
    bool fine = n > 0 && n < cap;
    for (size_t i = 0; i < n && fine; i++)
        fine = v[i] > ' ' && v[i] < 127;
    snprintf(out, cap, "%s", fine ? v : "");
}

void job_accept(http_exchange *x, server *s, const dialect *d) {
    if (atomic_load(&s->draining)) {
        http_reply_error(x, 503, NULL, "shutting_down", NULL, "the server is shutting down and takes no new requests");
        return;
    }
    job *j = calloc(1, sizeof *j);
    if (!j) {
        http_reply_error(x, 503, NULL, "out_of_memory", NULL, "out of memory");
        return;
    }
    j->s = s;
    j->d = d;
    j->x = x;
    j->created = (int64_t)time(NULL);
    j->t_submit = j->t_sent = now();
    pthread_mutex_init(&j->lock, NULL);
    copy_header(x, "X-Correlation-Id", j->correlation, sizeof j->correlation);
    copy_header(x, "X-Deadline", j->deadline, sizeof j->deadline);
    if (!j->correlation[0])
        job_make_id(j->correlation, sizeof j->correlation, "req-");
    http_set_header(x, d->worker_codes ? "X-Correlation-Id" : "X-Request-Id", j->correlation);
    enter(j);
    http_hold(x, client_gone, j);
    desk_push(j);
}

/* ---- what dialects ask about ---- */

bool job_failed(const choice *c, job_failure *out) {
    switch (c->done.finish) {
    case GEN_FINISH_CANCELLED:
        *out = (job_failure){499, "CANCELLED", "the request was cancelled", false};
        return true;
    case GEN_FINISH_DEADLINE:
        *out = (job_failure){504, "INFERENCE_TIMEOUT", "the request did not end within its time", true};
        return true;
    case GEN_FINISH_ERROR: {
        const orcd_error *e = &c->result.error;
        *out = (job_failure){500, "INTERNAL", e->message, true};
        if (e->code == ORCD_ERR_DEVICE)
            out->code = "CUDA_ERROR";
        else if (e->code == ORCD_ERR_NOMEM)
            out->code = "VRAM_OOM";
        return true;
    }
    case GEN_FINISH_EOS:
    case GEN_FINISH_STOP:
    case GEN_FINISH_LENGTH:
    case GEN_FINISH_TOOL:
        break;
    }
    return false;
}

job_usage job_count(const job *j) {
    job_usage u = {0};
    for (int i = 0; i < j->n_choice; i++) {
        const choice *c = &j->choice[i];
        u.out += c->result.n_new;
        u.reasoning += c->done.n_reasoning;
        if (i % j->per_prompt == 0) {
            u.in += c->result.n_prompt;
            u.cached += c->result.n_cached;
        }
    }
    return u;
}

/* ---- desks ---- */

void *job_desk(void *ctx) {
    server *s = ctx;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        while (!s->first && !s->closing)
            pthread_cond_wait(&s->wake, &s->lock);
        job *j = s->first;
        if (!j)
            break;
        s->first = j->desk_next;
        if (!s->first)
            s->last = NULL;
        pthread_mutex_unlock(&s->lock);
        if (!j->begun) {
            j->begun = true;
            j->n_open = 1;
            j->d->begin(j);
            close_one(j);
        } else
            job_finish(j);
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}
