#include "cli/talk.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

void talk_answer_free(talk_answer *a) {
    buf_free(&a->content);
    buf_free(&a->reasoning);
    json_decref(a->calls);
    *a = (talk_answer){0};
}

static json_t *text_json(const buf *b) { return json_stringn(b->data ? b->data : "", b->len); }

json_t *talk_answer_message(const talk_answer *a) {
    json_t *m = json_pack("{s:s, s:o}", "role", "assistant", "content", text_json(&a->content));
    if (a->reasoning.len)
        json_object_set_new(m, "reasoning", text_json(&a->reasoning));
    if (a->calls)
        json_object_set(m, "tool_calls", a->calls);
    return m;
}

void talk_take(const talk_request *r, talk_answer *a, talk_kind kind, const char *text, size_t len) {
    if (kind == TALK_ARGUMENTS) {
        json_t *call = json_array_get(a->calls, json_array_size(a->calls) - 1), *f = json_object_get(call, "function");
        const char *before = json_string_value(json_object_get(f, "arguments"));
        json_object_set_new(f, "arguments", json_sprintf("%s%.*s", before ? before : "", (int)len, text));
    } else
        buf_add(kind == TALK_REASONING ? &a->reasoning : &a->content, text, len);
    r->on_text(r->ctx, kind, text, len);
}

void talk_take_call(const talk_request *r, talk_answer *a, const char *id, const char *name) {
    if (!a->calls)
        a->calls = json_array();
    json_array_append_new(a->calls, json_pack("{s:s, s:s, s:{s:s, s:s}}", "id", id, "type", "function", "function",
                                              "name", name, "arguments", ""));
    r->on_text(r->ctx, TALK_CALL, name, strlen(name));
}

/* ---- files ---- */

static bool is_message(const json_t *m) {
    static const char *const role[] = {"system", "developer", "user", "assistant", "tool"};
    const char *is = json_string_value(json_object_get(m, "role"));
    const json_t *calls = json_object_get(m, "tool_calls");
    size_t i;
    json_t *call;
    bool known = false;
    for (i = 0; is && i < ORCD_COUNT(role); i++)
        known = known || strcmp(is, role[i]) == 0;
    json_array_foreach(calls, i, call) {
        const json_t *f = json_object_get(call, "function");
        known = known && json_is_string(json_object_get(call, "id")) && json_is_string(json_object_get(f, "name")) &&
                json_is_string(json_object_get(f, "arguments"));
    }
    return known && json_is_string(json_object_get(m, "content"));
}

orcd_status talk_check(const json_t *messages, orcd_error *err) {
    size_t i;
    json_t *m;
    if (!json_is_array(messages))
        return orcd_fail(err, ORCD_ERR_FORMAT, "a conversation is a JSON array of messages");
    json_array_foreach(messages, i, m) if (!is_message(m)) return orcd_fail(
        err, ORCD_ERR_FORMAT, "message %zu of the conversation has no known role or no text as its content", i);
    return ORCD_OK;
}

orcd_status talk_load(const char *path, json_t **out, orcd_error *err) {
    json_error_t e;
    *out = json_load_file(path, JSON_REJECT_DUPLICATES, &e);
    if (!*out)
        return orcd_fail(err, ORCD_ERR_IO, "%s: %s", path, e.text);
    orcd_status st = talk_check(*out, err);
    if (st != ORCD_OK) {
        json_decref(*out);
        *out = NULL;
    }
    return st;
}

orcd_status talk_save(const char *path, const json_t *messages, orcd_error *err) {
    char part[4096];
    int n = snprintf(part, sizeof part, "%s.part", path);
    if (n < 0 || (size_t)n >= sizeof part)
        return orcd_fail(err, ORCD_ERR_ARG, "the file's name is too long");
    if (json_dump_file(messages, part, JSON_INDENT(1)) != 0 || rename(part, path) != 0)
        return orcd_fail(err, ORCD_ERR_IO, "%s could not be written: %s", path, strerror(errno));
    return ORCD_OK;
}
