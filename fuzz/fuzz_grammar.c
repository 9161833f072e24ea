/* Any schema is refused or compiled soon; what its masks lead to is JSON. Input: a schema, a zero byte, and bytes that
 * choose among the tokens that may come. */
#include <stdlib.h>
#include <string.h>

#include "../tests/tokens.h"
#include "text/grammar/grammar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The n-th of the ids that may come, counted round and round; -1 when there is none. */
static int32_t choose(const uint32_t *mask, int32_t n_vocab, int n) {
    int32_t id = -1;
    for (int round = 0; n >= 0 && round < 256; round++) {
        int before = n;
        for (int32_t k = 0; k < n_vocab && n >= 0; k++)
            if (mask[k / 32] >> k % 32 & 1) {
                id = k;
                n--;
            }
        if (before == n)
            return -1;
    }
    return id;
}

static void spell(grammar *g, const grammar_vocab *v, const tok *t, const uint8_t *data, size_t size) {
    grammar_run *r;
    buf text = {0};
    if (grammar_run_open(g, v, &r) != ORCD_OK)
        abort();
    for (size_t i = 0; i < size && i < 200; i++) {
        size_t len;
        int32_t id = choose(grammar_run_mask(r), tok_n_vocab(t), data[i]);
        if (id < 0)
            break;
        const char *bytes = tok_bytes(t, id, &len);
        if (!grammar_run_feed(r, bytes, len))
            abort();
        buf_add(&text, bytes, len);
    }
    if (grammar_run_complete(r)) {
        json_t *value = json_loadb(text.data, text.len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        if (!value)
            abort();
        json_decref(value);
    }
    buf_free(&text);
    grammar_run_close(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static tok *t;
    static grammar_vocab *v;
    grammar *g;
    const uint8_t *end = memchr(data, 0, size);
    size_t n = end ? (size_t)(end - data) : size;
    if (!t)
        t = t_tiny();
    if (!v && grammar_vocab_open(t, tok_n_vocab(t), &v) != ORCD_OK)
        abort();
    json_t *schema = json_loadb((const char *)data, n, JSON_DECODE_ANY, NULL);
    if (schema && grammar_compile(schema, &g, NULL) == ORCD_OK) {
        spell(g, v, t, data + n, size - n);
        grammar_close(g);
    }
    json_decref(schema);
    return 0;
}
