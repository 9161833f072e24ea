#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "backend/cpu/internal.h"
#include "base/checked.h"

void *cpu_alloc(size_t bytes) {
    const size_t huge = (size_t)2 << 20;
    if (bytes == 0)
        bytes = 1;
    uint8_t *p = mmap(NULL, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return NULL;
    /* Start on a huge page and give the rest of the reservation back. */
    uint8_t *start = (uint8_t *)(((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1));
    size_t page = 4096, size = (bytes + page - 1) / page * page;
    if (start > p)
        munmap(p, (size_t)(start - p));
    uint8_t *end = start + size, *last = p + (bytes + huge + page - 1) / page * page;
    if (last > end)
        munmap(end, (size_t)(last - end));
    if (size >= huge)
        madvise(start, size, MADV_HUGEPAGE);
    return start;
}

void cpu_free(void *p, size_t bytes) {
    if (p)
        munmap(p, (bytes ? bytes + 4095 : 4096) / 4096 * 4096);
}

/* Small pieces come from the heap: a mapping of its own would take a page at least. */
enum { SMALL = 65536 };

static size_t taken(size_t bytes) { return bytes < SMALL ? (bytes + 63) / 64 * 64 : (bytes + 4095) / 4096 * 4096; }

void *cpu_take(cpu_device *d, size_t bytes) {
    bytes = bytes ? bytes : 1;
    void *p = d;
    if (!d->base.params.dry) {
        p = bytes < SMALL ? aligned_alloc(64, taken(bytes)) : cpu_alloc(bytes);
        if (p && bytes < SMALL)
            memset(p, 0, taken(bytes));
    }
    if (p)
        d->used += taken(bytes);
    return p;
}

void cpu_give(cpu_device *d, void *p, size_t bytes) {
    bytes = bytes ? bytes : 1;
    if (!p)
        return;
    d->used -= taken(bytes);
    if (d->base.params.dry)
        return;
    if (bytes < SMALL)
        free(p);
    else
        cpu_free(p, bytes);
}

/* Hand out the pieces of one block: with base NULL it only counts. */
typedef struct arena {
    uint8_t *base;
    size_t used;
} arena;

static void *take(arena *a, int64_t n, size_t elem) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += ((size_t)n * elem + 127) & ~(size_t)127;
    return p;
}

static void lay_out(cpu_device *d, arena *a) {
    const cpu_dims *m = &d->dims;
    int64_t col = m->n_col, few = CPU_MAX_EXPERTS_FEW, entries = m->max_tok * (m->top_k > 2 ? m->top_k : 2);
    int64_t lists = 4 * m->n_expert + 3 * m->max_tok * m->top_k + 16;
    for (int i = 0; i < d->n_thread; i++) {
        cpu_local *l = &d->local[i];
        l->dot = take(a, 2, cpu_dot_scratch(col));
        l->panel = take(a, 1, (size_t)col * 64 + 4096); /* of any format */
        l->row = take(a, col + 64, sizeof(float));
        l->q = take(a, few, cpu_qrow_bytes(col));
        l->norm = take(a, CPU_FEW * col, sizeof(float));
        l->y = take(a, 4 * CPU_TOKENS * CPU_PANEL, sizeof(float));
        l->list = take(a, lists, sizeof(int32_t));
    }
    cpu_shared *s = &d->shared;
    s->q = take(a, entries, cpu_qrow_bytes(col));
    s->norm = take(a, m->max_tok * col, sizeof(float));
    s->logits = take(a, m->max_tok * (m->n_expert + CPU_PANEL), sizeof(float));
    s->hidden = take(a, m->max_tok * m->top_k * m->n_ff, sizeof(float));
    s->down = take(a, m->max_tok * m->top_k * m->n_ff, sizeof(float));
    s->list = take(a, lists, sizeof(int32_t));
    s->rope = take(a, m->max_tok * m->head_dim, sizeof(float));
    s->peak = take(a, CPU_FEW * m->n_screen, sizeof(float));
}

orcd_status cpu_scratch(cpu_device *d, orcd_error *err) {
    if (d->arena && memcmp(&d->dims, &d->sized, sizeof d->dims) == 0)
        return ORCD_OK;
    cpu_give(d, d->arena, d->arena_bytes);
    d->arena = NULL;
    arena a = {0};
    lay_out(d, &a);
    d->arena_bytes = a.used;
    d->arena = cpu_take(d, a.used);
    if (!d->arena)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu MiB of scratch: lower the step size",
                         a.used >> 20);
    if (!d->base.params.dry) {
        a = (arena){.base = d->arena};
        lay_out(d, &a);
    }
    d->sized = d->dims;
    return ORCD_OK;
}
