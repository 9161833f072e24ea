/* Opening a model: file, tokenizer, device, an exact memory plan, weights, KV memory, thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "base/file.h"
#include "engine/internal.h"

/* ---- what the file is ---- */

/* The stored type that most weights have. */
static const char *dominant_type(const mf_file *f) {
    const gguf *g = mf_gguf(f);
    const st_model *m = mf_st(f);
    uint64_t sum[256] = {0}, best = 0, count, n = g ? gguf_n_tensors(g) : st_n_tensors(m);
    const char *name[256] = {0}, *answer = "none";
    for (uint64_t i = 0; i < n; i++) {
        uint8_t k;
        const char *type;
        if (g) {
            const gguf_tensor *t = gguf_tensor_at(g, i);
            const q_traits *q = q_find(t->type);
            k = (uint8_t)t->type, type = q ? q->name : "?";
            count = q ? t->bytes / q->block_bytes * q->block_len : 0;
        } else {
            const st_tensor *t = st_tensor_at(m, i);
            bool packed = strstr(t->name, "_blocks") || strstr(t->name, ".blocks"); /* two values a byte */
            k = (uint8_t)t->type, type = packed ? "MXFP4" : st_type_name(t->type);
            count = t->bytes * 2 / (packed ? 1 : t->type == ST_F32 ? 8 : 4);
        }
        name[k] = type;
        sum[k] += count;
        if (sum[k] > best) {
            best = sum[k];
            answer = name[k];
        }
    }
    return answer;
}

static void name_of(const char *path, char *out, size_t cap) {
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/')
        n--;
    size_t from = n;
    while (from > 0 && path[from - 1] != '/')
        from--;
    snprintf(out, cap, "%.*s", (int)(n - from), path + from);
    for (const char *const *end = (const char *const[]){".gguf", ".safetensors", NULL}; *end; end++) {
        size_t k = strlen(*end), len = strlen(out);
        if (len > k && strcmp(out + len - k, *end) == 0)
            out[len - k] = '\0';
    }
}

static orcd_status open_tokenizer(eng *e, const eng_params *p, orcd_error *err) {
    orcd_status st = tok_open_for(e->file, p->tokenizer, &e->tok, err);
    if (st != ORCD_OK)
        return p->need_tokenizer || p->tokenizer ? st : ORCD_OK;
    int32_t n = tok_n_vocab(e->tok), bos = tok_bos(e->tok), eos = tok_eos(e->tok);
    if (n > e->cfg.n_vocab || bos >= e->cfg.n_vocab || eos >= e->cfg.n_vocab)
        return orcd_fail(err, ORCD_ERR_FORMAT,
                         "the tokenizer of %s has ids up to %d (bos %d, eos %d) but the model only %d tokens: they do "
                         "not belong together",
                         p->model, n - 1, bos, eos, e->cfg.n_vocab);
    e->info.has_harmony = tok_special(e->tok, "<|start|>") >= 0 && tok_special(e->tok, "<|message|>") >= 0 &&
                          tok_special(e->tok, "<|channel|>") >= 0;
    return ORCD_OK;
}

/* ---- the device ---- */

/* Open one backend and plan for it; on failure the device is closed again. */
static orcd_status try_device(eng *e, const eng_params *prm, const char *device, be_kv_spec *spec, eng_plan *p,
                              orcd_error *err) {
    ORCD_TRY(be_open(device, &prm->backend, &e->dev, err));
    orcd_status st = plan_make(e->name, e->arch, e->file, &e->cfg, e->dev, prm, spec, p, err);
    if (st != ORCD_OK) {
        e->dev->ops->close(e->dev);
        e->dev = NULL;
    }
    return st;
}

/* "auto" is the first where the model also fits. */
static orcd_status open_device(eng *e, const eng_params *prm, be_kv_spec *spec, eng_plan *p, orcd_error *err) {
    static const char *const order[] = {"cuda", "cpu", "ref"};
    orcd_status st = ORCD_ERR_UNSUPPORTED;
    if (prm->device && strcmp(prm->device, "auto") != 0)
        return try_device(e, prm, prm->device, spec, p, err);
    for (size_t i = 0; i < ORCD_COUNT(order) && st != ORCD_OK; i++)
        if (be_find(order[i]) && (i < 2 || !be_find("cpu"))) /* ref only where nothing else was built */
            st = try_device(e, prm, order[i], spec, p, err);
    return st;
}

/* ---- all of it ---- */

static orcd_status check_params(const eng_params *p, orcd_error *err) {
    if (!p->model)
        return orcd_fail(err, ORCD_ERR_ARG, "no model was named");
    if (p->max_batch < 0 || p->max_batch > MAX_BATCH)
        return orcd_fail(err, ORCD_ERR_ARG, "max_batch is %d; expected 1 to %d", p->max_batch, MAX_BATCH);
    if (p->max_queue < 0 || p->max_queue > 1 << 20 || p->chunk < 0 || p->chunk > 1 << 16 || p->n_ctx < 0)
        return orcd_fail(err, ORCD_ERR_ARG, "queue %d, chunk %d or context %d is out of range", p->max_queue, p->chunk,
                         p->n_ctx);
    return ORCD_OK;
}

static orcd_status make_tables(eng *e, int max_batch, int max_queue, orcd_error *err) {
    size_t rows = (size_t)e->max_rows, n = (size_t)max_batch;
    e->max_queue = max_queue;
    e->queue_cap = max_queue + max_batch;
    e->queue = calloc((size_t)e->queue_cap, sizeof *e->queue);
    e->slot = calloc(n, sizeof *e->slot);
    e->order = calloc(n, sizeof *e->order);
    e->flight[0].seq = calloc(n, sizeof(seq *));
    e->flight[1].seq = calloc(n, sizeof(seq *));
    e->flight[0].score = calloc(n, sizeof(int32_t));
    e->flight[1].score = calloc(n, sizeof(int32_t));
    e->sample = calloc(n, sizeof *e->sample);
    e->sampled = calloc(n, sizeof *e->sampled);
    e->likely = calloc(n, sizeof *e->likely);
    e->row_token = calloc(rows, sizeof *e->row_token);
    e->row_pos = calloc(rows, sizeof *e->row_pos);
    e->row_slot = calloc(rows, sizeof *e->row_slot);
    e->out_row = calloc(n, sizeof *e->out_row);
    e->logits = calloc((size_t)e->cfg.n_vocab, sizeof *e->logits);
    if (!e->queue || !e->slot || !e->order || !e->flight[0].seq || !e->flight[1].seq || !e->flight[0].score ||
        !e->flight[1].score || !e->sample || !e->sampled || !e->likely || !e->row_token || !e->row_pos ||
        !e->row_slot || !e->out_row || !e->logits)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the tables of %d sequences", max_batch);
    return samp_open(e->cfg.n_vocab, &e->samp, err);
}

static void fill_info(eng *e, const eng_plan *p, int max_batch) {
    e->info.model_name = e->name;
    e->info.arch = arch_name(e->arch);
    e->info.quant = dominant_type(e->file);
    e->dev->ops->describe(e->dev, e->info.device, sizeof e->info.device);
    e->info.n_ctx = p->n_ctx;
    e->info.n_ctx_train = e->cfg.n_ctx;
    e->info.max_batch = max_batch;
    e->info.n_vocab = e->cfg.n_vocab;
    e->info.chunk = p->chunk;
    e->info.weight_bytes = p->m.weights;
    e->info.act_bytes = p->m.acts;
    e->info.kv_bytes = p->m.kv;
    e->info.host_bytes = p->m.host;
    e->info.free_bytes = p->available - p->m.weights - p->m.kv - p->m.acts;
    e->info.total_bytes = p->total;
}

orcd_status eng_check_file(const eng *e, orcd_error *err) {
    if (!file_shrunk() && !mf_changed(e->file))
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_IO, "%s became shorter while it was in use: restore it and start again",
                     mf_path(e->file));
}

static orcd_status start_thread(eng *e, orcd_error *err) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->wake, &attr);
    pthread_condattr_destroy(&attr);
    atomic_store_explicit(&e->n.heartbeat_ns, (uint64_t)(eng_now() * 1e9), memory_order_relaxed);
    e->started = pthread_create(&e->thread, NULL, eng_loop, e) == 0;
    return e->started ? ORCD_OK : orcd_fail(err, ORCD_ERR_INTERNAL, "the system gives no thread to the engine");
}

static orcd_status open_disk(eng *e, const eng_params *p, orcd_error *err) {
    disk_params d = {.dir = p->cache_dir,
                     .max_bytes = p->cache_disk_bytes ? p->cache_disk_bytes : DISK_DEFAULT_BYTES,
                     .n_vocab = e->cfg.n_vocab,
                     .note = p->note,
                     .note_ctx = p->note_ctx};
    eng_fingerprint(e, &p->backend, d.fingerprint);
    return disk_open(&d, &e->kv, e->cache, &e->disk, err);
}

static orcd_status open_file(eng *e, const eng_params *p, orcd_error *err) {
    name_of(p->model, e->name, sizeof e->name);
    ORCD_TRY(mf_open(p->model, &e->file, err));
    ORCD_TRY(arch_identify(e->file, &e->arch, err));
    ORCD_TRY(arch_config_read(e->arch, e->file, &e->cfg, err));
    if (p->n_ctx > e->cfg.n_ctx)
        return orcd_fail(err, ORCD_ERR_LIMIT, "a context of %d was asked for; %s was made for %d", p->n_ctx, e->name,
                         e->cfg.n_ctx);
    return ORCD_OK;
}

static be_kv_spec spec_of(const eng_params *p) {
    int max_batch = p->max_batch ? p->max_batch : 1;
    return (be_kv_spec){.type = p->kv_type, .n_slot = max_batch, .max_out = max_batch};
}

orcd_status eng_plan_only(const eng_params *p, eng_plan *out, orcd_error *err) {
    orcd_status st;
    be_kv_spec spec = spec_of(p);
    *out = (eng_plan){0};
    ORCD_TRY(check_params(p, err));
    eng *e = calloc(1, sizeof *e);
    if (!e)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a plan");
    ORCD_TRY_GOTO(st, done, open_file(e, p, err));
    arch_kv_spec(&e->cfg, &spec);
    st = open_device(e, p, &spec, out, err);
done:
    eng_close(e);
    return st;
}

orcd_status eng_open(const eng_params *p, eng **out, orcd_error *err) {
    orcd_status st;
    eng_plan pl = {0};
    int max_batch = p->max_batch ? p->max_batch : 1, max_queue = p->max_queue ? p->max_queue : 4 * max_batch;
    be_kv_spec spec = spec_of(p);
    arch_size size;
    double t0 = eng_now();
    *out = NULL;
    ORCD_TRY(check_params(p, err));
    eng *e = calloc(1, sizeof *e);
    if (!e)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the engine");
    file_shrunk_reads_zeros(true); /* asked about before anything that was read is used */
    ORCD_TRY_GOTO(st, done, open_file(e, p, err));
    ORCD_TRY_GOTO(st, done, open_tokenizer(e, p, err));
    arch_kv_spec(&e->cfg, &spec);
    ORCD_TRY_GOTO(st, done, open_device(e, p, &spec, &pl, err));
    e->max_rows = pl.max_rows;
    ORCD_TRY_GOTO(st, done, arch_measure(e->arch, e->file, &e->cfg, &size, err));
    double t1 = eng_now();
    ORCD_TRY_GOTO(st, done,
                  arch_load(e->arch, e->file, &e->cfg, e->dev, pl.max_rows, max_batch, p->progress, p->progress_ctx,
                            &e->model, err));
    e->info.load_gb_s = 1e-9 * (double)size.weight_bytes / (eng_now() - t1);
    ORCD_TRY_GOTO(st, done, eng_check_file(e, err));
    e->reads_file = p->backend.no_repack || strcmp(e->dev->ops->name, "ref") == 0;
    file_shrunk_reads_zeros(e->reads_file);
    ORCD_TRY_GOTO(st, done, kv_store_open(e->dev, &spec, &e->kv, err));
    if (e->dev->ops->resident)
        ORCD_TRY_GOTO(st, done, e->dev->ops->resident(e->dev, err));
    uint64_t idle = p->cache_bytes && p->cache_bytes != ENG_NO_CACHE ? p->cache_bytes : UINT64_MAX;
    if (pl.n_entry > 0 && pl.n_page[BE_POOL_FULL] > 0)
        ORCD_TRY_GOTO(st, done, prefix_open(&e->kv, idle, pl.n_entry, &e->cache, err));
    if (e->cache && p->cache_dir)
        ORCD_TRY_GOTO(st, done, open_disk(e, p, err));
    ORCD_TRY_GOTO(st, done, make_tables(e, max_batch, max_queue, err));
    fill_info(e, &pl, max_batch);
    e->info.load_s = eng_now() - t0;
    ORCD_TRY_GOTO(st, done, start_thread(e, err));
    *out = e;
    e = NULL;
done:
    if (st != ORCD_OK)
        file_shrunk_reads_zeros(false);
    eng_close(e);
    return st;
}

void eng_close(eng *e) {
    if (!e)
        return;
    if (e->started) {
        pthread_mutex_lock(&e->lock);
        e->closing = true;
        pthread_cond_signal(&e->wake);
        pthread_mutex_unlock(&e->lock);
        pthread_join(e->thread, NULL);
        pthread_mutex_destroy(&e->lock);
        pthread_cond_destroy(&e->wake);
    }
    disk_close(e->disk);
    prefix_close(e->cache);
    kv_store_close(&e->kv);
    samp_close(e->samp);
    arch_unload(e->model);
    if (e->dev)
        e->dev->ops->close(e->dev);
    tok_close(e->tok);
    mf_close(e->file);
    free(e->queue);
    free(e->slot);
    free(e->order);
    free(e->flight[0].seq);
    free(e->flight[1].seq);
    free(e->flight[0].score);
    free(e->flight[1].score);
    free(e->sample);
    free(e->sampled);
    free(e->likely);
    free(e->row_token);
    free(e->row_pos);
    free(e->row_slot);
    free(e->out_row);
    free(e->logits);
    free(e);
}

const eng_info *eng_get_info(const eng *e) { return &e->info; }
const tok *eng_tok(const eng *e) { return e->tok; }
const arch_config *eng_config(const eng *e) { return &e->cfg; }
be_device *eng_device(eng *e) { return e->dev; }
