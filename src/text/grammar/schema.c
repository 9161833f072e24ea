/* From a JSON schema to nodes, one after the other: what a node refers to is put at the end of the list and made when
 * its turn comes, so that neither deep nor circular schemas need a deep stack. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "text/compact.h"
#include "text/grammar/nodes.h"

#define MAX_NODES 10000
#define MAX_LINKS 100000
#define MAX_TEXTS 20000
#define MAX_BYTES (1 << 20)
#define MAX_LEAST 2000                 /* of minItems and minLength */
#define NO_LEVELS (GRAMMAR_LEVELS + 1) /* no value is known that is not nested deeper */

/* The types of JSON; ANY is to be found out. */
typedef enum type { ANY, OBJECT, ARRAY, STRING, NUMBER, INTEGER, BOOLEAN, NIL, N_TYPE } type;
static const char *const type_name[N_TYPE] = {"", "object", "array", "string", "number", "integer", "boolean", "null"};

typedef struct source {   /* what a node is made of */
    const json_t *schema; /* NULL = anything of the type */
    type type;
} source;

typedef struct build {
    grammar *g; /* its arrays have room for the most */
    const json_t *root;
    source *source; /* [MAX_NODES] */
    json_t *seen;   /* path of a reference -> its node */
    int32_t any;    /* the node of any value, or GRAMMAR_NONE */
    orcd_status status;
    orcd_error *err;
} build;

/* The first reason stays. `what` has one %s, for `name`. */
static void refuse(build *b, orcd_status status, const char *what, const char *name) {
    if (b->status == ORCD_OK)
        b->status = orcd_fail(b->err, status, what, name);
}

static bool room(build *b, int64_t need, int64_t most, const char *what) {
    if (need > most)
        refuse(b, ORCD_ERR_LIMIT, "the schema has too many %s", what);
    return b->status == ORCD_OK;
}

/* ---- growing; after refusing nothing grows and any number will do ---- */

static int32_t add_node(build *b, const json_t *schema, type t) {
    grammar *g = b->g;
    if (!room(b, g->n_node + 1, MAX_NODES, "parts"))
        return 0;
    b->source[g->n_node] = (source){schema, t};
    g->node[g->n_node] = (node){.kind = NODE_CHOICE, .max = INT32_MAX, .item = GRAMMAR_NONE, .levels = NO_LEVELS};
    return g->n_node++;
}

static int32_t any_node(build *b) {
    if (b->any == GRAMMAR_NONE)
        b->any = add_node(b, NULL, ANY);
    return b->any;
}

/* An alternative of the choice that is being made. */
static void add_link(build *b, node *choice, int32_t to) {
    grammar *g = b->g;
    if (!room(b, g->n_link + 1, MAX_LINKS, "alternatives"))
        return;
    choice->first = choice->n++ ? choice->first : g->n_link;
    g->link[g->n_link++] = to;
}

/* JSON as it is to be spelled, without its first `skip` bytes. */
static void add_text(build *b, const json_t *v, size_t skip, int32_t of) {
    grammar *g = b->g;
    buf out = {0};
    compact_json(v, &out);
    if (out.failed)
        refuse(b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    if (room(b, g->n_text + 1, MAX_TEXTS, "names and constants") &&
        room(b, (int64_t)(g->bytes.len + out.len), MAX_BYTES, "bytes of names and constants")) {
        g->text[g->n_text++] = (text){(int32_t)g->bytes.len, (int32_t)(out.len - skip), of};
        buf_add(&g->bytes, out.data + skip, out.len - skip);
    }
    buf_free(&out);
}

static int by_bytes(const void *a, const void *b, void *bytes) {
    const text *x = a, *y = b;
    int order = memcmp((char *)bytes + x->at, (char *)bytes + y->at, (size_t)(x->len < y->len ? x->len : y->len));
    return order ? order : (x->len > y->len) - (x->len < y->len);
}

/* The texts from `first` on, in order and each once; how many. */
static int32_t sort_texts(build *b, int32_t first) {
    grammar *g = b->g;
    int32_t n = first;
    if (g->n_text > first)
        qsort_r(g->text + first, (size_t)(g->n_text - first), sizeof *g->text, by_bytes, g->bytes.data);
    for (int32_t i = first; i < g->n_text; i++)
        if (n == first || by_bytes(&g->text[n - 1], &g->text[i], g->bytes.data) != 0)
            g->text[n++] = g->text[i];
    g->n_text = n;
    return n - first;
}

/* ---- reading ---- */

static bool is_in(const char *name, const char *const *list) {
    while (*list && strcmp(name, *list) != 0)
        list++;
    return *list != NULL;
}

/* Every keyword must be in `obeyed` or say nothing about what is valid; `format` says nothing unless a vocabulary makes
 * it do so. */
static bool check_keywords(build *b, const json_t *schema, const char *const *obeyed) {
    static const char *const remarks[] = {"title",   "description", "default",     "examples",   "$schema",
                                          "$id",     "$comment",    "$defs",       "deprecated", "readOnly",
                                          "$anchor", "format",      "definitions", "writeOnly",  NULL};
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)schema, key, v) {
        if (!is_in(key, remarks) && !is_in(key, obeyed))
            refuse(b, ORCD_ERR_UNSUPPORTED, "the schema's keyword \"%.60s\" is not supported where it stands", key);
    }
    return b->status == ORCD_OK;
}

static void malformed(build *b, const char *key) {
    refuse(b, ORCD_ERR_FORMAT, "the schema's %s is not what JSON Schema allows", key);
}

static void read_count(build *b, const json_t *schema, const char *key, json_int_t most, int32_t *out) {
    const json_t *v = json_object_get(schema, key);
    json_int_t n = json_integer_value(v);
    if (v && (!json_is_integer(v) || n < 0))
        malformed(b, key);
    else if (v && n > most && most < INT32_MAX)
        refuse(b, ORCD_ERR_LIMIT, "the schema's %s is too large", key);
    else if (v)
        *out = n < INT32_MAX ? (int32_t)n : INT32_MAX;
}

static type type_named(const json_t *name) {
    type t = json_is_string(name) ? OBJECT : N_TYPE;
    while (t < N_TYPE && strcmp(json_string_value(name), type_name[t]) != 0)
        t++;
    return t;
}

static bool is_of(const json_t *v, type t) {
    return t == OBJECT    ? json_is_object(v)
           : t == ARRAY   ? json_is_array(v)
           : t == STRING  ? json_is_string(v)
           : t == NUMBER  ? json_is_number(v)
           : t == INTEGER ? json_is_integer(v)
           : t == BOOLEAN ? json_is_boolean(v)
                          : json_is_null(v);
}

/* True when `types`, a name, a list of them or absent, has the type of v. */
static bool has_type_of(const json_t *types, const json_t *v) {
    size_t i;
    json_t *name;
    bool found = !types || (json_is_string(types) && is_of(v, type_named(types)));
    json_array_foreach(types, i, name) found |= is_of(v, type_named(name));
    return found;
}

/* What a local reference ("#/$defs/Name") points to, NULL when it leads nowhere. */
static const json_t *follow(const json_t *root, const char *path) {
    const json_t *at = *path++ == '#' ? root : NULL;
    while (at && *path == '/') {
        buf key = {0};
        for (path++; *path && *path != '/'; path++) {
            bool escape = *path == '~' && (path[1] == '0' || path[1] == '1');
            buf_char(&key, !escape ? *path : *++path == '0' ? '~' : '/');
        }
        at = key.data ? json_object_getn(at, key.data, key.len) : NULL;
        buf_free(&key);
    }
    return *path ? NULL : at;
}

/* ---- making ---- */

static void make_reference(build *b, node *n, const json_t *ref) {
    static const char *const obeyed[] = {"$ref", NULL};
    const char *path = json_string_value(ref);
    const json_t *to = path ? follow(b->root, path) : NULL;
    if (!to)
        refuse(b, ORCD_ERR_UNSUPPORTED, "the schema's $ref \"%.60s\" leads nowhere within it", path ? path : "");
    if (!check_keywords(b, b->source[n - b->g->node].schema, obeyed))
        return;
    json_t *made = json_object_get(b->seen, path);
    if (!made && json_object_set_new(b->seen, path, made = json_integer(add_node(b, to, ANY))) != 0)
        refuse(b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    else
        add_link(b, n, (int32_t)json_integer_value(made));
}

/* key: anyOf, or allOf of one. */
static void make_choice(build *b, node *n, const json_t *schema, const char *key) {
    const json_t *list = json_object_get(schema, key);
    size_t i;
    json_t *s;
    if (!json_is_array(list))
        malformed(b, key);
    if (check_keywords(b, schema, (const char *const[]){key, NULL}))
        json_array_foreach(list, i, s) add_link(b, n, add_node(b, s, ANY));
}

/* values: those of enum, or NULL for const. */
static void make_literal(build *b, node *n, const json_t *schema, const json_t *values) {
    static const char *const obeyed[] = {"enum", "const", "type", NULL};
    const json_t *types = json_object_get(schema, "type"), *only = json_object_get(schema, "const");
    size_t i;
    json_t *v;
    n->kind = NODE_LITERAL;
    n->first = b->g->n_text;
    if (values && !json_is_array(values))
        malformed(b, "enum");
    if (!check_keywords(b, schema, obeyed))
        return;
    if (!values && has_type_of(types, only))
        add_text(b, only, 0, 0);
    json_array_foreach(values, i, v) if (has_type_of(types, v) && (!only || json_equal(v, only))) add_text(b, v, 0, 0);
    n->n = sort_texts(b, n->first);
}

static void add_member(build *b, node *object, const char *name, size_t len, const json_t *schema, bool required) {
    grammar *g = b->g;
    json_t *key = json_stringn(name, len);
    if (!key)
        refuse(b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    if (room(b, g->n_member + 1, MAX_NODES, "members")) {
        add_text(b, key, 1, object->n); /* without its first quote */
        g->member[g->n_member++] =
            (member){.node = schema ? add_node(b, schema, ANY) : any_node(b), .required = required};
        object->n++;
    }
    json_decref(key);
}

/* Members whose names are required but nowhere described come last. */
static void make_object(build *b, node *n, const json_t *schema) {
    const json_t *properties = json_object_get(schema, "properties"), *names = json_object_get(schema, "required");
    const json_t *more = json_object_get(schema, "additionalProperties");
    json_t *required = json_object(), *v;
    const char *name;
    size_t i, len;
    n->kind = NODE_OBJECT;
    n->first = b->g->n_member;
    n->key = b->g->n_text;
    if (properties && !json_is_object(properties))
        malformed(b, "properties");
    if (names && !json_is_array(names))
        malformed(b, "required");
    json_array_foreach(names, i, v) {
        if (!json_is_string(v))
            malformed(b, "required");
        else if (json_object_set_new(required, json_string_value(v), json_true()) != 0)
            refuse(b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    }
    json_object_keylen_foreach((json_t *)(uintptr_t)properties, name, len, v) {
        add_member(b, n, name, len, v, json_object_getn(required, name, len) != NULL);
        json_object_deln(required, name, len);
    }
    json_object_keylen_foreach(required, name, len, v) add_member(b, n, name, len, more, true);
    json_decref(required);
    sort_texts(b, n->key);
    member *m = b->g->member + n->first;
    for (int32_t k = n->n - 1; k >= 0; k--)
        m[k].last = m[k].required || k == n->n - 1 ? k : m[k + 1].last;
    if (more ? !json_is_false(more) : json_object_size(properties) == 0)
        n->item = more ? add_node(b, more, ANY) : any_node(b);
}

static void make_array(build *b, node *n, const json_t *schema) {
    const json_t *items = json_object_get(schema, "items");
    n->kind = NODE_ARRAY;
    read_count(b, schema, "minItems", MAX_LEAST, &n->min);
    read_count(b, schema, "maxItems", INT32_MAX, &n->max);
    n->item = items ? add_node(b, items, ANY) : any_node(b);
}

static void make_string(build *b, node *n, const json_t *schema) {
    n->kind = NODE_STRING;
    read_count(b, schema, "minLength", MAX_LEAST, &n->min);
    read_count(b, schema, "maxLength", INT32_MAX, &n->max);
}

/* A bound in units of 10^-fraction, up or down where it lies between two. more: 1 when it is no longer in. */
static int64_t bound(const json_t *v, int fraction, bool up, int more) {
    double x = json_number_value(v);
    long double units = fraction ? 1e6L : 1, scaled = (long double)x * units, near = roundl(scaled);
    if (fabsl(scaled) >= (long double)GRAMMAR_BEYOND)
        return x < 0 ? -GRAMMAR_BEYOND : GRAMMAR_BEYOND;
    if (json_is_integer(v) && !fraction)
        return json_integer_value(v) + (up ? more : -more);
    if ((double)(near / units) == x)
        return (int64_t)near + (up ? more : -more);
    return (int64_t)(up ? ceill(scaled) : floorl(scaled));
}

static void make_number(build *b, node *n, const json_t *schema, bool integer) {
    static const char *const key[] = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"};
    n->kind = NODE_NUMBER;
    n->low = -GRAMMAR_BEYOND;
    n->high = GRAMMAR_BEYOND;
    for (int k = 0; k < 4; k++)
        n->bounded |= json_object_get(schema, key[k]) != NULL;
    n->whole = integer || !n->bounded ? 18 : 12;
    n->fraction = integer ? 0 : n->bounded ? 6 : 17;
    for (int k = 0; k < 4; k++) {
        const json_t *v = json_object_get(schema, key[k]);
        int64_t at = bound(v, n->fraction, k < 2, k % 2);
        if (v && !json_is_number(v))
            malformed(b, key[k]);
        else if (v && k < 2)
            n->low = at > n->low ? at : n->low;
        else if (v)
            n->high = at < n->high ? at : n->high;
    }
}

static void make_of_type(build *b, node *n, const json_t *schema, type t) {
    switch (t) {
    case OBJECT:
        make_object(b, n, schema);
        break;
    case ARRAY:
        make_array(b, n, schema);
        break;
    case STRING:
        make_string(b, n, schema);
        break;
    case NUMBER:
    case INTEGER:
        make_number(b, n, schema, t == INTEGER);
        break;
    case BOOLEAN:
    case NIL:
        n->kind = NODE_LITERAL;
        n->first = b->g->n_text;
        add_text(b, t == NIL ? json_null() : json_false(), 0, 0);
        if (t == BOOLEAN)
            add_text(b, json_true(), 0, 0);
        n->n = sort_texts(b, n->first);
        break;
    default:
        malformed(b, "type");
    }
}

/* Keywords of schemas that are no choices, and the type that each speaks of. */
static const char *const typed[] = {"type",
                                    "properties",
                                    "required",
                                    "additionalProperties",
                                    "items",
                                    "minItems",
                                    "maxItems",
                                    "minLength",
                                    "maxLength",
                                    "minimum",
                                    "maximum",
                                    "exclusiveMinimum",
                                    "exclusiveMaximum",
                                    NULL};
static const type spoken_of[] = {ANY,    OBJECT, OBJECT, OBJECT, ARRAY,  ARRAY, ARRAY,
                                 STRING, STRING, NUMBER, NUMBER, NUMBER, NUMBER};

/* What is meant where there is no type; ANY when the keywords do not tell. */
static type type_meant(const json_t *schema) {
    size_t i = 1;
    while (typed[i] && !json_object_get(schema, typed[i]))
        i++;
    return typed[i] ? spoken_of[i] : ANY;
}

static void make_typed(build *b, node *n, const json_t *schema) {
    const json_t *types = json_object_get(schema, "type");
    size_t i;
    json_t *name;
    if (!check_keywords(b, schema, typed))
        return;
    if (json_is_array(types))
        json_array_foreach(types, i, name) add_link(b, n, add_node(b, schema, type_named(name)));
    else if (types || type_meant(schema) != ANY)
        make_of_type(b, n, schema, types ? type_named(types) : type_meant(schema));
    else
        add_link(b, n, any_node(b));
}

static void make(build *b, int32_t index) {
    node *n = &b->g->node[index];
    const json_t *s = b->source[index].schema, *v;
    if (b->source[index].type != ANY)
        make_of_type(b, n, s, b->source[index].type);
    else if (!s)
        for (type t = OBJECT; t < N_TYPE; t += t == NUMBER ? 2 : 1) /* integers are numbers */
            add_link(b, n, add_node(b, NULL, t));
    else if (json_is_true(s))
        add_link(b, n, any_node(b));
    else if (!json_is_object(s) && !json_is_false(s))
        malformed(b, "part");
    else if ((v = json_object_get(s, "$ref")))
        make_reference(b, n, v);
    else if (json_object_get(s, "anyOf"))
        make_choice(b, n, s, "anyOf");
    else if (json_array_size(json_object_get(s, "allOf")) == 1)
        make_choice(b, n, s, "allOf");
    else if ((v = json_object_get(s, "enum")) || json_object_get(s, "const"))
        make_literal(b, n, s, v);
    else if (json_is_object(s))
        make_typed(b, n, s);
}

/* ---- finishing ---- */

/* Every choice among choices becomes one among what they lead to. */
static void flatten(build *b) {
    grammar *g = b->g;
    int32_t *mark = calloc(MAX_NODES, sizeof *mark), *stack = malloc(MAX_NODES * sizeof *stack);
    if (!mark || !stack)
        refuse(b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    for (int32_t i = 0; i < g->n_node && b->status == ORCD_OK; i++) {
        int32_t first = g->n_link, n_stack = 1;
        if (g->node[i].kind != NODE_CHOICE)
            continue;
        mark[stack[0] = i] = i + 1;
        while (n_stack > 0) {
            const node *c = &g->node[stack[--n_stack]];
            for (int32_t k = c->first; k < c->first + c->n; k++) {
                int32_t to = g->link[k];
                if (mark[to] == i + 1 || !room(b, g->n_link + 1, MAX_LINKS, "alternatives"))
                    continue;
                mark[to] = i + 1;
                if (g->node[to].kind == NODE_CHOICE)
                    stack[n_stack++] = to;
                else
                    g->link[g->n_link++] = to;
            }
        }
        g->node[i].first = first;
        g->node[i].n = g->n_link - first;
    }
    free(mark);
    free(stack);
}

static int32_t levels_of(const grammar *g, const node *n) {
    int32_t most = 0;
    switch (n->kind) {
    case NODE_CHOICE:
        most = NO_LEVELS;
        for (int32_t k = n->first; k < n->first + n->n; k++)
            most = g->node[g->link[k]].levels < most ? g->node[g->link[k]].levels : most;
        return most;
    case NODE_OBJECT:
        for (int32_t k = n->first; k < n->first + n->n; k++)
            if (g->member[k].required && g->node[g->member[k].node].levels > most)
                most = g->node[g->member[k].node].levels;
        return most + 1;
    case NODE_ARRAY:
        return n->min > n->max ? NO_LEVELS : 1 + (n->min > 0 ? g->node[n->item].levels : 0);
    case NODE_LITERAL:
        return n->n ? 0 : NO_LEVELS;
    case NODE_NUMBER:
        return n->low > n->high || n->low >= GRAMMAR_BEYOND || n->high <= -GRAMMAR_BEYOND ? NO_LEVELS : 0;
    default:
        return n->min > n->max ? NO_LEVELS : 0;
    }
}

static void count_levels(build *b) {
    grammar *g = b->g;
    for (bool changed = true; changed;) {
        changed = false;
        for (int32_t i = 0; i < g->n_node; i++) {
            int32_t levels = levels_of(g, &g->node[i]);
            levels = levels < NO_LEVELS ? levels : NO_LEVELS;
            changed |= levels != g->node[i].levels;
            g->node[i].levels = levels;
        }
    }
    if (g->node[0].levels >= NO_LEVELS)
        refuse(b, ORCD_ERR_UNSUPPORTED, "the schema allows no %s that is not nested too deep", "value");
}

static void *shrink(void *array, int32_t n, size_t size) {
    void *p = realloc(array, (size_t)n * size + 1);
    return p ? p : array;
}

orcd_status grammar_compile(const json_t *schema, grammar **out, orcd_error *err) {
    grammar *g = calloc(1, sizeof *g);
    build b = {.g = g, .root = schema, .seen = json_object(), .any = GRAMMAR_NONE, .err = err};
    *out = NULL;
    b.source = malloc(MAX_NODES * sizeof *b.source);
    if (g) {
        atomic_init(&g->n_ref, 1);
        g->node = malloc(MAX_NODES * sizeof *g->node);
        g->link = malloc(MAX_LINKS * sizeof *g->link);
        g->text = malloc(MAX_TEXTS * sizeof *g->text);
        g->member = malloc(MAX_NODES * sizeof *g->member);
    }
    if (!g || !b.seen || !b.source || !g->node || !g->link || !g->text || !g->member)
        refuse(&b, ORCD_ERR_NOMEM, "out of memory for a %s", "schema");
    else
        add_node(&b, schema, ANY);
    for (int32_t i = 0; b.status == ORCD_OK && i < g->n_node; i++)
        make(&b, i);
    if (b.status == ORCD_OK)
        flatten(&b);
    if (b.status == ORCD_OK)
        count_levels(&b);
    free(b.source);
    json_decref(b.seen);
    if (b.status != ORCD_OK) {
        grammar_close(g);
        return b.status;
    }
    g->node = shrink(g->node, g->n_node, sizeof *g->node);
    g->link = shrink(g->link, g->n_link, sizeof *g->link);
    g->text = shrink(g->text, g->n_text, sizeof *g->text);
    g->member = shrink(g->member, g->n_member, sizeof *g->member);
    *out = g;
    return ORCD_OK;
}

grammar *grammar_share(grammar *g) {
    if (g)
        atomic_fetch_add(&g->n_ref, 1);
    return g;
}

void grammar_close(grammar *g) {
    if (!g || atomic_fetch_sub(&g->n_ref, 1) > 1)
        return;
    free(g->node);
    free(g->link);
    free(g->text);
    free(g->member);
    buf_free(&g->bytes);
    free(g);
}
