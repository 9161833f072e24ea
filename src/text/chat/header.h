/* text/chat/header.h: what the header of a sampled message means. For text/chat only. */
#ifndef ORCD_TEXT_CHAT_HEADER_H
#define ORCD_TEXT_CHAT_HEADER_H

#include "text/chat/parts.h"

typedef enum header_part { HEADER_ROLE, HEADER_CHANNEL, HEADER_TYPE } header_part;

typedef enum header_channel {
    CHANNEL_NONE,    /* none was given */
    CHANNEL_UNKNOWN, /* something else stands in its place */
    CHANNEL_ANALYSIS,
    CHANNEL_COMMENTARY,
    CHANNEL_FINAL
} header_channel;

#define HEADER_MAX_PARTS 8

/* The text between control tokens, in segments. Zero-initialise. */
typedef struct header {
    buf text;
    header_part part[HEADER_MAX_PARTS];
    size_t at[HEADER_MAX_PARTS]; /* start of each segment in text */
    size_t n_part;
    size_t n_text_ids; /* fed since the last control token */
} header;

void header_clear(header *h);
void header_free(header *h);
void header_begin(header *h, header_part part); /* a new segment; of too many the oldest joins the role */
void header_add(header *h, const char *bytes, size_t n);

typedef struct header_tools { /* names that calls may have */
    char **name;
    size_t n;
    bool browser, python;
} header_tools;

typedef struct header_meaning {
    header_channel channel;
    char tool[65];    /* recipient's name without "functions.", "" when the message is no call */
    bool declared;    /* it is a tool of the request */
    bool typed;       /* a content type was given */
    bool invented;    /* speaks as someone else than the assistant */
    size_t n_rest;    /* what the header has no use for: the body where <|message|> is missing */
    const char *rest; /* inside the header's text */
} header_meaning;

/* Total: every text means something. */
void header_resolve(const header *h, const header_tools *tools, header_meaning *out);

/* What text after <|end|>, where a control token should stand, may become. */
typedef enum header_stray {
    STRAY_BLANK,  /* nothing yet, or "assistant" */
    STRAY_MAYBE,  /* the start of a channel's name */
    STRAY_NAME,   /* just a channel's name */
    STRAY_HEADER, /* that and more: a header that lacks its control tokens */
    STRAY_BODY    /* an answer that lacks its header */
} header_stray;
header_stray header_judge(const char *text, size_t n);

#endif
