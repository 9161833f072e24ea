/* serve/server.h: one model behind HTTP: what every API dialect shares. May include engine and below.
 *
 * A request's life: the HTTP thread makes a job and hands it to a desk thread, which parses, validates and tokenizes;
 * job_start gives its choices to the engine; the engine thread calls the dialect's event functions; the last choice
 * sends the job back to a desk, which finishes the reply and frees it. */
#ifndef ORCD_SERVE_SERVER_H
#define ORCD_SERVE_SERVER_H

#include <signal.h>

#include "engine/engine.h"
#include "serve/http.h"
#include "serve/log.h"

typedef struct server server;

typedef struct server_params {
    eng *engine; /* stays the caller's; must outlive the server and is drained by it */
    const char *model_id;
    const char *host;
    int port;               /* 0 = any */
    const char *const *key; /* NULL-terminated or NULL */
    const char *tls_cert, *tls_key;
    event_log log;
    int64_t max_reasoning; /* tokens of reasoning per answer, unless the request says; 0 = no limit */
    double drain_s;        /* how long running jobs may go on after SIGTERM */

    /* `orcd worker` only */
    const char *worker_id;      /* NULL = not a worker */
    int64_t max_in, max_out;    /* tokens; 0 = what the contract and the context allow */
    double inference_timeout_s; /* 0 = none */
} server_params;

/* Block SIGTERM, SIGINT and SIGHUP and ignore SIGPIPE in this thread and those it will start: before eng_open. */
void server_block_signals(void);

/* Listens when it returns. ORCD_ERR_IO for a port in use. */
orcd_status server_open(const server_params *p, server **out, orcd_error *err) ORCD_MUST_USE;
int server_port(const server *s);

typedef enum server_end {
    SERVER_DRAINED, /* every job ended or was cut after drain_s */
    SERVER_AT_ONCE, /* a second signal: leave without cleaning up */
    SERVER_FAILED   /* the engine has failed for good (eng_failure); every job has its error */
} server_end;
/* Serve until a signal or /shutdown. */
server_end server_run(server *s);
/* No request is being worked on; after server_run none will come. */
bool server_is_idle(server *s);
/* Accepts NULL. Only an idle server can be closed, and before its engine: /health and /metrics look at it. */
void server_close(server *s);

#endif
