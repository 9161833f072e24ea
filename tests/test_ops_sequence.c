/* Operations that know sequences, every backend against the reference: rotation, KV cache, attention, and a model of
 * two layers from tokens to logits: windows, sinks, prefill against decode, any batch, any number of threads, fused
 * operations against their composition, sampling on the device. Run as `test_ops_sequence [BACKEND]`; see ops.h. */
#include "ops.h"

#include "host_draw.h"

/* ---- rope, KV cache, attention ---- */

typedef struct sequence {
    int slot;
    int start; /* the first position that is ever written: earlier ones stay poisoned */
    int past;  /* positions start .. past - 1 are in the cache before */
    int n_new;
} sequence;

typedef struct attn_case {
    const char *what;
    int n_head, n_kv_head, head_dim, window;
    bool sinks, rotary;
    be_kv_type type;
    int n_ctx, n_seq;
    sequence seq[6];
    int split; /* at most this many new rows of a sequence per step; 0 = all */
    const be_load *sink_load;
} attn_case;

static int qkv_width(const attn_case *c) { return (c->n_head + 2 * c->n_kv_head) * c->head_dim; }

/* Rows of q, k and v: a function of slot and position alone. */
static void write_qkv(op_bench *b, const attn_case *c, const op_batch *batch, be_act *qkv) {
    int width = qkv_width(c);
    float *v = malloc((size_t)batch->b.n_tok * (size_t)width * sizeof *v);
    assert_non_null(v);
    for (int i = 0; i < batch->b.n_tok; i++) {
        uint64_t seed = (uint64_t)batch->slot[i] << 32 | (uint32_t)batch->pos[i];
        t_fill_normal(&seed, v + (size_t)i * (size_t)width, (size_t)width);
    }
    op_write(b, qkv, batch->b.n_tok, v);
    free(v);
}

/* Frequencies of a plain rotary embedding with base 150,000. */
static be_attn attn_of(const attn_case *c, const be_weight *sinks) {
    static float inv_freq[64];
    for (int i = 0; i < c->head_dim / 2; i++)
        inv_freq[i] = (float)pow(150000, -2.0 * i / c->head_dim);
    return (be_attn){.layer = 0,
                     .n_head = c->n_head,
                     .n_kv_head = c->n_kv_head,
                     .head_dim = c->head_dim,
                     .window = c->window,
                     .scale = 1 / sqrtf((float)c->head_dim),
                     .sinks = sinks,
                     .rotary = c->rotary,
                     .inv_freq = inv_freq,
                     .rope_scale = 1.3465736f};
}

static void attn_step(op_bench *b, const attn_case *c, const be_attn *a, op_batch *batch, be_act *qkv, be_act *y) {
    write_qkv(b, c, batch, qkv);
    if (y)
        op_write(b, y, y->cap_row, NULL);
    be_step *s = op_begin(b, batch);
    if (c->rotary)
        b->ops->rope(s, a, qkv);
    b->ops->kv_write(s, a, qkv);
    if (y)
        b->ops->attention(s, a, qkv, y);
    op_end(b, s);
}

static void open_attn_kv(op_bench *b, const attn_case *c) {
    int window[1] = {c->window};
    be_kv_type type = c->type == BE_KV_Q8 && b->ops == ref.ops ? BE_KV_F32 : c->type;
    op_kv(b, &(be_kv_spec){.n_layer = 1,
                           .n_kv_head = c->n_kv_head,
                           .head_dim = c->head_dim,
                           .window = window,
                           .type = type,
                           .n_slot = 6,
                           .n_ctx = c->n_ctx,
                           .max_tok = OP_MAX_TOK,
                           .max_out = 1});
}

/* Outputs of all new rows, sequence by sequence; the past is written in steps of 100 rows. */
static const float *run_attention(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const attn_case *c = arg;
    open_attn_kv(b, c);
    be_attn a = attn_of(c, c->sinks ? op_load(b, c->sink_load) : NULL);
    be_act *qkv = op_act(b, BE_ACT_FREE, OP_MAX_TOK, qkv_width(c), NULL);
    be_act *y = op_act(b, BE_ACT_FREE, OP_MAX_TOK, c->n_head * c->head_dim, NULL);
    int at[6] = {0}, total = 0;
    for (int i = 0; i < c->n_seq; i++) {
        const sequence *q = &c->seq[i];
        for (int p = q->start; p < q->past; p += 100) {
            op_batch batch = {0};
            op_rows(&batch, q->slot, p, q->past - p < 100 ? q->past - p : 100);
            attn_step(b, c, &a, &batch, qkv, NULL);
        }
        at[i] = total;
        total += q->n_new;
    }
    *n_row = total;
    *width = y->width;
    float *out = malloc((size_t)(*n_row * *width) * sizeof *out),
          *rows = malloc(OP_MAX_TOK * (size_t)*width * sizeof *rows);
    assert_true(out && rows);
    b->read[b->n_read++] = out;
    b->read[b->n_read++] = rows;
    int step = c->split ? c->split : OP_MAX_TOK;
    for (int done = 0, left = total; left > 0; done += step) {
        op_batch batch = {0};
        for (int i = 0; i < c->n_seq; i++)
            if (done < c->seq[i].n_new) {
                int n = c->seq[i].n_new - done < step ? c->seq[i].n_new - done : step;
                op_rows(&batch, c->seq[i].slot, c->seq[i].past + done, n);
            }
        attn_step(b, c, &a, &batch, qkv, y);
        assert_int_equal(y->n_row, batch.b.n_tok);
        OP_OK(b->ops->act_read(b->dev, y, 0, y->n_row, rows, &err_));
        for (int i = 0, r = 0; i < c->n_seq; i++)
            for (int k = 0; k < step && done + k < c->seq[i].n_new; k++, r++, left--)
                memcpy(out + (at[i] + done + k) * *width, rows + r * *width, (size_t)*width * sizeof *out);
    }
    return out;
}

static const attn_case attention_cases[] = {
    {"attn 64/8 prefill", 64, 8, 64, 0, true, true, 0, 192, 1, {{0, 0, 0, 130}}, 0, NULL},
    {"attn window edges",
     64,
     8,
     64,
     128,
     true,
     true,
     0,
     256,
     5,
     {{3, 0, 126, 1}, {0, 0, 127, 1}, {5, 0, 128, 1}, {2, 0, 129, 1}, {1, 0, 0, 65}},
     0,
     NULL},
    {"attn chunk crosses window", 16, 2, 64, 128, true, true, 0, 320, 2, {{1, 0, 100, 130}, {0, 72, 200, 5}}, 0, NULL},
    {"attn window below chunk", 4, 2, 64, 16, true, true, 0, 320, 2, {{4, 0, 5, 65}, {1, 284, 300, 3}}, 0, NULL},
    {"attn 12/12 plain",
     12,
     12,
     64,
     0,
     false,
     false,
     0,
     192,
     4,
     {{0, 0, 3, 64}, {1, 0, 64, 1}, {2, 0, 63, 1}, {3, 0, 0, 1}},
     0,
     NULL},
    {"attn head_dim 32", 4, 2, 32, 0, true, true, 0, 128, 2, {{0, 0, 70, 17}, {1, 0, 0, 2}}, 0, NULL},
    {"attn head_dim 128", 4, 1, 128, 0, false, true, 0, 128, 2, {{0, 0, 70, 17}, {5, 0, 2, 3}}, 0, NULL},
    {"attn beyond 4096", 8, 2, 64, 0, true, true, 0, 5120, 2, {{0, 0, 5000, 2}, {1, 0, 0, 5}}, 0, NULL},
    {"attn window beyond 4096", 8, 2, 64, 128, true, true, 0, 5120, 1, {{0, 4873, 5000, 70}}, 0, NULL},
    {"attn window at 131072", 2, 1, 32, 128, true, true, 0, 131072, 1, {{0, 130880, 131008, 64}}, 0, NULL},
    {"attn past 512", 16, 2, 64, 0, true, true, 0, 640, 2, {{0, 0, 470, 90}, {1, 0, 0, 9}}, 0, NULL},
    {"attn decode only",
     64,
     8,
     64,
     0,
     true,
     true,
     0,
     320,
     6,
     {{0, 0, 1, 1}, {1, 0, 255, 1}, {2, 0, 256, 1}, {3, 0, 257, 1}, {4, 0, 64, 1}, {5, 0, 300, 1}},
     0,
     NULL},
};

static void attention_every_shape_and_cache_type(void **state) {
    (void)state;
    static const enum bound kind[] = {[BE_KV_F16] = ATTN_F16, [BE_KV_F32] = ATTN_F32, [BE_KV_Q8] = ATTN_Q8};
    uint64_t seed = 7;
    for (size_t i = 0; i < ORCD_COUNT(attention_cases); i++) {
        for (int type = BE_KV_F16; type <= BE_KV_Q8; type++) {
            op_memory m = {.n = 0};
            attn_case c = attention_cases[i];
            be_load sinks = op_vector(&m, &seed, Q_F32, (uint64_t)c.n_head, 1, 1);
            c.sink_load = &sinks;
            c.type = (be_kv_type)type;
            bool offered = false;
            for (int k = 0; k < n_tested; k++)
                offered = offered || (tested[k].ops != ref.ops && tested[k].bound[kind[type]] > 0);
            if (offered)
                compare(kind[type], c.what, run_attention, &c);
            op_free_memory(&m);
        }
    }
}

static void attention_is_the_same_bits_however_a_prompt_is_cut(void **state) {
    (void)state;
    static const int splits[] = {1, 3, 17, 63, 64, 65, 128};
    static const int picked[] = {1, 2, 3, 4, 10};
    uint64_t seed = 8;
    for (size_t k = 0; k < 2 * ORCD_COUNT(picked); k++) {
        attn_case c = attention_cases[picked[k / 2]];
        c.type = k % 2 ? BE_KV_Q8 : BE_KV_F16;
        op_memory m = {.n = 0};
        be_load sinks = op_vector(&m, &seed, Q_F32, (uint64_t)c.n_head, 1, 1);
        c.sink_load = &sinks;
        for (int i = 0; i < n_tested; i++) {
            int64_t n_row, width;
            if (k % 2 && tested[i].bound[ATTN_Q8] <= 0)
                continue;
            op_bench b = op_open(tested[i].dev);
            c.split = 0;
            const float *whole = run_attention(&b, &c, &n_row, &width);
            for (size_t j = 0; j < ORCD_COUNT(splits); j++) {
                op_bench p = op_open(tested[i].dev);
                c.split = splits[j];
                const float *cut = run_attention(&p, &c, &n_row, &width);
                op_same_bits(c.what, cut, whole, n_row * width);
                op_close(&p);
            }
            op_close(&b);
        }
        op_free_memory(&m);
    }
}

/* With a zero query every score is 0, so a sink of s takes e^s against 1 for each of n visible keys. */
static void attention_sink_takes_its_share(void **state) {
    (void)state;
    enum { D = 64, N = 200 };
    for (int i = 0; i < n_tested; i++) {
        for (int window = 0; window <= 128; window += 128) {
            attn_case c = {"sink", 2, 1, D, window, true, false, BE_KV_F32, 256, 1, {{0, 0, 0, N}}, 0, NULL};
            op_memory m = {.n = 0};
            float sink[2] = {2.5f, -INFINITY}, x[N * 4 * D] = {0};
            be_load sinks = {.use = BE_USE_VECTOR, .n_part = 1};
            sink[1] = -1e30f; /* a sink that takes nothing */
            sinks.part[0] = op_tensor(&m, Q_F32, 1, 1, 2, sink);
            op_bench b = op_open(tested[i].dev);
            open_attn_kv(&b, &c);
            be_attn a = attn_of(&c, op_load(&b, &sinks));
            for (int t = 0; t < N; t++) /* v of position t is t + 1 everywhere */
                for (int d = 0; d < D; d++)
                    x[(t * 4 + 3) * D + d] = (float)(t + 1);
            be_act *qkv = op_act(&b, BE_ACT_FREE, N, 4 * D, x), *y = op_act(&b, BE_ACT_FREE, N, 2 * D, NULL);
            op_batch batch = {0};
            op_rows(&batch, 0, 0, N);
            be_step *s = op_begin(&b, &batch);
            b.ops->kv_write(s, &a, qkv);
            b.ops->attention(s, &a, qkv, y);
            op_end(&b, s);
            const float *got = op_read(&b, y);
            for (int t = 0; t < N; t++) {
                int first = window && t >= window ? t - window + 1 : 0, n = t - first + 1;
                double sum = n * (first + 1 + t + 1) / 2.0;
                double want[2] = {sum / (n + exp(2.5)), sum / n};
                for (int j = 0; j < 2 * D; j++)
                    if (!(fabs(got[t * 2 * D + j] - want[j / D]) <= tested[i].bound[ATTN_F32] * want[j / D]))
                        fail_msg("%s: window %d, row %d, head %d is %g, not %g", tested[i].ops->name, window, t, j / D,
                                 got[t * 2 * D + j], want[j / D]);
            }
            op_close(&b);
            op_free_memory(&m);
        }
    }
}

static const float *run_rope(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const attn_case *c = arg;
    open_attn_kv(b, c);
    be_attn a = attn_of(c, NULL);
    be_act *qkv = op_act(b, BE_ACT_FREE, OP_MAX_TOK, qkv_width(c), NULL);
    op_batch batch = {0};
    for (int i = 0; i < c->n_seq; i++)
        op_rows(&batch, c->seq[i].slot, c->seq[i].past, c->seq[i].n_new);
    write_qkv(b, c, &batch, qkv);
    be_step *s = op_begin(b, &batch);
    b->ops->rope(s, &a, qkv);
    op_end(b, s);
    *n_row = batch.b.n_tok;
    *width = qkv->width;
    return op_read(b, qkv);
}

static void rope_turns_q_and_k_at_every_position(void **state) {
    (void)state;
    static const struct {
        int n_head, n_kv_head, head_dim;
    } shape[] = {{64, 8, 64}, {4, 2, 32}, {12, 12, 64}, {2, 1, 128}};
    for (size_t i = 0; i < ORCD_COUNT(shape); i++) {
        attn_case c = {"rope",
                       shape[i].n_head,
                       shape[i].n_kv_head,
                       shape[i].head_dim,
                       8,
                       false,
                       true,
                       BE_KV_F16,
                       131072,
                       3,
                       {{0, 0, 0, 65}, {1, 0, 4090, 12}, {2, 0, 131055, 17}},
                       0,
                       NULL};
        if (shape[i].n_kv_head > 2) /* the page pool of many heads and a long context would be large */
            c.n_ctx = 8192, c.seq[2].past = 8000;
        compare(ROPE, "rope", run_rope, &c);
    }
}

/* A prefix in pages that two slots share, and a copy of a page, give the same bits as pages of one's own. */
static void kv_pages_can_be_shared_copied_saved_and_restored(void **state) {
    (void)state;
    attn_case c = {"pages", 8, 2, 64, 0, false, true, BE_KV_F16, 256, 1, {{0, 0, 100, 1}}, 0, NULL};
    for (int i = 0; i < n_tested; i++) {
        int64_t n_row, width;
        op_bench b = op_open(tested[i].dev);
        const float *want = run_attention(&b, &c, &n_row, &width);
        be_attn a = attn_of(&c, NULL);
        be_act *qkv = op_act(&b, BE_ACT_FREE, 1, qkv_width(&c), NULL), *y = op_act(&b, BE_ACT_FREE, 1, width, NULL);
        uint8_t *page = malloc(b.kv->page_bytes[BE_POOL_FULL]);
        assert_non_null(page);
        int32_t p0 = 6 * 4 - 1, p1 = 6 * 4 - 2, spare = 0; /* op_kv maps entry i of slot s to page 23 - 4s - i */
        OP_OK(b.ops->kv_read_page(b.kv, BE_POOL_FULL, p1, page, &err_));
        for (int way = 0; way < 3; way++) {
            b.ops->kv_map(b.kv, BE_POOL_FULL, 4, 0, p0);
            b.ops->kv_map(b.kv, BE_POOL_FULL, 4, 1, way ? spare : p1);
            if (way == 1)
                b.ops->kv_copy_page(b.kv, BE_POOL_FULL, spare, p1);
            if (way == 2)
                OP_OK(b.ops->kv_write_page(b.kv, BE_POOL_FULL, spare, page, &err_));
            op_batch batch = {0};
            op_rows(&batch, 0, 100, 1);
            write_qkv(&b, &c, &batch, qkv);
            batch.slot[0] = 4;
            be_step *s = op_begin(&b, &batch);
            b.ops->rope(s, &a, qkv);
            b.ops->kv_write(s, &a, qkv);
            b.ops->attention(s, &a, qkv, y);
            op_end(&b, s);
            op_same_bits(way == 0 ? "shared" : way == 1 ? "copied" : "restored", op_read(&b, y), want, width);
        }
        free(page);
        op_close(&b);
    }
}

/* ---- a model: two layers, the first with a window of 16 ---- */

typedef struct model {
    op_memory memory;
    int n_embd, n_head, n_kv_head, head_dim, n_expert, top_k, n_ff;
    be_load embed, norm[5], qkv[2], out[2], router[2], gate_up[2], down[2], sinks[2], head;
} model;

static void make_model(model *m, uint64_t seed, q_type dense, q_type expert, int n_embd, int n_head, int n_kv_head,
                       int head_dim, int n_ff, int n_expert, int top_k) {
    *m = (model){.n_embd = n_embd, .n_head = n_head, .n_kv_head = n_kv_head, .head_dim = head_dim, .n_ff = n_ff};
    m->n_expert = n_expert;
    m->top_k = top_k;
    op_memory *at = &m->memory;
    uint64_t embd = (uint64_t)n_embd, q = (uint64_t)(n_head * head_dim), kv = (uint64_t)(n_kv_head * head_dim);
    m->embed = (be_load){.use = BE_USE_EMBED, .n_part = 1};
    m->embed.part[0] = op_random_tensor(at, &seed, dense, 1, 32, embd, 1);
    for (int i = 0; i < 5; i++)
        m->norm[i] = op_vector(at, &seed, Q_F32, embd, 1, 0.2f);
    for (int i = 0; i < 2; i++) {
        m->qkv[i].use = m->out[i].use = m->router[i].use = BE_USE_LINEAR;
        m->gate_up[i].use = BE_USE_GATE_UP;
        m->down[i].use = BE_USE_DOWN;
        op_add_part(&m->qkv[i], at, &seed, dense, 1, q, embd, true);
        op_add_part(&m->qkv[i], at, &seed, dense, 1, kv, embd, true);
        op_add_part(&m->qkv[i], at, &seed, dense, 1, kv, embd, true);
        op_add_part(&m->out[i], at, &seed, dense, 1, embd, q, true);
        op_add_part(&m->router[i], at, &seed, Q_F32, 1, (uint64_t)n_expert, embd, true);
        op_add_part(&m->gate_up[i], at, &seed, expert, (uint64_t)n_expert, (uint64_t)n_ff, embd, true);
        op_add_part(&m->gate_up[i], at, &seed, expert, (uint64_t)n_expert, (uint64_t)n_ff, embd, true);
        op_add_part(&m->down[i], at, &seed, expert, (uint64_t)n_expert, embd, (uint64_t)n_ff, true);
        m->sinks[i] = op_vector(at, &seed, Q_F32, (uint64_t)n_head, 0, 1);
    }
    m->head.use = BE_USE_LINEAR;
    op_add_part(&m->head, at, &seed, dense, 1, 40, embd, false);
}

typedef struct loaded { /* a model on a bench */
    const model *m;
    be_weight *embed, *norm[5], *qkv[2], *out[2], *router[2], *gate_up[2], *down[2], *sinks[2], *head;
    be_act *x, *tmp, *qkv_rows, *mixed, *route, *last, *last_normed, *logits;
} loaded;

enum { MODEL_SLOTS = 4, MODEL_CTX = 320, MODEL_WINDOW = 16, MODEL_VOCAB = 40 };

static loaded load_model(op_bench *b, const model *m) {
    static const int window[2] = {MODEL_WINDOW, 0};
    loaded l = {.m = m, .embed = op_load(b, &m->embed), .head = op_load(b, &m->head)};
    for (int i = 0; i < 5; i++)
        l.norm[i] = op_load(b, &m->norm[i]);
    for (int i = 0; i < 2; i++) {
        l.qkv[i] = op_load(b, &m->qkv[i]);
        l.out[i] = op_load(b, &m->out[i]);
        l.router[i] = op_load(b, &m->router[i]);
        l.gate_up[i] = op_load(b, &m->gate_up[i]);
        l.down[i] = op_load(b, &m->down[i]);
        l.sinks[i] = op_load(b, &m->sinks[i]);
    }
    int rows = OP_MAX_TOK;
    l.x = op_act(b, BE_ACT_F32, rows, m->n_embd, NULL);
    l.tmp = op_act(b, BE_ACT_FREE, rows, m->n_embd, NULL);
    l.qkv_rows = op_act(b, BE_ACT_FREE, rows, (m->n_head + 2 * m->n_kv_head) * m->head_dim, NULL);
    l.mixed = op_act(b, BE_ACT_FREE, rows, m->n_head * m->head_dim, NULL);
    l.route = op_act(b, BE_ACT_ROUTE, rows, m->top_k, NULL);
    l.last = op_act(b, BE_ACT_F32, rows, m->n_embd, NULL);
    l.last_normed = op_act(b, BE_ACT_FREE, rows, m->n_embd, NULL);
    l.logits = op_act(b, BE_ACT_F32, rows, MODEL_VOCAB, NULL);
    op_kv(b, &(be_kv_spec){.n_layer = 2,
                           .n_kv_head = m->n_kv_head,
                           .head_dim = m->head_dim,
                           .window = window,
                           .type = BE_KV_F16,
                           .n_slot = MODEL_SLOTS,
                           .n_ctx = MODEL_CTX,
                           .max_tok = OP_MAX_TOK,
                           .max_out = OP_MAX_TOK});
    return l;
}

static void record_model(const loaded *l, be_step *s) {
    static float inv_freq[64];
    const model *m = l->m;
    for (int i = 0; i < m->head_dim / 2; i++)
        inv_freq[i] = (float)pow(150000, -2.0 * i / m->head_dim);
    be_glu g = {1.702f, 7.0f};
    be_embed(s, l->embed, NULL, l->x);
    for (int i = 0; i < 2; i++) {
        be_norm before = {BE_NORM_RMS, 1e-5f, l->norm[2 * i], NULL},
                after = {BE_NORM_RMS, 1e-5f, l->norm[2 * i + 1], NULL};
        be_attn a = {.layer = i,
                     .n_head = m->n_head,
                     .n_kv_head = m->n_kv_head,
                     .head_dim = m->head_dim,
                     .window = i ? 0 : MODEL_WINDOW,
                     .scale = 1 / sqrtf((float)m->head_dim),
                     .sinks = l->sinks[i],
                     .rotary = true,
                     .inv_freq = inv_freq,
                     .rope_scale = 1.3465736f};
        be_attn_in(s, &before, l->qkv[i], &a, l->x, l->tmp, l->qkv_rows);
        be_attention(s, &a, l->qkv_rows, l->mixed);
        be_linear(s, l->out[i], l->mixed, l->x, BE_EPI_ADD);
        be_moe(s, &after, l->router[i], m->top_k, l->gate_up[i], l->down[i], &g, l->tmp, l->route, l->x);
    }
    be_norm last = {BE_NORM_RMS, 1e-5f, l->norm[4], NULL};
    be_gather_out(s, l->x, l->last);
    be_norm_linear(s, &last, l->head, l->last, l->last_normed, l->logits, BE_EPI_NONE);
}

/* How three sequences of these lengths are fed: WHOLE all in one step; SINGLE one row a step; MIXED decoding rows of
 * one beside prefill rows of others, in pieces of 13. */
enum feed { WHOLE, SINGLE, MIXED };
static const int lengths[3] = {140, 23, 70};
static const int slots[3] = {2, 0, 3};
enum { ALL_ROWS = 140 + 23 + 70 };

static void model_step(op_bench *b, const loaded *l, op_batch *batch, const int *row_at, float *logits) {
    batch->b.n_out = batch->b.n_tok;
    for (int i = 0; i < batch->b.n_tok; i++)
        batch->out_row[i] = i;
    be_step *s = op_begin(b, batch);
    record_model(l, s);
    op_end(b, s);
    assert_int_equal(l->logits->n_row, batch->b.n_tok);
    float rows[OP_MAX_TOK * MODEL_VOCAB];
    OP_OK(b->ops->act_read(b->dev, l->logits, 0, batch->b.n_tok, rows, &err_));
    for (int i = 0; i < batch->b.n_tok; i++)
        memcpy(logits + row_at[i] * MODEL_VOCAB, rows + i * MODEL_VOCAB, MODEL_VOCAB * sizeof *rows);
}

/* Logits of every position, [ALL_ROWS][MODEL_VOCAB], sequence by sequence whatever the order of work was. */
static void run_feed(op_bench *b, const loaded *l, enum feed feed, float *logits) {
    int done[3] = {0};
    for (int left = ALL_ROWS, step = 0; left > 0; step++) {
        op_batch batch = {0};
        int row_at[OP_MAX_TOK];
        for (int q = 0, base = 0; q < 3; base += lengths[q++]) {
            int rest = lengths[q] - done[q], n = rest;
            if (feed == SINGLE)
                n = batch.b.n_tok == 0 && rest > 0 ? 1 : 0;
            else if (feed == MIXED)
                n = (step + q) % 3 == 0 ? 1 : 13;
            n = n > rest ? rest : n;
            for (int i = 0; i < n; i++)
                row_at[batch.b.n_tok + i] = base + done[q] + i;
            op_rows(&batch, slots[q], done[q], n);
            done[q] += n;
            left -= n;
        }
        model_step(b, l, &batch, row_at, logits);
    }
}

static const float *run_model(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    loaded l = load_model(b, arg);
    float *logits = malloc(ALL_ROWS * MODEL_VOCAB * sizeof *logits);
    assert_non_null(logits);
    b->read[b->n_read++] = logits;
    run_feed(b, &l, WHOLE, logits);
    *n_row = ALL_ROWS;
    *width = MODEL_VOCAB;
    return logits;
}

/* All experts are chosen, so that no rounding can change a choice. */
static void model_gives_the_reference_logits(void **state) {
    (void)state;
    static const struct {
        q_type dense, expert;
        int n_embd, n_head, n_kv_head, head_dim, n_ff;
    } row[] = {{Q_F32, Q_F32, 96, 4, 2, 64, 32},     {Q_BF16, Q_MXFP4, 160, 16, 2, 64, 96},
               {Q_Q8_0, Q_MXFP4, 128, 4, 4, 32, 64}, {Q_Q4_K, Q_Q6_K, 256, 8, 2, 64, 256},
               {Q_F16, Q_Q5_1, 96, 4, 1, 128, 160},  {Q_Q4_0, Q_Q4_1, 64, 8, 1, 64, 64}};
    for (size_t i = 0; i < ORCD_COUNT(row); i++) {
        static model m;
        make_model(&m, 20 + i, row[i].dense, row[i].expert, row[i].n_embd, row[i].n_head, row[i].n_kv_head,
                   row[i].head_dim, row[i].n_ff, 4, 4);
        bool exact = is_dense(row[i].dense) && is_dense(row[i].expert);
        char what[64];
        snprintf(what, sizeof what, "model %s/%s", q_find(row[i].dense)->name, q_find(row[i].expert)->name);
        compare(exact ? MODEL_DENSE : MODEL_QUANT, what, run_model, &m);
        op_free_memory(&m.memory);
    }
}

static void model_logits(be_device *dev, const model *m, enum feed feed, float *logits) {
    op_bench b = op_open(dev);
    loaded l = load_model(&b, m);
    run_feed(&b, &l, feed, logits);
    op_close(&b);
}

static void small_model(model *m, uint64_t seed, q_type dense, q_type expert) {
    make_model(m, seed, dense, expert, 160, 8, 2, 64, 96, 8, 4);
}

static void model_prefill_decode_and_any_mixture_give_the_same_bits(void **state) {
    (void)state;
    static const q_type types[][2] = {{Q_BF16, Q_MXFP4}, {Q_Q8_0, Q_Q8_0}, {Q_F32, Q_F16}, {Q_Q5_0, Q_Q4_1}};
    static float whole[ALL_ROWS * MODEL_VOCAB], cut[ALL_ROWS * MODEL_VOCAB];
    for (size_t i = 0; i < ORCD_COUNT(types); i += case_step) {
        static model m;
        small_model(&m, 30 + i, types[i][0], types[i][1]);
        for (int k = 0; k < n_tested; k++) {
            model_logits(tested[k].dev, &m, WHOLE, whole);
            for (int64_t j = 0; j < ALL_ROWS * MODEL_VOCAB; j++)
                assert_true(isfinite(whole[j]));
            model_logits(tested[k].dev, &m, MIXED, cut);
            op_same_bits("mixed batches", cut, whole, ALL_ROWS * MODEL_VOCAB);
            model_logits(tested[k].dev, &m, SINGLE, cut);
            op_same_bits("row by row", cut, whole, ALL_ROWS * MODEL_VOCAB);
        }
        op_free_memory(&m.memory);
    }
}

/* Threads and the way weights were loaded change speed only. */
static void model_bits_do_not_depend_on_threads_or_repacking(void **state) {
    (void)state;
    static const be_params other[] = {{.n_threads = 1}, {.n_threads = 3}, {.n_threads = 2, .no_repack = true}};
    static const q_type types[][2] = {{Q_BF16, Q_MXFP4}, {Q_Q6_K, Q_Q4_K}};
    static float want[ALL_ROWS * MODEL_VOCAB], got[ALL_ROWS * MODEL_VOCAB];
    for (size_t i = 0; i < ORCD_COUNT(types); i += case_step) {
        static model m;
        make_model(&m, 40 + i, types[i][0], types[i][1], 256, 8, 2, 64, 256, 8, 4);
        for (int k = 0; k < n_tested; k++) {
            model_logits(tested[k].dev, &m, MIXED, want);
            for (size_t j = 0; j < ORCD_COUNT(other); j++) {
                be_device *dev = must_open(tested[k].ops, other[j]);
                model_logits(dev, &m, MIXED, got);
                op_same_bits(j == 2 ? "not repacked" : "threads", got, want, ALL_ROWS * MODEL_VOCAB);
                tested[k].ops->close(dev);
            }
        }
        op_free_memory(&m.memory);
    }
}

/* The device is shown a table without its fused operations for the second run. */
static void fused_operations_equal_their_composition(void **state) {
    (void)state;
    static const q_type types[][2] = {{Q_BF16, Q_MXFP4}, {Q_Q8_0, Q_Q8_0}};
    static float fused[ALL_ROWS * MODEL_VOCAB], plain[ALL_ROWS * MODEL_VOCAB];
    for (size_t i = 0; i < ORCD_COUNT(types); i += case_step) {
        static model m;
        small_model(&m, 50 + i, types[i][0], types[i][1]);
        for (int k = 0; k < n_tested; k++) {
            const be_ops *ops = tested[k].ops;
            be_ops bare = *ops;
            bare.norm_linear = NULL;
            bare.attn_in = NULL;
            bare.moe = NULL;
            if (ops->norm_linear == NULL && ops->attn_in == NULL && ops->moe == NULL)
                continue;
            for (int feed = WHOLE; feed <= MIXED; feed++) {
                char what[48];
                snprintf(what, sizeof what, "%s fused", ops->name);
                model_logits(tested[k].dev, &m, (enum feed)feed, fused);
                tested[k].dev->ops = &bare;
                model_logits(tested[k].dev, &m, (enum feed)feed, plain);
                tested[k].dev->ops = ops;
                note(what, op_judge(what, fused, plain, ALL_ROWS, MODEL_VOCAB, tested[k].bound[MODEL_DENSE]),
                     tested[k].bound[MODEL_DENSE]);
            }
        }
        op_free_memory(&m.memory);
    }
}

/* ---- be_moe, be_attn_in and be_norm_linear by themselves, at gpt-oss's proportions ---- */

typedef struct moe_case {
    be_load norm, router, gate_up, down;
    int n_tok, top_k;
    const float *x;
} moe_case;

static const float *run_moe(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const moe_case *c = arg;
    op_plain_kv(b);
    be_norm n = {BE_NORM_RMS, 1e-5f, op_load(b, &c->norm), NULL};
    be_weight *router = op_load(b, &c->router), *w1 = op_load(b, &c->gate_up), *w2 = op_load(b, &c->down);
    be_act *x = op_act(b, BE_ACT_F32, c->n_tok, w1->n_col, c->x),
           *tmp = op_act(b, BE_ACT_FREE, c->n_tok, w1->n_col, NULL);
    be_act *route = op_act(b, BE_ACT_ROUTE, c->n_tok, c->top_k, NULL);
    be_glu g = {1.702f, 7.0f};
    op_batch batch;
    be_step *s = op_begin_rows(b, &batch, c->n_tok);
    be_moe(s, &n, router, c->top_k, w1, w2, &g, tmp, route, x);
    op_end(b, s);
    *n_row = x->n_row;
    *width = x->width;
    return op_read(b, x);
}

/* Rows are scaled after they were chosen for a clear route: a norm with weight 1 takes the scale out again. */
static void moe_of_2880_with_32_experts(void **state) {
    (void)state;
    uint64_t seed = 60;
    for (size_t k = 0; k < ORCD_COUNT(token_counts); k += case_step) {
        op_memory m = {.n = 0};
        moe_case c = {.router.use = BE_USE_LINEAR, .gate_up.use = BE_USE_GATE_UP, .down.use = BE_USE_DOWN};
        c.n_tok = token_counts[k];
        c.top_k = 4;
        c.norm = op_vector(&m, &seed, Q_F32, 2880, 1, 0);
        op_add_part(&c.router, &m, &seed, Q_BF16, 1, 32, 2880, true);
        op_add_part(&c.gate_up, &m, &seed, Q_MXFP4, 32, 32, 2880, true);
        op_add_part(&c.gate_up, &m, &seed, Q_MXFP4, 32, 32, 2880, true);
        op_add_part(&c.down, &m, &seed, Q_MXFP4, 32, 2880, 32, true);
        float *x = malloc((size_t)c.n_tok * 2880 * sizeof *x);
        assert_non_null(x);
        for (int t = 0; t < c.n_tok; t++) {
            float *row = x + t * 2880;
            do { /* of exactly unit mean square, as the norm leaves it */
                t_fill_normal(&seed, row, 2880);
                double square = op_row_norm(row, NULL, 2880) / sqrt(2880);
                for (int i = 0; i < 2880; i++)
                    row[i] = (float)(row[i] / square);
            } while (!op_clear_row(&c.router, c.top_k, row));
            for (int i = 0; i < 2880; i++)
                row[i] *= ldexpf(1, t % 7 - 3);
        }
        c.x = x;
        compare(EXPERTS_QUANT, "moe 2880", run_moe, &c);
        free(x);
        op_free_memory(&m);
    }
}

/* A broken row chooses some experts or other, all of them real, and its neighbours do not notice. */
static void moe_of_a_row_of_nan_leaves_its_neighbours_alone(void **state) {
    (void)state;
    enum { N = 9, WIDTH = 96, BAD = 4 };
    uint64_t seed = 63;
    op_memory m = {.n = 0};
    moe_case c = {.n_tok = N, .top_k = 4, .router.use = BE_USE_LINEAR};
    c.gate_up.use = BE_USE_GATE_UP;
    c.down.use = BE_USE_DOWN;
    c.norm = op_vector(&m, &seed, Q_F32, WIDTH, 1, 0);
    op_add_part(&c.router, &m, &seed, Q_F32, 1, 8, WIDTH, true);
    op_add_part(&c.gate_up, &m, &seed, Q_MXFP4, 8, 32, WIDTH, true);
    op_add_part(&c.gate_up, &m, &seed, Q_MXFP4, 8, 32, WIDTH, true);
    op_add_part(&c.down, &m, &seed, Q_MXFP4, 8, WIDTH, 32, true);
    float x[N * WIDTH], broken[N * WIDTH];
    t_fill_normal(&seed, x, N * WIDTH);
    memcpy(broken, x, sizeof x);
    broken[BAD * WIDTH + 7] = NAN;
    for (int k = 0; k < n_tested; k++) {
        int64_t n_row, width;
        op_bench a = op_open(tested[k].dev), b = op_open(tested[k].dev);
        c.x = x;
        const float *want = run_moe(&a, &c, &n_row, &width);
        c.x = broken;
        const float *got = run_moe(&b, &c, &n_row, &width);
        for (int t = 0; t < N; t++)
            if (t != BAD)
                op_same_bits("moe beside NaN", got + t * WIDTH, want + t * WIDTH, WIDTH);
        op_close(&a);
        op_close(&b);
    }
    op_free_memory(&m);
}

/* ---- taps and sampling ---- */

enum { TAP_ROWS = 5, TAP_WIDTH = 64 };

struct seen_tap {
    char name[32];
    int layer;
    int64_t n_row, width;
    float value[TAP_ROWS * TAP_WIDTH];
};

static void on_tap(void *ctx, const char *name, int layer, int64_t n_row, int64_t width, const float *value) {
    struct seen_tap *t = ctx;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->layer = layer;
    t->n_row = n_row;
    t->width = width;
    if (n_row == TAP_ROWS && width == TAP_WIDTH)
        memcpy(t->value, value, sizeof t->value);
}

static void tap_shows_the_rows_of_its_moment(void **state) {
    (void)state;
    uint64_t seed = 61;
    for (int k = 0; k < n_tested; k++) {
        op_memory m = {.n = 0};
        op_bench b = op_open(tested[k].dev);
        op_plain_kv(&b);
        float rows[32 * TAP_WIDTH];
        t_fill_normal(&seed, rows, 32 * TAP_WIDTH);
        be_load table = {.use = BE_USE_EMBED, .n_part = 1}, w = {.use = BE_USE_LINEAR};
        table.part[0] = op_tensor(&m, Q_F32, 1, 32, TAP_WIDTH, rows);
        op_add_part(&w, &m, &seed, Q_F32, 1, TAP_WIDTH, TAP_WIDTH, true);
        be_load ones = op_vector(&m, &seed, Q_F32, TAP_WIDTH, 1, 0);
        be_norm n = {BE_NORM_RMS, 1e-5f, op_load(&b, &ones), NULL};
        be_weight *embed = op_load(&b, &table), *linear = op_load(&b, &w);
        be_act *x = op_act(&b, BE_ACT_F32, TAP_ROWS, TAP_WIDTH, NULL);
        be_act *tmp = op_act(&b, BE_ACT_FREE, TAP_ROWS, TAP_WIDTH, NULL);
        static struct seen_tap before, after;
        op_batch batch;
        be_step *s = op_begin_rows(&b, &batch, TAP_ROWS);
        be_embed(s, embed, NULL, x);
        b.ops->tap(s, "before", 3, x, on_tap, &before);
        be_norm_linear(s, &n, linear, x, tmp, x, BE_EPI_ADD);
        b.ops->tap(s, "after", 4, x, on_tap, &after);
        op_end(&b, s);
        assert_string_equal(before.name, "before");
        assert_string_equal(after.name, "after");
        assert_true(before.layer == 3 && after.layer == 4 && after.n_row == TAP_ROWS && after.width == TAP_WIDTH);
        for (int t = 0; t < TAP_ROWS; t++)
            op_same_bits("tap before", before.value + t * TAP_WIDTH, rows + batch.token[t] * TAP_WIDTH, TAP_WIDTH);
        op_same_bits("tap after", after.value, op_read(&b, x), TAP_ROWS * TAP_WIDTH);
        op_close(&b);
        op_free_memory(&m);
    }
}

enum { SAMPLE_ROWS = 96, SAMPLE_VOCAB = 5000, SAMPLE_WIDTH = 32 };

/* Every fourth row greedy; the rest with each filter alone and all together; bias and penalties of few tokens and of
 * many, masks, log-probabilities, and tokens that are given. */
static be_sample sample_of(int row, be_edit edit[SAMPLE_VOCAB]) {
    static uint32_t mask[4][SAMPLE_VOCAB / 32 + 1]; /* a part, half, one, all */
    be_sample r = {.temperature = row % 4 ? 0.7f + 0.1f * (float)(row % 5) : 0,
                   .top_p = row % 3 ? 1 : 0.9f,
                   .min_p = row % 5 ? 0 : 0.05f,
                   .top_k = row % 2 ? 0 : 40,
                   .seed = 1234567 + (uint64_t)(row / 8),
                   .draw = (uint64_t)row,
                   .edit = edit,
                   .masked = row % 5 == 3 || row % 16 == 4,
                   .mask = row % 5 == 3 ? mask[row / 2 % 4] : NULL,
                   .penalties = row / 2 % 3 == 1,
                   .repetition = row % 8 < 4 ? 1.5f : 1,
                   .presence = row % 7 ? 0.75f : -1.5f,
                   .frequency = row % 8 == 3 ? -0.5f : 0.3f,
                   .given = row % 16 == 9,
                   .id = row,
                   .likely = row % 3 == 1,
                   .n_top = row % 8 == 4   ? 0
                            : row % 8 == 5 ? 1
                                           : 20};
    for (int w = 0; w < SAMPLE_VOCAB / 32 + 1; w++) {
        mask[0][w] = w % 9 == 8 ? 0x80000401u : 0;
        mask[1][w] = 0x5a5a5a5au;
        mask[2][w] = w == 77 ? 1u << 19 : 0;
        mask[3][w] = ~0u;
    }
    int apart = row % 7 == 1 ? SAMPLE_VOCAB / 3 : row % 7 == 4 ? 2 : SAMPLE_VOCAB;
    for (int id = row % apart; id < SAMPLE_VOCAB && row % 5; id += apart)
        edit[r.n_edit++] =
            (be_edit){id, id % 3 ? 0 : 0.1f * (float)(id % 40 - 20), id % 4 ? 0 : 1 + id % 3, id % 5 == 2};
    return r;
}

typedef struct drawing { /* a head whose logits are drawn from */
    op_memory m;
    op_bench b;
    be_weight *head;
    be_act *in, *logits;
    be_edit edit[SAMPLE_ROWS][SAMPLE_VOCAB];
    float x[SAMPLE_ROWS * SAMPLE_WIDTH]; /* of each row; every 7th is zero, so that all its logits are equal */
} drawing;

static void open_drawing(drawing *d, be_device *dev, uint64_t *seed) {
    d->b = op_open(dev);
    d->m.n = 0;
    be_load w = {.use = BE_USE_LINEAR};
    op_plain_kv(&d->b);
    op_add_part(&w, &d->m, seed, Q_F32, 1, SAMPLE_VOCAB, SAMPLE_WIDTH, false);
    for (int i = 0; i < SAMPLE_ROWS * SAMPLE_WIDTH; i++)
        d->x[i] = i / SAMPLE_WIDTH % 7 == 3 ? 0 : 3 * t_normal(seed);
    d->head = op_load(&d->b, &w);
    d->in = op_act(&d->b, BE_ACT_FREE, SAMPLE_ROWS, SAMPLE_WIDTH, NULL);
    d->logits = op_act(&d->b, BE_ACT_F32, SAMPLE_ROWS, SAMPLE_VOCAB, NULL);
}

static void close_drawing(drawing *d) {
    op_close(&d->b);
    op_free_memory(&d->m);
}

static void draw_step(drawing *d, op_batch *batch, const be_sample *row, int32_t *id, be_likely *likely) {
    be_step *s = op_begin(&d->b, batch);
    be_linear(s, d->head, d->in, d->logits, BE_EPI_NONE);
    d->b.ops->sample(s, d->logits, row);
    op_end(&d->b, s);
    for (int i = 0; i < batch->b.n_out; i++)
        if (row[i].masked) {
            OP_OK(d->b.ops->allow(d->b.dev, row, &err_));
            break;
        }
    OP_OK(d->b.ops->sampled(d->b.dev, id, likely, &err_));
}

/* Ids of n rows from row `first` on. unseen: the token that the host has not told, which is the best one, or -1. */
static void draw(drawing *d, int first, int n, int32_t *unseen, int32_t *id, be_likely *likely) {
    be_sample row[SAMPLE_ROWS] = {0};
    op_batch batch = {0};
    op_rows(&batch, 0, 0, n);
    batch.b.n_out = n;
    for (int i = 0; i < n; i++)
        batch.out_row[i] = i;
    OP_OK(d->b.ops->act_write(d->b.dev, d->in, 0, n, d->x + first * SAMPLE_WIDTH, &err_));
    draw_step(d, &batch, row, unseen, NULL);
    for (int i = 0; i < n; i++) {
        row[i] = sample_of(first + i, d->edit[i]);
        if ((first + i) % 5 == 2)
            unseen[i] = -1;
        else
            batch.token[i] = BE_TOKEN_OF(i);
    }
    draw_step(d, &batch, row, id, likely);
}

/* Greedy is the argmax exactly. A draw may differ from the host's where the number falls on an edge between two tokens,
 * which sums in float place differently: at most one in 64. Then the sampled ids feed the next step. */
static void sampling_on_the_device_draws_what_the_host_draws(void **state) {
    (void)state;
    uint64_t seed = 62;
    static drawing d;
    for (int k = 0; k < n_tested; k++) {
        const be_ops *ops = tested[k].ops;
        if (!ops->sample)
            continue;
        open_drawing(&d, tested[k].dev, &seed);
        be_load table = {.use = BE_USE_EMBED, .n_part = 1};
        table.part[0] = op_random_tensor(&d.m, &seed, Q_F32, 1, SAMPLE_VOCAB, SAMPLE_WIDTH, 3);
        be_weight *embed = op_load(&d.b, &table);
        be_act *next = op_act(&d.b, BE_ACT_F32, SAMPLE_ROWS, SAMPLE_WIDTH, NULL);
        int32_t id[SAMPLE_ROWS], unseen[SAMPLE_ROWS];
        be_likely likely[SAMPLE_ROWS], want;
        draw(&d, 0, SAMPLE_ROWS, unseen, id, likely);
        op_batch follow = {0}; /* reads the ids before the host has seen them */
        op_rows(&follow, 0, SAMPLE_ROWS, SAMPLE_ROWS);
        for (int i = 0; i < SAMPLE_ROWS; i++)
            follow.token[i] = BE_TOKEN_OF(SAMPLE_ROWS - 1 - i);
        be_step *s = op_begin(&d.b, &follow);
        be_embed(s, embed, NULL, next);
        op_end(&d.b, s);

        samp *host = NULL;
        OP_OK(samp_open(SAMPLE_VOCAB, &host, &err_));
        const float *got = op_read(&d.b, d.logits), *fed = op_read(&d.b, next),
                    *rows = (const float *)table.part[0].data;
        int differ = 0;
        for (int i = 0; i < SAMPLE_ROWS; i++) {
            be_sample row = sample_of(i, d.edit[i]);
            int32_t drawn = host_draw(host, &row, got + i * SAMPLE_VOCAB, unseen[i]);
            assert_true(id[i] >= 0 && id[i] < SAMPLE_VOCAB);
            assert_true(row.temperature > 0 || id[i] == drawn);
            differ += id[i] != drawn;
            if (row.likely) { /* to the bit */
                samp_likely(got + i * SAMPLE_VOCAB, SAMPLE_VOCAB, id[i], row.n_top, &want);
                assert_memory_equal(&likely[i], &want, offsetof(be_likely, top_id));
                assert_memory_equal(likely[i].top_id, want.top_id, (size_t)row.n_top * sizeof *want.top_id);
                assert_memory_equal(likely[i].top, want.top, (size_t)row.n_top * sizeof *want.top);
            }
            op_same_bits("sampled token", fed + (SAMPLE_ROWS - 1 - i) * SAMPLE_WIDTH, rows + id[i] * SAMPLE_WIDTH,
                         SAMPLE_WIDTH);
        }
        assert_true(differ <= 1);
        samp_close(host);
        close_drawing(&d);
    }
}

/* Few rows are drawn by more processors each. */
static void sampling_does_not_depend_on_the_rows_beside(void **state) {
    (void)state;
    static const int together[] = {1, 2, 24, 48};
    uint64_t seed = 63;
    static drawing d;
    for (int k = 0; k < n_tested; k++) {
        if (!tested[k].ops->sample)
            continue;
        open_drawing(&d, tested[k].dev, &seed);
        int32_t id[SAMPLE_ROWS], part[SAMPLE_ROWS], unseen[SAMPLE_ROWS];
        be_likely likely[SAMPLE_ROWS], one[SAMPLE_ROWS];
        draw(&d, 0, SAMPLE_ROWS, unseen, id, likely);
        for (size_t t = 0; t < ORCD_COUNT(together); t++)
            for (int first = 0; first < SAMPLE_ROWS; first += together[t]) {
                draw(&d, first, together[t], unseen, part, one);
                assert_memory_equal(part, id + first, (size_t)together[t] * sizeof *id);
                for (int i = 0; i < together[t]; i++)
                    if (sample_of(first + i, d.edit[i]).likely)
                        assert_memory_equal(&one[i], &likely[first + i], offsetof(be_likely, top_id));
            }
        close_drawing(&d);
    }
}

static int run(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(attention_every_shape_and_cache_type, print_worst),
        cmocka_unit_test_teardown(attention_is_the_same_bits_however_a_prompt_is_cut, print_worst),
        cmocka_unit_test_teardown(attention_sink_takes_its_share, print_worst),
        cmocka_unit_test_teardown(rope_turns_q_and_k_at_every_position, print_worst),
        cmocka_unit_test_teardown(kv_pages_can_be_shared_copied_saved_and_restored, print_worst),
        cmocka_unit_test_teardown(model_gives_the_reference_logits, print_worst),
        cmocka_unit_test_teardown(model_prefill_decode_and_any_mixture_give_the_same_bits, print_worst),
        cmocka_unit_test_teardown(model_bits_do_not_depend_on_threads_or_repacking, print_worst),
        cmocka_unit_test_teardown(fused_operations_equal_their_composition, print_worst),
        cmocka_unit_test_teardown(moe_of_2880_with_32_experts, print_worst),
        cmocka_unit_test_teardown(moe_of_a_row_of_nan_leaves_its_neighbours_alone, print_worst),
        cmocka_unit_test_teardown(tap_shows_the_rows_of_its_moment, print_worst),
        cmocka_unit_test_teardown(sampling_on_the_device_draws_what_the_host_draws, print_worst),
        cmocka_unit_test_teardown(sampling_does_not_depend_on_the_rows_beside, print_worst),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(int argc, char **argv) { return op_main(argc, argv, run); }
