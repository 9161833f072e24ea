/* serve/responses.h: a request to /v1/responses between its two files: api_responses.c reads it, responses_out.c
 * writes the answer. Only they include this. */
#ifndef ORCD_SERVE_RESPONSES_H
#define ORCD_SERVE_RESPONSES_H

#include "serve/chat_request.h"

typedef struct wire_tool {    /* beside chat.tool of the same index: what the client calls it */
    const char *name, *space; /* space: the namespace that it was flattened from, or NULL */
    bool custom;              /* its arguments {"input": TEXT} stand for TEXT */
} wire_tool;

typedef enum item_kind { ITEM_NONE, ITEM_REASONING, ITEM_MESSAGE, ITEM_CALL } item_kind;

typedef struct responses {
    chat_request chat;
    int64_t max_output;
    bool store;
    const char *previous;
    wire_tool *wire; /* [chat.n_tool] */
    json_t *items;   /* the whole conversation, with what previous_response_id stands for */
    json_t *kept;    /* array of what chat.tool points into and the body does not hold */

    /* the answer; engine thread, then desk */
    json_t *output; /* finished items */
    item_kind open;
    char item_id[40];
    const wire_tool *tool; /* of the open call; NULL: undeclared */
    char call_id[40], call_name[80];
    buf text;
    int64_t sequence; /* number of the next event */
} responses;

/* The dialect's writing side; see serve/job.h. */
void responses_running(choice *c);
void responses_event(choice *c, const gen_event *e);
void responses_ended(choice *c);
void responses_finish(job *j);

#endif
