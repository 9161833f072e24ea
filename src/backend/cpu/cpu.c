/* backend/cpu: the operations on x86-64 with persistent threads. Operations are recorded and every thread walks the
 * list in step_end, with a barrier after each. Work is handed out by a counter: who computes a panel never matters. */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/cpu/internal.h"
#include "base/checked.h"

enum { MAX_CMDS = 32768, MAX_THREADS = 512 };

static void cpu_close(be_device *dev) {
    cpu_device *d = (cpu_device *)dev;
    if (!d)
        return;
    pool_close(d->pool);
    cpu_give(d, d->arena, d->arena_bytes);
    cpu_free(d->step.cmd, MAX_CMDS * sizeof *d->step.cmd);
    free(d->local);
    free(d);
}

static int allowed_cores(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

static orcd_status cpu_open(const be_params *p, be_device **out, orcd_error *err) {
    *out = NULL;
    int n = p->n_threads > 0 ? p->n_threads : allowed_cores();
    if (n > MAX_THREADS)
        n = MAX_THREADS;
    cpu_device *d = calloc(1, sizeof *d);
    if (!d)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the cpu backend");
    d->base.ops = &be_ops_cpu;
    d->base.params = *p;
    d->base.params.n_threads = n;
    d->tier = cpu_tier_best();
    d->k = cpu_kernels_for(d->tier, p->act_bits == 8);
    d->n_thread = n;
    d->local = calloc((size_t)n, sizeof *d->local);
    if (!p->dry) /* reserved, hardly touched */
        d->step.cmd = cpu_alloc(MAX_CMDS * sizeof *d->step.cmd);
    d->step.cap_cmd = MAX_CMDS;
    d->step.dev = d;
    orcd_status st = ORCD_OK;
    if (!d->local || (!d->step.cmd && !p->dry))
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the cpu backend with %d threads", n);
    else if (!p->dry)
        st = pool_open(n, &d->pool, err);
    if (st != ORCD_OK) {
        cpu_close(&d->base);
        return st;
    }
    *out = &d->base;
    return ORCD_OK;
}

static void cpu_describe(be_device *dev, char *text, size_t cap) {
    const cpu_device *d = (const cpu_device *)dev;
    snprintf(text, cap, "cpu: %d thread%s, %s", d->n_thread, d->n_thread == 1 ? "" : "s", cpu_tier_name(d->tier));
}

static void cpu_memory(be_device *dev, uint64_t *total, uint64_t *available) {
    (void)dev;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    *total = (uint64_t)sysconf(_SC_PHYS_PAGES) * page;
    *available = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * page;
    /* what the page cache can give back counts as available */
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long long kib;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            *available = kib << 10;
    if (f)
        fclose(f);
    *available -= *available / 32; /* for the rest of the program, and for others */
}

static uint64_t cpu_used(be_device *dev) { return ((const cpu_device *)dev)->used; }

/* ---- activations ---- */

static size_t act_bytes(const cpu_act *a) { return (size_t)a->base.cap_row * (size_t)a->stride * sizeof(float); }

static orcd_status cpu_act_new(be_device *dev, be_form form, int64_t cap_row, int64_t width, be_act **out,
                               orcd_error *err) {
    cpu_device *d = (cpu_device *)dev;
    *out = NULL;
    uint64_t n;
    if (cap_row < 1 || width < 1 || !ck_mul((uint64_t)cap_row, (uint64_t)width * 2, &n) || n > SIZE_MAX / 8)
        return orcd_fail(err, ORCD_ERR_ARG, "an activation of %lld rows of %lld values is out of range",
                         (long long)cap_row, (long long)width);
    cpu_act *a = calloc(1, sizeof *a);
    if (a) {
        a->base = (be_act){.form = form, .width = width, .cap_row = cap_row};
        a->stride = form == BE_ACT_ROUTE ? width * 2 : width;
        a->data = cpu_take(d, act_bytes(a));
    }
    if (!a || !a->data) {
        free(a);
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %lld rows of %lld values: lower the step size",
                         (long long)cap_row, (long long)width);
    }
    if (form == BE_ACT_ROUTE)
        cpu_widen(&d->dims.top_k, width);
    *out = &a->base;
    return ORCD_OK;
}

static void cpu_act_free(be_device *dev, be_act *base) {
    cpu_act *a = (cpu_act *)base;
    if (!a)
        return;
    cpu_give((cpu_device *)dev, a->data, act_bytes(a));
    free(a);
}

static orcd_status check_rows(const be_act *a, int64_t row, int64_t n, orcd_error *err) {
    if (row < 0 || n < 0 || row > a->cap_row || n > a->cap_row - row)
        return orcd_fail(err, ORCD_ERR_ARG, "rows %lld..%lld are outside an activation of %lld rows", (long long)row,
                         (long long)(row + n), (long long)a->cap_row);
    return ORCD_OK;
}

static orcd_status cpu_act_read(be_device *dev, const be_act *base, int64_t row, int64_t n, float *dst,
                                orcd_error *err) {
    (void)dev;
    const cpu_act *a = (const cpu_act *)base;
    ORCD_TRY(check_rows(base, row, n, err));
    memcpy(dst, a->data + row * a->stride, (size_t)(n * a->stride) * sizeof(float));
    return ORCD_OK;
}

static orcd_status cpu_act_write(be_device *dev, be_act *base, int64_t row, int64_t n, const float *src,
                                 orcd_error *err) {
    (void)dev;
    cpu_act *a = (cpu_act *)base;
    ORCD_TRY(check_rows(base, row, n, err));
    memcpy(a->data + row * a->stride, src, (size_t)(n * a->stride) * sizeof(float));
    base->n_row = row + n;
    return ORCD_OK;
}

static const float *cpu_act_host(be_device *dev, const be_act *a) {
    (void)dev;
    return a->form == BE_ACT_F32 ? ((const cpu_act *)a)->data : NULL;
}

/* ---- steps ---- */

static orcd_status cpu_step_begin(be_device *dev, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err) {
    cpu_device *d = (cpu_device *)dev;
    *out = NULL;
    if (d->step.open)
        return orcd_fail(err, ORCD_ERR_ARG, "the last step was not ended");
    if (b->n_tok < 1 || (kv && (b->n_tok > kv->spec.max_tok || b->n_out > kv->spec.max_out)))
        return orcd_fail(err, ORCD_ERR_ARG, "a step of %d rows and %d outputs; this cache was opened for %d and %d",
                         b->n_tok, b->n_out, kv ? kv->spec.max_tok : 0, kv ? kv->spec.max_out : 0);
    cpu_step *s = &d->step;
    s->base = (be_step){.dev = dev, .kv = kv, .batch = *b};
    s->n_cmd = 0;
    s->error.code = ORCD_OK;
    s->rope_freq = NULL;
    s->open = true;
    *out = &s->base;
    return ORCD_OK;
}

static void walk(void *arg, int thread, int n_threads) {
    (void)n_threads;
    cpu_step *s = arg;
    for (int i = 0; i < s->n_cmd; i++) {
        s->cmd[i].run(s, &s->cmd[i], thread);
        pool_barrier(s->dev->pool);
    }
}

static orcd_status cpu_step_end(be_step *base, orcd_error *err) {
    cpu_step *s = (cpu_step *)base;
    s->open = false;
    if (s->error.code != ORCD_OK) {
        if (err)
            *err = s->error;
        return s->error.code;
    }
    /* no-op once everything was loaded and the cache opened */
    ORCD_TRY(cpu_scratch(s->dev, err));
    pool_run(s->dev->pool, walk, s);
    return ORCD_OK;
}

const be_ops be_ops_cpu = {
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .describe = cpu_describe,
    .memory = cpu_memory,
    .load_bytes = cpu_load_bytes,
    .load = cpu_load,
    .unload = cpu_unload,
    .act_new = cpu_act_new,
    .act_free = cpu_act_free,
    .act_read = cpu_act_read,
    .act_write = cpu_act_write,
    .act_host = cpu_act_host,
    .kv_page_bytes = cpu_kv_page_bytes,
    .kv_open = cpu_kv_open,
    .kv_close = cpu_kv_close,
    .kv_map = cpu_kv_map,
    .kv_copy_page = cpu_kv_copy_page,
    .kv_read_page = cpu_kv_read_page,
    .kv_write_page = cpu_kv_write_page,
    .step_begin = cpu_step_begin,
    .step_end = cpu_step_end,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .linear = cpu_linear,
    .rope = cpu_rope,
    .kv_write = cpu_kv_write,
    .attention = cpu_attention,
    .route = cpu_route,
    .experts = cpu_experts,
    .gather_out = cpu_gather_out,
    .tap = cpu_tap,
    .norm_linear = cpu_norm_linear,
    .used = cpu_used,
};
