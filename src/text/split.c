/* The patterns of split.h as state machines. Each branch below is one alternative of the pattern, in its order, with
 * the backtracking worked out by hand. */
#include "text/split.h"

#include "text/unicode_tables.h"
#include "text/utf8.h"

enum { SYMBOL, UPPER, LOWER, LETTER, MARK, NUMBER, SPACE, NEWLINE, END }; /* NEWLINE: \r and \n */

#define IN(class, set) ((1u << (class)) & (set))
#define ANY_LETTER (1u << UPPER | 1u << LOWER | 1u << LETTER)
#define CAPITAL (1u << UPPER | 1u << LETTER | 1u << MARK) /* [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] */
#define SMALL (1u << LOWER | 1u << LETTER | 1u << MARK)   /* [\p{Ll}\p{Lm}\p{Lo}\p{M}] */
#define BOTH (CAPITAL & SMALL)
#define ANY_SPACE (1u << SPACE | 1u << NEWLINE)
#define NO_WORD (1u << SYMBOL | 1u << MARK) /* [^\s\p{L}\p{N}] */

/* Class of the character at s[at]; *len is its length, 0 at the end. */
static inline int class_at(const uint8_t *s, size_t n, size_t at, size_t *len) {
    if (at >= n) {
        *len = 0;
        return END;
    }
    uint32_t c = s[at];
    *len = 1;
    if (c >= 0x80) {
        *len = utf8_next(s + at, n - at, &c);
        return c >= UNI_END ? SYMBOL : uni_row[uni_block[c / UNI_BLOCK]][c % UNI_BLOCK] - '0';
    }
    return c == '\r' || c == '\n' ? NEWLINE : uni_row[0][c] - '0';
}

/* End of the run of characters in `set` that starts at `at`. */
static inline size_t run(const uint8_t *s, size_t n, size_t at, unsigned set) {
    size_t len;
    while (IN(class_at(s, n, at, &len), set))
        at += len;
    return at;
}

/* Length of 's 't 're 've 'm 'll 'd at s, else 0. With `fold`, in any case; U+017F folds to s. */
static size_t contraction(const uint8_t *s, size_t n, bool fold) {
    if (n < 2 || s[0] != '\'')
        return 0;
    uint8_t a = s[1], b = n > 2 ? s[2] : 0;
    if (fold && a == 0xc5 && b == 0xbf)
        return 3;
    if (fold) {
        a = a >= 'A' && a <= 'Z' ? a | 0x20 : a;
        b = b >= 'A' && b <= 'Z' ? b | 0x20 : b;
    }
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return 2;
    return ((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

/* \s+(?!\S)|\s+ for a run of spaces [0, end): the last one is left to what follows, unless it is alone. */
static size_t spaces(const uint8_t *s, size_t n, size_t end) {
    if (end == n)
        return end;
    size_t last = end - 1;
    while (last > 0 && (s[last] & 0xc0) == 0x80)
        last--;
    return last ? last : end;
}

static size_t next_gpt2(const uint8_t *s, size_t n) {
    size_t len, at = contraction(s, n, false);
    if (at)
        return at;
    int class = class_at(s, n, 0, &len);
    if (s[0] == ' ') { /* belongs to the word after it */
        at = 1;
        class = class_at(s, n, 1, &len);
    }
    if (IN(class, ANY_LETTER))
        return run(s, n, at, ANY_LETTER);
    if (class == NUMBER)
        return run(s, n, at, 1u << NUMBER);
    if (IN(class, NO_WORD))
        return run(s, n, at, NO_WORD);
    return spaces(s, n, run(s, n, 0, ANY_SPACE));
}

/* [CAPITAL]*[SMALL]+ or, failing that, [CAPITAL]+[SMALL]* from `at`; returns its end, `at` when neither fits. Where no
 * small letter follows the capitals, the first form gives them back until one that is also in SMALL ends the word. */
static size_t word(const uint8_t *s, size_t n, size_t at) {
    size_t len, end = at, end_both = at;
    for (int class; IN(class = class_at(s, n, end, &len), CAPITAL); end += len)
        if (IN(class, BOTH))
            end_both = end + len;
    size_t end_small = run(s, n, end, SMALL);
    if (end_small > end)
        return end_small;
    return end_both > at ? end_both : end;
}

static size_t next_o200k(const uint8_t *s, size_t n) {
    size_t len, len2;
    int class = class_at(s, n, 0, &len);
    size_t prefix =
        IN(class, 1u << SYMBOL | 1u << SPACE) ? len : 0; /* a mark as prefix gives the same as in the word */
    size_t end = word(s, n, prefix);
    if (end > prefix)
        return end + contraction(s + end, n - end, true);
    if (class == NUMBER) {
        end = len;
        for (int i = 1; i < 3 && class_at(s, n, end, &len2) == NUMBER; i++)
            end += len2;
        return end;
    }
    size_t space = s[0] == ' ';
    end = run(s, n, space, NO_WORD);
    if (end > space) {
        while (end < n && (s[end] == '\r' || s[end] == '\n' || s[end] == '/'))
            end++;
        return end;
    }
    end = run(s, n, 0, ANY_SPACE);
    for (size_t i = end; i > 0; i--) /* \s*[\r\n]+ */
        if (s[i - 1] == '\r' || s[i - 1] == '\n')
            return i;
    return spaces(s, n, end);
}

size_t tok_split_next(tok_split kind, const uint8_t *s, size_t n) {
    return kind == TOK_SPLIT_O200K ? next_o200k(s, n) : next_gpt2(s, n);
}
