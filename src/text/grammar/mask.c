/* Which tokens may come next: those of a vocabulary are a tree of bytes, and what no byte can begin is not looked at.
 *
 * Inside a string nearly every token may come. So tokens that are whole characters without quotes, backslashes and
 * control characters are a tree of their own, PLAIN, and are allowed together where a string has room for them. */
#include <stdlib.h>
#include <string.h>

#include "text/grammar/run.h"
#include "text/utf8.h"

enum { PLAIN, OTHER, N_TREE };

typedef struct tree_node { /* in the order of a walk: a node, then what is below it */
    int32_t token;         /* that ends here, or GRAMMAR_NONE */
    int32_t next;          /* the first node that is not below this one */
    uint8_t byte, depth;
} tree_node;

struct grammar_vocab {
    size_t n_word; /* of a mask */
    tree_node *tree[N_TREE];
    int32_t n_tree[N_TREE];
    uint32_t *plain;                /* mask of the PLAIN tokens */
    int32_t *by_length;             /* PLAIN tokens by their number of characters */
    int32_t first[TOKEN_BYTES + 2]; /* in by_length: the first of at least so many */
};

static void allow(uint32_t *mask, int32_t id) { mask[id / 32] |= 1u << id % 32; }

/* ---- the vocabulary ---- */

/* Characters of a PLAIN token, 0 for others. */
static uint8_t count_characters(const char *bytes, size_t len) {
    uint8_t n = 0;
    for (size_t i = 0; i < len; n++) {
        uint32_t c;
        i += utf8_next((const uint8_t *)bytes + i, len - i, &c);
        if (c == UTF8_BAD || c < 0x20 || c == '"' || c == '\\')
            return 0;
    }
    return n;
}

static int by_bytes(const void *a, const void *b, void *t) {
    size_t n, m;
    const char *x = tok_bytes(t, *(const int32_t *)a, &n), *y = tok_bytes(t, *(const int32_t *)b, &m);
    int order = memcmp(x, y, n < m ? n : m);
    return order ? order : (n > m) - (n < m);
}

/* id: sorted by bytes. Of tokens with the same bytes only the first gets a place. */
static orcd_status grow(grammar_vocab *v, const tok *t, int which, const int32_t *id, int32_t n_id) {
    size_t n_byte = 0, len, last_len = 0;
    int32_t n = 0, path[TOKEN_BYTES];
    const char *last = "";
    for (int32_t k = 0; k < n_id; k++) {
        tok_bytes(t, id[k], &len);
        n_byte += len;
    }
    tree_node *tree = v->tree[which] = malloc((n_byte + 1) * sizeof *tree);
    if (!tree)
        return ORCD_ERR_NOMEM;
    for (int32_t k = 0; k < n_id; k++) {
        const char *bytes = tok_bytes(t, id[k], &len);
        size_t same = 0;
        while (same < len && same < last_len && bytes[same] == last[same])
            same++;
        for (size_t d = same; d < last_len; d++)
            tree[path[d]].next = n;
        for (size_t d = same; d < len; d++) {
            path[d] = n;
            tree[n++] = (tree_node){d + 1 == len ? id[k] : GRAMMAR_NONE, 0, (uint8_t)bytes[d], (uint8_t)d};
        }
        last = bytes;
        last_len = len;
    }
    for (size_t d = 0; d < last_len; d++)
        tree[path[d]].next = n;
    v->n_tree[which] = n;
    tree = realloc(tree, ((size_t)n + 1) * sizeof *tree);
    v->tree[which] = tree ? tree : v->tree[which];
    return ORCD_OK;
}

/* Tokens of text by their bytes, those of each tree. */
static void sort_out(grammar_vocab *v, const tok *t, int32_t n_vocab, int32_t *id[N_TREE], int32_t n[N_TREE]) {
    for (int32_t k = 0; k < tok_n_vocab(t) && k < n_vocab; k++) {
        size_t len;
        const char *bytes = tok_bytes(t, k, &len);
        if (tok_is_special(t, k) || len < 1 || len > TOKEN_BYTES)
            continue;
        int length = count_characters(bytes, len), which = length ? PLAIN : OTHER;
        id[which][n[which]++] = k;
        if (which == OTHER)
            continue;
        v->first[length + 1]++;
        allow(v->plain, k);
    }
    for (int which = 0; which < N_TREE; which++)
        qsort_r(id[which], (size_t)n[which], sizeof **id, by_bytes, (void *)(uintptr_t)t);
    for (int length = 1; length <= TOKEN_BYTES; length++)
        v->first[length + 1] += v->first[length];
    int32_t at[TOKEN_BYTES + 2];
    memcpy(at, v->first, sizeof at);
    for (int32_t k = 0; k < n[PLAIN]; k++) {
        size_t len;
        const char *bytes = tok_bytes(t, id[PLAIN][k], &len);
        v->by_length[at[count_characters(bytes, len)]++] = id[PLAIN][k];
    }
}

orcd_status grammar_vocab_open(const tok *t, int32_t n_vocab, grammar_vocab **out) {
    grammar_vocab *v = calloc(1, sizeof *v);
    size_t bytes = (size_t)n_vocab * sizeof(int32_t);
    int32_t *id[N_TREE] = {malloc(bytes), malloc(bytes)}, n[N_TREE] = {0};
    orcd_status st = ORCD_ERR_NOMEM;
    *out = NULL;
    if (!v || !id[PLAIN] || !id[OTHER])
        goto done;
    v->n_word = ((size_t)n_vocab + 31) / 32;
    v->plain = calloc(v->n_word, sizeof *v->plain);
    v->by_length = malloc(bytes);
    if (!v->plain || !v->by_length)
        goto done;
    sort_out(v, t, n_vocab, id, n);
    for (int which = 0; which < N_TREE; which++)
        ORCD_TRY_GOTO(st, done, grow(v, t, which, id[which], n[which]));
    *out = v;
    v = NULL;
done:
    free(id[PLAIN]);
    free(id[OTHER]);
    grammar_vocab_close(v);
    return st;
}

void grammar_vocab_close(grammar_vocab *v) {
    if (!v)
        return;
    free(v->tree[PLAIN]);
    free(v->tree[OTHER]);
    free(v->plain);
    free(v->by_length);
    free(v);
}

uint32_t *grammar_new_mask(const grammar_vocab *v) { return calloc(v->n_word, sizeof(uint32_t)); }

/* ---- the walk ---- */

/* Characters that a string may go on for, of the ways of one level the most. */
static int32_t free_text(const grammar_run *r, const level *l) {
    int32_t most = 0;
    for (int k = 0; k < l->n; k++) {
        int32_t n = grammar_free_text(r, &r->frame[r->way[l->first + k]]);
        most = n > most ? n : most;
    }
    return most;
}

/* Allow the tokens of a tree that the ways of level `from` can read. */
static void walk(grammar_run *r, level *from, int which) {
    const tree_node *tree = r->v->tree[which], *end = tree + r->v->n_tree[which], *at = tree;
    while (at < end) {
        level *now = from + at->depth;
        if ((r->n_step > MAX_STEPS && at->depth > 0) || !grammar_advance(r, now, at->byte)) {
            at = tree + at->next;
        } else if (which == PLAIN && free_text(r, now + 1) >= TOKEN_BYTES) {
            for (const tree_node *below = tree + at->next; at < below; at++)
                if (at->token >= 0)
                    allow(r->mask, at->token);
        } else {
            if (at->token >= 0)
                allow(r->mask, at->token);
            at++;
        }
    }
}

/* The PLAIN tokens of at most so many characters. */
static void allow_plain(grammar_run *r, int32_t most) {
    const grammar_vocab *v = r->v;
    memcpy(r->mask, v->plain, v->n_word * sizeof *r->mask);
    for (int32_t k = v->first[most < TOKEN_BYTES ? most + 1 : TOKEN_BYTES + 1]; k < v->first[TOKEN_BYTES + 1]; k++)
        r->mask[v->by_length[k] / 32] &= ~(1u << v->by_length[k] % 32);
}

const uint32_t *grammar_run_mask(grammar_run *r) {
    level *all = r->level, *rest = all + 1;
    if (r->is_masked)
        return r->mask;
    r->n_step = 0;
    memset(r->mask, 0, r->v->n_word * sizeof *r->mask);
    if (free_text(r, all) > 0)
        allow_plain(r, free_text(r, all));
    *rest = (level){.first = all->n, .n_frame = all->n_frame}; /* without the ways that PLAIN tokens just go on */
    for (int k = 0; k < all->n; k++)
        if (!grammar_free_text(r, &r->frame[r->way[k]]))
            r->way[rest->first + rest->n++] = r->way[k];
    if (rest->n)
        walk(r, rest, PLAIN);
    walk(r, all, OTHER);
    r->is_masked = true;
    return r->mask;
}
