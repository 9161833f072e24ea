/* cli/talk_url.c: an OpenAI-compatible server answers, through /chat/completions with streaming. */
#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/talk.h"

typedef struct remote {
    talk_source source;
    char url[1024], model[256];
    struct curl_slist *headers;
} remote;

typedef struct turn {
    const talk_request *request;
    talk_answer *answer;
    CURL *curl;
    buf line; /* of the event stream, until it is whole */
    buf body; /* of an error */
    double t0, t_first, t_last;
    char error[400]; /* sent inside the stream */
    bool ended;      /* [DONE] or a reason to finish came */
} turn;

enum { MAX_LINE = 16 << 20, MAX_ERROR_BODY = 1 << 16 };

static const char *message_of(const json_t *o) {
    const json_t *e = json_object_get(o, "error");
    const char *m = json_string_value(json_object_get(e, "message"));
    return m ? m : json_string_value(e);
}

static void take_text(turn *t, talk_kind kind, const json_t *v) {
    if (json_string_length(v))
        talk_take(t->request, t->answer, kind, json_string_value(v), json_string_length(v));
}

static void take_delta(turn *t, const json_t *delta) {
    size_t i;
    json_t *call;
    const json_t *reasoning = json_object_get(delta, "reasoning");
    take_text(t, TALK_REASONING, reasoning ? reasoning : json_object_get(delta, "reasoning_content"));
    take_text(t, TALK_CONTENT, json_object_get(delta, "content"));
    json_array_foreach(json_object_get(delta, "tool_calls"), i, call) {
        const json_t *f = json_object_get(call, "function");
        const char *id = json_string_value(json_object_get(call, "id"));
        const char *name = json_string_value(json_object_get(f, "name"));
        if (id && name)
            talk_take_call(t->request, t->answer, id, name);
        if (t->answer->calls)
            take_text(t, TALK_ARGUMENTS, json_object_get(f, "arguments"));
    }
}

static int64_t number(const json_t *o, const char *group, const char *name) {
    return json_integer_value(json_object_get(group ? json_object_get(o, group) : o, name));
}

static void take_event(turn *t, const char *data) {
    json_t *o = strcmp(data, "[DONE]") == 0 ? NULL : json_loads(data, 0, NULL);
    const json_t *choice = json_array_get(json_object_get(o, "choices"), 0), *usage = json_object_get(o, "usage");
    const char *finish = json_string_value(json_object_get(choice, "finish_reason")), *error = message_of(o);
    t->ended = t->ended || !o || finish;
    t->t_last = now_s();
    if (choice && t->t_first == 0)
        t->t_first = t->t_last;
    if (error)
        snprintf(t->error, sizeof t->error, "%s", error);
    if (choice)
        take_delta(t, json_object_get(choice, "delta"));
    t->answer->cut = t->answer->cut || (finish && strcmp(finish, "length") == 0);
    if (json_is_object(usage)) {
        t->answer->n_in = number(usage, NULL, "prompt_tokens");
        t->answer->n_out = number(usage, NULL, "completion_tokens");
        t->answer->n_cached = number(usage, "prompt_tokens_details", "cached_tokens");
        t->answer->n_reasoning = number(usage, "completion_tokens_details", "reasoning_tokens");
    }
    json_decref(o);
}

static size_t on_bytes(char *bytes, size_t size, size_t n, void *ctx) {
    turn *t = ctx;
    long status = 0;
    curl_easy_getinfo(t->curl, CURLINFO_RESPONSE_CODE, &status);
    if (status != 200) {
        if (t->body.len < MAX_ERROR_BODY)
            buf_add(&t->body, bytes, size * n);
        return size * n;
    }
    for (size_t i = 0; i < size * n; i++) {
        if (bytes[i] != '\n') {
            buf_char(&t->line, bytes[i]);
            continue;
        }
        if (t->line.len && t->line.data[t->line.len - 1] == '\r')
            t->line.data[--t->line.len] = '\0';
        if (t->line.len > 5 && strncmp(t->line.data, "data:", 5) == 0)
            take_event(t, t->line.data + 5 + (t->line.data[5] == ' '));
        buf_clear(&t->line);
    }
    return t->line.failed || t->line.len > MAX_LINE ? 0 : size * n;
}

/* What is the default everywhere is left out: some servers refuse fields that their model does not know. */
static char *body_of(const remote *l, const talk_request *r) {
    const talk_settings *o = r->settings;
    const sampling_options *s = &o->sampling;
    json_t *b = json_pack("{s:s, s:O, s:b, s:{s:b}}", "model", l->model, "messages", r->messages, "stream", 1,
                          "stream_options", "include_usage", 1);
    if (strcmp(o->effort, "medium") != 0)
        json_object_set_new(b, "reasoning_effort", json_string(o->effort));
    if (s->temp != 1)
        json_object_set_new(b, "temperature", json_real(s->temp));
    if (s->top_p != 1)
        json_object_set_new(b, "top_p", json_real(s->top_p));
    if (o->max_tokens)
        json_object_set_new(b, "max_tokens", json_integer(o->max_tokens));
    if (o->max_reasoning)
        json_object_set_new(b, "max_reasoning_tokens", json_integer(o->max_reasoning));
    if (s->seed.given)
        json_object_set_new(b, "seed", json_integer((json_int_t)(s->seed.value & INT64_MAX)));
    if (o->tools)
        json_object_set(b, "tools", o->tools);
    char *text = json_dumps(b, JSON_COMPACT);
    json_decref(b);
    return text;
}

static orcd_status check_reply(const turn *t, const char *url, CURLcode code, orcd_error *err) {
    long status = 0;
    curl_easy_getinfo(t->curl, CURLINFO_RESPONSE_CODE, &status);
    if (code != CURLE_OK)
        return orcd_fail(err, ORCD_ERR_IO, "%s: %s", url, curl_easy_strerror(code));
    if (status != 200) {
        json_t *o = t->body.data ? json_loads(t->body.data, 0, NULL) : NULL;
        const char *m = message_of(o);
        orcd_status st =
            orcd_fail(err, ORCD_ERR_IO, "%s answered with status %ld%s%.300s", url, status, m ? ": " : "", m ? m : "");
        json_decref(o);
        return st;
    }
    if (t->error[0])
        return orcd_fail(err, ORCD_ERR_IO, "the server reports: %s", t->error);
    if (!t->ended)
        return orcd_fail(err, ORCD_ERR_IO, "%s ended the answer before it was complete", url);
    return ORCD_OK;
}

/* Until the reply is complete or *stop. False when it was stopped. */
static bool transfer(CURL *curl, const volatile sig_atomic_t *stop, CURLcode *code) {
    CURLM *multi = curl_multi_init();
    int running = 1, left;
    *code = CURLE_OUT_OF_MEMORY;
    if (!multi || curl_multi_add_handle(multi, curl) != CURLM_OK)
        running = 0;
    while (running && !*stop && curl_multi_perform(multi, &running) == CURLM_OK)
        if (running)
            curl_multi_poll(multi, NULL, 0, 50, NULL);
    for (CURLMsg *m; multi && (m = curl_multi_info_read(multi, &left));)
        if (m->msg == CURLMSG_DONE)
            *code = m->data.result;
    if (multi)
        curl_multi_remove_handle(multi, curl);
    curl_multi_cleanup(multi);
    return !running;
}

static CURL *handle(const remote *l, const char *url) {
    CURL *c = curl_easy_init();
    if (!c)
        return NULL;
    curl_easy_setopt(c, CURLOPT_URL, url);
    curl_easy_setopt(c, CURLOPT_HTTPHEADER, l->headers);
    curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(c, CURLOPT_CONNECTTIMEOUT, 15L);
    curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
    return c;
}

static orcd_status answer(talk_source *source, const talk_request *r, talk_answer *out, orcd_error *err) {
    remote *l = (remote *)source;
    char url[sizeof l->url + 32];
    CURLcode code;
    snprintf(url, sizeof url, "%s/chat/completions", l->url);
    turn t = {.request = r, .answer = out, .curl = handle(l, url), .t0 = now_s()};
    char *body = body_of(l, r);
    orcd_status st = ORCD_OK;
    if (!t.curl || !body) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        goto done;
    }
    curl_easy_setopt(t.curl, CURLOPT_POSTFIELDS, body);
    curl_easy_setopt(t.curl, CURLOPT_WRITEFUNCTION, on_bytes);
    curl_easy_setopt(t.curl, CURLOPT_WRITEDATA, &t);
    out->stopped = !transfer(t.curl, r->stop, &code);
    if (!out->stopped)
        st = check_reply(&t, url, code, err);
    out->prefill_s = t.t_first > 0 ? t.t_first - t.t0 : 0;
    out->decode_s = t.t_last - t.t_first;
done:
    curl_easy_cleanup(t.curl);
    free(body);
    buf_free(&t.line);
    buf_free(&t.body);
    return st;
}

static void close_url(talk_source *source) {
    remote *l = (remote *)source;
    curl_slist_free_all(l->headers);
    free(l);
    curl_global_cleanup();
}

static size_t collect(char *bytes, size_t size, size_t n, void *ctx) {
    buf_add(ctx, bytes, size * n);
    return ((buf *)ctx)->len > MAX_LINE ? 0 : size * n;
}

/* The first model that the server lists. */
static orcd_status ask_model(remote *l, orcd_error *err) {
    char url[sizeof l->url + 32];
    buf b = {0};
    snprintf(url, sizeof url, "%s/models", l->url);
    turn t = {.curl = handle(l, url), .ended = true};
    if (!t.curl)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    curl_easy_setopt(t.curl, CURLOPT_WRITEFUNCTION, collect);
    curl_easy_setopt(t.curl, CURLOPT_WRITEDATA, &b);
    curl_easy_setopt(t.curl, CURLOPT_TIMEOUT, 30L);
    CURLcode code = curl_easy_perform(t.curl);
    t.body = b;
    orcd_status st = check_reply(&t, url, code, err);
    json_t *o = st == ORCD_OK && b.data ? json_loads(b.data, 0, NULL) : NULL;
    const char *id = json_string_value(json_object_get(json_array_get(json_object_get(o, "data"), 0), "id"));
    if (st == ORCD_OK && !id)
        st = orcd_fail(err, ORCD_ERR_FORMAT, "%s lists no model; name one with --name", url);
    if (id)
        snprintf(l->model, sizeof l->model, "%s", id);
    json_decref(o);
    curl_easy_cleanup(t.curl);
    buf_free(&b);
    return st;
}

/* "host:port" and "http://host:port" mean their /v1. */
static bool set_url(remote *l, const char *url) {
    size_t n = strlen(url);
    const char *scheme = strstr(url, "://") ? "" : "http://", *host = strstr(url, "://");
    host = host ? host + 3 : url;
    while (n > 0 && url[n - 1] == '/')
        n--;
    const char *path = memchr(host, '/', n > (size_t)(host - url) ? n - (size_t)(host - url) : 0);
    int len = snprintf(l->url, sizeof l->url, "%s%.*s%s", scheme, (int)n, url, path ? "" : "/v1");
    return len > 0 && (size_t)len < sizeof l->url;
}

static bool add_header(remote *l, const char *text) {
    struct curl_slist *more = curl_slist_append(l->headers, text);
    if (more)
        l->headers = more;
    return more != NULL;
}

orcd_status talk_open_url(const char *url, const char *model, const char *key, talk_source **out, orcd_error *err) {
    char bearer[1024];
    orcd_status st = ORCD_OK;
    *out = NULL;
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != 0)
        return orcd_fail(err, ORCD_ERR_NOMEM, "libcurl could not be started");
    remote *l = calloc(1, sizeof *l);
    if (!l) {
        curl_global_cleanup();
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    }
    l->source = (talk_source){.answer = answer, .close = close_url};
    snprintf(bearer, sizeof bearer, "Authorization: Bearer %s", key ? key : "none");
    if (!set_url(l, url))
        st = orcd_fail(err, ORCD_ERR_ARG, "the URL is too long");
    else if (!add_header(l, "Content-Type: application/json") || !add_header(l, bearer))
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    else if (model)
        snprintf(l->model, sizeof l->model, "%s", model);
    else
        st = ask_model(l, err);
    if (st != ORCD_OK) {
        close_url(&l->source);
        return st;
    }
    snprintf(l->source.about, sizeof l->source.about, "%.100s at %.140s", l->model, l->url);
    *out = &l->source;
    return ORCD_OK;
}
