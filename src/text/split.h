/* text/split.h: cutting text into the pieces that byte-pair encoding works on, without a regular expression engine. */
#ifndef ORCD_TEXT_SPLIT_H
#define ORCD_TEXT_SPLIT_H

#include "text/tokenizer.h"

/* The two patterns that are known, exactly as tokenizer.json spells the second. */
#define TOK_PATTERN_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TOK_PATTERN_O200K                                                                                              \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"                        \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"                                                                                    \
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"                       \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"                                                                                    \
    "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Length of the first piece of s[0..n), n > 0. It depends on s alone, never on what stood before; over a whole text
 * the work is linear. Bytes that are no UTF-8 count as symbols. */
size_t tok_split_next(tok_split kind, const uint8_t *s, size_t n);

#endif
