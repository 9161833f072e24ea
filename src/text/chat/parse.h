/* text/chat/parse.h: inside of a parser, for parse.c and mask.c. */
#ifndef ORCD_TEXT_CHAT_PARSE_H
#define ORCD_TEXT_CHAT_PARSE_H

#include "text/chat/arguments.h"
#include "text/chat/header.h"

typedef enum parse_state { PARSE_HEADER, PARSE_BODY, PARSE_BETWEEN, PARSE_DONE } parse_state;

typedef enum parse_route {
    ROUTE_REASONING,
    ROUTE_CONTENT,
    ROUTE_CALL,
    ROUTE_MAYBE, /* commentary that may turn out to be the call of the only tool: a body { is held */
    ROUTE_HELD,  /* ... and is */
    ROUTE_ORPHAN /* a call in a conversation without tools: content, if there will be no other */
} parse_route;

struct harmony_parser {
    const harmony *h;
    harmony_on_event fn;
    void *ctx;
    header_tools tools;
    bool force_final;
    ids force; /* <|end|><|start|>assistant<|channel|>final<|message|> */

    parse_state state;
    header head;
    ids head_id;     /* ids of the header so far, without <|start|> */
    bool head_begun; /* it began with <|start|>: "assistant" is part of it */
    bool head_odd;   /* its text has a brace or a line break */
    header_channel last_channel;
    buf stray; /* BETWEEN: text where a control token should be */

    parse_route route;
    bool in_final, has_text; /* of the body */
    bool held_assistant;     /* the word came last: a header may follow that lacks <|start|> */
    tok_stream utf8;
    buf piece;   /* whole characters of the id just fed */
    buf out;     /* cleaned arguments to emit */
    buf pending; /* ROUTE_HELD and ROUTE_ORPHAN */
    arguments args;

    bool said_reasoning, said_content, forced, no_memory;
    size_t n_reasoning, n_call, n_empty;
    char called[65]; /* the tool of the call that began last */
    ids fed;
};

#endif
