#include "engine/kv.h"

#include <stdlib.h>
#include <string.h>

static bool pool_layers(const be_kv_spec *spec, int pool) {
    for (int i = 0; i < spec->n_layer; i++)
        if ((spec->window[i] > 0) == (pool == BE_POOL_WINDOW))
            return true;
    return false;
}

static int longest_window(const be_kv_spec *spec) {
    int w = 0;
    for (int i = 0; i < spec->n_layer; i++)
        w = spec->window[i] > w ? spec->window[i] : w;
    return w;
}

void kv_pages_needed(const be_kv_spec *spec, int max_tok, int n_slot, int n_page[BE_N_POOLS]) {
    int whole = kv_n_index(spec->n_ctx), window = longest_window(spec);
    n_page[BE_POOL_FULL] = pool_layers(spec, BE_POOL_FULL) ? n_slot * whole : 0;
    /* window + rows positions span at most (window + rows) / 64 + 2 pages; all rows together are max_tok */
    int sliding = window / BE_PAGE + 3;
    n_page[BE_POOL_WINDOW] =
        window == 0 ? 0 : n_slot * (whole < sliding ? whole : sliding) + (max_tok + BE_PAGE - 1) / BE_PAGE;
}

static orcd_status pool_open(kv_pool *p, int n_page, orcd_error *err) {
    size_t n = (size_t)n_page + 1; /* never an empty allocation */
    p->free = calloc(n, sizeof *p->free);
    p->ref = calloc(n, sizeof *p->ref);
    p->held = calloc(n, sizeof *p->held);
    if (!p->free || !p->ref || !p->held)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the tables of %d KV pages", n_page);
    p->n_page = p->n_free = n_page;
    for (int i = 0; i < n_page; i++)
        p->free[i] = n_page - 1 - i; /* low pages first: memory is touched only as it is needed */
    return ORCD_OK;
}

orcd_status kv_store_open(be_device *dev, const be_kv_spec *spec, kv_store *out, orcd_error *err) {
    orcd_status st = ORCD_ERR_NOMEM;
    kv_store s = {.dev = dev, .n_slot = spec->n_slot, .n_index = kv_n_index(spec->n_ctx)};
    *out = (kv_store){0};
    size_t n = (size_t)s.n_slot * (size_t)s.n_index;
    s.window = longest_window(spec);
    s.window_first = calloc((size_t)s.n_slot, sizeof *s.window_first);
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        ORCD_TRY_GOTO(st, done, pool_open(&s.pool[pool], spec->n_page[pool], err));
        s.map[pool] = malloc(n * sizeof **s.map);
        s.end[pool] = calloc((size_t)s.n_slot, sizeof **s.end);
        if (!s.map[pool] || !s.end[pool] || !s.window_first) {
            st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %d page tables", s.n_slot);
            goto done;
        }
        memset(s.map[pool], 0xff, n * sizeof **s.map); /* -1: nothing mapped */
    }
    ORCD_TRY_GOTO(st, done, dev->ops->kv_open(dev, spec, &s.kv, err));
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        s.pool[pool].page_bytes = s.kv->page_bytes[pool];
    *out = s;
    return ORCD_OK;
done:
    kv_store_close(&s);
    return st;
}

void kv_store_close(kv_store *s) {
    if (s->kv)
        s->dev->ops->kv_close(s->dev, s->kv);
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        free(s->pool[pool].free);
        free(s->pool[pool].ref);
        free(s->pool[pool].held);
        free(s->map[pool]);
        free(s->end[pool]);
    }
    free(s->window_first);
    *s = (kv_store){0};
}

/* ---- references ---- */

static inline void add(atomic_int *v, int n) {
    atomic_store_explicit(v, atomic_load_explicit(v, memory_order_relaxed) + n, memory_order_relaxed);
}

static void change(kv_pool *p, int32_t page, int by, bool by_cache) {
    bool was_used = p->ref[page] > 0, was_idle = was_used && p->ref[page] == p->held[page];
    p->ref[page] += by;
    if (by_cache)
        p->held[page] += by;
    bool is_used = p->ref[page] > 0, is_idle = is_used && p->ref[page] == p->held[page];
    add(&p->used, is_used - was_used);
    add(&p->idle, is_idle - was_idle);
    if (was_used && !is_used)
        p->free[p->n_free++] = page;
}

void kv_ref(kv_store *s, int pool, int32_t page, bool by_cache) { change(&s->pool[pool], page, 1, by_cache); }

void kv_unref(kv_store *s, int pool, int32_t page, bool by_cache) { change(&s->pool[pool], page, -1, by_cache); }

/* A free page with one reference, or -1. */
static int32_t take(kv_store *s, int pool) {
    kv_pool *p = &s->pool[pool];
    while (p->n_free == 0)
        if (!s->reclaim || !s->reclaim(s->reclaim_ctx))
            return -1;
    int32_t page = p->free[--p->n_free];
    p->ref[page] = 1;
    add(&p->used, 1);
    return page;
}

/* ---- mapping ---- */

static void set(kv_store *s, int pool, int slot, int index, int32_t page) {
    s->map[pool][(int64_t)slot * s->n_index + index] = page;
    s->dev->ops->kv_map(s->kv, pool, slot, index, page);
    if (page >= 0 && index >= s->end[pool][slot])
        s->end[pool][slot] = index + 1;
}

bool kv_extend(kv_store *s, int slot, int32_t n_pos) {
    int end = kv_n_index(n_pos);
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        if (s->pool[pool].n_page == 0)
            continue;
        while (s->end[pool][slot] < end) {
            int32_t page = take(s, pool);
            if (page < 0)
                return false;
            set(s, pool, slot, s->end[pool][slot], page);
        }
    }
    return true;
}

void kv_share(kv_store *s, int pool, int slot, int index, int32_t page) {
    kv_ref(s, pool, page, false);
    set(s, pool, slot, index, page);
}

bool kv_fork(kv_store *s, int pool, int slot, int index, int32_t src) {
    int32_t page = take(s, pool);
    if (page < 0)
        return false;
    s->dev->ops->kv_copy_page(s->kv, pool, page, src);
    set(s, pool, slot, index, page);
    return true;
}

void kv_merge(kv_store *s, int pool, int slot, int index, int32_t page) {
    int32_t own = kv_at(s, pool, slot, index);
    if (own == page)
        return;
    kv_ref(s, pool, page, false);
    set(s, pool, slot, index, page);
    kv_unref(s, pool, own, false);
}

void kv_slide(kv_store *s, int slot, int32_t next) {
    if (s->window == 0)
        return;
    int keep = kv_window_first(s, next), end = s->end[BE_POOL_WINDOW][slot];
    for (int i = s->window_first[slot]; i < keep && i < end; i++) {
        int32_t page = kv_at(s, BE_POOL_WINDOW, slot, i);
        if (page >= 0) {
            set(s, BE_POOL_WINDOW, slot, i, -1);
            kv_unref(s, BE_POOL_WINDOW, page, false);
        }
    }
    if (keep > s->window_first[slot])
        s->window_first[slot] = keep;
}

void kv_release(kv_store *s, int slot) {
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        for (int i = pool == BE_POOL_WINDOW ? s->window_first[slot] : 0; i < s->end[pool][slot]; i++) {
            int32_t page = kv_at(s, pool, slot, i);
            if (page >= 0) {
                set(s, pool, slot, i, -1);
                kv_unref(s, pool, page, false);
            }
        }
        s->end[pool][slot] = 0;
    }
    s->window_first[slot] = 0;
}
