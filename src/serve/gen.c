#include "serve/gen.h"

#include <stdlib.h>
#include <string.h>

#include "text/stop.h"

struct gen {
    gen_params p;
    eng *engine;
    const tok *tok;
    eng_ticket ticket;
    tok_stream utf8;
    stop_set *stops;
    int stop_matched;
    bool client_gone;
    buf whole, fresh; /* characters just completed; of them, what no stop string can take back */
};

static void gen_free(gen *g) {
    if (!g)
        return;
    stop_close(g->stops);
    buf_free(&g->whole);
    buf_free(&g->fresh);
    free(g);
}

/* Hand over what is certain of the answer's text. */
static void emit_content(gen *g, const eng_token *t) {
    if (!g->fresh.len)
        return;
    const gen_event e = {.kind = GEN_CONTENT, .text = g->fresh.data, .len = g->fresh.len, .token = t};
    if (!g->p.on_event(g->p.ctx, &e))
        g->client_gone = true;
    buf_clear(&g->fresh);
}

static void take_content(gen *g, const char *text, size_t len, const eng_token *t) {
    if (len && g->stop_matched < 0)
        g->stop_matched = stop_push(g->stops, text, len, &g->fresh);
    emit_content(g, t);
}

static eng_verdict on_raw_token(gen *g, const eng_token *t) {
    size_t len = 0;
    const char *bytes = tok_is_special(g->tok, t->id) ? "" : tok_bytes(g->tok, t->id, &len);
    buf_clear(&g->whole);
    tok_stream_push(&g->utf8, bytes, len, &g->whole);
    take_content(g, g->whole.data, g->whole.len, t);
    return (eng_verdict){g->stop_matched >= 0 || g->client_gone ? ENG_END : ENG_GO, NULL, 0};
}

static eng_verdict on_token(void *ctx, const eng_token *t) { return on_raw_token(ctx, t); }

static gen_finish finish_of(const gen *g, const eng_result *r) {
    switch (r->stop) {
    case ENG_STOP_EOS:
        return GEN_FINISH_EOS;
    case ENG_STOP_LENGTH:
        return GEN_FINISH_LENGTH;
    case ENG_STOP_CALLER:
        return g->client_gone ? GEN_FINISH_CANCELLED : GEN_FINISH_STOP;
    case ENG_STOP_CANCELLED:
        return GEN_FINISH_CANCELLED;
    case ENG_STOP_DEADLINE:
        return GEN_FINISH_DEADLINE;
    case ENG_STOP_ERROR:
        break;
    }
    return GEN_FINISH_ERROR;
}

static void on_done(void *ctx, const eng_result *r) {
    gen *g = ctx;
    if (!g->client_gone && r->stop != ENG_STOP_ERROR) {
        buf_clear(&g->whole);
        tok_stream_end(&g->utf8, &g->whole);
        take_content(g, g->whole.data, g->whole.len, NULL);
        stop_flush(g->stops, &g->fresh);
        emit_content(g, NULL);
    }
    const gen_done d = {.finish = finish_of(g, r), .stop_matched = g->stop_matched, .result = r};
    g->p.on_done(g->p.ctx, &d);
    gen_free(g);
}

orcd_status gen_start(eng *e, const gen_params *p, gen **out, orcd_error *err) {
    orcd_status st;
    *out = NULL;
    gen *g = calloc(1, sizeof *g);
    if (!g)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    g->p = *p;
    g->engine = e;
    g->tok = eng_tok(e);
    g->stop_matched = -1;
    if (stop_open(p->stop, p->n_stop, &g->stops) != ORCD_OK) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        goto done;
    }
    eng_request r = p->request;
    r.on_token = on_token;
    r.on_done = on_done;
    r.ctx = g;
    *out = g; /* before submitting: events may come at once */
    ORCD_TRY_GOTO(st, done, eng_submit(e, &r, &g->ticket, err));
    return ORCD_OK;
done:
    *out = NULL;
    gen_free(g);
    return st;
}

void gen_cancel(gen *g) { eng_cancel(g->engine, g->ticket); }
