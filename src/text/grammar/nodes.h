/* text/grammar/nodes.h: a compiled schema from inside. Only text/grammar includes this. */
#ifndef ORCD_TEXT_GRAMMAR_NODES_H
#define ORCD_TEXT_GRAMMAR_NODES_H

#include <stdatomic.h>

#include "text/grammar/grammar.h"

#define GRAMMAR_LEVELS 64 /* of nesting in what is written */
#define GRAMMAR_NONE (-1)
#define GRAMMAR_BEYOND 1000000000000000000 /* any number in a range is smaller, in units of its last digit */

typedef enum node_kind {
    NODE_CHOICE, /* of nodes that are no choices */
    NODE_OBJECT,
    NODE_ARRAY,
    NODE_STRING,
    NODE_NUMBER,
    NODE_LITERAL, /* one of some texts */
} node_kind;

typedef struct node {
    node_kind kind;
    int32_t first, n; /* CHOICE: of link; OBJECT: of member; LITERAL: of text */
    int32_t key;      /* OBJECT: of text, n names up to the closing quote */
    int32_t min, max; /* ARRAY: items; STRING: characters; max INT32_MAX = any number */
    int32_t item;     /* ARRAY: its items; OBJECT: members without a node of their own; or GRAMMAR_NONE */
    int32_t levels;   /* of nesting that a value needs at least */
    /* NUMBER: digits before and after the point, and, when `bounded`, the range in units of the last one */
    bool bounded;
    int whole, fraction;
    int64_t low, high;
} node;

typedef struct text { /* those of one node are sorted by their bytes */
    int32_t at, len;
    int32_t member; /* of the object, counted from its first */
} text;

typedef struct member {
    int32_t node;
    bool required;
    int32_t last; /* the first from here on that is required, else the object's last: none after it can be next */
} member;

struct grammar {
    atomic_int n_ref;
    node *node; /* node[0] is where it begins */
    int32_t *link;
    text *text;
    member *member;
    int32_t n_node, n_link, n_text, n_member;
    buf bytes; /* of the texts */
};

#endif
