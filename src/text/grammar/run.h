/* text/grammar/run.h: the automaton from inside, for run.c and mask.c. */
#ifndef ORCD_TEXT_GRAMMAR_RUN_H
#define ORCD_TEXT_GRAMMAR_RUN_H

#include "text/grammar/nodes.h"

/* A way to read the text is a stack of frames: the top one is what is being written, `up` goes on when it is done.
 * Frames never change: a byte makes new ones, so that ways share what is below, and a byte is taken back by forgetting
 * what it made. */
typedef struct frame {
    int32_t up, node;
    int32_t
        n; /* ARRAY: items begun; STRING: characters; OBJECT: first member that may come; numbers: digits of a part */
    int32_t lo, hi;  /* texts that begin as what is written does; COLON: lo is the member, or GRAMMAR_NONE */
    int32_t at;      /* bytes of them written; numbers: digits after the point */
    int64_t value;   /* numbers in a range: the digits so far */
    int32_t depth;   /* objects and arrays around it */
    uint8_t state;   /* run.c */
    uint8_t gap;     /* white space in a row */
    uint8_t lead, i; /* STRING: first byte of the character, index of its next byte; \u: first digit; numbers: minus */
} frame;

enum {
    TOKEN_BYTES = 255, /* longer tokens are never chosen */
    MAX_WAYS = 32,     /* more are forgotten: less can be written then, and still nothing wrong */
    MAX_FRAMES = 8192,
    MAX_STEPS = 20000, /* for one mask; then only tokens of one byte are tried */
    MAX_KEPT = MAX_WAYS * (GRAMMAR_LEVELS + 1) + 1
};

typedef struct level { /* the ways after so many bytes */
    int first, n;      /* in `way` */
    int n_frame;       /* frames from here on are of later bytes */
} level;

struct grammar_run {
    grammar *g;
    const grammar_vocab *v;
    level level[TOKEN_BYTES + 3];
    int way[(TOKEN_BYTES + 3) * MAX_WAYS]; /* top frames; frame 0: the text is complete */
    level *to;                             /* that is being made */
    int n_frame;
    frame frame[MAX_FRAMES], kept[MAX_KEPT];
    int32_t place[MAX_FRAMES];
    int n_step;     /* for this mask */
    bool is_masked; /* `mask` belongs to level 0 */
    uint32_t *mask;
};

/* from[1] becomes what follows from[0] by this byte; false when nothing does. */
bool grammar_advance(grammar_run *r, level *from, uint8_t c);
/* Characters that may follow as they are, at least: INT32_MAX = any number; 0 outside of strings. */
int32_t grammar_free_text(const grammar_run *r, const frame *f);

/* Zeroed, of the vocabulary's length; NULL when there is no memory. */
uint32_t *grammar_new_mask(const grammar_vocab *v);

#endif
