/* serve/store.h: texts by id that clients may ask for again, the oldest forgotten first: the conversations behind
 * previous_response_id. May include base. Thread-safe. */
#ifndef ORCD_SERVE_STORE_H
#define ORCD_SERVE_STORE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct store store;

/* The oldest are forgotten beyond `bytes`. */
orcd_status store_open(size_t bytes, store **out, orcd_error *err) ORCD_MUST_USE;
void store_close(store *s); /* accepts NULL */

/* `owner`: only the same API key finds it again. Copied; without memory it is not remembered. */
void store_put(store *s, uint64_t owner, const char *id, const char *text);
/* A copy to free(), or NULL. */
char *store_get(store *s, uint64_t owner, const char *id);

#endif
