/* /tokenize and /detokenize: the model's tokenizer for clients. Field names of llama.cpp and vLLM are both taken. */
#include <stdlib.h>
#include <string.h>

#include "serve/job.h"
#include "serve/request.h"

static bool read_body(job *j) {
    req_error bad = {0};
    size_t len;
    const char *text = http_body(j->x, &len);
    j->body = req_parse(text, len, &bad);
    if (!j->body)
        job_refuse(j, bad.status, bad.code, NULL, bad.message);
    return j->body != NULL;
}

static void tokenize_begin(job *j) {
    ids id = {0};
    if (!read_body(j))
        return;
    json_t *text = json_object_get(j->body, "content");
    text = text ? text : json_object_get(j->body, "prompt");
    bool specials = json_is_true(json_object_get(j->body, "parse_special"));
    if (!json_is_string(text)) {
        job_refuse(j, 400, "missing_required_parameter", "content", "content must be a string");
        return;
    }
    if (tok_encode(j->s->tok, json_string_value(text), json_string_length(text), specials, &id) != ORCD_OK)
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
    else {
        json_t *tokens = json_array();
        for (size_t i = 0; i < id.n; i++)
            json_array_append_new(tokens, json_integer(id.data[i]));
        job_answer(j, 200,
                   json_pack("{s:o, s:I, s:i}", "tokens", tokens, "count", (json_int_t)id.n, "max_model_len",
                             j->s->info->n_ctx));
    }
    ids_free(&id);
}

static void detokenize_begin(job *j) {
    tok_stream utf8 = {0};
    buf out = {0};
    size_t i;
    json_t *v;
    if (!read_body(j))
        return;
    json_t *tokens = json_object_get(j->body, "tokens");
    bool fine = json_is_array(tokens);
    json_array_foreach(tokens, i, v) {
        size_t len;
        json_int_t id = json_integer_value(v);
        fine = fine && json_is_integer(v) && id >= 0 && id < j->s->info->n_vocab;
        const char *bytes = fine ? tok_bytes(j->s->tok, (int32_t)id, &len) : NULL;
        if (bytes)
            tok_stream_push(&utf8, bytes, len, &out);
    }
    tok_stream_end(&utf8, &out);
    if (!fine)
        job_refuse(j, 400, "invalid_value", "tokens", "tokens must be an array of ids of the vocabulary");
    else if (out.failed)
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
    else
        job_answer(j, 200,
                   json_pack("{s:s%, s:s%}", "content", out.data ? out.data : "", out.len, "prompt",
                             out.data ? out.data : "", out.len));
    buf_free(&out);
}

const dialect api_tokenize = {.name = "tokenize", .begin = tokenize_begin};
const dialect api_detokenize = {.name = "detokenize", .begin = detokenize_begin};
