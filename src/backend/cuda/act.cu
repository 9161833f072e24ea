/* backend/cuda/act.cu: activations and the paged KV cache. */
#include "backend/cuda/kv.cuh"

#include <new>
#include <string.h>

/* ---- activations ---- */

/* At least as many rows as a step of up to n is recorded for (bucket() in step.cu), which kernels take as
 * cuda_count.cap where rows lie behind one another: scratch has room for them. */
static int64_t recorded_rows(int64_t n) { return n > 256 ? n : round_up(n, 64); }

orcd_status cuda_act_new(be_device *base, be_form form, int64_t cap_row, int64_t width, be_act **out, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    orcd_status st = ORCD_OK;
    *out = NULL;
    if (cap_row < 1 || width < 1 || cap_row > INT32_MAX || width > INT32_MAX)
        return orcd_fail(err, ORCD_ERR_ARG, "activation of %lld rows of %lld values", (long long)cap_row,
                         (long long)width);
    ORCD_TRY(cuda_use(d, err));
    cuda_act *a = new (std::nothrow) cuda_act{};
    if (!a)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    const size_t n = (size_t)cap_row * (size_t)width;
    size_t halves = 0;
    a->base.form = form;
    a->base.width = width;
    a->base.cap_row = cap_row;
    a->ld = round_up(width, 64);
    if (form == BE_ACT_ROUTE) {
        ORCD_TRY_GOTO(st, done, cuda_alloc(d, &a->id, n * sizeof *a->id, "routing", err));
        ORCD_TRY_GOTO(st, done, cuda_alloc(d, &a->expert_w, n * sizeof *a->expert_w, "routing", err));
        d->want_k = width;
        const int64_t pairs = recorded_rows(cap_row) * width;
        d->want_pairs = pairs > d->want_pairs ? pairs : d->want_pairs;
    } else {
        ORCD_TRY_GOTO(st, done, cuda_alloc(d, &a->f32, n * sizeof *a->f32, "an activation", err));
        if (form == BE_ACT_FREE || width <= 16384) { /* wide floats are logits: no product reads them */
            halves = (size_t)cap_row * (size_t)a->ld * sizeof *a->f16;
            ORCD_TRY_GOTO(st, done, cuda_alloc(d, &a->f16, halves, "an activation", err));
        }
        /* columns past width stay zero for ever */
        ORCD_TRY_GOTO(st, done, cuda_fill(d, a->f16, 0, halves, "an activation", err));
    }
    *out = &a->base;
    a = NULL;
done:
    cuda_act_free(base, (be_act *)a);
    return st;
}

void cuda_act_free(be_device *base, be_act *act) {
    cuda_act *a = (cuda_act *)act;
    if (!a)
        return;
    cuda_dev *d = (cuda_dev *)base;
    cuda_quiet(d);
    cuda_graphs_drop(d, NULL);
    cuda_free(d, a->f32);
    cuda_free(d, a->f16);
    cuda_free(d, a->id);
    cuda_free(d, a->expert_w);
    delete a;
}

static orcd_status in_range(const be_act *a, int64_t row, int64_t n, orcd_error *err) {
    if (row < 0 || n < 0 || row + n > a->cap_row)
        return orcd_fail(err, ORCD_ERR_ARG, "rows %lld to %lld of an activation of %lld", (long long)row,
                         (long long)(row + n), (long long)a->cap_row);
    return ORCD_OK;
}

orcd_status cuda_act_read(be_device *base, const be_act *act, int64_t row, int64_t n, float *dst, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    const cuda_act *a = (const cuda_act *)act;
    const size_t width = (size_t)act->width, count = (size_t)n * width;
    ORCD_TRY(in_range(act, row, n, err));
    ORCD_TRY(cuda_use(d, err));
    CUDA_TRY(d, "waiting for a step", cudaStreamSynchronize(d->stream));
    if (act->form == BE_ACT_ROUTE) {
        int32_t *id = (int32_t *)malloc(count * 8 + 8);
        if (!id)
            return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        float *w = (float *)(id + count);
        cudaError_t e = cudaMemcpy(id, a->id + row * act->width, count * 4, cudaMemcpyDeviceToHost);
        if (e == cudaSuccess)
            e = cudaMemcpy(w, a->expert_w + row * act->width, count * 4, cudaMemcpyDeviceToHost);
        for (size_t i = 0; e == cudaSuccess && i < count; i++) {
            dst[2 * i] = (float)id[i];
            dst[2 * i + 1] = w[i];
        }
        free(id);
        return e == cudaSuccess ? ORCD_OK : cuda_fail(d, e, "reading routing", err);
    }
    if (act->form == BE_ACT_F32 || a->has_f32) {
        CUDA_TRY(d, "reading an activation",
                 cudaMemcpy(dst, a->f32 + row * act->width, count * 4, cudaMemcpyDeviceToHost));
        return ORCD_OK;
    }
    const size_t ld = (size_t)a->ld;
    uint16_t *h = (uint16_t *)malloc((size_t)n * ld * 2 + 2);
    if (!h)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    cudaError_t e = cudaMemcpy(h, a->f16 + row * a->ld, (size_t)n * ld * 2, cudaMemcpyDeviceToHost);
    for (size_t r = 0; e == cudaSuccess && r < (size_t)n; r++)
        for (size_t k = 0; k < width; k++)
            dst[r * width + k] = f32_from_f16(h[r * ld + k]);
    free(h);
    return e == cudaSuccess ? ORCD_OK : cuda_fail(d, e, "reading an activation", err);
}

orcd_status cuda_act_write(be_device *base, be_act *act, int64_t row, int64_t n, const float *src, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    cuda_act *a = (cuda_act *)act;
    const char *what = "writing an activation";
    const size_t width = (size_t)act->width, count = (size_t)n * width, ld = (size_t)a->ld;
    ORCD_TRY(in_range(act, row, n, err));
    ORCD_TRY(cuda_use(d, err));
    CUDA_TRY(d, "waiting for a step", cudaStreamSynchronize(d->stream));
    act->n_row = row + n;
    void *host = calloc((size_t)n * ld + 1, 8);
    if (!host)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    orcd_status st;
    if (act->form == BE_ACT_ROUTE) {
        int32_t *id = (int32_t *)host;
        float *w = (float *)(id + count);
        for (size_t i = 0; i < count; i++) {
            id[i] = (int32_t)src[2 * i];
            w[i] = src[2 * i + 1];
        }
        st = cuda_upload(d, a->id + row * act->width, id, count * 4, what, err);
        if (st == ORCD_OK)
            st = cuda_upload(d, a->expert_w + row * act->width, w, count * 4, what, err);
    } else {
        uint16_t *h = (uint16_t *)host;
        for (size_t r = 0; r < (size_t)n; r++)
            for (size_t k = 0; k < width; k++)
                h[r * ld + k] = f16_from_f32(src[r * width + k]);
        st = cuda_upload(d, a->f32 + row * act->width, src, count * 4, what, err);
        if (st == ORCD_OK && a->f16)
            st = cuda_upload(d, a->f16 + row * a->ld, h, (size_t)n * ld * 2, what, err);
        a->has_f32 = true;
        a->has_f16 = a->f16 != NULL;
        a->outs = false;
    }
    free(host);
    return st;
}

const float *cuda_act_host(be_device *d, const be_act *a) {
    (void)d, (void)a;
    return NULL;
}

/* ---- KV pages ---- */

static int padded_dim(int head_dim) { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128; }
static int head_bytes(const be_kv_spec *s) {
    const int dim = padded_dim(s->head_dim);
    return s->type == BE_KV_F32  ? kv_head_bytes<float>(dim)
           : s->type == BE_KV_Q8 ? kv_head_bytes<kv_int8>(dim)
                                 : kv_head_bytes<__half>(dim);
}

uint64_t cuda_kv_page_bytes(be_device *d, const be_kv_spec *s, int pool) {
    (void)d;
    uint64_t layers = 0;
    for (int i = 0; i < s->n_layer; i++)
        layers += (s->window[i] ? BE_POOL_WINDOW : BE_POOL_FULL) == pool;
    return layers * (uint64_t)s->n_kv_head * (uint64_t)head_bytes(s);
}

orcd_status cuda_kv_open(be_device *base, const be_kv_spec *s, be_kv **out, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    orcd_status st = ORCD_OK;
    *out = NULL;
    if (s->head_dim > 128)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "heads of %d values; the CUDA backend goes up to 128", s->head_dim);
    ORCD_TRY(cuda_use(d, err));
    cuda_loaded(d);
    cuda_kv *kv = new (std::nothrow) cuda_kv{};
    if (!kv)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    kv->base.spec = *s;
    kv->dev = d;
    kv->dim = padded_dim(s->head_dim);
    kv->head_bytes = head_bytes(s);
    kv->n_entry = (s->n_ctx + BE_PAGE - 1) / BE_PAGE;
    kv->window = (int *)calloc((size_t)s->n_layer, sizeof *kv->window);
    kv->sub = (int *)calloc((size_t)s->n_layer, sizeof *kv->sub);
    if (!kv->window || !kv->sub) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
        goto done;
    }
    for (int i = 0; i < s->n_layer; i++) {
        kv->window[i] = s->window[i];
        kv->sub[i] = kv->n_sub[s->window[i] ? BE_POOL_WINDOW : BE_POOL_FULL]++;
    }
    kv->base.spec.window = kv->window;
    for (int p = 0; p < BE_N_POOLS; p++) {
        const size_t entries = (size_t)s->n_slot * (size_t)kv->n_entry;
        kv->base.page_bytes[p] = cuda_kv_page_bytes(base, s, p);
        const size_t bytes = (size_t)kv->base.page_bytes[p] * (size_t)s->n_page[p];
        if (bytes) /* else a pool without layers */
            ORCD_TRY_GOTO(st, done, cuda_alloc(d, &kv->pages[p], bytes, "the KV cache", err));
        ORCD_TRY_GOTO(st, done, cuda_alloc(d, &kv->table[p], entries * sizeof(int32_t), "a page table", err));
        kv->change[p] = (int32_t *)calloc(entries, sizeof(int32_t));
        if (!kv->change[p]) {
            st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a page table");
            goto done;
        }
        ORCD_TRY_GOTO(st, done, cuda_fill(d, kv->table[p], 0xff, entries * sizeof(int32_t), "a page table", err));
        /* keys never written are masked, but NaN times zero would still be NaN */
        ORCD_TRY_GOTO(st, done, cuda_fill(d, kv->pages[p], 0, bytes, "the KV cache", err));
    }
    ORCD_TRY_GOTO(st, done, cuda_reserve(d, s->max_tok, s->max_out, err));
    *out = &kv->base;
    kv = NULL;
done:
    cuda_kv_close(base, (be_kv *)kv);
    return st;
}

void cuda_kv_close(be_device *base, be_kv *cache) {
    cuda_kv *kv = (cuda_kv *)cache;
    if (!kv)
        return;
    cuda_dev *d = (cuda_dev *)base;
    cuda_quiet(d);
    cuda_graphs_drop(d, kv);
    for (int p = 0; p < BE_N_POOLS; p++) {
        cuda_free(d, kv->pages[p]);
        cuda_free(d, kv->table[p]);
        free(kv->change[p]);
    }
    free(kv->window);
    free(kv->sub);
    free(kv->map);
    delete kv;
}

void cuda_kv_map(be_kv *cache, int pool, int slot, int index, int32_t page) {
    cuda_kv *kv = (cuda_kv *)cache;
    const int32_t entry = slot * kv->n_entry + index, at = kv->change[pool][entry];
    if (at < kv->n_map && kv->map[at].pool == pool && kv->map[at].index == entry) {
        kv->map[at].page = page; /* changes are applied in no order, so an entry has one */
        return;
    }
    if (kv->n_map == kv->cap_map) {
        int cap = kv->cap_map ? 2 * kv->cap_map : 256;
        void *grown = realloc(kv->map, (size_t)cap * sizeof *kv->map);
        if (!grown) {
            kv->failed = ORCD_ERR_NOMEM; /* told by the next step */
            return;
        }
        kv->map = (cuda_kv::cuda_map *)grown;
        kv->cap_map = cap;
    }
    kv->change[pool][entry] = kv->n_map;
    kv->map[kv->n_map++] = {pool, entry, page};
}

static uint8_t *page_at(const cuda_kv *kv, int pool, int32_t page) {
    return kv->pages[pool] + (uint64_t)page * kv->base.page_bytes[pool];
}

void cuda_kv_copy_page(be_kv *cache, int pool, int32_t dst, int32_t src) {
    cuda_kv *kv = (cuda_kv *)cache;
    cudaSetDevice(kv->dev->ordinal);
    if (cudaMemcpyAsync(page_at(kv, pool, dst), page_at(kv, pool, src), (size_t)kv->base.page_bytes[pool],
                        cudaMemcpyDeviceToDevice, kv->dev->stream) != cudaSuccess)
        kv->failed = ORCD_ERR_DEVICE;
}

orcd_status cuda_kv_read_page(be_kv *cache, int pool, int32_t page, void *dst, orcd_error *err) {
    cuda_kv *kv = (cuda_kv *)cache;
    ORCD_TRY(cuda_use(kv->dev, err));
    CUDA_TRY(kv->dev, "reading a page",
             cudaMemcpyAsync(dst, page_at(kv, pool, page), (size_t)kv->base.page_bytes[pool], cudaMemcpyDeviceToHost,
                             kv->dev->stream));
    CUDA_TRY(kv->dev, "reading a page", cudaStreamSynchronize(kv->dev->stream));
    return ORCD_OK;
}

orcd_status cuda_kv_write_page(be_kv *cache, int pool, int32_t page, const void *src, orcd_error *err) {
    cuda_kv *kv = (cuda_kv *)cache;
    ORCD_TRY(cuda_use(kv->dev, err));
    CUDA_TRY(kv->dev, "writing a page",
             cudaMemcpyAsync(page_at(kv, pool, page), src, (size_t)kv->base.page_bytes[pool], cudaMemcpyHostToDevice,
                             kv->dev->stream));
    CUDA_TRY(kv->dev, "writing a page", cudaStreamSynchronize(kv->dev->stream));
    return ORCD_OK;
}

/* ---- what a step needs beside activations, sized by the cache it runs on ---- */

static orcd_status reserve_batch(cuda_dev *d, int max_tok, int max_out, orcd_error *err) {
    if (max_tok <= d->max_tok && max_out <= d->max_out)
        return ORCD_OK;
    cuda_graphs_drop(d, NULL); /* they read the old addresses */
    cuda_free(d, d->arr.batch);
    if (d->arr.likely)
        cudaFreeHost(d->arr.likely);
    d->arr = cuda_arrays{};
    max_tok = max_tok > d->max_tok ? max_tok : d->max_tok;
    max_out = max_out > d->max_out ? max_out : d->max_out;
    d->max_tok = d->max_out = 0;
    const size_t tok = (size_t)round_up(max_tok, 64), outs = (size_t)round_up(max_out, 64);
    uint8_t *p;
    ORCD_TRY(cuda_alloc(d, &p, 256 + tok * (4 * 4 + sizeof(cuda_tile)) + outs * (3 * 4 + sizeof(be_sample)),
                        "the batch arrays", err));
    d->arr.batch = (cuda_batch *)p;
    p += 256;
    d->arr.sample = (be_sample *)p;
    p += outs * sizeof(be_sample);
    d->arr.tile = (cuda_tile *)p;
    p += tok * sizeof(cuda_tile);
    int32_t **field[] = {&d->arr.token, &d->arr.pos, &d->arr.slot, &d->arr.one};
    for (size_t i = 0; i < 4; i++, p += tok * 4)
        *field[i] = (int32_t *)p;
    d->arr.out_row = (int32_t *)p;
    d->arr.id = (int32_t *)(p + outs * 4);
    d->arr.unseen = (int32_t *)(p + 2 * outs * 4);
    ORCD_TRY(cuda_fill(d, d->arr.batch, 0, 256, "the batch arrays", err));
    ORCD_TRY(cuda_fill(d, d->arr.id, 0, outs * 4, "the batch arrays", err));
    if (!d->dry)
        CUDA_TRY(d, "pinning the sampled ids",
                 cudaMallocHost((void **)&d->arr.likely, 2 * outs * (sizeof(be_likely) + 4)));
    d->arr.host_id = (int32_t *)(d->arr.likely + 2 * outs);
    d->arr.max_id = (int)outs;
    d->max_tok = max_tok;
    d->max_out = max_out;
    return ORCD_OK;
}

template <class T>
static orcd_status grow(cuda_dev *d, T **p, size_t *have, size_t want, size_t bytes, const char *what,
                        orcd_error *err) {
    if (want <= *have && *p)
        return ORCD_OK;
    cuda_graphs_drop(d, NULL);
    cuda_free(d, *p);
    *have = 0;
    ORCD_TRY(cuda_alloc(d, p, bytes, what, err));
    ORCD_TRY(cuda_fill(d, *p, 0, bytes, what, err));
    *have = want;
    return ORCD_OK;
}

/* Room for what operations keep between their kernels; nothing to do when it is there already. */
orcd_status cuda_reserve(cuda_dev *d, int max_tok, int max_out, orcd_error *err) {
    cuda_scratch *c = &d->scratch;
    ORCD_TRY(reserve_batch(d, max_tok, max_out, err));
    const size_t pairs = (size_t)d->want_pairs, outs = (size_t)d->max_out;
    const size_t tok = (size_t)recorded_rows(d->max_tok > d->max_out ? d->max_tok : d->max_out);
    const size_t order = (size_t)cuda_wide_pairs(d->want_pairs, d->want_expert);
    const size_t hidden = order * (size_t)round_up(d->want_ff, 64) * 2;
    size_t down = pairs * (size_t)d->want_embd * 4;
    if (cuda_has_wide(d)) {
        const size_t row = (size_t)round_up(d->want_embd, 64) * 2, x = order * row;
        const int64_t most = CUDA_BROAD_MEAN * d->want_expert, few = d->want_pairs < most ? d->want_pairs : most;
        const size_t both =
            (size_t)cuda_broad_at(few, d->want_embd) + (size_t)cuda_wide_pairs(few, d->want_expert) * row;
        const size_t dense = (size_t)round_up((int64_t)tok, 8) * (size_t)round_up(d->want_col, 64) * 2;
        down = down > x ? down : x;
        down = down > dense ? down : dense;
        down = down > both ? down : both;
    }
    const size_t tiles = pairs + (size_t)d->want_expert + 1;
    ORCD_TRY(grow(d, &c->hidden, &c->hidden_bytes, hidden, hidden + 256, "experts' hidden rows", err));
    ORCD_TRY(grow(d, &c->down, &c->down_bytes, down, down + 256, "experts' outputs", err));
    ORCD_TRY(grow(d, &c->perm, &c->pairs, order, order * 4 + 256, "expert order", err));
    ORCD_TRY(grow(d, &c->tile, &c->tiles, tiles, tiles * 16, "expert tiles", err));
    ORCD_TRY(grow(d, &c->rope, &c->tok, tok, (tok + 64) * 64 * sizeof(float2), "rotations", err));
    ORCD_TRY(grow(d, &c->best, &c->outs, outs, (outs + 1) * CUDA_SAMPLE_PARTS * 8, "sampling", err));
    ORCD_TRY(grow(d, &c->count, &c->n_count, 1, 4096 * 4, "expert counts", err));
    ORCD_TRY(grow(d, &c->partial, &c->n_partial, CUDA_MAX_PARTIAL, (size_t)CUDA_MAX_PARTIAL * 16 * (128 + 2) * 4,
                  "attention splits", err));
    const size_t route_rows = d->route_all_rows || tok < CUDA_ROUTE_ROWS ? tok : CUDA_ROUTE_ROWS;
    const size_t route = route_rows * (size_t)d->want_route * 4;
    ORCD_TRY(grow(d, &c->route_part, &c->n_route, route, route + 256, "routers' sums", err));
    ORCD_TRY(grow(d, &c->route_arrived, &c->n_route_rows, route_rows, route_rows * 4 + 256, "routers' counters", err));
    ORCD_TRY(grow(d, &c->arrived, &c->n_arrived, CUDA_MAX_PARTIAL, CUDA_MAX_PARTIAL * 4, "attention counters", err));
    ORCD_TRY(cuda_host_reserve(d, err));
    return cuda_decode_reserve(d, err);
}
