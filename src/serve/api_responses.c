/* OpenAI's responses: reading. Items become messages; tools of every type become functions or are left out. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/openai.h"
#include "serve/responses.h"

typedef struct output_fields {
    int64_t max, n;
    bool store, background;
} output_fields;

static const field output_table[] = {
    {"max_output_tokens", FIELD_INT, 1, 1e9, offsetof(output_fields, max), FIELD_NO_FLAG, false},
    {"store", FIELD_BOOL, 0, 0, offsetof(output_fields, store), FIELD_NO_FLAG, false},
    {"background", FIELD_BOOL, 0, 0, offsetof(output_fields, background), FIELD_NO_FLAG, false},
    {0},
};

static const char *str_of(const json_t *o, const char *name) { return json_string_value(json_object_get(o, name)); }
static chat_str text_of(const json_t *o, const char *name) { return chat_json_str(json_object_get(o, name)); }

static void note_ignored(const job *j, const char *what, const char *type) {
    log_event(&j->s->p.log, "ignored", "s:s, s:s, s:s, s:s", "api", "responses", "job_id", j->id, "what", what, "type",
              type ? type : "?");
}

/* ---- tools ---- */

/* A copy of printf's text that lives as long as the request. */
static chat_str keep_text(responses *q, req_error *err, const char *fmt, ...) ORCD_PRINTF(3, 4);
static chat_str keep_text(responses *q, req_error *err, const char *fmt, ...) {
    char *text = NULL;
    va_list args;
    va_start(args, fmt);
    int n = vasprintf(&text, fmt, args);
    va_end(args);
    char *kept = n < 0 ? NULL : chat_keep(&q->chat, (size_t)n + 1, err);
    if (kept)
        memcpy(kept, text, (size_t)n + 1);
    if (n < 0)
        req_fail(err, 503, "out_of_memory", NULL, "out of memory");
    else
        free(text);
    return chat_str_of(kept);
}

/* What the model calls a tool of a namespace. */
static chat_str flat_name(responses *q, const char *space, const char *name, req_error *err) {
    size_t n = strlen(space);
    bool joined = n && (space[n - 1] == '_' || space[n - 1] == '.');
    return keep_text(q, err, "%s%s%s", space, joined ? "" : "__", name);
}

static bool add_tool(responses *q, const json_t *v, const char *space, bool custom, chat_str description,
                     const json_t *parameters, req_error *err) {
    const char *name = str_of(v, "name");
    if (!name)
        return req_fail(err, 400, "missing_required_parameter", "tools", "every function and custom tool needs a name");
    chat_tool *t = chat_add_tool(&q->chat, err);
    if (!t)
        return false;
    size_t n = q->chat.n_tool;
    if (n > CHAT_MAX_TOOLS)
        return req_fail(err, 400, "invalid_value", "tools", "at most %d tools are taken", CHAT_MAX_TOOLS);
    q->wire[n - 1] = (wire_tool){.name = name, .space = space, .custom = custom};
    *t = (chat_tool){.name = space ? flat_name(q, space, name, err) : chat_str_of(name),
                     .description = description,
                     .parameters = json_is_object(parameters) ? parameters : NULL,
                     .strict = json_is_true(json_object_get(v, "strict"))};
    return t->name.data != NULL;
}

/* A tool that takes free text is a function of one string. */
static bool add_custom(responses *q, const json_t *v, const char *space, req_error *err) {
    const json_t *format = json_object_get(v, "format");
    const char *rules = str_of(format, "definition"), *syntax = str_of(format, "syntax");
    const char *description = str_of(v, "description");
    json_t *schema = json_pack("{s:s, s:{s:{s:s, s:s}}, s:[s]}", "type", "object", "properties", "input", "type",
                               "string", "description", "The whole input of the tool.", "required", "input");
    chat_str text =
        keep_text(q, err, "%s%s%s%s%s", description ? description : "", rules ? "\n\nIts input must match this " : "",
                  rules ? (syntax ? syntax : "") : "", rules ? " grammar:\n" : "", rules ? rules : "");
    if (!schema || !text.data || json_array_append_new(q->kept, schema) != 0)
        return req_fail(err, 503, "out_of_memory", NULL, "out of memory");
    return add_tool(q, v, space, true, text, schema, err);
}

static bool read_tool(const job *j, responses *q, const json_t *v, const char *space, req_error *err) {
    const char *type = str_of(v, "type");
    size_t i;
    json_t *inner;
    if (type && strcmp(type, "function") == 0) {
        const json_t *f = json_is_object(json_object_get(v, "function")) ? json_object_get(v, "function") : v;
        return add_tool(q, f, space, false, text_of(f, "description"), json_object_get(f, "parameters"), err);
    }
    if (type && strcmp(type, "custom") == 0)
        return add_custom(q, v, space, err);
    if (type && strcmp(type, "namespace") == 0 && !space && str_of(v, "name")) {
        json_array_foreach(json_object_get(v, "tools"), i,
                           inner) if (!read_tool(j, q, inner, str_of(v, "name"), err)) return false;
        return true;
    }
    note_ignored(j, "tool", type);
    return true;
}

static bool read_tools(const job *j, responses *q, req_error *err) {
    const json_t *list = json_object_get(j->body, "tools");
    size_t i;
    json_t *v;
    if (list && !json_is_null(list) && !json_is_array(list))
        return req_fail(err, 400, "invalid_type", "tools", "tools must be an array");
    json_array_foreach(list, i, v) if (!read_tool(j, q, v, NULL, err)) return false;
    return true;
}

/* The client's name for a tool, as the model knows it. */
static chat_str model_name(responses *q, const json_t *v, req_error *err) {
    const char *space = str_of(v, "namespace"), *name = str_of(v, "name");
    return space && name ? flat_name(q, space, name, err) : chat_str_of(name);
}

static bool read_choice(const job *j, responses *q, req_error *err) {
    const json_t *v = json_object_get(j->body, "tool_choice");
    const char *word = json_string_value(v), *type = str_of(v, "type");
    size_t i;
    json_t *t;
    if (!v || json_is_null(v) || (word && strcmp(word, "auto") == 0))
        return true;
    if (word && (strcmp(word, "none") == 0 || strcmp(word, "required") == 0)) {
        q->chat.choice = *word == 'n' ? TOOL_NONE : TOOL_REQUIRED;
        return true;
    }
    if (type && (strcmp(type, "function") == 0 || strcmp(type, "custom") == 0) && str_of(v, "name")) {
        q->chat.choice = TOOL_REQUIRED;
        return chat_allow(&q->chat, model_name(q, v, err), err);
    }
    if (type && strcmp(type, "allowed_tools") == 0) {
        const char *mode = str_of(v, "mode");
        q->chat.choice = mode && strcmp(mode, "required") == 0 ? TOOL_REQUIRED : TOOL_AUTO;
        json_array_foreach(json_object_get(v, "tools"), i,
                           t) if (str_of(t, "name") && !chat_allow(&q->chat, model_name(q, t, err), err)) return false;
        return q->chat.n_allowed > 0 ||
               req_fail(err, 400, "invalid_value", "tool_choice", "tool_choice.tools names no function");
    }
    if (type) { /* a hosted tool that is not there */
        note_ignored(j, "tool_choice", type);
        return true;
    }
    return req_fail(err, 400, "invalid_value", "tool_choice",
                    "tool_choice must be auto, none, required or name a tool");
}

/* ---- items ---- */

/* The text of a reasoning item: its content, else its summary. */
static bool read_reasoning(responses *q, const json_t *v, const char *where, chat_str *out, req_error *err) {
    const json_t *content = json_object_get(v, "content");
    if (json_array_size(content) == 0)
        content = json_object_get(v, "summary");
    chat_str text;
    if (!chat_read_text(&q->chat, content, where, &text, err))
        return false;
    if (text.len)
        *out = text;
    return true;
}

static bool role_of(const char *word, chat_role *out) {
    *out = !word                                                           ? CHAT_TOOL
           : strcmp(word, "user") == 0                                     ? CHAT_USER
           : strcmp(word, "assistant") == 0                                ? CHAT_ASSISTANT
           : strcmp(word, "system") == 0 || strcmp(word, "developer") == 0 ? CHAT_INSTRUCTIONS
                                                                           : CHAT_TOOL;
    return *out != CHAT_TOOL;
}

static bool read_message(responses *q, const json_t *v, const char *where, chat_str reasoning, req_error *err) {
    chat_role role;
    if (!role_of(str_of(v, "role"), &role))
        return req_fail(err, 400, "invalid_value", where, "%s.role must be one of system, developer, user, assistant",
                        where);
    chat_message *m = chat_add_message(&q->chat, role, err);
    if (!m)
        return false;
    if (role == CHAT_ASSISTANT)
        m->reasoning = reasoning;
    return chat_read_text(&q->chat, json_object_get(v, "content"), where, &m->text, err);
}

static bool read_call(const job *j, responses *q, const json_t *v, bool custom, const char *where, chat_str reasoning,
                      req_error *err) {
    chat_call *call = chat_keep(&q->chat, sizeof *call, err);
    if (!call)
        return false;
    *call = (chat_call){.id = text_of(v, "call_id"),
                        .name = model_name(q, v, err),
                        .arguments = text_of(v, custom ? "input" : "arguments")};
    if (!call->id.data || !call->name.data || !call->arguments.data)
        return req_fail(err, 400, "missing_required_parameter", where, "%s needs call_id, name and %s", where,
                        custom ? "input" : "arguments");
    if (custom) {
        json_t *o = json_pack("{s:O}", "input", json_object_get(v, "input"));
        char *text = json_dumps(o, JSON_COMPACT);
        call->arguments = keep_text(q, err, "%s", text ? text : "");
        free(text);
        json_decref(o);
    }
    chat_recall(j, &q->chat, call);
    size_t n = q->chat.n_message;
    chat_message *m = n ? &q->chat.message[n - 1] : NULL;
    bool preamble = m && m->role == CHAT_ASSISTANT && m->n_call == 0; /* said before the call */
    if (!preamble)
        m = chat_add_message(&q->chat, CHAT_ASSISTANT, err);
    if (!m)
        return false;
    if (reasoning.data)
        m->reasoning = reasoning;
    m->call = call;
    m->n_call = 1;
    return true;
}

static bool read_result(responses *q, const json_t *v, const char *where, req_error *err) {
    chat_message *m = chat_add_message(&q->chat, CHAT_TOOL, err);
    if (!m)
        return false;
    m->call_id = text_of(v, "call_id");
    if (!m->call_id.data)
        return req_fail(err, 400, "missing_required_parameter", where, "%s needs call_id", where);
    return chat_read_text(&q->chat, json_object_get(v, "output"), where, &m->text, err);
}

static bool read_item(const job *j, responses *q, const json_t *v, size_t i, chat_str *reasoning, req_error *err) {
    const char *type = str_of(v, "type");
    char where[40];
    snprintf(where, sizeof where, "input[%zu]", i);
    if (type && strcmp(type, "reasoning") == 0)
        return read_reasoning(q, v, where, reasoning, err);
    chat_str thought = *reasoning;
    *reasoning = (chat_str){NULL, 0};
    if (type ? strcmp(type, "message") == 0 : str_of(v, "role") != NULL)
        return read_message(q, v, where, thought, err);
    if (type && (strcmp(type, "function_call") == 0 || strcmp(type, "custom_tool_call") == 0))
        return read_call(j, q, v, *type == 'c', where, thought, err);
    if (type && (strcmp(type, "function_call_output") == 0 || strcmp(type, "custom_tool_call_output") == 0))
        return read_result(q, v, where, err);
    if (!json_is_object(v))
        return req_fail(err, 400, "invalid_type", where, "%s must be an object", where);
    note_ignored(j, "item", type);
    return true;
}

/* q->items: what came before, and the input as an array. */
static bool collect_items(const job *j, responses *q, req_error *err) {
    json_t *input = json_object_get(j->body, "input");
    q->items = json_array();
    if (q->previous) {
        char *text = store_get(j->s->responses, http_key_hash(j->x), q->previous);
        json_t *before = text ? json_loads(text, 0, NULL) : NULL;
        free(text);
        if (!before)
            return req_fail(err, 400, "previous_response_not_found", "previous_response_id",
                            "there is no response %.60s: it was not stored, or is forgotten", q->previous);
        json_array_extend(q->items, before);
        json_decref(before);
    }
    if (json_is_string(input))
        json_array_append_new(q->items,
                              json_pack("{s:s, s:s, s:O}", "type", "message", "role", "user", "content", input));
    else if (json_is_array(input))
        json_array_extend(q->items, input);
    else
        return req_fail(err, 400, "missing_required_parameter", "input", "input must be a string or an array of items");
    size_t n = json_array_size(q->items);
    return (n > 0 && n <= CHAT_MAX_MESSAGES) ||
           req_fail(err, 400, "invalid_value", "input", "input must have 1 to %d items", CHAT_MAX_MESSAGES);
}

static bool read_items(const job *j, responses *q, req_error *err) {
    size_t i;
    json_t *v;
    chat_str reasoning = {NULL, 0};
    const json_t *instructions = json_object_get(j->body, "instructions");
    if (!collect_items(j, q, err))
        return false;
    if (json_string_length(instructions)) {
        chat_message *m = chat_add_message(&q->chat, CHAT_INSTRUCTIONS, err);
        if (!m)
            return false;
        m->text = chat_json_str(instructions);
    }
    json_array_foreach(q->items, i, v) if (!read_item(j, q, v, i, &reasoning, err)) return false;
    return true;
}

/* ---- the request ---- */

/* What would change the answer and is not there is refused, never ignored. */
static bool refuse_unsupported(const job *j, req_error *err) {
    static const char *const name[] = {"conversation", "prompt"};
    for (size_t i = 0; i < ORCD_COUNT(name); i++) {
        const json_t *v = json_object_get(j->body, name[i]);
        if (v && !json_is_null(v))
            return req_fail(err, 400, "unsupported_parameter", name[i], "%s is not supported", name[i]);
    }
    return true;
}

static bool read_request(const job *j, responses *q, req_error *err) {
    output_fields f = {.store = true};
    q->wire = chat_keep(&q->chat, CHAT_MAX_TOOLS * sizeof *q->wire, err);
    q->output = json_array();
    q->kept = json_array();
    if (!q->wire || !req_read_options(j->body, j->s->info->n_vocab, &q->chat.o, err) ||
        !req_fields(j->body, output_table, &f, err))
        return false;
    if (f.background)
        return req_fail(err, 400, "unsupported_parameter", "background", "background is not supported");
    q->chat.top_logprobs = -1;
    q->chat.o.n = 1;
    q->max_output = f.max;
    if (f.max)
        q->chat.o.max_tokens = f.max;
    q->store = f.store;
    q->previous = str_of(j->body, "previous_response_id");
    const json_t *format = json_object_get(json_object_get(j->body, "text"), "format");
    return refuse_unsupported(j, err) && chat_read_effort(&q->chat, j->body, err) &&
           chat_read_format(&q->chat, format, "text.format", err) && read_tools(j, q, err) && read_choice(j, q, err) &&
           read_items(j, q, err);
}

/* The request at j->data, or NULL after refusing. */
static responses *read_body(job *j) {
    req_error err = {0};
    responses *q = j->data = calloc(1, sizeof *q);
    if (!q) {
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
        return NULL;
    }
    if (!openai_body(j))
        return NULL;
    job_make_id(j->id, sizeof j->id, "resp_");
    if (read_request(j, q, &err))
        return q;
    openai_refuse(j, &err);
    return NULL;
}

static void begin(job *j) {
    responses *q = read_body(j);
    if (q)
        chat_start(j, &q->chat, "input");
}

static void count_begin(job *j) {
    size_t n;
    responses *q = read_body(j);
    if (q && chat_count(j, &q->chat, "input", &n))
        job_answer(j, 200, json_pack("{s:s, s:I}", "object", "response.input_tokens", "input_tokens", (json_int_t)n));
}

static void free_data(job *j) {
    responses *q = j->data;
    if (!q)
        return;
    chat_request_free(&q->chat);
    json_decref(q->items);
    json_decref(q->kept);
    json_decref(q->output);
    buf_free(&q->text);
    free(q);
}

const dialect api_responses = {.name = "responses",
                               .whole = true,
                               .begin = begin,
                               .running = responses_running,
                               .event = responses_event,
                               .ended = responses_ended,
                               .finish = responses_finish,
                               .free = free_data};
const dialect api_responses_count = {.name = "responses/input_tokens", .begin = count_begin, .free = free_data};
