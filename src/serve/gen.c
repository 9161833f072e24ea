#include "serve/gen.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "text/stop.h"

/* Conversations only: the last LOOP_SPAN tokens are a cycle of at most LOOP_CYCLE tokens, looked for now and then. */
enum { LOOP_SPAN = 2048, LOOP_CYCLE = 512, LOOP_EVERY = 256 };

struct gen {
    gen_params p;
    eng *engine;
    const tok *tok;
    eng_ticket ticket;
    stop_set *stops;
    int stop_matched;
    bool client_gone;
    buf fresh; /* of the answer, what no stop string can take back */

    /* raw text */
    tok_stream utf8;
    buf whole; /* characters just completed */

    /* harmony */
    harmony_parser *parser;
    harmony_mask *mask;
    harmony_stop stop;
    bool stopped; /* the parser has had its last event: see stop */
    bool in_call;
    int n_call;
    char call_id[40];
    ids force;  /* to go on with in place of the token just fed */
    ids bridge; /* out of the reasoning, when its budget is used up */
    bool must_call;
    ids sampled;
    bool looped;
};

static void gen_free(gen *g) {
    if (!g)
        return;
    stop_close(g->stops);
    harmony_mask_close(g->mask);
    harmony_parser_close(g->parser);
    buf_free(&g->whole);
    buf_free(&g->fresh);
    ids_free(&g->force);
    ids_free(&g->bridge);
    ids_free(&g->sampled);
    free(g);
}

static void emit(gen *g, const gen_event *e) {
    if (!g->client_gone && !g->p.on_event(g->p.ctx, e))
        g->client_gone = true;
}

/* ---- the answer's text, through the stop strings ---- */

static void emit_fresh(gen *g) {
    if (g->fresh.len)
        emit(g, &(gen_event){.kind = GEN_CONTENT, .text = g->fresh.data, .len = g->fresh.len});
    buf_clear(&g->fresh);
}

static void take_content(gen *g, const char *text, size_t len) {
    if (len && g->stop_matched < 0)
        g->stop_matched = stop_push(g->stops, text, len, &g->fresh);
    emit_fresh(g);
}

static void flush_content(gen *g) {
    if (g->stop_matched < 0)
        stop_flush(g->stops, &g->fresh);
    emit_fresh(g);
}

/* ---- raw ---- */

static void take_raw(gen *g, const eng_token *t) {
    size_t len = 0;
    bool special = tok_is_special(g->tok, t->id);
    const char *bytes = special ? "" : tok_bytes(g->tok, t->id, &len);
    emit(g, &(gen_event){.kind = GEN_TOKEN, .token = t, .answer = !special});
    buf_clear(&g->whole);
    tok_stream_push(&g->utf8, bytes, len, &g->whole);
    take_content(g, g->whole.data, g->whole.len);
}

static void end_raw(gen *g) {
    buf_clear(&g->whole);
    tok_stream_end(&g->utf8, &g->whole);
    take_content(g, g->whole.data, g->whole.len);
    flush_content(g);
}

/* ---- harmony ---- */

static void begin_call(gen *g, const harmony_event *h) {
    static const char letter[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    size_t n = (size_t)snprintf(g->call_id, sizeof g->call_id, "call_");
    for (int i = 0; i < 24; i++)
        g->call_id[n++] = letter[randombytes_uniform(sizeof letter - 1)];
    g->call_id[n] = '\0';
    flush_content(g);
    g->in_call = true;
    emit(g, &(gen_event){.kind = GEN_TOOL_BEGIN, .tool = g->n_call++, .tool_id = g->call_id, .tool_name = h->text});
}

static void end_message(gen *g) {
    if (g->in_call)
        emit(g, &(gen_event){.kind = GEN_TOOL_END, .tool = g->n_call - 1});
    else
        flush_content(g);
    g->in_call = false;
}

static void on_harmony(void *ctx, const harmony_event *h) {
    gen *g = ctx;
    switch (h->kind) {
    case HARMONY_REASONING:
        emit(g, &(gen_event){.kind = GEN_REASONING, .text = h->text, .len = h->len});
        break;
    case HARMONY_CONTENT: /* stop strings act on answers, not on what is said before a call */
        if (harmony_in_answer(g->parser))
            take_content(g, h->text, h->len);
        else
            emit(g, &(gen_event){.kind = GEN_CONTENT, .text = h->text, .len = h->len});
        break;
    case HARMONY_CALL:
        begin_call(g, h);
        break;
    case HARMONY_ARGUMENTS:
        emit(g, &(gen_event){.kind = GEN_TOOL_ARGS, .text = h->text, .len = h->len, .tool = g->n_call - 1});
        break;
    case HARMONY_MESSAGE_END:
        end_message(g);
        break;
    case HARMONY_FORCE:
        ids_add(&g->force, h->id, h->n_id);
        break;
    case HARMONY_STOP:
        g->stopped = true;
        g->stop = h->stop;
        break;
    }
}

static void take_harmony(gen *g, const eng_token *t) {
    emit(g, &(gen_event){.kind = GEN_TOKEN,
                         .token = t,
                         .answer = harmony_in_answer(g->parser) && !tok_is_special(g->tok, t->id)});
    g->force.n = 0;
    if (g->mask)
        harmony_mask_feed(g->mask, g->parser, t->id);
    harmony_feed(g->parser, t->id);
}

/* The reversed tail's prefix function: LOOP_SPAN tokens whose longest border is b repeat with the period
 * LOOP_SPAN - b. */
static bool is_loop(const int32_t *last) {
    int border[LOOP_SPAN] = {0};
    for (int i = 1, b = 0; i < LOOP_SPAN; i++) {
        while (b > 0 && last[-i] != last[-b])
            b = border[b - 1];
        b += last[-i] == last[-b];
        border[i] = b;
    }
    return LOOP_SPAN - border[LOOP_SPAN - 1] <= LOOP_CYCLE;
}

static bool loops(gen *g, const eng_token *t) {
    ids_push(&g->sampled, t->id);
    size_t n = g->sampled.n;
    if (n >= LOOP_SPAN && n % LOOP_EVERY == 0 && !g->sampled.failed)
        g->looped = is_loop(g->sampled.data + n - 1);
    return g->looped;
}

/* True when the reasoning has to end here: g->bridge leads out of it. */
static bool thought_enough(gen *g) {
    g->bridge.n = 0;
    return g->p.max_reasoning > 0 && harmony_n_reasoning(g->parser) >= (size_t)g->p.max_reasoning &&
           harmony_end_reasoning(g->parser, g->must_call, &g->bridge);
}

static const uint32_t *next_mask(void *ctx) {
    gen *g = ctx;
    return harmony_mask_next(g->mask, g->parser);
}

/* ---- the engine's callbacks ---- */

static eng_verdict on_token(void *ctx, const eng_token *t) {
    gen *g = ctx;
    if (g->parser)
        take_harmony(g, t);
    else
        take_raw(g, t);
    if (g->stop_matched >= 0 || g->client_gone || g->stopped)
        return (eng_verdict){ENG_END, NULL, 0};
    if (g->force.n && !g->force.failed)
        return (eng_verdict){ENG_REPLACE, g->force.data, (int)g->force.n};
    if (g->parser && loops(g, t))
        return (eng_verdict){ENG_END, NULL, 0};
    if (g->parser && !t->forced && thought_enough(g))
        return (eng_verdict){ENG_FORCE, g->bridge.data, (int)g->bridge.n};
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void on_prefill(void *ctx, int32_t done, int32_t total) {
    gen *g = ctx;
    if (g->p.on_running)
        g->p.on_running(g->p.ctx, done, total);
    g->p.on_running = NULL;
}

static void on_prompt(void *ctx, const eng_token *t) {
    gen *g = ctx;
    g->p.on_prompt(g->p.ctx, t);
}

static gen_finish finish_of(const gen *g, const eng_result *r) {
    if (g->client_gone)
        return GEN_FINISH_CANCELLED;
    if (g->stop_matched >= 0)
        return GEN_FINISH_STOP;
    if (g->looped)
        return GEN_FINISH_LENGTH;
    switch (r->stop) {
    case ENG_STOP_EOS:
    case ENG_STOP_CALLER:
        return g->stopped && g->stop == HARMONY_STOP_CALL ? GEN_FINISH_TOOL : GEN_FINISH_EOS;
    case ENG_STOP_LENGTH:
        return GEN_FINISH_LENGTH;
    case ENG_STOP_CANCELLED:
        return GEN_FINISH_CANCELLED;
    case ENG_STOP_DEADLINE:
        return GEN_FINISH_DEADLINE;
    case ENG_STOP_ERROR:
        break;
    }
    return GEN_FINISH_ERROR;
}

static void on_done(void *ctx, const eng_result *result) {
    gen *g = ctx;
    eng_result r = *result;
    ids turn = {0};
    if (g->parser)
        harmony_finish(g->parser);
    else if (r.stop != ENG_STOP_ERROR)
        end_raw(g);
    if (g->stopped && g->stop == HARMONY_STOP_NO_MEMORY && r.stop != ENG_STOP_ERROR) {
        r.stop = ENG_STOP_ERROR;
        orcd_fail(&r.error, ORCD_ERR_NOMEM, "out of memory");
    }
    gen_done d = {.finish = finish_of(g, &r), .stop_matched = g->stop_matched, .looped = g->looped, .result = &r};
    if (g->parser)
        d.n_reasoning = (int32_t)harmony_n_reasoning(g->parser);
    if (d.finish == GEN_FINISH_TOOL && harmony_replay(g->parser, &turn) == ORCD_OK) {
        d.turn = turn.data;
        d.n_turn = turn.n;
    }
    g->p.on_done(g->p.ctx, &d);
    ids_free(&turn);
    gen_free(g);
}

/* ---- start ---- */

static orcd_status open_harmony(gen *g, const gen_params *p, orcd_error *err) {
    if (!p->harmony)
        return ORCD_OK;
    if (harmony_parser_open(p->harmony, &p->parse, on_harmony, g, &g->parser) != ORCD_OK)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    return p->mask ? harmony_mask_open(p->harmony, p->mask, &g->mask, err) : ORCD_OK;
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
    g->must_call = p->mask && !p->mask->final;
    if (stop_open(p->stop, p->n_stop, &g->stops) != ORCD_OK) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        goto done;
    }
    ORCD_TRY_GOTO(st, done, open_harmony(g, p, err));
    eng_request r = p->request;
    r.on_token = on_token;
    r.on_prefill = on_prefill;
    r.on_prompt = p->on_prompt ? on_prompt : NULL;
    r.on_done = on_done;
    r.ctx = g;
    r.mask = g->mask ? next_mask : NULL;
    r.ignore_eos |= g->parser != NULL; /* the parser knows which tokens end what */
    *out = g;                          /* before submitting: events may come at once */
    ORCD_TRY_GOTO(st, done, eng_submit(e, &r, &g->ticket, err));
    return ORCD_OK;
done:
    *out = NULL;
    gen_free(g);
    return st;
}

void gen_cancel(gen *g) { eng_cancel(g->engine, g->ticket); }
