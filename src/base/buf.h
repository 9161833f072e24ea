/* base/buf.h: a growing byte buffer that is always NUL-terminated. Zero-initialise; free with buf_free.
 * Once an allocation fails, `failed` stays set and later appends do nothing: check once at the end. */
#ifndef ORCD_BASE_BUF_H
#define ORCD_BASE_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct buf {
    char *data; /* NUL-terminated once anything was appended, else NULL */
    size_t len, cap;
    bool failed;
} buf;

void buf_free(buf *b);
void buf_clear(buf *b); /* keeps the memory */
void buf_add(buf *b, const void *bytes, size_t n);
void buf_str(buf *b, const char *s);
void buf_char(buf *b, char c);
void buf_printf(buf *b, const char *fmt, ...) ORCD_PRINTF(2, 3);

/* A growing vector of token ids, with the same rules. */
typedef struct ids {
    int32_t *data;
    size_t n, cap;
    bool failed;
} ids;

void ids_free(ids *v);
void ids_push(ids *v, int32_t id);
void ids_add(ids *v, const int32_t *id, size_t n);

#endif
