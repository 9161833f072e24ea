#include "serve/fields.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/status.h"

size_t utf8_count(const char *s, size_t len) {
    size_t n = 0;
    for (size_t i = 0; i < len; i++)
        n += ((unsigned char)s[i] & 0xc0) != 0x80;
    return n;
}

static const char *const kind_name[] = {
    [FIELD_INT] = "a whole number", [FIELD_U64] = "a whole number", [FIELD_NUM] = "a number",
    [FIELD_BOOL] = "true or false", [FIELD_STR] = "a string",
};

/* NULL when the value was stored, else the constraint that it breaks. */
static const char *store(const field *f, json_t *v, void *at) {
    double num = json_number_value(v);
    switch (f->kind) {
    case FIELD_BOOL:
        if (!json_is_boolean(v))
            return "type";
        *(bool *)at = json_is_true(v);
        return NULL;
    case FIELD_STR: {
        if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
            return "type";
        double n = (double)utf8_count(json_string_value(v), json_string_length(v));
        if (n < f->lo || n > f->hi)
            return "range";
        *(const char **)at = json_string_value(v);
        return NULL;
    }
    case FIELD_NUM:
        if (!json_is_number(v))
            return "type";
        if (!(num >= f->lo && num <= f->hi))
            return "range";
        *(double *)at = num;
        return NULL;
    case FIELD_U64:
        if (!json_is_integer(v))
            return "type";
        *(uint64_t *)at = (uint64_t)json_integer_value(v);
        return NULL;
    case FIELD_INT:
        if (!json_is_number(v) || num != floor(num))
            return "type";
        if (!(num >= f->lo && num <= f->hi))
            return "range";
        *(int64_t *)at = json_is_integer(v) ? (int64_t)json_integer_value(v) : (int64_t)num;
        return NULL;
    }
    return "type";
}

static void describe(const field *f, const char *constraint, json_t *v, field_error *e) {
    *e = (field_error){.field = f->name, .constraint = constraint, .value = v};
    if (strcmp(constraint, "required") == 0)
        snprintf(e->message, sizeof e->message, "%s is required", f->name);
    else if (strcmp(constraint, "type") == 0)
        snprintf(e->message, sizeof e->message, "%s must be %s", f->name, kind_name[f->kind]);
    else
        snprintf(e->message, sizeof e->message, "%s must be %s%g to %g%s", f->name, f->kind == FIELD_STR ? "of " : "",
                 f->lo, f->hi, f->kind == FIELD_STR ? " characters" : "");
}

int fields_read(const json_t *body, const field *table, void *into, field_error *error, int cap) {
    int n = 0;
    for (const field *f = table; f->name; f++) {
        json_t *v = json_object_get(body, f->name);
        const char *broken = NULL;
        if (!v || json_is_null(v)) {
            v = NULL;
            broken = f->required ? "required" : NULL;
        } else {
            broken = store(f, v, (char *)into + f->offset);
            if (!broken && f->given != FIELD_NO_FLAG)
                *((bool *)into + f->given) = true;
        }
        if (broken && n < cap)
            describe(f, broken, v, &error[n]);
        n += broken != NULL;
    }
    return n;
}
