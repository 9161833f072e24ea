#include "serve/chat_request.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "text/chat/harmony.h"

struct block {
    struct block *next;
    _Alignas(16) char data[];
};

void chat_request_free(chat_request *q) {
    while (q->block) {
        struct block *b = q->block;
        q->block = b->next;
        free(b);
    }
    free(q->message);
    free(q->tool);
    for (size_t i = 0; q->arguments && i < q->n_allowed; i++)
        grammar_close(q->arguments[i]);
    free(q->arguments);
    free(q->allowed);
    grammar_close(q->answer);
    json_decref(q->object);
    ids_free(&q->prompt);
}

static bool no_memory(req_error *err) { return req_fail(err, 503, "out_of_memory", NULL, "out of memory"); }

void *chat_keep(chat_request *q, size_t bytes, req_error *err) {
    struct block *b = calloc(1, sizeof *b + bytes);
    if (!b) {
        no_memory(err);
        return NULL;
    }
    b->next = q->block;
    q->block = b;
    return b->data;
}

/* Room for one more element, zeroed; NULL with the error filled. */
static void *grow(void **array, size_t *n, size_t *cap, size_t size, req_error *err) {
    if (*n == *cap) {
        size_t more = *cap ? 2 * *cap : 16;
        void *p = realloc(*array, more * size);
        if (!p) {
            no_memory(err);
            return NULL;
        }
        *array = p;
        *cap = more;
    }
    return memset((char *)*array + size * (*n)++, 0, size);
}

chat_message *chat_add_message(chat_request *q, chat_role role, req_error *err) {
    void *array = q->message;
    chat_message *m = grow(&array, &q->n_message, &q->cap_message, sizeof *m, err);
    q->message = array;
    if (m)
        m->role = role;
    return m;
}

chat_tool *chat_add_tool(chat_request *q, req_error *err) {
    void *array = q->tool, *t = grow(&array, &q->n_tool, &q->cap_tool, sizeof *q->tool, err);
    q->tool = array;
    return t;
}

bool chat_allow(chat_request *q, chat_str name, req_error *err) {
    void *array = q->allowed;
    chat_str *s = grow(&array, &q->n_allowed, &q->cap_allowed, sizeof *s, err);
    q->allowed = array;
    if (s)
        *s = name;
    return s != NULL;
}

chat_str chat_json_str(const json_t *v) { return (chat_str){json_string_value(v), json_string_length(v)}; }

bool chat_read_text(chat_request *q, const json_t *v, const char *where, chat_str *out, req_error *err) {
    size_t i, len = 0;
    json_t *part;
    *out = chat_json_str(v);
    if (!v || json_is_null(v) || json_is_string(v))
        return true;
    if (!json_is_array(v))
        return req_fail(err, 400, "invalid_type", where, "%s must be a string or an array of parts", where);
    json_array_foreach(v, i, part) {
        const json_t *text = json_is_string(part) ? part : json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!json_is_string(text))
            return req_fail(err, 400, "unsupported_content", where,
                            "%s has a part of type \"%.30s\"; this model takes text only", where, type ? type : "?");
        len += json_string_length(text);
    }
    char *joined = chat_keep(q, len + 1, err);
    if (!joined)
        return false;
    *out = (chat_str){joined, len};
    json_array_foreach(v, i, part) {
        const json_t *text = json_is_string(part) ? part : json_object_get(part, "text");
        memcpy(joined, json_string_value(text), json_string_length(text));
        joined += json_string_length(text);
    }
    return true;
}

static bool read_effort_word(chat_request *q, const json_t *v, const char *where, req_error *err) {
    if (!v || json_is_null(v) || (json_is_string(v) && chat_effort_of(json_string_value(v), &q->effort)))
        return true;
    return req_fail(err, 400, "invalid_value", where, "%s must be one of none, minimal, low, medium, high, xhigh, max",
                    where);
}

static const field budget_table[] = {
    {"max_reasoning_tokens", FIELD_INT, 1, 1e9, offsetof(chat_request, max_reasoning), FIELD_NO_FLAG, false}, {0}};
static const field reasoning_table[] = {
    {"max_tokens", FIELD_INT, 1, 1e9, offsetof(chat_request, max_reasoning), FIELD_NO_FLAG, false}, {0}};

bool chat_read_effort(chat_request *q, const json_t *body, req_error *err) {
    const json_t *reasoning = json_object_get(body, "reasoning"), *think = json_object_get(body, "think");
    const json_t *args = json_object_get(body, "chat_template_kwargs");
    if (json_is_boolean(think))
        q->effort = json_is_true(think) ? CHAT_EFFORT_MEDIUM : CHAT_EFFORT_LOW;
    else if (!read_effort_word(q, think, "think", err))
        return false;
    q->hide_reasoning = json_is_true(json_object_get(reasoning, "exclude")) ||
                        json_is_false(json_object_get(body, "include_reasoning"));
    if (!req_fields(reasoning, reasoning_table, q, err) || !req_fields(body, budget_table, q, err))
        return false;
    return read_effort_word(q, json_object_get(args, "reasoning_effort"), "chat_template_kwargs.reasoning_effort",
                            err) &&
           read_effort_word(q, json_object_get(reasoning, "effort"), "reasoning.effort", err) &&
           read_effort_word(q, json_object_get(body, "reasoning_effort"), "reasoning_effort", err);
}

/* ---- the answer's format ---- */

bool chat_read_format(chat_request *q, const json_t *format, const char *where, req_error *err) {
    orcd_error e;
    const char *type = json_string_value(json_object_get(format, "type"));
    const json_t *inner = json_object_get(format, "json_schema"), *of = inner ? inner : format;
    if (!format || json_is_null(format) || (type && strcmp(type, "text") == 0))
        return true;
    if (!type || (strcmp(type, "json_object") != 0 && strcmp(type, "json_schema") != 0))
        return req_fail(err, 400, "invalid_value", where, "%s.type must be text, json_object or json_schema", where);
    q->format = (chat_format){chat_json_str(json_object_get(of, "name")),
                              chat_json_str(json_object_get(of, "description")), json_object_get(of, "schema")};
    if (!q->format.name.len)
        q->format.name = chat_str_of(type);
    if (!q->format.schema)
        q->format.schema = q->object = json_pack("{s:s}", "type", "object");
    if (!q->format.schema)
        return no_memory(err);
    orcd_status st = grammar_compile(q->format.schema, &q->answer, &e);
    if (st == ORCD_ERR_NOMEM)
        return no_memory(err);
    return st == ORCD_OK || req_fail(err, 400, "invalid_json_schema", where, "%s: %s", where, e.message);
}

/* ---- calls that this server made ---- */

static const char *text_of(chat_request *q, chat_str s) {
    req_error ignored = {0};
    char *copy = chat_keep(q, s.len + 1, &ignored);
    if (copy && s.len)
        memcpy(copy, s.data, s.len);
    return copy;
}

void chat_recall(const job *j, chat_request *q, chat_call *call) {
    ids found = {0};
    req_error ignored = {0};
    const char *id = text_of(q, call->id), *name = text_of(q, call->name), *arguments = text_of(q, call->arguments);
    if (id && name && arguments && replay_find(j->s->replay, http_key_hash(j->x), id, name, arguments, &found)) {
        int32_t *kept = found.failed ? NULL : chat_keep(q, found.n * sizeof *kept, &ignored);
        if (kept) {
            memcpy(kept, found.data, found.n * sizeof *kept);
            call->replay = kept;
            call->n_replay = found.n;
        }
    }
    ids_free(&found);
}

/* ---- start ---- */

static const chat_tool *declared(const chat_request *q, chat_str name) {
    for (size_t i = 0; i < q->n_tool; i++)
        if (chat_str_eq(q->tool[i].name, name))
            return &q->tool[i];
    return NULL;
}

static bool any_strict(const chat_request *q) {
    bool any = false;
    for (size_t i = 0; i < q->n_tool; i++)
        any |= q->tool[i].strict;
    return any;
}

static bool check_choice(chat_request *q, req_error *err) {
    if (q->choice == TOOL_REQUIRED && q->n_tool == 0)
        return req_fail(err, 400, "invalid_value", "tool_choice", "tool_choice asks for a call but there are no tools");
    for (size_t i = 0; i < q->n_allowed; i++)
        if (!declared(q, q->allowed[i]))
            return req_fail(err, 400, "invalid_value", "tool_choice", "tool_choice names \"%.*s\", which is no tool",
                            (int)(q->allowed[i].len < 60 ? q->allowed[i].len : 60), q->allowed[i].data);
    bool all = q->choice == TOOL_REQUIRED || (q->choice == TOOL_AUTO && (q->answer || any_strict(q)));
    if (all && q->n_allowed == 0)
        for (size_t i = 0; i < q->n_tool; i++)
            if (!chat_allow(q, q->tool[i].name, err))
                return false;
    return true;
}

/* Clients mark tools as strict whose schemas say more than grammars obey: then the arguments stay free. */
static bool compile_arguments(const job *j, chat_request *q, req_error *err) {
    if (q->n_allowed == 0 || !any_strict(q))
        return true;
    q->arguments = calloc(q->n_allowed, sizeof *q->arguments);
    if (!q->arguments)
        return no_memory(err);
    for (size_t i = 0; i < q->n_allowed; i++) {
        const chat_tool *t = declared(q, q->allowed[i]);
        orcd_error e;
        if (!t || !t->strict || !t->parameters)
            continue;
        orcd_status st = grammar_compile(t->parameters, &q->arguments[i], &e);
        if (st == ORCD_ERR_NOMEM)
            return no_memory(err);
        if (st != ORCD_OK)
            log_event(&j->s->p.log, "ignored", "s:s, s:s, s:s", "job_id", j->id, "what", "strict", "why", e.message);
    }
    return true;
}

static void refuse_render(job *j, const orcd_error *e, const char *messages) {
    bool mine = e->code == ORCD_ERR_NOMEM || e->code == ORCD_ERR_INTERNAL;
    job_refuse(j, mine ? 503 : 400, mine ? "out_of_memory" : "invalid_value", mine ? NULL : messages, e->message);
}

static void submit(job *j, chat_request *q, const harmony_prompt *p) {
    harmony_mask_options mask = {.name = q->allowed,
                                 .n_name = q->n_allowed,
                                 .final = q->choice != TOOL_REQUIRED,
                                 .preamble = !q->answer,
                                 .n_vocab = j->s->info->n_vocab,
                                 .answer = q->answer,
                                 .arguments = q->arguments,
                                 .vocab = j->s->vocab};
    bool masked = q->answer || (q->choice == TOOL_NONE && q->n_tool) || q->choice == TOOL_REQUIRED || q->n_allowed;
    int64_t budget = q->max_reasoning ? q->max_reasoning : j->s->p.max_reasoning;
    job_plan plan = {
        .gen = {.request = {.top_logprobs = q->top_logprobs, .boundary = p->boundary, .n_boundary = (int)p->n_boundary},
                .stop = q->o.stop,
                .n_stop = q->o.n_stop,
                .harmony = j->s->harmony,
                .parse = {.tool = q->tool, .n_tool = q->n_tool, .force_final = true},
                .max_reasoning = budget > INT32_MAX ? INT32_MAX : (int32_t)budget,
                .mask = masked ? &mask : NULL},
        .prompt = &p->id,
        .n_prompt = 1,
        .n = (int)q->o.n};
    req_apply(&q->o, j->s->info->n_vocab, &plan.gen.request);
    job_start(j, &plan);
}

/* False after refusing. */
static bool render(job *j, chat_request *q, const char *messages, harmony_prompt *p) {
    orcd_error e;
    req_error bad = {0};
    char date[16];
    struct tm utc;
    time_t now = time(NULL);
    if (!j->s->harmony) {
        job_refuse(j, 400, "model_not_supported", "model",
                   "this model has no chat format; use /v1/completions with a prompt");
        return false;
    }
    if (!check_choice(q, &bad) || !compile_arguments(j, q, &bad)) {
        job_refuse(j, bad.status, bad.code, bad.param, bad.message);
        return false;
    }
    gmtime_r(&now, &utc);
    strftime(date, sizeof date, "%Y-%m-%d", &utc);
    const chat c = {.message = q->message,
                    .n_message = q->n_message,
                    .tool = q->tool,
                    .n_tool = q->n_tool,
                    .format = q->format.schema ? &q->format : NULL,
                    .effort = q->effort,
                    .date = chat_str_of(date)};
    if (harmony_render(j->s->harmony, &c, 0, p, &e) == ORCD_OK)
        return true;
    refuse_render(j, &e, messages);
    return false;
}

void chat_start(job *j, chat_request *q, const char *messages) {
    harmony_prompt p = {0};
    j->stream = q->o.stream;
    if (render(j, q, messages, &p))
        submit(j, q, &p);
    harmony_prompt_free(&p);
}

bool chat_count(job *j, chat_request *q, const char *messages, size_t *n) {
    harmony_prompt p = {0};
    bool ok = render(j, q, messages, &p);
    *n = p.id.n;
    harmony_prompt_free(&p);
    return ok;
}
