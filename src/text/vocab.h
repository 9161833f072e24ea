/* text/vocab.h: inside of a tokenizer: the vocabulary, its two maps, and how loaders fill it. For text/ only. */
#ifndef ORCD_TEXT_VOCAB_H
#define ORCD_TEXT_VOCAB_H

#include "text/tokenizer.h"

#define TOK_MAX_IDS (1 << 20)

enum { TOK_TEXT = 1, TOK_SPECIAL = 2, TOK_WHOLE = 4 /* encoding the token's own bytes gives the token */ };

typedef struct tok_entry {
    size_t at, len; /* bytes in the pool */
    uint8_t flags;  /* 0: a hole in the numbering */
} tok_entry;

/* Open addressing by the hash of a token's bytes; id -1 is empty. */
typedef struct tok_slot {
    uint32_t hash;
    int32_t id;
} tok_slot;
typedef struct tok_map {
    tok_slot *slot; /* [mask + 1] */
    uint32_t mask;
} tok_map;

/* Open addressing by a pair of ids; result -1 is empty. */
typedef struct tok_merge {
    int32_t left, right, result;
    uint32_t rank; /* lower merges first */
} tok_merge;

struct tok {
    tok_kind kind;
    tok_split split;
    bool whole_words; /* a piece that is a token needs no merging ("ignore_merges") */
    int32_t n_vocab, bos, eos;
    buf pool;
    tok_entry *entry; /* [n_vocab] */
    tok_map text, special;
    tok_merge *merge; /* [merge_mask + 1] */
    uint32_t merge_mask;
    int32_t byte_id[256];
    size_t max_text_len;    /* of text tokens */
    bool special_lead[256]; /* some special starts with this byte */
    size_t *special_len;    /* distinct lengths of specials, longest first */
    size_t n_special_len;
};

/* Filling, in this order: new, puts, map, merges, seal. `where` names the file in errors. */
orcd_status tok_new(int64_t n_vocab, const char *where, tok **out, orcd_error *err) ORCD_MUST_USE;
/* `spelled` is in GPT-2's alphabet, where every byte is one printable character. */
orcd_status tok_put_text(tok *t, int64_t id, const char *spelled, size_t len, const char *where,
                         orcd_error *err) ORCD_MUST_USE;
/* A special takes the place of a text token with the same id. */
orcd_status tok_put_special(tok *t, int64_t id, const char *text, size_t len, const char *where,
                            orcd_error *err) ORCD_MUST_USE;
orcd_status tok_map_all(tok *t, uint64_t n_merge, const char *where, orcd_error *err) ORCD_MUST_USE;
/* The rank-th merge; both halves and their union must be text tokens. At most n_merge calls. A repeated pair takes
 * the later rank. */
orcd_status tok_put_merge(tok *t, uint32_t rank, const char *left, size_t n_left, const char *right, size_t n_right,
                          const char *where, orcd_error *err) ORCD_MUST_USE;
orcd_status tok_seal(tok *t, const char *where, orcd_error *err) ORCD_MUST_USE;

/* A byte in GPT-2's alphabet: UTF-8, NUL-terminated. */
void tok_spell_byte(int byte, char out[3]);

/* Id of a text or special token by its bytes, -1 when there is none. */
int32_t tok_lookup(const tok *t, const tok_map *m, const char *bytes, size_t len);
const tok_merge *tok_find_merge(const tok *t, int32_t left, int32_t right); /* NULL when the pair does not merge */

/* Byte-pair encoding of one piece, n > 0, in O(n log n). */
orcd_status tok_bpe(const tok *t, const uint8_t *s, size_t n, ids *out) ORCD_MUST_USE;

#endif
