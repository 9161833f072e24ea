/* JSON schema as TypeScript. The odd corners (descriptions that appear twice, braces that close at the inner indent)
 * are those of the texts that the model was trained on; tests/data/harmony holds what OpenAI's library makes of them.
 */
#include <stdlib.h>

#include "text/chat/parts.h"

#define MAX_DEPTH 64
#define MAX_NODES 10000

typedef struct writer {
    buf *out;
    const json_t *root; /* where local references point into */
    bool plain;
    int depth, n_node;
} writer;

static void spaces(const writer *w, size_t n) {
    while (n--)
        buf_char(w->out, ' ');
}

static void add(const writer *w, const json_t *string) {
    buf_add(w->out, json_string_value(string), json_string_length(string));
}

static const json_t *string_at(const json_t *s, const char *key) {
    const json_t *v = json_object_get(s, key);
    return json_is_string(v) ? v : NULL;
}

static const json_t *array_at(const json_t *s, const char *key) {
    const json_t *v = json_object_get(s, key);
    return json_is_array(v) ? v : NULL;
}

static bool has(const json_t *list, const char *text) {
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) if (json_is_string(v) && strcmp(json_string_value(v), text) == 0) return true;
    return false;
}

/* What a local reference ("#/$defs/Name") points to, NULL when it leads nowhere. */
static const json_t *follow(const json_t *root, const char *path) {
    const json_t *at = root;
    if (path[0] != '#')
        return NULL;
    path++;
    while (at && *path == '/') {
        size_t n = strcspn(++path, "/");
        at = json_object_getn(at, path, n);
        path += n;
    }
    return at;
}

/* The schema that stands behind $ref and anyOf [X, null]; *nullable is set for the latter. */
static const json_t *resolve(writer *w, const json_t *s, bool *nullable) {
    for (int hops = 0; !w->plain && hops < 8; hops++) {
        const json_t *ref = string_at(s, "$ref"), *any = array_at(s, "anyOf"), *next = NULL;
        if (ref) {
            next = follow(w->root, json_string_value(ref));
        } else if (json_array_size(any) == 2) {
            const json_t *a = json_array_get(any, 0), *b = json_array_get(any, 1);
            bool a_null = string_at(a, "type") && strcmp(json_string_value(string_at(a, "type")), "null") == 0;
            bool b_null = string_at(b, "type") && strcmp(json_string_value(string_at(b, "type")), "null") == 0;
            if (a_null != b_null) {
                next = a_null ? b : a;
                *nullable = true;
            }
        }
        if (!next)
            break;
        s = next;
    }
    return s;
}

static void write_type(writer *w, const json_t *s, size_t indent);

/* The type, and null where it may be that. */
static void write_value(writer *w, const json_t *s, size_t indent) {
    bool nullable = json_is_true(json_object_get(s, "nullable"));
    const json_t *behind = resolve(w, s, &nullable);
    size_t at = w->out->len;
    write_type(w, behind, indent);
    if (nullable && !w->out->failed && !strstr(w->out->data + at, "null"))
        buf_str(w->out, " | null");
}

static void write_default(writer *w, const json_t *s) {
    const json_t *v = json_object_get(s, "default");
    buf_str(w->out, "default: ");
    if (json_is_string(v)) {
        const char *quote = array_at(s, "enum") ? "" : "\"";
        buf_str(w->out, quote);
        add(w, v);
        buf_str(w->out, quote);
    } else {
        compact_json(v, w->out);
    }
}

static void write_variant(writer *w, const json_t *v, size_t indent, bool description) {
    const json_t *text = description ? string_at(v, "description") : NULL, *value = json_object_get(v, "default");
    spaces(w, indent);
    buf_str(w->out, " | ");
    write_value(w, v, indent + 3);
    if (text || value)
        buf_str(w->out, " // ");
    if (text)
        add(w, text);
    if (text && value)
        buf_char(w->out, ' ');
    if (value)
        write_default(w, v);
}

static void comment(writer *w, const json_t *text, size_t indent) {
    if (!text)
        return;
    spaces(w, indent);
    buf_str(w->out, "// ");
    add(w, text);
    buf_char(w->out, '\n');
}

static void write_title(writer *w, const json_t *s, size_t indent) {
    if (!string_at(s, "title"))
        return;
    comment(w, string_at(s, "title"), indent);
    spaces(w, indent);
    buf_str(w->out, "//\n");
}

static void write_examples(writer *w, const json_t *s, size_t indent) {
    const json_t *list = array_at(s, "examples");
    size_t i;
    json_t *v;
    if (json_array_size(list) == 0)
        return;
    spaces(w, indent);
    buf_str(w->out, "// Examples:\n");
    json_array_foreach(list, i, v) {
        if (!json_is_string(v))
            continue;
        spaces(w, indent);
        buf_str(w->out, "// - \"");
        add(w, v);
        buf_str(w->out, "\"\n");
    }
}

static void write_name(writer *w, const char *name, size_t n, bool required, size_t indent) {
    spaces(w, indent);
    buf_add(w->out, name, n);
    buf_str(w->out, required ? ":" : "?:");
}

static void write_property(writer *w, const char *name, size_t n, const json_t *s, bool required, size_t indent) {
    const json_t *text = string_at(s, "description"), *list = array_at(s, "oneOf");
    bool nullable = false;
    write_title(w, s, indent);
    if (!list) {
        if (!text)
            text = string_at(resolve(w, s, &nullable), "description");
        comment(w, text, indent);
        write_examples(w, s, indent);
        write_name(w, name, n, required, indent);
        buf_char(w->out, ' ');
        write_value(w, s, indent + 4);
        buf_char(w->out, ',');
        if (json_object_get(s, "default")) {
            buf_str(w->out, " // ");
            write_default(w, s);
        }
        buf_char(w->out, '\n');
        return;
    }
    size_t i;
    json_t *v;
    const json_t *first = string_at(json_array_get(list, 0), "description");
    write_examples(w, s, indent);
    if (text && !(first && json_equal(text, first)))
        comment(w, text, indent);
    if (json_object_get(s, "default")) {
        spaces(w, indent);
        buf_str(w->out, "// ");
        write_default(w, s);
        buf_char(w->out, '\n');
    }
    write_name(w, name, n, required, indent);
    buf_char(w->out, '\n');
    json_array_foreach(list, i, v) {
        write_variant(w, v, indent, !text || (i > 0 && !json_equal(text, json_object_get(v, "description"))));
        buf_char(w->out, '\n');
    }
    spaces(w, indent);
    buf_str(w->out, ",\n");
}

static void write_object(writer *w, const json_t *s, size_t indent) {
    const json_t *required = array_at(s, "required");
    const char *name;
    size_t n;
    json_t *v, *properties = json_object_get(s, "properties");
    comment(w, string_at(s, "description"), indent);
    buf_str(w->out, "{\n");
    json_object_keylen_foreach(properties, name, n, v) write_property(w, name, n, v, has(required, name), indent);
    spaces(w, indent);
    buf_char(w->out, '}');
}

static void write_string(writer *w, const json_t *s) {
    const char *between = "";
    size_t i;
    json_t *v;
    json_array_foreach(array_at(s, "enum"), i, v) {
        if (!json_is_string(v))
            continue;
        buf_str(w->out, between);
        buf_char(w->out, '"');
        add(w, v);
        buf_char(w->out, '"');
        between = " | ";
    }
    if (!*between)
        buf_str(w->out, "string");
}

static void write_types(writer *w, const json_t *list) {
    const char *between = "";
    size_t i;
    json_t *v;
    json_array_foreach(list, i, v) {
        if (!json_is_string(v))
            continue;
        buf_str(w->out, between);
        buf_str(w->out, strcmp(json_string_value(v), "integer") == 0 ? "number" : json_string_value(v));
        between = " | ";
    }
    if (!*between)
        buf_str(w->out, "any");
}

static void write_type(writer *w, const json_t *s, size_t indent) {
    const json_t *one_of = array_at(s, "oneOf"), *types = array_at(s, "type"), *items;
    const char *type = json_string_value(json_object_get(s, "type"));
    size_t i;
    json_t *v;
    if (++w->n_node > MAX_NODES || ++w->depth > MAX_DEPTH) {
        w->n_node = MAX_NODES + 1; /* so that everything above ends as well */
        return;
    }
    if (one_of) {
        json_array_foreach(one_of, i, v) {
            buf_char(w->out, '\n');
            write_variant(w, v, indent, true);
        }
    } else if (types) {
        write_types(w, types);
    } else if (!type) {
        buf_str(w->out, "any");
    } else if (strcmp(type, "object") == 0) {
        write_object(w, s, indent);
    } else if (strcmp(type, "string") == 0) {
        write_string(w, s);
    } else if (strcmp(type, "number") == 0 || strcmp(type, "integer") == 0) {
        buf_str(w->out, "number");
    } else if (strcmp(type, "boolean") == 0) {
        buf_str(w->out, "boolean");
    } else if (strcmp(type, "array") == 0) {
        items = json_object_get(s, "items");
        if (items) {
            bool nullable = false;
            write_type(w, resolve(w, items, &nullable), indent);
            buf_str(w->out, "[]");
        } else {
            buf_str(w->out, "Array<any>");
        }
    } else {
        buf_str(w->out, "any");
    }
    w->depth--;
}

orcd_status harmony_schema(const json_t *schema, bool plain, buf *out, orcd_error *err) {
    writer w = {.out = out, .root = schema, .plain = plain};
    bool nullable = false;
    write_type(&w, resolve(&w, schema, &nullable), 0);
    if (w.n_node > MAX_NODES)
        return orcd_fail(err, ORCD_ERR_LIMIT, "a tool's schema is nested deeper than %d or has more than %d parts",
                         MAX_DEPTH, MAX_NODES);
    return ORCD_OK;
}

bool harmony_schema_is_empty(const json_t *schema) {
    const char *type = json_string_value(json_object_get(schema, "type"));
    return type && strcmp(type, "object") == 0 && !array_at(schema, "oneOf") &&
           json_object_size(json_object_get(schema, "properties")) == 0;
}
