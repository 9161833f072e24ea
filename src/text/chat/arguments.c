#include "text/chat/arguments.h"

#include <jansson.h>
#include <string.h>

/* Copies up to and with the brace that closes the object; returns the bytes used. */
static size_t stream(arguments *a, const char *text, size_t n, buf *out) {
    size_t i = 0;
    while (i < n && a->mode == ARGUMENTS_STREAM) {
        char c = text[i++];
        if (a->in_string) {
            a->in_string = a->escaped || c != '"';
            a->escaped = !a->escaped && c == '\\';
        } else if (c == '"') {
            a->in_string = true;
        } else if (c == '{' || c == '[') {
            a->depth++;
        } else if ((c == '}' || c == ']') && --a->depth == 0) {
            a->mode = ARGUMENTS_DONE;
        }
    }
    buf_add(out, text, i);
    return i;
}

void arguments_push(arguments *a, const char *text, size_t n, buf *out) {
    if (a->mode == ARGUMENTS_NEW) {
        size_t blank = 0;
        while (blank < n && strchr(" \t\r\n", text[blank]) && text[blank])
            blank++;
        text += blank;
        n -= blank;
        if (n)
            a->mode = text[0] == '{' ? ARGUMENTS_STREAM : ARGUMENTS_HOLD;
    }
    if (a->mode == ARGUMENTS_RAW)
        buf_add(out, text, n);
    else if (a->mode == ARGUMENTS_STREAM)
        stream(a, text, n, out);
    else if (a->mode == ARGUMENTS_HOLD)
        buf_add(&a->held, text, n);
}

bool arguments_object(const char *text, size_t n, const char **from, size_t *len) {
    json_error_t end;
    size_t at = 0;
    while (at < n && text[at] != '{' && text[at] != '[')
        at++;
    json_t *v = json_loadb(text + at, n - at, JSON_DISABLE_EOF_CHECK | JSON_ALLOW_NUL, &end);
    bool wrapped = json_array_size(v) == 1 && json_is_object(json_array_get(v, 0)),
         found = json_is_object(v) || wrapped;
    if (found) {
        *from = text + at;
        *len = (size_t)end.position;
    }
    if (wrapped) { /* verbatim, without the brackets */
        while (**from != '{')
            ++*from, --*len;
        while ((*from)[*len - 1] != '}')
            --*len;
    }
    json_decref(v);
    return found;
}

void arguments_finish(arguments *a, bool cut, buf *out) {
    const char *from = a->held.data;
    size_t len = a->held.len;
    if (a->mode == ARGUMENTS_NEW && !cut)
        buf_str(out, "{}");
    if (a->mode == ARGUMENTS_HOLD) {
        if (!cut)
            arguments_object(a->held.data, a->held.len, &from, &len);
        buf_add(out, from, len);
    }
    if (a->held.failed)
        out->failed = true;
}

void arguments_free(arguments *a) {
    buf_free(&a->held);
    *a = (arguments){0};
}
