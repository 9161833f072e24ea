/* Events and the final object of /v1/responses. Items are built from the events of the generation whether or not the
 * client streams, so that both answers are the same. Streams do not repeat instructions and tools: they may be larger
 * than what may wait for a slow client. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve/openai.h"
#include "serve/responses.h"

static json_t *text_json(const buf *b) { return json_stringn(b->data ? b->data : "", b->len); }

/* ---- the response object ---- */

static json_t *usage(const job *j) {
    job_usage u = job_count(j);
    return json_pack("{s:I, s:{s:I}, s:I, s:{s:I}, s:I}", "input_tokens", (json_int_t)u.in, "input_tokens_details",
                     "cached_tokens", (json_int_t)u.cached, "output_tokens", (json_int_t)u.out, "output_tokens_details",
                     "reasoning_tokens", (json_int_t)u.reasoning, "total_tokens", (json_int_t)(u.in + u.out));
}

/* A copy of the request's field, or of a default in JSON. */
static void echo(const job *j, json_t *o, const char *name, const char *otherwise) {
    json_t *v = json_object_get(j->body, name);
    if (v && !json_is_null(v))
        json_object_set(o, name, v);
    else
        json_object_set_new(o, name, json_loads(otherwise, JSON_DECODE_ANY, NULL));
}

static json_t *text_field(const job *j) {
    const json_t *text = json_object_get(j->body, "text");
    const char *verbosity = json_string_value(json_object_get(text, "verbosity"));
    json_t *format = json_object_get(text, "format");
    json_t *o = json_pack("{s:{s:s}, s:s}", "format", "type", "text", "verbosity", verbosity ? verbosity : "medium");
    if (json_is_object(format))
        json_object_set(o, "format", format);
    return o;
}

static json_t *reasoning_field(const job *j) {
    static const char *const word[] = {
        [CHAT_EFFORT_LOW] = "low", [CHAT_EFFORT_MEDIUM] = "medium", [CHAT_EFFORT_HIGH] = "high"};
    const responses *q = j->data;
    return json_pack("{s:s, s:n}", "effort", word[q->chat.effort], "summary");
}

static json_t *response(const job *j, const char *status) {
    const responses *q = j->data;
    json_t *o = json_pack("{s:s, s:s, s:I, s:s, s:b, s:n, s:n, s:s, s:O, s:s?, s:b}", "id", j->id, "object", "response",
                          "created_at", (json_int_t)j->created, "status", status, "background", 0, "error",
                          "incomplete_details", "model", j->s->p.model_id, "output", q->output, "previous_response_id",
                          q->previous, "store", q->store);
    json_object_set_new(o, "max_output_tokens", q->max_output ? json_integer(q->max_output) : json_null());
    json_object_set_new(o, "reasoning", reasoning_field(j));
    json_object_set_new(o, "text", text_field(j));
    json_object_set_new(o, "temperature", json_real(q->chat.o.temperature));
    json_object_set_new(o, "top_p", json_real(q->chat.o.top_p));
    json_object_set_new(o, "usage", json_null());
    echo(j, o, "metadata", "{}");
    echo(j, o, "parallel_tool_calls", "true");
    echo(j, o, "tool_choice", "\"auto\"");
    echo(j, o, "truncation", "\"disabled\"");
    echo(j, o, "max_tool_calls", "null");
    echo(j, o, "user", "null");
    echo(j, o, "prompt_cache_key", "null");
    json_object_set_new(o, "service_tier", json_string("default"));
    json_object_set_new(o, "top_logprobs", json_integer(0));
    if (j->stream) {
        json_object_set_new(o, "instructions", json_null());
        json_object_set_new(o, "tools", json_array());
    } else {
        echo(j, o, "instructions", "null");
        echo(j, o, "tools", "[]");
    }
    return o;
}

/* ---- events ---- */

static void send(job *j, const char *type, json_t *o) {
    responses *q = j->data;
    if (!j->stream) {
        json_decref(o);
        return;
    }
    json_object_set_new(o, "type", json_string(type));
    json_object_set_new(o, "sequence_number", json_integer(q->sequence++));
    job_send_json(j, type, o);
}

static void send_response(job *j, const char *type, json_t *o) { send(j, type, json_pack("{s:o}", "response", o)); }

void responses_running(choice *c) {
    send_response(c->job, "response.created", response(c->job, "in_progress"));
    send_response(c->job, "response.in_progress", response(c->job, "in_progress"));
}

/* {item_id, output_index}, and content_index for items that have parts */
static json_t *place(const responses *q) {
    json_t *o = json_pack("{s:s, s:I}", "item_id", q->item_id, "output_index", (json_int_t)json_array_size(q->output));
    if (q->open != ITEM_CALL)
        json_object_set_new(o, "content_index", json_integer(0));
    return o;
}

static json_t *place_with(const responses *q, const char *name, json_t *value) {
    json_t *o = place(q);
    json_object_set_new(o, name, value);
    return o;
}

static bool is_custom(const responses *q) { return q->tool && q->tool->custom; }

/* TEXT of {"input": TEXT}; what else the model made of it stays as it is. */
static json_t *custom_input(const responses *q) {
    json_t *o = json_loadb(q->text.data ? q->text.data : "", q->text.len, 0, NULL);
    json_t *input = json_incref(json_object_get(o, "input"));
    json_decref(o);
    if (json_is_string(input))
        return input;
    json_decref(input);
    return text_json(&q->text);
}

static json_t *call_item(const responses *q, json_t *arguments, const char *status) {
    json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:o, s:s}", "id", q->item_id, "type",
                          is_custom(q) ? "custom_tool_call" : "function_call", "call_id", q->call_id, "name",
                          q->tool ? q->tool->name : q->call_name, is_custom(q) ? "input" : "arguments", arguments,
                          "status", status);
    if (q->tool && q->tool->space)
        json_object_set_new(o, "namespace", json_string(q->tool->space));
    return o;
}

static json_t *part(const responses *q, json_t *text) {
    if (q->open == ITEM_REASONING)
        return json_pack("{s:s, s:o}", "type", "reasoning_text", "text", text);
    return json_pack("{s:s, s:o, s:[], s:[]}", "type", "output_text", "text", text, "annotations", "logprobs");
}

/* The open item; `text` NULL: as it begins, without parts. */
static json_t *item(const responses *q, json_t *text, const char *status) {
    if (q->open == ITEM_CALL)
        return call_item(q, text ? text : json_string(""), status);
    json_t *parts = text ? json_pack("[o]", part(q, text)) : json_array();
    if (q->open == ITEM_REASONING)
        return json_pack("{s:s, s:s, s:[], s:o, s:n, s:s}", "id", q->item_id, "type", "reasoning", "summary", "content",
                         parts, "encrypted_content", "status", status);
    return json_pack("{s:s, s:s, s:s, s:s, s:o}", "id", q->item_id, "type", "message", "status", status, "role",
                     "assistant", "content", parts);
}

static void send_item(job *j, const char *type, json_t *o) {
    const responses *q = j->data;
    send(j, type, json_pack("{s:I, s:o}", "output_index", (json_int_t)json_array_size(q->output), "item", o));
}

static void open_item(job *j, item_kind kind) {
    responses *q = j->data;
    job_make_id(q->item_id, sizeof q->item_id,
                kind == ITEM_REASONING ? "rs_"
                : kind == ITEM_MESSAGE ? "msg_"
                : is_custom(q)         ? "ctc_"
                                       : "fc_");
    q->open = kind;
    buf_clear(&q->text);
    send_item(j, "response.output_item.added", item(q, NULL, "in_progress"));
    if (kind != ITEM_CALL)
        send(j, "response.content_part.added", place_with(q, "part", part(q, json_string(""))));
}

static void close_text(job *j, const char *done) {
    const responses *q = j->data;
    json_t *o = place_with(q, "text", text_json(&q->text));
    if (q->open == ITEM_MESSAGE)
        json_object_set_new(o, "logprobs", json_array());
    send(j, done, o);
    send(j, "response.content_part.done", place_with(q, "part", part(q, text_json(&q->text))));
}

static void close_call(job *j, json_t *whole) {
    const responses *q = j->data;
    if (is_custom(q)) { /* the text is only known once its JSON is complete */
        send(j, "response.custom_tool_call_input.delta", place_with(q, "delta", json_incref(whole)));
        send(j, "response.custom_tool_call_input.done", place_with(q, "input", json_incref(whole)));
        return;
    }
    json_t *o = place_with(q, "arguments", json_incref(whole));
    json_object_set_new(o, "name", json_string(q->tool ? q->tool->name : q->call_name));
    send(j, "response.function_call_arguments.done", o);
}

static void close_item(job *j, bool cut) {
    responses *q = j->data;
    json_t *whole = is_custom(q) && q->open == ITEM_CALL ? custom_input(q) : text_json(&q->text);
    if (q->open == ITEM_NONE) {
        json_decref(whole);
        return;
    }
    if (q->open == ITEM_CALL)
        close_call(j, whole);
    else
        close_text(j, q->open == ITEM_REASONING ? "response.reasoning_text.done" : "response.output_text.done");
    json_t *o = item(q, whole, cut ? "incomplete" : "completed");
    send_item(j, "response.output_item.done", json_incref(o));
    json_array_append_new(q->output, o);
    q->open = ITEM_NONE;
}

static void more_text(job *j, item_kind kind, const char *type, const gen_event *e) {
    responses *q = j->data;
    if (q->open != kind) {
        close_item(j, false);
        q->tool = NULL;
        open_item(j, kind);
    }
    buf_add(&q->text, e->text, e->len);
    json_t *o = place_with(q, "delta", json_stringn(e->text, e->len));
    if (kind == ITEM_MESSAGE)
        json_object_set_new(o, "logprobs", json_array());
    send(j, type, o);
}

static void begin_call(job *j, const gen_event *e) {
    responses *q = j->data;
    close_item(j, false);
    q->tool = NULL;
    for (size_t i = 0; i < q->chat.n_tool; i++)
        if (chat_str_is(q->chat.tool[i].name, e->tool_name))
            q->tool = &q->wire[i];
    snprintf(q->call_id, sizeof q->call_id, "%s", e->tool_id);
    snprintf(q->call_name, sizeof q->call_name, "%s", e->tool_name);
    open_item(j, ITEM_CALL);
}

void responses_event(choice *c, const gen_event *e) {
    job *j = c->job;
    responses *q = j->data;
    switch (e->kind) {
    case GEN_CONTENT:
        more_text(j, ITEM_MESSAGE, "response.output_text.delta", e);
        break;
    case GEN_REASONING:
        if (!q->chat.hide_reasoning)
            more_text(j, ITEM_REASONING, "response.reasoning_text.delta", e);
        break;
    case GEN_TOOL_BEGIN:
        begin_call(j, e);
        break;
    case GEN_TOOL_ARGS:
        buf_add(&q->text, e->text, e->len);
        if (!is_custom(q))
            send(j, "response.function_call_arguments.delta", place_with(q, "delta", json_stringn(e->text, e->len)));
        break;
    case GEN_TOOL_END:
    case GEN_TOKEN:
        break;
    }
}

void responses_ended(choice *c) {
    close_item(c->job, c->done.finish != GEN_FINISH_EOS && c->done.finish != GEN_FINISH_STOP &&
                           c->done.finish != GEN_FINISH_TOOL);
}

/* ---- the end ---- */

static void remember(job *j) {
    responses *q = j->data;
    if (!q->store)
        return;
    json_array_extend(q->items, q->output);
    char *text = json_dumps(q->items, JSON_COMPACT);
    if (text)
        store_put(j->s->responses, http_key_hash(j->x), j->id, text);
    free(text);
}

void responses_finish(job *j) {
    job_failure f;
    const choice *c = &j->choice[0];
    if (!j->stream && openai_failure(j))
        return;
    if (job_failed(c, &f)) {
        json_t *o = response(j, "failed");
        json_object_set_new(o, "error", json_pack("{s:s, s:s}", "code", "server_error", "message", f.message));
        send_response(j, "response.failed", o);
        return;
    }
    bool cut = c->done.finish == GEN_FINISH_LENGTH;
    json_t *o = response(j, cut ? "incomplete" : "completed");
    if (cut)
        json_object_set_new(o, "incomplete_details", json_pack("{s:s}", "reason", "max_output_tokens"));
    json_object_set_new(o, "usage", usage(j));
    remember(j);
    if (j->stream)
        send_response(j, cut ? "response.incomplete" : "response.completed", o);
    else
        http_reply_json(j->x, 200, o, NULL);
}
