#include "base/buf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool reserve(void **data, size_t *cap, size_t need, size_t unit) {
    if (need <= *cap)
        return true;
    size_t grown = *cap ? *cap : 64;
    while (grown < need) {
        if (grown > SIZE_MAX / 2 / unit)
            return false;
        grown *= 2;
    }
    void *p = realloc(*data, grown * unit);
    if (!p)
        return false;
    *data = p;
    *cap = grown;
    return true;
}

void buf_free(buf *b) {
    free(b->data);
    *b = (buf){0};
}

void buf_clear(buf *b) {
    b->len = 0;
    b->failed = false;
    if (b->data)
        b->data[0] = '\0';
}

void buf_add(buf *b, const void *bytes, size_t n) {
    if (b->failed || n > SIZE_MAX - b->len - 1 || !reserve((void **)&b->data, &b->cap, b->len + n + 1, 1)) {
        b->failed = true;
        return;
    }
    if (n)
        memcpy(b->data + b->len, bytes, n);
    b->len += n;
    b->data[b->len] = '\0';
}

void buf_str(buf *b, const char *s) { buf_add(b, s, strlen(s)); }

void buf_char(buf *b, char c) { buf_add(b, &c, 1); }

void buf_printf(buf *b, const char *fmt, ...) {
    va_list args, again;
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, fmt, args);
    va_end(args);
    if (b->failed || n < 0 || !reserve((void **)&b->data, &b->cap, b->len + (size_t)n + 1, 1)) {
        b->failed = true;
    } else {
        vsnprintf(b->data + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

void ids_free(ids *v) {
    free(v->data);
    *v = (ids){0};
}

void ids_push(ids *v, int32_t id) { ids_add(v, &id, 1); }

void ids_add(ids *v, const int32_t *id, size_t n) {
    if (v->failed || n > SIZE_MAX - v->n || !reserve((void **)&v->data, &v->cap, v->n + n, sizeof *v->data)) {
        v->failed = true;
        return;
    }
    if (n)
        memcpy(v->data + v->n, id, n * sizeof *id);
    v->n += n;
}
