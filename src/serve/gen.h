/* serve/gen.h: one generation for a client: the engine's tokens become text, split at the harmony channels where the
 * model has them, with stop strings taken out. Every API dialect is a listener of these events. May include engine and
 * below. */
#ifndef ORCD_SERVE_GEN_H
#define ORCD_SERVE_GEN_H

#include "base/buf.h"
#include "engine/engine.h"
#include "text/chat/harmony.h"

typedef struct gen gen;

typedef enum gen_kind {
    GEN_TOKEN,      /* a token came, before the text that it completes, if any: token */
    GEN_CONTENT,    /* text of the answer: final channel, preambles, or everything of a raw prompt */
    GEN_REASONING,  /* text of the analysis channel */
    GEN_TOOL_BEGIN, /* a call: tool, tool_id, tool_name */
    GEN_TOOL_ARGS,  /* more of its arguments */
    GEN_TOOL_END,
} gen_kind;

typedef struct gen_event {
    gen_kind kind;
    const char *text; /* whole characters, valid during the call */
    size_t len;
    int tool; /* index of the call within the answer */
    const char *tool_id, *tool_name;
    const eng_token *token; /* GEN_TOKEN */
    bool answer;            /* GEN_TOKEN: it belongs to the text of the answer */
} gen_event;

typedef enum gen_finish {
    GEN_FINISH_EOS,
    GEN_FINISH_STOP,
    GEN_FINISH_LENGTH,
    GEN_FINISH_TOOL,
    GEN_FINISH_CANCELLED,
    GEN_FINISH_DEADLINE,
    GEN_FINISH_ERROR
} gen_finish;

typedef struct gen_done {
    gen_finish finish;
    int stop_matched;    /* index of the stop string, -1 */
    bool looped;         /* it repeated itself without end: finish is GEN_FINISH_LENGTH */
    int32_t n_reasoning; /* tokens of the analysis channel */
    const int32_t *turn; /* GEN_FINISH_TOOL: everything that was sampled, for chat_call.replay */
    size_t n_turn;
    const eng_result *result;
} gen_done;

typedef struct gen_params {
    eng_request request;     /* prompt, sampling, limits; its ctx and callbacks are set here */
    const char *const *stop; /* copied */
    size_t n_stop;
    const harmony *harmony; /* the prompt is of harmony_render: parse channels and calls; NULL = raw text */
    harmony_parse_options parse;
    int32_t max_reasoning; /* tokens; then it must answer (or call, when the mask has no answer); 0 = no limit */
    const harmony_mask_options *mask; /* keep the headers to this; NULL = free */
    /* From the engine thread; must not block. A false answer ends the generation (the client is gone). */
    bool (*on_event)(void *ctx, const gen_event *e);
    /* From the engine thread, before the first event: it has a place in the batch. May be NULL. */
    void (*on_running)(void *ctx, int32_t n_cached, int32_t n_prompt);
    /* From the engine thread: see eng_request. NULL = not asked. */
    void (*on_prompt)(void *ctx, const eng_token *t);
    /* Once, last. The gen is freed right after it. */
    void (*on_done)(void *ctx, const gen_done *d);
    void *ctx;
} gen_params;

/* Everything that `p` points to may go when this returns but `harmony`. On success events will come and *out is valid
 * until on_done returns. */
orcd_status gen_start(eng *e, const gen_params *p, gen **out, orcd_error *err) ORCD_MUST_USE;
/* Any thread, before on_done has returned. */
void gen_cancel(gen *g);

#endif
