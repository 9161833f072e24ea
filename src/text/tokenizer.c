#include "text/tokenizer.h"

#include <string.h>

#include "text/split.h"
#include "text/vocab.h"

#define MAX_TEXT ((size_t)INT32_MAX) /* bytes: more than any context holds */

tok_kind tok_kind_of(const tok *t) { return t->kind; }

tok_split tok_split_of(const tok *t) { return t->split; }

int32_t tok_n_vocab(const tok *t) { return t->n_vocab; }

int32_t tok_bos(const tok *t) { return t->bos; }

int32_t tok_eos(const tok *t) { return t->eos; }

int tok_ends(const tok *t, int32_t id[4]) {
    static const char *const name[] = {"<|endoftext|>", "<|return|>", "<|call|>"};
    int n = 0;
    if (t->eos >= 0)
        id[n++] = t->eos;
    for (size_t i = 0; i < ORCD_COUNT(name); i++) {
        int32_t end = tok_special(t, name[i]);
        if (end >= 0 && end != t->eos)
            id[n++] = end;
    }
    return n;
}

bool tok_is_special(const tok *t, int32_t id) { return id < 0 || id >= t->n_vocab || !(t->entry[id].flags & TOK_TEXT); }

int32_t tok_special(const tok *t, const char *text) { return tok_lookup(t, &t->special, text, strlen(text)); }

static orcd_status encode_text(const tok *t, const char *text, size_t len, ids *out) {
    while (len > 0) {
        size_t n = tok_split_next(t->split, (const uint8_t *)text, len);
        int32_t id = n <= t->max_text_len ? tok_lookup(t, &t->text, text, n) : -1;
        if (id >= 0 && (t->entry[id].flags & TOK_WHOLE))
            ids_push(out, id);
        else
            ORCD_TRY(tok_bpe(t, (const uint8_t *)text, n, out));
        text += n;
        len -= n;
    }
    return out->failed ? ORCD_ERR_NOMEM : ORCD_OK;
}

/* The first special in text, the longest that starts there: its position, or len when there is none. */
static size_t find_special(const tok *t, const char *text, size_t len, int32_t *id) {
    for (size_t at = 0; at < len; at++) {
        if (!t->special_lead[(uint8_t)text[at]])
            continue;
        for (size_t i = 0; i < t->n_special_len; i++) {
            if (t->special_len[i] > len - at)
                continue;
            *id = tok_lookup(t, &t->special, text + at, t->special_len[i]);
            if (*id >= 0)
                return at;
        }
    }
    return len;
}

orcd_status tok_encode(const tok *t, const char *text, size_t len, bool specials, ids *out) {
    if (len > MAX_TEXT)
        return ORCD_ERR_LIMIT;
    while (specials && len > 0) {
        int32_t id;
        size_t n = find_special(t, text, len, &id);
        ORCD_TRY(encode_text(t, text, n, out));
        if (n < len) {
            ids_push(out, id);
            n += t->entry[id].len;
        }
        text += n;
        len -= n;
    }
    return encode_text(t, text, len, out);
}

const char *tok_bytes(const tok *t, int32_t id, size_t *len) {
    if (id < 0 || id >= t->n_vocab || !t->entry[id].flags) {
        *len = 0;
        return "";
    }
    *len = t->entry[id].len;
    return t->pool.data + t->entry[id].at;
}

void tok_decode(const tok *t, const int32_t *id, size_t n, bool specials, buf *out) {
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const char *bytes = tok_bytes(t, id[i], &len);
        if (specials || !tok_is_special(t, id[i]))
            buf_add(out, bytes, len);
    }
}
