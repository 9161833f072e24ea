/* A load for any server of OpenAI's completions: N streams at once, each asking again as soon as it has its answer,
 * read by one thread that does little else. Prompts are random token ids. Usage: load [-H HOST] [-P PORT] [-n STREAMS]
 * [-r REQUESTS_OF_EACH] [-p PROMPT_TOKENS] [-g NEW_TOKENS] [-V VOCABULARY] [-s SEED] [-m MODEL] [-x MEMBERS] [-j]
 * -x gives the first stream's requests further members, as JSON: '"logprobs":5'. -j prints JSON instead of a row of the
 * table in bench/RESULTS.md. Build it with make bench.
 *
 * A gap is the time between two texts: a token that is only a part of a character makes one gap of two.
 *
 * "steady" is the rate between the time when every stream has begun its first answer and the time when the first one
 * finds nothing left to ask. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/rng.h"

typedef struct samples {
    double *v;
    size_t n, cap;
} samples;

typedef struct client {
    int fd, n_left; /* requests still to begin */
    bool head_read, done;
    size_t sent;
    buf request, in;
    double t_begin, t_first, t_last;
    long n_event, n_token; /* of this answer; n_token as the server counts them */
} client;

typedef struct load {
    const char *host, *port, *model, *members;
    int n_client, n_request, n_prompt, n_new, n_vocab, seed, json;
    struct addrinfo *address;
    int epoll, n_open, n_failed;
    client *client;
    samples event, gap, first;
    double t_all_began, t_first_idle;
    int n_began;
    long n_event, n_token;
} load;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "out of memory");
    exit(1);
}

static void add(samples *s, double v) {
    if (s->n == s->cap) {
        s->cap = s->cap ? 2 * s->cap : 4096;
        s->v = realloc(s->v, s->cap * sizeof *s->v);
        if (!s->v)
            die("samples");
    }
    s->v[s->n++] = v;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The q-th part of the sorted samples; 0 without any. */
static double at(const samples *s, double q) { return s->n ? s->v[(size_t)(q * (double)(s->n - 1))] : 0; }

/* ---- a request ---- */

static void write_request(const load *l, client *c, uint64_t n) {
    buf body = {0};
    buf_printf(&body,
               "{\"model\":\"%s\",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"ignore_eos\":true,",
               l->model);
    if (l->members && c == l->client)
        buf_printf(&body, "%s,", l->members);
    buf_printf(&body, "\"max_tokens\":%d,\"seed\":%llu,\"prompt\":[", l->n_new, (unsigned long long)n);
    for (int i = 0; i < l->n_prompt; i++) { /* the upper half of a vocabulary may be reserved */
        double u = rng_uniform((uint64_t)l->seed, n, (uint64_t)i);
        buf_printf(&body, "%s%d", i ? "," : "", (int)(u * (double)(l->n_vocab / 2)));
    }
    buf_str(&body, "]}");
    buf_clear(&c->request);
    buf_printf(&c->request, "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n");
    buf_printf(&c->request, "Content-Length: %zu\r\n\r\n", body.len);
    buf_add(&c->request, body.data, body.len);
    if (c->request.failed || body.failed)
        die("a request");
    buf_free(&body);
}

static void begin(load *l, client *c) {
    int index = (int)(c - l->client);
    write_request(l, c, (uint64_t)(index + l->n_client * c->n_left--));
    c->sent = 0;
    c->head_read = c->done = false;
    c->t_first = c->t_last = 0;
    c->n_event = c->n_token = 0;
    buf_clear(&c->in);
    c->t_begin = now();
    c->fd = socket(l->address->ai_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0 || (connect(c->fd, l->address->ai_addr, l->address->ai_addrlen) != 0 && errno != EINPROGRESS))
        die("connecting");
    struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    if (epoll_ctl(l->epoll, EPOLL_CTL_ADD, c->fd, &e) != 0)
        die("epoll");
}

static void send_more(load *l, client *c) {
    ssize_t n = send(c->fd, c->request.data + c->sent, c->request.len - c->sent, MSG_NOSIGNAL);
    c->sent += n > 0 ? (size_t)n : 0;
    if (c->sent == c->request.len)
        epoll_ctl(l->epoll, EPOLL_CTL_MOD, c->fd, &(struct epoll_event){.events = EPOLLIN, .data.ptr = c});
}

/* ---- an answer ---- */

/* Without its end: "data: {...}". */
static void take_line(load *l, client *c, const char *line, size_t len, double t) {
    const char *text = memmem(line, len, "\"text\":", 7), *usage = memmem(line, len, "\"completion_tokens\":", 20);
    c->done |= len >= 12 && memcmp(line, "data: [DONE]", 12) == 0;
    if (usage)
        c->n_token = atol(usage + 20);
    if (!text || (text += 7 + (text[7] == ' '), memcmp(text, "\"\"", 2) == 0))
        return;
    if (c->n_event++ == 0) {
        c->t_first = t;
        add(&l->first, t - c->t_begin);
        if (c->n_left == l->n_request - 1 && ++l->n_began == l->n_client)
            l->t_all_began = t;
    } else {
        add(&l->gap, t - c->t_last);
    }
    c->t_last = t;
    add(&l->event, t);
}

static void take_lines(load *l, client *c, double t) {
    size_t from = 0;
    if (!c->head_read) {
        const char *end = c->in.len ? strstr(c->in.data, "\r\n\r\n") : NULL;
        if (!end)
            return;
        c->head_read = true;
        from = (size_t)(end + 4 - c->in.data);
        if (c->in.len < 12 || memcmp(c->in.data + 8, " 200", 4) != 0)
            fprintf(stderr, "load: %.*s\n", (int)(strchrnul(end + 4, '\n') - c->in.data), c->in.data);
    }
    for (const char *line, *end; (end = memchr(line = c->in.data + from, '\n', c->in.len - from));
         from += (size_t)(end + 1 - line))
        take_line(l, c, line, (size_t)(end - line), t);
    c->in.len -= from;
    memmove(c->in.data, c->in.data + from, c->in.len + 1);
}

static void ended(load *l, client *c) {
    close(c->fd);
    c->fd = -1;
    l->n_failed += !c->done;
    l->n_event += c->n_event;
    l->n_token += c->n_token;
    if (c->n_left > 0) {
        begin(l, c);
        return;
    }
    l->n_open--;
    if (l->t_first_idle <= 0)
        l->t_first_idle = now();
}

static void receive(load *l, client *c) {
    static char bytes[1 << 16];
    ssize_t n = recv(c->fd, bytes, sizeof bytes, 0);
    if (n > 0) {
        buf_add(&c->in, bytes, (size_t)n);
        take_lines(l, c, now());
    } else if (n == 0 || errno != EAGAIN) {
        ended(l, c);
    }
}

static void run(load *l) {
    struct epoll_event e[256];
    l->n_open = l->n_client;
    for (int i = 0; i < l->n_client; i++)
        begin(l, &l->client[i]);
    while (l->n_open > 0) {
        int n = epoll_wait(l->epoll, e, 256, -1);
        for (int i = 0; i < n; i++) {
            client *c = e[i].data.ptr;
            if (e[i].events & EPOLLOUT && c->sent < c->request.len)
                send_more(l, c);
            if (e[i].events & ~(uint32_t)EPOLLOUT)
                receive(l, c);
        }
    }
}

/* ---- the report ---- */

static void report(load *l, double t0, double took) {
    double steady_s = l->t_all_began > 0 ? l->t_first_idle - l->t_all_began : 0;
    long n = 0;
    for (size_t i = 0; i < l->event.n; i++)
        n += l->event.v[i] > l->t_all_began && l->event.v[i] <= l->t_first_idle;
    double per_event =
        l->n_event ? (double)l->n_token / (double)l->n_event : 0; /* some tokens have no text of their own */
    double steady = steady_s > 0 ? (double)n * per_event / steady_s : 0;
    qsort(l->gap.v, l->gap.n, sizeof *l->gap.v, ascending);
    qsort(l->first.v, l->first.n, sizeof *l->first.v, ascending);
    const char *form =
        l->json ? "{\"streams\":%d,\"requests\":%d,\"failed\":%d,\"seconds\":%.3f,\"all\":%.1f,\"steady\":%.1f,"
                  "\"steady_from\":%.3f,\"steady_to\":%.3f,\"first\":%.4f,\"first_99\":%.4f,\"first_max\":%.4f,"
                  "\"gap\":%.5f,\"gap_99\":%.5f,\"gap_max\":%.5f}\n"
                : "| %d | %d | %d | %.2f s | %.0f | %.0f | %.1f to %.1f s | %.3f s | %.3f s | %.3f s | %.4f s | %.4f s "
                  "| %.4f s |\n";
    printf(form, l->n_client, l->n_client * l->n_request, l->n_failed, took, (double)l->n_token / took, steady,
           l->t_all_began - t0, l->t_first_idle - t0, at(&l->first, 0.5), at(&l->first, 0.99), at(&l->first, 1),
           at(&l->gap, 0.5), at(&l->gap, 0.99), at(&l->gap, 1));
}

static bool parse(load *l, int argc, char **argv) {
    int c;
    while ((c = getopt(argc, argv, "H:P:n:r:p:g:V:s:m:x:j")) != -1) {
        switch (c) {
        case 'H':
            l->host = optarg;
            break;
        case 'P':
            l->port = optarg;
            break;
        case 'm':
            l->model = optarg;
            break;
        case 'x':
            l->members = optarg;
            break;
        case 'j':
            l->json = 1;
            break;
        case '?':
            return false;
        default: {
            int *number[] = {['n'] = &l->n_client, ['r'] = &l->n_request, ['p'] = &l->n_prompt,
                             ['g'] = &l->n_new,    ['V'] = &l->n_vocab,   ['s'] = &l->seed};
            *number[c] = atoi(optarg);
        }
        }
    }
    return optind == argc && l->n_client > 0 && l->n_request > 0 && l->n_prompt > 0 && l->n_new > 0 && l->n_vocab > 1;
}

int main(int argc, char **argv) {
    load l = {.host = "127.0.0.1",
              .port = "8080",
              .model = "orcd",
              .n_client = 16,
              .n_request = 2,
              .n_prompt = 1000,
              .n_new = 256,
              .n_vocab = 2000,
              .seed = 1};
    if (!parse(&l, argc, argv)) {
        fprintf(stderr, "usage: load [-H HOST] [-P PORT] [-n STREAMS] [-r REQUESTS_OF_EACH] [-p PROMPT_TOKENS] "
                        "[-g NEW_TOKENS] [-V VOCABULARY] [-s SEED] [-m MODEL] [-x MEMBERS] [-j]\n");
        return 2;
    }
    if (getaddrinfo(l.host, l.port, &(struct addrinfo){.ai_socktype = SOCK_STREAM}, &l.address) != 0) {
        fprintf(stderr, "load: %s port %s is no address\n", l.host, l.port);
        return 1;
    }
    l.epoll = epoll_create1(0);
    l.client = calloc((size_t)l.n_client, sizeof *l.client);
    if (l.epoll < 0 || !l.client)
        die("starting");
    for (int i = 0; i < l.n_client; i++)
        l.client[i].n_left = l.n_request;
    double t0 = now();
    run(&l);
    report(&l, t0, now() - t0);
    for (int i = 0; i < l.n_client; i++) {
        buf_free(&l.client[i].request);
        buf_free(&l.client[i].in);
    }
    free(l.client);
    free(l.event.v);
    free(l.gap.v);
    free(l.first.v);
    freeaddrinfo(l.address);
    close(l.epoll);
    return l.n_failed > 0;
}
