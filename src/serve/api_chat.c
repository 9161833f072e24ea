/* OpenAI's chat completions. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/chat_request.h"
#include "serve/openai.h"

typedef struct logprob_fields {
    bool logprobs, given;
    int64_t top;
} logprob_fields;

static const field logprob_table[] = {
    {"logprobs", FIELD_BOOL, 0, 0, offsetof(logprob_fields, logprobs), FIELD_NO_FLAG, false},
    {"top_logprobs", FIELD_INT, 0, 20, offsetof(logprob_fields, top), offsetof(logprob_fields, given), false},
    {0},
};

/* ---- reading ---- */

static bool read_call(const job *j, chat_request *q, const json_t *v, const char *where, chat_call *out,
                      req_error *err) {
    const json_t *f = json_object_get(v, "function"), *arguments = json_object_get(f, "arguments");
    out->id = chat_json_str(json_object_get(v, "id"));
    out->name = chat_json_str(json_object_get(f, "name"));
    if (!out->id.data || !out->name.data)
        return req_fail(err, 400, "invalid_value", where, "%s: each tool call needs id, function.name and arguments",
                        where);
    out->arguments = chat_json_str(arguments);
    if (json_is_object(arguments)) { /* some clients forget to encode them */
        char *text = json_dumps(arguments, JSON_COMPACT);
        size_t len = text ? strlen(text) : 0;
        char *kept = chat_keep(q, len + 1, err);
        if (kept)
            memcpy(kept, text, len);
        free(text);
        out->arguments = (chat_str){kept, kept ? len : 0};
        if (!kept)
            return false;
    }
    chat_recall(j, q, out);
    return true;
}

static bool read_assistant(const job *j, chat_request *q, const json_t *v, const char *where, chat_message *m,
                           req_error *err) {
    const json_t *calls = json_object_get(v, "tool_calls");
    m->reasoning = chat_json_str(json_object_get(v, "reasoning"));
    if (!m->reasoning.data)
        m->reasoning = chat_json_str(json_object_get(v, "reasoning_content"));
    if (!calls || json_is_null(calls))
        return true;
    size_t n = json_array_size(calls);
    if (!json_is_array(calls) || n > CHAT_MAX_CALLS)
        return req_fail(err, 400, "invalid_type", where, "%s.tool_calls must be an array of at most %d calls", where,
                        CHAT_MAX_CALLS);
    chat_call *list = chat_keep(q, (n + 1) * sizeof *list, err);
    for (size_t i = 0; list && i < n; i++)
        if (!read_call(j, q, json_array_get(calls, i), where, &list[i], err))
            return false;
    m->call = list;
    m->n_call = n;
    return list != NULL;
}

static bool role_of(const char *word, chat_role *out) {
    static const struct {
        const char *word;
        chat_role role;
    } row[] = {{"system", CHAT_INSTRUCTIONS},
               {"developer", CHAT_INSTRUCTIONS},
               {"user", CHAT_USER},
               {"assistant", CHAT_ASSISTANT},
               {"tool", CHAT_TOOL}};
    for (size_t i = 0; word && i < ORCD_COUNT(row); i++)
        if (strcmp(word, row[i].word) == 0) {
            *out = row[i].role;
            return true;
        }
    return false;
}

static bool read_message(const job *j, chat_request *q, const json_t *v, size_t i, req_error *err) {
    char where[40];
    chat_role role;
    snprintf(where, sizeof where, "messages[%zu]", i);
    if (!role_of(json_string_value(json_object_get(v, "role")), &role))
        return req_fail(err, 400, "invalid_value", where,
                        "%s.role must be one of system, developer, user, assistant, tool", where);
    chat_message *m = chat_add_message(q, role, err);
    if (!m)
        return false;
    snprintf(where, sizeof where, "messages[%zu].content", i);
    if (!chat_read_text(q, json_object_get(v, "content"), where, &m->text, err))
        return false;
    if (role != CHAT_ASSISTANT && !m->text.data)
        return req_fail(err, 400, "missing_required_parameter", where, "%s is required", where);
    snprintf(where, sizeof where, "messages[%zu]", i);
    if (role == CHAT_ASSISTANT)
        return read_assistant(j, q, v, where, m, err);
    m->call_id = chat_json_str(json_object_get(v, "tool_call_id"));
    return role != CHAT_TOOL || m->call_id.data ||
           req_fail(err, 400, "missing_required_parameter", where, "%s.tool_call_id is required", where);
}

static bool read_messages(const job *j, chat_request *q, req_error *err) {
    const json_t *list = json_object_get(j->body, "messages");
    size_t n = json_array_size(list);
    if (!list || json_is_null(list))
        return req_fail(err, 400, "missing_required_parameter", "messages", "messages is required");
    if (!json_is_array(list) || n == 0 || n > CHAT_MAX_MESSAGES)
        return req_fail(err, 400, "invalid_type", "messages", "messages must be an array of 1 to %d messages",
                        CHAT_MAX_MESSAGES);
    for (size_t i = 0; i < n; i++)
        if (!read_message(j, q, json_array_get(list, i), i, err))
            return false;
    return true;
}

/* Tools of other types than "function" are the client's own business and left out. */
static bool read_tools(const job *j, chat_request *q, req_error *err) {
    const json_t *list = json_object_get(j->body, "tools");
    size_t i;
    json_t *v;
    if (!list || json_is_null(list))
        return true;
    if (!json_is_array(list) || json_array_size(list) > CHAT_MAX_TOOLS)
        return req_fail(err, 400, "invalid_type", "tools", "tools must be an array of at most %d tools",
                        CHAT_MAX_TOOLS);
    json_array_foreach(list, i, v) {
        const json_t *f = json_object_get(v, "function"), *parameters = json_object_get(f, "parameters");
        const char *type = json_string_value(json_object_get(v, "type"));
        if (type && strcmp(type, "function") != 0)
            continue;
        chat_tool *t = chat_add_tool(q, err);
        if (!t)
            return false;
        t->name = chat_json_str(json_object_get(f, "name"));
        t->description = chat_json_str(json_object_get(f, "description"));
        t->parameters = json_is_null(parameters) ? NULL : parameters;
        t->strict = json_is_true(json_object_get(f, "strict"));
        if (!t->name.data)
            return req_fail(err, 400, "missing_required_parameter", "tools", "tools[%zu].function.name is required", i);
    }
    return true;
}

static bool allow_all(chat_request *q, const json_t *list, req_error *err) {
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) {
        chat_str name = chat_json_str(json_object_get(json_object_get(v, "function"), "name"));
        if (name.data && !chat_allow(q, name, err))
            return false;
    }
    return q->n_allowed > 0 ||
           req_fail(err, 400, "invalid_value", "tool_choice", "tool_choice.allowed_tools names no function");
}

static bool read_choice(const job *j, chat_request *q, req_error *err) {
    const json_t *v = json_object_get(j->body, "tool_choice");
    const char *word = json_string_value(v), *type = json_string_value(json_object_get(v, "type"));
    if (!v || json_is_null(v) || (word && strcmp(word, "auto") == 0))
        return true;
    if (word && strcmp(word, "none") == 0) {
        q->choice = TOOL_NONE;
        return true;
    }
    if (word && (strcmp(word, "required") == 0 || strcmp(word, "any") == 0)) {
        q->choice = TOOL_REQUIRED;
        return true;
    }
    if (type && strcmp(type, "function") == 0) {
        chat_str name = chat_json_str(json_object_get(json_object_get(v, "function"), "name"));
        q->choice = TOOL_REQUIRED;
        if (name.data)
            return chat_allow(q, name, err);
    }
    if (type && strcmp(type, "allowed_tools") == 0) {
        const json_t *allowed = json_object_get(v, "allowed_tools");
        const char *mode = json_string_value(json_object_get(allowed, "mode"));
        q->choice = mode && strcmp(mode, "required") == 0 ? TOOL_REQUIRED : TOOL_AUTO;
        return allow_all(q, json_object_get(allowed, "tools"), err);
    }
    return req_fail(err, 400, "invalid_value", "tool_choice",
                    "tool_choice must be auto, none, required or name a function");
}

/* What would change the answer and is not there is refused, never ignored. */
static bool refuse_unsupported(const job *j, req_error *err) {
    static const char *const name[] = {"functions",    "function_call", "chat_template",  "audio",  "guided_json",
                                       "guided_regex", "guided_choice", "guided_grammar", "grammar"};
    for (size_t i = 0; i < ORCD_COUNT(name); i++) {
        const json_t *v = json_object_get(j->body, name[i]);
        if (v && !json_is_null(v))
            return req_fail(err, 400, "unsupported_parameter", name[i], "%s is not supported", name[i]);
    }
    return true;
}

static bool read_request(const job *j, chat_request *q, req_error *err) {
    logprob_fields l = {0};
    if (!req_read_options(j->body, j->s->info->n_vocab, &q->o, err) || !req_fields(j->body, logprob_table, &l, err))
        return false;
    if (l.given && l.top > 0 && !l.logprobs)
        return req_fail(err, 400, "invalid_value", "top_logprobs", "top_logprobs needs logprobs to be true");
    q->top_logprobs = l.logprobs ? (int)l.top : -1;
    return refuse_unsupported(j, err) && chat_read_effort(q, j->body, err) && read_tools(j, q, err) &&
           chat_read_format(q, json_object_get(j->body, "response_format"), "response_format", err) &&
           read_choice(j, q, err) && read_messages(j, q, err);
}

static void begin(job *j) {
    req_error err = {0};
    chat_request *q = j->data = calloc(1, sizeof *q);
    if (!q)
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
    else if (openai_body(j)) {
        job_make_id(j->id, sizeof j->id, "chatcmpl-");
        if (read_request(j, q, &err))
            chat_start(j, q, "messages");
        else
            openai_refuse(j, &err);
    }
}

/* ---- writing ---- */

static json_t *bytes_of(const job *j, int32_t id) {
    size_t len;
    const char *bytes = tok_bytes(j->s->tok, id, &len);
    json_t *list = json_array();
    for (size_t i = 0; bytes && i < len; i++)
        json_array_append_new(list, json_integer((unsigned char)bytes[i]));
    return list;
}

static json_t *logprob(choice *c, const eng_token *t) {
    const job *j = c->job;
    if (((const chat_request *)j->data)->top_logprobs < 0)
        return NULL;
    json_t *top = json_array();
    for (int i = 0; i < t->n_top; i++)
        json_array_append_new(top, json_pack("{s:o, s:f, s:o}", "token", openai_token_text(j, t->top[i].id, false),
                                             "logprob", (double)t->top[i].logprob, "bytes", bytes_of(j, t->top[i].id)));
    return json_pack("{s:o, s:f, s:o, s:o}", "token", openai_token_text(j, t->id, false), "logprob", (double)t->logprob,
                     "bytes", bytes_of(j, t->id), "top_logprobs", top);
}

/* {"content": [...]}, or null when none were asked for. Takes the entries of the choice. */
static json_t *take_logprobs(choice *c) {
    if (((const chat_request *)c->job->data)->top_logprobs < 0)
        return json_null();
    json_t *list = c->logprob ? c->logprob : json_array();
    c->logprob = NULL;
    return json_pack("{s:o, s:n}", "content", list, "refusal");
}

static void send_delta(choice *c, json_t *delta, json_t *logprobs, const char *finish) {
    json_t *item = json_pack("{s:i, s:o, s:o, s:s?}", "index", c->index, "delta", delta, "logprobs", logprobs,
                             "finish_reason", finish);
    job_send_json(c->job, NULL, openai_envelope(c->job, "chat.completion.chunk", item));
}

static void send_role(choice *c) {
    if (!c->began)
        send_delta(c, json_pack("{s:s, s:s}", "role", "assistant", "content", ""), json_null(), NULL);
    c->began = true;
}

static json_t *call_json(int index, const char *id, const char *name, const char *arguments) {
    return json_pack("{s:i, s:s, s:s, s:{s:s, s:s}}", "index", index, "id", id, "type", "function", "function", "name",
                     name, "arguments", arguments);
}

static void event(choice *c, const gen_event *e) {
    const chat_request *q = c->job->data;
    if (e->kind == GEN_TOKEN || (e->kind == GEN_REASONING && q->hide_reasoning))
        return;
    send_role(c);
    switch (e->kind) {
    case GEN_CONTENT:
        send_delta(c, json_pack("{s:s%}", "content", e->text, e->len), take_logprobs(c), NULL);
        break;
    case GEN_REASONING:
        send_delta(c, json_pack("{s:s%, s:s%}", "reasoning", e->text, e->len, "reasoning_content", e->text, e->len),
                   json_null(), NULL);
        break;
    case GEN_TOOL_BEGIN:
        send_delta(c, json_pack("{s:[o]}", "tool_calls", call_json(e->tool, e->tool_id, e->tool_name, "")), json_null(),
                   NULL);
        break;
    case GEN_TOOL_ARGS:
        send_delta(c,
                   json_pack("{s:[{s:i, s:{s:s%}}]}", "tool_calls", "index", e->tool, "function", "arguments", e->text,
                             e->len),
                   json_null(), NULL);
        break;
    case GEN_TOOL_END:
    case GEN_TOKEN:
        break;
    }
}

static void ended(choice *c) {
    if (openai_stream_failure(c))
        return;
    send_role(c);
    send_delta(c, json_object(), json_null(), openai_finish(c));
}

static json_t *text_json(const buf *b) { return json_stringn(b->data ? b->data : "", b->len); }

static json_t *message_json(const choice *c) {
    const chat_request *q = c->job->data;
    json_t *m = json_pack("{s:s, s:n}", "role", "assistant", "refusal");
    json_object_set_new(m, "content", c->n_call && !c->content.len ? json_null() : text_json(&c->content));
    if (c->reasoning.len && !q->hide_reasoning) {
        json_object_set_new(m, "reasoning", text_json(&c->reasoning));
        json_object_set_new(m, "reasoning_content", text_json(&c->reasoning));
    }
    json_t *calls = json_array();
    for (int i = 0; i < c->n_call; i++) {
        const job_call *k = &c->call[i];
        json_t *o = call_json(i, k->id, k->name.data ? k->name.data : "", k->arguments.data ? k->arguments.data : "");
        json_object_del(o, "index");
        json_array_append_new(calls, o);
    }
    if (c->n_call)
        json_object_set(m, "tool_calls", calls);
    json_decref(calls);
    return m;
}

static void finish(job *j) {
    const chat_request *q = j->data;
    if (j->stream) {
        openai_stream_end(j, "chat.completion.chunk", q->o.include_usage);
        return;
    }
    if (openai_failure(j))
        return;
    json_t *o = openai_envelope(j, "chat.completion", NULL), *list = json_object_get(o, "choices");
    for (int i = 0; i < j->n_choice; i++) {
        choice *c = &j->choice[i];
        json_array_append_new(list, json_pack("{s:i, s:o, s:o, s:s}", "index", i, "message", message_json(c),
                                              "logprobs", take_logprobs(c), "finish_reason", openai_finish(c)));
    }
    json_object_set_new(o, "usage", openai_usage(j));
    http_reply_json(j->x, 200, o, NULL);
}

static void free_data(job *j) {
    if (j->data)
        chat_request_free(j->data);
    free(j->data);
}

const dialect api_chat = {.name = "chat",
                          .begin = begin,
                          .event = event,
                          .ended = ended,
                          .finish = finish,
                          .logprob = logprob,
                          .free = free_data};
