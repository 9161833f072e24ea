/* engine/kv.h: which page of the KV memory holds which positions of which slot. May include backend. Used by the
 * engine thread only.
 *
 * Every page counts who refers to it: slots that map it, and the prefix cache ("held"). A page with no reference is
 * free; one that only the cache holds is idle: it counts as available, because the cache gives it back on demand.
 * A page that slots share is full and never written again. */
#ifndef ORCD_ENGINE_KV_H
#define ORCD_ENGINE_KV_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"

typedef struct kv_pool {
    int n_page, n_free;
    int32_t *free;         /* [n_page]: a stack */
    int32_t *ref, *held;   /* [n_page]: all references; of them by the cache */
    atomic_int used, idle; /* pages with a reference; of them held by the cache alone */
    uint64_t page_bytes;
} kv_pool;

typedef struct kv_store {
    be_device *dev;
    be_kv *kv;
    int n_slot, n_index; /* table entries per slot */
    int window;          /* the longest window of the model, 0 = none */
    kv_pool pool[BE_N_POOLS];
    int32_t *map[BE_N_POOLS];   /* [n_slot][n_index]: page, or -1 */
    int32_t *end[BE_N_POOLS];   /* [n_slot]: first index not mapped yet */
    int32_t *window_first;      /* [n_slot]: window pages before this index were released */
    bool (*reclaim)(void *ctx); /* the cache forgets its oldest entry; false when it has none */
    void *reclaim_ctx;
} kv_store;

/* Takes over nothing of spec. A pool without layers gets no pages. */
orcd_status kv_store_open(be_device *dev, const be_kv_spec *spec, kv_store *out, orcd_error *err) ORCD_MUST_USE;
void kv_store_close(kv_store *s); /* accepts a zeroed store */

static inline int kv_n_index(int64_t n_pos) { return (int)((n_pos + BE_PAGE - 1) / BE_PAGE); }
/* Pages of each pool that n_slot sequences of n_ctx positions can need at once, steps having max_tok rows. */
void kv_pages_needed(const be_kv_spec *spec, int max_tok, int n_slot, int n_page[BE_N_POOLS]);
/* First window page that a sequence whose next position is `next` still needs. One position more than the window is
 * kept, so that a prefix can also be resumed one token before its end. */
static inline int kv_window_first(const kv_store *s, int32_t next) {
    return next > s->window ? (next - s->window) / BE_PAGE : 0;
}
static inline int32_t kv_at(const kv_store *s, int pool, int slot, int index) {
    return s->map[pool][(int64_t)slot * s->n_index + index];
}
/* Pages that admission may count on. */
static inline int kv_available(const kv_store *s, int pool) {
    return s->pool[pool].n_free + atomic_load_explicit(&s->pool[pool].idle, memory_order_relaxed);
}

void kv_ref(kv_store *s, int pool, int32_t page, bool by_cache);
void kv_unref(kv_store *s, int pool, int32_t page, bool by_cache);

/* Map pages for positions [.., n_pos) of the slot. False when no page is left, which admission rules out. */
bool kv_extend(kv_store *s, int slot, int32_t n_pos);
/* Map a page that exists already at the slot's next index of the pool. */
void kv_share(kv_store *s, int pool, int slot, int index, int32_t page);
/* Map a new page there with the content of `src`, which must have a reference. */
bool kv_fork(kv_store *s, int pool, int slot, int index, int32_t src);
/* The slot has a page of its own at `index` whose content equals `page`: use that one. */
void kv_merge(kv_store *s, int pool, int slot, int index, int32_t page);
/* Unmap window pages that no position from `next` on looks at. */
void kv_slide(kv_store *s, int slot, int32_t next);
void kv_release(kv_store *s, int slot);

#endif
