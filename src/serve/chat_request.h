/* serve/chat_request.h: a conversation to be continued, whatever API it came from: each dialect only fills this in and
 * formats what comes out. May include engine and below. */
#ifndef ORCD_SERVE_CHAT_REQUEST_H
#define ORCD_SERVE_CHAT_REQUEST_H

#include "serve/job.h"
#include "serve/request.h"
#include "text/chat/chat.h"

typedef enum tool_choice {
    TOOL_AUTO,
    TOOL_NONE,    /* tools stay in the prompt but cannot be called */
    TOOL_REQUIRED /* a call must come; of `allowed` when there are any */
} tool_choice;

typedef struct chat_request { /* zero-initialise; free with chat_request_free */
    req_options o;
    int top_logprobs; /* -1 = none */
    chat_effort effort;
    bool hide_reasoning;
    int64_t max_reasoning; /* tokens; 0 = the server's limit */
    tool_choice choice;

    /* grown by the functions below; strings point into the body's JSON or come from chat_keep */
    chat_message *message;
    size_t n_message, cap_message;
    chat_tool *tool;
    size_t n_tool, cap_tool;
    chat_str *allowed; /* names that may be called; none = all */
    size_t n_allowed, cap_allowed;
    grammar **arguments; /* [n_allowed] of strict tools, NULL = free; NULL = all are */
    chat_format format;  /* schema NULL = free text */
    grammar *answer;     /* of that schema */
    json_t *object;      /* the schema where the request gives none */
    struct block *block;
    ids prompt;
} chat_request;

enum { CHAT_MAX_MESSAGES = 10000, CHAT_MAX_TOOLS = 512, CHAT_MAX_CALLS = 128 };

void chat_request_free(chat_request *q);
/* Zeroed memory that lives as long as the request; NULL with the error filled. */
void *chat_keep(chat_request *q, size_t bytes, req_error *err);
chat_message *chat_add_message(chat_request *q, chat_role role, req_error *err);
chat_tool *chat_add_tool(chat_request *q, req_error *err);
bool chat_allow(chat_request *q, chat_str name, req_error *err);
/* The text of a JSON string; {NULL, 0} for anything else. */
chat_str chat_json_str(const json_t *v);
/* A string, null, or an array of parts with text: joined. `where` names the field in errors. */
bool chat_read_text(chat_request *q, const json_t *v, const char *where, chat_str *out, req_error *err);
/* reasoning_effort, reasoning: {effort, exclude, max_tokens}, chat_template_kwargs.reasoning_effort, think,
 * include_reasoning, max_reasoning_tokens. */
bool chat_read_effort(chat_request *q, const json_t *body, req_error *err);
/* response_format, text.format, output_config.format: text, json_object or json_schema. */
bool chat_read_format(chat_request *q, const json_t *format, const char *where, req_error *err);
/* Give the message the tokens that the server sampled for this call, when it remembers them. */
void chat_recall(const job *j, chat_request *q, chat_call *call);

/* Desk thread: check names, render, and start the job; or refuse it. `messages` names the conversation in errors. */
void chat_start(job *j, chat_request *q, const char *messages);
/* The same up to rendering: tokens of the prompt. False after refusing. */
bool chat_count(job *j, chat_request *q, const char *messages, size_t *n);

#endif
