/* Sampled ids to events. Three states, moved by control tokens; what each does where it does not belong is in the
 * functions on_start() to on_stop(). Text is never lost: it becomes reasoning, content or arguments, except the words
 * that a header consists of. */
#include "text/chat/parse.h"

#include <stdlib.h>

#define MAX_EMPTY 8       /* messages without text in one generation: the model runs in circles */
#define MAX_HEADER_IDS 16 /* text after a channel's name without recipient: the body, <|message|> was left out */
#define MAX_NAME 64       /* bytes: what is longer is no name of a tool */
#define MAX_LOOK 4096     /* bytes of header that are looked at again with every id */

typedef enum closing { BY_END, BY_STOP, BY_START, BY_CUT } closing;

static void emit(harmony_parser *p, harmony_event e) {
    if (!e.text)
        e.text = "";
    p->fn(p->ctx, &e);
}

static void stop(harmony_parser *p, harmony_stop why) {
    if (p->state == PARSE_DONE)
        return;
    p->state = PARSE_DONE;
    if (p->pending.len && !p->said_content && p->n_call == 0) { /* what an orphaned call said is the answer */
        emit(p, (harmony_event){.kind = HARMONY_CONTENT, .text = p->pending.data, .len = p->pending.len});
        p->said_content = true;
    }
    emit(p, (harmony_event){.kind = HARMONY_STOP, .stop = why});
}

static void reset(harmony_parser *p, buf *b) {
    p->no_memory = p->no_memory || b->failed;
    buf_clear(b);
}

static void check_memory(harmony_parser *p) {
    if (p->no_memory || p->head.text.failed || p->stray.failed || p->pending.failed || p->args.held.failed ||
        p->fed.failed || p->head_id.failed)
        stop(p, HARMONY_STOP_NO_MEMORY);
}

/* ---- bodies ---- */

static void say(harmony_parser *p, harmony_event_kind kind, const char *text, size_t len) {
    bool *said = kind == HARMONY_REASONING ? &p->said_reasoning : &p->said_content;
    if (len == 0)
        return;
    if (*said && !p->has_text) /* a new message after another one: a paragraph of its own */
        emit(p, (harmony_event){.kind = kind, .text = "\n\n", .len = 2});
    *said = p->has_text = true;
    emit(p, (harmony_event){.kind = kind, .text = text, .len = len});
}

static void emit_arguments(harmony_parser *p) {
    if (p->out.len)
        emit(p, (harmony_event){.kind = HARMONY_ARGUMENTS, .text = p->out.data, .len = p->out.len});
    reset(p, &p->out);
}

static void begin_call(harmony_parser *p, const char *name) {
    p->n_call++;
    snprintf(p->called, sizeof p->called, "%s", name);
    arguments_free(&p->args);
    if (harmony_is_builtin(chat_str_of(name), false, p->tools.python))
        p->args.mode = ARGUMENTS_RAW;
    emit(p, (harmony_event){.kind = HARMONY_CALL, .text = name, .len = strlen(name)});
}

/* With one tool declared, commentary that begins with a brace may be its call: only <|call|> can tell. */
static void settle(harmony_parser *p) {
    char first = p->piece.data[strspn(p->piece.data, " \t\r\n")];
    if (!first)
        return;
    p->route = first == '{' ? ROUTE_HELD : ROUTE_CONTENT;
    if (p->route == ROUTE_CONTENT) {
        say(p, HARMONY_CONTENT, p->pending.data, p->pending.len);
        reset(p, &p->pending);
    }
}

/* The characters in p->piece go where the message goes. */
static void route_piece(harmony_parser *p) {
    if (p->piece.len == 0) {
        reset(p, &p->piece);
        return;
    }
    if (p->route == ROUTE_MAYBE)
        settle(p);
    const char *text = p->piece.data;
    size_t len = p->piece.len;
    switch (p->route) {
    case ROUTE_REASONING:
        say(p, HARMONY_REASONING, text, len);
        break;
    case ROUTE_CONTENT:
        say(p, HARMONY_CONTENT, text, len);
        break;
    case ROUTE_CALL:
        arguments_push(&p->args, text, len, &p->out);
        emit_arguments(p);
        break;
    case ROUTE_MAYBE:
    case ROUTE_HELD:
    case ROUTE_ORPHAN:
        p->has_text = true;
        buf_add(&p->pending, text, len);
        break;
    }
    reset(p, &p->piece);
}

static void body_text(harmony_parser *p, const char *bytes, size_t n) {
    tok_stream_push(&p->utf8, bytes, n, &p->piece);
    route_piece(p);
}

static void release_assistant(harmony_parser *p) {
    if (p->held_assistant)
        body_text(p, "assistant", 9);
    p->held_assistant = false;
}

static void open_body(harmony_parser *p, const header_meaning *m, header_channel channel) {
    bool one_tool = p->tools.n == 1 && !p->tools.browser && !p->tools.python;
    p->state = PARSE_BODY;
    p->in_final = p->has_text = p->held_assistant = false;
    p->last_channel = channel;
    if (m->tool[0] && (m->declared || p->tools.n || p->tools.browser || p->tools.python)) {
        p->route = ROUTE_CALL;
        begin_call(p, m->tool);
    } else if (m->tool[0]) {
        p->route = ROUTE_ORPHAN;
    } else if (channel == CHANNEL_ANALYSIS) {
        p->route = ROUTE_REASONING;
    } else if (one_tool && (channel == CHANNEL_COMMENTARY || (m->channel == CHANNEL_NONE && m->typed))) {
        p->route = ROUTE_MAYBE;
    } else {
        p->route = ROUTE_CONTENT;
        p->in_final = channel == CHANNEL_FINAL;
    }
}

/* The end of a body. A complete call ends the generation. */
static void close_body(harmony_parser *p, closing by, bool by_call) {
    const char *object;
    size_t len;
    bool call = p->route == ROUTE_CALL || p->route == ROUTE_ORPHAN;
    release_assistant(p);
    tok_stream_end(&p->utf8, &p->piece);
    route_piece(p);
    if (p->route == ROUTE_CALL) {
        arguments_finish(&p->args, by == BY_CUT, &p->out);
        emit_arguments(p);
    } else if (p->route == ROUTE_HELD || p->route == ROUTE_MAYBE) {
        call = by_call && arguments_object(p->pending.data, p->pending.len, &object, &len);
        p->has_text = false;
        if (call) {
            begin_call(p, p->tools.name[0]);
            buf_add(&p->out, object, len);
            emit_arguments(p);
        } else {
            say(p, HARMONY_CONTENT, p->pending.data, p->pending.len);
        }
        reset(p, &p->pending);
    }
    p->n_empty += !p->has_text && !call;
    emit(p, (harmony_event){.kind = HARMONY_MESSAGE_END});
    p->state = PARSE_BETWEEN;
    p->in_final = false;
    reset(p, &p->stray);
    if (by == BY_CUT)
        stop(p, HARMONY_STOP_CUT);
    else if (call)
        stop(p, p->n_call ? HARMONY_STOP_CALL : HARMONY_STOP_END);
    else if (by == BY_STOP || p->n_empty > MAX_EMPTY)
        stop(p, HARMONY_STOP_END);
}

/* A whole message whose text is already here. */
static void whole_message(harmony_parser *p, const header_meaning *m, header_channel channel, const char *text,
                          size_t n, closing by, bool by_call) {
    open_body(p, m, channel);
    body_text(p, text, n);
    close_body(p, by, by_call);
}

/* ---- headers ---- */

static void begin_header(harmony_parser *p, bool by_start) {
    header_clear(&p->head);
    header_begin(&p->head, HEADER_ROLE);
    if (!by_start)
        buf_str(&p->head.text, "assistant");
    p->head_id.n = 0;
    p->head_begun = by_start;
    p->head_odd = false;
    p->state = PARSE_HEADER;
    reset(p, &p->stray);
}

static header_channel channel_for(const harmony_parser *p, const header_meaning *m, header_channel otherwise) {
    if (m->channel >= CHANNEL_ANALYSIS)
        return m->channel;
    if (m->tool[0])
        return CHANNEL_COMMENTARY;
    return m->channel == CHANNEL_UNKNOWN && p->last_channel ? p->last_channel : otherwise;
}

/* <|message|> ends the header. */
static void end_header(harmony_parser *p) {
    header_meaning m;
    header_resolve(&p->head, &p->tools, &m);
    if (m.invented) /* it speaks for someone else: nothing after this is its own */
        stop(p, HARMONY_STOP_END);
    else
        open_body(p, &m, channel_for(p, &m, m.channel == CHANNEL_UNKNOWN ? CHANNEL_ANALYSIS : CHANNEL_FINAL));
}

/* The header ends without <|message|>: what it does not use is the body. */
static void broken_header(harmony_parser *p, closing by, bool by_call) {
    header_meaning m;
    header_resolve(&p->head, &p->tools, &m);
    p->state = PARSE_BETWEEN;
    bool half_name = by == BY_CUT && m.channel == CHANNEL_UNKNOWN && header_judge(m.rest, m.n_rest) == STRAY_MAYBE;
    bool bare_call = m.tool[0] && by != BY_START && by != BY_CUT;
    bool ends = by == BY_STOP || by == BY_CUT;
    if (!m.invented && !half_name && (m.n_rest || bare_call))
        whole_message(p, &m, channel_for(p, &m, ends ? CHANNEL_FINAL : CHANNEL_ANALYSIS), m.rest, m.n_rest, by,
                      by_call);
    else if (++p->n_empty > MAX_EMPTY)
        stop(p, HARMONY_STOP_END);
}

/* A body may begin without <|message|>: told by a brace, a line break or much prose after the channel's name. */
static void look_for_body(harmony_parser *p) {
    header_meaning m;
    if ((!p->head_odd && p->head.n_text_ids <= MAX_HEADER_IDS) || p->head.text.len > MAX_LOOK)
        return;
    header_resolve(&p->head, &p->tools, &m);
    bool prose = !m.tool[0] && (m.n_rest > MAX_NAME || (m.n_rest && memchr(m.rest, ' ', m.n_rest)));
    if (m.invented || m.channel < CHANNEL_ANALYSIS || !m.n_rest || (!p->head_odd && !prose))
        return;
    open_body(p, &m, m.channel);
    body_text(p, m.rest, m.n_rest);
}

static void header_text(harmony_parser *p, const char *bytes, size_t n) {
    header_add(&p->head, bytes, n);
    p->head_odd = p->head_odd || memchr(bytes, '{', n) || memchr(bytes, '\n', n);
    look_for_body(p);
}

/* ---- text after <|end|> ---- */

static const header_meaning plain = {.channel = CHANNEL_FINAL, .rest = ""};

static void stray_header(harmony_parser *p) {
    header_clear(&p->head);
    header_begin(&p->head, HEADER_ROLE);
    p->head_id.n = 0;
    p->head_begun = p->head_odd = false;
    p->state = PARSE_HEADER;
    header_text(p, p->stray.data, p->stray.len);
}

static void stray_text(harmony_parser *p, const char *bytes, size_t n) {
    buf_add(&p->stray, bytes, n);
    if (p->stray.failed)
        return;
    header_stray what = header_judge(p->stray.data, p->stray.len);
    if (what == STRAY_BODY) {
        open_body(p, &plain, CHANNEL_FINAL);
        body_text(p, p->stray.data, p->stray.len);
    } else if (what == STRAY_HEADER) {
        stray_header(p);
    }
}

/* A control token comes: a channel's name becomes a header where one can go on, what is only the start of a name is
 * an answer. */
static void flush_stray(harmony_parser *p, bool to_header) {
    header_stray what = p->stray.len ? header_judge(p->stray.data, p->stray.len) : STRAY_BLANK;
    if (what == STRAY_NAME && to_header) {
        stray_header(p);
    } else if (what == STRAY_MAYBE) {
        open_body(p, &plain, CHANNEL_FINAL);
        body_text(p, p->stray.data, p->stray.len);
        close_body(p, BY_END, false);
    }
    reset(p, &p->stray);
}

/* ---- control tokens ---- */

static void on_start(harmony_parser *p) {
    if (p->state == PARSE_HEADER)
        broken_header(p, BY_START, false);
    else if (p->state == PARSE_BODY)
        close_body(p, BY_START, false);
    else
        flush_stray(p, false);
    if (p->state != PARSE_DONE)
        begin_header(p, true);
}

static void on_channel(harmony_parser *p) {
    if (p->state == PARSE_BODY) {
        p->held_assistant = false; /* it was the author of what begins here */
        close_body(p, BY_START, false);
    } else if (p->state == PARSE_BETWEEN) {
        flush_stray(p, true);
    }
    if (p->state == PARSE_DONE)
        return;
    if (p->state != PARSE_HEADER)
        begin_header(p, false);
    header_begin(&p->head, HEADER_CHANNEL);
}

static void on_constrain(harmony_parser *p) {
    if (p->state == PARSE_BETWEEN) {
        flush_stray(p, true);
        if (p->state == PARSE_BETWEEN)
            begin_header(p, false);
    }
    if (p->state == PARSE_HEADER)
        header_begin(&p->head, HEADER_TYPE);
}

static void on_message(harmony_parser *p) {
    if (p->state == PARSE_BETWEEN) {
        flush_stray(p, true);
        if (p->state == PARSE_BETWEEN)
            open_body(p, &plain, CHANNEL_FINAL);
    }
    if (p->state == PARSE_HEADER)
        end_header(p);
}

static void on_end(harmony_parser *p) {
    if (p->state == PARSE_BODY)
        close_body(p, BY_END, false);
    else if (p->state == PARSE_HEADER)
        broken_header(p, BY_END, false);
}

/* True when the model is made to answer instead. */
static bool go_on(harmony_parser *p, size_t skip) {
    if (!p->force_final || p->forced || p->said_content || p->n_call || p->pending.len)
        return false;
    p->forced = true;
    emit(p, (harmony_event){.kind = HARMONY_FORCE, .id = p->force.data + skip, .n_id = p->force.n - skip});
    return true;
}

static void on_stop(harmony_parser *p, bool by_call) {
    size_t skip = 0; /* a message that is open must be ended first */
    if (p->state == PARSE_BODY) {
        if (p->route != ROUTE_REASONING || !go_on(p, 0))
            close_body(p, BY_STOP, by_call);
        return;
    }
    if (p->state == PARSE_HEADER) {
        header_meaning m;
        header_resolve(&p->head, &p->tools, &m);
        bool thought = m.channel == CHANNEL_ANALYSIS && !m.tool[0];
        if (!m.invented && (m.n_rest || m.tool[0]))
            broken_header(p, thought ? BY_END : BY_STOP, by_call);
        if (p->state == PARSE_DONE)
            return;
        p->state = PARSE_BETWEEN;
    } else {
        flush_stray(p, false);
        skip = 1;
    }
    if (!go_on(p, skip))
        stop(p, HARMONY_STOP_END);
}

static void on_text(harmony_parser *p, int32_t id) {
    size_t n;
    const char *bytes = tok_bytes(p->h->tok, id, &n);
    if (p->state == PARSE_HEADER) {
        header_text(p, bytes, n);
    } else if (p->state == PARSE_BETWEEN) {
        stray_text(p, bytes, n);
    } else {
        p->n_reasoning += p->route == ROUTE_REASONING;
        release_assistant(p);
        p->held_assistant = id == p->h->assistant;
        if (!p->held_assistant)
            body_text(p, bytes, n);
    }
}

bool harmony_feed(harmony_parser *p, int32_t id) {
    const harmony *h = p->h;
    if (p->state == PARSE_DONE)
        return false;
    ids_push(&p->fed, id);
    if (p->state == PARSE_HEADER && id != h->start)
        ids_push(&p->head_id, id);
    if (id == h->start)
        on_start(p);
    else if (id == h->channel)
        on_channel(p);
    else if (id == h->constrain)
        on_constrain(p);
    else if (id == h->message)
        on_message(p);
    else if (id == h->end)
        on_end(p);
    else if (harmony_is_stop(h, id))
        on_stop(p, id == h->call);
    else if (!tok_is_special(h->tok, id))
        on_text(p, id);
    check_memory(p);
    return p->state != PARSE_DONE;
}

void harmony_finish(harmony_parser *p) {
    if (p->state == PARSE_BODY)
        close_body(p, BY_CUT, false);
    else if (p->state == PARSE_HEADER)
        broken_header(p, BY_CUT, false);
    else if (p->state == PARSE_BETWEEN)
        flush_stray(p, false);
    stop(p, HARMONY_STOP_CUT);
}

/* ---- the rest of the face ---- */

bool harmony_in_answer(const harmony_parser *p) { return p->state == PARSE_BODY && p->in_final; }

size_t harmony_n_reasoning(const harmony_parser *p) { return p->n_reasoning; }

size_t harmony_n_calls(const harmony_parser *p) { return p->n_call; }

bool harmony_end_reasoning(const harmony_parser *p, bool call, ids *out) {
    if (p->state != PARSE_BODY || p->route != ROUTE_REASONING)
        return false;
    if (!call) {
        ids_add(out, p->force.data, p->force.n);
        return !out->failed;
    }
    const char *recipient = "commentary to=functions";
    ids_push(out, p->h->end);
    ids_push(out, p->h->start);
    bool ok = tok_encode(p->h->tok, "assistant", 9, false, out) == ORCD_OK;
    ids_push(out, p->h->channel);
    return ok && tok_encode(p->h->tok, recipient, strlen(recipient), false, out) == ORCD_OK && !out->failed;
}

orcd_status harmony_replay(const harmony_parser *p, ids *out) {
    if (p->fed.n == 0)
        return ORCD_ERR_ARG;
    ids_add(out, p->fed.data, p->fed.n - 1);
    ids_push(out, p->h->call);
    return out->failed ? ORCD_ERR_NOMEM : ORCD_OK;
}

static bool copy_tools(harmony_parser *p, const harmony_parse_options *o) {
    p->tools = (header_tools){.browser = o->browser, .python = o->python};
    p->tools.name = calloc(o->n_tool + 1, sizeof *p->tools.name);
    if (!p->tools.name)
        return false;
    for (; p->tools.n < o->n_tool; p->tools.n++) {
        chat_str name = o->tool[p->tools.n].name;
        p->tools.name[p->tools.n] = strndup(name.data ? name.data : "", name.len);
        if (!p->tools.name[p->tools.n])
            return false;
    }
    return true;
}

static bool make_force(harmony_parser *p) {
    const harmony *h = p->h;
    ids *v = &p->force;
    ids_push(v, h->end);
    ids_push(v, h->start);
    bool ok = tok_encode(h->tok, "assistant", 9, false, v) == ORCD_OK;
    ids_push(v, h->channel);
    ok = ok && tok_encode(h->tok, "final", 5, false, v) == ORCD_OK;
    ids_push(v, h->message);
    return ok && !v->failed;
}

orcd_status harmony_parser_open(const harmony *h, const harmony_parse_options *o, harmony_on_event fn, void *ctx,
                                harmony_parser **out) {
    harmony_parser *p = calloc(1, sizeof *p);
    *out = NULL;
    if (!p)
        return ORCD_ERR_NOMEM;
    p->h = h;
    p->fn = fn;
    p->ctx = ctx;
    p->force_final = o->force_final;
    if (!copy_tools(p, o) || !make_force(p)) {
        harmony_parser_close(p);
        return ORCD_ERR_NOMEM;
    }
    begin_header(p, false); /* the prompt ended with <|start|>assistant */
    *out = p;
    return ORCD_OK;
}

void harmony_parser_close(harmony_parser *p) {
    if (!p)
        return;
    for (size_t i = 0; i < p->tools.n; i++)
        free(p->tools.name[i]);
    free(p->tools.name);
    ids_free(&p->force);
    header_free(&p->head);
    ids_free(&p->head_id);
    buf_free(&p->stray);
    buf_free(&p->piece);
    buf_free(&p->out);
    buf_free(&p->pending);
    arguments_free(&p->args);
    ids_free(&p->fed);
    free(p);
}
