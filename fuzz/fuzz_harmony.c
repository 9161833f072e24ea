/* Any ids give one stop, last, and deltas of whole characters; a replay of a finished call parses as the same call.
 * Each input byte below 31 is a control token (or an id outside the vocabulary), 31 a line break, the others are
 * themselves. */
#include <stdlib.h>
#include <string.h>

#include "../tests/tokens.h"
#include "text/chat/harmony.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct record {
    buf text;
    int n_stop;
    harmony_stop why;
} record;

static void note(void *ctx, const harmony_event *e) {
    record *r = ctx;
    tok_stream s = {0};
    buf whole = {0};
    if (r->n_stop)
        abort();
    tok_stream_push(&s, e->text, e->len, &whole);
    if (s.n_held || whole.len != e->len || (e->len && memcmp(whole.data, e->text, e->len) != 0))
        abort();
    buf_free(&whole);
    if (e->kind == HARMONY_CALL || e->kind == HARMONY_ARGUMENTS)
        buf_add(&r->text, e->text, e->len);
    r->n_stop += e->kind == HARMONY_STOP;
    r->why = e->stop;
}

static record run(const harmony *h, const ids *v, bool force, ids *replay) {
    chat_tool tool = {.name = chat_str_of("get_it")};
    harmony_parse_options o = {.tool = &tool, .n_tool = 1, .python = true, .force_final = force};
    record r = {0};
    harmony_parser *p;
    if (harmony_parser_open(h, &o, note, &r, &p) != ORCD_OK)
        abort();
    for (size_t i = 0; i < v->n && harmony_feed(p, v->data[i]); i++)
        ;
    harmony_finish(p);
    if (r.n_stop != 1)
        abort();
    if (replay && r.why == HARMONY_STOP_CALL && harmony_replay(p, replay) != ORCD_OK)
        abort();
    harmony_parser_close(p);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static tok *t;
    static harmony *h;
    ids v = {0}, replay = {0};
    if (!t) {
        t = t_tiny();
        if (harmony_open(t, &h, NULL) != ORCD_OK)
            abort();
    }
    for (size_t i = 0; i < size; i++) {
        char c = data[i] == 31 ? '\n' : (char)data[i];
        if (data[i] < 31)
            ids_push(&v, tok_n_vocab(t) - 12 + data[i]);
        else if (tok_encode(t, &c, 1, false, &v) != ORCD_OK)
            abort();
    }
    record first = run(h, &v, size % 2, &replay);
    if (replay.n) {
        record again = run(h, &replay, size % 2, NULL);
        if (again.why != HARMONY_STOP_CALL)
            abort();
        buf_free(&again.text);
    }
    buf_free(&first.text);
    ids_free(&v);
    ids_free(&replay);
    return 0;
}
