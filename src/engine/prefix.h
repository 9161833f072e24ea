/* engine/prefix.h: what earlier requests left in the KV memory, found again by its tokens. May include kv. Used by
 * the engine thread only.
 *
 * Full pages form a tree, one node per 64 tokens, children found by a keyed hash and compared token by token. A node
 * alone resumes nothing in a model with windows: an entry keeps, for one position P, the rest of the tokens after the
 * last full page and the window pages that cover [P - window, P).
 *
 *     root -- 64 tokens -- 64 tokens -- 64 tokens        nodes: pages of BE_POOL_FULL
 *                              |            |
 *                      entry P = 150   entry P = 192     entries: a partly filled page, window pages
 *
 * A running sequence may go on filling the partly filled page behind an entry: positions before P never change, and
 * who resumes there gets a copy. */
#ifndef ORCD_ENGINE_PREFIX_H
#define ORCD_ENGINE_PREFIX_H

#include "engine/kv.h"

typedef struct prefix prefix;

/* Where a sequence stands in the tree: its pages up to `depth` are those of the nodes. Zero-initialise. */
typedef struct prefix_cursor {
    int32_t node; /* 0 = root */
    int32_t depth;
} prefix_cursor;

/* max_idle: bytes that prefixes no one uses may keep; n_entry: entries at most. */
orcd_status prefix_open(kv_store *kv, uint64_t max_idle, int n_entry, prefix **out, orcd_error *err) ORCD_MUST_USE;
void prefix_close(prefix *c);

/* Pages of the window pool that one entry holds at most. */
int prefix_entry_pages(int window);

typedef struct prefix_hit {
    int32_t n_pos;                  /* positions that can be resumed; 0 = none */
    int32_t entry;                  /* -1 when no window pages are needed */
    int32_t fork_full, fork_window; /* pages to copy for a partly filled page, -1 = none */
} prefix_hit;

/* The longest usable prefix of id[0..n), at most n - 1 positions. Time linear in n. */
prefix_hit prefix_find(prefix *c, const int32_t *id, int32_t n, uint64_t salt);
/* Map the found pages into the empty slot and pin what is to be copied; then exactly one of the next two. */
void prefix_pin(prefix *c, const prefix_hit *h, const int32_t *id, uint64_t salt, int slot, prefix_cursor *cur);
bool prefix_fork(prefix *c, const prefix_hit *h, int slot);
void prefix_unpin(prefix *c, const prefix_hit *h, int slot, prefix_cursor *cur);

/* Remember positions [0, n_pos) of the slot, whose tokens are id. */
void prefix_save(prefix *c, int slot, const int32_t *id, int32_t n_pos, uint64_t salt, prefix_cursor *cur);
/* The sequence goes. */
void prefix_leave(prefix *c, prefix_cursor *cur);
/* Forget the oldest entries until what no one uses is within max_idle; after a slot was released. */
void prefix_trim(prefix *c);

/* ---- for engine/disk.h ---- */

typedef struct prefix_point { /* one entry; good until the cache changes */
    int32_t entry, n_pos, tail_page, n_window;
    const int32_t *window; /* [n_window]: pages that cover the positions from kv_window_first on */
    uint64_t salt;
} prefix_point;

/* Of the entries with at least `least` positions that were made or used since prefix_keep: the one used longest ago.
 * False when there is none. */
bool prefix_unkept(const prefix *c, int32_t least, prefix_point *out);
void prefix_keep(prefix *c, int32_t entry);
/* Its tokens and full pages. */
void prefix_read(const prefix *c, int32_t entry, int32_t *id /* [n_pos] */, int32_t *page /* [n_pos / BE_PAGE] */);
/* True when one more entry with so many new pages displaces nothing. */
bool prefix_has_room(const prefix *c, const int n_page[BE_N_POOLS]);
/* Map what the tree has of the full pages of id[0..n_pos) into the empty slot; how many pages that were. */
int32_t prefix_map(prefix *c, int slot, const int32_t *id, int32_t n_pos, uint64_t salt, prefix_cursor *cur);
/* All entries were saved newest first, from what is kept already: put them in their order of use. */
void prefix_restored(prefix *c);

#endif
