/* The plan: weights, activations and KV memory of a model on a device, and how much context that leaves. */
#include <math.h>
#include <string.h>

#include "engine/internal.h"

#define GIB (1024.0 * 1024.0 * 1024.0)
#define MAX_ENTRIES 1024 /* of the prefix cache */
#define AUTO_CTX 8192    /* what experts leave the device for, and a default step is made smaller for */

/* Prompt rows of a step on a GPU, as many as pay: their activations take at most this part of the memory there. */
#define MOST_CHUNK 4096
#define LEAST_CHUNK 1024
#define CHUNK_SHARE 64

typedef struct target {
    const char *name;
    const arch *arch;
    const mf_file *file;
    arch_config *cfg;
    be_device *dev;
} target;

static uint64_t pages_bytes(const eng_plan *p, const int n_page[BE_N_POOLS]) {
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
static uint64_t least_kv(eng_plan *p, be_kv_spec *spec, int n_ctx) {
    int one[BE_N_POOLS];
    spec->n_ctx = p->n_ctx = n_ctx;
    kv_pages_needed(spec, p->max_rows, spec->n_slot, p->n_page);
    kv_pages_needed(spec, p->max_rows, 1, one);
    p->least_full = one[BE_POOL_FULL];
    one[BE_POOL_WINDOW] = p->n_page[BE_POOL_WINDOW];
    return pages_bytes(p, one);
}

/* A step that nobody asked for is no larger than the KV memory that was asked for carries. */
static void fit_chunk(const eng_params *prm, be_kv_spec *spec, eng_plan *p) {
    for (;; p->chunk /= 2) {
        p->max_rows = p->chunk + spec->n_slot - 1;
        if (prm->chunk || !prm->kv_bytes || p->chunk <= BE_PAGE)
            return;
        if (least_kv(p, spec, prm->n_ctx ? prm->n_ctx : AUTO_CTX) <= prm->kv_bytes)
            return;
    }
}

static orcd_status too_large(const target *e, const eng_plan *p, uint64_t kv, orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_NOMEM,
                     "%s needs %.3f GiB (weights %.3f, activations %.3f, KV for %d positions %.3f) but %s has %.3f GiB "
                     "available: ask for a smaller context, or free memory",
                     e->name, (double)(p->m.weights + p->m.acts + kv) / GIB, (double)p->m.weights / GIB,
                     (double)p->m.acts / GIB, p->n_ctx, (double)kv / GIB, e->dev->ops->name,
                     (double)p->available / GIB);
}

/* How many positions, pages and cache entries there will be. What is asked for must fit; what is left open takes what
 * is there. */
static orcd_status plan_kv(const target *e, const eng_params *prm, be_kv_spec *spec, eng_plan *p, orcd_error *err) {
    uint64_t fixed = p->m.weights + p->m.acts + p->margin;
    uint64_t left = p->available > fixed ? p->available - fixed : 0;
    uint64_t room = prm->kv_bytes && prm->kv_bytes < left ? prm->kv_bytes : left;
    int n_ctx = prm->n_ctx ? prm->n_ctx : e->cfg->n_ctx;
    uint64_t least = least_kv(p, spec, n_ctx);
    while (prm->n_ctx == 0 && least > room && n_ctx > BE_PAGE) { /* the largest context that fits */
        n_ctx = n_ctx > 2048 ? (n_ctx - 1) / 1024 * 1024 : (n_ctx - 1) / BE_PAGE * BE_PAGE;
        least = least_kv(p, spec, n_ctx);
    }
    p->m.kv = least;
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

/* What the model takes with n layers' experts in host memory and no KV pages yet. */
static orcd_status plan_with(const target *e, int n_host_layers, const be_kv_spec *spec, eng_plan *p, orcd_error *err) {
    be_kv_spec s = *spec;
    e->cfg->n_host_layers = n_host_layers;
    memset(s.n_page, 0, sizeof s.n_page);
    return arch_plan(e->arch, e->file, e->cfg, e->dev, &s, &p->m, err);
}

/* As few layers with experts in host memory as needed; all when even that does not fit: plan_kv says so then. */
static orcd_status place_experts(const target *e, const eng_params *prm, be_kv_spec *spec, eng_plan *p,
                                 orcd_error *err) {
    int lo = prm->backend.cpu_experts, hi = e->cfg->n_layer;
    if (!e->dev->ops->resident || e->cfg->n_expert == 0) /* the device computes in host memory anyway */
        return plan_with(e, 0, spec, p, err);
    if (lo >= 0)
        return plan_with(e, lo < hi ? lo : hi, spec, p, err);
    int n_ctx = prm->n_ctx ? prm->n_ctx : e->cfg->n_ctx < AUTO_CTX ? e->cfg->n_ctx : AUTO_CTX;
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

/* What stays in host memory must fit there. */
static orcd_status check_host(const target *e, const eng_plan *p, orcd_error *err) {
    uint64_t total, available;
    be_device *host;
    if (p->m.host == 0)
        return ORCD_OK;
    ORCD_TRY(be_open("cpu", &(be_params){.dry = true}, &host, err));
    host->ops->memory(host, &total, &available);
    host->ops->close(host);
    if (p->m.host <= available)
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_NOMEM,
                     "%s: the experts of %d layers need %.3f GiB of host memory; %.3f GiB are available", e->name,
                     e->cfg->n_host_layers, (double)p->m.host / GIB, (double)available / GIB);
}

/* Positions, in whole pages, that n_slot sequences can have at once in `room` bytes. */
static int longest_context(const eng_plan *p, const be_kv_spec *spec, int n_slot, int most, uint64_t room) {
    int lo = 0, hi = kv_n_index(most);
    be_kv_spec s = *spec;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2, n_page[BE_N_POOLS], all[BE_N_POOLS];
        s.n_ctx = mid * BE_PAGE;
        kv_pages_needed(&s, p->max_rows, n_slot, n_page);
        kv_pages_needed(&s, p->max_rows, s.n_slot, all);
        n_page[BE_POOL_WINDOW] = all[BE_POOL_WINDOW];
        if (pages_bytes(p, n_page) <= room)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo * BE_PAGE < most ? lo * BE_PAGE : most;
}

orcd_status eng_plan_chunk(const arch *a, const mf_file *f, const arch_config *c, be_device *dev,
                           const be_kv_spec *spec, uint64_t available, int *chunk, orcd_error *err) {
    be_kv_spec s = *spec;
    arch_memory m;
    *chunk = strcmp(dev->ops->name, "cuda") == 0 ? MOST_CHUNK : strcmp(dev->ops->name, "ref") == 0 ? 64 : 256;
    memset(s.n_page, 0, sizeof s.n_page);
    for (; *chunk > LEAST_CHUNK; *chunk /= 2) {
        s.max_tok = *chunk + s.n_slot - 1;
        ORCD_TRY(arch_plan(a, f, c, dev, &s, &m, err));
        if (m.acts <= available / CHUNK_SHARE)
            break;
    }
    return ORCD_OK;
}

orcd_status plan_make(const char *name, const arch *a, const mf_file *f, arch_config *c, be_device *dev,
                      const eng_params *prm, be_kv_spec *spec, eng_plan *p, orcd_error *err) {
    const target e = {name, a, f, c, dev};
    const be_ops *ops = dev->ops;
    *p = (eng_plan){.chunk = prm->chunk, .n_ctx_train = c->n_ctx};
    ops->describe(dev, p->device, sizeof p->device);
    ops->memory(dev, &p->total, &p->available);
    if (prm->memory_bytes)
        p->total = p->available = prm->memory_bytes;
    if (!p->chunk)
        ORCD_TRY(eng_plan_chunk(a, f, c, dev, spec, p->available, &p->chunk, err));
    p->max_batch = spec->n_slot;
    p->window = longest(spec);
    p->expert_share = c->n_expert ? (double)c->n_expert_used / c->n_expert : 0;
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        p->page_bytes[pool] = ops->kv_page_bytes(dev, spec, pool);
    fit_chunk(prm, spec, p);
    spec->max_tok = p->max_rows;
    p->margin = ops->used ? 0 : p->available / 32;
    spec->n_ctx = prm->n_ctx ? prm->n_ctx : c->n_ctx;
    ORCD_TRY(place_experts(&e, prm, spec, p, err));
    p->n_host_layers = c->n_host_layers;
    ORCD_TRY(check_host(&e, p, err));
    uint64_t fixed = p->m.weights + p->m.acts + p->margin, room = p->available > fixed ? p->available - fixed : 0;
    p->most_one = longest_context(p, spec, 1, c->n_ctx, room);
    p->most_all = longest_context(p, spec, spec->n_slot, c->n_ctx, room);
    ORCD_TRY(plan_kv(&e, prm, spec, p, err));
    spec->n_ctx = p->n_ctx;
    memcpy(spec->n_page, p->n_page, sizeof spec->n_page);
    return arch_plan(a, f, c, dev, spec, &p->m, err);
}

double eng_plan_speed(const eng_plan *p, int streams, int depth, double rate, double host_rate) {
    double experts = 1 - pow(1 - p->expert_share, streams); /* that some row of the step chose */
    double in_window = depth < p->window ? depth : p->window;
    double kv =
        (depth * (double)p->page_bytes[BE_POOL_FULL] + in_window * (double)p->page_bytes[BE_POOL_WINDOW]) / BE_PAGE;
    double bytes = (double)p->m.every_step + experts * (double)p->m.experts + streams * kv;
    return streams / (bytes / rate + (p->m.host ? experts * (double)p->m.host / host_rate : 0));
}
