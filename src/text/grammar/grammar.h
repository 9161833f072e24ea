/* text/grammar/grammar.h: JSON that follows a schema, byte by byte, and which tokens may come next. May include base
 * and text.
 *
 * What is written follows the schema, always; not everything that follows it can be written: members come in the
 * schema's order, names and constants are spelled in one way, numbers have at most 18 digits before the point and 17
 * after it, in a range 12 and 6, and white space is a space or a line break with an indentation. A schema with a
 * keyword that is not obeyed here is refused.
 */
#ifndef ORCD_TEXT_GRAMMAR_GRAMMAR_H
#define ORCD_TEXT_GRAMMAR_GRAMMAR_H

#include <jansson.h>

#include "text/tokenizer.h"

/* A compiled schema: immutable, thread-safe, counted. */
typedef struct grammar grammar;

/* ORCD_ERR_UNSUPPORTED for a keyword that is not obeyed and for a schema that nothing follows, ORCD_ERR_LIMIT for one
 * that is too large, ORCD_ERR_FORMAT for what is no schema. */
orcd_status grammar_compile(const json_t *schema, grammar **out, orcd_error *err) ORCD_MUST_USE;
grammar *grammar_share(grammar *g); /* accepts NULL */
void grammar_close(grammar *g);     /* accepts NULL */

/* The tokens of a vocabulary in the order in which they are tried: immutable, thread-safe. */
typedef struct grammar_vocab grammar_vocab;
orcd_status grammar_vocab_open(const tok *t, int32_t n_vocab, grammar_vocab **out) ORCD_MUST_USE;
void grammar_vocab_close(grammar_vocab *v); /* accepts NULL */

/* One text while it is written. Keeps a reference to `g`; `v` must outlive it. */
typedef struct grammar_run grammar_run;
orcd_status grammar_run_open(grammar *g, const grammar_vocab *v, grammar_run **out) ORCD_MUST_USE;
void grammar_run_close(grammar_run *r); /* accepts NULL */
/* Another text, of another schema. */
void grammar_run_restart(grammar_run *r, grammar *g);
/* More of the text; false, for good, when the schema does not allow it. */
bool grammar_run_feed(grammar_run *r, const char *bytes, size_t len);
/* The text may end here. */
bool grammar_run_complete(const grammar_run *r);
/* Bitset of the tokens that may come next, valid until the next call. */
const uint32_t *grammar_run_mask(grammar_run *r);

#endif
