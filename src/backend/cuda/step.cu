/* backend/cuda/step.cu: recording a step, and running it: by replaying a graph, or launch by launch. */
#include "backend/cuda/cuda.h"
#include "quant/fragment.cuh"

#include <string.h>

#define GRAPH_MAX_ROWS 256 /* larger steps are launched: there the kernels are long */
#define GRAPH_MAX 96       /* recorded graphs kept */

/* ---- recording ---- */

orcd_status cuda_step_begin(be_device *base, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    *out = NULL;
    if (d->sticky != cudaSuccess)
        return orcd_fail(err, ORCD_ERR_DEVICE, "cuda:%d failed earlier (%s) and cannot be used by this process again",
                         d->ordinal, cudaGetErrorString(d->sticky));
    if (d->in_step || b->n_tok < 1 || b->n_out < 0 ||
        (kv && (b->n_tok > kv->spec.max_tok || b->n_out > kv->spec.max_out)))
        return orcd_fail(err, ORCD_ERR_ARG, "a step of %d tokens and %d outputs inside another or past its limits",
                         b->n_tok, b->n_out);
    ORCD_TRY(cuda_use(d, err));
    ORCD_TRY(cuda_reserve(d, b->n_tok, b->n_out, err));
    cuda_step *s = &d->step;
    s->base.dev = base;
    s->base.kv = kv;
    s->base.batch = *b;
    s->n_cmd = 0;
    s->samples = s->masked = s->taps = false;
    s->group = 0;
    s->error.code = ORCD_OK;
    d->in_step = true;
    *out = &s->base;
    return ORCD_OK;
}

static cuda_cmd *record(be_step *base, cuda_op op) {
    cuda_step *s = (cuda_step *)base;
    static thread_local cuda_cmd lost; /* recording never fails by itself: step_end tells */
    if (s->n_cmd == s->cap_cmd) {
        int cap = s->cap_cmd ? 2 * s->cap_cmd : 512;
        void *grown = realloc(s->cmd, (size_t)cap * sizeof *s->cmd);
        if (!grown) {
            orcd_fail(&s->error, ORCD_ERR_NOMEM, "out of memory while recording a step");
            return &lost;
        }
        s->cmd = (cuda_cmd *)grown;
        s->cap_cmd = cap;
    }
    cuda_cmd *c = &s->cmd[s->n_cmd++];
    memset(c, 0, sizeof *c);
    c->op = op;
    return c;
}

/* y becomes what the command makes of x, row for row. */
static void rows_like(cuda_cmd *c, be_step *s, const be_act *x, be_act *y) {
    const cuda_act *a = (const cuda_act *)x;
    c->x = (cuda_act *)x;
    c->y = (cuda_act *)y;
    c->rows = a->outs && x->n_row == s->batch.n_out ? CUDA_ROWS_OUT
              : x->n_row == s->batch.n_tok          ? CUDA_ROWS_TOK
                                                    : CUDA_ROWS_LITERAL;
    c->n_row = c->rows == CUDA_ROWS_LITERAL ? (int)x->n_row : 0;
    if (y) {
        y->n_row = x->n_row;
        ((cuda_act *)y)->outs = a->outs;
    }
}

static void holds(be_act *y, bool f32, bool f16) {
    ((cuda_act *)y)->has_f32 = f32;
    ((cuda_act *)y)->has_f16 = f16;
}

void cuda_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y) {
    cuda_cmd *c = record(s, CUDA_OP_EMBED);
    c->w = (const cuda_weight *)table;
    c->w2 = (const cuda_weight *)pos_table;
    c->y = (cuda_act *)y;
    y->n_row = s->batch.n_tok;
    c->y->outs = false;
    holds(y, true, false);
}

void cuda_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y) {
    cuda_cmd *c = record(s, CUDA_OP_NORM);
    rows_like(c, s, x, y);
    c->norm_kind = n->kind;
    c->eps = n->eps;
    c->w = (const cuda_weight *)n->weight;
    c->w2 = (const cuda_weight *)n->bias;
    holds(y, true, true);
}

/* Products read f16 rows: make them where only floats are there. */
static void want_f16(be_step *s, const be_act *x) {
    cuda_act *a = (cuda_act *)x;
    if (a->has_f16)
        return;
    if (!a->f16) {
        orcd_fail(&((cuda_step *)s)->error, ORCD_ERR_UNSUPPORTED, "a product of rows of %lld values",
                  (long long)x->width);
        return;
    }
    rows_like(record(s, CUDA_OP_TO_F16), s, x, NULL);
    a->has_f16 = true;
}

void cuda_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e) {
    want_f16(s, x);
    cuda_cmd *c = record(s, CUDA_OP_LINEAR);
    rows_like(c, s, x, y);
    c->w = (const cuda_weight *)w;
    c->epilogue = e;
    holds(y, true, cuda_linear_f16(c->w, y));
}

static int find_freq(cuda_step *s, const be_attn *a) {
    cuda_dev *d = (cuda_dev *)s->base.dev;
    const int n = a->head_dim / 2;
    for (int i = 0; i < d->n_freq; i++)
        if (d->freq[i].n == n && memcmp(d->freq[i].f, a->inv_freq, (size_t)n * sizeof(float)) == 0)
            return i;
    if (d->n_freq == CUDA_N_FREQ || n > 64) {
        orcd_fail(&s->error, ORCD_ERR_LIMIT, "more than %d sets of rotary frequencies, or heads over 128", CUDA_N_FREQ);
        return -1;
    }
    orcd_error *err = &s->error;
    auto *f = &d->freq[d->n_freq];
    memcpy(f->f, a->inv_freq, (size_t)n * sizeof(float));
    f->n = n;
    if (!f->dev && cuda_alloc(d, &f->dev, sizeof f->f, "rotary frequencies", err) != ORCD_OK)
        return -1;
    if (cuda_upload(d, f->dev, f->f, sizeof f->f, "uploading rotary frequencies", err) != ORCD_OK)
        return -1;
    return d->n_freq++;
}

static cuda_cmd *record_attn(be_step *s, cuda_op op, const be_attn *a, be_act *x) {
    int freq = a->rotary ? find_freq((cuda_step *)s, a) : -1;
    cuda_cmd *c = record(s, op);
    c->freq = freq;
    int &group = ((cuda_step *)s)->group;
    group = a->n_head / a->n_kv_head > group ? a->n_head / a->n_kv_head : group;
    c->attn.layer = a->layer; /* field by field: padding stays zero */
    c->attn.n_head = a->n_head;
    c->attn.n_kv_head = a->n_kv_head;
    c->attn.head_dim = a->head_dim;
    c->attn.window = a->window;
    c->attn.scale = a->scale;
    c->attn.sinks = a->sinks;
    c->attn.rotary = a->rotary;
    c->attn.rope_scale = a->rope_scale;
    c->x = (cuda_act *)x;
    return c;
}

void cuda_rope(be_step *s, const be_attn *a, be_act *qkv) {
    record_attn(s, CUDA_OP_ROPE, a, qkv);
    holds(qkv, true, false);
}
void cuda_kv_write(be_step *s, const be_attn *a, const be_act *qkv) {
    record_attn(s, CUDA_OP_KV_WRITE, a, (be_act *)qkv);
}
void cuda_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y) {
    cuda_cmd *c = record_attn(s, CUDA_OP_ATTENTION, a, (be_act *)qkv);
    c->y = (cuda_act *)y;
    y->n_row = s->batch.n_tok;
    c->y->outs = false;
    holds(y, false, true);
}

void cuda_route(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route) {
    cuda_cmd *c = record(s, CUDA_OP_ROUTE);
    rows_like(c, s, x, route);
    c->w = (const cuda_weight *)w;
    c->k = top_k;
}

void cuda_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                  const be_act *route, be_act *y) {
    want_f16(s, x);
    cuda_cmd *c = record(s, CUDA_OP_EXPERTS);
    rows_like(c, s, x, NULL);
    c->y = (cuda_act *)y;
    c->z = (cuda_act *)route;
    c->w = (const cuda_weight *)gate_up;
    c->w2 = (const cuda_weight *)down;
    c->glu = *g;
    c->k = (int)route->width;
    holds(y, true, false);
}

void cuda_moe(be_step *s, const be_norm *n, const be_weight *router, int top_k, const be_weight *gate_up,
              const be_weight *down, const be_glu *g, be_act *tmp, be_act *route, be_act *x) {
    if (n->kind != BE_NORM_RMS) { /* the fused order of sums is RMSNorm's */
        cuda_norm(s, n, x, tmp);
        cuda_route(s, router, tmp, top_k, route);
        cuda_experts(s, gate_up, down, g, tmp, route, x);
        return;
    }
    cuda_weight *w = (cuda_weight *)router;
    if (!w->gained || w->base.n_row > CUDA_MAX_EXPERT) {
        orcd_fail(&((cuda_step *)s)->error, ORCD_ERR_UNSUPPORTED, "a router of %lld experts", (long long)router->n_row);
        return;
    }
    if (w->gain_of != (const cuda_weight *)n->weight) {
        cudaError_t e = cuda_apply_gain((cuda_dev *)s->dev, w, (const cuda_weight *)n->weight);
        if (e != cudaSuccess)
            cuda_fail((cuda_dev *)s->dev, e, "preparing a router", &((cuda_step *)s)->error);
    }
    cuda_cmd *c = record(s, CUDA_OP_MOE);
    rows_like(c, s, x, tmp);
    route->n_row = x->n_row;
    c->z = (cuda_act *)route;
    c->w = (const cuda_weight *)n->weight;
    c->w2 = w;
    c->k = top_k;
    c->eps = n->eps;
    holds(tmp, false, true);
    c = record(s, CUDA_OP_EXPERTS);
    rows_like(c, s, x, NULL);
    c->x = (cuda_act *)tmp;
    c->y = (cuda_act *)x;
    c->z = (cuda_act *)route;
    c->w = (const cuda_weight *)gate_up;
    c->w2 = (const cuda_weight *)down;
    c->glu = *g;
    c->k = top_k;
    holds(x, true, false);
}

void cuda_gather_out(be_step *s, const be_act *x, be_act *y) {
    cuda_cmd *c = record(s, CUDA_OP_GATHER);
    c->x = (cuda_act *)x;
    c->y = (cuda_act *)y;
    y->n_row = s->batch.n_out;
    c->y->outs = true;
    holds(y, true, false);
}

void cuda_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx) {
    cuda_cmd *c = record(s, CUDA_OP_TAP);
    c->x = (cuda_act *)a;
    c->n_row = (int)a->n_row;
    c->name = name;
    c->layer = layer;
    c->fn = fn;
    c->ctx = ctx;
    c->k = ((const cuda_act *)a)->has_f32;
    ((cuda_step *)s)->taps = true;
}

void cuda_sample(be_step *base, const be_act *logits, const be_sample *row) {
    cuda_step *s = (cuda_step *)base;
    for (int i = 0; i < base->batch.n_out; i++)
        s->masked |= row[i].masked;
    cuda_cmd *c = s->masked ? &s->draw : record(base, CUDA_OP_SAMPLE);
    c->x = (cuda_act *)logits;
    s->samples = true;
    s->sample = row;
    if (s->masked && cuda_mask_words(logits->width) > CUDA_MASK_WORDS)
        orcd_fail(&s->error, ORCD_ERR_LIMIT, "a mask over a vocabulary of %lld; cuda takes at most %d",
                  (long long)logits->width, 32 * CUDA_MASK_WORDS);
}

/* ---- the upload: one block of words in pinned host memory, fetched and spread by the step's first kernel: a copy
 * engine between two steps costs more than the kernel's reads over the bus ---- */

/* Where word w of the upload belongs; the last word of a page-table change makes it. */
static __device__ void begin_put(const cuda_batch &b, const cuda_arrays &a, const int32_t *up, int w, int32_t v,
                                 int32_t *table0, int32_t *table1) {
    const int sample = w - b.off_sample, map = w - b.off_map;
    if (b.off_sample && sample >= 0 && sample < b.n_out * (int)(sizeof(be_sample) / 4)) {
        ((int32_t *)a.sample)[sample] = v;
        return;
    }
    if (map >= 0 && map < 3 * b.n_map) {
        if (map % 3 == 2)
            (up[w - 2] ? table1 : table0)[up[w - 1]] = v;
        return;
    }
    const int off[] = {b.off_token, b.off_pos, b.off_slot, b.off_out, b.off_one, b.off_tile};
    const int len[] = {b.n_tok, b.n_tok, b.n_tok, b.n_out, b.n_one, 4 * b.n_tile};
    int32_t *const to[] = {a.token, a.pos, a.slot, a.out_row, a.one, (int32_t *)a.tile};
#pragma unroll
    for (int i = 0; i < 6; i++)
        if (w >= off[i] && w < off[i] + len[i])
            to[i][w - off[i]] = v;
}

/* The header and every word are asked for before the first is used: one journey over the bus. */
static __global__ void begin_kernel(const int32_t *__restrict__ up /* in host memory */, int n_word, cuda_arrays a,
                                    int32_t *table0, int32_t *table1) {
    constexpr int AHEAD = 4;
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), n = (int)(gridDim.x * blockDim.x);
    pdl_launch();
    const cuda_batch b = *(const cuda_batch *)up;
    for (int w0 = (int)sizeof b / 4 + i; w0 < n_word; w0 += AHEAD * n) {
        int32_t v[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            v[j] = up[min(w0 + j * n, n_word - 1)];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (w0 + j * n < n_word)
                begin_put(b, a, up, w0 + j * n, v[j], table0, table1);
    }
    if (i == 0)
        *a.batch = b;
}

void cuda_run_begin(cuda_run *r) {
    bool pdl = r->pdl;
    r->pdl = false; /* the step before still reads what this one writes */
    cuda_launch(r, begin_kernel, dim3(r->shape.rows > 32 ? 16 : 2), dim3(256), 0, r->upload, r->n_upload, r->dev->arr,
                r->kv ? r->kv->table[0] : (int32_t *)NULL, r->kv ? r->kv->table[1] : (int32_t *)NULL);
    r->pdl = pdl;
}

/* Those with most keys first. */
static int later_tile(const void *a, const void *b) {
    const cuda_tile *x = (const cuda_tile *)a, *y = (const cuda_tile *)b;
    return x->pos != y->pos ? (x->pos < y->pos) - (x->pos > y->pos) : x->row - y->row;
}

/* Sequences with one row, and tiles of the others. */
static void split_rows(const be_batch *b, bool no_ones, int32_t *one, int *n_one, cuda_tile *tile, int *n_tile) {
    *n_one = *n_tile = 0;
    for (int i = 0, n; i < b->n_tok; i += n) {
        for (n = 1; i + n < b->n_tok && b->slot[i + n] == b->slot[i]; n++)
            ;
        if (n == 1 && !no_ones) {
            one[(*n_one)++] = i;
            continue;
        }
        for (int k = 0; k < n; k += CUDA_TILE_ROWS)
            tile[(*n_tile)++] = {i + k, n - k < CUDA_TILE_ROWS ? n - k : CUDA_TILE_ROWS, b->pos[i] + k, b->slot[i]};
    }
    qsort(tile, (size_t)*n_tile, sizeof *tile, later_tile);
}

static int bucket(int n) {
    static const int list[] = {0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256};
    for (size_t i = 0; i < ORCD_COUNT(list); i++)
        if (n <= list[i])
            return list[i];
    return n;
}

/* Words for a step of so many rows, outputs and other things. */
static size_t upload_words(int tok, int outs, size_t other) {
    return sizeof(cuda_batch) / 4 + (size_t)tok * 9 + (size_t)outs * (2 + sizeof(be_sample) / 4) + other + 64;
}

/* Pinning memory waits until the device has nothing to do: at first enough for almost any step. */
static orcd_status staging(cuda_dev *d, size_t words, int32_t **out, orcd_error *err) {
    cuda_staging *st = &d->staging[d->next_staging];
    CUDA_TRY(d, "waiting for an upload", cudaEventSynchronize(st->done));
    if (words > st->cap) {
        cudaFreeHost(st->host);
        st->host = NULL;
        st->cap = 0;
        const size_t usual = upload_words(d->max_tok, d->max_out, 1 << 16), cap = words > usual ? 2 * words : usual;
        CUDA_TRY(d, "pinning the batch", cudaMallocHost((void **)&st->host, cap * sizeof(int32_t)));
        st->cap = cap;
    }
    memset(st->host, 0, sizeof(cuda_batch));
    *out = st->host;
    return ORCD_OK;
}

/* Super-chunks of keys before the furthest row, rounded up to a power of two. */
static int reach_of(const be_batch *b) {
    int reach = 1;
    for (int i = 0; i < b->n_tok; i++)
        while (reach * 512 <= b->pos[i])
            reach *= 2;
    return reach;
}

/* Words of the lists that samples point to. */
static size_t list_words(const cuda_step *s) {
    size_t n = 0;
    for (int i = 0; s->samples && i < s->base.batch.n_out; i++)
        n += (size_t)s->sample[i].n_edit * (sizeof(be_edit) / 4) +
             (s->sample[i].masked ? (size_t)cuda_mask_words(s->draw.x->base.width) : 0);
    return n;
}

/* They follow the upload and are used where they are, in host memory; what the masks are comes later. */
static void put_lists(cuda_step *s, be_sample *sample, int32_t *at) {
    const int n = s->samples ? s->base.batch.n_out : 0;
    for (int i = 0; i < n; i++) {
        const size_t words = (size_t)sample[i].n_edit * (sizeof(be_edit) / 4);
        if (words)
            memcpy(at, sample[i].edit, words * 4);
        sample[i].edit = (const be_edit *)at;
        at += words;
    }
    s->mask = (uint32_t *)at;
    for (int i = 0; i < n; i++) {
        sample[i].mask = sample[i].masked ? (const uint32_t *)at : NULL;
        at += sample[i].masked ? cuda_mask_words(s->draw.x->base.width) : 0;
    }
}

/* n_word: how long the upload is. */
static orcd_status fill_upload(cuda_dev *d, cuda_step *s, cuda_shape *shape, int *n_word, orcd_error *err) {
    const be_batch *b = &s->base.batch;
    cuda_kv *kv = (cuda_kv *)s->base.kv;
    const int n_map = kv ? kv->n_map : 0, tok = b->n_tok;
    const size_t words = upload_words(tok, b->n_out, (size_t)n_map * 3 + list_words(s));
    int32_t *host = NULL;
    ORCD_TRY(staging(d, words, &host, err));
    cuda_batch *h = (cuda_batch *)host;
    int32_t at = sizeof(cuda_batch) / 4;
    h->n_tok = tok;
    h->n_out = b->n_out;
    h->n_map = n_map;
    const int32_t *list[] = {b->token, b->pos, b->slot};
    int32_t *off[] = {&h->off_token, &h->off_pos, &h->off_slot};
    for (int i = 0; i < 3; i++, at += tok) {
        *off[i] = at;
        memcpy(host + at, list[i], (size_t)tok * 4);
    }
    h->off_out = at;
    if (b->n_out)
        memcpy(host + at, b->out_row, (size_t)b->n_out * 4);
    at += b->n_out;
    at += at & 1; /* samples hold 64-bit numbers */
    be_sample *sample = (be_sample *)(host + at);
    if (s->samples) {
        h->off_sample = at;
        memcpy(sample, s->sample, (size_t)b->n_out * sizeof *sample);
        at += b->n_out * (int32_t)(sizeof *sample / 4);
    }
    h->off_one = at;
    h->off_tile = at + tok;
    int reach = reach_of(b);
    const int ones = bucket(kv && kv->base.spec.n_slot < tok ? kv->base.spec.n_slot : tok); /* at most */
    const bool no_ones = s->group > 16 || (kv && (int64_t)ones * kv->base.spec.n_kv_head * reach > CUDA_MAX_PARTIAL &&
                                           !cuda_attn_many(kv, ones, s->group));
    split_rows(b, no_ones, host + h->off_one, &h->n_one, (cuda_tile *)(host + h->off_tile), &h->n_tile);
    at += tok + 4 * h->n_tile;
    h->off_map = at;
    if (n_map) {
        memcpy(host + at, kv->map, (size_t)n_map * sizeof *kv->map);
        kv->n_map = 0;
    }
    at += 3 * n_map;
    *n_word = at;
    put_lists(s, sample, host + (at + 3) / 4 * 4);
    *shape = {tok > GRAPH_MAX_ROWS ? tok : bucket(tok), tok > GRAPH_MAX_ROWS ? b->n_out : bucket(b->n_out),
              h->n_one ? reach : 1, bucket(h->n_one), bucket(h->n_tile)};
    h->id_part = (d->id_first + d->n_id_open) % 2;
    return ORCD_OK;
}

/* ---- running ---- */

static orcd_status run_tap(cuda_dev *d, const cuda_cmd *c, orcd_error *err) {
    cuda_act *a = c->x;
    const bool has = a->has_f32;
    float *v = (float *)malloc((size_t)c->n_row * (size_t)a->base.width * (a->base.form == BE_ACT_ROUTE ? 8 : 4) + 4);
    if (!v)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a tap");
    a->has_f32 = c->k;
    orcd_status st = cuda_act_read(&d->base, &a->base, 0, c->n_row, v, err);
    a->has_f32 = has;
    if (st == ORCD_OK)
        c->fn(c->ctx, c->name, c->layer, c->n_row, a->base.width, v);
    free(v);
    return st;
}

static void (*const launcher[])(cuda_run *, const cuda_cmd *) = {
    cuda_run_embed, cuda_run_norm,    cuda_run_linear, cuda_run_rope,   cuda_run_kv_write, cuda_run_attention,
    cuda_run_route, cuda_run_experts, cuda_run_moe,    cuda_run_gather, cuda_run_sample,   cuda_run_to_f16,
};

static orcd_status run_commands(cuda_dev *d, cuda_step *s, cuda_run *r, orcd_error *err) {
    cuda_run_begin(r);
    const bool fused = !s->taps && cuda_decode_run(r, s->cmd, s->n_cmd);
    d->n_fused += fused;
    for (int i = 0; i < s->n_cmd && !fused; i++) {
        const cuda_cmd *c = &s->cmd[i], *next = i + 1 < s->n_cmd ? c + 1 : NULL;
        if (c->op != CUDA_OP_LINEAR)
            r->packed = NULL;
        if (c->op == CUDA_OP_TAP) {
            ORCD_TRY(run_tap(d, c, err));
        } else if (c->op == CUDA_OP_EXPERTS && next && cuda_can_combine_norm(c, next)) {
            cuda_run_experts_norm(r, c, next);
            i++;
        } else if (c->op == CUDA_OP_LINEAR && next && cuda_can_linear_rope(r, c, next)) {
            cuda_run_linear_rope(r, c, next);
            i++;
        } else if (c->op == CUDA_OP_ROPE && next && cuda_can_rope_write(r, c, next)) {
            cuda_run_rope_write(r, c, next);
            i++;
        } else {
            launcher[c->op](r, c);
        }
    }
    CUDA_TRY(d, "launching a step", r->error);
    return ORCD_OK;
}

static cuda_graph *find_graph(cuda_dev *d, const cuda_step *s, const cuda_shape *shape) {
    for (cuda_graph **at = &d->graphs; *at; at = &(*at)->next) {
        cuda_graph *g = *at;
        if (g->kv != (cuda_kv *)s->base.kv || memcmp(&g->shape, shape, sizeof *shape) != 0 || g->n_cmd != s->n_cmd ||
            memcmp(g->cmd, s->cmd, (size_t)s->n_cmd * sizeof *s->cmd) != 0)
            continue;
        *at = g->next; /* most recent first */
        g->next = d->graphs;
        return d->graphs = g;
    }
    return NULL;
}

static void free_graph(cuda_graph *g) {
    if (g->exec)
        cudaGraphExecDestroy(g->exec);
    if (g->graph)
        cudaGraphDestroy(g->graph);
    free(g->cmd);
    free(g);
}

void cuda_graphs_drop(cuda_dev *d, const cuda_kv *kv) {
    for (cuda_graph **at = &d->graphs; *at;) {
        cuda_graph *g = *at;
        if (kv && g->kv != kv) {
            at = &g->next;
            continue;
        }
        *at = g->next;
        free_graph(g);
        d->n_graph--;
    }
}

static orcd_status record_graph(cuda_dev *d, cuda_step *s, cuda_run *r, cuda_graph **out, orcd_error *err) {
    orcd_status st = ORCD_ERR_NOMEM;
    cudaError_t e;
    size_t n_root = 1;
    *out = NULL;
    while (d->n_graph >= GRAPH_MAX) {
        cuda_graph **last = &d->graphs;
        while ((*last)->next)
            last = &(*last)->next;
        free_graph(*last);
        *last = NULL;
        d->n_graph--;
    }
    cuda_graph *g = (cuda_graph *)calloc(1, sizeof *g);
    if (g)
        g->cmd = (cuda_cmd *)malloc((size_t)s->n_cmd * sizeof *g->cmd);
    if (!g || !g->cmd) {
        orcd_fail(err, st, "out of memory while recording a graph");
        goto done;
    }
    g->kv = r->kv;
    g->shape = r->shape;
    g->n_cmd = s->n_cmd;
    memcpy(g->cmd, s->cmd, (size_t)s->n_cmd * sizeof *g->cmd);
    if ((e = cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal)) != cudaSuccess) {
        st = cuda_fail(d, e, "beginning a graph", err);
        goto done;
    }
    st = run_commands(d, s, r, err);
    e = cudaStreamEndCapture(d->stream, &g->graph); /* also after a failure: the stream must leave capture */
    if (st != ORCD_OK)
        goto done;
    if (e == cudaSuccess)
        e = cudaGraphGetRootNodes(g->graph, &g->begin, &n_root);
    if (e == cudaSuccess)
        e = cudaGraphInstantiate(&g->exec, g->graph, 0);
    if (e != cudaSuccess) {
        st = cuda_fail(d, e, "recording a graph", err);
        goto done;
    }
    g->next = d->graphs;
    d->graphs = *out = g;
    d->n_graph++;
    g = NULL;
done:
    if (g)
        free_graph(g);
    return st;
}

/* A graph's first kernel reads this step's upload. */
static cudaError_t point_graph(cuda_graph *g, const cuda_run *r) {
    cudaKernelNodeParams p;
    cudaError_t e = cudaGraphKernelNodeGetParams(g->begin, &p);
    if (e != cudaSuccess)
        return e;
    const int32_t *upload = r->upload;
    int n_word = r->n_upload;
    void *arg[5] = {&upload, &n_word, p.kernelParams[2], p.kernelParams[3], p.kernelParams[4]};
    p.kernelParams = arg;
    return cudaGraphExecKernelNodeSetParams(g->exec, g->begin, &p);
}

/* All of the step is in the stream. */
static orcd_status submitted(cuda_dev *d, cuda_step *s, orcd_error *err) {
    CUDA_TRY(d, "starting a step", cudaEventRecord(s->staging->done, d->stream));
    if (!s->samples) {
        CUDA_TRY(d, "running a step", cudaStreamSynchronize(d->stream));
        return cuda_host_check(d, err);
    }
    auto *ids = &d->ids[(d->id_first + d->n_id_open) % 2];
    ids->n = s->base.batch.n_out;
    CUDA_TRY(d, "starting a step", cudaEventRecord(ids->ready, d->stream));
    d->n_id_open++;
    return ORCD_OK;
}

static orcd_status run(cuda_dev *d, cuda_step *s, orcd_error *err) {
    cuda_shape shape;
    cuda_kv *kv = (cuda_kv *)s->base.kv;
    if (s->error.code != ORCD_OK) {
        if (err)
            *err = s->error;
        return s->error.code;
    }
    if (s->samples && d->n_id_open == 2)
        return orcd_fail(err, ORCD_ERR_ARG, "two steps have sampled ids that were not read yet");
    if (kv && kv->failed != ORCD_OK)
        return orcd_fail(err, kv->failed, "changing the page table or copying a page failed");
    int n_word;
    ORCD_TRY(fill_upload(d, s, &shape, &n_word, err));
    s->staging = &d->staging[d->next_staging];
    d->next_staging = (d->next_staging + 1) % CUDA_N_STAGING;
    cuda_run r = {d, kv, d->stream, shape, d->major >= 9, -1, 0.f, s->staging->host, n_word, cudaSuccess, NULL, NULL};
    if (s->taps || s->base.batch.n_tok > GRAPH_MAX_ROWS) {
        ORCD_TRY(run_commands(d, s, &r, err));
    } else {
        cuda_graph *g = find_graph(d, s, &shape);
        if (!g)
            ORCD_TRY(record_graph(d, s, &r, &g, err));
        CUDA_TRY(d, "starting a step", point_graph(g, &r));
        CUDA_TRY(d, "starting a step", cudaGraphLaunch(g->exec, d->stream));
    }
    s->run = r;
    return s->masked ? ORCD_OK : submitted(d, s, err);
}

orcd_status cuda_step_end(be_step *base, orcd_error *err) {
    cuda_step *s = (cuda_step *)base;
    cuda_dev *d = (cuda_dev *)base->dev;
    orcd_status st = run(d, s, err);
    d->in_step = st == ORCD_OK && s->masked;
    return st;
}

orcd_status cuda_allow(be_device *base, const be_sample *row, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    cuda_step *s = &d->step;
    if (!d->in_step || !s->masked)
        return orcd_fail(err, ORCD_ERR_ARG, "no step waits for what its rows allow");
    const size_t words = (size_t)cuda_mask_words(s->draw.x->base.width);
    uint32_t *at = s->mask;
    for (int i = 0; i < s->base.batch.n_out; i++) {
        if (!row[i].masked)
            continue;
        if (row[i].mask)
            memcpy(at, row[i].mask, words * sizeof *at);
        else
            memset(at, 0xff, words * sizeof *at);
        at += words;
    }
    d->in_step = false;
    s->run.pdl = false; /* what is before it is a graph */
    cuda_run_sample(&s->run, &s->draw);
    CUDA_TRY(d, "drawing", s->run.error);
    return submitted(d, s, err);
}

orcd_status cuda_sampled(be_device *base, int32_t *id, be_likely *likely, orcd_error *err) {
    cuda_dev *d = (cuda_dev *)base;
    if (d->n_id_open == 0)
        return orcd_fail(err, ORCD_ERR_ARG, "no step has sampled ids that were not read yet");
    auto *ids = &d->ids[d->id_first];
    d->id_first ^= 1;
    d->n_id_open--;
    CUDA_TRY(d, "waiting for a step", cudaEventSynchronize(ids->ready));
    ORCD_TRY(cuda_host_check(d, err));
    const ptrdiff_t at = (ids - d->ids) * d->arr.max_id;
    memcpy(id, d->arr.host_id + at, (size_t)ids->n * sizeof *id);
    if (likely)
        memcpy(likely, d->arr.likely + at, (size_t)ids->n * sizeof *likely);
    return ORCD_OK;
}
