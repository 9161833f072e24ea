#include "engine/prefix.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define NONE (-1)
#define MAX_SIBLINGS 256 /* children compared for a partly equal page: a bound on the work of one look-up */

typedef struct node { /* node 0 is the root and has no page */
    int32_t token[BE_PAGE];
    uint64_t salt; /* of children of the root */
    int32_t page;
    int32_t parent, child, prev, next; /* tree; siblings in a list */
    int32_t bucket_next;
    int32_t n_ref; /* children, entries and cursors */
    int32_t entry; /* list of entries that end here */
} node;

typedef struct entry {
    int32_t node, n_pos;
    uint64_t salt;
    int32_t n_tail, tail[BE_PAGE]; /* tokens after the last full page */
    int32_t tail_page;
    int32_t window_first, n_window; /* window pages from this index on */
    int32_t older, newer;           /* by last use; `newer` also links free ones */
    int32_t prev, next;             /* entries of the same node */
    bool kept;                      /* on disk as it was last used */
} entry;

struct prefix {
    kv_store *kv;
    uint64_t max_idle, key;
    int32_t n_node, n_entry, max_window, free_node, free_entry, oldest, newest, mask;
    node *node;
    entry *entry;
    int32_t *window; /* [n_entry][max_window] */
    int32_t *bucket; /* [mask + 1] */
    int32_t *path;   /* [n_index + 1]: scratch of a look-up */
};

int prefix_entry_pages(int window) { return window ? (window + BE_PAGE - 1) / BE_PAGE + 1 : 0; }

void prefix_close(prefix *c) {
    if (!c)
        return;
    free(c->node);
    free(c->entry);
    free(c->window);
    free(c->bucket);
    free(c->path);
    free(c);
}

static bool reclaim(void *ctx);

orcd_status prefix_open(kv_store *kv, uint64_t max_idle, int n_entry, prefix **out, orcd_error *err) {
    *out = NULL;
    prefix *c = calloc(1, sizeof *c);
    if (!c)
        goto oom;
    c->kv = kv;
    c->max_idle = max_idle;
    c->n_node = kv->pool[BE_POOL_FULL].n_page + 1;
    c->n_entry = n_entry;
    c->max_window = prefix_entry_pages(kv->window);
    c->oldest = c->newest = NONE;
    int32_t buckets = 64;
    while (buckets < c->n_node && buckets < 1 << 28)
        buckets *= 2;
    c->mask = buckets - 1;
    c->node = calloc((size_t)c->n_node, sizeof *c->node);
    c->entry = calloc((size_t)n_entry, sizeof *c->entry);
    c->window = calloc((size_t)n_entry * (size_t)(c->max_window + 1), sizeof *c->window);
    c->bucket = malloc((size_t)buckets * sizeof *c->bucket);
    c->path = calloc((size_t)kv->n_index + 1, sizeof *c->path);
    if (!c->node || !c->entry || !c->window || !c->bucket || !c->path)
        goto oom;
    memset(c->bucket, 0xff, (size_t)buckets * sizeof *c->bucket); /* NONE */
    c->free_node = c->free_entry = NONE;
    for (int32_t i = c->n_node - 1; i > 0; i--) {
        c->node[i].next = c->free_node;
        c->free_node = i;
    }
    for (int32_t i = n_entry - 1; i >= 0; i--) {
        c->entry[i].newer = c->free_entry;
        c->free_entry = i;
    }
    c->node[0] = (node){.page = NONE, .parent = NONE, .child = NONE, .prev = NONE, .next = NONE, .entry = NONE};
    if (getrandom(&c->key, sizeof c->key, 0) != sizeof c->key)
        c->key = (uint64_t)(uintptr_t)c; /* the hash spreads; equality is always by tokens */
    kv->reclaim = reclaim;
    kv->reclaim_ctx = c;
    *out = c;
    return ORCD_OK;
oom:
    prefix_close(c);
    return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the index of a prefix cache of %d entries", n_entry);
}

/* ---- nodes ---- */

static uint64_t mix(uint64_t h, uint64_t v) {
    h = (h ^ v) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

static int32_t *bucket_of(prefix *c, int32_t parent, const int32_t *token, uint64_t salt) {
    uint64_t h = mix(c->key, (uint32_t)parent);
    h = mix(h, parent == 0 ? salt : 0);
    for (int i = 0; i < BE_PAGE; i += 2)
        h = mix(h, (uint64_t)(uint32_t)token[i] << 32 | (uint32_t)token[i + 1]);
    return &c->bucket[(h ^ h >> 32) & (uint32_t)c->mask];
}

static int32_t find_child(prefix *c, int32_t parent, const int32_t *token, uint64_t salt) {
    for (int32_t i = *bucket_of(c, parent, token, salt); i != NONE; i = c->node[i].bucket_next) {
        const node *n = &c->node[i];
        if (n->parent == parent && (parent != 0 || n->salt == salt) && memcmp(n->token, token, sizeof n->token) == 0)
            return i;
    }
    return NONE;
}

static void hold_node(prefix *c, int32_t i) {
    if (i != 0) /* the root stays anyhow */
        c->node[i].n_ref++;
}

/* Give up one reference; a node that nothing refers to goes, and then perhaps its parent. */
static void drop_node(prefix *c, int32_t i) {
    while (i != 0 && --c->node[i].n_ref == 0) {
        node *n = &c->node[i];
        int32_t parent = n->parent, *link = bucket_of(c, parent, n->token, n->salt);
        while (*link != i)
            link = &c->node[*link].bucket_next;
        *link = n->bucket_next;
        *(n->prev != NONE ? &c->node[n->prev].next : &c->node[parent].child) = n->next;
        if (n->next != NONE)
            c->node[n->next].prev = n->prev;
        kv_unref(c->kv, BE_POOL_FULL, n->page, true);
        n->next = c->free_node;
        c->free_node = i;
        i = parent;
    }
}

/* A new child that holds `page`; the caller's reference is included. NONE when no node is left. */
static int32_t add_child(prefix *c, int32_t parent, const int32_t *token, uint64_t salt, int32_t page) {
    int32_t i = c->free_node;
    if (i == NONE)
        return NONE;
    node *n = &c->node[i];
    c->free_node = n->next;
    *n = (node){.salt = salt, .page = page, .parent = parent, .child = NONE, .prev = NONE, .entry = NONE, .n_ref = 1};
    memcpy(n->token, token, sizeof n->token);
    n->next = c->node[parent].child;
    if (n->next != NONE)
        c->node[n->next].prev = i;
    c->node[parent].child = i;
    hold_node(c, parent);
    int32_t *bucket = bucket_of(c, parent, token, salt);
    n->bucket_next = *bucket;
    *bucket = i;
    kv_ref(c->kv, BE_POOL_FULL, page, true);
    return i;
}

/* ---- entries, ordered by last use ---- */

static void unlink_use(prefix *c, int32_t i) {
    entry *e = &c->entry[i];
    *(e->older != NONE ? &c->entry[e->older].newer : &c->oldest) = e->newer;
    *(e->newer != NONE ? &c->entry[e->newer].older : &c->newest) = e->older;
}

static void link_newest(prefix *c, int32_t i) {
    entry *e = &c->entry[i];
    e->older = c->newest;
    e->newer = NONE;
    *(c->newest != NONE ? &c->entry[c->newest].newer : &c->oldest) = i;
    c->newest = i;
}

static void touch(prefix *c, int32_t i) {
    c->entry[i].kept = false;
    unlink_use(c, i);
    link_newest(c, i);
}

static bool reclaim(void *ctx) {
    prefix *c = ctx;
    int32_t i = c->oldest;
    if (i == NONE)
        return false;
    entry *e = &c->entry[i];
    unlink_use(c, i);
    *(e->prev != NONE ? &c->entry[e->prev].next : &c->node[e->node].entry) = e->next;
    if (e->next != NONE)
        c->entry[e->next].prev = e->prev;
    if (e->tail_page != NONE)
        kv_unref(c->kv, BE_POOL_FULL, e->tail_page, true);
    for (int k = 0; k < e->n_window; k++)
        kv_unref(c->kv, BE_POOL_WINDOW, c->window[(int64_t)i * c->max_window + k], true);
    drop_node(c, e->node);
    e->newer = c->free_entry;
    c->free_entry = i;
    return true;
}

/* ---- look-up ---- */

static int32_t common(const int32_t *a, const int32_t *b, int32_t n) {
    int32_t i = 0;
    while (i < n && a[i] == b[i])
        i++;
    return i;
}

typedef struct search {
    prefix *c;
    int32_t limit, depth; /* most positions to resume; nodes on c->path below the root */
    prefix_hit best;
} search;

/* The prompt agrees with entry e (NONE: with the tree) on its first `agreed` tokens: is that the best so far?
 * `beyond`: the page after the path's last node in which the agreement may end. */
static void consider(search *s, int32_t agreed, int32_t e, int32_t beyond) {
    const prefix *c = s->c;
    int32_t n_pos = agreed < s->limit ? agreed : s->limit, window = c->kv->window, index = n_pos / BE_PAGE;
    if (n_pos <= s->best.n_pos)
        return;
    const entry *it = e == NONE ? NULL : &c->entry[e];
    if (window && (!it || (it->window_first > 0 && n_pos - window + 1 < it->window_first * BE_PAGE)))
        return;
    s->best = (prefix_hit){n_pos, e, NONE, NONE};
    if (n_pos % BE_PAGE == 0)
        return;
    s->best.fork_full = index < s->depth ? c->node[c->path[index + 1]].page : beyond;
    if (window)
        s->best.fork_window = c->window[(int64_t)e * c->max_window + index - it->window_first];
}

prefix_hit prefix_find(prefix *c, const int32_t *id, int32_t n, uint64_t salt) {
    search s = {c, n - 1, 0, {0, NONE, NONE, NONE}};
    c->path[0] = 0;
    while ((s.depth + 1) * BE_PAGE <= n && s.depth < c->kv->n_index) {
        int32_t child = find_child(c, c->path[s.depth], id + s.depth * BE_PAGE, salt);
        if (child == NONE)
            break;
        c->path[++s.depth] = child;
    }
    if (c->kv->window == 0)
        consider(&s, s.depth * BE_PAGE, NONE, NONE);
    for (int32_t d = s.depth; d >= 0; d--) {
        int32_t at = d * BE_PAGE;
        for (int32_t e = c->node[c->path[d]].entry; e != NONE; e = c->entry[e].next) {
            const entry *it = &c->entry[e];
            if (d > 0 || it->salt == salt)
                consider(&s, at + common(it->tail, id + at, it->n_tail < n - at ? it->n_tail : n - at), e,
                         it->tail_page);
        }
    }
    /* a page that agrees in part: without windows it will do by itself */
    int32_t last = c->path[s.depth], at = s.depth * BE_PAGE, looked_at = 0;
    for (int32_t i = c->node[last].child; i != NONE && looked_at < MAX_SIBLINGS; i = c->node[i].next, looked_at++) {
        const node *child = &c->node[i];
        if (last == 0 && child->salt != salt)
            continue;
        int32_t agreed = at + common(child->token, id + at, n - at < BE_PAGE ? n - at : BE_PAGE);
        if (agreed > at && c->kv->window == 0)
            consider(&s, agreed, NONE, child->page);
        for (int32_t e = child->entry; agreed > at && e != NONE; e = c->entry[e].next)
            consider(&s, agreed, e, child->page);
    }
    return s.best;
}

/* ---- resuming ---- */

void prefix_pin(prefix *c, const prefix_hit *h, const int32_t *id, uint64_t salt, int slot, prefix_cursor *cur) {
    int32_t i = 0, full = h->n_pos / BE_PAGE;
    for (int32_t d = 0; d < full; d++) {
        i = find_child(c, i, id + d * BE_PAGE, salt);
        kv_share(c->kv, BE_POOL_FULL, slot, d, c->node[i].page);
    }
    *cur = (prefix_cursor){i, full};
    hold_node(c, i);
    if (h->entry != NONE)
        touch(c, h->entry);
    if (c->kv->window) {
        const entry *e = &c->entry[h->entry];
        int first = kv_window_first(c->kv, h->n_pos);
        first = first > e->window_first ? first : e->window_first;
        c->kv->window_first[slot] = first;
        c->kv->end[BE_POOL_WINDOW][slot] = first;
        for (int k = first; k < full; k++)
            kv_share(c->kv, BE_POOL_WINDOW, slot, k,
                     c->window[(int64_t)h->entry * c->max_window + k - e->window_first]);
    }
    if (h->fork_full != NONE)
        kv_ref(c->kv, BE_POOL_FULL, h->fork_full, false);
    if (h->fork_window != NONE)
        kv_ref(c->kv, BE_POOL_WINDOW, h->fork_window, false);
}

static void unpin_forks(prefix *c, const prefix_hit *h) {
    if (h->fork_full != NONE)
        kv_unref(c->kv, BE_POOL_FULL, h->fork_full, false);
    if (h->fork_window != NONE)
        kv_unref(c->kv, BE_POOL_WINDOW, h->fork_window, false);
}

bool prefix_fork(prefix *c, const prefix_hit *h, int slot) {
    int index = h->n_pos / BE_PAGE;
    bool ok = (h->fork_full == NONE || kv_fork(c->kv, BE_POOL_FULL, slot, index, h->fork_full)) &&
              (h->fork_window == NONE || kv_fork(c->kv, BE_POOL_WINDOW, slot, index, h->fork_window));
    unpin_forks(c, h);
    return ok;
}

void prefix_unpin(prefix *c, const prefix_hit *h, int slot, prefix_cursor *cur) {
    unpin_forks(c, h);
    kv_release(c->kv, slot);
    prefix_leave(c, cur);
}

void prefix_leave(prefix *c, prefix_cursor *cur) {
    drop_node(c, cur->node);
    *cur = (prefix_cursor){0};
}

/* ---- saving ---- */

static uint64_t idle_bytes(const prefix *c) {
    uint64_t sum = 0;
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        sum += (uint64_t)atomic_load_explicit(&c->kv->pool[pool].idle, memory_order_relaxed) *
               c->kv->pool[pool].page_bytes;
    return sum;
}

void prefix_trim(prefix *c) {
    while (idle_bytes(c) > c->max_idle && reclaim(c))
        continue;
}

/* Move the cursor down to `depth` full pages, adding nodes for the slot's pages or taking over equal ones. */
static bool descend(prefix *c, int slot, const int32_t *id, int32_t depth, uint64_t salt, prefix_cursor *cur) {
    while (cur->depth < depth) {
        const int32_t *token = id + cur->depth * BE_PAGE;
        int32_t i = find_child(c, cur->node, token, salt);
        if (i != NONE) {
            kv_merge(c->kv, BE_POOL_FULL, slot, cur->depth, c->node[i].page);
            hold_node(c, i);
        } else {
            i = add_child(c, cur->node, token, salt, kv_at(c->kv, BE_POOL_FULL, slot, cur->depth));
            if (i == NONE)
                return false;
        }
        drop_node(c, cur->node); /* the child keeps its parent */
        *cur = (prefix_cursor){i, cur->depth + 1};
    }
    return true;
}

static int32_t new_entry(prefix *c) {
    if (c->free_entry == NONE && !reclaim(c))
        return NONE;
    int32_t i = c->free_entry;
    c->free_entry = c->entry[i].newer;
    return i;
}

void prefix_save(prefix *c, int slot, const int32_t *id, int32_t n_pos, uint64_t salt, prefix_cursor *cur) {
    kv_store *kv = c->kv;
    int32_t full = n_pos / BE_PAGE, n_tail = n_pos % BE_PAGE;
    int first = kv_window_first(kv, n_pos), end = kv->window ? kv_n_index(n_pos) : first;
    if (n_pos == 0 || full < cur->depth || (kv->window && first < kv->window_first[slot]) ||
        !descend(c, slot, id, full, salt, cur))
        return;
    for (int32_t i = c->node[cur->node].entry; i != NONE; i = c->entry[i].next) {
        const entry *e = &c->entry[i];
        if (e->n_tail == n_tail && (cur->node != 0 || e->salt == salt) &&
            memcmp(e->tail, id + full * BE_PAGE, (size_t)n_tail * sizeof *id) == 0) {
            touch(c, i);
            return;
        }
    }
    int32_t i = new_entry(c);
    if (i == NONE)
        return;
    entry *e = &c->entry[i];
    *e = (entry){.node = cur->node, .n_pos = n_pos, .salt = salt, .n_tail = n_tail, .tail_page = NONE, .prev = NONE};
    memcpy(e->tail, id + full * BE_PAGE, (size_t)n_tail * sizeof *id);
    if (n_tail) {
        e->tail_page = kv_at(kv, BE_POOL_FULL, slot, full);
        kv_ref(kv, BE_POOL_FULL, e->tail_page, true);
    }
    e->window_first = first;
    for (int k = first; k < end; k++) {
        int32_t page = kv_at(kv, BE_POOL_WINDOW, slot, k);
        c->window[(int64_t)i * c->max_window + e->n_window++] = page;
        kv_ref(kv, BE_POOL_WINDOW, page, true);
    }
    node *n = &c->node[cur->node];
    hold_node(c, cur->node);
    e->next = n->entry;
    if (e->next != NONE)
        c->entry[e->next].prev = i;
    n->entry = i;
    link_newest(c, i);
    prefix_trim(c);
}

/* ---- for the disk ---- */

bool prefix_unkept(const prefix *c, int32_t least, prefix_point *out) {
    int32_t i = c->oldest;
    while (i != NONE && (c->entry[i].kept || c->entry[i].n_pos < least))
        i = c->entry[i].newer;
    if (i == NONE)
        return false;
    const entry *e = &c->entry[i];
    *out = (prefix_point){.entry = i,
                          .n_pos = e->n_pos,
                          .tail_page = e->tail_page,
                          .n_window = e->n_window,
                          .window = c->window + (int64_t)i * c->max_window,
                          .salt = e->salt};
    return true;
}

void prefix_keep(prefix *c, int32_t i) { c->entry[i].kept = true; }

void prefix_read(const prefix *c, int32_t i, int32_t *id, int32_t *page) {
    const entry *e = &c->entry[i];
    int32_t depth = e->n_pos / BE_PAGE;
    memcpy(id + depth * BE_PAGE, e->tail, (size_t)e->n_tail * sizeof *id);
    for (int32_t n = e->node; depth-- > 0; n = c->node[n].parent) {
        memcpy(id + depth * BE_PAGE, c->node[n].token, sizeof c->node[n].token);
        page[depth] = c->node[n].page;
    }
}

bool prefix_has_room(const prefix *c, const int n_page[BE_N_POOLS]) {
    uint64_t bytes = idle_bytes(c);
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        bytes += (uint64_t)n_page[pool] * c->kv->pool[pool].page_bytes;
        if (c->kv->pool[pool].n_free < n_page[pool])
            return false;
    }
    return c->free_entry != NONE && bytes <= c->max_idle;
}

int32_t prefix_map(prefix *c, int slot, const int32_t *id, int32_t n_pos, uint64_t salt, prefix_cursor *cur) {
    *cur = (prefix_cursor){0};
    while ((cur->depth + 1) * BE_PAGE <= n_pos) {
        int32_t i = find_child(c, cur->node, id + cur->depth * BE_PAGE, salt);
        if (i == NONE)
            break;
        kv_share(c->kv, BE_POOL_FULL, slot, cur->depth, c->node[i].page);
        *cur = (prefix_cursor){i, cur->depth + 1};
    }
    hold_node(c, cur->node);
    return cur->depth;
}

void prefix_restored(prefix *c) {
    int32_t i = c->oldest;
    c->oldest = c->newest;
    c->newest = i;
    while (i != NONE) {
        entry *e = &c->entry[i];
        i = e->newer;
        e->newer = e->older;
        e->older = i;
        e->kept = true;
    }
}
