/* text/chat/chat.h: a conversation as every API dialect hands it over, whatever the model's own format. May include
 * base and text. Plain data: pointers are the caller's and must live until the call they are passed to returns.
 * Strings are any bytes with a length; {NULL, 0} is absent. */
#ifndef ORCD_TEXT_CHAT_CHAT_H
#define ORCD_TEXT_CHAT_CHAT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct chat_str {
    const char *data;
    size_t len;
} chat_str;

static inline chat_str chat_str_of(const char *s) { return (chat_str){s, s ? strlen(s) : 0}; }
static inline bool chat_str_is(chat_str a, const char *s) {
    return a.len == strlen(s) && (a.len == 0 || memcmp(a.data, s, a.len) == 0);
}
static inline bool chat_str_eq(chat_str a, chat_str b) {
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

typedef enum chat_role {
    CHAT_INSTRUCTIONS, /* the API's system and developer messages */
    CHAT_USER,
    CHAT_ASSISTANT,
    CHAT_TOOL /* the result of a call */
} chat_role;

typedef struct chat_call {
    chat_str id;        /* as the server or client named it; what results refer to */
    chat_str name;      /* of a declared tool, or of a built-in: "python", "browser.search" */
    chat_str arguments; /* verbatim */
    /* Exactly what the model sampled for this call (harmony_replay), when the server still knows it: it then stands
     * for the message's reasoning, preamble and this call. NULL otherwise. */
    const int32_t *replay;
    size_t n_replay;
} chat_call;

typedef struct chat_message {
    chat_role role;
    chat_str text;      /* TOOL: the result. ASSISTANT with calls: what was said before calling */
    chat_str reasoning; /* ASSISTANT only */
    const chat_call *call;
    size_t n_call;
    chat_str call_id; /* TOOL: the id of the call that it answers */
} chat_message;

typedef struct chat_tool {
    chat_str name, description;
    const json_t *parameters; /* JSON schema, NULL = none */
    bool strict;              /* arguments follow it, always */
} chat_tool;

typedef struct chat_format { /* how the answer must look */
    chat_str name, description;
    const json_t *schema;
} chat_format;

typedef enum chat_effort { CHAT_EFFORT_MEDIUM, CHAT_EFFORT_LOW, CHAT_EFFORT_HIGH } chat_effort;

/* none, minimal, low; medium; high, xhigh, max. False for any other word. */
bool chat_effort_of(const char *word, chat_effort *out);

typedef struct chat {
    const chat_message *message;
    size_t n_message;
    const chat_tool *tool;
    size_t n_tool;
    const chat_format *format; /* NULL = free text */
    chat_effort effort;
    chat_str date;        /* "2026-01-31"; absent: the model is told none */
    bool browser, python; /* built-in tools */
} chat;

#endif
