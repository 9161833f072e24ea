/* text/chat/harmony.h: the chat format of gpt-oss: conversation to token ids, sampled ids to events, and which ids
 * may come next. May include base and text. Source: openai/harmony 0.0.8 and its documentation.
 *
 * Control tokens come from here only: every text of a client is encoded without recognising them. */
#ifndef ORCD_TEXT_CHAT_HARMONY_H
#define ORCD_TEXT_CHAT_HARMONY_H

#include "text/chat/chat.h"
#include "text/grammar/grammar.h"
#include "text/tokenizer.h"

/* The control tokens of one tokenizer, looked up by name. Immutable and thread-safe; the tokenizer must outlive it. */
typedef struct harmony harmony;

/* ORCD_ERR_UNSUPPORTED when the tokenizer lacks the control tokens. */
orcd_status harmony_open(const tok *t, harmony **out, orcd_error *err) ORCD_MUST_USE;
void harmony_close(harmony *h); /* accepts NULL */

/* ---- conversation to prompt ---- */

/* Where our rendering differs from OpenAI's library on purpose, each can be made to follow it. */
typedef enum harmony_ref {
    HARMONY_REF_ORDER = 1,   /* calls in history: recipient before the channel; ours is the order that models sample */
    HARMONY_REF_HISTORY = 2, /* reasoning of old turns: dropped only before the FIRST answer, only if the last message
                                is an answer; ours drops all before the LAST answer and keeps all after it */
    HARMONY_REF_SCHEMA = 4,  /* no inlining of $ref, no anyOf with null; empty objects print as braces */
    HARMONY_REF = 7
} harmony_ref;

typedef struct harmony_prompt { /* zero-initialise; free with harmony_prompt_free */
    ids id;
    size_t *boundary; /* [n_boundary] offsets into id after each complete message, ascending: for the prefix cache */
    size_t n_boundary, cap_boundary;
} harmony_prompt;

/* System, developer, history, then <|start|>assistant: sampling begins inside a header. `ref` is 0 or harmony_ref
 * bits. ORCD_ERR_FORMAT for names outside [A-Za-z0-9_.-]{1,64}, for results of unknown calls, for schemas that are
 * no objects; ORCD_ERR_LIMIT for schemas too deep or too large. On failure *out holds nothing of use. */
orcd_status harmony_render(const harmony *h, const chat *c, unsigned ref, harmony_prompt *out,
                           orcd_error *err) ORCD_MUST_USE;
void harmony_prompt_free(harmony_prompt *p);

/* ---- sampled ids to events ---- */

typedef enum harmony_event_kind {
    HARMONY_REASONING,   /* text: more of the reasoning */
    HARMONY_CONTENT,     /* text: more of the answer, or of what is said before a call */
    HARMONY_CALL,        /* text: name of the tool; its arguments follow */
    HARMONY_ARGUMENTS,   /* text: more of the arguments; joined they are cleaned JSON (python: verbatim code) */
    HARMONY_MESSAGE_END, /* the message of the last events is complete */
    HARMONY_FORCE,       /* id: to go on with, in place of the stop token just fed; feed them as they are injected */
    HARMONY_STOP         /* last event; see stop */
} harmony_event_kind;

typedef enum harmony_stop {
    HARMONY_STOP_END,       /* the model finished its answer, or did not get further */
    HARMONY_STOP_CALL,      /* a call is complete */
    HARMONY_STOP_CUT,       /* harmony_finish: budget or cancellation; what was open is closed as it is */
    HARMONY_STOP_NO_MEMORY, /* this machine's fault */
} harmony_stop;

typedef struct harmony_event {
    harmony_event_kind kind;
    const char *text; /* whole UTF-8 characters, NUL-terminated; valid during the callback */
    size_t len;
    const int32_t *id; /* HARMONY_FORCE: [n_id] */
    size_t n_id;
    harmony_stop stop;
} harmony_event;

typedef void (*harmony_on_event)(void *ctx, const harmony_event *e);

typedef struct harmony_parse_options {
    const chat_tool *tool; /* declared tools; names are copied, the rest is not looked at */
    size_t n_tool;
    bool browser, python;
    bool force_final; /* when the model stops after reasoning alone, make it answer, once (HARMONY_FORCE) */
} harmony_parse_options;

/* Token-level state machine for one generation that began at the end of a prompt of harmony_render. It never fails
 * on what a model samples and loses no text; how malformed output is read is told in header.c and parse.c. */
typedef struct harmony_parser harmony_parser;

orcd_status harmony_parser_open(const harmony *h, const harmony_parse_options *o, harmony_on_event fn, void *ctx,
                                harmony_parser **out) ORCD_MUST_USE;
void harmony_parser_close(harmony_parser *p); /* accepts NULL */

/* The next id, stop tokens included. False once HARMONY_STOP was emitted; later calls do nothing. */
bool harmony_feed(harmony_parser *p, int32_t id);
/* No more ids will come: closes what is open with HARMONY_STOP_CUT. Does nothing after HARMONY_STOP. */
void harmony_finish(harmony_parser *p);

/* True inside the body of an answer (final channel): where stop strings and the answer's grammar apply. */
bool harmony_in_answer(const harmony_parser *p);
size_t harmony_n_reasoning(const harmony_parser *p); /* ids fed in bodies of reasoning */
size_t harmony_n_calls(const harmony_parser *p);
/* Inside a body of reasoning: append the ids that end it and begin the answer, or with `call` the header of a call up
 * to the tool's name. False elsewhere. */
bool harmony_end_reasoning(const harmony_parser *p, bool call, ids *out);
/* After HARMONY_STOP_CALL: the ids of the whole turn, ending in <|call|>, for chat_call.replay. */
orcd_status harmony_replay(const harmony_parser *p, ids *out) ORCD_MUST_USE;

/* ---- which ids may come next ---- */

/* Keeps headers to what the request allows. tool_choice none: no names, final. required: all names, no final. named
 * or allowed tools: those names, no final. An answer that must be JSON: final without preamble. */
typedef struct harmony_mask_options {
    const chat_str *name; /* tools that may be called; copied */
    size_t n_name;
    bool final;                 /* answering is allowed; without it stop tokens are masked until a call is complete */
    bool preamble;              /* content before a call is allowed */
    int32_t n_vocab;            /* of the model: the length of the bitset, at least the tokenizer's */
    grammar *answer;            /* that the answer follows; NULL = it is free */
    grammar *const *arguments;  /* [n_name], that each tool's arguments follow, NULL = they are free; NULL = all are */
    const grammar_vocab *vocab; /* where there is a grammar; must outlive the mask */
} harmony_mask_options;

typedef struct harmony_mask harmony_mask;
orcd_status harmony_mask_open(const harmony *h, const harmony_mask_options *o, harmony_mask **out,
                              orcd_error *err) ORCD_MUST_USE;
void harmony_mask_close(harmony_mask *m); /* accepts NULL */
/* Call it with each id before harmony_feed. */
void harmony_mask_feed(harmony_mask *m, const harmony_parser *p, int32_t id);
/* Bitset of the ids that may follow what `p` was fed, valid until the next call; bit id % 32 of word id / 32. */
const uint32_t *harmony_mask_next(harmony_mask *m, const harmony_parser *p);

#endif
