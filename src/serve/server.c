#include "serve/server.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "serve/job.h"

#define REPLAY_BYTES ((size_t)64 << 20)
#define STORE_BYTES ((size_t)64 << 20)
#define TICK_MS 100
#define PING_S 5   /* a stream that was silent this long gets a comment */
#define CUT_S 2    /* after the drain time: for jobs to notice that they were cancelled */
#define FAILED_S 1 /* after the engine has failed: for the errors to reach the clients */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- routes ---- */

static void execute(http_exchange *x, void *s) { job_accept(x, s, &api_execute); }
static void tokenize(http_exchange *x, void *s) { job_accept(x, s, &api_tokenize); }
static void detokenize(http_exchange *x, void *s) { job_accept(x, s, &api_detokenize); }
static void chat_completions(http_exchange *x, void *s) { job_accept(x, s, &api_chat); }
static void responses(http_exchange *x, void *s) { job_accept(x, s, &api_responses); }
static void responses_count(http_exchange *x, void *s) { job_accept(x, s, &api_responses_count); }
static void messages(http_exchange *x, void *s) { job_accept(x, s, &api_messages); }
static void messages_count(http_exchange *x, void *s) { job_accept(x, s, &api_messages_count); }
static void completions(http_exchange *x, void *s) { job_accept(x, s, &api_completions); }

static const http_route serve_routes[] = {
    {"GET", "/health", api_health, true},
    {"GET", "/metrics", api_metrics, false},
    {"GET", "/v1/models", api_models, false},
    {"POST", "/v1/completions", completions, false},
    {"POST", "/v1/chat/completions", chat_completions, false},
    {"POST", "/v1/responses", responses, false},
    {"POST", "/v1/responses/input_tokens", responses_count, false},
    {"POST", "/v1/messages", messages, false},
    {"POST", "/v1/messages/count_tokens", messages_count, false},
    {"POST", "/tokenize", tokenize, false},
    {"POST", "/detokenize", detokenize, false},
    {0},
};

static const http_route worker_routes[] = {
    {"GET", "/health", api_health, true},       {"GET", "/metrics", api_metrics, false},
    {"GET", "/v1/models", api_models, false},   {"POST", "/v1/completions", completions, false},
    {"POST", "/tokenize", tokenize, false},     {"POST", "/detokenize", detokenize, false},
    {"POST", "/execute", execute, false},       {"POST", "/cancel", api_cancel, false},
    {"POST", "/shutdown", api_shutdown, false}, {0},
};

static http_envelope envelope(const char *path) {
    return strcmp(path, "/v1/messages") == 0 || strncmp(path, "/v1/messages/", 13) == 0 ? HTTP_ERR_ANTHROPIC
           : strcmp(path, "/execute") == 0 || strcmp(path, "/cancel") == 0 || strcmp(path, "/shutdown") == 0
               ? HTTP_ERR_WORKER
               : HTTP_ERR_OPENAI;
}

static void observe(void *ctx, const char *path, int status, double seconds) {
    server *s = ctx;
    (void)path, (void)seconds;
    if (status >= 100 && status < 600)
        atomic_fetch_add_explicit(&s->metrics.http_status[status], 1, memory_order_relaxed);
}

/* ---- life ---- */

static void stop_signals(sigset_t *set) {
    sigemptyset(set);
    sigaddset(set, SIGTERM);
    sigaddset(set, SIGINT);
    sigaddset(set, SIGHUP);
}

void server_block_signals(void) {
    sigset_t set;
    stop_signals(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
}

orcd_status server_open(const server_params *p, server **out, orcd_error *err) {
    orcd_status st;
    *out = NULL;
    server *s = calloc(1, sizeof *s);
    if (!s)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    s->p = *p;
    s->engine = p->engine;
    s->info = eng_get_info(p->engine);
    s->tok = eng_tok(p->engine);
    s->t0 = now();
    s->created = (int64_t)time(NULL);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->wake, NULL);
    ORCD_TRY_GOTO(st, done, replay_open(REPLAY_BYTES, &s->replay, err));
    ORCD_TRY_GOTO(st, done, store_open(STORE_BYTES, &s->responses, err));
    if (s->info->has_harmony) {
        ORCD_TRY_GOTO(st, done, harmony_open(s->tok, &s->harmony, err));
        ORCD_TRY_GOTO(st, done, grammar_vocab_open(s->tok, s->info->n_vocab, &s->vocab));
    }
    for (; s->n_desk < (int)ORCD_COUNT(s->desk); s->n_desk++)
        if (pthread_create(&s->desk[s->n_desk], NULL, job_desk, s) != 0) {
            st = orcd_fail(err, ORCD_ERR_NOMEM, "a thread could not be started");
            goto done;
        }
    const http_params h = {.host = p->host,
                           .port = p->port,
                           .key = p->key,
                           .tls_cert = p->tls_cert,
                           .tls_key = p->tls_key,
                           .route = p->worker_id ? worker_routes : serve_routes,
                           .ctx = s,
                           .envelope = envelope,
                           .observe = observe};
    ORCD_TRY_GOTO(st, done, http_open(&h, &s->http, err));
    *out = s;
    s = NULL;
done:
    server_close(s);
    return st;
}

int server_port(const server *s) { return http_port(s->http); }

void server_close(server *s) {
    if (!s)
        return;
    pthread_mutex_lock(&s->lock);
    s->closing = true; /* a desk leaves when no job waits for it */
    pthread_cond_broadcast(&s->wake);
    pthread_mutex_unlock(&s->lock);
    for (int i = 0; i < s->n_desk; i++)
        pthread_join(s->desk[i], NULL);
    http_close(s->http);
    harmony_close(s->harmony);
    grammar_vocab_close(s->vocab);
    replay_close(s->replay);
    store_close(s->responses);
    pthread_cond_destroy(&s->wake);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* ---- running ---- */

static void ping_silent_streams(server *s) {
    double silent_since = now() - PING_S;
    pthread_mutex_lock(&s->lock);
    for (job *j = s->live; j; j = j->next)
        job_ping(j, silent_since);
    pthread_mutex_unlock(&s->lock);
}

static int n_live(server *s) {
    pthread_mutex_lock(&s->lock);
    int n = s->n_live;
    pthread_mutex_unlock(&s->lock);
    return n;
}

static void cancel_all(server *s) {
    pthread_mutex_lock(&s->lock);
    for (job *j = s->live; j; j = j->next)
        job_cancel(j);
    pthread_mutex_unlock(&s->lock);
}

static void begin_drain(server *s, const char *why) {
    log_event(&s->p.log, "shutdown", "s:s, s:i, s:f", "reason", why, "running", n_live(s), "drain_sec", s->p.drain_s);
    atomic_store(&s->draining, true);
    eng_drain(s->engine);
}

/* The answers of the last jobs are on their way when they are no longer live: give the network thread a moment. */
static server_end leave(server_end end) {
    nanosleep(&(struct timespec){.tv_nsec = TICK_MS * 1000000}, NULL);
    return end;
}

bool server_is_idle(server *s) { return n_live(s) == 0; }

server_end server_run(server *s) {
    sigset_t set;
    double cut_at = INFINITY, leave_at = INFINITY;
    stop_signals(&set);
    for (;;) {
        eng_stats stats;
        int sig = sigtimedwait(&set, NULL, &(struct timespec){.tv_nsec = TICK_MS * 1000000});
        bool draining = atomic_load(&s->draining);
        if (sig > 0 && draining)
            return SERVER_AT_ONCE;
        if ((sig > 0 || atomic_load(&s->stop_asked)) && !draining) {
            begin_drain(s, sig > 0 ? strsignal(sig) : "/shutdown");
            draining = true;
            cut_at = now() + s->p.drain_s;
        }
        eng_get_stats(s->engine, &stats);
        if (stats.failed) {
            orcd_error why = {0};
            eng_failure(s->engine, &why);
            log_event(&s->p.log, "error", "s:s, s:s", "code", why.code == ORCD_ERR_DEVICE ? "CUDA_ERROR" : "MODEL_LOST",
                      "message", why.message);
            atomic_store(&s->draining, true);
            for (double until = now() + FAILED_S; n_live(s) && now() < until;)
                nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
            return leave(SERVER_FAILED);
        }
        ping_silent_streams(s);
        double t = now();
        if (draining && (n_live(s) == 0 || t > leave_at))
            return leave(SERVER_DRAINED);
        if (t > cut_at) {
            cancel_all(s);
            cut_at = INFINITY;
            leave_at = t + CUT_S;
        }
    }
}
