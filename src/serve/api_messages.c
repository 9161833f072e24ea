/* Anthropic's messages: blocks in, blocks out. Blocks are built from the events of the generation whether or not the
 * client streams, so that both answers are the same. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/chat_request.h"

/* Claude Code writes a line about itself here that changes with every request: it would spoil the prefix cache. */
#define BILLING "x-anthropic-billing-header"

typedef struct messages {
    chat_request chat;
    json_t *kept;      /* array of JSON that chat points into and the body does not hold */
    const char *model; /* as the client named it: an alias of the one model */

    /* the answer; engine thread, then desk */
    json_t *content; /* finished blocks */
    gen_kind open;   /* of the block in progress; GEN_TOKEN: none */
    char signature[40], tool_id[48], tool_name[80];
    buf text;
} messages;

typedef struct options {
    double temperature, top_p;
    int64_t top_k, max_tokens;
    bool stream;
} options;

#define AT(member) offsetof(options, member), FIELD_NO_FLAG

static const field table[] = {
    {"temperature", FIELD_NUM, 0, 2, AT(temperature), false}, {"top_p", FIELD_NUM, 0, 1, AT(top_p), false},
    {"top_k", FIELD_INT, -1, 1e9, AT(top_k), false},          {"max_tokens", FIELD_INT, 1, 1e9, AT(max_tokens), true},
    {"stream", FIELD_BOOL, 0, 0, AT(stream), false},          {0},
};

static const field thinking_table[] = {
    {"budget_tokens", FIELD_INT, 1, 1e9, offsetof(chat_request, max_reasoning), FIELD_NO_FLAG, false}, {0}};

static const char *str_of(const json_t *o, const char *name) { return json_string_value(json_object_get(o, name)); }
static chat_str text_of(const json_t *o, const char *name) { return chat_json_str(json_object_get(o, name)); }
static bool is(const json_t *o, const char *name, const char *word) {
    const char *s = str_of(o, name);
    return s && strcmp(s, word) == 0;
}

/* ---- reading ---- */

/* Calls are toolu_X to clients and call_X to the rest of the server. */
static chat_str call_id(messages *q, const json_t *v, const char *name, req_error *err) {
    chat_str id = text_of(v, name);
    if (id.len < 6 || memcmp(id.data, "toolu_", 6) != 0)
        return id;
    char *kept = chat_keep(&q->chat, id.len, err);
    if (kept)
        snprintf(kept, id.len, "call_%s", id.data + 6);
    return chat_str_of(kept);
}

static bool no_memory(req_error *err) { return req_fail(err, 503, "out_of_memory", NULL, "out of memory"); }

/* Text blocks joined; `v` may be a string. */
static bool read_system(messages *q, const json_t *v, req_error *err) {
    size_t i;
    json_t *block;
    if (!v || json_is_null(v))
        return true;
    if (!json_is_string(v) && !json_is_array(v))
        return req_fail(err, 400, "invalid_type", "system", "system must be a string or an array of text blocks");
    json_t *kept = json_array();
    if (json_is_string(v))
        json_array_append(kept, (json_t *)(uintptr_t)v);
    json_array_foreach(v, i, block) {
        const char *text = str_of(block, "text");
        if (!text || strncmp(text, BILLING, strlen(BILLING)) != 0)
            json_array_append(kept, block);
    }
    if (json_array_append_new(q->kept, kept) != 0)
        return no_memory(err);
    json_array_foreach(kept, i, block) { /* a message each: the renderer joins them with an empty line between */
        chat_message *m = chat_add_message(&q->chat, CHAT_INSTRUCTIONS, err);
        if (!m)
            return false;
        m->text = json_is_string(block) ? chat_json_str(block) : text_of(block, "text");
        if (!m->text.data)
            return req_fail(err, 400, "invalid_value", "system", "system[%zu] is no text block", i);
    }
    return true;
}

/* What a tool gave: a string, blocks of text, or nothing. Blocks of other types are named, not shown. */
static bool read_result(messages *q, const json_t *v, const char *where, req_error *err) {
    const json_t *content = json_object_get(v, "content");
    size_t i;
    json_t *part;
    json_t *parts = json_array();
    chat_message *m = chat_add_message(&q->chat, CHAT_TOOL, err);
    if (!m || !parts || json_array_append_new(q->kept, parts) != 0)
        return m ? no_memory(err) : false;
    if (json_is_true(json_object_get(v, "is_error")))
        json_array_append_new(parts, json_string("Error: "));
    if (json_is_string(content))
        json_array_append(parts, (json_t *)(uintptr_t)content);
    json_array_foreach(content, i, part) {
        const char *type = str_of(part, "type");
        if (json_is_string(part) || json_is_string(json_object_get(part, "text")))
            json_array_append(parts, part);
        else
            json_array_append_new(parts, json_sprintf("[%.40s: this model reads text only]", type ? type : "?"));
    }
    m->call_id = call_id(q, v, "tool_use_id", err);
    if (!m->call_id.data)
        return req_fail(err, 400, "missing_required_parameter", where, "%s.tool_use_id is required", where);
    return chat_read_text(&q->chat, parts, where, &m->text, err);
}

static bool read_tool_use(const job *j, messages *q, const json_t *v, const char *where, chat_call *call,
                          req_error *err) {
    char *text = json_dumps(json_object_get(v, "input"), JSON_COMPACT | JSON_ENCODE_ANY);
    json_t *kept = json_string(text ? text : "{}");
    free(text);
    if (!kept || json_array_append_new(q->kept, kept) != 0)
        return no_memory(err);
    *call = (chat_call){.id = call_id(q, v, "id", err), .name = text_of(v, "name"), .arguments = chat_json_str(kept)};
    if (!call->id.data || !call->name.data)
        return req_fail(err, 400, "missing_required_parameter", where, "%s needs id and name", where);
    chat_recall(j, &q->chat, call);
    return true;
}

/* Blocks of one message, in order: text joins, thinking becomes reasoning, results become messages of their own. */
typedef struct reader {
    chat_role role;
    json_t *text, *thinking; /* arrays of parts */
    chat_call *call;
    size_t n_call;
} reader;

static bool read_block(const job *j, messages *q, const json_t *v, const char *where, reader *r, req_error *err) {
    if (json_is_string(json_object_get(v, "text")) && is(v, "type", "text"))
        return json_array_append(r->text, (json_t *)(uintptr_t)v) == 0 || no_memory(err);
    if (is(v, "type", "tool_result"))
        return read_result(q, v, where, err);
    if (is(v, "type", "thinking") && r->role == CHAT_ASSISTANT)
        return json_array_append(r->thinking, json_object_get(v, "thinking")) == 0 ||
               req_fail(err, 400, "invalid_value", where, "%s.thinking must be a string", where);
    if (is(v, "type", "redacted_thinking"))
        return true;
    if (is(v, "type", "tool_use") && r->role == CHAT_ASSISTANT)
        return read_tool_use(j, q, v, where, &r->call[r->n_call++], err);
    const char *type = str_of(v, "type");
    return req_fail(err, 400, "unsupported_content", where, "%s has the type \"%.40s\"; this model takes text only",
                    where, type ? type : "?");
}

static bool read_blocks(const job *j, messages *q, const json_t *content, const char *where, reader *r,
                        req_error *err) {
    size_t i;
    json_t *v;
    char at[96];
    if (json_is_string(content))
        return json_array_append(r->text, (json_t *)(uintptr_t)content) == 0 || no_memory(err);
    if (!json_is_array(content) || json_array_size(content) > CHAT_MAX_MESSAGES)
        return req_fail(err, 400, "invalid_type", where, "%s.content must be a string or an array of blocks", where);
    r->call = chat_keep(&q->chat, (json_array_size(content) + 1) * sizeof *r->call, err);
    if (!r->call)
        return false;
    json_array_foreach(content, i, v) {
        snprintf(at, sizeof at, "%s.content[%zu]", where, i);
        if (!read_block(j, q, v, at, r, err))
            return false;
    }
    return true;
}

static bool read_message(const job *j, messages *q, const json_t *v, size_t i, req_error *err) {
    char where[40];
    reader r = {.text = json_array(), .thinking = json_array()};
    snprintf(where, sizeof where, "messages[%zu]", i);
    if (!r.text || !r.thinking || json_array_append_new(q->kept, r.text) != 0 ||
        json_array_append_new(q->kept, r.thinking) != 0)
        return no_memory(err);
    if (is(v, "role", "user"))
        r.role = CHAT_USER;
    else if (is(v, "role", "assistant"))
        r.role = CHAT_ASSISTANT;
    else if (is(v, "role", "system"))
        r.role = CHAT_INSTRUCTIONS;
    else
        return req_fail(err, 400, "invalid_value", where, "%s.role must be user or assistant", where);
    size_t before = q->chat.n_message;
    if (!read_blocks(j, q, json_object_get(v, "content"), where, &r, err))
        return false;
    bool silent = json_array_size(r.text) == 0 && json_array_size(r.thinking) == 0 && r.n_call == 0;
    if (silent && q->chat.n_message > before) /* results alone */
        return true;
    chat_message *m = chat_add_message(&q->chat, r.role, err);
    if (!m)
        return false;
    m->call = r.call;
    m->n_call = r.n_call;
    return chat_read_text(&q->chat, r.text, where, &m->text, err) &&
           (json_array_size(r.thinking) == 0 || chat_read_text(&q->chat, r.thinking, where, &m->reasoning, err));
}

static bool read_messages(const job *j, messages *q, req_error *err) {
    const json_t *list = json_object_get(j->body, "messages");
    size_t n = json_array_size(list);
    if (!json_is_array(list) || n == 0 || n > CHAT_MAX_MESSAGES)
        return req_fail(err, 400, "invalid_type", "messages", "messages must be an array of 1 to %d messages",
                        CHAT_MAX_MESSAGES);
    for (size_t i = 0; i < n; i++)
        if (!read_message(j, q, json_array_get(list, i), i, err))
            return false;
    return true;
}

/* Tools of Anthropic's own types (web search, ...) run on their servers: left out, with a line in the log. */
static bool read_tools(const job *j, messages *q, req_error *err) {
    const json_t *list = json_object_get(j->body, "tools");
    size_t i;
    json_t *v;
    if (list && !json_is_null(list) && (!json_is_array(list) || json_array_size(list) > CHAT_MAX_TOOLS))
        return req_fail(err, 400, "invalid_type", "tools", "tools must be an array of at most %d tools",
                        CHAT_MAX_TOOLS);
    json_array_foreach(list, i, v) {
        const char *type = str_of(v, "type");
        if (type && strcmp(type, "custom") != 0 && !json_object_get(v, "input_schema")) {
            log_event(&j->s->p.log, "ignored", "s:s, s:s, s:s, s:s", "api", "messages", "job_id", j->id, "what", "tool",
                      "type", type);
            continue;
        }
        chat_tool *t = chat_add_tool(&q->chat, err);
        if (!t)
            return false;
        const json_t *schema = json_object_get(v, "input_schema");
        *t = (chat_tool){.name = text_of(v, "name"),
                         .description = text_of(v, "description"),
                         .parameters = json_is_object(schema) ? schema : NULL,
                         .strict = json_is_true(json_object_get(v, "strict"))};
        if (!t->name.data)
            return req_fail(err, 400, "missing_required_parameter", "tools", "tools[%zu].name is required", i);
    }
    return true;
}

static bool read_choice(const job *j, messages *q, req_error *err) {
    const json_t *v = json_object_get(j->body, "tool_choice");
    if (!v || json_is_null(v) || is(v, "type", "auto"))
        return true;
    if (is(v, "type", "none")) {
        q->chat.choice = TOOL_NONE;
        return true;
    }
    q->chat.choice = TOOL_REQUIRED;
    if (is(v, "type", "any"))
        return true;
    if (is(v, "type", "tool") && str_of(v, "name"))
        return chat_allow(&q->chat, text_of(v, "name"), err);
    return req_fail(err, 400, "invalid_value", "tool_choice", "tool_choice.type must be auto, any, none or tool");
}

/* The model always thinks; as with Anthropic's, it is shown only to those who ask for it. */
static bool read_thinking(const job *j, messages *q, req_error *err) {
    const json_t *v = json_object_get(j->body, "thinking"), *config = json_object_get(j->body, "output_config");
    const char *effort = str_of(config, "effort");
    const json_t *format = json_object_get(config, "format");
    q->chat.hide_reasoning = !json_is_object(v) || is(v, "type", "disabled") || is(v, "display", "omitted");
    if (!chat_read_format(&q->chat, format, "output_config.format", err))
        return false;
    if (is(v, "type", "disabled"))
        q->chat.effort = CHAT_EFFORT_LOW;
    if (effort && !chat_effort_of(effort, &q->chat.effort))
        return req_fail(err, 400, "invalid_value", "output_config.effort",
                        "output_config.effort must be one of low, medium, high, xhigh, max");
    return req_fields(v, thinking_table, &q->chat, err);
}

static bool read_stops(const job *j, messages *q, req_error *err) {
    size_t i;
    json_t *v;
    json_array_foreach(json_object_get(j->body, "stop_sequences"), i, v) {
        size_t n = json_string_length(v);
        if (n < 1 || n > MAX_STOP_BYTES || i >= MAX_STOPS || strlen(json_string_value(v)) != n)
            return req_fail(err, 400, "invalid_value", "stop_sequences",
                            "stop_sequences takes at most %d strings of 1 to %d bytes", MAX_STOPS, MAX_STOP_BYTES);
        q->chat.o.stop[q->chat.o.n_stop++] = json_string_value(v);
    }
    return true;
}

static bool read_request(const job *j, messages *q, bool count, req_error *err) {
    options o = {.temperature = 1, .top_p = 1};
    json_t *body = j->body;
    q->kept = json_array();
    q->content = json_array();
    if (count && !json_object_get(body, "max_tokens"))
        json_object_set_new(body, "max_tokens", json_integer(1));
    if (!q->kept || !q->content)
        return no_memory(err);
    if (!req_fields(body, table, &o, err))
        return false;
    q->model = str_of(body, "model");
    q->model = q->model ? q->model : j->s->p.model_id;
    q->open = GEN_TOKEN;
    q->chat.top_logprobs = -1;
    q->chat.o = (req_options){.temperature = o.temperature,
                              .top_p = o.top_p,
                              .top_k = o.top_k,
                              .repetition_penalty = 1,
                              .n = 1,
                              .max_tokens = o.max_tokens,
                              .stream = o.stream};
    return read_thinking(j, q, err) && read_stops(j, q, err) && read_system(q, json_object_get(body, "system"), err) &&
           read_tools(j, q, err) && read_choice(j, q, err) && read_messages(j, q, err);
}

static void refuse(job *j, const req_error *e) { job_refuse(j, e->status, e->code, NULL, e->message); }

/* The request at j->data, or NULL after refusing. */
static messages *read_body(job *j, bool count) {
    req_error err = {0};
    size_t len;
    const char *text = http_body(j->x, &len);
    messages *q = j->data = calloc(1, sizeof *q);
    if (!q) {
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
        return NULL;
    }
    job_make_id(j->id, sizeof j->id, "msg_");
    j->body = req_parse(text, len, &err);
    if (j->body && read_request(j, q, count, &err))
        return q;
    refuse(j, &err);
    return NULL;
}

static void begin(job *j) {
    messages *q = read_body(j, false);
    if (q)
        chat_start(j, &q->chat, "messages");
}

static void count_begin(job *j) {
    size_t n;
    messages *q = read_body(j, true);
    if (q && chat_count(j, &q->chat, "messages", &n))
        job_answer(j, 200, json_pack("{s:I}", "input_tokens", (json_int_t)n));
}

/* ---- writing ---- */

static json_t *usage(int64_t in, int64_t cached, int64_t out) {
    return json_pack("{s:I, s:I, s:I, s:I}", "input_tokens", (json_int_t)(in - cached), "cache_creation_input_tokens",
                     (json_int_t)0, "cache_read_input_tokens", (json_int_t)cached, "output_tokens", (json_int_t)out);
}

static json_t *message(const job *j, json_t *content, json_t *used) {
    const messages *q = j->data;
    return json_pack("{s:s, s:s, s:s, s:s, s:o, s:n, s:n, s:o}", "id", j->id, "type", "message", "role", "assistant",
                     "model", q->model, "content", content, "stop_reason", "stop_sequence", "usage", used);
}

static void send(job *j, const char *type, json_t *o) {
    if (j->stream) {
        json_object_set_new(o, "type", json_string(type));
        job_send_json(j, type, o);
    } else
        json_decref(o);
}

static void send_at(job *j, const char *type, const char *name, json_t *value) {
    const messages *q = j->data;
    send(j, type, json_pack("{s:I, s:o*}", "index", (json_int_t)json_array_size(q->content), name ? name : "-", value));
}

/* Before the first event: what is known of the prompt is how much of it was computed before. */
static void running(choice *c) {
    json_t *m = message(c->job, json_array(), usage(c->result.n_prompt, c->result.n_cached, 0));
    send(c->job, "message_start", json_pack("{s:o}", "message", m));
    send(c->job, "ping", json_object());
}

static json_t *text_json(const buf *b) { return json_stringn(b->data ? b->data : "", b->len); }

/* The open block: as it begins, or whole. */
static json_t *block(const messages *q, bool whole) {
    json_t *text = whole ? text_json(&q->text) : json_string("");
    if (q->open == GEN_CONTENT)
        return json_pack("{s:s, s:o}", "type", "text", "text", text);
    if (q->open == GEN_REASONING)
        return json_pack("{s:s, s:o, s:s}", "type", "thinking", "thinking", text, "signature",
                         whole ? q->signature : "");
    json_t *input =
        whole ? json_loadb(q->text.data ? q->text.data : "{}", q->text.data ? q->text.len : 2, 0, NULL) : json_object();
    json_decref(text);
    return json_pack("{s:s, s:s, s:s, s:o}", "type", "tool_use", "id", q->tool_id, "name", q->tool_name, "input",
                     input ? input : json_object()); /* cut arguments are no JSON */
}

static void open_block(job *j, gen_kind kind) {
    messages *q = j->data;
    q->open = kind;
    buf_clear(&q->text);
    job_make_id(q->signature, sizeof q->signature, "orcd");
    send_at(j, "content_block_start", "content_block", block(q, false));
}

static void close_block(job *j) {
    messages *q = j->data;
    if (q->open == GEN_TOKEN)
        return;
    if (q->open == GEN_REASONING)
        send_at(j, "content_block_delta", "delta",
                json_pack("{s:s, s:s}", "type", "signature_delta", "signature", q->signature));
    send_at(j, "content_block_stop", NULL, NULL);
    json_array_append_new(q->content, block(q, true));
    q->open = GEN_TOKEN;
}

static void more(job *j, gen_kind kind, const char *type, const char *name, const gen_event *e) {
    messages *q = j->data;
    if (q->open != kind) {
        close_block(j);
        open_block(j, kind);
    }
    buf_add(&q->text, e->text, e->len);
    send_at(j, "content_block_delta", "delta", json_pack("{s:s, s:s%}", "type", type, name, e->text, e->len));
}

static void event(choice *c, const gen_event *e) {
    job *j = c->job;
    messages *q = j->data;
    switch (e->kind) {
    case GEN_CONTENT:
        more(j, GEN_CONTENT, "text_delta", "text", e);
        break;
    case GEN_REASONING:
        if (!q->chat.hide_reasoning)
            more(j, GEN_REASONING, "thinking_delta", "thinking", e);
        break;
    case GEN_TOOL_BEGIN:
        close_block(j);
        snprintf(q->tool_id, sizeof q->tool_id, "toolu_%s", e->tool_id + strlen("call_"));
        snprintf(q->tool_name, sizeof q->tool_name, "%s", e->tool_name);
        open_block(j, GEN_TOOL_ARGS);
        break;
    case GEN_TOOL_ARGS:
        more(j, GEN_TOOL_ARGS, "input_json_delta", "partial_json", e);
        break;
    case GEN_TOOL_END:
    case GEN_TOKEN:
        break;
    }
}

static void ended(choice *c) { close_block(c->job); }

static void finish(job *j) {
    messages *q = j->data;
    job_failure f;
    choice *c = &j->choice[0];
    job_usage u = job_count(j);
    if (job_failed(c, &f)) {
        if (j->stream)
            job_send_json(j, "error", http_error_json(HTTP_ERR_ANTHROPIC, f.status, NULL, NULL, NULL, f.message));
        else
            http_reply_error(j->x, f.status, NULL, NULL, NULL, f.message);
        return;
    }
    const char *reason = c->done.finish == GEN_FINISH_LENGTH ? "max_tokens"
                         : c->done.finish == GEN_FINISH_TOOL ? "tool_use"
                         : c->done.finish == GEN_FINISH_STOP ? "stop_sequence"
                                                             : "end_turn";
    const char *stop = c->done.stop_matched >= 0 ? q->chat.o.stop[c->done.stop_matched] : NULL;
    json_t *used = usage(u.in, u.cached, u.out);
    if (j->stream) {
        send(j, "message_delta",
             json_pack("{s:{s:s, s:s?}, s:o}", "delta", "stop_reason", reason, "stop_sequence", stop, "usage", used));
        send(j, "message_stop", json_object());
        return;
    }
    json_t *m = message(j, json_incref(q->content), used);
    json_object_set_new(m, "stop_reason", json_string(reason));
    json_object_set_new(m, "stop_sequence", stop ? json_string(stop) : json_null());
    http_reply_json(j->x, 200, m, NULL);
}

static void free_data(job *j) {
    messages *q = j->data;
    if (!q)
        return;
    chat_request_free(&q->chat);
    json_decref(q->kept);
    json_decref(q->content);
    buf_free(&q->text);
    free(q);
}

const dialect api_messages = {.name = "messages",
                              .whole = true,
                              .begin = begin,
                              .running = running,
                              .event = event,
                              .ended = ended,
                              .finish = finish,
                              .free = free_data};
const dialect api_messages_count = {.name = "messages/count_tokens", .begin = count_begin, .free = free_data};
