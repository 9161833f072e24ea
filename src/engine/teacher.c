#include "engine/teacher.h"

#include <stdlib.h>
#include <string.h>

struct teacher {
    mf_file *file;
    be_device *dev;
    arch_config cfg;
    arch_model *model;
    be_kv *kv;
    int n_ctx, chunk;
    int32_t *token, *pos, *slot, *out_row; /* [chunk] */
    float *row;                            /* [n_vocab], where the host cannot address the device */
    struct {                               /* the sequence in hand */
        const int32_t *ids;
        int64_t n, first, done; /* positions: all, first wanted, computed */
        be_act *logits;         /* of the last step: */
        int n_out, next;        /* rows in it, the next to hand out */
    } run;
};

static be_kv_spec spec_of(const teacher *t, be_kv_type type) {
    int n_page = (t->n_ctx + BE_PAGE - 1) / BE_PAGE;
    be_kv_spec spec = {.type = type,
                       .n_slot = 1,
                       .n_ctx = t->n_ctx,
                       .n_page = {n_page, n_page},
                       .max_tok = t->chunk,
                       .max_out = t->chunk};
    arch_kv_spec(&t->cfg, &spec);
    return spec;
}

/* Does it fit? Better said now than after loading half of it. */
static orcd_status check_memory(const teacher *t, const arch *a, const be_kv_spec *spec, orcd_error *err) {
    const double gib = 0x1p30;
    arch_memory m;
    uint64_t total, available;
    ORCD_TRY(arch_plan(a, t->file, &t->cfg, t->dev, spec, &m, err));
    t->dev->ops->memory(t->dev, &total, &available);
    if (m.weights + m.acts + m.kv <= available)
        return ORCD_OK;
    return orcd_fail(
        err, ORCD_ERR_NOMEM,
        "%s needs %.3f GiB (weights %.3f, activations %.3f, KV %.3f) but %s has %.3f GiB available: ask for "
        "fewer tokens, or free memory",
        mf_path(t->file), (double)(m.weights + m.acts + m.kv) / gib, (double)m.weights / gib, (double)m.acts / gib,
        (double)m.kv / gib, t->dev->ops->name, (double)available / gib);
}

static orcd_status open_kv(teacher *t, const be_kv_spec *spec, orcd_error *err) {
    ORCD_TRY(t->dev->ops->kv_open(t->dev, spec, &t->kv, err));
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        for (int i = 0; i < spec->n_page[pool]; i++)
            t->dev->ops->kv_map(t->kv, pool, 0, i, i);
    return ORCD_OK;
}

orcd_status teacher_open(const teacher_params *p, teacher **out, orcd_error *err) {
    orcd_status st = ORCD_ERR_NOMEM;
    const arch *a;
    *out = NULL;
    teacher *t = calloc(1, sizeof *t);
    if (!t)
        return orcd_fail(err, st, "out of memory");
    t->chunk = p->chunk > 0 ? p->chunk : 128;
    t->n_ctx = p->n_ctx;
    ORCD_TRY_GOTO(st, done, mf_open(p->model, &t->file, err));
    ORCD_TRY_GOTO(st, done, arch_identify(t->file, &a, err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, t->file, &t->cfg, err));
    t->cfg.n_host_layers = p->n_host_layers < t->cfg.n_layer ? p->n_host_layers : t->cfg.n_layer;
    if (t->n_ctx < 1 || t->n_ctx > t->cfg.n_ctx) {
        st = orcd_fail(err, ORCD_ERR_LIMIT, "%d positions asked for; %s has 1 to %d", t->n_ctx, p->model, t->cfg.n_ctx);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, be_open(p->backend, &p->device, &t->dev, err));
    be_kv_spec spec = spec_of(t, p->kv_type);
    ORCD_TRY_GOTO(st, done, check_memory(t, a, &spec, err));
    ORCD_TRY_GOTO(
        st, done,
        arch_load(a, t->file, &t->cfg, t->dev, t->chunk, t->chunk, p->progress, p->progress_ctx, &t->model, err));
    ORCD_TRY_GOTO(st, done, open_kv(t, &spec, err));
    size_t n = (size_t)t->chunk;
    t->token = calloc(n, sizeof *t->token);
    t->pos = calloc(n, sizeof *t->pos);
    t->slot = calloc(n, sizeof *t->slot);
    t->out_row = calloc(n, sizeof *t->out_row);
    t->row = calloc((size_t)t->cfg.n_vocab, sizeof *t->row);
    if (!t->token || !t->pos || !t->slot || !t->out_row || !t->row) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        goto done;
    }
    *out = t;
    t = NULL;
done:
    teacher_close(t);
    return st;
}

void teacher_close(teacher *t) {
    if (!t)
        return;
    if (t->kv)
        t->dev->ops->kv_close(t->dev, t->kv);
    arch_unload(t->model);
    if (t->dev)
        t->dev->ops->close(t->dev);
    mf_close(t->file);
    free(t->token);
    free(t->pos);
    free(t->slot);
    free(t->out_row);
    free(t->row);
    free(t);
}

const arch_config *teacher_config(const teacher *t) { return &t->cfg; }

arch_model *teacher_model(teacher *t) { return t->model; }

void teacher_describe(const teacher *t, char *text, size_t cap) { t->dev->ops->describe(t->dev, text, cap); }

/* Compute the next `chunk` positions. */
static orcd_status step(teacher *t, orcd_error *err) {
    int64_t pos0 = t->run.done, left = t->run.n - pos0;
    int n = left < t->chunk ? (int)left : t->chunk;
    t->run.n_out = t->run.next = 0;
    for (int i = 0; i < n; i++) {
        t->token[i] = t->run.ids[pos0 + i];
        t->pos[i] = (int32_t)(pos0 + i);
        if (pos0 + i >= t->run.first)
            t->out_row[t->run.n_out++] = i;
    }
    be_batch b = {n, t->token, t->pos, t->slot, t->run.n_out, t->out_row, false};
    be_step *s;
    ORCD_TRY(t->dev->ops->step_begin(t->dev, t->kv, &b, &s, err));
    t->run.logits = arch_forward(t->model, s);
    t->run.done += n;
    return t->dev->ops->step_end(s, err);
}

orcd_status teacher_start(teacher *t, const int32_t *ids, int64_t n, int64_t first, orcd_error *err) {
    if (n > t->n_ctx)
        return orcd_fail(err, ORCD_ERR_LIMIT, "%lld tokens do not fit a context of %d", (long long)n, t->n_ctx);
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= t->cfg.n_vocab)
            return orcd_fail_at(err, ORCD_ERR_ARG, (uint64_t)i * sizeof *ids,
                                "token %lld has the id %d; the vocabulary has ids 0 to %d", (long long)i, ids[i],
                                t->cfg.n_vocab - 1);
    t->run.ids = ids;
    t->run.n = n;
    t->run.first = first;
    t->run.done = 0;
    t->run.n_out = t->run.next = 0;
    return ORCD_OK;
}

orcd_status teacher_next(teacher *t, int64_t *pos, const float **logits, orcd_error *err) {
    *logits = NULL;
    while (t->run.next == t->run.n_out && t->run.done < t->run.n)
        ORCD_TRY(step(t, err));
    if (t->run.next == t->run.n_out)
        return ORCD_OK;
    int k = t->run.next++;
    const float *host = t->dev->ops->act_host(t->dev, t->run.logits);
    if (!host)
        ORCD_TRY(t->dev->ops->act_read(t->dev, t->run.logits, k, 1, t->row, err));
    *pos = t->run.done - t->run.n_out + k;
    *logits = host ? host + (size_t)k * (size_t)t->cfg.n_vocab : t->row;
    return ORCD_OK;
}

orcd_status teacher_run(teacher *t, const int32_t *ids, int64_t n, int64_t first, teacher_fn fn, void *ctx,
                        orcd_error *err) {
    int64_t pos;
    const float *logits;
    ORCD_TRY(teacher_start(t, ids, n, first, err));
    for (;;) {
        ORCD_TRY(teacher_next(t, &pos, &logits, err));
        if (!logits || !fn(ctx, pos, logits))
            return ORCD_OK;
    }
}
