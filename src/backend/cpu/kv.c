#include <stdlib.h>
#include <string.h>

#include "backend/cpu/internal.h"
#include "base/checked.h"

static int pool_of(const be_kv_spec *s, int layer) { return s->window[layer] ? BE_POOL_WINDOW : BE_POOL_FULL; }

static size_t elem_bytes(be_kv_type t) { return t == BE_KV_F32 ? 4 : 2; }

uint64_t cpu_kv_page_bytes(be_device *d, const be_kv_spec *s, int kind) {
    (void)d;
    uint64_t layers = 0, head = (uint64_t)s->head_dim * BE_PAGE * elem_bytes(s->type);
    for (int i = 0; i < s->n_layer; i++)
        layers += pool_of(s, i) == kind;
    return layers * (uint64_t)s->n_kv_head * 2 * head;
}

orcd_status cpu_kv_open(be_device *dev, const be_kv_spec *s, be_kv **out, orcd_error *err) {
    cpu_device *d = (cpu_device *)dev;
    orcd_status st = ORCD_OK;
    *out = NULL;
    if (s->type != BE_KV_F16 && s->type != BE_KV_F32)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "the cpu backend keeps KV as f16 or f32: choose one of them");
    if (s->n_layer < 1 || s->n_slot < 1 || s->n_ctx < 1 || s->max_tok < 1 || s->head_dim < 1 || s->n_kv_head < 1 ||
        s->head_dim > 256)
        return orcd_fail(err, ORCD_ERR_ARG, "KV cache of %d layers, %d slots, %d positions, heads of %d: out of range",
                         s->n_layer, s->n_slot, s->n_ctx, s->head_dim);
    cpu_kv *kv = calloc(1, sizeof *kv);
    int *window = malloc((size_t)s->n_layer * sizeof *window);
    if (!kv || !window) {
        free(window);
        ORCD_TRY_GOTO(st, done, orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the KV cache"));
    }
    kv->base.spec = *s;
    kv->base.spec.window = memcpy(window, s->window, (size_t)s->n_layer * sizeof *window);
    kv->elem = elem_bytes(s->type);
    kv->head_bytes = (size_t)s->head_dim * BE_PAGE * kv->elem;
    kv->n_index = (s->n_ctx + BE_PAGE - 1) / BE_PAGE;
    kv->layer_index = calloc((size_t)s->n_layer, sizeof *kv->layer_index);
    if (!kv->layer_index)
        ORCD_TRY_GOTO(st, done, orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the KV cache"));
    int count[BE_N_POOLS] = {0};
    for (int i = 0; i < s->n_layer; i++)
        kv->layer_index[i] = count[pool_of(s, i)]++;
    for (int p = 0; p < BE_N_POOLS; p++) {
        kv->base.page_bytes[p] = cpu_kv_page_bytes(dev, s, p);
        size_t entries = (size_t)s->n_slot * (size_t)kv->n_index;
        kv->table[p] = cpu_take(d, entries * sizeof(int32_t));
        if (!ck_mul(kv->base.page_bytes[p], (uint64_t)s->n_page[p], &kv->pool_bytes[p]) || !kv->table[p])
            ORCD_TRY_GOTO(st, done, orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the KV cache"));
        if (!d->base.params.dry)
            memset(kv->table[p], 0xff, entries * sizeof(int32_t));
        kv->page[p] = cpu_take(d, kv->pool_bytes[p]);
        if (!kv->page[p])
            ORCD_TRY_GOTO(st, done,
                          orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu MiB of KV cache: lower the context",
                                    (size_t)(kv->pool_bytes[p] >> 20)));
    }
    d->dims.max_tok = s->max_tok > d->dims.max_tok ? s->max_tok : d->dims.max_tok;
    d->dims.head_dim = s->head_dim > d->dims.head_dim ? s->head_dim : d->dims.head_dim;
    ORCD_TRY_GOTO(st, done, cpu_scratch(d, err));
    *out = &kv->base;
    kv = NULL;
done:
    cpu_kv_close(dev, kv ? &kv->base : NULL);
    return st;
}

void cpu_kv_close(be_device *dev, be_kv *base) {
    cpu_device *d = (cpu_device *)dev;
    cpu_kv *kv = (cpu_kv *)base;
    if (!kv)
        return;
    for (int p = 0; p < BE_N_POOLS; p++) {
        cpu_give(d, kv->page[p], kv->pool_bytes[p]);
        cpu_give(d, kv->table[p], (size_t)kv->base.spec.n_slot * (size_t)kv->n_index * sizeof(int32_t));
    }
    free((void *)kv->base.spec.window);
    free(kv->layer_index);
    free(kv);
}

void cpu_kv_map(be_kv *base, int kind, int slot, int index, int32_t page) {
    cpu_kv *kv = (cpu_kv *)base;
    kv->table[kind][(size_t)slot * (size_t)kv->n_index + (size_t)index] = page;
}

static uint8_t *page_at(be_kv *base, int kind, int32_t page) {
    return ((cpu_kv *)base)->page[kind] + (size_t)page * base->page_bytes[kind];
}

void cpu_kv_copy_page(be_kv *kv, int kind, int32_t dst, int32_t src) {
    memcpy(page_at(kv, kind, dst), page_at(kv, kind, src), kv->page_bytes[kind]);
}

orcd_status cpu_kv_read_page(be_kv *kv, int kind, int32_t page, void *dst, orcd_error *err) {
    (void)err;
    memcpy(dst, page_at(kv, kind, page), kv->page_bytes[kind]);
    return ORCD_OK;
}

orcd_status cpu_kv_write_page(be_kv *kv, int kind, int32_t page, const void *src, orcd_error *err) {
    (void)err;
    memcpy(page_at(kv, kind, page), src, kv->page_bytes[kind]);
    return ORCD_OK;
}
