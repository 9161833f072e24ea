/* arch/load.c: walks an architecture's weight table over a file: to measure it, to plan it, to load it. */
#include "arch/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t dim(const arch_config *c, arch_dim d) {
    switch (d) {
    case DIM_1:
        return 1;
    case DIM_EMBD:
        return (uint64_t)c->n_embd;
    case DIM_Q:
        return (uint64_t)c->n_head * (uint64_t)c->head_dim;
    case DIM_KV:
        return (uint64_t)c->n_kv_head * (uint64_t)c->head_dim;
    case DIM_QKV:
        return ((uint64_t)c->n_head + 2 * (uint64_t)c->n_kv_head) * (uint64_t)c->head_dim;
    case DIM_HEADS:
        return (uint64_t)c->n_head;
    case DIM_FF:
        return (uint64_t)c->n_ff;
    case DIM_EXPERTS:
        return (uint64_t)c->n_expert;
    case DIM_VOCAB:
        return (uint64_t)c->n_vocab;
    case DIM_CTX:
        return (uint64_t)c->n_ctx;
    }
    return 0;
}

/* One walk over a model's weights. */
typedef struct walk {
    const arch *a;
    const mf_file *f;
    const arch_config *c;
    int layer;           /* -1: globals */
    bool tied;           /* the slot in hand shares the token embedding */
    float *bias_copy[3]; /* de-interleaved biases of the slot in hand */
} walk;

static orcd_status find(const walk *w, const char *name, const char *ending, mf_tensor *t, bool *found,
                        orcd_error *err) {
    bool is_gguf = mf_kind_of(w->f) == MF_GGUF;
    char layer[32] = "", full[160];
    if (w->layer >= 0)
        snprintf(layer, sizeof layer, is_gguf ? "blk.%d." : w->a->hf_layer, w->layer);
    const char *prefix = is_gguf ? "" : w->a->hf_prefix;
    *found = false;
    for (int with_ending = 1; with_ending >= 0 && !*found; with_ending--) {
        snprintf(full, sizeof full, "%s%s%s%s", prefix, layer, name, with_ending ? ending : "");
        ORCD_TRY(mf_find(w->f, full, t, found, err));
        if (!*found && *prefix) {
            snprintf(full, sizeof full, "%s%s%s", layer, name, with_ending ? ending : "");
            ORCD_TRY(mf_find(w->f, full, t, found, err));
        }
    }
    return ORCD_OK;
}

static orcd_status shape_error(const walk *w, const mf_tensor *t, const arch_part *p, uint64_t mats, orcd_error *err) {
    return orcd_fail_at(
        err, ORCD_ERR_FORMAT, t->pos,
        "%s: \"%s\" has %llu x %llu x %llu values (matrices, rows, columns); the configuration asks for "
        "%llu x %llu x %llu",
        mf_path(w->f), t->name, (unsigned long long)t->n_mat, (unsigned long long)t->n_row,
        (unsigned long long)t->n_col, (unsigned long long)mats, (unsigned long long)dim(w->c, p->row),
        (unsigned long long)dim(w->c, p->col));
}

static orcd_status find_bias(walk *w, const arch_part *p, int i, uint64_t mats, be_load *l, orcd_error *err) {
    bool is_gguf = mf_kind_of(w->f) == MF_GGUF, found;
    mf_tensor *b = &l->bias[i];
    if (!p->hf_bias)
        return ORCD_OK;
    ORCD_TRY(find(w, is_gguf ? p->gguf : p->hf_bias, is_gguf ? ".bias" : "", b, &found, err));
    if (is_gguf && found && strcmp(b->name + strlen(b->name) - 5, ".bias") != 0)
        found = false; /* the look-up without an ending met the weight itself */
    if (!found)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: \"%s\" of layer %d has no bias", mf_path(w->f),
                         is_gguf ? p->gguf : p->hf, w->layer);
    uint64_t want = mats * dim(w->c, p->row), stored = b->n_mat * b->n_row * b->n_col;
    bool split = !is_gguf && (p->flags & (HF_EVEN | HF_ODD));
    if (stored != (split ? 2 * want : want))
        return orcd_fail_at(err, ORCD_ERR_FORMAT, b->pos, "%s: \"%s\" has %llu values; the configuration asks for %llu",
                            mf_path(w->f), b->name, (unsigned long long)stored,
                            (unsigned long long)(split ? 2 * want : want));
    l->has_bias[i] = true;
    if (!split)
        return ORCD_OK;
    float *v = malloc(stored * sizeof *v);
    if (!v)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %llu bias values", (unsigned long long)stored);
    mf_floats(b, v);
    for (uint64_t k = 0; k < want; k++)
        v[k] = v[2 * k + (p->flags & HF_ODD ? 1 : 0)];
    w->bias_copy[i] = v;
    b->type = Q_F32;
    b->n_mat = b->n_row = 1;
    b->n_col = want;
    b->data = (const uint8_t *)v;
    return ORCD_OK;
}

static orcd_status find_part(walk *w, const arch_part *p, uint64_t mats, mf_tensor *t, orcd_error *err) {
    bool is_gguf = mf_kind_of(w->f) == MF_GGUF, found;
    ORCD_TRY(find(w, is_gguf ? p->gguf : p->hf, ".weight", t, &found, err));
    w->tied = !found && (p->flags & TIED);
    if (w->tied)
        ORCD_TRY(find(w, is_gguf ? w->a->global_slots[0].part[0].gguf : w->a->global_slots[0].part[0].hf, ".weight", t,
                      &found, err));
    if (!found)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: weight \"%s\" of layer %d is missing", mf_path(w->f),
                         is_gguf ? p->gguf : p->hf, w->layer);
    if (!is_gguf) {
        /* Conv1D stores [in][out]; so do experts that are not MXFP4 */
        bool experts = p->row != DIM_1 && mats > 1 && t->type != Q_MXFP4;
        if ((p->flags & HF_CONV1D) || experts) {
            mf_tensor stored = *t;
            ORCD_TRY(mf_transpose(&stored, t, err));
        }
        if (p->flags & (HF_EVEN | HF_ODD)) {
            mf_tensor both = *t;
            if (both.n_row != 2 * dim(w->c, p->row))
                return shape_error(w, t, p, mats, err);
            ORCD_TRY(mf_slice_rows(&both, p->flags & HF_ODD ? 1 : 0, 2, both.n_row / 2, t, err));
        }
    }
    if (t->n_mat != mats || t->n_row != dim(w->c, p->row) || t->n_col != dim(w->c, p->col))
        return shape_error(w, t, p, mats, err);
    return ORCD_OK;
}

static void drop_bias_copies(walk *w) {
    for (int i = 0; i < 3; i++) {
        free(w->bias_copy[i]);
        w->bias_copy[i] = NULL;
    }
}

static orcd_status bind(walk *w, const arch_slot *s, be_load *l, orcd_error *err) {
    bool experts = s->use == BE_USE_GATE_UP || s->use == BE_USE_DOWN;
    bool dense = s->use == BE_USE_LINEAR && s->part[0].row != DIM_EXPERTS;
    *l = (be_load){.use = s->use,
                   .dense = dense,
                   .host = experts && w->layer >= w->c->n_layer - w->c->n_host_layers,
                   .head = s->use == BE_USE_LINEAR && s->part[0].row == DIM_VOCAB};
    uint64_t mats = experts ? (uint64_t)w->c->n_expert : 1;
    for (int i = 0; i < 3 && s->part[i].gguf; i++) {
        ORCD_TRY(find_part(w, &s->part[i], mats, &l->part[i], err));
        ORCD_TRY(find_bias(w, &s->part[i], i, mats, l, err));
        l->n_part++;
    }
    return ORCD_OK;
}

static uint64_t stored_bytes(const be_load *l) {
    uint64_t sum = 0;
    for (int i = 0; i < l->n_part; i++)
        sum += mf_row_bytes(&l->part[i]) * l->part[i].n_row * l->part[i].n_mat;
    return sum;
}

typedef orcd_status (*visit_fn)(void *ctx, walk *w, const arch_slot *s, const be_load *l, orcd_error *err);

static orcd_status visit_all(const arch *a, const mf_file *f, const arch_config *c, visit_fn visit, void *ctx,
                             orcd_error *err) {
    walk w = {.a = a, .f = f, .c = c};
    be_load l;
    orcd_status st = ORCD_OK;
    for (w.layer = -1; w.layer < c->n_layer && st == ORCD_OK; w.layer++)
        for (const arch_slot *s = w.layer < 0 ? a->global_slots : a->layer_slots; s->part[0].gguf && st == ORCD_OK;
             s++) {
            st = bind(&w, s, &l, err);
            if (st == ORCD_OK)
                st = visit(ctx, &w, s, &l, err);
            drop_bias_copies(&w);
        }
    return st;
}

/* ---- one tensor at a time ---- */

static void describe(const arch_slot *s, const arch_part *p, const arch_config *c, bool bias, arch_tensor *t) {
    bool experts = s->use == BE_USE_GATE_UP || s->use == BE_USE_DOWN;
    size_t n = strlen(p->gguf);
    bool named = n > 5 && strcmp(p->gguf + n - 5, ".bias") == 0;
    char layer[32] = "";
    if (t->layer >= 0)
        snprintf(layer, sizeof layer, "blk.%d.", t->layer);
    snprintf(t->name, sizeof t->name, "%s%s%s", layer, p->gguf, bias ? ".bias" : named ? "" : ".weight");
    t->use = s->use;
    t->exact = bias || s->use == BE_USE_VECTOR || p->row == DIM_EXPERTS || p->row == DIM_CTX;
    t->n_dims = 0;
    if (!bias)
        t->ne[t->n_dims++] = dim(c, p->col);
    if (s->use != BE_USE_VECTOR)
        t->ne[t->n_dims++] = dim(c, p->row);
    if (experts)
        t->ne[t->n_dims++] = (uint64_t)c->n_expert;
}

static orcd_status each_of_slot(walk *w, int n_file, const arch_slot *s, arch_tensor *t, arch_tensor_fn fn, void *ctx,
                                orcd_error *err) {
    const arch_config *c = w->c;
    be_load l[2];
    const mf_tensor *data[2] = {NULL, NULL};
    for (int i = 0; i < n_file; i++) {
        w[i].layer = t->layer;
        ORCD_TRY(bind(&w[i], s, &l[i], err));
    }
    t->tied = n_file && w[0].tied;
    for (int k = 0; k < 3 && s->part[k].gguf; k++) {
        for (int i = 0; i < n_file; i++)
            data[i] = &l[i].part[k];
        describe(s, &s->part[k], c, false, t);
        ORCD_TRY(fn(ctx, t, data, err));
        if (!s->part[k].hf_bias)
            continue;
        for (int i = 0; i < n_file; i++)
            data[i] = &l[i].bias[k];
        describe(s, &s->part[k], c, true, t);
        ORCD_TRY(fn(ctx, t, data, err));
    }
    return ORCD_OK;
}

orcd_status arch_each_tensor(const arch *a, const arch_config *c, int n_file, const mf_file *const *file,
                             arch_tensor_fn fn, void *ctx, orcd_error *err) {
    walk w[2] = {{.a = a, .f = n_file > 0 ? file[0] : NULL, .c = c},
                 {.a = a, .f = n_file > 1 ? file[1] : NULL, .c = c}};
    orcd_status st = ORCD_OK;
    arch_tensor t = {0};
    for (t.layer = -1; t.layer < c->n_layer && st == ORCD_OK; t.layer++)
        for (const arch_slot *s = t.layer < 0 ? a->global_slots : a->layer_slots; s->part[0].gguf && st == ORCD_OK;
             s++) {
            st = each_of_slot(w, n_file, s, &t, fn, ctx, err);
            for (int i = 0; i < n_file; i++)
                drop_bias_copies(&w[i]);
        }
    return st;
}

static orcd_status measure_one(void *ctx, walk *w, const arch_slot *s, const be_load *l, orcd_error *err) {
    arch_size *size = ctx;
    (void)err;
    (void)s;
    if (w->tied) /* counted with the embedding */
        return ORCD_OK;
    for (int i = 0; i < l->n_part; i++) {
        const mf_tensor *t = &l->part[i];
        uint64_t n = t->n_mat * t->n_row * (t->n_col + (l->has_bias[i] ? 1 : 0));
        size->n_param += n;
        if (l->use == BE_USE_EMBED)
            n = t->n_col; /* one row is read */
        size->n_param_active += t->n_mat > 1 ? n / t->n_mat * (uint64_t)w->c->n_expert_used : n;
    }
    size->weight_bytes += stored_bytes(l);
    return ORCD_OK;
}

orcd_status arch_measure(const arch *a, const mf_file *f, const arch_config *c, arch_size *out, orcd_error *err) {
    *out = (arch_size){0};
    uint64_t per_layer = 2 * 2 * (uint64_t)c->n_kv_head * (uint64_t)c->head_dim;
    for (int i = 0; i < c->n_layer; i++) {
        if (c->window[i])
            out->kv_bytes_window += per_layer * (uint64_t)c->window[i];
        else
            out->kv_bytes_per_token += per_layer;
    }
    return visit_all(a, f, c, measure_one, out, err);
}

/* The activations of a model, and how each is shaped: the one place that says so. */
typedef struct act_spec {
    size_t field;
    be_form form;
    bool per_output; /* rows: max_out instead of max_tok */
    int64_t width;   /* 0: this model does without */
} act_spec;

#define N_ACTS 9
static void list_acts(const arch_config *c, act_spec spec[N_ACTS]) {
    const int64_t embd = c->n_embd;
    const act_spec list[N_ACTS] = {
        {offsetof(arch_acts, x), BE_ACT_F32, false, embd},
        {offsetof(arch_acts, normed), BE_ACT_FREE, false, embd},
        {offsetof(arch_acts, qkv), BE_ACT_FREE, false, (int64_t)dim(c, DIM_QKV)},
        {offsetof(arch_acts, att), BE_ACT_FREE, false, (int64_t)dim(c, DIM_Q)},
        {offsetof(arch_acts, hidden), BE_ACT_FREE, false, c->n_expert ? 0 : c->n_ff},
        {offsetof(arch_acts, route), BE_ACT_ROUTE, false, c->n_expert_used},
        {offsetof(arch_acts, out), BE_ACT_F32, true, embd},
        {offsetof(arch_acts, out_normed), BE_ACT_FREE, true, embd},
        {offsetof(arch_acts, logits), BE_ACT_F32, true, c->n_vocab},
    };
    memcpy(spec, list, sizeof list);
}

uint64_t arch_act_bytes(const arch_config *c, int max_tok, int max_out) {
    act_spec spec[N_ACTS];
    uint64_t sum = 0;
    list_acts(c, spec);
    for (int i = 0; i < N_ACTS; i++)
        sum += 4 * (uint64_t)spec[i].width * (uint64_t)(spec[i].per_output ? max_out : max_tok);
    return sum;
}

typedef struct loading {
    arch_model *m;
    uint64_t done, total;
    arch_progress progress;
    void *ctx;
} loading;

static orcd_status load_one(void *ctx, walk *w, const arch_slot *s, const be_load *l, orcd_error *err) {
    loading *ld = ctx;
    arch_model *m = ld->m;
    char *owner = w->layer < 0 ? (char *)&m->g : (char *)&m->layer[w->layer];
    be_weight **weight = (be_weight **)(void *)(owner + s->field);
    ORCD_TRY(m->dev->ops->load(m->dev, l, weight, err));
    m->weight_bytes += (*weight)->bytes;
    ld->done += stored_bytes(l);
    if (ld->progress)
        ld->progress(ld->ctx, ld->done, ld->total);
    return ORCD_OK;
}

static orcd_status make_acts(arch_model *m, int max_tok, int max_out, orcd_error *err) {
    act_spec spec[N_ACTS];
    list_acts(&m->cfg, spec);
    for (int i = 0; i < N_ACTS; i++)
        if (spec[i].width) {
            be_act **act = (be_act **)(void *)((char *)&m->act + spec[i].field);
            ORCD_TRY(m->dev->ops->act_new(m->dev, spec[i].form, spec[i].per_output ? max_out : max_tok, spec[i].width,
                                          act, err));
        }
    return ORCD_OK;
}

orcd_status arch_load(const arch *a, const mf_file *f, const arch_config *c, be_device *dev, int max_tok, int max_out,
                      arch_progress progress, void *ctx, arch_model **out, orcd_error *err) {
    orcd_status st = ORCD_ERR_NOMEM;
    arch_size size;
    *out = NULL;
    arch_model *m = calloc(1, sizeof *m);
    if (!m)
        return orcd_fail(err, st, "out of memory");
    m->arch = a;
    m->cfg = *c;
    m->dev = dev;
    m->layer = calloc((size_t)c->n_layer, sizeof *m->layer);
    m->attn = calloc((size_t)c->n_layer, sizeof *m->attn);
    m->inv_freq = calloc((size_t)c->head_dim / 2 + 1, sizeof *m->inv_freq);
    if (!m->layer || !m->attn || !m->inv_freq) {
        orcd_fail(err, st, "out of memory");
        goto done;
    }
    ORCD_TRY_GOTO(st, done, arch_measure(a, f, c, &size, err));
    loading ld = {m, 0, size.weight_bytes, progress, ctx};
    ORCD_TRY_GOTO(st, done, visit_all(a, f, c, load_one, &ld, err));
    ORCD_TRY_GOTO(st, done, make_acts(m, max_tok, max_out, err));
    for (int i = 0; i < c->n_layer; i++)
        m->attn[i] = (be_attn){.layer = i,
                               .n_head = c->n_head,
                               .n_kv_head = c->n_kv_head,
                               .head_dim = c->head_dim,
                               .window = c->window[i],
                               .scale = (float)(1 / sqrt(c->head_dim))};
    if (a->setup)
        a->setup(m);
    *out = m;
    m = NULL;
done:
    arch_unload(m);
    return st;
}

/* Free every weight that the table names; slots that were not loaded are NULL. */
static void unload_slots(arch_model *m, const arch_slot *s, char *owner) {
    for (; s->part[0].gguf; s++) {
        be_weight *w = *(be_weight **)(void *)(owner + s->field);
        if (w)
            m->dev->ops->unload(m->dev, w);
    }
}

void arch_unload(arch_model *m) {
    if (!m)
        return;
    unload_slots(m, m->arch->global_slots, (char *)&m->g);
    for (int i = 0; m->layer && i < m->cfg.n_layer; i++)
        unload_slots(m, m->arch->layer_slots, (char *)&m->layer[i]);
    act_spec spec[N_ACTS];
    list_acts(&m->cfg, spec);
    for (int i = 0; i < N_ACTS; i++) {
        be_act *act = *(be_act **)(void *)((char *)&m->act + spec[i].field);
        if (act)
            m->dev->ops->act_free(m->dev, act);
    }
    free(m->layer);
    free(m->attn);
    free(m->inv_freq);
    free(m);
}

/* ---- the plan ---- */

typedef struct planning {
    be_device *dev;
    arch_memory *sum;
} planning;

static orcd_status plan_one(void *ctx, walk *w, const arch_slot *s, const be_load *l, orcd_error *err) {
    planning *p = ctx;
    (void)w, (void)s, (void)err;
    if (l->host) {
        p->sum->host += stored_bytes(l);
        return ORCD_OK;
    }
    uint64_t bytes = p->dev->ops->load_bytes(p->dev, l);
    p->sum->weights += bytes;
    if (l->use == BE_USE_GATE_UP || l->use == BE_USE_DOWN)
        p->sum->experts += bytes;
    else if (l->use != BE_USE_EMBED) /* of which a row is read */
        p->sum->every_step += bytes;
    return ORCD_OK;
}

static uint64_t kv_bytes(be_device *dev, const be_kv_spec *s) {
    uint64_t sum = 0;
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        sum += (uint64_t)s->n_page[pool] * dev->ops->kv_page_bytes(dev, s, pool);
    return sum;
}

/* Do it all on a device that makes nothing and counts. */
static orcd_status dry_run(const arch *a, const mf_file *f, const arch_config *c, const be_device *like,
                           const be_kv_spec *s, arch_memory *out, orcd_error *err) {
    orcd_status st;
    const be_ops *ops = like->ops;
    be_params params = like->params;
    be_device *dry = NULL;
    arch_model *m = NULL;
    be_kv *kv = NULL;
    params.dry = true;
    ORCD_TRY_GOTO(st, done, ops->open(&params, &dry, err));
    ORCD_TRY_GOTO(st, done, arch_load(a, f, c, dry, s->max_tok, s->max_out, NULL, NULL, &m, err));
    ORCD_TRY_GOTO(st, done, ops->kv_open(dry, s, &kv, err));
    out->weights = m->weight_bytes;
    out->kv = kv_bytes(dry, s);
    out->acts = ops->used(dry) - out->weights - out->kv;
done:
    if (kv)
        ops->kv_close(dry, kv);
    arch_unload(m);
    if (dry)
        ops->close(dry);
    return st;
}

orcd_status arch_plan(const arch *a, const mf_file *f, const arch_config *c, be_device *dev, const be_kv_spec *s,
                      arch_memory *out, orcd_error *err) {
    *out = (arch_memory){0};
    ORCD_TRY(visit_all(a, f, c, plan_one, &(planning){dev, out}, err));
    if (dev->ops->used)
        return dry_run(a, f, c, dev, s, out, err);
    out->acts = arch_act_bytes(c, s->max_tok, s->max_out);
    out->kv = kv_bytes(dev, s);
    return ORCD_OK;
}
