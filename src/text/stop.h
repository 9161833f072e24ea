/* text/stop.h: stop strings, matched on text: what might become one is held back. May include base. */
#ifndef ORCD_TEXT_STOP_H
#define ORCD_TEXT_STOP_H

#include "base/buf.h"
#include "base/status.h"

typedef struct stop_set stop_set;

/* Copies the strings; empty ones are ignored. n may be 0. */
orcd_status stop_open(const char *const *string, size_t n, stop_set **out) ORCD_MUST_USE;
void stop_close(stop_set *s);

/* Take more text; what can no longer be part of a match is appended to `out`. Returns the index of the string that
 * matched first (text before it is in `out`, the rest is gone), or -1. After a match nothing more is taken. */
int stop_push(stop_set *s, const char *text, size_t len, buf *out);
/* The end without a match: append what was held back. */
void stop_flush(stop_set *s, buf *out);

#endif
