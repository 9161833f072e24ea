/* cli/talk_local.c: the model in this process answers. */
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli/talk.h"
#include "serve/gen.h"

typedef struct local {
    talk_source source;
    eng *engine;
    harmony *harmony;
} local;

typedef struct prompt { /* views into the JSON of the request */
    chat_message *message;
    chat_call *call;
    chat_tool *tool;
    size_t n_message, n_call, n_tool;
    harmony_prompt rendered;
} prompt;

typedef struct turn {
    const talk_request *request;
    talk_answer *answer;
    gen_finish finish;
    orcd_error error;
    sem_t done;
} turn;

static chat_str str(const json_t *v) { return (chat_str){json_string_value(v), json_string_length(v)}; }

static size_t count_calls(const json_t *messages) {
    size_t i, n = 0;
    json_t *m;
    json_array_foreach(messages, i, m) n += json_array_size(json_object_get(m, "tool_calls"));
    return n;
}

static chat_role role_of(const char *word) {
    return strcmp(word, "user") == 0        ? CHAT_USER
           : strcmp(word, "assistant") == 0 ? CHAT_ASSISTANT
           : strcmp(word, "tool") == 0      ? CHAT_TOOL
                                            : CHAT_INSTRUCTIONS;
}

static void add_message(prompt *p, const json_t *m) {
    const json_t *calls = json_object_get(m, "tool_calls");
    size_t i;
    json_t *call;
    chat_message *to = &p->message[p->n_message++];
    *to = (chat_message){.role = role_of(json_string_value(json_object_get(m, "role"))),
                         .text = str(json_object_get(m, "content")),
                         .reasoning = str(json_object_get(m, "reasoning")),
                         .call_id = str(json_object_get(m, "tool_call_id")),
                         .call = p->call + p->n_call,
                         .n_call = json_array_size(calls)};
    json_array_foreach(calls, i, call) {
        const json_t *f = json_object_get(call, "function");
        p->call[p->n_call++] = (chat_call){.id = str(json_object_get(call, "id")),
                                           .name = str(json_object_get(f, "name")),
                                           .arguments = str(json_object_get(f, "arguments"))};
    }
}

static orcd_status render(const local *l, const talk_request *r, prompt *p, orcd_error *err) {
    size_t i;
    json_t *v;
    char date[16];
    struct tm day;
    time_t now = time(NULL);
    const json_t *tools = r->settings->tools;
    p->message = calloc(json_array_size(r->messages) + 1, sizeof *p->message);
    p->call = calloc(count_calls(r->messages) + 1, sizeof *p->call);
    p->tool = calloc(json_array_size(tools) + 1, sizeof *p->tool);
    if (!p->message || !p->call || !p->tool)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    json_array_foreach(r->messages, i, v) add_message(p, v);
    json_array_foreach(tools, i, v) {
        const json_t *f = json_object_get(v, "function");
        p->tool[p->n_tool++] = (chat_tool){.name = str(json_object_get(f, "name")),
                                           .description = str(json_object_get(f, "description")),
                                           .parameters = json_object_get(f, "parameters")};
    }
    localtime_r(&now, &day);
    strftime(date, sizeof date, "%Y-%m-%d", &day);
    chat c = {.message = p->message,
              .n_message = p->n_message,
              .tool = p->tool,
              .n_tool = p->n_tool,
              .date = chat_str_of(date)};
    if (!chat_effort_of(r->settings->effort, &c.effort))
        return orcd_fail(err, ORCD_ERR_ARG, "effort is low, medium or high");
    return harmony_render(l->harmony, &c, 0, &p->rendered, err);
}

static void prompt_free(prompt *p) {
    free(p->message);
    free(p->call);
    free(p->tool);
    harmony_prompt_free(&p->rendered);
}

static bool on_event(void *ctx, const gen_event *e) {
    turn *t = ctx;
    switch (e->kind) {
    case GEN_CONTENT:
        talk_take(t->request, t->answer, TALK_CONTENT, e->text, e->len);
        break;
    case GEN_REASONING:
        talk_take(t->request, t->answer, TALK_REASONING, e->text, e->len);
        break;
    case GEN_TOOL_BEGIN:
        talk_take_call(t->request, t->answer, e->tool_id, e->tool_name);
        break;
    case GEN_TOOL_ARGS:
        talk_take(t->request, t->answer, TALK_ARGUMENTS, e->text, e->len);
        break;
    case GEN_TOOL_END:
    case GEN_TOKEN:
        break;
    }
    return true;
}

static void on_done(void *ctx, const gen_done *d) {
    turn *t = ctx;
    const eng_result *r = d->result;
    t->finish = d->finish;
    t->error = r->error;
    t->answer->n_in = r->n_prompt;
    t->answer->n_cached = r->n_cached;
    t->answer->n_out = r->n_new;
    t->answer->n_reasoning = d->n_reasoning;
    t->answer->prefill_s = r->prefill_s;
    t->answer->decode_s = r->decode_s;
    sem_post(&t->done);
}

static void wait_for(turn *t, gen *g) {
    struct timespec until;
    bool cancelled = false;
    do {
        if (*t->request->stop && !cancelled) {
            gen_cancel(g);
            cancelled = true;
        }
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 20 * 1000 * 1000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
    } while (sem_timedwait(&t->done, &until) != 0);
}

static orcd_status answer(talk_source *source, const talk_request *r, talk_answer *out, orcd_error *err) {
    local *l = (local *)source;
    const talk_settings *o = r->settings;
    prompt p = {0};
    gen *g;
    orcd_status st;
    turn t = {.request = r, .answer = out};
    sem_init(&t.done, 0, 0);
    ORCD_TRY_GOTO(st, done, render(l, r, &p, err));
    const gen_params params = {.request = {.prompt = p.rendered.id.data,
                                           .n_prompt = p.rendered.id.n,
                                           .max_new = (int32_t)o->max_tokens,
                                           .sampling = sampling_of(&o->sampling),
                                           .has_seed = o->sampling.seed.given,
                                           .top_logprobs = -1,
                                           .boundary = p.rendered.boundary,
                                           .n_boundary = (int)p.rendered.n_boundary},
                               .harmony = l->harmony,
                               .parse = {.tool = p.tool, .n_tool = p.n_tool, .force_final = true},
                               .max_reasoning = (int32_t)o->max_reasoning,
                               .on_event = on_event,
                               .on_done = on_done,
                               .ctx = &t};
    ORCD_TRY_GOTO(st, done, gen_start(l->engine, &params, &g, err));
    wait_for(&t, g);
    out->n_ctx = eng_get_info(l->engine)->n_ctx;
    out->stopped = t.finish == GEN_FINISH_CANCELLED;
    out->cut = t.finish == GEN_FINISH_LENGTH;
    if (t.finish == GEN_FINISH_ERROR) {
        *err = t.error;
        st = t.error.code;
    }
done:
    prompt_free(&p);
    sem_destroy(&t.done);
    return st;
}

static void close_local(talk_source *source) {
    local *l = (local *)source;
    eng_close(l->engine);
    harmony_close(l->harmony);
    free(l);
}

orcd_status talk_open_local(const engine_options *o, const char *model, talk_source **out, orcd_error *err) {
    orcd_status st;
    *out = NULL;
    local *l = calloc(1, sizeof *l);
    if (!l)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    l->source = (talk_source){.answer = answer, .close = close_local};
    ORCD_TRY_GOTO(st, done, open_engine(o, model, true, &l->engine, err));
    const eng_info *i = eng_get_info(l->engine);
    if (!i->has_harmony) {
        st = orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                       "%s knows no chat format: it continues texts; use `orcd run` with it, or chat with a gpt-oss "
                       "model",
                       i->model_name);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, harmony_open(eng_tok(l->engine), &l->harmony, err));
    snprintf(l->source.about, sizeof l->source.about, "%s (%s, %s) on %s", i->model_name, i->arch, i->quant, i->device);
    *out = &l->source;
    return ORCD_OK;
done:
    close_local(&l->source);
    return st;
}
