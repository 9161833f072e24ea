/* One to eight rows a step, as decoding goes, against whole prompts and against the composition of single operations:
 * the same bits. Shapes are gpt-oss's own (20b's, 120b's 128 experts, other numbers of heads), so that the CUDA
 * backend's fused step must be what runs, and small ones and GPT-2's for every backend.
 *
 *     test_decode                 small shapes, every backend that opens
 *     test_decode BACKEND         all shapes
 *     test_decode BACKEND quick   one layer of each kind, few positions: for compute-sanitizer */
#include "ops.h"

#ifdef ORCD_CUDA
extern int cuda_n_fused(const be_device *d); /* steps that the fused kernels recorded */
#else
static int cuda_n_fused(const be_device *d) { return d ? 0 : 1; }
#endif

enum { MAX_LAYER = 2, CTX = 4160, STEP = 512, WINDOW = 128, TOP = 4, STREAMS = 8 };

typedef struct shape {
    const char *name;
    bool gpt2, big, fused; /* fused: the CUDA backend must run it by its fused kernels */
    q_type dense;
    int n_embd, n_head, n_kv_head, n_ff, n_expert, n_vocab;
    bool sinks, bias;
} shape;

static const shape shapes[] = {
    {"small, with experts", false, false, false, Q_BF16, 160, 8, 2, 96, 8, 50, true, true},
    {"small GPT-2", true, false, false, Q_F16, 128, 2, 2, 512, 0, 70, false, true},
    {"20b, Q8_0", false, true, true, Q_Q8_0, 2880, 64, 8, 2880, 32, 1007, true, true},
    {"20b, BF16", false, true, true, Q_BF16, 2880, 64, 8, 2880, 32, 208, true, true},
    {"120b, Q8_0", false, true, true, Q_Q8_0, 2880, 64, 8, 2880, 128, 33, true, true},
    {"56 heads, no sinks", false, true, true, Q_Q8_0, 2880, 56, 7, 2880, 32, 16, false, true},
    {"no biases", false, true, true, Q_BF16, 2880, 64, 8, 2880, 32, 40, true, false},
    {"20b, Q4_0", false, true, true, Q_Q4_0, 2880, 64, 8, 2880, 32, 100, true, true},
    {"GPT-2 124M", true, true, false, Q_Q8_0, 768, 12, 12, 3072, 0, 500, false, true},
};

static bool quick;

/* ---- a model of the shape ---- */

typedef struct block {
    be_load norm[2], norm_bias[2], qkv, sinks, out, router, gate_up, down, up;
} block;

typedef struct model {
    const shape *s;
    int n_layer;
    op_memory memory;
    be_load embed, pos, last, last_bias, head;
    block layer[MAX_LAYER];
} model;

/* Making random weights takes longer than using them, so weights are windows into few matrices: `shift` rows further on
 * for each layer, part and expert. */
static void add_window(be_load *l, op_memory *m, uint64_t *seed, const mf_tensor *all, int at, uint64_t n_mat,
                       uint64_t n_row, bool bias) {
    const uint64_t shift = 16;
    mf_tensor t = *all;
    t.data = NULL; /* only its view says where it lies */
    t.n_mat = n_mat;
    t.n_row = n_row;
    t.view.base += (uint64_t)at * t.view.row_bytes;
    t.view.mat_bytes = shift * t.view.row_bytes;
    assert_true((uint64_t)at + (n_mat - 1) * shift + n_row <= all->n_row);
    l->has_bias[l->n_part] = bias;
    if (bias)
        l->bias[l->n_part] = op_random_tensor(m, seed, Q_F32, 1, n_mat, n_row, 0.3f);
    l->part[l->n_part++] = t;
}

/* Made once for all shapes of a width. */
static op_memory kept;
static mf_tensor experts;

static const mf_tensor *expert_rows(int n_row, int n_col) {
    uint64_t seed = 5;
    if (experts.n_col != (uint64_t)n_col) {
        op_free_memory(&kept);
        experts = op_random_tensor(&kept, &seed, Q_MXFP4, 1, (uint64_t)n_row + 128 * 16 + 64, (uint64_t)n_col,
                                   1 / sqrtf((float)n_col));
    }
    return &experts;
}

/* rows: of qkv, of out; layer i takes what begins at row 16 i. */
static void make_layer(block *l, const shape *s, op_memory *m, uint64_t *seed, const mf_tensor rows[2], int i) {
    const uint64_t embd = (uint64_t)s->n_embd, q = (uint64_t)s->n_head * 64, kv = (uint64_t)s->n_kv_head * 64;
    *l = (block){.qkv.use = BE_USE_LINEAR, .out.use = BE_USE_LINEAR, .router.use = BE_USE_LINEAR};
    for (int k = 0; k < 2; k++) {
        l->norm[k] = op_vector(m, seed, Q_F32, embd, 1, 0.2f);
        l->norm_bias[k] = op_vector(m, seed, Q_F32, embd, 0, 0.2f);
    }
    add_window(&l->qkv, m, seed, &rows[0], 16 * i, 1, q, s->bias);
    add_window(&l->qkv, m, seed, &rows[0], 16 * i + (int)q, 1, kv, s->bias);
    add_window(&l->qkv, m, seed, &rows[0], 16 * i + (int)(q + kv), 1, kv, s->bias);
    add_window(&l->out, m, seed, &rows[1], 16 * i, 1, embd, s->bias);
    l->sinks = op_vector(m, seed, Q_F32, (uint64_t)s->n_head, 0, 1);
    if (s->gpt2) {
        l->up.use = l->down.use = BE_USE_LINEAR;
        op_add_part(&l->up, m, seed, s->dense, 1, (uint64_t)s->n_ff, embd, s->bias);
        op_add_part(&l->down, m, seed, s->dense, 1, embd, (uint64_t)s->n_ff, s->bias);
        return;
    }
    op_add_part(&l->router, m, seed, Q_F32, 1, (uint64_t)s->n_expert, embd, s->bias);
    l->gate_up.use = BE_USE_GATE_UP;
    l->down.use = BE_USE_DOWN;
    const uint64_t n_mat = (uint64_t)s->n_expert, ff = (uint64_t)s->n_ff;
    if (s->n_ff == s->n_embd) {
        const mf_tensor *all = expert_rows(s->n_ff, s->n_embd);
        add_window(&l->gate_up, m, seed, all, 7 * i, n_mat, ff, s->bias);
        add_window(&l->gate_up, m, seed, all, 7 * i + 3, n_mat, ff, s->bias);
        add_window(&l->down, m, seed, all, 7 * i + 5, n_mat, embd, s->bias);
        return;
    }
    op_add_part(&l->gate_up, m, seed, Q_MXFP4, n_mat, ff, embd, s->bias);
    op_add_part(&l->gate_up, m, seed, Q_MXFP4, n_mat, ff, embd, s->bias);
    op_add_part(&l->down, m, seed, Q_MXFP4, n_mat, embd, ff, s->bias);
}

static void make_model(model *m, const shape *s) {
    uint64_t seed = 77, embd = (uint64_t)s->n_embd;
    *m = (model){.s = s, .n_layer = quick && s->big ? 1 : MAX_LAYER};
    m->embed.use = m->pos.use = BE_USE_EMBED;
    m->embed.n_part = m->pos.n_part = 1;
    m->embed.part[0] = op_random_tensor(&m->memory, &seed, s->dense, 1, (uint64_t)s->n_vocab, embd, 1);
    m->pos.part[0] = op_random_tensor(&m->memory, &seed, Q_F32, 1, CTX, embd, 0.3f);
    m->last = op_vector(&m->memory, &seed, Q_F32, embd, 1, 0.2f);
    m->last_bias = op_vector(&m->memory, &seed, Q_F32, embd, 0, 0.2f);
    m->head.use = BE_USE_LINEAR;
    op_add_part(&m->head, &m->memory, &seed, s->dense, 1, (uint64_t)s->n_vocab, embd, false);
    const uint64_t q = (uint64_t)s->n_head * 64, kv = (uint64_t)s->n_kv_head * 64;
    const mf_tensor rows[2] = {
        op_random_tensor(&m->memory, &seed, s->dense, 1, q + 2 * kv + 16 * MAX_LAYER, embd, 1 / sqrtf((float)embd)),
        op_random_tensor(&m->memory, &seed, s->dense, 1, embd + 16 * MAX_LAYER, q, 1 / sqrtf((float)q))};
    for (int i = 0; i < m->n_layer; i++)
        make_layer(&m->layer[i], s, &m->memory, &seed, rows, i);
}

/* ---- the same on a device ---- */

typedef struct loaded {
    op_bench *b;
    const model *m;
    be_weight *embed, *pos, *last, *last_bias, *head;
    struct {
        be_weight *norm[2], *norm_bias[2], *qkv, *sinks, *out, *router, *gate_up, *down, *up;
    } layer[MAX_LAYER];
    be_act *x, *tmp, *qkv, *att, *hidden, *route, *rows, *normed, *logits;
    bool tap;
} loaded;

static be_weight *load_if(op_bench *b, const be_load *l) { return l->n_part ? op_load(b, l) : NULL; }

static loaded load_model(op_bench *b, const model *m, be_kv_type kv_type) {
    static const int window[MAX_LAYER] = {WINDOW, 0};
    const shape *s = m->s;
    loaded l = {.b = b, .m = m, .embed = op_load(b, &m->embed), .last = op_load(b, &m->last)};
    l.last_bias = op_load(b, &m->last_bias);
    l.head = op_load(b, &m->head);
    l.pos = s->gpt2 ? op_load(b, &m->pos) : NULL;
    for (int i = 0; i < m->n_layer; i++) {
        const block *k = &m->layer[i];
        for (int n = 0; n < 2; n++) {
            l.layer[i].norm[n] = op_load(b, &k->norm[n]);
            l.layer[i].norm_bias[n] = s->gpt2 ? op_load(b, &k->norm_bias[n]) : NULL;
        }
        l.layer[i].qkv = op_load(b, &k->qkv);
        l.layer[i].sinks = s->sinks ? op_load(b, &k->sinks) : NULL;
        l.layer[i].out = op_load(b, &k->out);
        l.layer[i].router = load_if(b, &k->router);
        l.layer[i].gate_up = load_if(b, &k->gate_up);
        l.layer[i].down = op_load(b, &k->down);
        l.layer[i].up = load_if(b, &k->up);
    }
    l.x = op_act(b, BE_ACT_F32, STEP, s->n_embd, NULL);
    l.tmp = op_act(b, BE_ACT_FREE, STEP, s->n_embd, NULL);
    l.qkv = op_act(b, BE_ACT_FREE, STEP, (s->n_head + 2 * s->n_kv_head) * 64, NULL);
    l.att = op_act(b, BE_ACT_FREE, STEP, s->n_head * 64, NULL);
    if (s->gpt2)
        l.hidden = op_act(b, BE_ACT_FREE, STEP, s->n_ff, NULL);
    else
        l.route = op_act(b, BE_ACT_ROUTE, STEP, TOP, NULL);
    l.rows = op_act(b, BE_ACT_F32, STEP, s->n_embd, NULL);
    l.normed = op_act(b, BE_ACT_FREE, STEP, s->n_embd, NULL);
    l.logits = op_act(b, BE_ACT_F32, STEP, s->n_vocab, NULL);
    op_kv(b, &(be_kv_spec){.n_layer = m->n_layer,
                           .n_kv_head = s->n_kv_head,
                           .head_dim = 64,
                           .window = window,
                           .type = kv_type,
                           .n_slot = 2 + STREAMS,
                           .n_ctx = CTX,
                           .max_tok = STEP,
                           .max_out = STEP});
    return l;
}

static void ignore_tap(void *ctx, const char *name, int layer, int64_t n_row, int64_t width, const float *value) {
    (void)ctx, (void)name, (void)layer, (void)n_row, (void)width, (void)value;
}

static void record_layer(const loaded *l, be_step *s, int i, const be_attn *a) {
    const be_norm_kind kind = l->m->s->gpt2 ? BE_NORM_LAYER : BE_NORM_RMS;
    const be_norm before = {kind, 1e-5f, l->layer[i].norm[0], l->layer[i].norm_bias[0]};
    const be_norm after = {kind, 1e-5f, l->layer[i].norm[1], l->layer[i].norm_bias[1]};
    const be_glu glu = {1.702f, 7};
    be_attn_in(s, &before, l->layer[i].qkv, a, l->x, l->tmp, l->qkv);
    be_attention(s, a, l->qkv, l->att);
    be_linear(s, l->layer[i].out, l->att, l->x, BE_EPI_ADD);
    if (l->m->s->gpt2) {
        be_norm_linear(s, &after, l->layer[i].up, l->x, l->tmp, l->hidden, BE_EPI_GELU_TANH);
        be_linear(s, l->layer[i].down, l->hidden, l->x, BE_EPI_ADD);
    } else {
        be_moe(s, &after, l->layer[i].router, TOP, l->layer[i].gate_up, l->layer[i].down, &glu, l->tmp, l->route, l->x);
    }
}

static void record(const loaded *l, be_step *s) {
    static float inv_freq[32];
    const shape *p = l->m->s;
    for (int i = 0; i < 32; i++)
        inv_freq[i] = (float)pow(150000, -2.0 * i / 64);
    be_embed(s, l->embed, l->pos, l->x);
    for (int i = 0; i < l->m->n_layer; i++) {
        const be_attn a = {.layer = i,
                           .n_head = p->n_head,
                           .n_kv_head = p->n_kv_head,
                           .head_dim = 64,
                           .window = i ? 0 : WINDOW,
                           .scale = 0.125f,
                           .sinks = l->layer[i].sinks,
                           .rotary = !p->gpt2,
                           .inv_freq = inv_freq,
                           .rope_scale = 1.3465736f};
        record_layer(l, s, i, &a);
    }
    if (l->tap)
        l->b->ops->tap(s, "x", 0, l->x, ignore_tap, NULL);
    const be_norm last = {p->gpt2 ? BE_NORM_LAYER : BE_NORM_RMS, 1e-5f, l->last, p->gpt2 ? l->last_bias : NULL};
    be_gather_out(s, l->x, l->rows);
    be_norm_linear(s, &last, l->head, l->rows, l->normed, l->logits, BE_EPI_NONE);
}

/* ---- steps ---- */

static int32_t token_at(const loaded *l, int pos) {
    return (int32_t)((uint64_t)(pos * 2654435761u) % (uint64_t)l->m->s->n_vocab);
}

/* Rows [from, to) of a slot; logits [n][n_vocab] of those that `wanted` names, in order. Returns their number. */
static int feed(const loaded *l, int slot, int from, int to, bool (*wanted)(int pos), float *logits) {
    const int64_t width = l->m->s->n_vocab;
    int n_out = 0;
    for (int at = from; at < to; at += STEP) {
        op_batch b = {0};
        for (int i = 0; i < STEP && at + i < to; i++, b.b.n_tok++) {
            b.token[i] = token_at(l, at + i);
            b.pos[i] = at + i;
            b.slot[i] = slot;
            if (wanted && wanted(at + i))
                b.out_row[b.b.n_out++] = i;
        }
        be_step *s = op_begin(l->b, &b);
        record(l, s);
        op_end(l->b, s);
        if (b.b.n_out)
            OP_OK(l->b->ops->act_read(l->b->dev, l->logits, 0, b.b.n_out, logits + n_out * width, &err_));
        n_out += b.b.n_out;
    }
    return n_out;
}

/* Positions that decoding starts from: edges of pages, of the window, of super-chunks, of eight super-chunks. */
static const int starts[] = {0, 62, 126, 510, 1022, 4094};
enum { RUN = 5 };

static bool far_too; /* the last of them as well */
static int n_starts(void) { return quick ? 3 : (int)ORCD_COUNT(starts) - !far_too; }

static bool is_decoded(int pos) {
    for (int i = 0; i < n_starts(); i++)
        if (pos >= starts[i] && pos < starts[i] + RUN)
            return true;
    return false;
}

static void decode_equals_prefill(const loaded *l, float *want, float *got) {
    const int64_t width = l->m->s->n_vocab;
    const int end = starts[n_starts() - 1] + RUN;
    const float *row = want;
    char what[80];
    assert_int_equal(feed(l, 0, 0, end, is_decoded, want), n_starts() * RUN);
    for (int i = 0, at = 0; i < n_starts(); i++) {
        feed(l, 1, at, starts[i], NULL, NULL);
        for (int pos = starts[i]; pos < starts[i] + RUN; pos++, row += width) {
            snprintf(what, sizeof what, "%s, position %d", l->m->s->name, pos);
            if (pos == starts[i] + 1) { /* a step of which nothing is wanted, then once more */
                feed(l, 1, pos, pos + 1, NULL, NULL);
            }
            feed(l, 1, pos, pos + 1, is_decoded, got);
            op_same_bits(what, got, row, width);
            if (pos == starts[i] + 2) {
                loaded single = *l;
                single.tap = true; /* a tapped step is never fused */
                feed(&single, 1, pos, pos + 1, is_decoded, got);
                op_same_bits(what, got, row, width);
            }
        }
        at = starts[i] + RUN;
    }
}

/* Stream k, in slot 2 + k, decodes positions from here on. */
static int stream_start(int k) { return starts[k % n_starts()] + k / n_starts(); }

/* The logits that decode_equals_prefill has left for a position. */
static const float *logits_at(const loaded *l, const float *want, int pos) {
    for (int i = 0; i < n_starts(); i++)
        if (pos >= starts[i] && pos < starts[i] + RUN)
            return want + (int64_t)(i * RUN + pos - starts[i]) * l->m->s->n_vocab;
    fail_msg("no logits of position %d", pos);
    return NULL;
}

/* One step of n streams from `first` on, each at its own position; all rows are wanted, or every other one. */
static void step_streams(const loaded *l, int first, int n, int ahead, bool all, const float *want, float *got) {
    const int64_t width = l->m->s->n_vocab;
    op_batch b = {0};
    for (int k = 0; k < n; k++, b.b.n_tok++) {
        const int stream = (first + k) % STREAMS;
        b.pos[k] = stream_start(stream) + ahead;
        b.token[k] = token_at(l, b.pos[k]);
        b.slot[k] = 2 + stream;
        if (all || k % 2)
            b.out_row[b.b.n_out++] = k;
    }
    be_step *s = op_begin(l->b, &b);
    record(l, s);
    op_end(l->b, s);
    OP_OK(l->b->ops->act_read(l->b->dev, l->logits, 0, b.b.n_out, got, &err_));
    for (int i = 0; i < b.b.n_out; i++) {
        const int k = b.out_row[i];
        char what[80];
        snprintf(what, sizeof what, "%s, row %d of %d, position %d", l->m->s->name, k, n, b.pos[k]);
        op_same_bits(what, got + i * width, logits_at(l, want, b.pos[k]), width);
    }
}

static void streams_equal_prefill(const loaded *l, const float *want, float *got) {
    enum { AHEAD = 3 };
    for (int k = 0; k < STREAMS; k++)
        feed(l, 2 + k, 0, stream_start(k), NULL, NULL);
    for (int n = 2; n <= STREAMS; n++)
        for (int first = 0; first < (quick ? 1 : n_starts()); first++)
            for (int ahead = 0; ahead < (quick ? 1 : AHEAD); ahead++)
                step_streams(l, first, n, ahead, ahead != 1, want, got);
}

static int32_t best_of(const float *v, int n) {
    int32_t best = 0;
    for (int i = 1; i < n; i++)
        best = v[i] > v[best] ? i : best;
    return best;
}

/* One row of slot 1, its token known or the one sampled last. */
static void sample_row(const loaded *l, int pos, int32_t token, bool sample) {
    op_batch b = {.b = {.n_tok = 1, .n_out = 1}, .token = {token}, .pos = {pos}, .slot = {1}};
    be_step *s = op_begin(l->b, &b);
    record(l, s);
    be_sample greedy = {0};
    if (sample)
        l->b->ops->sample(s, l->logits, &greedy);
    op_end(l->b, s);
}

/* Steps that run ahead of what the host has read give what steps with known tokens give. */
static void sampling_ahead(const loaded *l, float *got) {
    enum { N = 6 };
    const int pos = starts[n_starts() - 1] + RUN;
    int32_t id[N];
    if (!l->b->ops->sample)
        return;
    for (int i = 0; i < N; i++) {
        sample_row(l, pos + i, i ? BE_TOKEN_OF(0) : 1, true);
        if (i)
            OP_OK(l->b->ops->sampled(l->b->dev, &id[i - 1], NULL, &err_));
    }
    OP_OK(l->b->ops->sampled(l->b->dev, &id[N - 1], NULL, &err_));
    for (int i = 0; i < N; i++) {
        sample_row(l, pos + i, i ? id[i - 1] : 1, false);
        OP_OK(l->b->ops->act_read(l->b->dev, l->logits, 0, 1, got, &err_));
        assert_int_equal(id[i], best_of(got, l->m->s->n_vocab));
    }
}

static void run_on(const subject *on, const model *m, be_kv_type type, float *want, float *got) {
    const shape *s = m->s;
    op_bench b = op_open(on->dev);
    loaded l = load_model(&b, m, type);
    bool cuda = strcmp(b.ops->name, "cuda") == 0;
    int before = cuda ? cuda_n_fused(b.dev) : 0;
    decode_equals_prefill(&l, want, got);
    sampling_ahead(&l, got);
    int one = cuda ? cuda_n_fused(b.dev) : 0;
    streams_equal_prefill(&l, want, got);
    if (cuda && ((one > before) != s->fused || (cuda_n_fused(b.dev) > one) != s->fused))
        fail_msg("%s: %s", s->name, s->fused ? "the fused step did not run" : "the fused step ran");
    op_close(&b);
}

static void run_shape(const shape *s) {
    static model m;
    make_model(&m, s);
    far_too = s->big;
    float *want = malloc(sizeof *want * (size_t)(ORCD_COUNT(starts) * RUN + STREAMS) * (size_t)s->n_vocab), *got = want;
    assert_non_null(want);
    got += ORCD_COUNT(starts) * RUN * (size_t)s->n_vocab;
    for (int i = 0; i < n_tested; i++) {
        run_on(&tested[i], &m, BE_KV_F16, want, got);
        if (tested[i].bound[ATTN_Q8] > 0)
            run_on(&tested[i], &m, BE_KV_Q8, want, got);
    }
    free(want);
    op_free_memory(&m.memory);
}

static void small_shapes(void **state) {
    (void)state;
    for (size_t i = 0; i < ORCD_COUNT(shapes); i++)
        if (!shapes[i].big)
            run_shape(&shapes[i]);
}

static void big_shapes(void **state) {
    (void)state;
    for (size_t i = 0; i < ORCD_COUNT(shapes); i++)
        if (shapes[i].big && !(quick && i > 3)) {
            run_shape(&shapes[i]);
            print_message("           %s\n", shapes[i].name);
        }
}

static bool all_shapes;

static int run(void) {
    const struct CMUnitTest small[] = {cmocka_unit_test(small_shapes)};
    const struct CMUnitTest all[] = {cmocka_unit_test(small_shapes), cmocka_unit_test(big_shapes)};
    return all_shapes ? cmocka_run_group_tests(all, NULL, NULL) : cmocka_run_group_tests(small, NULL, NULL);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    all_shapes = argc > 1;
    quick = argc > 2 && strcmp(argv[2], "quick") == 0;
    int failed = op_main(argc, argv, run);
    op_free_memory(&kept);
    return failed;
}
