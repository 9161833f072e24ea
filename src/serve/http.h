/* serve/http.h: HTTP/1.1 over libmicrohttpd: limits, keys, host check, routes, replies and event streams. Knows nothing
 * of models. May include base.
 *
 * Threads: handlers run on the HTTP thread and must be quick; replies and events may come from any thread, later. An
 * exchange lives until the HTTP side is done with it AND whoever works on it has called http_release. */
#ifndef ORCD_SERVE_HTTP_H
#define ORCD_SERVE_HTTP_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/status.h"

typedef struct http http;
typedef struct http_exchange http_exchange;

typedef struct http_route {
    const char *method, *path; /* path NULL ends a table */
    void (*handle)(http_exchange *x, void *ctx);
    bool open; /* answers without a key */
} http_route;

typedef enum http_envelope { HTTP_ERR_OPENAI, HTTP_ERR_ANTHROPIC, HTTP_ERR_WORKER } http_envelope;

typedef struct http_params {
    const char *host;       /* address to bind */
    int port;               /* 0 = any free one */
    const char *const *key; /* accepted API keys, NULL-terminated; NULL = none asked for. Compared in constant time */
    const char *tls_cert, *tls_key; /* PEM texts, NULL = plain HTTP */
    size_t max_body;                /* bytes; 0 = 8 MiB */
    int max_connections;            /* 0 = 1,024 */
    const http_route *route;
    void *ctx;                                   /* for the handlers */
    http_envelope (*envelope)(const char *path); /* of errors made here: 401, 404, 405, 413, ... */
    void (*observe)(void *ctx, const char *path, int status, double seconds); /* a finished exchange; may be NULL */
} http_params;

/* What http_open will check, before something expensive is done: the address, that a key guards it beyond loopback,
 * that the port can be bound now. */
orcd_status http_can_listen(const char *host, int port, bool has_key, orcd_error *err) ORCD_MUST_USE;
/* Binding beyond loopback without a key is ORCD_ERR_ARG. A busy port is ORCD_ERR_IO naming it. */
orcd_status http_open(const http_params *p, http **out, orcd_error *err) ORCD_MUST_USE;
int http_port(const http *h);
void http_stop_accepting(http *h);
/* Waits for nothing: open exchanges are cut. Accepts NULL. Every exchange must have been released or be about to be. */
void http_close(http *h);

/* ---- the request, complete when the handler sees it ---- */
const char *http_path(const http_exchange *x);
const char *http_header(const http_exchange *x, const char *name); /* NULL when absent; HTTP thread only */
const char *http_body(const http_exchange *x, size_t *len);
uint64_t http_id(const http_exchange *x); /* unique in this process */
/* Hash of the key that was presented, 0 without: scopes the prefix cache. */
uint64_t http_key_hash(const http_exchange *x);

/* A header of whatever reply comes; before replying, at most one. Both strings are copied. */
void http_set_header(http_exchange *x, const char *name, const char *value);

/* ---- replying once ---- */
/* Takes a copy of body. Extra headers: "Name: value\n" lines or NULL. The first reply wins, later ones are dropped. */
void http_reply(http_exchange *x, int status, const char *type, const char *body, size_t len, const char *headers);
void http_reply_json(http_exchange *x, int status, json_t *steals_body, const char *headers);
/* An error in the envelope of this path. type and code may be NULL (then derived from the status). */
void http_reply_error(http_exchange *x, int status, const char *type, const char *code, const char *param,
                      const char *message);

/* ---- replying later, or with a stream of events ---- */
/* Keep the exchange after the handler returns: `gone` is called (once, any thread) when the client hangs up before the
 * reply is complete. */
void http_hold(http_exchange *x, void (*gone)(void *ctx), void *ctx);
/* The handler's (or worker's) last call about this exchange. */
void http_release(http_exchange *x);
/* Turn the reply into text/event-stream; events follow. */
void http_stream_begin(http_exchange *x, const char *headers);
/* Append raw bytes ("data: ...\n\n"). False once the client is gone or has let 256 KiB pile up. Never blocks. */
bool http_stream_send(http_exchange *x, const char *bytes, size_t len);
void http_stream_end(http_exchange *x);

/* Body of an error in an envelope, for error events inside streams. */
json_t *http_error_json(http_envelope e, int status, const char *type, const char *code, const char *param,
                        const char *message);

#endif
