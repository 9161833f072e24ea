#include "hub/internal.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { MAX_BODY = 32 << 20, MAX_REDIRECTS = 5, SLOWEST = 1 /* byte a second */, CONNECT_S = 20 };

void hub_http_prepare(const hub_params *p, CURL *easy, const char *url, bool own) {
    bool tls = strncmp(p->url, "https://", 8) == 0;
    curl_easy_reset(easy);
    curl_easy_setopt(easy, CURLOPT_URL, url);
    curl_easy_setopt(easy, CURLOPT_USERAGENT, "orcd");
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, tls ? "https" : "http,https");
    curl_easy_setopt(easy, CURLOPT_REDIR_PROTOCOLS_STR, tls ? "https" : "http,https");
    curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 1L);
    curl_easy_setopt(easy, CURLOPT_MAXREDIRS, (long)MAX_REDIRECTS);
    /* several connections, not several streams in one */
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(easy, CURLOPT_FAILONERROR, 1L);
    curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT, (long)CONNECT_S);
    curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, (long)SLOWEST);
    curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, (long)p->stall_s);
    if (p->token && own) { /* libcurl forgets it when a redirect leaves the host */
        curl_easy_setopt(easy, CURLOPT_HTTPAUTH, (long)CURLAUTH_BEARER);
        curl_easy_setopt(easy, CURLOPT_XOAUTH2_BEARER, p->token);
    }
}

bool hub_http_transient(CURLcode code, long status) {
    switch (code) {
    case CURLE_HTTP_RETURNED_ERROR:
        return status == 408 || status == 429 || status >= 500;
    case CURLE_OK: /* ended early */
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_PARTIAL_FILE:
    case CURLE_GOT_NOTHING:
    case CURLE_RECV_ERROR:
    case CURLE_SEND_ERROR:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_WEIRD_SERVER_REPLY:
        return true;
    default:
        return false;
    }
}

orcd_status hub_http_failed(const hub_params *p, CURLcode code, long status, const char *what, orcd_error *err) {
    if (code == CURLE_HTTP_RETURNED_ERROR && (status == 401 || status == 403))
        return orcd_fail(err, ORCD_ERR_IO, "%s does not exist on %s or is not open to %s (status %ld)", what, p->url,
                         p->token ? "this token" : "everyone: give --token-file", status);
    if (code == CURLE_HTTP_RETURNED_ERROR && status == 404)
        return orcd_fail(err, ORCD_ERR_IO, "%s does not exist on %s", what, p->url);
    if (code == CURLE_HTTP_RETURNED_ERROR)
        return orcd_fail(err, ORCD_ERR_IO, "%s: %s answered with status %ld%s", what, p->url, status,
                         status == 429 ? ", too many requests; try again later" : "");
    if (code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_CONNECT)
        return orcd_fail(err, ORCD_ERR_IO, "%s cannot be reached for %s: %s; is this machine offline?", p->url, what,
                         curl_easy_strerror(code));
    if (code == CURLE_UNSUPPORTED_PROTOCOL)
        return orcd_fail(err, ORCD_ERR_IO, "%s: %s redirects to an address that is not %s", what, p->url,
                         strncmp(p->url, "https", 5) == 0 ? "https" : "http or https");
    if (code == CURLE_OK)
        return orcd_fail(err, ORCD_ERR_IO, "%s: the server ended its answer early", what);
    return orcd_fail(err, ORCD_ERR_IO, "%s: %s", what, curl_easy_strerror(code));
}

double hub_http_pause(int failures, long retry_after) {
    enum { LONGEST = 60 };
    if (retry_after > 0)
        return (double)(retry_after < LONGEST ? retry_after : LONGEST);
    return failures > 5 ? 8 : 0.25 * (double)(1 << failures);
}

bool hub_http_header(const char *line, size_t n, const char *name, char *out, size_t cap) {
    size_t len = strlen(name);
    if (n <= len || strncasecmp(line, name, len) != 0 || line[len] != ':')
        return false;
    const char *from = line + len + 1, *end = line + n;
    while (from < end && (*from == ' ' || *from == '\t'))
        from++;
    while (end > from && (end[-1] == '\r' || end[-1] == '\n' || end[-1] == ' '))
        end--;
    size_t have = (size_t)(end - from) < cap ? (size_t)(end - from) : cap - 1;
    memcpy(out, from, have);
    out[have] = '\0';
    return true;
}

void hub_http_escape(CURL *easy, const char *path, buf *url) {
    for (size_t n;; path += n + 1) {
        n = strcspn(path, "/");
        char *part = curl_easy_escape(easy, path, (int)n);
        url->failed |= !part;
        buf_str(url, part ? part : "");
        curl_free(part);
        if (!path[n])
            return;
        buf_char(url, '/');
    }
}

/* ---- a small answer ---- */

typedef struct answer {
    buf *body;
    char link[2048];
    long retry_after;
} answer;

static size_t on_body(char *bytes, size_t size, size_t n, void *ctx) {
    answer *a = ctx;
    buf_add(a->body, bytes, size * n);
    return a->body->failed || a->body->len > MAX_BODY ? 0 : size * n;
}

static size_t on_header(char *line, size_t size, size_t n, void *ctx) {
    answer *a = ctx;
    char number[32];
    hub_http_header(line, size * n, "link", a->link, sizeof a->link);
    if (hub_http_header(line, size * n, "retry-after", number, sizeof number))
        a->retry_after = atol(number);
    return size * n;
}

/* <URL>; rel="next" */
static char *next_page(const char *link) {
    const char *end = strchr(link, '>');
    return link[0] == '<' && end && strstr(end, "rel=\"next\"") ? strndup(link + 1, (size_t)(end - link - 1)) : NULL;
}

static void sleep_s(double s) {
    struct timespec t = {.tv_sec = (time_t)s, .tv_nsec = (long)((s - (double)(time_t)s) * 1e9)};
    nanosleep(&t, NULL);
}

orcd_status hub_http_get(const hub_params *p, const char *url, buf *body, char **next, orcd_error *err) {
    CURL *easy = curl_easy_init();
    answer a = {.body = body};
    CURLcode code = CURLE_OUT_OF_MEMORY;
    curl_off_t connected = 0; /* microseconds it took */
    long status = 0;
    *next = NULL;
    for (int failures = 0; easy; sleep_s(hub_http_pause(failures, a.retry_after))) {
        hub_http_prepare(p, easy, url, true);
        curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
        curl_easy_setopt(easy, CURLOPT_WRITEDATA, &a);
        curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, on_header);
        curl_easy_setopt(easy, CURLOPT_HEADERDATA, &a);
        buf_clear(body);
        a.link[0] = '\0';
        a.retry_after = 0;
        code = curl_easy_perform(easy);
        curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
        curl_easy_getinfo(easy, CURLINFO_CONNECT_TIME_T, &connected);
        if (code == CURLE_OPERATION_TIMEDOUT && connected == 0)
            code = CURLE_COULDNT_CONNECT;
        bool offline = code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_CONNECT;
        if (code == CURLE_OK || offline || !hub_http_transient(code, status) || ++failures > p->retries ||
            (p->stopped && p->stopped(p->ctx)))
            break;
    }
    curl_easy_cleanup(easy);
    if (code == CURLE_WRITE_ERROR)
        return orcd_fail(err, ORCD_ERR_LIMIT, "%s answers with more than %d bytes, or memory ran out", url, MAX_BODY);
    if (code != CURLE_OK)
        return hub_http_failed(p, code, status, url, err);
    *next = next_page(a.link);
    return ORCD_OK;
}
