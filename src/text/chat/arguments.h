/* text/chat/arguments.h: cleaning a call's arguments while they stream. For text/chat only. */
#ifndef ORCD_TEXT_CHAT_ARGUMENTS_H
#define ORCD_TEXT_CHAT_ARGUMENTS_H

#include <stdbool.h>

#include "base/buf.h"

/* Zero-initialise. What begins with { streams at once and ends with its closing brace; anything else (a code fence,
 * an array, prose) is held to the end, when the first complete value in it is looked for. */
typedef struct arguments {
    enum { ARGUMENTS_NEW, ARGUMENTS_STREAM, ARGUMENTS_DONE, ARGUMENTS_HOLD, ARGUMENTS_RAW } mode; /* RAW: no cleaning */
    size_t depth;
    bool in_string, escaped;
    buf held;
} arguments;

/* Append to `out` what is certain. */
void arguments_push(arguments *a, const char *text, size_t n, buf *out);
/* The end; `cut`: by budget, so that nothing is repaired. Empty arguments become {}. */
void arguments_finish(arguments *a, bool cut, buf *out);
void arguments_free(arguments *a);
/* The first complete JSON object in text, or the one object of an array; false when there is none. */
bool arguments_object(const char *text, size_t n, const char **from, size_t *len);

#endif
