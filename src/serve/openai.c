#include "serve/openai.h"

#include <stdlib.h>
#include <string.h>

void openai_refuse(job *j, const req_error *e) {
    job_refuse(j, e->status, e->code, e->param[0] ? e->param : NULL, e->message);
}

bool openai_body(job *j) {
    req_error bad = {0};
    size_t len;
    const char *text = http_body(j->x, &len);
    j->body = req_parse(text, len, &bad);
    if (!j->body)
        openai_refuse(j, &bad);
    return j->body != NULL;
}

json_t *openai_usage(const job *j) {
    job_usage u = job_count(j);
    return json_pack("{s:I, s:I, s:I, s:{s:I}, s:{s:I}}", "prompt_tokens", (json_int_t)u.in, "completion_tokens",
                     (json_int_t)u.out, "total_tokens", (json_int_t)(u.in + u.out), "prompt_tokens_details",
                     "cached_tokens", (json_int_t)u.cached, "completion_tokens_details", "reasoning_tokens",
                     (json_int_t)u.reasoning);
}

json_t *openai_envelope(const job *j, const char *object, json_t *item) {
    json_t *list = json_array();
    if (item)
        json_array_append_new(list, item);
    return json_pack("{s:s, s:s, s:I, s:s, s:o}", "id", j->id, "object", object, "created", (json_int_t)j->created,
                     "model", j->s->p.model_id, "choices", list);
}

const char *openai_finish(const choice *c) {
    return c->done.finish == GEN_FINISH_LENGTH ? "length" : c->done.finish == GEN_FINISH_TOOL ? "tool_calls" : "stop";
}

static bool failure(const choice *c, job_failure *f, const char **code) {
    if (!job_failed(c, f))
        return false;
    bool draining = atomic_load(&c->job->s->draining);
    *code = f->status == 504 ? "timeout" : "internal_error";
    if (f->status == 499 && draining) {
        f->status = 503;
        f->message = "the server is shutting down";
        *code = "shutting_down";
    } else if (f->status == 499)
        *code = "cancelled";
    else if (c->result.error.code == ORCD_ERR_DEVICE)
        *code = "device_error";
    return true;
}

bool openai_stream_failure(choice *c) {
    job_failure f;
    const char *code;
    if (!failure(c, &f, &code))
        return false;
    job_send_json(c->job, NULL, http_error_json(HTTP_ERR_OPENAI, f.status, NULL, code, NULL, f.message));
    return true;
}

bool openai_failure(job *j) {
    job_failure f;
    const char *code;
    for (int i = 0; i < j->n_choice; i++)
        if (failure(&j->choice[i], &f, &code)) {
            http_reply_error(j->x, f.status, NULL, code, NULL, f.message);
            return true;
        }
    return false;
}

void openai_stream_end(job *j, const char *object, bool include_usage) {
    if (include_usage) {
        json_t *o = openai_envelope(j, object, NULL);
        json_object_set_new(o, "usage", openai_usage(j));
        job_send_json(j, NULL, o);
    }
    job_send(j, "data: [DONE]\n\n", 14);
}

json_t *openai_token_text(const job *j, int32_t id, bool escape) {
    size_t len;
    buf b = {0};
    const char *bytes = tok_bytes(j->s->tok, id, &len);
    json_t *text = json_stringn(bytes ? bytes : "", len);
    if (text)
        return text;
    if (escape) {
        buf_str(&b, "bytes:");
        for (size_t i = 0; i < len; i++)
            buf_printf(&b, "\\x%02x", (unsigned char)bytes[i]);
    } else {
        tok_stream s = {0};
        tok_stream_push(&s, bytes, len, &b);
        tok_stream_end(&s, &b);
    }
    text = json_stringn(b.data ? b.data : "", b.len);
    buf_free(&b);
    return text;
}
