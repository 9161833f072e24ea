/* Conversation to token ids. Every message is
 *   <|start|> author [to=recipient] [<|channel|> channel] [type] <|message|> body <|end|> or <|call|>
 * with the control tokens pushed as ids and everything between them encoded as text. */
#include <stdlib.h>

#include "text/chat/parts.h"

typedef struct renderer {
    const harmony *h;
    const chat *c;
    unsigned ref;
    harmony_prompt *out;
    orcd_error *err;
    orcd_status status;
    json_t *call_name; /* call id -> packed place of the call, for results */
    bool *done;        /* [n_message]: results that were emitted beside their calls */
    bool drops;        /* reasoning of messages up to `last_drop` is left out */
    size_t last_drop;
} renderer;

static void control(renderer *r, int32_t id) { ids_push(&r->out->id, id); }

static void text(renderer *r, const char *s, size_t len) {
    orcd_status status = tok_encode(r->h->tok, s ? s : "", len, false, &r->out->id);
    if (r->status == ORCD_OK)
        r->status = status;
}

static void words(renderer *r, const char *s) { text(r, s, strlen(s)); }

/* The end of a message: a place where another prompt may begin to differ. */
static void end(renderer *r, int32_t id) {
    harmony_prompt *p = r->out;
    control(r, id);
    if (p->n_boundary == p->cap_boundary) {
        size_t cap = p->cap_boundary ? 2 * p->cap_boundary : 16;
        size_t *grown = realloc(p->boundary, cap * sizeof *grown);
        if (!grown) {
            r->status = ORCD_ERR_NOMEM;
            return;
        }
        p->boundary = grown;
        p->cap_boundary = cap;
    }
    p->boundary[p->n_boundary++] = p->id.n;
}

static void message(renderer *r, const char *author, const char *channel, chat_str body) {
    control(r, r->h->start);
    words(r, author);
    if (channel) {
        control(r, r->h->channel);
        words(r, channel);
    }
    control(r, r->h->message);
    text(r, body.data, body.len);
    end(r, r->h->end);
}

static void buf_message(renderer *r, const char *author, const buf *b) {
    if (b->failed)
        r->status = ORCD_ERR_NOMEM;
    else
        message(r, author, NULL, (chat_str){b->data, b->len});
}

static void fail_name(renderer *r, const char *what, chat_str name) {
    r->status = orcd_fail(r->err, ORCD_ERR_FORMAT,
                          "%s \"%.*s\" is not a name: 1 to 64 of the characters A-Z a-z 0-9 _ . - are allowed", what,
                          (int)(name.len < 80 ? name.len : 80), name.data ? name.data : "");
}

/* ---- system and developer ---- */

static void system_message(renderer *r) {
    static const char *const effort[] = {"medium", "low", "high"}; /* as chat_effort counts */
    const chat *c = r->c;
    buf b = {0};
    buf_str(&b, "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06");
    if (c->date.len) {
        buf_str(&b, "\nCurrent date: ");
        buf_add(&b, c->date.data, c->date.len);
    }
    buf_printf(&b, "\n\nReasoning: %s\n\n", effort[c->effort]);
    if (c->browser || c->python)
        buf_str(&b, "# Tools\n\n");
    if (c->browser)
        buf_str(&b, harmony_browser_text);
    if (c->python)
        buf_str(&b, harmony_python_text);
    buf_str(&b, "# Valid channels: analysis, commentary, final. Channel must be included for every message.");
    if (c->n_tool)
        buf_str(&b, "\nCalls to these tools must go to the commentary channel: 'functions'.");
    buf_message(r, "system", &b);
    buf_free(&b);
}

/* Each line of a description as a comment. */
static void comment_lines(chat_str s, buf *b) {
    for (size_t at = 0; at < s.len;) {
        const char *newline = memchr(s.data + at, '\n', s.len - at);
        size_t n = newline ? (size_t)(newline - s.data) - at : s.len - at;
        bool cr = newline && n > 0 && s.data[at + n - 1] == '\r';
        buf_str(b, "// ");
        buf_add(b, s.data + at, n - cr);
        buf_char(b, '\n');
        at += n + 1;
    }
}

static void tool(renderer *r, const chat_tool *t, buf *b) {
    if (!harmony_is_name(t->name)) {
        fail_name(r, "the tool's name", t->name);
        return;
    }
    if (t->parameters && !json_is_object(t->parameters) && !json_is_null(t->parameters)) {
        r->status = orcd_fail(r->err, ORCD_ERR_FORMAT, "the parameters of tool \"%.*s\" are not a JSON schema object",
                              (int)t->name.len, t->name.data);
        return;
    }
    comment_lines(t->description, b);
    buf_str(b, "type ");
    buf_add(b, t->name.data, t->name.len);
    bool plain = (r->ref & HARMONY_REF_SCHEMA) != 0;
    if (!json_is_object(t->parameters) || (!plain && harmony_schema_is_empty(t->parameters))) {
        buf_str(b, " = () => any;\n\n");
        return;
    }
    buf_str(b, " = (_: ");
    r->status = harmony_schema(t->parameters, plain, b, r->err);
    buf_str(b, ") => any;\n\n");
}

static void block(buf *b) {
    if (b->len)
        buf_str(b, "\n\n");
}

/* Takes the leading instructions; returns how many messages these were. */
static size_t developer_message(renderer *r) {
    const chat *c = r->c;
    buf b = {0};
    size_t n = 0;
    bool any = false;
    for (; n < c->n_message && c->message[n].role == CHAT_INSTRUCTIONS; n++) {
        if (!c->message[n].text.len)
            continue;
        buf_str(&b, any ? "\n\n" : "# Instructions\n\n");
        buf_add(&b, c->message[n].text.data, c->message[n].text.len);
        any = true;
    }
    if (c->n_tool) {
        block(&b);
        buf_str(&b, "# Tools\n\n## functions\n\nnamespace functions {\n\n");
        for (size_t i = 0; i < c->n_tool && r->status == ORCD_OK; i++)
            tool(r, &c->tool[i], &b);
        buf_str(&b, "} // namespace functions");
    }
    if (c->format) {
        block(&b);
        buf_str(&b, "# Response Formats\n\n## ");
        buf_add(&b, c->format->name.data, c->format->name.len);
        buf_str(&b, "\n\n");
        if (c->format->description.len) {
            buf_str(&b, "// ");
            buf_add(&b, c->format->description.data, c->format->description.len);
            buf_char(&b, '\n');
        }
        compact_json(c->format->schema, &b);
    }
    if (b.len && r->status == ORCD_OK)
        buf_message(r, "developer", &b);
    buf_free(&b);
    return n;
}

/* ---- history ---- */

static bool is_answer(const chat_message *m) { return m->role == CHAT_ASSISTANT && m->n_call == 0 && m->text.len > 0; }

/* Up to which message reasoning is left out. */
static void plan_drops(renderer *r) {
    const chat *c = r->c;
    size_t last = c->n_message, last_said = c->n_message, first = c->n_message;
    for (size_t i = 0; i < c->n_message; i++) {
        const chat_message *m = &c->message[i];
        if (m->role == CHAT_ASSISTANT && (m->n_call || m->text.len || m->reasoning.len))
            last_said = i;
        if (!is_answer(m))
            continue;
        last = i;
        first = first == c->n_message ? i : first;
    }
    bool as_ref = r->ref & HARMONY_REF_HISTORY;
    r->drops = last < c->n_message && (!as_ref || last == last_said);
    r->last_drop = as_ref ? first : last;
}

static bool dropped(const renderer *r, size_t i) { return r->drops && i <= r->last_drop; }

static bool is_builtin(const renderer *r, chat_str name) {
    return harmony_is_builtin(name, r->c->browser, r->c->python);
}

static const char *channel_of(const renderer *r, chat_str name) {
    return is_builtin(r, name) ? "analysis" : "commentary";
}

static void recipient(renderer *r, chat_str name, buf *b) {
    if (!harmony_is_name(name))
        fail_name(r, "the called tool's name", name);
    if (!is_builtin(r, name))
        buf_str(b, "functions.");
    buf_add(b, name.data, name.len);
}

/* A call as the model samples it, or in the order of OpenAI's library. */
static void call_message(renderer *r, const chat_call *k) {
    buf b = {0};
    bool builtin = is_builtin(r, k->name);
    control(r, r->h->start);
    if (r->ref & HARMONY_REF_ORDER) {
        buf_str(&b, "assistant to=");
        recipient(r, k->name, &b);
        text(r, b.data, b.len);
        control(r, r->h->channel);
        buf_clear(&b);
        buf_str(&b, channel_of(r, k->name));
    } else {
        words(r, "assistant");
        control(r, r->h->channel);
        buf_printf(&b, "%s to=", channel_of(r, k->name));
        recipient(r, k->name, &b);
    }
    buf_str(&b, builtin ? " code" : " ");
    text(r, b.data, b.len);
    if (!builtin) {
        control(r, r->h->constrain);
        words(r, "json");
    }
    control(r, r->h->message);
    text(r, k->arguments.data, k->arguments.len);
    end(r, r->h->call);
    if (b.failed)
        r->status = ORCD_ERR_NOMEM;
    buf_free(&b);
}

static void result_message(renderer *r, chat_str name, chat_str body) {
    buf b = {0};
    recipient(r, name, &b);
    buf_str(&b, " to=assistant");
    if (b.failed)
        r->status = ORCD_ERR_NOMEM;
    else
        message(r, b.data, channel_of(r, name), body);
    buf_free(&b);
}

/* Whether the sampled message id[0..n), from after <|start|>assistant, is reasoning without a recipient. */
static bool is_reasoning(const renderer *r, const int32_t *id, size_t n) {
    buf b = {0};
    size_t head = 0;
    while (head < n && id[head] != r->h->message)
        head++;
    tok_decode(r->h->tok, id, head, false, &b);
    bool yes = b.data && strstr(b.data, "analysis") && !strstr(b.data, "to=");
    buf_free(&b);
    return yes;
}

/* A turn exactly as it was sampled, without its reasoning where that is to be dropped. */
static void replay(renderer *r, const chat_call *k, bool drop) {
    const int32_t *id = k->replay, *stop = id + k->n_replay;
    while (id < stop) {
        const int32_t *next = id;
        while (next < stop && *next != r->h->start)
            next++;
        if (!drop || !is_reasoning(r, id, (size_t)(next - id))) {
            control(r, r->h->start);
            if (id == k->replay)
                words(r, "assistant"); /* later messages bring their own author */
            size_t last = (size_t)(next - id) - (next > id);
            ids_add(&r->out->id, id, last);
            if (next > id)
                end(r, id[last]);
        }
        id = next < stop ? next + 1 : stop;
    }
}

/* Results between message `i` and the next of another kind, by call id. */
static json_t *results_after(const chat *c, size_t i) {
    json_t *map = json_object();
    for (size_t k = i + 1; k < c->n_message && c->message[k].role == CHAT_TOOL; k++) {
        chat_str id = c->message[k].call_id;
        json_object_setn_new_nocheck(map, id.data ? id.data : "", id.len, json_integer((json_int_t)k));
    }
    return map;
}

static void assistant_message(renderer *r, size_t i) {
    const chat_message *m = &r->c->message[i];
    bool replayed = false, drop = dropped(r, i), as_ref = r->ref & HARMONY_REF_HISTORY;
    for (size_t k = 0; k < m->n_call; k++)
        replayed = replayed || m->call[k].replay;
    if (m->reasoning.len && !drop && !replayed)
        message(r, "assistant", "analysis", m->reasoning);
    if (m->text.len && !replayed)
        message(r, "assistant", m->n_call ? "commentary" : "final", m->text);
    if (!m->n_call)
        return;
    json_t *results = results_after(r->c, i);
    for (size_t k = 0; k < m->n_call && r->status == ORCD_OK; k++) {
        const chat_call *call = &m->call[k];
        const char *id = call->id.data ? call->id.data : "";
        json_t *at = json_object_getn(results, id, call->id.len);
        bool hidden = drop && as_ref && is_builtin(r, call->name); /* the library drops the whole channel */
        json_object_setn_new_nocheck(r->call_name, id, call->id.len, json_pack("[I,I]", (json_int_t)i, (json_int_t)k));
        if (call->replay)
            replay(r, call, drop);
        else if (!hidden)
            call_message(r, call);
        if (!at)
            continue;
        size_t answer = (size_t)json_integer_value(at);
        if (!hidden)
            result_message(r, call->name, r->c->message[answer].text);
        r->done[answer] = true;
        json_object_deln(results, id, call->id.len);
    }
    json_decref(results);
}

static void late_result(renderer *r, size_t i) {
    const chat_message *m = &r->c->message[i];
    const json_t *at = json_object_getn(r->call_name, m->call_id.data ? m->call_id.data : "", m->call_id.len);
    if (!at) {
        r->status = orcd_fail(r->err, ORCD_ERR_FORMAT,
                              "message %zu answers the call \"%.*s\", which is not in the conversation", i,
                              (int)(m->call_id.len < 80 ? m->call_id.len : 80), m->call_id.data ? m->call_id.data : "");
        return;
    }
    size_t from = (size_t)json_integer_value(json_array_get(at, 0)),
           k = (size_t)json_integer_value(json_array_get(at, 1));
    result_message(r, r->c->message[from].call[k].name, m->text);
}

static void history(renderer *r, size_t first) {
    for (size_t i = first; i < r->c->n_message && r->status == ORCD_OK; i++) {
        const chat_message *m = &r->c->message[i];
        if (m->role == CHAT_USER)
            message(r, "user", NULL, m->text);
        else if (m->role == CHAT_ASSISTANT)
            assistant_message(r, i);
        else if (m->role == CHAT_TOOL && !r->done[i])
            late_result(r, i);
        else if (m->role == CHAT_INSTRUCTIONS && m->text.len) {
            buf b = {0};
            buf_str(&b, "# Instructions\n\n");
            buf_add(&b, m->text.data, m->text.len);
            buf_message(r, "developer", &b);
            buf_free(&b);
        }
    }
}

orcd_status harmony_render(const harmony *h, const chat *c, unsigned ref, harmony_prompt *out, orcd_error *err) {
    renderer r = {.h = h, .c = c, .ref = ref, .out = out, .err = err};
    orcd_fail(err, ORCD_OK, "%s", "");
    r.call_name = json_object();
    r.done = calloc(c->n_message + 1, sizeof *r.done);
    if (!r.call_name || !r.done)
        r.status = ORCD_ERR_NOMEM;
    if (r.status == ORCD_OK) {
        system_message(&r);
        size_t first = developer_message(&r);
        plan_drops(&r);
        history(&r, first);
        control(&r, h->start);
        words(&r, "assistant");
    }
    if (r.status == ORCD_OK && out->id.failed)
        r.status = ORCD_ERR_NOMEM;
    if (r.status != ORCD_OK && err && !err->message[0])
        orcd_fail(err, r.status, "the conversation could not be rendered: %s", orcd_status_name(r.status));
    json_decref(r.call_name);
    free(r.done);
    return r.status;
}

void harmony_prompt_free(harmony_prompt *p) {
    ids_free(&p->id);
    free(p->boundary);
    *p = (harmony_prompt){0};
}
