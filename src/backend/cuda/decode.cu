/* backend/cuda/decode.cu: a step of one to eight rows of gpt-oss as four fused kernels a layer. The list of
 * commands is matched whole; anything else is left to the launchers of single commands, which compute the same numbers.
 *
 * One or two rows: norm + qkv + rope + KV write, attention, out + router sums, experts.
 * A residual row is finished by whoever reads it next: the experts leave partial rows, which the next norm adds. With
 * more rows than two one CTA does it for all, or those of a cluster for each other. */
#include "backend/cuda/decode_attention.cuh"
#include "backend/cuda/few_experts.cuh"

struct cuda_decode {
    float *xa, *xb;    /* [FEW_MAX][n_embd] residual rows after qkv's norm and after attention's output */
    float *p;          /* [2][2][n_embd] what the experts add */
    float *route_part; /* [FEW_MAX][n_embd / 16][n_expert] */
    uint16_t *q, *h;   /* f16: rotated query heads [FEW_MAX][heads]; the experts' hidden rows [FEW_MAX][4][n_ff] */
    float *fresh;      /* [FEW_MAX] rows' keys and values, where the cache has 8 bits */
    uint32_t *met;     /* CTAs of the experts, see dec_meet */
    struct {
        float *down, *weight; /* [FEW_MAX][4][n_embd], [FEW_MAX][4] */
        uint16_t *norm, *y;   /* f16: [FEW_MAX][n_embd], [FEW_MAX][heads] */
        int32_t *id;          /* [FEW_MAX][4] */
        few_counts *counts;
    } few; /* 3 to FEW_MAX rows */
    int64_t n_embd, n_ff, n_expert, n_q;
};

#define DEC_MAX_Q 8192
#define DEC_MAX_SM 256 /* with more, a share of one row's down could be negative */

/* The commands of one layer. */
enum { L_NORM, L_QKV, L_ROPE, L_WRITE, L_ATTN, L_OUT, L_MOE, L_EXPERTS, L_COUNT };
static const cuda_op layer_ops[L_COUNT] = {CUDA_OP_NORM,      CUDA_OP_LINEAR, CUDA_OP_ROPE, CUDA_OP_KV_WRITE,
                                           CUDA_OP_ATTENTION, CUDA_OP_LINEAR, CUDA_OP_MOE,  CUDA_OP_EXPERTS};

struct decode_plan {
    const cuda_cmd *embed, *layer, *norm, *head, *sample;
    int n_layer;
};

static bool single(const cuda_weight *w, cuda_rowmap map, int seg) {
    const cuda_matrix *m = &w->matrix[0];
    return w->n_matrix == 1 && m->map == map && seg_len(m->n_unit) == seg && m->n_unit % seg == 0 && m->n_col % 64 == 0;
}
static bool dense_form(const cuda_weight *w, cuda_form f) { return w->matrix[0].form == f; }

/* Whether the kernels are made for this layer; head: the first layer, whose forms the others share. */
static bool layer_fits(const cuda_run *r, const cuda_cmd *c, const cuda_cmd *first, const cuda_act *x) {
    for (int i = 0; i < L_COUNT; i++)
        if (c[i].op != layer_ops[i])
            return false;
    const cuda_weight *qkv = c[L_QKV].w, *out = c[L_OUT].w, *up = c[L_EXPERTS].w, *down = c[L_EXPERTS].w2;
    const be_attn *t = &c[L_ATTN].attn;
    const int64_t n_embd = x->base.width, n_expert = c[L_MOE].w2->base.n_row;
    const cuda_form f = first[L_QKV].w->matrix[0].form;
    return c[L_NORM].norm_kind == BE_NORM_RMS && c[L_NORM].x == x && c[L_OUT].y == x && c[L_MOE].x == x &&
           c[L_EXPERTS].y == x && c[L_QKV].epilogue == BE_EPI_NONE && c[L_OUT].epilogue == BE_EPI_ADD &&
           c[L_OUT].x == c[L_ATTN].y && c[L_ROPE].freq == first[L_ROPE].freq && c[L_ROPE].freq >= 0 &&
           t->rope_scale == first[L_ATTN].attn.rope_scale && t->head_dim == 64 && t->n_head == 8 * t->n_kv_head &&
           single(qkv, CUDA_ROWS_PAIR64, 3) && t->n_head * 64 <= DEC_MAX_Q && single(out, CUDA_ROWS_PLAIN, 4) &&
           single(up, CUDA_ROWS_GLU, 3) && up->matrix[0].n_unit == 45 && single(down, CUDA_ROWS_PLAIN, 3) &&
           down->matrix[0].n_unit == 45 && dense_form(qkv, f) && dense_form(out, f) &&
           dense_form(up, CUDA_FORM_MXFP4) && dense_form(down, CUDA_FORM_MXFP4) &&
           qkv->base.n_row == (t->n_head + 2 * t->n_kv_head) * 64 && qkv->base.n_col == n_embd &&
           out->base.n_row == n_embd && out->base.n_col == t->n_head * 64 && up->base.n_col == n_embd &&
           down->base.n_row == n_embd && (n_expert == 32 || n_expert == 128) && c[L_MOE].k == DEC_TOP_K &&
           (r->kv->window[t->layer] > 0) == (t->window > 0);
}

static bool match(const cuda_run *r, const cuda_cmd *c, int n, decode_plan *p) {
    *p = {c, c + 1, NULL, NULL, NULL, 0};
    if (r->shape.rows > FEW_MAX || r->shape.outs > r->shape.rows || r->shape.tiles > 0)
        return false; /* tiles: rows of one sequence, whose keys are not there before the step */
    if (n < 1 + L_COUNT || c[0].op != CUDA_OP_EMBED || c[0].w2 || !r->kv || r->kv->base.spec.type == BE_KV_F32 ||
        r->kv->dim != 64)
        return false;
    const cuda_act *x = c[0].y;
    int at = 1;
    for (; at + L_COUNT <= n && c[at].op == CUDA_OP_NORM && c[at].x == x; at += L_COUNT, p->n_layer++)
        if (!layer_fits(r, c + at, p->layer, x))
            return false;
    const cuda_form f = p->layer[L_QKV].w->matrix[0].form;
    if (p->n_layer == 0 || x->base.width > 4096 || (f != CUDA_FORM_Q8_0 && f != CUDA_FORM_F16))
        return false;
    if (n - at < 3 || n - at > 4 || c[at].op != CUDA_OP_GATHER || c[at].x != x || c[at + 1].op != CUDA_OP_NORM ||
        c[at + 1].norm_kind != BE_NORM_RMS || c[at + 2].op != CUDA_OP_LINEAR ||
        (n - at == 4 && c[at + 3].op != CUDA_OP_SAMPLE))
        return false;
    p->norm = &c[at + 1];
    p->head = &c[at + 2];
    p->sample = n - at == 4 ? &c[at + 3] : NULL;
    const cuda_form hf = p->head->w->matrix[0].form;
    return p->head->epilogue == BE_EPI_NONE && single(p->head->w, CUDA_ROWS_PLAIN, 3) &&
           (hf == CUDA_FORM_Q8_0 || hf == CUDA_FORM_F16);
}

/* ---- launches ---- */

static dec_matrix matrix_of(const cuda_weight *w) {
    const cuda_matrix *m = &w->matrix[0];
    return {m->data, w->bias, m->factor, m->n_tile, m->n_unit, (int64_t)m->n_tile * m->n_unit * m->chunk_bytes};
}

static dec_glu glu_of(const cuda_cmd *e, uint16_t *h) {
    return {matrix_of(e->w), e->glu.alpha, e->glu.limit, (int)e->w2->base.n_col, h};
}

template <class... Param, class... Arg>
static void launch_clusters(cuda_run *r, void (*kernel)(Param...), int grid, int cluster, int threads, size_t shared,
                            Arg... arg) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    cuda_launch_clusters(r, kernel, dim3((unsigned)grid), (unsigned)cluster, dim3((unsigned)threads), shared, arg...);
}
template <class... Param, class... Arg>
static void launch(cuda_run *r, void (*kernel)(Param...), int grid, int threads, size_t shared, Arg... arg) {
    launch_clusters(r, kernel, grid, 1, threads, shared, arg...);
}

struct decode_run { /* what the launches of a step share */
    cuda_run *r;
    cuda_decode *d;
    int n_sm, n_embd;
    const cuda_cmd *first; /* layer */
};

static dec_kv kv_of(const cuda_run *r, const be_attn *t) {
    const cuda_kv *kv = r->kv;
    const int pool = kv->window[t->layer] ? BE_POOL_WINDOW : BE_POOL_FULL;
    return {cuda_kv_layer(kv, pool, t->layer),
            (int64_t)kv->base.page_bytes[pool],
            kv->table[pool],
            r->dev->arr.slot,
            kv->n_entry,
            kv->base.spec.type == BE_KV_Q8 ? r->dev->decode->fresh : NULL};
}

template <int R> static void run_attention(const decode_run *s, const cuda_cmd *c, const uint16_t *q, uint16_t *y) {
    cuda_run *r = s->r;
    const be_attn *t = &c[L_ATTN].attn;
    const float *sinks = t->sinks ? ((const cuda_weight *)t->sinks)->dense : NULL;
    const dec_attn a = {(const __half *)q,
                        kv_of(r, t),
                        r->dev->arr.pos,
                        &r->dev->arr.batch->n_tok,
                        sinks,
                        t->n_kv_head,
                        t->window,
                        t->scale * 1.44269504088896f,
                        r->dev->scratch.partial,
                        r->shape.reach,
                        r->dev->scratch.arrived,
                        y};
    const int chunks = t->window > 0 ? t->window / DEC_CHUNK + 2 : r->shape.reach; /* that a row sees, at most */
    const int cluster = chunks < r->shape.reach ? chunks : r->shape.reach, units = R * t->n_kv_head * cluster;
    if (units <= s->n_sm && cluster <= (r->dev->major >= 9 ? DEC_MAX_CLUSTER : 1)) {
        launch_clusters(r, a.kv.fresh ? dec_attention_short_kernel<kv_int8, R> : dec_attention_short_kernel<__half, R>,
                        units, cluster, 256, dec_attn_short_smem(cluster), a, cluster);
        return;
    }
    int grid = s->n_sm;
    if (R == 1 && units < grid)
        grid = units; /* with more rows it is slower */
    else if (R > 1 && units > 4 * s->n_sm && t->window == 0)
        grid = 2 * s->n_sm; /* this leaves the next kernel no room for its weights: only for many units */
    launch(r, a.kv.fresh ? dec_attention_kernel<kv_int8, R> : dec_attention_kernel<__half, R>, grid, 256, DEC_ATTN_SMEM,
           a);
}

/* ---- one and two rows ---- */

template <class F, int R> static void run_qkv(const decode_run *s, const cuda_cmd *c, const float *x, const float *p) {
    cuda_run *r = s->r;
    const be_attn *t = &c[L_ATTN].attn;
    const dec_matrix w = matrix_of(c[L_QKV].w);
    const dec_norm_in in = {x, p, s->d->xa, NULL, c[L_NORM].w->dense, c[L_NORM].eps, s->n_embd};
    launch(r, dec_qkv_kernel<F, 3, R>, s->n_sm, ROW_THREADS, dec_linear_smem<F, R>(w.n_unit / 3, s->n_embd), in, w,
           dec_rope{r->dev->scratch.rope, r->dev->arr.pos}, kv_of(r, t), &r->dev->arr.batch->n_tok, t->n_head,
           t->n_kv_head, c != s->first, (__half *)s->d->q);
}

template <class F, int R> static void run_out(const decode_run *s, const cuda_cmd *c, const float *x) {
    const dec_matrix w = matrix_of(c[L_OUT].w);
    const cuda_weight *router = c[L_MOE].w2;
    const dec_out o = {c[L_ATTN].y->f16, x, s->d->xb, router->gained, s->d->route_part, (int)router->base.n_row};
    launch(s->r, dec_out_kernel<F, 4, R>, s->n_sm, ROW_THREADS, dec_out_smem<F, R>(w.n_unit / 4), o, w);
}

template <int EPL, int R> static void run_experts(const decode_run *s, const cuda_cmd *c) {
    typedef form_mxfp4 F;
    const cuda_cmd *e = &c[L_EXPERTS];
    const dec_route route = {s->d->xb,  s->d->route_part, c[L_MOE].w2->bias, (s->n_embd + 15) / 16,
                             s->n_embd, c[L_MOE].eps};
    const dec_experts a = {route,    (const float *)c[L_MOE].w->dense, glu_of(e, s->d->h), matrix_of(e->w2), s->d->p,
                           s->d->met};
    launch(s->r, dec_experts_kernel<F, EPL, R>, s->n_sm, DEC_EXPERT_THREADS,
           dec_experts_smem<F, EPL, R>(s->n_embd, a.up.n_ff), a);
}

template <class F, int R> static void run_layers(const decode_run *s, const decode_plan *p) {
    cuda_decode *d = s->d;
    const float *x = p->embed->y->f32;
    for (int l = 0; l < p->n_layer; l++) {
        const cuda_cmd *c = p->layer + l * L_COUNT;
        run_qkv<F, R>(s, c, l ? d->xb : x, l ? d->p : NULL);
        run_attention<R>(s, c, d->q, c[L_ATTN].y->f16);
        run_out<F, R>(s, c, l ? d->xa : x);
        if (c[L_MOE].w2->base.n_row == 32)
            run_experts<1, R>(s, c);
        else
            run_experts<4, R>(s, c);
    }
}

/* The wanted rows alone: with one of two, it is the row that the batch names. */
template <class F, int R, int OUTS> static void run_head(const decode_run *s, const decode_plan *p) {
    cuda_decode *d = s->d;
    const dec_matrix w = matrix_of(p->head->w);
    const dec_norm_in in = {d->xb,        d->p,     NULL, R > 1 ? s->r->dev->arr.out_row : NULL, p->norm->w->dense,
                            p->norm->eps, s->n_embd};
    launch(s->r, dec_head_kernel<F, 3, OUTS>, s->n_sm, ROW_THREADS, dec_linear_smem<F, OUTS>(w.n_unit / 3, s->n_embd),
           in, w, (int)p->head->w->base.n_row, p->head->y->f32);
}

template <class F, int R> static void run_heads(const decode_run *s, const decode_plan *p) {
    if (s->r->shape.outs == 1)
        run_head<F, R, 1>(s, p);
    else if (s->r->shape.outs == 2)
        run_head<F, R, 2>(s, p);
}

template <class F, int R> static void run_dec(const decode_run *s, const decode_plan *p) {
    run_layers<F, R>(s, p);
    if (p->head->w->matrix[0].form == CUDA_FORM_Q8_0)
        run_heads<form_q8_0, R>(s, p);
    else
        run_heads<form_f16<1>, R>(s, p);
}

/* ---- 3 to FEW_MAX rows ---- */

/* Of a kernel whose clusters norm R rows: a CTA a row, unless that leaves too many multiprocessors idle. */
struct few_shape {
    int cluster, grid;
};

template <int R, class... Param>
static few_shape few_shape_of(const decode_run *s, void (*kernel)(Param...), size_t shared) {
    cudaLaunchAttribute a;
    cudaLaunchConfig_t config = {};
    a.id = cudaLaunchAttributeClusterDimension;
    config.blockDim = dim3(ROW_THREADS);
    config.dynamicSmemBytes = shared;
    config.attrs = &a, config.numAttrs = 1;
    if (s->r->error == cudaSuccess)
        s->r->error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    for (int c = s->r->dev->major >= 9 ? R : 1; c > 1; c /= 2) {
        int n = 0;
        a.val.clusterDim = {(unsigned)c, 1, 1};
        config.gridDim = dim3((unsigned)(s->n_sm / c * c));
        if (cudaOccupancyMaxActiveClusters(&n, kernel, &config) == cudaSuccess && n * c >= s->n_sm * 7 / 8)
            return {c, n * c < s->n_sm ? n * c : s->n_sm / c * c};
    }
    return {1, s->n_sm};
}

template <class F, int R>
static void few_qkv(const decode_run *s, few_shape shape, const cuda_cmd *c, const float *x, const float *add) {
    cuda_run *r = s->r;
    const be_attn *t = &c[L_ATTN].attn;
    const dec_matrix w = matrix_of(c[L_QKV].w);
    const few_norm_in in = {&r->dev->arr.batch->n_tok,
                            NULL,
                            x,
                            add,
                            s->d->few.weight,
                            s->d->xa,
                            c[L_NORM].w->dense,
                            c[L_NORM].eps,
                            s->n_embd,
                            s->d->few.counts};
    launch_clusters(r, few_qkv_kernel<F, 3, R>, shape.grid, shape.cluster, ROW_THREADS,
                    few_linear_smem<F, R, few_qkv_plan<F, R>>(w.n_unit / 3, s->n_embd), in, w,
                    dec_rope{r->dev->scratch.rope, r->dev->arr.pos}, kv_of(r, t), t->n_head, t->n_kv_head,
                    c != s->first, (__half *)s->d->q, shape.cluster);
}

template <class F, int EPL, int R> static void few_out_route(const decode_run *s, const cuda_cmd *c, const float *x) {
    const dec_matrix w = matrix_of(c[L_OUT].w);
    const few_out a = {&s->r->dev->arr.batch->n_tok, s->d->few.y, x, s->d->xb, c[L_MOE].w2->gained, s->d->route_part};
    launch(s->r, few_out_kernel<F, 4, EPL, R>, s->n_sm, ROW_THREADS, few_out_smem<F, EPL, R>(w.n_unit / 4), a, w);
}

template <int EPL, int R> static void run_few_experts(const decode_run *s, const cuda_cmd *c) {
    const cuda_cmd *e = &c[L_EXPERTS];
    const dec_route route = {s->d->xb,  s->d->route_part, c[L_MOE].w2->bias, (s->n_embd + 15) / 16,
                             s->n_embd, c[L_MOE].eps};
    const few_experts a = {&s->r->dev->arr.batch->n_tok,
                           route,
                           (const float *)c[L_MOE].w->dense,
                           glu_of(e, s->d->h),
                           matrix_of(e->w2),
                           s->d->few.down,
                           s->d->few.weight,
                           s->d->few.id,
                           s->d->few.norm,
                           s->d->few.counts,
                           s->d->met};
    launch(s->r, few_experts_kernel<EPL, R>, s->n_sm, DEC_EXPERT_THREADS, few_experts_smem<EPL, R>, a);
}

template <class F, int R> static void few_head(const decode_run *s, const decode_plan *p) {
    cuda_run *r = s->r;
    const dec_matrix w = matrix_of(p->head->w);
    const few_norm_in in = {
        &r->dev->arr.batch->n_out, r->dev->arr.out_row, s->d->xb,  s->d->few.down,  s->d->few.weight, NULL,
        p->norm->w->dense,         p->norm->eps,        s->n_embd, s->d->few.counts};
    const size_t shared = few_linear_smem<F, R, few_head_plan<F, R>>(w.n_unit / 3, s->n_embd);
    const few_shape shape = few_shape_of<R>(s, few_head_kernel<F, 3, R>, shared);
    launch_clusters(r, few_head_kernel<F, 3, R>, shape.grid, shape.cluster, ROW_THREADS, shared, in, w,
                    (int)p->head->w->base.n_row, p->head->y->f32, shape.cluster);
}

template <class F, int EPL, int R> static void run_few(const decode_run *s, const decode_plan *p) {
    cuda_decode *d = s->d;
    const float *x = p->embed->y->f32;
    const few_shape shape = few_shape_of<R>(s, few_qkv_kernel<F, 3, R>,
                                            few_linear_smem<F, R, few_qkv_plan<F, R>>(s->n_embd / 192, s->n_embd));
    for (int l = 0; l < p->n_layer; l++) {
        const cuda_cmd *c = p->layer + l * L_COUNT;
        few_qkv<F, R>(s, shape, c, l ? d->xb : x, l ? d->few.down : NULL);
        run_attention<R>(s, c, d->q, d->few.y);
        few_out_route<F, EPL, R>(s, c, l ? d->xa : x);
        run_few_experts<EPL, R>(s, c);
    }
    if (s->r->shape.outs == 0)
        return;
    if (p->head->w->matrix[0].form == CUDA_FORM_Q8_0)
        few_head<form_q8_0, R>(s, p);
    else
        few_head<form_f16<1>, R>(s, p);
}

template <class F, int R> static void run_few_of(const decode_run *s, const decode_plan *p) {
    if (p->layer[L_MOE].w2->base.n_row == 32)
        run_few<F, 1, R>(s, p);
    else
        run_few<F, 4, R>(s, p);
}

template <class F> static void run_rows(const decode_run *s, const decode_plan *p) {
    const int rows = s->r->shape.rows;
    if (rows == 1)
        run_dec<F, 1>(s, p);
    else if (rows == 2)
        run_dec<F, 2>(s, p);
    else if (rows <= 4)
        run_few_of<F, 4>(s, p);
    else
        run_few_of<F, 8>(s, p);
}

bool cuda_decode_run(cuda_run *r, const cuda_cmd *cmd, int n_cmd) {
    decode_plan p;
    int smem = 0;
    if (!r->dev->decode || r->dev->major < 8 || !match(r, cmd, n_cmd, &p) ||
        cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, r->dev->ordinal) != cudaSuccess ||
        smem < (r->shape.rows > 2 ? 220 : 160) * 1024 || r->dev->n_sm > DEC_MAX_SM || r->dev->n_sm < FEW_MAX)
        return false;
    const decode_run s = {r, r->dev->decode, r->dev->n_sm, (int)p.embed->y->base.width, p.layer};
    cuda_run_embed(r, p.embed);
    cuda_run_rope_table(r, &p.layer[L_ROPE]);
    if (p.layer[L_QKV].w->matrix[0].form == CUDA_FORM_Q8_0)
        run_rows<form_q8_0>(&s, &p);
    else
        run_rows<form_f16<1>>(&s, &p);
    if (p.sample && r->shape.outs > 0)
        cuda_run_sample(r, p.sample);
    return true;
}

/* ---- scratch ---- */

static void free_rows(cuda_dev *dev, cuda_decode *d) {
    void *all[] = {d->xa,  d->xb,       d->p,          d->route_part, d->q,     d->h,      d->fresh,
                   d->met, d->few.down, d->few.weight, d->few.norm,   d->few.y, d->few.id, d->few.counts};
    for (void *p : all)
        cuda_free(dev, p);
    *d = {};
}

/* Filled with zeros: products read all FEW_MAX rows, and counters count from there. */
static orcd_status few_alloc(cuda_dev *dev, void *out, size_t bytes, orcd_error *err) {
    ORCD_TRY(cuda_alloc(dev, out, bytes, "the decode step", err));
    return cuda_fill(dev, *(void **)out, 0, bytes, "the decode step", err);
}

static orcd_status reserve_few(cuda_dev *dev, cuda_decode *d, size_t embd, orcd_error *err) {
    const size_t pairs = FEW_MAX * DEC_TOP_K;
    ORCD_TRY(few_alloc(dev, &d->few.down, pairs * embd, err));
    ORCD_TRY(few_alloc(dev, &d->few.weight, pairs * sizeof(float), err));
    ORCD_TRY(few_alloc(dev, &d->few.norm, FEW_MAX * embd / 2, err));
    ORCD_TRY(few_alloc(dev, &d->few.y, FEW_MAX * DEC_MAX_Q * 2, err));
    ORCD_TRY(few_alloc(dev, &d->few.id, pairs * sizeof(int32_t), err));
    return few_alloc(dev, &d->few.counts, sizeof *d->few.counts, err);
}

/* Room for the widest model loaded; nothing to do when it is there already. */
orcd_status cuda_decode_reserve(cuda_dev *dev, orcd_error *err) {
    cuda_decode *d = dev->decode;
    if (dev->want_expert == 0 ||
        (d && d->n_embd >= dev->want_embd && d->n_ff >= dev->want_ff && d->n_expert >= dev->want_expert))
        return ORCD_OK;
    if (!d && !(d = dev->decode = (cuda_decode *)calloc(1, sizeof *d)))
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the decode step");
    cuda_graphs_drop(dev, NULL);
    free_rows(dev, d);
    const size_t embd = (size_t)round_up(dev->want_embd, 64) * sizeof(float), experts = (size_t)dev->want_expert;
    ORCD_TRY(few_alloc(dev, &d->xa, FEW_MAX * embd, err));
    ORCD_TRY(few_alloc(dev, &d->xb, FEW_MAX * embd, err));
    ORCD_TRY(cuda_alloc(dev, &d->p, 4 * embd, "the decode step", err));
    ORCD_TRY(cuda_alloc(dev, &d->fresh, FEW_MAX * 2 * DEC_MAX_Q / 8 * sizeof(float), "the decode step", err));
    ORCD_TRY(few_alloc(dev, &d->route_part, FEW_MAX * (embd / 16) * experts, err));
    ORCD_TRY(few_alloc(dev, &d->q, FEW_MAX * DEC_MAX_Q * 2, err));
    ORCD_TRY(few_alloc(dev, &d->h, FEW_MAX * DEC_TOP_K * (size_t)round_up(dev->want_ff, 64) * 2, err));
    ORCD_TRY(few_alloc(dev, &d->met, 2 * sizeof(uint32_t), err));
    ORCD_TRY(reserve_few(dev, d, embd, err));
    d->n_embd = dev->want_embd, d->n_ff = dev->want_ff, d->n_expert = dev->want_expert;
    return ORCD_OK;
}

void cuda_decode_free(cuda_dev *dev) {
    if (!dev->decode)
        return;
    free_rows(dev, dev->decode);
    free(dev->decode);
    dev->decode = NULL;
}
