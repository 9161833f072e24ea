#include "backend/ref/ref.h"

#include <stdlib.h>
#include <string.h>

#include "base/checked.h"

static int pool_of(const be_kv_spec *s, int layer) { return s->window[layer] ? BE_POOL_WINDOW : BE_POOL_FULL; }

/* Floats of one position of one layer: all heads of K, or of V. */
static size_t row_floats(const be_kv_spec *s) { return (size_t)s->n_kv_head * (size_t)s->head_dim; }

static size_t page_floats(const be_kv_spec *s, int pool) {
    size_t n = 0;
    for (int i = 0; i < s->n_layer; i++)
        n += pool_of(s, i) == pool ? 2 * BE_PAGE * row_floats(s) : 0;
    return n;
}

uint64_t ref_kv_page_bytes(be_device *d, const be_kv_spec *s, int pool) {
    (void)d;
    return page_floats(s, pool) * sizeof(float);
}

static orcd_status check_spec(const be_kv_spec *s, orcd_error *err) {
    if (s->type != BE_KV_F16 && s->type != BE_KV_F32)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "the reference backend keeps KV in f16 or f32 only");
    if (s->n_layer < 1 || s->n_kv_head < 1 || s->head_dim < 1 || s->n_slot < 1 || s->n_ctx < 1 || s->max_tok < 1 ||
        s->max_out < 0 || s->n_page[BE_POOL_FULL] < 0 || s->n_page[BE_POOL_WINDOW] < 0)
        return orcd_fail(err, ORCD_ERR_ARG, "a KV cache needs positive layers, heads, slots and context");
    for (int i = 0; i < s->n_layer; i++)
        if (s->window[i] < 0)
            return orcd_fail(err, ORCD_ERR_ARG, "layer %d has a negative window", i);
    return ORCD_OK;
}

orcd_status ref_kv_open(be_device *d, const be_kv_spec *s, be_kv **out, orcd_error *err) {
    *out = NULL;
    ORCD_TRY(check_spec(s, err));
    orcd_status status = ORCD_OK;
    bool ok = true;
    size_t n_layer = (size_t)s->n_layer;
    ref_kv *kv = calloc(1, sizeof *kv);
    if (!kv)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a KV cache");
    kv->base.spec = *s;
    kv->n_entry = (s->n_ctx + BE_PAGE - 1) / BE_PAGE;
    int *window = malloc(n_layer * sizeof *window);
    kv->base.spec.window = window;
    kv->pool = malloc(n_layer * sizeof *kv->pool);
    kv->index = malloc(n_layer * sizeof *kv->index);
    kv->score = malloc((size_t)s->n_ctx * sizeof *kv->score);
    kv->value = malloc((size_t)s->head_dim * sizeof *kv->value);
    for (int p = 0; p < BE_N_POOLS; p++) {
        uint64_t n_table = (uint64_t)s->n_slot * (uint64_t)kv->n_entry, n_page;
        kv->base.page_bytes[p] = ref_kv_page_bytes(d, s, p);
        ok = ok && ck_mul(kv->base.page_bytes[p], (uint64_t)s->n_page[p], &n_page);
        kv->table[p] = malloc(n_table * sizeof *kv->table[p]);
        kv->page[p] = ok ? calloc(n_page ? n_page : 1, 1) : NULL;
        ok = ok && kv->table[p] && kv->page[p];
        for (uint64_t i = 0; ok && i < n_table; i++)
            kv->table[p][i] = -1;
    }
    if (!ok || !window || !kv->pool || !kv->index || !kv->score || !kv->value) {
        status = orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a KV cache of %d + %d pages", s->n_page[BE_POOL_FULL],
                           s->n_page[BE_POOL_WINDOW]);
        goto done;
    }
    for (int i = 0; i < s->n_layer; i++) {
        window[i] = s->window[i];
        kv->pool[i] = pool_of(s, i);
        kv->index[i] = kv->n_layer[kv->pool[i]]++;
        if (window[i] > kv->window[kv->pool[i]])
            kv->window[kv->pool[i]] = window[i];
    }
    *out = &kv->base;
    kv = NULL;
done:
    ref_kv_close(d, kv ? &kv->base : NULL);
    return status;
}

void ref_kv_close(be_device *d, be_kv *base) {
    (void)d;
    ref_kv *kv = (ref_kv *)base;
    if (!kv)
        return;
    for (int p = 0; p < BE_N_POOLS; p++) {
        free(kv->table[p]);
        free(kv->page[p]);
    }
    free((int *)kv->base.spec.window);
    free(kv->pool);
    free(kv->index);
    free(kv->score);
    free(kv->value);
    free(kv);
}

static int32_t *entry(const ref_kv *kv, int pool, int slot, int index) {
    return &kv->table[pool][(size_t)slot * (size_t)kv->n_entry + (size_t)index];
}

static float *page_at(const be_kv *kv, int pool, int32_t page) {
    return ((const ref_kv *)kv)->page[pool] + (size_t)page * (kv->page_bytes[pool] / sizeof(float));
}

void ref_kv_map(be_kv *kv, int pool, int slot, int index, int32_t page) {
    *entry((ref_kv *)kv, pool, slot, index) = page;
}

void ref_kv_copy_page(be_kv *kv, int pool, int32_t dst, int32_t src) {
    if (dst != src)
        memcpy(page_at(kv, pool, dst), page_at(kv, pool, src), kv->page_bytes[pool]);
}

orcd_status ref_kv_read_page(be_kv *kv, int pool, int32_t page, void *dst, orcd_error *err) {
    if (page < 0 || page >= kv->spec.n_page[pool])
        return orcd_fail(err, ORCD_ERR_ARG, "there is no KV page %d", page);
    memcpy(dst, page_at(kv, pool, page), kv->page_bytes[pool]);
    return ORCD_OK;
}

orcd_status ref_kv_write_page(be_kv *kv, int pool, int32_t page, const void *src, orcd_error *err) {
    if (page < 0 || page >= kv->spec.n_page[pool])
        return orcd_fail(err, ORCD_ERR_ARG, "there is no KV page %d", page);
    memcpy(page_at(kv, pool, page), src, kv->page_bytes[pool]);
    return ORCD_OK;
}

float *ref_kv_at(const ref_kv *kv, int layer, int slot, int pos, int which) {
    int pool = kv->pool[layer];
    size_t row = ((size_t)kv->index[layer] * 2 + (size_t)which) * BE_PAGE + (size_t)(pos % BE_PAGE);
    return page_at(&kv->base, pool, *entry(kv, pool, slot, pos / BE_PAGE)) + row * row_floats(&kv->base.spec);
}

/* ---- steps ---- */

/* Every page that a row at `pos` of `slot` reads or writes is mapped. */
static bool is_mapped(const ref_kv *kv, int slot, int pos) {
    for (int p = 0; p < BE_N_POOLS; p++) {
        int first = kv->window[p] && pos >= kv->window[p] ? pos - kv->window[p] + 1 : 0;
        for (int i = first / BE_PAGE; kv->n_layer[p] && i <= pos / BE_PAGE; i++) {
            int32_t page = *entry(kv, p, slot, i);
            if (page < 0 || page >= kv->base.spec.n_page[p])
                return false;
        }
    }
    return true;
}

/* What is wrong with row i of a batch, or NULL. */
static const char *row_fault(const ref_kv *kv, const be_batch *b, int i) {
    const be_kv_spec *s = &kv->base.spec;
    if (b->slot[i] < 0 || b->slot[i] >= s->n_slot)
        return "has no such slot";
    if (b->pos[i] < 0 || b->pos[i] >= s->n_ctx)
        return "has a position outside the context";
    if (b->token[i] < 0)
        return "wants a sampled token, which this backend has not";
    if (i > 0 && b->slot[i] == b->slot[i - 1]) {
        if (b->pos[i] != b->pos[i - 1] + 1)
            return "does not continue its sequence";
    } else {
        for (int j = 0; j < i; j++)
            if (b->slot[j] == b->slot[i])
                return "comes back to an earlier slot";
    }
    bool last = i + 1 == b->n_tok || b->slot[i + 1] != b->slot[i];
    bool first = i == 0 || b->slot[i - 1] != b->slot[i];
    if ((first || last || b->pos[i] % BE_PAGE == 0) && !is_mapped(kv, b->slot[i], b->pos[i]))
        return "needs a KV page that is not mapped";
    return NULL;
}

orcd_status ref_step_begin(be_device *d, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err) {
    *out = NULL;
    if (b->n_tok < 1 || b->n_tok > kv->spec.max_tok)
        return orcd_fail(err, ORCD_ERR_ARG, "a step of %d rows; 1 to %d are possible", b->n_tok, kv->spec.max_tok);
    if (b->n_out < 0 || b->n_out > kv->spec.max_out)
        return orcd_fail(err, ORCD_ERR_ARG, "a step of %d outputs; 0 to %d are possible", b->n_out, kv->spec.max_out);
    for (int i = 0; i < b->n_tok; i++) {
        const char *fault = row_fault((ref_kv *)kv, b, i);
        if (fault)
            return orcd_fail(err, ORCD_ERR_ARG, "row %d of the batch (slot %d, position %d) %s", i, b->slot[i],
                             b->pos[i], fault);
    }
    for (int i = 0; i < b->n_out; i++)
        if (b->out_row[i] < 0 || b->out_row[i] >= b->n_tok || (i > 0 && b->out_row[i] <= b->out_row[i - 1]))
            return orcd_fail(err, ORCD_ERR_ARG, "output %d is row %d: rows must ascend inside the batch", i,
                             b->out_row[i]);
    ref_step *s = calloc(1, sizeof *s);
    if (!s)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a step");
    s->base = (be_step){.dev = d, .kv = kv, .batch = *b};
    *out = &s->base;
    return ORCD_OK;
}

orcd_status ref_step_end(be_step *s, orcd_error *err) {
    orcd_error first = ((ref_step *)s)->error;
    free(s);
    return first.code == ORCD_OK ? ORCD_OK : orcd_fail(err, first.code, "%s", first.message);
}

bool ref_check(be_step *s, bool ok, orcd_status code, const char *what) {
    orcd_error *e = &((ref_step *)s)->error;
    if (!ok && e->code == ORCD_OK)
        (void)orcd_fail(e, code, "%s", what);
    return ok;
}

bool ref_output(be_step *s, be_act *y, int64_t n_row, int64_t width, const char *what) {
    if (!ref_check(s, n_row <= y->cap_row && width == y->width, ORCD_ERR_INTERNAL, what))
        return false;
    y->n_row = n_row;
    return true;
}

float *ref_at(const be_act *a, int64_t row) { return ((const ref_act *)a)->data + row * ((const ref_act *)a)->stride; }
