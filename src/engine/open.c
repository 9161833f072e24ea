/* Opening a model: file, tokenizer, device, an exact memory plan, weights, KV memory, thread. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/checked.h"
#include "engine/internal.h"

#define GIB (1024.0 * 1024.0 * 1024.0)
#define MAX_ENTRIES 1024 /* of the prefix cache */

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

/* ---- the plan ---- */

typedef struct plan {
    int n_ctx, chunk, max_rows, least_full, n_page[BE_N_POOLS], n_entry;
    arch_memory m;
    uint64_t total, available; /* of the device */
    uint64_t margin;           /* of it, for what the plan does not know */
    uint64_t page_bytes[BE_N_POOLS];
} plan;

static int default_chunk(const char *backend) {
    return strcmp(backend, "cuda") == 0 ? 1024 : strcmp(backend, "ref") == 0 ? 64 : 256;
}

static uint64_t pages_bytes(const plan *p, const int n_page[BE_N_POOLS]) {
    return (uint64_t)n_page[BE_POOL_FULL] * p->page_bytes[BE_POOL_FULL] +
           (uint64_t)n_page[BE_POOL_WINDOW] * p->page_bytes[BE_POOL_WINDOW];
}

static int longest(const be_kv_spec *spec) {
    int w = 0;
    for (int i = 0; i < spec->n_layer; i++)
        w = spec->window[i] > w ? spec->window[i] : w;
    return w;
}

/* Pages for max_batch sequences of n_ctx positions, and the bytes of the least that works: whole context for one. */
static uint64_t least_kv(plan *p, be_kv_spec *spec, int n_ctx) {
    int one[BE_N_POOLS];
    spec->n_ctx = p->n_ctx = n_ctx;
    kv_pages_needed(spec, p->max_rows, spec->n_slot, p->n_page);
    kv_pages_needed(spec, p->max_rows, 1, one);
    p->least_full = one[BE_POOL_FULL];
    one[BE_POOL_WINDOW] = p->n_page[BE_POOL_WINDOW];
    return pages_bytes(p, one);
}

static orcd_status too_large(const eng *e, const plan *p, uint64_t kv, orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_NOMEM,
                     "%s needs %.3f GiB (weights %.3f, activations %.3f, KV for %d positions %.3f) but %s has %.3f GiB "
                     "available: ask for a smaller context, or free memory",
                     e->name, (double)(p->m.weights + p->m.acts + kv) / GIB, (double)p->m.weights / GIB,
                     (double)p->m.acts / GIB, p->n_ctx, (double)kv / GIB, e->dev->ops->name,
                     (double)p->available / GIB);
}

/* How many positions, pages and cache entries there will be. What is asked for must fit; what is left open takes what
 * is there. */
static orcd_status plan_kv(const eng *e, const eng_params *prm, be_kv_spec *spec, plan *p, orcd_error *err) {
    uint64_t fixed = p->m.weights + p->m.acts + p->margin;
    uint64_t left = p->available > fixed ? p->available - fixed : 0;
    uint64_t room = prm->kv_bytes && prm->kv_bytes < left ? prm->kv_bytes : left;
    int n_ctx = prm->n_ctx ? prm->n_ctx : e->cfg.n_ctx;
    uint64_t least = least_kv(p, spec, n_ctx);
    while (prm->n_ctx == 0 && least > room && n_ctx > BE_PAGE) { /* the largest context that fits */
        n_ctx = n_ctx > 2048 ? (n_ctx - 1) / 1024 * 1024 : (n_ctx - 1) / BE_PAGE * BE_PAGE;
        least = least_kv(p, spec, n_ctx);
    }
    if (least > left || p->available < fixed)
        return too_large(e, p, least, err);
    if (least > room)
        return orcd_fail(err, ORCD_ERR_NOMEM,
                         "KV memory for one sequence of %d positions takes %.1f MiB; only %.1f MiB were allowed for it",
                         n_ctx, (double)least / (1024 * 1024), (double)room / (1024 * 1024));
    int per_entry = prefix_entry_pages(longest(spec));
    p->n_entry = prm->cache_bytes == ENG_NO_CACHE ? 0 : MAX_ENTRIES;
    if (per_entry && p->n_entry) { /* window pages of the cache, in at most a quarter of what is left open */
        uint64_t share = prm->cache_bytes ? prm->cache_bytes : (room - least) / 4;
        share = share < room - least ? share : room - least;
        uint64_t most = share / ((uint64_t)per_entry * p->page_bytes[BE_POOL_WINDOW]);
        uint64_t want = 16 + MAX_SAVES * (uint64_t)spec->n_slot;
        p->n_entry = (int)(want < most ? want : most);
        p->n_page[BE_POOL_WINDOW] += p->n_entry * per_entry;
    }
    if (p->n_entry) /* a sequence copies the last page of its cached prefix: room for it even in a full context */
        p->n_page[BE_POOL_FULL] += 2 * spec->n_slot;
    uint64_t window = (uint64_t)p->n_page[BE_POOL_WINDOW] * p->page_bytes[BE_POOL_WINDOW];
    if (p->least_full && pages_bytes(p, p->n_page) > room) {
        uint64_t n = (room - window) / p->page_bytes[BE_POOL_FULL];
        p->n_page[BE_POOL_FULL] = n > (uint64_t)p->least_full ? (int)n : p->least_full;
    }
    return ORCD_OK;
}

/* ---- the device ---- */

#define AUTO_CTX 8192 /* experts leave the device so that at least this context fits */

/* What the model takes with n layers' experts in host memory and no KV pages yet. */
static orcd_status plan_with(eng *e, int n_host_layers, const be_kv_spec *spec, plan *p, orcd_error *err) {
    be_kv_spec s = *spec;
    e->cfg.n_host_layers = n_host_layers;
    memset(s.n_page, 0, sizeof s.n_page);
    return arch_plan(e->arch, e->file, &e->cfg, e->dev, &s, &p->m, err);
}

/* As few layers with experts in host memory as needed; all when even that does not fit: plan_kv says so then. */
static orcd_status place_experts(eng *e, const eng_params *prm, be_kv_spec *spec, plan *p, orcd_error *err) {
    int lo = prm->backend.cpu_experts, hi = e->cfg.n_layer;
    if (!e->dev->ops->used || e->cfg.n_expert == 0)
        return plan_with(e, 0, spec, p, err);
    if (lo >= 0)
        return plan_with(e, lo < hi ? lo : hi, spec, p, err);
    int n_ctx = prm->n_ctx ? prm->n_ctx : e->cfg.n_ctx < AUTO_CTX ? e->cfg.n_ctx : AUTO_CTX;
    for (lo = 0; lo < hi;) {
        int n = (lo + hi) / 2;
        ORCD_TRY(plan_with(e, n, spec, p, err));
        if (p->m.weights + p->m.acts + p->margin + least_kv(p, spec, n_ctx) <= p->available)
            hi = n;
        else
            lo = n + 1;
    }
    return plan_with(e, lo, spec, p, err);
}

static void tell_plan(const eng *e, const eng_params *prm, const plan *p) {
    char text[256];
    uint64_t sum = p->m.weights + p->m.kv + p->m.acts;
    int n = snprintf(text, sizeof text, "plan: weights %.2f GiB, KV %.2f GiB for %d positions, activations %.2f GiB",
                     (double)p->m.weights / GIB, (double)p->m.kv / GIB, p->n_ctx, (double)p->m.acts / GIB);
    if (p->m.host)
        n += snprintf(text + n, sizeof text - (size_t)n, ", experts of %d layers in host memory %.2f GiB",
                      e->cfg.n_host_layers, (double)p->m.host / GIB);
    snprintf(text + n, sizeof text - (size_t)n, "; %.2f GiB of %.2f GiB stay free", (double)(p->available - sum) / GIB,
             (double)p->total / GIB);
    prm->note(prm->note_ctx, text);
}

/* Open one backend and plan for it; on failure the device is closed again. */
static orcd_status try_device(eng *e, const eng_params *prm, const char *device, be_kv_spec *spec, plan *p,
                              orcd_error *err) {
    orcd_status st;
    ORCD_TRY(be_open(device, &prm->backend, &e->dev, err));
    const be_ops *ops = e->dev->ops;
    *p = (plan){.chunk = prm->chunk ? prm->chunk : default_chunk(ops->name)};
    p->max_rows = p->chunk > spec->n_slot ? p->chunk : spec->n_slot;
    spec->max_tok = p->max_rows;
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        p->page_bytes[pool] = ops->kv_page_bytes(e->dev, spec, pool);
    ops->memory(e->dev, &p->total, &p->available);
    p->margin = ops->used ? 0 : p->available / 32;
    spec->n_ctx = prm->n_ctx ? prm->n_ctx : e->cfg.n_ctx;
    ORCD_TRY_GOTO(st, done, place_experts(e, prm, spec, p, err));
    ORCD_TRY_GOTO(st, done, plan_kv(e, prm, spec, p, err));
    spec->n_ctx = p->n_ctx;
    memcpy(spec->n_page, p->n_page, sizeof spec->n_page);
    st = arch_plan(e->arch, e->file, &e->cfg, e->dev, spec, &p->m, err);
    if (st == ORCD_OK && ops->used && prm->note)
        tell_plan(e, prm, p);
done:
    if (st != ORCD_OK) {
        ops->close(e->dev);
        e->dev = NULL;
    }
    return st;
}

/* "auto" is the first where the model also fits. */
static orcd_status open_device(eng *e, const eng_params *prm, be_kv_spec *spec, plan *p, orcd_error *err) {
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
    e->queue = calloc((size_t)max_queue, sizeof *e->queue);
    e->slot = calloc(n, sizeof *e->slot);
    e->order = calloc(n, sizeof *e->order);
    e->flight[0].seq = calloc(n, sizeof(seq *));
    e->flight[1].seq = calloc(n, sizeof(seq *));
    e->sample = calloc(n, sizeof *e->sample);
    e->sampled = calloc(n, sizeof *e->sampled);
    e->row_token = calloc(rows, sizeof *e->row_token);
    e->row_pos = calloc(rows, sizeof *e->row_pos);
    e->row_slot = calloc(rows, sizeof *e->row_slot);
    e->out_row = calloc(n, sizeof *e->out_row);
    e->logits = calloc((size_t)e->cfg.n_vocab, sizeof *e->logits);
    if (!e->queue || !e->slot || !e->order || !e->flight[0].seq || !e->flight[1].seq || !e->sample || !e->sampled ||
        !e->row_token || !e->row_pos || !e->row_slot || !e->out_row || !e->logits)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the tables of %d sequences", max_batch);
    return samp_open(e->cfg.n_vocab, &e->samp, err);
}

static void fill_info(eng *e, const plan *p, int max_batch) {
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

orcd_status eng_open(const eng_params *p, eng **out, orcd_error *err) {
    orcd_status st;
    plan pl = {0};
    int max_batch = p->max_batch ? p->max_batch : 1, max_queue = p->max_queue ? p->max_queue : 4 * max_batch;
    be_kv_spec spec = {.type = p->kv_type, .n_slot = max_batch, .max_out = max_batch};
    double t0 = eng_now();
    *out = NULL;
    ORCD_TRY(check_params(p, err));
    eng *e = calloc(1, sizeof *e);
    if (!e)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the engine");
    name_of(p->model, e->name, sizeof e->name);
    ORCD_TRY_GOTO(st, done, mf_open(p->model, &e->file, err));
    ORCD_TRY_GOTO(st, done, arch_identify(e->file, &e->arch, err));
    ORCD_TRY_GOTO(st, done, arch_config_read(e->arch, e->file, &e->cfg, err));
    if (p->n_ctx > e->cfg.n_ctx) {
        st = orcd_fail(err, ORCD_ERR_LIMIT, "a context of %d was asked for; %s was made for %d", p->n_ctx, e->name,
                       e->cfg.n_ctx);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, open_tokenizer(e, p, err));
    arch_kv_spec(&e->cfg, &spec);
    ORCD_TRY_GOTO(st, done, open_device(e, p, &spec, &pl, err));
    e->max_rows = pl.max_rows;
    ORCD_TRY_GOTO(st, done,
                  arch_load(e->arch, e->file, &e->cfg, e->dev, pl.max_rows, max_batch, p->progress, p->progress_ctx,
                            &e->model, err));
    ORCD_TRY_GOTO(st, done, kv_store_open(e->dev, &spec, &e->kv, err));
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
    free(e->sample);
    free(e->sampled);
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
arch_model *eng_model(eng *e) { return e->model; }
be_device *eng_device(eng *e) { return e->dev; }
