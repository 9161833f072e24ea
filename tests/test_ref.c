/* The reference backend against numbers worked out by hand, and its refusals: it checks the contract of backend.h. */
#include "ops.h"

static be_device *dev;

static int open_ref(void **state) {
    (void)state;
    return be_find("ref")->open(&(be_params){0}, &dev, NULL) != ORCD_OK;
}

static int close_ref(void **state) {
    (void)state;
    dev->ops->close(dev);
    return 0;
}

static void near(const float *got, const double *want, int n) {
    for (int i = 0; i < n; i++)
        if (!(fabs(got[i] - want[i]) <= 1e-6 * fmax(1, fabs(want[i]))))
            fail_msg("value %d is %.9g, not %.9g", i, got[i], want[i]);
}

static be_load vector_of(op_memory *m, uint64_t n, const float *v) {
    be_load l = {.use = BE_USE_VECTOR, .n_part = 1};
    l.part[0] = op_tensor(m, Q_F32, 1, 1, n, v);
    return l;
}

static be_load matrix_of(op_memory *m, be_use use, uint64_t n_mat, uint64_t n_row, uint64_t n_col, const float *w,
                         const float *bias) {
    be_load l = {.use = use, .n_part = 1};
    l.part[0] = op_tensor(m, Q_F32, n_mat, n_row, n_col, w);
    l.has_bias[0] = bias != NULL;
    if (bias)
        l.bias[0] = op_tensor(m, Q_F32, 1, n_mat, n_row, bias);
    return l;
}

static void norm_by_hand(void **state) {
    (void)state;
    op_memory m = {.n = 0};
    op_bench b = op_open(dev);
    op_plain_kv(&b);
    be_load weight = vector_of(&m, 2, (float[]){1, 2}), bias = vector_of(&m, 2, (float[]){10, 20});
    be_norm rms = {BE_NORM_RMS, 0.5f, op_load(&b, &weight), NULL};
    be_norm layer = {BE_NORM_LAYER, 0, rms.weight, op_load(&b, &bias)};
    be_act *x = op_act(&b, BE_ACT_F32, 2, 2, (float[]){3, 4, 1, 3});
    be_act *y = op_act(&b, BE_ACT_FREE, 2, 2, NULL), *z = op_act(&b, BE_ACT_FREE, 2, 2, NULL);
    op_batch batch;
    be_step *s = op_begin_rows(&b, &batch, 2);
    b.ops->norm(s, &rms, x, y);
    b.ops->norm(s, &layer, x, z);
    op_end(&b, s);
    /* mean squares 12.5 and 5; then mean 3.5 and 2, variance 0.25 and 1 */
    near(op_read(&b, y), (double[]){3 / sqrt(13), 8 / sqrt(13), 1 / sqrt(5.5), 6 / sqrt(5.5)}, 4);
    near(op_read(&b, z), (double[]){9, 22, 9, 22}, 4);
    op_close(&b);
    op_free_memory(&m);
}

static void linear_by_hand(void **state) {
    (void)state;
    static const double want[4][2] = {
        {1, -1}, {101, 99}, {0.8411919906082768, -0.15880800939172324}, {0.8413447460685429, -0.15865525393145707}};
    for (int e = BE_EPI_NONE; e <= BE_EPI_GELU_ERF; e++) {
        op_memory m = {.n = 0};
        op_bench b = op_open(dev);
        op_plain_kv(&b);
        be_load w = matrix_of(&m, BE_USE_LINEAR, 1, 2, 3, (float[]){1, 2, 3, -1, 0, 1}, (float[]){-13, -3});
        be_act *x = op_act(&b, BE_ACT_FREE, 1, 3, (float[]){1, 2, 3});
        be_act *y = op_act(&b, BE_ACT_F32, 1, 2, (float[]){100, 100});
        op_batch batch;
        be_step *s = op_begin_rows(&b, &batch, 1);
        b.ops->linear(s, op_load(&b, &w), x, y, (be_epilogue)e);
        op_end(&b, s);
        near(op_read(&b, y), want[e], 2);
        op_close(&b);
        op_free_memory(&m);
    }
}

enum { HEADS = 4, KV_HEADS = 2, DIM = 4, QKV = (HEADS + 2 * KV_HEADS) * DIM };

static be_attn small_attn(const float *inv_freq) {
    return (be_attn){.n_head = HEADS,
                     .n_kv_head = KV_HEADS,
                     .head_dim = DIM,
                     .scale = 0.5f,
                     .rotary = true,
                     .inv_freq = inv_freq,
                     .rope_scale = 2};
}

static void small_kv(op_bench *b, int window) { /* F32, so that keys and values are exact */
    op_kv(b, &(be_kv_spec){.n_layer = 1,
                           .n_kv_head = KV_HEADS,
                           .head_dim = DIM,
                           .window = &window,
                           .type = BE_KV_F32,
                           .n_slot = 2,
                           .n_ctx = 128,
                           .max_tok = 16,
                           .max_out = 16});
}

static void rope_by_hand_turns_halves_and_leaves_values(void **state) {
    (void)state;
    float inv_freq[2] = {1, 0.25f}, x[QKV];
    double want[QKV];
    op_bench b = op_open(dev);
    small_kv(&b, 0);
    be_attn a = small_attn(inv_freq);
    for (int i = 0; i < QKV; i++) {
        int h = i / DIM, d = i % DIM;
        x[i] = (float)(i + 1);
        double angle = 3 * inv_freq[d % 2], first = h * DIM + d % 2 + 1, second = first + 2;
        want[i] = h >= HEADS + KV_HEADS ? i + 1
                  : d < 2               ? 2 * (first * cos(angle) - second * sin(angle))
                                        : 2 * (second * cos(angle) + first * sin(angle));
    }
    be_act *qkv = op_act(&b, BE_ACT_FREE, 1, QKV, x);
    op_batch batch = {0};
    op_rows(&batch, 1, 3, 1);
    be_step *s = op_begin(&b, &batch);
    b.ops->rope(s, &a, qkv);
    op_end(&b, s);
    near(op_read(&b, qkv), want, QKV);
    op_close(&b);
}

/* One key: the output is its value, of the KV head that four query heads share by twos. */
static void attention_by_hand_query_heads_share_kv_heads(void **state) {
    (void)state;
    float x[QKV] = {0};
    double want[HEADS * DIM];
    op_bench b = op_open(dev);
    small_kv(&b, 0);
    be_attn a = small_attn(NULL);
    for (int i = 0; i < KV_HEADS * DIM; i++)
        x[(HEADS + KV_HEADS) * DIM + i] = (float)(i + 1);
    for (int i = 0; i < HEADS * DIM; i++)
        want[i] = i / DIM / 2 * DIM + i % DIM + 1;
    be_act *qkv = op_act(&b, BE_ACT_FREE, 1, QKV, x), *y = op_act(&b, BE_ACT_FREE, 1, HEADS * DIM, NULL);
    op_batch batch = {0};
    op_rows(&batch, 0, 0, 1);
    be_step *s = op_begin(&b, &batch);
    b.ops->kv_write(s, &a, qkv);
    b.ops->attention(s, &a, qkv, y);
    op_end(&b, s);
    near(op_read(&b, y), want, HEADS * DIM);
    op_close(&b);
}

/* Two keys with scores 0 and scale * 4 * 1 * ln 3 / 2 = ln 3, and a sink of ln 4: weights 1/8, 3/8 and 4/8 for nothing.
 */
static void attention_by_hand_scores_and_sink(void **state) {
    (void)state;
    float x[2][QKV] = {{0}}, l3 = (float)(log(3) / 2);
    op_memory m = {.n = 0};
    op_bench b = op_open(dev);
    small_kv(&b, 0);
    be_load sinks = vector_of(&m, HEADS, (float[]){(float)log(4), (float)log(4), (float)log(4), (float)log(4)});
    be_attn a = small_attn(NULL);
    a.sinks = op_load(&b, &sinks);
    double want[HEADS * DIM];
    for (int i = 0; i < HEADS * DIM; i++) {
        x[1][i] = 1;
        want[i] = 8.0 * 1 / 8 + 16.0 * 3 / 8;
    }
    for (int i = 0; i < KV_HEADS * DIM; i++) {
        x[1][HEADS * DIM + i] = l3;
        x[0][(HEADS + KV_HEADS) * DIM + i] = 8;
        x[1][(HEADS + KV_HEADS) * DIM + i] = 16;
    }
    be_act *qkv = op_act(&b, BE_ACT_FREE, 2, QKV, x[0]), *y = op_act(&b, BE_ACT_FREE, 2, HEADS * DIM, NULL);
    op_batch batch = {0};
    op_rows(&batch, 0, 0, 2);
    be_step *s = op_begin(&b, &batch);
    b.ops->kv_write(s, &a, qkv);
    b.ops->attention(s, &a, qkv, y);
    op_end(&b, s);
    near(op_read(&b, y) + HEADS * DIM, want, HEADS * DIM);
    op_close(&b);
    op_free_memory(&m);
}

static void route_by_hand_softmax_over_the_chosen(void **state) {
    (void)state;
    op_memory m = {.n = 0};
    op_bench b = op_open(dev);
    op_plain_kv(&b);
    be_load w = matrix_of(&m, BE_USE_LINEAR, 1, 4, 1, (float[]){1, 3, 2, -1}, (float[]){0, 0, 0, 3});
    be_act *x = op_act(&b, BE_ACT_FREE, 1, 1, (float[]){1}), *r = op_act(&b, BE_ACT_ROUTE, 1, 2, NULL);
    op_batch batch;
    be_step *s = op_begin_rows(&b, &batch, 1);
    b.ops->route(s, op_load(&b, &w), x, 2, r);
    op_end(&b, s);
    /* logits 1 3 2 2: the tie goes to expert 2 */
    near(op_read(&b, r), (double[]){1, exp(1) / (1 + exp(1)), 2, 1 / (1 + exp(1))}, 4);
    op_close(&b);
    op_free_memory(&m);
}

/* gate 8 and up -9 are clamped to 7 and -7; gate -8 is not; the bias of down is inside the weighted sum. */
static void experts_by_hand_clamps_and_weights(void **state) {
    (void)state;
    op_memory m = {.n = 0};
    op_bench b = op_open(dev);
    op_plain_kv(&b);
    be_load w1 = matrix_of(&m, BE_USE_GATE_UP, 2, 1, 1, (float[]){8, -8}, NULL);
    w1.n_part = 2;
    w1.part[1] = op_tensor(&m, Q_F32, 2, 1, 1, (float[]){-9, 9});
    be_load w2 = matrix_of(&m, BE_USE_DOWN, 2, 1, 1, (float[]){1, 1}, (float[]){0.5f, 0.25f});
    be_glu g = {1.702f, 7};
    be_act *x = op_act(&b, BE_ACT_FREE, 1, 1, (float[]){1}), *y = op_act(&b, BE_ACT_F32, 1, 1, (float[]){1000});
    be_act *r = op_act(&b, BE_ACT_ROUTE, 1, 2, (float[]){1, 0.75f, 0, 0.25f});
    be_weight *gate_up = op_load(&b, &w1), *down = op_load(&b, &w2);
    op_batch batch;
    be_step *s = op_begin_rows(&b, &batch, 1);
    b.ops->experts(s, gate_up, down, &g, x, r, y);
    op_end(&b, s);
    double e0 = 7 / (1 + exp(-1.702f * 7)) * -6 + 0.5, e1 = -8 / (1 + exp(1.702f * 8)) * 8 + 0.25;
    near(op_read(&b, y), (double[]){1000 + 0.25 * e0 + 0.75 * e1}, 1);
    op_close(&b);
    op_free_memory(&m);
}

/* ---- refusals ---- */

static void refuse(op_bench *b, op_batch *batch, const char *word) {
    orcd_error err = {.message = ""};
    be_step *s = (be_step *)b;
    batch->b.token = batch->token;
    batch->b.pos = batch->pos;
    batch->b.slot = batch->slot;
    batch->b.out_row = batch->out_row;
    assert_int_equal(b->ops->step_begin(b->dev, b->kv, &batch->b, &s, &err), ORCD_ERR_ARG);
    assert_null(s);
    if (!strstr(err.message, word))
        fail_msg("\"%s\" does not say \"%s\"", err.message, word);
}

static void batches_against_the_contract_are_refused(void **state) {
    (void)state;
    op_bench b = op_open(dev);
    small_kv(&b, 0);
    op_batch empty = {0}, good = {0}, t;
    refuse(&b, &empty, "0 rows");
    op_rows(&good, 0, 5, 3);
    op_rows(&good, 1, 0, 2);
    be_step *s = op_begin(&b, &good);
    op_end(&b, s);
    t = good;
    op_rows(&t, 1, 2, 12);
    refuse(&b, &t, "17 rows");
    t = good;
    op_rows(&t, 0, 8, 1);
    refuse(&b, &t, "earlier slot");
    t = good;
    t.pos[2] = 8;
    refuse(&b, &t, "does not continue");
    t = good;
    t.pos[4] = 128;
    t.pos[3] = 127;
    refuse(&b, &t, "outside the context");
    t = good;
    t.pos[0] = -1;
    refuse(&b, &t, "outside the context");
    t = good;
    t.slot[3] = t.slot[4] = 2;
    refuse(&b, &t, "no such slot");
    t = good;
    t.token[1] = BE_TOKEN_OF(0);
    refuse(&b, &t, "sampled");
    t = good;
    t.b.n_out = 2;
    t.out_row[0] = t.out_row[1] = 3;
    refuse(&b, &t, "ascend");
    t.out_row[1] = 5;
    refuse(&b, &t, "ascend");
    b.ops->kv_map(b.kv, BE_POOL_FULL, 1, 0, -1);
    refuse(&b, &good, "not mapped");
    op_close(&b);
}

/* A window frees the pages before it, and only those. */
static void pages_before_the_window_need_no_mapping(void **state) {
    (void)state;
    op_bench b = op_open(dev);
    small_kv(&b, 16);
    b.ops->kv_map(b.kv, BE_POOL_WINDOW, 0, 0, -1);
    op_batch t = {0};
    op_rows(&t, 0, 79, 1);
    be_step *s = op_begin(&b, &t);
    op_end(&b, s);
    t = (op_batch){0};
    op_rows(&t, 0, 78, 2); /* position 63 is visible */
    refuse(&b, &t, "not mapped");
    op_close(&b);
}

static void a_token_outside_the_vocabulary_fails_the_step(void **state) {
    (void)state;
    op_memory m = {.n = 0};
    op_bench b = op_open(dev);
    op_plain_kv(&b);
    be_load table = matrix_of(&m, BE_USE_EMBED, 1, 2, 1, (float[]){1, 2}, NULL);
    be_weight *w = op_load(&b, &table);
    be_act *y = op_act(&b, BE_ACT_F32, 1, 1, NULL);
    op_batch t = {0};
    op_rows(&t, 0, 0, 1);
    t.token[0] = 2;
    be_step *s = op_begin(&b, &t);
    be_embed(s, w, NULL, y);
    orcd_error err;
    assert_int_equal(b.ops->step_end(s, &err), ORCD_ERR_ARG);
    op_close(&b);
    op_free_memory(&m);
}

static void weights_that_do_not_fit_are_refused(void **state) {
    (void)state;
    op_memory m = {.n = 0};
    uint64_t seed = 1;
    be_load good = {.use = BE_USE_LINEAR}, l;
    op_add_part(&good, &m, &seed, Q_Q8_0, 1, 4, 64, true);
    op_add_part(&good, &m, &seed, Q_F32, 1, 2, 64, false);
    be_weight *w = NULL;
    orcd_error err;
    OP_OK(dev->ops->load(dev, &good, &w, &err_));
    assert_true(w->n_row == 6 && w->n_col == 64 && w->n_mat == 1 && w->bytes == dev->ops->load_bytes(dev, &good));
    dev->ops->unload(dev, w);
    dev->ops->unload(dev, NULL);
#define REFUSED(change, code)                                                                                          \
    do {                                                                                                               \
        l = good;                                                                                                      \
        change;                                                                                                        \
        w = (be_weight *)&l;                                                                                           \
        assert_int_equal(dev->ops->load(dev, &l, &w, &err), code);                                                     \
        assert_null(w);                                                                                                \
    } while (0)
    REFUSED(l.part[0].n_col = 48, ORCD_ERR_ARG);
    REFUSED(l.part[1].n_col = 32, ORCD_ERR_ARG);
    REFUSED(l.part[0].type = (q_type)4, ORCD_ERR_UNSUPPORTED);
    REFUSED(l.bias[0].n_col = 3, ORCD_ERR_ARG);
    REFUSED(l.part[0].n_mat = 2, ORCD_ERR_ARG);
    REFUSED(l.n_part = 4, ORCD_ERR_ARG);
    REFUSED(l.n_part = 0, ORCD_ERR_ARG);
    REFUSED(l.use = BE_USE_VECTOR, ORCD_ERR_ARG);
    REFUSED(l.use = BE_USE_GATE_UP, ORCD_ERR_ARG);
    op_free_memory(&m);
}

static void q8_caches_and_rows_outside_are_refused(void **state) {
    (void)state;
    int window = 0;
    orcd_error err;
    be_kv *kv = (be_kv *)&window;
    be_kv_spec spec = {.n_layer = 1,
                       .n_kv_head = 1,
                       .head_dim = 4,
                       .window = &window,
                       .type = BE_KV_Q8,
                       .n_slot = 1,
                       .n_ctx = 64,
                       .n_page = {1, 0},
                       .max_tok = 1};
    assert_int_equal(dev->ops->kv_open(dev, &spec, &kv, &err), ORCD_ERR_UNSUPPORTED);
    assert_null(kv);
    op_bench b = op_open(dev);
    be_act *a = op_act(&b, BE_ACT_F32, 2, 4, NULL);
    float v[16];
    assert_int_equal(dev->ops->act_read(dev, a, 1, 2, v, &err), ORCD_ERR_ARG);
    assert_int_equal(dev->ops->act_read(dev, a, -1, 1, v, &err), ORCD_ERR_ARG);
    assert_int_equal(dev->ops->act_write(dev, a, 3, 0, v, &err), ORCD_ERR_ARG);
    op_close(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norm_by_hand),
        cmocka_unit_test(linear_by_hand),
        cmocka_unit_test(rope_by_hand_turns_halves_and_leaves_values),
        cmocka_unit_test(attention_by_hand_query_heads_share_kv_heads),
        cmocka_unit_test(attention_by_hand_scores_and_sink),
        cmocka_unit_test(route_by_hand_softmax_over_the_chosen),
        cmocka_unit_test(experts_by_hand_clamps_and_weights),
        cmocka_unit_test(batches_against_the_contract_are_refused),
        cmocka_unit_test(pages_before_the_window_need_no_mapping),
        cmocka_unit_test(a_token_outside_the_vocabulary_fails_the_step),
        cmocka_unit_test(weights_that_do_not_fit_are_refused),
        cmocka_unit_test(q8_caches_and_rows_outside_are_refused),
    };
    return cmocka_run_group_tests(tests, open_ref, close_ref);
}
