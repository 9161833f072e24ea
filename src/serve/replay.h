/* serve/replay.h: what the model sampled for its latest tool calls, by call id: a client that sends a call back without
 * its reasoning gets the very same tokens into the next prompt. May include base. Thread-safe. */
#ifndef ORCD_SERVE_REPLAY_H
#define ORCD_SERVE_REPLAY_H

#include "base/buf.h"

typedef struct replay replay;

/* The oldest are forgotten beyond `bytes`. */
orcd_status replay_open(size_t bytes, replay **out, orcd_error *err) ORCD_MUST_USE;
void replay_close(replay *r); /* accepts NULL */

/* `owner`: only the same API key finds it again. All copied; without memory it is not remembered. */
void replay_put(replay *r, uint64_t owner, const char *call_id, const char *name, const char *arguments,
                const int32_t *id, size_t n);
/* Append the ids to *out when the call is known and the client has not changed its name or the value of its JSON
 * arguments. */
bool replay_find(replay *r, uint64_t owner, const char *call_id, const char *name, const char *arguments, ids *out);

#endif
