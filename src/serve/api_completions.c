/* OpenAI's legacy completions: raw text in, raw text out; every model can. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "serve/openai.h"

enum { MAX_PROMPTS = 64, MAX_CHOICES = 128, DEFAULT_TOKENS = 16 };

typedef struct completion {
    req_options o;
    bool echo, has_logprobs;
    bool only_prompt; /* max_tokens 0: the one token that the engine makes is not told */
    int64_t logprobs, best_of;
    const char *suffix;
    ids prompt[MAX_PROMPTS];
    buf echoed[MAX_PROMPTS]; /* the prompts as text */
    int n_prompt;
    double score[MAX_CHOICES]; /* sum of log-probabilities, for best_of */
} completion;

static const field table[] = {
    {"echo", FIELD_BOOL, 0, 0, offsetof(completion, echo), FIELD_NO_FLAG, false},
    {"logprobs", FIELD_INT, 0, 20, offsetof(completion, logprobs), offsetof(completion, has_logprobs), false},
    {"best_of", FIELD_INT, 1, MAX_N, offsetof(completion, best_of), FIELD_NO_FLAG, false},
    {"suffix", FIELD_STR, 0, 1e9, offsetof(completion, suffix), FIELD_NO_FLAG, false},
    {0},
};

/* ---- reading ---- */

static bool bad_prompt(req_error *err) {
    return req_fail(err, 400, "invalid_type", "prompt",
                    "prompt must be a string, an array of strings, an array of token ids, or an array of those");
}

static bool add_text(const job *j, completion *q, const json_t *v, req_error *err) {
    ids *out = &q->prompt[q->n_prompt++];
    if (tok_encode(j->s->tok, json_string_value(v), json_string_length(v), false, out) != ORCD_OK)
        return req_fail(err, 503, "out_of_memory", NULL, "out of memory");
    if (out->n == 0 && tok_bos(j->s->tok) >= 0)
        ids_push(out, tok_bos(j->s->tok));
    return out->n > 0 || req_fail(err, 400, "invalid_value", "prompt", "prompt must not be empty");
}

static bool add_ids(const job *j, completion *q, const json_t *list, req_error *err) {
    ids *out = &q->prompt[q->n_prompt++];
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) {
        json_int_t id = json_integer_value(v);
        if (!json_is_integer(v))
            return bad_prompt(err);
        if (id < 0 || id >= j->s->info->n_vocab)
            return req_fail(err, 400, "invalid_value", "prompt", "prompt has the token id %lld; ids go from 0 to %d",
                            (long long)id, j->s->info->n_vocab - 1);
        ids_push(out, (int32_t)id);
    }
    return out->n > 0 || req_fail(err, 400, "invalid_value", "prompt", "prompt must not be empty");
}

static bool read_prompts(const job *j, completion *q, req_error *err) {
    const json_t *p = json_object_get(j->body, "prompt");
    size_t i;
    json_t *v;
    if (!p || json_is_null(p))
        return req_fail(err, 400, "missing_required_parameter", "prompt", "prompt is required");
    if (json_is_string(p))
        return add_text(j, q, p, err);
    if (!json_is_array(p) || json_array_size(p) == 0)
        return bad_prompt(err);
    if (json_is_integer(json_array_get(p, 0)))
        return add_ids(j, q, p, err);
    if (json_array_size(p) > MAX_PROMPTS)
        return req_fail(err, 400, "invalid_value", "prompt", "at most %d prompts are taken at once", MAX_PROMPTS);
    json_array_foreach(p, i, v) {
        if (json_is_string(v) ? !add_text(j, q, v, err) : json_is_array(v) ? !add_ids(j, q, v, err) : !bad_prompt(err))
            return false;
    }
    return true;
}

static bool read_request(const job *j, completion *q, req_error *err) {
    q->o.max_tokens = DEFAULT_TOKENS;
    const json_t *most = json_object_get(j->body, "max_tokens"), *echo = json_object_get(j->body, "echo");
    q->only_prompt = json_is_true(echo) && json_is_integer(most) && json_integer_value(most) == 0;
    if (q->only_prompt)
        json_object_set_new(j->body, "max_tokens", json_integer(1));
    if (!req_read_options(j->body, j->s->info->n_vocab, &q->o, err) || !req_fields(j->body, table, q, err))
        return false;
    if (q->best_of && q->best_of < q->o.n)
        return req_fail(err, 400, "invalid_value", "best_of", "best_of is %lld and n %lld; it must be at least n",
                        (long long)q->best_of, (long long)q->o.n);
    q->best_of = q->best_of ? q->best_of : q->o.n;
    if (q->best_of > q->o.n && q->o.stream)
        return req_fail(err, 400, "invalid_value", "best_of",
                        "which answers are the best is known at the end only: "
                        "best_of beyond n cannot be streamed");
    if (q->suffix && *q->suffix)
        return req_fail(err, 400, "unsupported_parameter", "suffix", "suffix is not supported");
    if (!read_prompts(j, q, err))
        return false;
    return q->n_prompt * q->best_of <= MAX_CHOICES ||
           req_fail(err, 400, "invalid_value", q->best_of > q->o.n ? "best_of" : "n",
                    "n or best_of times the prompts may be at most %d", MAX_CHOICES);
}

static void make_echoes(const job *j, completion *q) {
    for (int i = 0; i < q->n_prompt && q->echo; i++) {
        tok_stream s = {0};
        for (size_t k = 0; k < q->prompt[i].n; k++) {
            size_t len;
            const char *bytes = tok_bytes(j->s->tok, q->prompt[i].data[k], &len);
            tok_stream_push(&s, bytes, bytes ? len : 0, &q->echoed[i]);
        }
        tok_stream_end(&s, &q->echoed[i]);
    }
}

static void begin(job *j) {
    req_error err = {0};
    completion *q = j->data = calloc(1, sizeof *q);
    if (!q) {
        job_refuse(j, 503, "out_of_memory", NULL, "out of memory");
        return;
    }
    if (!openai_body(j))
        return;
    if (!read_request(j, q, &err)) {
        openai_refuse(j, &err);
        return;
    }
    make_echoes(j, q);
    job_make_id(j->id, sizeof j->id, "cmpl-");
    j->stream = q->o.stream;
    int top = q->has_logprobs ? (int)q->logprobs : q->best_of > q->o.n ? 0 : -1;
    job_plan plan = {.gen = {.request = {.top_logprobs = top}, .stop = q->o.stop, .n_stop = q->o.n_stop},
                     .prompt = q->prompt,
                     .n_prompt = q->n_prompt,
                     .n = (int)q->best_of,
                     .score_prompt = q->echo && q->has_logprobs};
    req_apply(&q->o, j->s->info->n_vocab, &plan.gen.request);
    job_start(j, &plan);
}

/* ---- writing ---- */

/* [text, logprob, {text: logprob, ...}]; both null for the first of a prompt */
static json_t *logprob(choice *c, const eng_token *t) {
    completion *q = c->job->data;
    bool first = isnan(t->logprob), of_prompt = c->n_token == 0;
    if (!of_prompt)
        q->score[c->index] += t->logprob;
    if (!q->has_logprobs || (q->only_prompt && !of_prompt))
        return NULL;
    if (first)
        return json_pack("[o, n, n]", openai_token_text(c->job, t->id, true));
    json_t *top = json_object();
    for (int i = 0; i < t->n_top; i++) {
        json_t *key = openai_token_text(c->job, t->top[i].id, true);
        json_object_setn_new(top, json_string_value(key), json_string_length(key), json_real(t->top[i].logprob));
        json_decref(key);
    }
    return json_pack("[o, f, o]", openai_token_text(c->job, t->id, true), (double)t->logprob, top);
}

/* The legacy form: parallel arrays. Takes the entries of the choice. */
static json_t *take_logprobs(choice *c) {
    const completion *q = c->job->data;
    if (!q->has_logprobs)
        return json_null();
    size_t i;
    json_t *entry, *token = json_array(), *value = json_array(), *top = json_array(), *offset = json_array();
    json_array_foreach(c->logprob, i, entry) {
        json_t *text = json_array_get(entry, 0);
        json_array_append(token, text);
        json_array_append(value, json_array_get(entry, 1));
        json_array_append(top, json_array_get(entry, 2));
        json_array_append_new(offset, json_integer(c->offset));
        c->offset += (int64_t)utf8_count(json_string_value(text), json_string_length(text));
    }
    json_decref(c->logprob);
    c->logprob = NULL;
    return json_pack("{s:o, s:o, s:o, s:o}", "tokens", token, "token_logprobs", value, "top_logprobs", top,
                     "text_offset", offset);
}

static json_t *choice_json(choice *c, const char *text, size_t len, const char *finish) {
    return json_pack("{s:i, s:s%, s:o, s:s?}", "index", c->index, "text", text ? text : "", len, "logprobs",
                     take_logprobs(c), "finish_reason", finish);
}

static void send_text(choice *c, const char *text, size_t len, const char *finish) {
    job_send_json(c->job, NULL, openai_envelope(c->job, "text_completion", choice_json(c, text, len, finish)));
}

static void send_echo(choice *c) {
    const completion *q = c->job->data;
    const buf *echoed = &q->echoed[c->index / c->job->per_prompt];
    if (!c->began && echoed->len)
        send_text(c, echoed->data, echoed->len, NULL);
    c->began = true;
}

static void event(choice *c, const gen_event *e) {
    const completion *q = c->job->data;
    if (e->kind != GEN_CONTENT)
        return;
    send_echo(c);
    if (!q->only_prompt)
        send_text(c, e->text, e->len, NULL);
}

static const char *finish_reason(const choice *c) {
    const completion *q = c->job->data;
    return q->only_prompt ? "length" : openai_finish(c);
}

static void ended(choice *c) {
    completion *q = c->job->data;
    if (openai_stream_failure(c))
        return;
    if (q->only_prompt)
        c->result.n_new = 0;
    send_echo(c);
    send_text(c, "", 0, finish_reason(c));
}

/* The answers with the highest log-probability per token first; equal ones in their order. */
static void rank(const job *j, int first, int order[MAX_N]) {
    const completion *q = j->data;
    double mean[MAX_N];
    for (int i = 0; i < j->per_prompt; i++) {
        const choice *c = &j->choice[first + i];
        int at = i;
        mean[i] = q->score[first + i] / (double)(c->n_token > 0 ? c->n_token : 1);
        for (; at > 0 && q->best_of > q->o.n && mean[i] > mean[order[at - 1] - first]; at--)
            order[at] = order[at - 1];
        order[at] = first + i;
    }
}

static void finish(job *j) {
    completion *q = j->data;
    if (j->stream) {
        openai_stream_end(j, "text_completion", q->o.include_usage);
        return;
    }
    if (openai_failure(j))
        return;
    json_t *o = openai_envelope(j, "text_completion", NULL), *list = json_object_get(o, "choices");
    for (int i = 0; i < q->n_prompt * (int)q->o.n; i++) {
        int order[MAX_N], prompt = i / (int)q->o.n;
        rank(j, prompt * j->per_prompt, order);
        choice *c = &j->choice[order[i % q->o.n]];
        buf text = {0};
        c->index = i;
        buf_add(&text, q->echoed[prompt].data, q->echoed[prompt].len);
        if (q->only_prompt)
            c->result.n_new = 0;
        else
            buf_add(&text, c->content.data, c->content.len);
        json_array_append_new(list, choice_json(c, text.data, text.len, finish_reason(c)));
        buf_free(&text);
    }
    json_object_set_new(o, "usage", openai_usage(j));
    http_reply_json(j->x, 200, o, NULL);
}

static void free_data(job *j) {
    completion *q = j->data;
    for (int i = 0; q && i < q->n_prompt; i++) {
        ids_free(&q->prompt[i]);
        buf_free(&q->echoed[i]);
    }
    free(q);
}

const dialect api_completions = {.name = "completions",
                                 .begin = begin,
                                 .event = event,
                                 .ended = ended,
                                 .finish = finish,
                                 .logprob = logprob,
                                 .free = free_data};
