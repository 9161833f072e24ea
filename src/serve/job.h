/* serve/job.h: one client request that generates, from its HTTP exchange to its last byte; and the state that all
 * jobs share. Only serve/ includes this. */
#ifndef ORCD_SERVE_JOB_H
#define ORCD_SERVE_JOB_H

#include <pthread.h>

#include "serve/gen.h"
#include "serve/metrics.h"
#include "serve/replay.h"
#include "serve/server.h"
#include "serve/store.h"

typedef struct job job;

typedef struct job_call { /* a tool call of an answer */
    char id[40];
    buf name, arguments;
} job_call;

typedef struct choice { /* one of the generations of a job */
    job *job;
    int index;
    gen *gen; /* NULL when it has ended; under the job's lock */
    /* everything that was generated, also when streaming */
    buf content, reasoning;
    job_call *call;
    int n_call;
    json_t *logprob; /* array of the dialect's entries not sent yet, or all of them without streaming; may be NULL */
    double t_first, t_last; /* of its tokens, 0 = none yet */
    int64_t n_token;
    gen_done done;     /* once ended; done.result points to `result` */
    eng_result result; /* n_cached and n_prompt from `running` on */
    /* free for the dialect */
    bool began;
    int64_t offset;
    double t_event;
} choice;

typedef struct dialect {
    const char *name;
    bool worker_codes; /* errors carry the worker contract's codes, not OpenAI's */
    /* Desk thread: read the body, then call job_refuse or job_start, once. */
    void (*begin)(job *j);
    bool whole; /* `running`, `event` and `ended` are called for answers that are not streamed, too */
    /* Engine thread, streaming only: a choice has its place in the batch. NULL = the event stream begins at once;
     * else with the first event, so that a wait in the queue can still end in a status. */
    void (*running)(choice *c);
    /* Engine thread, streaming only: after the event went into the choice. */
    void (*event)(choice *c, const gen_event *e);
    /* Engine thread, streaming only: the choice has ended. */
    void (*ended)(choice *c);
    /* Desk thread: all choices have ended. Reply, or send the closing events (the stream is ended for it). */
    void (*finish)(job *j);
    /* The JSON of one token's log-probabilities; NULL = none. Engine thread. With job_plan.score_prompt those of the
     * prompt come first; the first has a NAN. */
    json_t *(*logprob)(choice *c, const eng_token *t);
    /* Free what hangs at j->data; may be NULL. */
    void (*free)(job *j);
} dialect;

struct job {
    server *s;
    const dialect *d;
    http_exchange *x;
    job *next, *prev; /* in the server's table */
    job *desk_next;   /* in the desks' queue */
    char id[516];     /* of the answer, or the client's job_id: 128 characters */
    char correlation[132];
    char deadline[64]; /* X-Deadline, empty when absent */
    json_t *body;
    void *data; /* the dialect's own request */
    bool stream;
    int64_t created; /* Unix seconds */
    double t_submit, t_sent;

    pthread_mutex_t lock;
    choice *choice;
    int n_choice, per_prompt; /* per_prompt: choices of one prompt */
    int n_open;               /* choices running, and one more until job_start is done */
    bool streaming;           /* the event stream has begun */
    bool cancelled;
    atomic_bool gone;    /* the client */
    bool begun;          /* a desk has seen it */
    bool answered;       /* without generating: the reply is complete */
    const char *refusal; /* code of the error that it was answered with at once, NULL = none */
};

/* A desk thread's life. */
void *job_desk(void *server);

/* Waits until a desk thread is free, then d->begin. HTTP thread, as a route's handler. */
void job_accept(http_exchange *x, server *s, const dialect *d);
/* The client's name for the job; false when a job of that name is there already. */
bool job_claim_id(job *j, const char *id);
/* Answer at once, with JSON or with an error in this route's envelope, instead of generating. */
void job_answer(job *j, int status, json_t *steals_body);
void job_refuse(job *j, int status, const char *code, const char *param, const char *message);

typedef struct job_plan { /* n_prompt * n choices, prompt-major */
    gen_params gen;       /* its prompt, callbacks and seed are set per choice */
    const ids *prompt;    /* [n_prompt] */
    int n_prompt, n;
    bool score_prompt;
} job_plan;
/* Submit every choice, or refuse. A seed given counts up over the n choices of a prompt. */
void job_start(job *j, const job_plan *p);

/* Stop generating; any thread. */
void job_cancel(job *j);
/* Keep a stream alive that has sent nothing since then. */
void job_ping(job *j, double silent_since);
/* Raw bytes into the event stream; false: the client is gone. Engine or desk thread. */
bool job_send(job *j, const char *bytes, size_t len);
/* "data: JSON\n\n", with an "event:" line when named. Steals `o`. */
bool job_send_json(job *j, const char *event, json_t *o);
/* The same with a last member "seed": JSON libraries of C know no unsigned integers. */
bool job_send_json_seed(job *j, const char *event, json_t *o, uint64_t seed);

/* HTTP status, code and sentence of a generation that ended without an answer; NULL when it has one. */
typedef struct job_failure {
    int status;
    const char *code, *message;
    bool retriable;
} job_failure;
bool job_failed(const choice *c, job_failure *out);

/* Sums over the choices; prompts are counted once. */
typedef struct job_usage {
    int64_t in, cached, out, reasoning;
} job_usage;
job_usage job_count(const job *j);

/* "chatcmpl-" and 24 random letters. */
void job_make_id(char *out, size_t cap, const char *prefix);

/* ---- what jobs share ---- */

struct server {
    server_params p;
    eng *engine;
    const eng_info *info;
    const tok *tok;
    harmony *harmony;     /* NULL: the model has no chat format */
    grammar_vocab *vocab; /* for answers that follow a schema; with `harmony` */
    replay *replay;
    store *responses; /* the conversations behind previous_response_id */
    http *http;
    metrics metrics;
    double t0;
    int64_t created; /* Unix seconds */
    atomic_bool draining, stop_asked;

    pthread_mutex_t lock;
    pthread_cond_t wake; /* a job for the desks */
    job *first, *last;   /* waiting for a desk */
    job *live;           /* all jobs */
    int n_live;
    bool closing;
    pthread_t desk[2];
    int n_desk;
};

/* ---- routes: dialects and small answers ---- */

extern const dialect api_execute, api_completions, api_chat, api_responses, api_responses_count, api_messages,
    api_messages_count, api_tokenize, api_detokenize;
void api_health(http_exchange *x, void *server);
void api_metrics(http_exchange *x, void *server);
void api_models(http_exchange *x, void *server);
void api_cancel(http_exchange *x, void *server);
void api_shutdown(http_exchange *x, void *server);

#endif
