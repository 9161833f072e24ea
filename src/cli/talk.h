/* cli/talk.h: who answers in `orcd chat`: the model in this process or a server. A conversation is a JSON array of
 * OpenAI's chat messages, which is also what is sent, saved and loaded. */
#ifndef ORCD_CLI_TALK_H
#define ORCD_CLI_TALK_H

#include <jansson.h>
#include <signal.h>

#include "cli/engine_options.h"

typedef enum talk_kind { TALK_REASONING, TALK_CONTENT, TALK_CALL, TALK_ARGUMENTS } talk_kind;

typedef struct talk_settings {
    sampling_options sampling;
    int64_t max_tokens, max_reasoning; /* 0 = no limit but the context */
    const char *effort;
    json_t *tools; /* OpenAI's array, NULL = none */
} talk_settings;

typedef struct talk_request {
    const json_t *messages;
    const talk_settings *settings;
    const volatile sig_atomic_t *stop; /* becomes true when the answer is to end here */
    /* Text as it comes, from any thread, one call at a time. */
    void (*on_text)(void *ctx, talk_kind kind, const char *text, size_t len);
    void *ctx;
} talk_request;

typedef struct talk_answer { /* zero-initialise; free with talk_answer_free */
    buf content, reasoning;
    json_t *calls; /* array of OpenAI's tool_calls, NULL = none */
    bool stopped, cut;
    int64_t n_in, n_cached, n_out, n_reasoning, n_ctx; /* n_ctx 0: unknown */
    double prefill_s, decode_s;                        /* to the first token; from it to the last */
} talk_answer;

void talk_answer_free(talk_answer *a);
/* The assistant's message for the conversation. */
json_t *talk_answer_message(const talk_answer *a);

/* For sources: more of the answer has come. */
void talk_take(const talk_request *r, talk_answer *a, talk_kind kind, const char *text, size_t len);
void talk_take_call(const talk_request *r, talk_answer *a, const char *id, const char *name);

typedef struct talk_source talk_source;
struct talk_source {
    char about[256]; /* "gpt-oss-20b: MXFP4 on cpu: ..." */
    /* Waits for the whole answer. On failure *out holds what came. */
    orcd_status (*answer)(talk_source *s, const talk_request *r, talk_answer *out, orcd_error *err);
    void (*close)(talk_source *s);
};

/* ORCD_ERR_UNSUPPORTED for a model without a chat format. */
orcd_status talk_open_local(const engine_options *o, const char *model, talk_source **out,
                            orcd_error *err) ORCD_MUST_USE;
/* Any OpenAI-compatible server. model NULL: the first that it lists; key NULL: none. */
orcd_status talk_open_url(const char *url, const char *model, const char *key, talk_source **out,
                          orcd_error *err) ORCD_MUST_USE;

/* ---- conversations in files ---- */

/* Nothing but messages that every source understands; ORCD_ERR_FORMAT says which is not one. */
orcd_status talk_check(const json_t *messages, orcd_error *err) ORCD_MUST_USE;
orcd_status talk_load(const char *path, json_t **out, orcd_error *err) ORCD_MUST_USE;
orcd_status talk_save(const char *path, const json_t *messages, orcd_error *err) ORCD_MUST_USE;

#endif
