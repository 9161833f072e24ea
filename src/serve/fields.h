/* serve/fields.h: request fields, declared: name, type, range. One table per endpoint is the whole validation of its
 * scalars; what is not in a table is ignored. May include base. */
#ifndef ORCD_SERVE_FIELDS_H
#define ORCD_SERVE_FIELDS_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum field_kind {
    FIELD_INT,  /* int64_t in [lo, hi]; a float with an integral value counts */
    FIELD_U64,  /* uint64_t; negative numbers wrap, as clients that draw signed seeds expect */
    FIELD_NUM,  /* double in [lo, hi] */
    FIELD_BOOL, /* bool */
    FIELD_STR,  /* const char *, of lo..hi Unicode scalars; lives as long as the JSON */
} field_kind;

typedef struct field {
    const char *name; /* NULL ends a table */
    field_kind kind;
    double lo, hi;
    size_t offset; /* of the value in the target struct */
    size_t given;  /* offset of a bool set when the field was there, or FIELD_NO_FLAG */
    bool required;
} field;
#define FIELD_NO_FLAG SIZE_MAX

typedef struct field_error {
    const char *field;
    const char *constraint; /* "required", "type", "range" */
    char message[200];
    json_t *value; /* borrowed from the body, NULL when absent */
} field_error;

/* Fill `into`; null counts as absent. Returns the number of errors, the first `cap` of which are in `error`. */
int fields_read(const json_t *body, const field *table, void *into, field_error *error, int cap);

/* Unicode scalars of valid UTF-8. */
size_t utf8_count(const char *s, size_t len);

#endif
