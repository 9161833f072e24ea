#include "serve/http.h"

#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <microhttpd.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <sodium.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    DEFAULT_BODY = 8 << 20,
    DEFAULT_CONNECTIONS = 1024,
    STREAM_CAP = 256 << 10, /* bytes that a slow reader may leave waiting */
    IDLE_S = 15,            /* a silent connection */
    HEADER_S = 10,          /* from connect to a complete header */
    BODY_S = 30,            /* from the header to a complete body */
    WATCH_MS = 50,          /* how often held exchanges are asked whether the client is still there */
    HEADER_BYTES = 40 << 10 /* request line and headers, MHD's per-connection memory */
};

typedef enum phase { READING, HANDLING, SUSPENDED, REPLYING } phase;

struct http_exchange {
    http *h;
    struct MHD_Connection *conn;
    http_exchange *next, *prev; /* in h->live */
    const http_route *route;
    char *path;
    char header_name[40], header_value[140]; /* of the reply; http_set_header */
    buf body;
    uint64_t id, key_hash;
    double t0;
    int early; /* status decided before the body was read: 413, 401, ... */
    pthread_mutex_t lock;
    pthread_mutex_t gone_lock; /* held while `gone` runs, so that it never runs after http_release */
    atomic_int refs;           /* the HTTP side and, while held, the worker */
    phase phase;
    bool held, replied, streaming, ended, finished, gone_told;
    int status;
    struct MHD_Response *response;
    buf stream;   /* bytes not yet taken by MHD */
    bool waiting; /* MHD's reader found the stream empty and suspended */
    void (*gone)(void *);
    void *gone_ctx;
};

typedef struct connection { /* a socket that has not completed a request yet is watched */
    struct connection *next, *prev;
    int fd;
    double deadline; /* of the next complete header */
} connection;

struct http {
    http_params p;
    struct MHD_Daemon *daemon;
    int port;
    bool loopback;
    unsigned char (*key)[32]; /* SHA-256 of each */
    size_t n_key;
    atomic_uint_fast64_t next_id;
    pthread_mutex_t lock; /* live, connections */
    http_exchange *live;
    connection *connections;
    pthread_t watcher, network;
    bool watching, running;
    int poke_fd; /* wakes the network thread */
    atomic_bool poked, closing;
};

static double monotonic(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- exchanges ---- */

static void drop_ref(http_exchange *x) {
    if (atomic_fetch_sub(&x->refs, 1) != 1)
        return;
    if (x->response)
        MHD_destroy_response(x->response);
    free(x->path);
    buf_free(&x->body);
    buf_free(&x->stream);
    pthread_mutex_destroy(&x->lock);
    pthread_mutex_destroy(&x->gone_lock);
    free(x);
}

static void *new_exchange(void *ctx, const char *uri, struct MHD_Connection *conn) {
    http *h = ctx;
    http_exchange *x = calloc(1, sizeof *x);
    (void)uri;
    if (!x)
        return NULL;
    x->h = h;
    x->conn = conn;
    x->id = atomic_fetch_add(&h->next_id, 1) + 1;
    x->t0 = monotonic();
    atomic_init(&x->refs, 1);
    pthread_mutex_init(&x->lock, NULL);
    pthread_mutex_init(&x->gone_lock, NULL);
    pthread_mutex_lock(&h->lock);
    x->next = h->live;
    if (x->next)
        x->next->prev = x;
    h->live = x;
    pthread_mutex_unlock(&h->lock);
    return x;
}

static void tell_gone(http_exchange *x) {
    pthread_mutex_lock(&x->gone_lock);
    pthread_mutex_lock(&x->lock);
    bool tell = x->held && !x->gone_told && !x->ended;
    x->gone_told |= tell;
    pthread_mutex_unlock(&x->lock);
    if (tell && x->gone)
        x->gone(x->gone_ctx);
    pthread_mutex_unlock(&x->gone_lock);
}

static void expect_header(http *h, struct MHD_Connection *conn, double seconds);

static void completed(void *ctx, struct MHD_Connection *conn, void **state, enum MHD_RequestTerminationCode why) {
    http *h = ctx;
    http_exchange *x = *state;
    (void)conn;
    if (!x)
        return;
    *state = NULL;
    pthread_mutex_lock(&h->lock);
    if (x->next)
        x->next->prev = x->prev;
    if (x->prev)
        x->prev->next = x->next;
    else
        h->live = x->next;
    pthread_mutex_unlock(&h->lock);
    if (why != MHD_REQUEST_TERMINATED_COMPLETED_OK)
        tell_gone(x);
    else
        expect_header(h, conn, IDLE_S);
    pthread_mutex_lock(&x->lock);
    x->finished = true;
    x->conn = NULL;
    pthread_mutex_unlock(&x->lock);
    if (h->p.observe && x->path)
        h->p.observe(h->p.ctx, x->path, x->status, monotonic() - x->t0);
    drop_ref(x);
}

const char *http_path(const http_exchange *x) { return x->path; }

const char *http_header(const http_exchange *x, const char *name) {
    return MHD_lookup_connection_value(x->conn, MHD_HEADER_KIND, name);
}

const char *http_body(const http_exchange *x, size_t *len) {
    *len = x->body.len;
    return x->body.data ? x->body.data : "";
}

uint64_t http_id(const http_exchange *x) { return x->id; }
uint64_t http_key_hash(const http_exchange *x) { return x->key_hash; }

/* ---- replies ---- */

void http_set_header(http_exchange *x, const char *name, const char *value) {
    snprintf(x->header_name, sizeof x->header_name, "%s", name);
    snprintf(x->header_value, sizeof x->header_value, "%s", value);
}

static void add_headers(const http_exchange *x, struct MHD_Response *r, const char *headers) {
    char name[64], value[512];
    if (x->header_name[0])
        MHD_add_response_header(r, x->header_name, x->header_value);
    MHD_add_response_header(r, "X-Content-Type-Options", "nosniff");
    MHD_add_response_header(r, "Cache-Control", "no-store");
    for (int n = 0; headers && sscanf(headers, "%63[^:\n]: %511[^\n]\n%n", name, value, &n) == 2 && n;
         headers += n, n = 0)
        MHD_add_response_header(r, name, value);
}

static void poke(http *h) {
    const uint64_t one = 1;
    if (!atomic_exchange(&h->poked, true) && write(h->poke_fd, &one, sizeof one) < 0)
        atomic_store(&h->poked, false);
}

static void resume(http_exchange *x) {
    MHD_resume_connection(x->conn);
    poke(x->h);
}

/* With the lock held: let MHD call the access handler again. */
static void wake(http_exchange *x) {
    if (x->phase == SUSPENDED && x->conn) {
        x->phase = REPLYING;
        resume(x);
    }
}

static void set_response(http_exchange *x, int status, struct MHD_Response *r) {
    pthread_mutex_lock(&x->lock);
    if (x->replied) {
        pthread_mutex_unlock(&x->lock);
        if (r)
            MHD_destroy_response(r);
        return;
    }
    x->replied = true;
    x->status = status;
    x->response = r;
    wake(x);
    pthread_mutex_unlock(&x->lock);
}

void http_reply(http_exchange *x, int status, const char *type, const char *body, size_t len, const char *headers) {
    struct MHD_Response *r = MHD_create_response_from_buffer(len, (void *)(uintptr_t)body, MHD_RESPMEM_MUST_COPY);
    if (r) {
        MHD_add_response_header(r, "Content-Type", type);
        add_headers(x, r, headers);
    }
    set_response(x, status, r);
}

void http_reply_json(http_exchange *x, int status, json_t *body, const char *headers) {
    char *text = json_dumps(body, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(body);
    http_reply(x, text ? status : 500, "application/json", text ? text : "{}", text ? strlen(text) : 2, headers);
    free(text);
}

static const char *default_type(http_envelope e, int status) {
    switch (status) {
    case 401:
        return "authentication_error";
    case 403:
        return "permission_error";
    case 404:
        return "not_found_error";
    case 413:
        return e == HTTP_ERR_ANTHROPIC ? "request_too_large" : "invalid_request_error";
    case 429:
        return "rate_limit_error";
    case 503:
        return e == HTTP_ERR_ANTHROPIC ? "overloaded_error" : "server_error";
    default:
        return status >= 500 ? e == HTTP_ERR_ANTHROPIC ? "api_error" : "server_error" : "invalid_request_error";
    }
}

json_t *http_error_json(http_envelope e, int status, const char *type, const char *code, const char *param,
                        const char *message) {
    type = type ? type : default_type(e, status);
    switch (e) {
    case HTTP_ERR_ANTHROPIC:
        return json_pack("{s:s, s:{s:s, s:s}}", "type", "error", "error", "type", type, "message", message);
    case HTTP_ERR_WORKER:
        return json_pack("{s:s, s:s, s:b}", "code",
                         code            ? code
                         : status >= 500 ? "INTERNAL"
                                         : "INVALID_REQUEST",
                         "message", message, "retriable", status >= 500);
    case HTTP_ERR_OPENAI:
        break;
    }
    return json_pack("{s:{s:s, s:s, s:s?, s:s?}}", "error", "message", message, "type", type, "param", param, "code",
                     code);
}

void http_reply_error(http_exchange *x, int status, const char *type, const char *code, const char *param,
                      const char *message) {
    http_envelope e = x->h->p.envelope ? x->h->p.envelope(x->path ? x->path : "") : HTTP_ERR_OPENAI;
    http_reply_json(x, status, http_error_json(e, status, type, code, param, message),
                    status == 503 || status == 429 ? "Retry-After: 1\n"
                    : status == 401                ? "WWW-Authenticate: Bearer\n"
                                                   : NULL);
}

void http_hold(http_exchange *x, void (*gone)(void *ctx), void *ctx) {
    atomic_fetch_add(&x->refs, 1);
    pthread_mutex_lock(&x->lock);
    x->held = true;
    x->gone = gone;
    x->gone_ctx = ctx;
    pthread_mutex_unlock(&x->lock);
}

void http_release(http_exchange *x) {
    pthread_mutex_lock(&x->gone_lock);
    pthread_mutex_lock(&x->lock);
    x->held = false;
    pthread_mutex_unlock(&x->lock);
    pthread_mutex_unlock(&x->gone_lock);
    drop_ref(x);
}

static ssize_t read_stream(void *ctx, uint64_t pos, char *out, size_t cap) {
    http_exchange *x = ctx;
    (void)pos;
    pthread_mutex_lock(&x->lock);
    size_t n = x->stream.len < cap ? x->stream.len : cap;
    if (n) {
        memcpy(out, x->stream.data, n);
        memmove(x->stream.data, x->stream.data + n, x->stream.len - n);
        x->stream.len -= n;
    } else if (!x->ended) {
        x->waiting = true;
        MHD_suspend_connection(x->conn);
    }
    bool end = !n && x->ended;
    pthread_mutex_unlock(&x->lock);
    return end ? MHD_CONTENT_READER_END_OF_STREAM : (ssize_t)n;
}

static void stream_freed(void *ctx) { drop_ref(ctx); }

void http_stream_begin(http_exchange *x, const char *headers) {
    atomic_fetch_add(&x->refs, 1); /* the response's reader */
    struct MHD_Response *r =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16 << 10, read_stream, x, stream_freed);
    if (r) {
        MHD_add_response_header(r, "Content-Type", "text/event-stream; charset=utf-8");
        MHD_add_response_header(r, "X-Accel-Buffering", "no");
        add_headers(x, r, headers);
    } else
        drop_ref(x);
    pthread_mutex_lock(&x->lock);
    x->streaming = true;
    pthread_mutex_unlock(&x->lock);
    set_response(x, 200, r);
}

static void stream_wake(http_exchange *x) {
    if (x->waiting && x->conn) {
        x->waiting = false;
        resume(x);
    }
}

bool http_stream_send(http_exchange *x, const char *bytes, size_t len) {
    pthread_mutex_lock(&x->lock);
    bool ok = !x->finished && !x->ended && !x->gone_told && x->stream.len + len <= STREAM_CAP;
    if (ok) {
        buf_add(&x->stream, bytes, len);
        ok = !x->stream.failed;
        stream_wake(x);
    }
    pthread_mutex_unlock(&x->lock);
    return ok;
}

void http_stream_end(http_exchange *x) {
    pthread_mutex_lock(&x->lock);
    x->ended = true;
    stream_wake(x);
    pthread_mutex_unlock(&x->lock);
}

/* ---- checks before a handler sees anything ---- */

static bool host_is_local(const char *host) {
    static const char *const local[] = {"localhost", "127.0.0.1", "[::1]"};
    for (size_t i = 0; i < ORCD_COUNT(local); i++) {
        size_t n = strlen(local[i]);
        if (strncasecmp(host, local[i], n) == 0 && (host[n] == '\0' || host[n] == ':'))
            return true;
    }
    return false;
}

/* A page in a browser must not reach a loopback server through DNS rebinding or a foreign origin. */
static bool origin_allowed(const http *h, struct MHD_Connection *conn) {
    const char *host = MHD_lookup_connection_value(conn, MHD_HEADER_KIND, "Host");
    const char *origin = MHD_lookup_connection_value(conn, MHD_HEADER_KIND, "Origin");
    if (!h->loopback)
        return true;
    if (host && !host_is_local(host))
        return false;
    const char *scheme_end = origin ? strstr(origin, "://") : NULL;
    return !origin || (scheme_end && host_is_local(scheme_end + 3));
}

static bool key_accepted(const http *h, struct MHD_Connection *conn, uint64_t *hash) {
    const char *bearer = MHD_lookup_connection_value(conn, MHD_HEADER_KIND, "Authorization");
    const char *key = MHD_lookup_connection_value(conn, MHD_HEADER_KIND, "x-api-key");
    unsigned char digest[32];
    if (bearer && strncasecmp(bearer, "Bearer ", 7) == 0)
        key = bearer + 7;
    *hash = 0;
    if (key) {
        crypto_hash_sha256(digest, (const unsigned char *)key, strlen(key));
        memcpy(hash, digest, sizeof *hash);
    }
    if (!h->n_key)
        return true;
    int found = 0; /* every key is compared, so time tells nothing */
    for (size_t i = 0; key && i < h->n_key; i++)
        found |= sodium_memcmp(digest, h->key[i], sizeof digest) == 0;
    return found;
}

static const http_route *find_route(const http *h, const char *method, const char *path, bool *path_known) {
    *path_known = false;
    for (const http_route *r = h->p.route; r->path; r++)
        if (strcmp(r->path, path) == 0) {
            *path_known = true;
            if (strcmp(r->method, method) == 0)
                return r;
        }
    return NULL;
}

static void check_header(http_exchange *x, const char *method, const char *path) {
    http *h = x->h;
    const char *length = http_header(x, "Content-Length"), *coding = http_header(x, "Content-Encoding");
    const char *transfer = http_header(x, "Transfer-Encoding");
    bool path_known, has_key = key_accepted(h, x->conn, &x->key_hash);
    x->path = strdup(path);
    x->route = find_route(h, method, path, &path_known);
    if (!x->path)
        x->early = 500;
    else if (transfer && length) /* two ideas of where the body ends: how requests are smuggled */
        x->early = 400;
    else if (transfer && strcasecmp(transfer, "chunked") != 0)
        x->early = 501;
    else if (!origin_allowed(h, x->conn))
        x->early = 403;
    else if (!has_key && !(x->route && x->route->open))
        x->early = 401;
    else if (!x->route)
        x->early = path_known ? 405 : 404;
    else if (coding && strcasecmp(coding, "identity") != 0)
        x->early = 415;
    else if (length && strtoull(length, NULL, 10) > h->p.max_body)
        x->early = 413;
}

static void reply_early(http_exchange *x) {
    char text[160];
    switch (x->early) {
    case 400:
        snprintf(text, sizeof text, "Content-Length and Transfer-Encoding exclude each other");
        break;
    case 501:
        snprintf(text, sizeof text, "the only Transfer-Encoding taken is chunked");
        break;
    case 401:
        snprintf(text, sizeof text, "an API key is needed: send Authorization: Bearer KEY");
        break;
    case 403:
        snprintf(text, sizeof text, "Host and Origin must be local on a loopback server");
        break;
    case 404:
        snprintf(text, sizeof text, "there is nothing at %.80s", x->path);
        break;
    case 405:
        snprintf(text, sizeof text, "%.80s does not take this method", x->path);
        break;
    case 413:
        snprintf(text, sizeof text, "the body is larger than %zu bytes", x->h->p.max_body);
        break;
    case 415:
        snprintf(text, sizeof text, "compressed request bodies are not accepted");
        break;
    default:
        snprintf(text, sizeof text, "out of memory");
        break;
    }
    http_reply_error(x, x->early, NULL, NULL, NULL, text);
}

/* ---- the watcher: clients that left, and clients that never finish asking ---- */

/* By poll and not by a peek: bytes may be unread before the end, of a pipelined request or of TLS. */
static bool peer_closed(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
}

/* A complete header must come within `seconds` from now; 0 = there is nothing to wait for. */
static void expect_header(http *h, struct MHD_Connection *conn, double seconds) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    connection *c = info ? info->socket_context : NULL;
    if (!c)
        return;
    pthread_mutex_lock(&h->lock);
    c->deadline = seconds > 0 ? monotonic() + seconds : INFINITY;
    pthread_mutex_unlock(&h->lock);
}

static int socket_of(struct MHD_Connection *conn) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(conn, MHD_CONNECTION_INFO_CONNECTION_FD);
    return info ? info->connect_fd : -1;
}

static void watch_once(http *h) {
    enum { MAX = 64 };
    http_exchange *left[MAX];
    int n = 0;
    double t = monotonic();
    pthread_mutex_lock(&h->lock);
    for (http_exchange *x = h->live; x; x = x->next) {
        int fd = x->conn ? socket_of(x->conn) : -1;
        if (fd < 0)
            continue;
        pthread_mutex_lock(&x->lock);
        bool watched = x->held && !x->gone_told && !x->ended && (!x->replied || x->streaming);
        bool late = x->phase == READING && t - x->t0 > BODY_S;
        pthread_mutex_unlock(&x->lock);
        if (late)
            shutdown(fd, SHUT_RDWR);
        else if (watched && n < MAX && peer_closed(fd)) {
            atomic_fetch_add(&x->refs, 1);
            left[n++] = x;
        }
    }
    for (connection *c = h->connections; c; c = c->next)
        if (t > c->deadline)
            shutdown(c->fd, SHUT_RDWR);
    pthread_mutex_unlock(&h->lock);
    for (int i = 0; i < n; i++) {
        tell_gone(left[i]);
        drop_ref(left[i]);
    }
}

static void *watch(void *ctx) {
    http *h = ctx;
    while (!atomic_load(&h->closing)) {
        watch_once(h);
        usleep(WATCH_MS * 1000);
    }
    return NULL;
}

static void connection_changed(void *ctx, struct MHD_Connection *conn, void **state,
                               enum MHD_ConnectionNotificationCode what) {
    http *h = ctx;
    connection *c = *state;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        c = calloc(1, sizeof *c);
        if (!c)
            return;
        c->fd = socket_of(conn);
        c->deadline = monotonic() + HEADER_S;
        *state = c;
        pthread_mutex_lock(&h->lock);
        c->next = h->connections;
        if (c->next)
            c->next->prev = c;
        h->connections = c;
        pthread_mutex_unlock(&h->lock);
    } else if (c) {
        pthread_mutex_lock(&h->lock);
        if (c->next)
            c->next->prev = c->prev;
        if (c->prev)
            c->prev->next = c->next;
        else
            h->connections = c->next;
        pthread_mutex_unlock(&h->lock);
        free(c);
        *state = NULL;
    }
}

/* ---- MHD's door ---- */

static enum MHD_Result queue_reply(http_exchange *x) {
    pthread_mutex_lock(&x->lock);
    struct MHD_Response *r = x->response;
    x->response = NULL;
    x->phase = REPLYING;
    pthread_mutex_unlock(&x->lock);
    if (!r)
        return MHD_NO;
    enum MHD_Result result = MHD_queue_response(x->conn, (unsigned)x->status, r);
    MHD_destroy_response(r);
    return result;
}

/* MHD calls this when the header is there, for pieces of the body, at its end, and after each resume. */
static enum MHD_Result serve(void *ctx, struct MHD_Connection *conn, const char *path, const char *method,
                             const char *version, const char *data, size_t *n_data, void **state) {
    http *h = ctx;
    http_exchange *x = *state;
    (void)version;
    if (!x)
        return MHD_NO;
    if (!x->path) {
        expect_header(h, conn, 0);
        check_header(x, method, path);
        if (x->early >= 500 || x->early == 400 || x->early == 413 || x->early == 415) { /* do not read the body */
            reply_early(x);
            return queue_reply(x);
        }
        return MHD_YES;
    }
    if (*n_data) {
        if (!x->early && x->body.len + *n_data > h->p.max_body)
            x->early = 413;
        if (!x->early)
            buf_add(&x->body, data, *n_data);
        *n_data = 0;
        return MHD_YES;
    }
    if (x->phase == READING) {
        pthread_mutex_lock(&x->lock); /* the watcher looks */
        x->phase = HANDLING;
        pthread_mutex_unlock(&x->lock);
        if (x->body.failed && !x->early)
            x->early = 500;
        if (x->early)
            reply_early(x);
        else
            x->route->handle(x, h->p.ctx);
    }
    pthread_mutex_lock(&x->lock);
    bool suspend = !x->replied;
    if (suspend) {
        x->phase = SUSPENDED;
        MHD_suspend_connection(conn);
    }
    pthread_mutex_unlock(&x->lock);
    return suspend ? MHD_YES : queue_reply(x);
}

/* ---- life ---- */

static orcd_status hash_keys(http *h, orcd_error *err) {
    size_t n = 0;
    while (h->p.key && h->p.key[n])
        n++;
    h->key = calloc(n + 1, sizeof *h->key);
    if (!h->key)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    for (size_t i = 0; i < n; i++)
        crypto_hash_sha256(h->key[i], (const unsigned char *)h->p.key[i], strlen(h->p.key[i]));
    h->n_key = n;
    return ORCD_OK;
}

static bool is_loopback(const struct sockaddr *a) {
    if (a->sa_family == AF_INET)
        return (ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr) >> 24) == 127;
    return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)a)->sin6_addr);
}

static orcd_status find_address(const char *host, int port, bool has_key, struct addrinfo **out, bool *loopback,
                                orcd_error *err) {
    struct addrinfo hint = {.ai_flags = AI_NUMERICSERV | AI_PASSIVE, .ai_socktype = SOCK_STREAM};
    char text[16];
    snprintf(text, sizeof text, "%d", port);
    *out = NULL;
    if (getaddrinfo(host, text, &hint, out) != 0 || !*out)
        return orcd_fail(err, ORCD_ERR_ARG, "\"%s\" is no address of this machine", host);
    *loopback = is_loopback((*out)->ai_addr);
    if (*loopback || has_key)
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_ARG,
                     "listening on %s would open the server to the network: give a file of keys first", host);
}

static orcd_status cannot_listen(const char *host, int port, int why, orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_IO, "cannot listen on %s port %d: %s; is another server running there?", host, port,
                     why ? strerror(why) : "refused");
}

orcd_status http_can_listen(const char *host, int port, bool has_key, orcd_error *err) {
    struct addrinfo *a;
    bool loopback;
    int one = 1, fd = -1;
    orcd_status st = find_address(host, port, has_key, &a, &loopback, err);
    if (st == ORCD_OK) {
        fd = socket(a->ai_family, SOCK_STREAM, 0);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (fd < 0 || bind(fd, a->ai_addr, a->ai_addrlen) != 0)
            st = cannot_listen(host, port, errno, err);
    }
    if (fd >= 0)
        close(fd);
    if (a)
        freeaddrinfo(a);
    return st;
}

/* Not MHD's own thread: with 128 events at once, that of 0.9.75 waits for more before it looks at them. */
static void *run_network(void *ctx) {
    http *h = ctx;
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    struct pollfd p[] = {{.fd = info->epoll_fd, .events = POLLIN}, {.fd = h->poke_fd, .events = POLLIN}};
    while (!atomic_load(&h->closing)) {
        MHD_UNSIGNED_LONG_LONG ms;
        uint64_t n;
        bool wait = MHD_get_timeout(h->daemon, &ms) != MHD_YES;
        poll(p, 2, wait || ms > INT_MAX ? -1 : (int)ms);
        if (p[1].revents && read(h->poke_fd, &n, sizeof n) > 0)
            atomic_store(&h->poked, false);
        MHD_run(h->daemon);
    }
    return NULL;
}

static orcd_status start_daemon(http *h, const struct addrinfo *a, orcd_error *err) {
    struct MHD_OptionItem option[16] = {
        {MHD_OPTION_SOCK_ADDR, 0, a->ai_addr},
        {MHD_OPTION_CONNECTION_LIMIT, h->p.max_connections, NULL},
        {MHD_OPTION_CONNECTION_TIMEOUT, IDLE_S, NULL},
        {MHD_OPTION_CONNECTION_MEMORY_LIMIT, HEADER_BYTES, NULL},
        {MHD_OPTION_STRICT_FOR_CLIENT, 1, NULL},
        {MHD_OPTION_LISTENING_ADDRESS_REUSE, 1, NULL},
        {MHD_OPTION_NOTIFY_COMPLETED, (intptr_t)completed, h},
        {MHD_OPTION_NOTIFY_CONNECTION, (intptr_t)connection_changed, h},
        {MHD_OPTION_URI_LOG_CALLBACK, (intptr_t)new_exchange, h},
    };
    size_t n = 9;
    unsigned flags = MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME;
    if (h->p.tls_cert) {
        flags |= MHD_USE_TLS;
        option[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_CERT, 0, (void *)(uintptr_t)h->p.tls_cert};
        option[n++] = (struct MHD_OptionItem){MHD_OPTION_HTTPS_MEM_KEY, 0, (void *)(uintptr_t)h->p.tls_key};
    }
    if (a->ai_family == AF_INET6)
        flags |= MHD_USE_IPv6;
    option[n] = (struct MHD_OptionItem){MHD_OPTION_END, 0, NULL};
    errno = 0;
    h->daemon =
        MHD_start_daemon(flags, (uint16_t)h->p.port, NULL, NULL, serve, h, MHD_OPTION_ARRAY, option, MHD_OPTION_END);
    if (!h->daemon)
        return cannot_listen(h->p.host, h->p.port, errno, err);
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_BIND_PORT);
    h->port = info ? info->port : h->p.port;
    return ORCD_OK;
}

orcd_status http_open(const http_params *p, http **out, orcd_error *err) {
    orcd_status st = ORCD_OK;
    struct addrinfo *a = NULL;
    *out = NULL;
    if (sodium_init() < 0)
        return orcd_fail(err, ORCD_ERR_INTERNAL, "the cryptography library does not start");
    http *h = calloc(1, sizeof *h);
    if (!h)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    h->p = *p;
    h->poke_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    h->p.max_body = p->max_body ? p->max_body : DEFAULT_BODY;
    h->p.max_connections = p->max_connections ? p->max_connections : DEFAULT_CONNECTIONS;
    pthread_mutex_init(&h->lock, NULL);
    if (h->poke_fd < 0) {
        st = orcd_fail(err, ORCD_ERR_IO, "no more files can be opened: %s", strerror(errno));
        goto done;
    }
    ORCD_TRY_GOTO(st, done, hash_keys(h, err));
    ORCD_TRY_GOTO(st, done, find_address(p->host, p->port, h->n_key > 0, &a, &h->loopback, err));
    ORCD_TRY_GOTO(st, done, start_daemon(h, a, err));
    h->watching = pthread_create(&h->watcher, NULL, watch, h) == 0;
    h->running = pthread_create(&h->network, NULL, run_network, h) == 0;
    if (!h->watching || !h->running) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "a thread could not be started");
        goto done;
    }
    *out = h;
    h = NULL;
done:
    if (a)
        freeaddrinfo(a);
    http_close(h);
    return st;
}

int http_port(const http *h) { return h->port; }

void http_stop_accepting(http *h) {
    int fd = MHD_quiesce_daemon(h->daemon);
    if (fd >= 0)
        close(fd);
}

/* MHD cannot stop while connections are suspended. */
static void cut_all(http *h) {
    pthread_mutex_lock(&h->lock);
    for (http_exchange *x = h->live; x; x = x->next) {
        pthread_mutex_lock(&x->lock);
        x->ended = true;
        wake(x);
        stream_wake(x);
        pthread_mutex_unlock(&x->lock);
    }
    pthread_mutex_unlock(&h->lock);
}

void http_close(http *h) {
    if (!h)
        return;
    atomic_store(&h->closing, true);
    if (h->watching)
        pthread_join(h->watcher, NULL);
    if (h->running) {
        poke(h);
        pthread_join(h->network, NULL);
    }
    if (h->daemon) {
        cut_all(h);
        MHD_stop_daemon(h->daemon);
    }
    if (h->poke_fd >= 0)
        close(h->poke_fd);
    pthread_mutex_destroy(&h->lock);
    free(h->key);
    free(h);
}
