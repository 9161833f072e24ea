/* Which ids may come next: a header must be one of a few sequences of ids, and a body must not end the generation
 * where the request asks for a call. */
#include <stdlib.h>

#include "text/chat/parse.h"

typedef struct strict_tool { /* whose arguments follow their schema */
    char *name;
    grammar *arguments;
} strict_tool;

struct harmony_mask {
    const harmony *h;
    bool final, preamble;
    int32_t n_vocab;
    ids *form; /* the headers that are allowed, from <|channel|> to <|message|>: reasoning, preamble, ... */
    size_t n_form;
    ids assistant;
    bool is_json; /* the answer follows `run` */
    strict_tool *strict;
    size_t n_strict;
    grammar_run *run; /* of the answer, or of the call that is being written; NULL: there are no grammars */
    size_t n_call;    /* calls that were begun; the last follows `run` if is_strict */
    bool is_strict;
    uint32_t *text; /* ids of text */
    uint32_t *set;  /* what harmony_mask_next returns */
};

static void allow(uint32_t *set, int32_t id) {
    if (id >= 0)
        set[id / 32] |= 1u << id % 32;
}

/* <|channel|> CHANNEL [ to=functions.NAME <|constrain|>json] <|message|>, as a model samples it. */
static orcd_status add_form(harmony_mask *m, const char *channel, const chat_str *tool, bool builtin) {
    ids *v = &m->form[m->n_form++];
    buf b = {0};
    buf_str(&b, channel);
    if (tool) {
        buf_str(&b, builtin ? " to=" : " to=functions.");
        buf_add(&b, tool->data, tool->len);
        buf_str(&b, builtin ? " code" : " ");
    }
    ids_push(v, m->h->channel);
    orcd_status status = b.failed ? ORCD_ERR_NOMEM : tok_encode(m->h->tok, b.data, b.len, false, v);
    if (tool && !builtin && status == ORCD_OK) {
        ids_push(v, m->h->constrain);
        status = tok_encode(m->h->tok, "json", 4, false, v);
    }
    ids_push(v, m->h->message);
    buf_free(&b);
    return v->failed ? ORCD_ERR_NOMEM : status;
}

static orcd_status open_grammars(harmony_mask *m, const harmony_mask_options *o) {
    grammar *first = o->answer;
    m->is_json = o->answer != NULL;
    m->strict = calloc(o->n_name + 1, sizeof *m->strict);
    if (!m->strict)
        return ORCD_ERR_NOMEM;
    for (size_t i = 0; o->arguments && i < o->n_name; i++) {
        if (!o->arguments[i])
            continue;
        strict_tool *t = &m->strict[m->n_strict++];
        *t = (strict_tool){strndup(o->name[i].data, o->name[i].len), grammar_share(o->arguments[i])};
        if (!t->name)
            return ORCD_ERR_NOMEM;
        first = first ? first : t->arguments;
    }
    return first ? grammar_run_open(first, o->vocab, &m->run) : ORCD_OK;
}

orcd_status harmony_mask_open(const harmony *h, const harmony_mask_options *o, harmony_mask **out, orcd_error *err) {
    harmony_mask *m = calloc(1, sizeof *m);
    orcd_status status = ORCD_ERR_NOMEM;
    *out = NULL;
    if (!m)
        goto done;
    if (o->n_vocab < tok_n_vocab(h->tok)) {
        status = ORCD_ERR_ARG;
        goto done;
    }
    *m = (harmony_mask){.h = h, .final = o->final, .preamble = o->preamble, .n_vocab = o->n_vocab};
    size_t n_word = ((size_t)o->n_vocab + 31) / 32;
    m->form = calloc(o->n_name + 3, sizeof *m->form);
    m->text = calloc(n_word, sizeof *m->text);
    m->set = calloc(n_word, sizeof *m->set);
    if (!m->form || !m->text || !m->set)
        goto done;
    for (int32_t id = 0; id < tok_n_vocab(h->tok); id++)
        if (!tok_is_special(h->tok, id))
            allow(m->text, id);
    ORCD_TRY_GOTO(status, done, tok_encode(h->tok, "assistant", 9, false, &m->assistant));
    ORCD_TRY_GOTO(status, done, add_form(m, "analysis", NULL, false));
    if (o->preamble)
        ORCD_TRY_GOTO(status, done, add_form(m, "commentary", NULL, false));
    if (o->final)
        ORCD_TRY_GOTO(status, done, add_form(m, "final", NULL, false));
    for (size_t i = 0; i < o->n_name; i++) {
        bool builtin = harmony_is_builtin(o->name[i], true, true);
        ORCD_TRY_GOTO(status, done, add_form(m, builtin ? "analysis" : "commentary", &o->name[i], builtin));
    }
    ORCD_TRY_GOTO(status, done, open_grammars(m, o));
    *out = m;
    m = NULL;
done:
    if (status != ORCD_OK)
        orcd_fail(err, status, "the choice of tools could not be prepared: %s", orcd_status_name(status));
    harmony_mask_close(m);
    return status;
}

void harmony_mask_close(harmony_mask *m) {
    if (!m)
        return;
    for (size_t i = 0; m->form && i < m->n_form; i++)
        ids_free(&m->form[i]);
    free(m->form);
    ids_free(&m->assistant);
    for (size_t i = 0; i < m->n_strict; i++) {
        free(m->strict[i].name);
        grammar_close(m->strict[i].arguments);
    }
    free(m->strict);
    grammar_run_close(m->run);
    free(m->text);
    free(m->set);
    free(m);
}

/* Allow what continues head[0..n) towards `first` then `then`; false when it leads elsewhere. */
static bool allow_next(harmony_mask *m, const int32_t *head, size_t n, const ids *first, const ids *then) {
    size_t n_first = first ? first->n : 0;
    for (size_t i = 0; i < n; i++) {
        size_t k = i - n_first;
        if (i < n_first ? head[i] != first->data[i] : k >= then->n || head[i] != then->data[k])
            return false;
    }
    if (n - n_first == then->n)
        return false;
    allow(m->set, n < n_first ? first->data[n] : then->data[n - n_first]);
    return true;
}

/* A call that must come is not put off for ever: it may follow one reasoning and one preamble. */
static bool is_spent(const harmony_mask *m, const harmony_parser *p, size_t form) {
    return !m->final && ((form == 0 && p->said_reasoning) || (form == 1 && m->preamble && p->said_content));
}

/* What is being written follows m->run. */
static bool is_ruled(harmony_mask *m, const harmony_parser *p) {
    if (m->is_json && harmony_in_answer(p))
        return true;
    if (m->n_call != p->n_call) {
        m->n_call = p->n_call;
        m->is_strict = false;
        for (size_t i = 0; i < m->n_strict && !m->is_strict; i++)
            if (strcmp(m->strict[i].name, p->called) == 0) {
                grammar_run_restart(m->run, m->strict[i].arguments);
                m->is_strict = true;
            }
    }
    return m->is_strict && p->state == PARSE_BODY && p->route == ROUTE_CALL;
}

void harmony_mask_feed(harmony_mask *m, const harmony_parser *p, int32_t id) {
    size_t len;
    const char *bytes = tok_bytes(m->h->tok, id, &len);
    if (is_ruled(m, p) && !tok_is_special(m->h->tok, id))
        grammar_run_feed(m->run, bytes, len);
}

const uint32_t *harmony_mask_next(harmony_mask *m, const harmony_parser *p) {
    size_t n_word = ((size_t)m->n_vocab + 31) / 32;
    memset(m->set, 0, n_word * sizeof *m->set);
    if (p->state == PARSE_HEADER) {
        bool any = false;
        for (size_t i = 0; i < m->n_form; i++)
            any |= !is_spent(m, p, i) &&
                   allow_next(m, p->head_id.data, p->head_id.n, p->head_begun ? &m->assistant : NULL, &m->form[i]);
        if (!any) /* injected ids led astray */
            allow(m->set, m->h->message);
    } else if (p->state == PARSE_BETWEEN) {
        allow(m->set, m->h->start);
        if (m->final && p->said_content)
            allow(m->set, m->h->ret);
    } else if (is_ruled(m, p)) {
        memcpy(m->set, grammar_run_mask(m->run), n_word * sizeof *m->set);
        if (grammar_run_complete(m->run))
            allow(m->set, p->route == ROUTE_CALL ? m->h->call : m->h->ret);
    } else {
        memcpy(m->set, m->text, n_word * sizeof *m->set);
        allow(m->set, m->h->end);
        if (p->route == ROUTE_CALL)
            allow(m->set, m->h->call);
        else if (m->final && p->route != ROUTE_REASONING)
            allow(m->set, m->h->ret);
    }
    return m->set;
}
