/* Byte-pair encoding: always the mergeable pair of lowest rank, the leftmost of equals. The pieces are a linked list,
 * the candidates a binary heap of (rank, position); a candidate whose pair has changed meanwhile is skipped. */
#include <stdlib.h>

#include "text/vocab.h"

#define SMALL_PIECE 64
#define NO_RANK UINT32_MAX

typedef struct node {
    int32_t id; /* -1: merged into its left neighbour */
    uint32_t prev, next;
    uint32_t rank; /* of the merge with the next node */
} node;

typedef struct heap {
    uint64_t *item; /* rank << 32 | position */
    size_t n;
} heap;

static void sift_down(heap *h, size_t i) {
    uint64_t v = h->item[i];
    for (size_t child; (child = 2 * i + 1) < h->n; i = child) {
        if (child + 1 < h->n && h->item[child + 1] < h->item[child])
            child++;
        if (v <= h->item[child])
            break;
        h->item[i] = h->item[child];
    }
    h->item[i] = v;
}

static void push(heap *h, uint64_t v) {
    size_t i = h->n++;
    for (; i > 0 && h->item[(i - 1) / 2] > v; i = (i - 1) / 2)
        h->item[i] = h->item[(i - 1) / 2];
    h->item[i] = v;
}

static uint64_t pop(heap *h) {
    uint64_t v = h->item[0];
    h->item[0] = h->item[--h->n];
    if (h->n)
        sift_down(h, 0);
    return v;
}

static void set_rank(const tok *t, node *list, uint32_t at, uint32_t end) {
    const tok_merge *m = list[at].next == end ? NULL : tok_find_merge(t, list[at].id, list[list[at].next].id);
    list[at].rank = m ? m->rank : NO_RANK;
}

static void offer(const tok *t, node *list, uint32_t at, uint32_t end, heap *h) {
    set_rank(t, list, at, end);
    if (list[at].rank != NO_RANK)
        push(h, (uint64_t)list[at].rank << 32 | at);
}

/* list has n nodes, h->item room for 2n: every merge takes one candidate and offers at most two. */
static void merge_all(const tok *t, node *list, uint32_t n, heap *h) {
    for (uint32_t i = 0; i < n; i++) {
        set_rank(t, list, i, n);
        if (list[i].rank != NO_RANK)
            h->item[h->n++] = (uint64_t)list[i].rank << 32 | i;
    }
    for (size_t i = h->n / 2; i-- > 0;)
        sift_down(h, i);
    while (h->n) {
        uint64_t top = pop(h);
        uint32_t at = (uint32_t)top, right;
        if (list[at].id < 0 || list[at].rank != top >> 32)
            continue;
        right = list[at].next;
        list[at].id = tok_find_merge(t, list[at].id, list[right].id)->result;
        list[at].next = list[right].next;
        list[right].id = -1;
        if (list[at].next != n)
            list[list[at].next].prev = at;
        offer(t, list, at, n, h);
        if (at != 0)
            offer(t, list, list[at].prev, n, h);
    }
}

orcd_status tok_bpe(const tok *t, const uint8_t *s, size_t n, ids *out) {
    node small_list[SMALL_PIECE], *list = small_list;
    uint64_t small_item[2 * SMALL_PIECE];
    heap h = {.item = small_item};
    if (n >= NO_RANK / 2)
        return ORCD_ERR_LIMIT;
    if (n > SMALL_PIECE) {
        list = malloc(n * sizeof *list);
        h.item = malloc(2 * n * sizeof *h.item);
    }
    if (list && h.item) {
        for (size_t i = 0; i < n; i++)
            list[i] = (node){.id = t->byte_id[s[i]], .prev = (uint32_t)i - 1, .next = (uint32_t)i + 1};
        merge_all(t, list, (uint32_t)n, &h);
        for (uint32_t i = 0; i < n; i = list[i].next)
            ids_push(out, list[i].id);
    }
    bool failed = !list || !h.item || out->failed;
    if (n > SMALL_PIECE) {
        free(list);
        free(h.item);
    }
    return failed ? ORCD_ERR_NOMEM : ORCD_OK;
}
