#include "text/stop.h"

#include <stdlib.h>
#include <string.h>

struct stop_set {
    char **string;
    size_t *len;
    size_t n;
    buf held;
    int matched;
};

orcd_status stop_open(const char *const *string, size_t n, stop_set **out) {
    *out = NULL;
    stop_set *s = calloc(1, sizeof *s);
    if (!s)
        return ORCD_ERR_NOMEM;
    s->matched = -1;
    s->n = n;
    s->string = calloc(n + 1, sizeof *s->string);
    s->len = calloc(n + 1, sizeof *s->len);
    bool ok = s->string && s->len;
    for (size_t i = 0; ok && i < n; i++) {
        s->len[i] = strlen(string[i]);
        s->string[i] = strdup(string[i]);
        ok = s->string[i] != NULL;
    }
    if (!ok) {
        stop_close(s);
        return ORCD_ERR_NOMEM;
    }
    *out = s;
    return ORCD_OK;
}

void stop_close(stop_set *s) {
    if (!s)
        return;
    for (size_t i = 0; s->string && i < s->n; i++)
        free(s->string[i]);
    free(s->string);
    free(s->len);
    buf_free(&s->held);
    free(s);
}

/* Longest end of the held text that begins a stop string. */
static size_t undecided(const stop_set *s) {
    size_t longest = 0;
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = s->len[i] ? s->len[i] - 1 : 0; k > longest; k--)
            if (k <= s->held.len && memcmp(s->held.data + s->held.len - k, s->string[i], k) == 0)
                longest = k;
    return longest;
}

int stop_push(stop_set *s, const char *text, size_t len, buf *out) {
    if (s->matched >= 0)
        return s->matched;
    buf_add(&s->held, text, len);
    if (s->held.failed || !s->held.data)
        return -1;
    size_t first = SIZE_MAX;
    for (size_t i = 0; i < s->n; i++) {
        const char *at = s->len[i] ? memmem(s->held.data, s->held.len, s->string[i], s->len[i]) : NULL;
        if (at && (size_t)(at - s->held.data) < first) {
            first = (size_t)(at - s->held.data);
            s->matched = (int)i;
        }
    }
    size_t emit = s->matched >= 0 ? first : s->held.len - undecided(s);
    buf_add(out, s->held.data, emit);
    memmove(s->held.data, s->held.data + emit, s->held.len - emit + 1);
    s->held.len -= emit;
    return s->matched;
}

void stop_flush(stop_set *s, buf *out) {
    if (s->matched < 0 && s->held.len)
        buf_add(out, s->held.data, s->held.len);
    buf_clear(&s->held);
}
