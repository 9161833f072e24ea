/* Operations on rows, every backend against the reference: linear, embed, norm, gather, route, experts: op x weight
 * type x shape, and that a row's bits do not depend on its batch. Run as `test_ops [BACKEND]`; see ops.h. */
#include "ops.h"

/* ---- linear ---- */

typedef struct linear_case {
    be_load load;
    int n_tok;
    const float *x, *y; /* [n_tok][n_col]; [n_tok][n_row]: what an ADD adds to */
    be_epilogue epilogue;
    be_form form; /* of the output */
} linear_case;

static const float *run_linear(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const linear_case *c = arg;
    op_plain_kv(b);
    be_weight *w = op_load(b, &c->load);
    be_act *x = op_act(b, BE_ACT_FREE, c->n_tok, w->n_col, c->x);
    be_act *y = op_act(b, c->form, c->n_tok, w->n_row, c->epilogue == BE_EPI_ADD ? c->y : NULL);
    op_batch batch;
    be_step *s = op_begin_rows(b, &batch, c->n_tok);
    b->ops->linear(s, w, x, y, c->epilogue);
    op_end(b, s);
    *n_row = y->n_row;
    *width = w->n_row;
    return op_read(b, y);
}

/* Inputs and additions of a case, normal, with outliers 40 times as large where n_tok is odd; free_linear frees them.
 */
static void fill_linear(linear_case *c, uint64_t *seed) {
    size_t n_row = 0, n_col = c->load.part[0].n_col;
    for (int i = 0; i < c->load.n_part; i++)
        n_row += c->load.part[i].n_row;
    float *x = malloc((size_t)c->n_tok * n_col * sizeof *x), *y = malloc((size_t)c->n_tok * n_row * sizeof *y);
    assert_true(x && y);
    t_fill_normal(seed, x, (size_t)c->n_tok * n_col);
    for (size_t i = 0; c->n_tok % 2 && c->n_tok > 1 && i < (size_t)c->n_tok * n_col; i += 1 + t_below(seed, 200))
        x[i] *= 40;
    t_fill_normal(seed, y, (size_t)c->n_tok * n_row);
    c->x = x;
    c->y = y;
}

static void free_linear(linear_case *c) {
    free((void *)c->x);
    free((void *)c->y);
}

/* Lists of lengths without a common divisor, walked side by side, so that their values meet in many pairs. */
static void linear_every_type_shape_and_epilogue(void **state) {
    (void)state;
    static const int rows[] = {1, 7, 16, 33, 64, 100, 200}, wide[] = {256, 512, 2816};
    static const int cols[] = {32, 96, 160, 2880, 64};
    static const struct {
        be_epilogue epilogue;
        be_form form;
    } out[] = {{BE_EPI_NONE, BE_ACT_F32},       {BE_EPI_ADD, BE_ACT_F32},       {BE_EPI_NONE, BE_ACT_FREE},
               {BE_EPI_GELU_TANH, BE_ACT_FREE}, {BE_EPI_GELU_ERF, BE_ACT_FREE}, {BE_EPI_GELU_TANH, BE_ACT_F32}};
    uint64_t seed = 1;
    for (size_t i = 0, n = 0; i < q_count(); i++) {
        q_type type = q_at(i)->type;
        for (size_t k = 0; k < 3 * ORCD_COUNT(token_counts); k += case_step, n++) {
            int n_row = rows[n % ORCD_COUNT(rows)];
            int n_col = q_at(i)->block_len == 256 ? wide[n % ORCD_COUNT(wide)] : cols[n % ORCD_COUNT(cols)];
            op_memory m = {.n = 0};
            linear_case c = {.load = {.use = BE_USE_LINEAR},
                             .n_tok = token_counts[k % ORCD_COUNT(token_counts)],
                             .epilogue = out[(n + k / 8) % ORCD_COUNT(out)].epilogue,
                             .form = out[(n + k / 8) % ORCD_COUNT(out)].form};
            op_add_part(&c.load, &m, &seed, type, 1, (uint64_t)n_row, (uint64_t)n_col, n % 3 != 0);
            fill_linear(&c, &seed);
            char what[96];
            snprintf(what, sizeof what, "linear %s: %d tok, %d x %d, epilogue %d, form %d", q_at(i)->name, c.n_tok,
                     n_row, n_col, c.epilogue, c.form);
            compare(is_dense(type) ? DENSE : QUANT, what, run_linear, &c);
            free_linear(&c);
            op_free_memory(&m);
        }
    }
}

static void linear_stacked_parts_of_different_types(void **state) {
    (void)state;
    static const struct {
        q_type type[3];
        int n_row[3], n_col;
        bool bias[3];
    } row[] = {{{Q_Q8_0, Q_Q8_0, Q_Q8_0}, {256, 64, 64}, 96, {true, true, true}},
               {{Q_MXFP4, Q_Q8_0, Q_BF16}, {64, 64, 64}, 160, {true, false, true}},
               {{Q_Q4_K, Q_Q6_K, Q_F16}, {40, 8, 24}, 512, {false, false, false}},
               {{Q_F32, Q_Q4_0, Q_Q5_1}, {33, 17, 1}, 32, {false, true, false}},
               {{Q_Q5_K, Q_Q4_K, Q_Q5_0}, {128, 64, 64}, 256, {true, true, false}},
               {{Q_BF16, Q_BF16, Q_F16}, {4096, 512, 512}, 64, {true, true, true}}};
    uint64_t seed = 2;
    for (size_t i = 0; i < ORCD_COUNT(row); i++) {
        for (int n_part = 2; n_part <= 3; n_part++) {
            op_memory m = {.n = 0};
            linear_case c = {.load = {.use = BE_USE_LINEAR}, .n_tok = i % 2 ? 1 : 65, .form = BE_ACT_FREE};
            bool dense = true;
            for (int p = 0; p < n_part; p++) {
                op_add_part(&c.load, &m, &seed, row[i].type[p], 1, (uint64_t)row[i].n_row[p], (uint64_t)row[i].n_col,
                            row[i].bias[p]);
                dense = dense && is_dense(row[i].type[p]);
            }
            fill_linear(&c, &seed);
            compare(dense ? DENSE : QUANT, "linear stacked", run_linear, &c);
            free_linear(&c);
            op_free_memory(&m);
        }
    }
}

/* Weight rows from 2^-14 to 2^13: block scales far from 1. Outputs are compared row of the weight by row. */
static const float *run_wild(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    float *y = (float *)run_linear(b, arg, n_row, width);
    for (int64_t i = 0; i < *n_row * *width; i++)
        y[i] = ldexpf(y[i], 14 - (int)(i % *width));
    return y;
}

static void linear_rows_of_very_different_size(void **state) {
    (void)state;
    enum { ROWS = 28, COLS = 256 };
    uint64_t seed = 3;
    for (size_t i = 0; i < q_count(); i++) {
        op_memory m = {.n = 0};
        linear_case c = {.load = {.use = BE_USE_LINEAR, .n_part = 1}, .n_tok = 3, .form = BE_ACT_F32};
        float w[ROWS * COLS];
        for (int j = 0; j < ROWS * COLS; j++)
            w[j] = ldexpf(t_normal(&seed), j / COLS - 14);
        c.load.part[0] = op_tensor(&m, q_at(i)->type, 1, ROWS, COLS, w);
        fill_linear(&c, &seed);
        compare(is_dense(q_at(i)->type) ? DENSE : QUANT, "linear wild rows", run_wild, &c);
        free_linear(&c);
        op_free_memory(&m);
    }
}

/* ---- embed, norm, gather ---- */

typedef struct embed_case {
    be_load table, positions;
    bool has_positions;
} embed_case;

static const float *run_embed(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const embed_case *c = arg;
    op_plain_kv(b);
    be_weight *table = op_load(b, &c->table), *positions = c->has_positions ? op_load(b, &c->positions) : NULL;
    be_act *y = op_act(b, BE_ACT_F32, 130, table->n_col, NULL);
    op_batch batch = {0};
    op_rows(&batch, 2, 60, 100);
    op_rows(&batch, 0, 0, 30);
    batch.token[0] = 0;
    batch.token[1] = (int32_t)table->n_row - 1;
    be_step *s = op_begin(b, &batch);
    b->ops->embed(s, table, positions, y);
    op_end(b, s);
    *n_row = y->n_row;
    *width = y->width;
    return op_read(b, y);
}

static void embed_every_type_with_and_without_positions(void **state) {
    (void)state;
    uint64_t seed = 4;
    for (size_t i = 0; i < 2 * q_count(); i++) {
        const q_traits *q = q_at(i / 2);
        uint64_t n_col = q->block_len == 256 ? 512 : i % 3 ? 160 : 2880;
        op_memory m = {.n = 0};
        embed_case c = {.table = {.use = BE_USE_EMBED, .n_part = 1},
                        .positions = {.use = BE_USE_EMBED, .n_part = 1},
                        .has_positions = i % 2};
        c.table.part[0] = op_random_tensor(&m, &seed, q->type, 1, 37, n_col, 1);
        c.positions.part[0] = op_random_tensor(&m, &seed, i % 4 == 1 ? q->type : Q_F32, 1, 192, n_col, 1);
        compare(EMBED, "embed", run_embed, &c);
        op_free_memory(&m);
    }
}

typedef struct norm_case {
    be_norm_kind kind;
    int n_tok;
    be_load weight, bias;
    bool has_bias;
    const float *x;
} norm_case;

static const float *run_norm(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const norm_case *c = arg;
    op_plain_kv(b);
    be_norm n = {.kind = c->kind, .eps = 1e-5f, .weight = op_load(b, &c->weight)};
    n.bias = c->has_bias ? op_load(b, &c->bias) : NULL;
    be_act *x = op_act(b, BE_ACT_F32, c->n_tok, n.weight->n_col, c->x);
    be_act *y = op_act(b, BE_ACT_FREE, c->n_tok, n.weight->n_col, NULL);
    op_batch batch;
    be_step *s = op_begin_rows(b, &batch, c->n_tok);
    b->ops->norm(s, &n, x, y);
    op_end(b, s);
    *n_row = y->n_row;
    *width = y->width;
    return op_read(b, y);
}

static void norm_both_kinds_all_widths(void **state) {
    (void)state;
    static const int widths[] = {32, 96, 160, 768, 2880};
    static const q_type types[] = {Q_F32, Q_BF16, Q_F16};
    uint64_t seed = 5;
    for (size_t i = 0, n = 0; i < ORCD_COUNT(widths); i++) {
        for (size_t k = 0; k < 3 * ORCD_COUNT(token_counts); k += case_step, n++) {
            op_memory m = {.n = 0};
            uint64_t width = (uint64_t)widths[i];
            norm_case c = {
                .kind = k % 3 ? BE_NORM_LAYER : BE_NORM_RMS, .n_tok = token_counts[k % 8], .has_bias = k % 3 == 2};
            c.weight = op_vector(&m, &seed, types[n % 3], width, 1, 0.3f);
            c.bias = op_vector(&m, &seed, types[(n + 1) % 3], width, 0, 0.3f);
            float *x = malloc((size_t)c.n_tok * width * sizeof *x);
            assert_non_null(x);
            float size = ldexpf(1, (int)(n % 5) * 5 - 12),
                  shift = n % 2 ? 8 : 0; /* tiny rows, large rows, shifted rows */
            for (size_t j = 0; j < (size_t)c.n_tok * width; j++)
                x[j] = size * (t_normal(&seed) + shift);
            c.x = x;
            compare(NORM, c.kind == BE_NORM_RMS ? "norm rms" : "norm layer", run_norm, &c);
            free(x);
            op_free_memory(&m);
        }
    }
}

static void gather_out_takes_exactly_the_wanted_rows(void **state) {
    (void)state;
    static const struct {
        int n, row[6];
    } want[] = {{0, {0}}, {1, {0}}, {1, {129}}, {3, {0, 64, 129}}, {6, {1, 2, 3, 63, 64, 65}}};
    enum { N = 130, WIDTH = 96 };
    uint64_t seed = 6;
    float x[N * WIDTH];
    t_fill_normal(&seed, x, N * WIDTH);
    for (int i = 0; i < n_tested; i++) {
        for (size_t k = 0; k < ORCD_COUNT(want); k++) {
            op_bench b = op_open(tested[i].dev);
            op_plain_kv(&b);
            be_act *in = op_act(&b, BE_ACT_F32, N, WIDTH, x), *out = op_act(&b, BE_ACT_F32, 6, WIDTH, NULL);
            op_batch batch = {0};
            op_rows(&batch, 1, 0, N);
            batch.b.n_out = want[k].n;
            for (int j = 0; j < want[k].n; j++)
                batch.out_row[j] = want[k].row[j];
            be_step *s = op_begin(&b, &batch);
            b.ops->gather_out(s, in, out);
            op_end(&b, s);
            assert_int_equal(out->n_row, want[k].n);
            const float *got = op_read(&b, out);
            for (int j = 0; j < want[k].n; j++)
                op_same_bits("gather", got + j * WIDTH, x + want[k].row[j] * WIDTH, WIDTH);
            op_close(&b);
        }
    }
}

/* ---- router ---- */

typedef struct route_case {
    be_load load;
    int n_tok, top_k;
    const float *x;
} route_case;

/* Chosen weights as a dense [n_tok][n_expert] matrix, zeros elsewhere: the order of the chosen does not matter. */
static const float *run_route(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const route_case *c = arg;
    op_plain_kv(b);
    be_weight *w = op_load(b, &c->load);
    be_act *x = op_act(b, BE_ACT_FREE, c->n_tok, w->n_col, c->x),
           *r = op_act(b, BE_ACT_ROUTE, c->n_tok, c->top_k, NULL);
    op_batch batch;
    be_step *s = op_begin_rows(b, &batch, c->n_tok);
    b->ops->route(s, w, x, c->top_k, r);
    op_end(b, s);
    assert_int_equal(r->n_row, c->n_tok);
    *n_row = c->n_tok;
    *width = w->n_row;
    const float *pair = op_read(b, r);
    float *dense = calloc((size_t)(*n_row * *width), sizeof *dense);
    assert_non_null(dense);
    b->read[b->n_read++] = dense;
    for (int t = 0; t < c->n_tok; t++) {
        double sum = 0;
        for (int k = 0; k < c->top_k; k++, pair += 2) {
            assert_true(pair[0] >= 0 && pair[0] < (float)w->n_row && pair[0] == floorf(pair[0]));
            assert_true(dense[t * *width + (int)pair[0]] == 0);
            dense[t * *width + (int)pair[0]] = pair[1];
            sum += pair[1];
        }
        assert_true(fabs(sum - 1) < 1e-5);
    }
    return dense;
}

static void route_chooses_the_same_experts(void **state) {
    (void)state;
    static const int experts[] = {4, 8, 32, 128}, top[] = {4, 2, 4, 1}, cols[] = {96, 2880, 160, 32, 768};
    static const q_type types[] = {Q_F32, Q_BF16, Q_F16};
    uint64_t seed = 9;
    for (size_t n = 0; n < 5 * ORCD_COUNT(token_counts); n++) {
        op_memory m = {.n = 0};
        route_case c = {.load = {.use = BE_USE_LINEAR}, .n_tok = token_counts[n % 8], .top_k = top[n % 4]};
        int n_col = cols[n % 5];
        op_add_part(&c.load, &m, &seed, types[n % 3], 1, (uint64_t)experts[n % 4], (uint64_t)n_col, n % 7 != 0);
        float *x = malloc((size_t)c.n_tok * (size_t)n_col * sizeof *x);
        assert_non_null(x);
        for (int t = 0; t < c.n_tok; t++)
            do
                t_fill_normal(&seed, x + t * n_col, (size_t)n_col);
            while (!op_clear_row(&c.load, c.top_k, x + t * n_col));
        c.x = x;
        compare(ROUTE, "route", run_route, &c);
        free(x);
        op_free_memory(&m);
    }
}

/* A zero matrix leaves the biases: exact ties across the border of the chosen. */
static void route_ties_take_the_lower_id(void **state) {
    (void)state;
    static const struct {
        float bias[8];
        int top_k, chosen[4];
    } row[] = {{{0, 0, 0, 0, 0, 0, 0, 0}, 4, {0, 1, 2, 3}},
               {{1, 2, 1, 2, 1, 2, 1, 2}, 4, {1, 3, 5, 7}},
               {{1, 2, 1, 1, 3, 1, 1, 1}, 4, {4, 1, 0, 2}},
               {{-1, -1, -1, -1, -1, -1, -1, 5}, 2, {7, 0}}};
    enum { COLS = 64, N = 5 };
    uint64_t seed = 10;
    float zero[8 * COLS] = {0}, x[N * COLS];
    t_fill_normal(&seed, x, N * COLS);
    for (int i = 0; i < n_tested; i++) {
        for (size_t k = 0; k < ORCD_COUNT(row); k++) {
            int64_t n_row, width;
            op_memory m = {.n = 0};
            route_case c = {.load = {.use = BE_USE_LINEAR, .n_part = 1}, .n_tok = N, .top_k = row[k].top_k, .x = x};
            c.load.part[0] = op_tensor(&m, Q_F32, 1, 8, COLS, zero);
            c.load.has_bias[0] = true;
            c.load.bias[0] = op_tensor(&m, Q_F32, 1, 1, 8, row[k].bias);
            op_bench b = op_open(tested[i].dev);
            const float *dense = run_route(&b, &c, &n_row, &width);
            for (int t = 0; t < N; t++) {
                double sum = 0;
                for (int j = 0; j < row[k].top_k; j++)
                    sum += exp(row[k].bias[row[k].chosen[j]]);
                for (int j = 0; j < row[k].top_k; j++) {
                    int e = row[k].chosen[j];
                    assert_true(fabs(dense[t * 8 + e] - exp(row[k].bias[e]) / sum) < 1e-5);
                }
            }
            op_close(&b);
            op_free_memory(&m);
        }
    }
}

/* ---- experts ---- */

typedef struct experts_case {
    be_load gate_up, down;
    int n_tok, top_k;
    const float *x, *y, *route;
} experts_case;

static const float *run_experts(op_bench *b, const void *arg, int64_t *n_row, int64_t *width) {
    const experts_case *c = arg;
    op_plain_kv(b);
    be_weight *w1 = op_load(b, &c->gate_up), *w2 = op_load(b, &c->down);
    be_act *x = op_act(b, BE_ACT_FREE, c->n_tok, w1->n_col, c->x);
    be_act *route = op_act(b, BE_ACT_ROUTE, c->n_tok, c->top_k, c->route);
    be_act *y = op_act(b, BE_ACT_F32, c->n_tok, w2->n_row, c->y);
    be_glu g = {1.702f, 7.0f};
    op_batch batch;
    be_step *s = op_begin_rows(b, &batch, c->n_tok);
    b->ops->experts(s, w1, w2, &g, x, route, y);
    op_end(b, s);
    *n_row = y->n_row;
    *width = y->width;
    return op_read(b, y);
}

enum routing { MIXED, ALL_ON_ONE, ONE_IDLE, N_ROUTINGS };

/* top_k different experts a row with weights that sum to 1. */
static void fill_route(float *pair, int n_tok, int top_k, int n_expert, enum routing how, uint64_t *seed) {
    for (int t = 0; t < n_tok; t++, pair += 2 * top_k) {
        int id[128];
        double sum = 0;
        for (int e = 0; e < n_expert; e++)
            id[e] = e;
        for (int k = 0; k < top_k; k++) {
            int spare = how == ONE_IDLE ? 1 : 0; /* the last expert of the list, n_expert - 1, is never drawn */
            int j = k + (int)t_below(seed, (uint64_t)(n_expert - spare - k));
            if (how == ALL_ON_ONE && k == 0)
                j = n_expert / 2;
            int swap = id[k];
            id[k] = id[j];
            id[j] = swap;
            pair[2 * k] = (float)id[k];
            pair[2 * k + 1] = 0.1f + fabsf(t_normal(seed));
            sum += pair[2 * k + 1];
        }
        for (int k = 0; k < top_k; k++)
            pair[2 * k + 1] = (float)(pair[2 * k + 1] / sum);
    }
}

/* Inputs four times as large as normal ones reach the clamps at 7. */
static void fill_experts(experts_case *c, int n_expert, enum routing how, float size, uint64_t *seed) {
    size_t n_tok = (size_t)c->n_tok, n_col = c->gate_up.part[0].n_col, n_out = c->down.part[0].n_row;
    float *x = malloc(n_tok * n_col * sizeof *x), *y = malloc(n_tok * n_out * sizeof *y);
    float *route = malloc(n_tok * (size_t)c->top_k * 2 * sizeof *route);
    assert_true(x && y && route);
    for (size_t i = 0; i < n_tok * n_col; i++)
        x[i] = size * t_normal(seed);
    for (size_t i = 0; i < n_tok * n_out; i++)
        y[i] = 0.1f * t_normal(seed);
    fill_route(route, c->n_tok, c->top_k, n_expert, how, seed);
    c->x = x;
    c->y = y;
    c->route = route;
}

static void free_experts(experts_case *c) {
    free((void *)c->x);
    free((void *)c->y);
    free((void *)c->route);
}

static void add_experts(experts_case *c, op_memory *m, uint64_t *seed, q_type t1, q_type t2, int n_expert, int n_embd,
                        int n_ff, bool bias) {
    c->gate_up.use = BE_USE_GATE_UP;
    c->down.use = BE_USE_DOWN;
    for (int part = 0; part < 2; part++)
        op_add_part(&c->gate_up, m, seed, t1, (uint64_t)n_expert, (uint64_t)n_ff, (uint64_t)n_embd, bias);
    op_add_part(&c->down, m, seed, t2, (uint64_t)n_expert, (uint64_t)n_embd, (uint64_t)n_ff, bias);
}

static void experts_every_type_shape_and_routing(void **state) {
    (void)state;
    static const struct {
        int n_embd, n_ff, n_expert, top_k;
    } shape[] = {{96, 32, 8, 2}, {32, 96, 4, 4}, {160, 64, 32, 4}, {64, 160, 5, 1}, {2880, 32, 4, 2}, {96, 2880, 3, 2}},
      big[] = {{256, 512, 4, 2}, {512, 256, 8, 4}}; /* K types: both widths are whole super-blocks */
    uint64_t seed = 11;
    for (size_t i = 0, n = 0; i < q_count(); i++) {
        q_type type = q_at(i)->type;
        bool k_type = q_at(i)->block_len == 256;
        for (size_t k = 0; k < ORCD_COUNT(token_counts); k += case_step, n++) {
            int at = (int)(k_type ? n % ORCD_COUNT(big) : n % ORCD_COUNT(shape));
            int n_embd = k_type ? big[at].n_embd : shape[at].n_embd, n_ff = k_type ? big[at].n_ff : shape[at].n_ff;
            int n_expert = k_type ? big[at].n_expert : shape[at].n_expert;
            op_memory m = {.n = 0};
            experts_case c = {.n_tok = token_counts[k], .top_k = k_type ? big[at].top_k : shape[at].top_k};
            /* every third case: down has another type */
            q_type down = n % 3 ? type : k_type ? Q_Q8_0 : Q_F16;
            enum routing how = (enum routing)(n % N_ROUTINGS);
            add_experts(&c, &m, &seed, type, down, n_expert, n_embd, n_ff, n % 4 != 0);
            fill_experts(&c, n_expert, c.top_k < n_expert ? how : MIXED, n % 2 ? 1 : 4, &seed);
            char what[96];
            snprintf(what, sizeof what, "experts %s: %d tok, %d of %d, %d x %d, routing %d", q_at(i)->name, c.n_tok,
                     c.top_k, n_expert, n_embd, n_ff, (int)how);
            compare(is_dense(type) && is_dense(down) ? EXPERTS_DENSE : EXPERTS_QUANT, what, run_experts, &c);
            free_experts(&c);
            op_free_memory(&m);
        }
    }
}

/* gpt-oss's own widths, 3 experts. Random codes under scales near 2^-7 are as good as packed weights and much sooner
 * made. */
static experts_case experts_of_gpt_oss(op_memory *m, uint64_t *seed) {
    experts_case c = {
        .gate_up = {.use = BE_USE_GATE_UP, .n_part = 2}, .down = {.use = BE_USE_DOWN, .n_part = 1}, .top_k = 2};
    float zero[32] = {0};
    for (int part = 0; part < 3; part++) {
        size_t n_block = 3 * 2880 * 90;
        uint8_t *data = mmap(NULL, n_block * 17, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        assert_true(data != MAP_FAILED);
        m->at[m->n] = data;
        m->bytes[m->n++] = n_block * 17;
        for (size_t i = 0; i < n_block * 17; i++)
            data[i] = (uint8_t)(i % 17 ? t_random(seed) >> 20 : 119 + t_below(seed, 3));
        mf_tensor t = op_tensor(m, Q_MXFP4, 1, 1, 32, zero);
        t.n_col = t.n_row = 2880;
        t.n_mat = 3;
        t.data = t.view.base = data;
        t.view.row_bytes = 90 * 17;
        t.view.mat_bytes = 2880 * 90 * 17;
        *(part < 2 ? &c.gate_up.part[part] : &c.down.part[0]) = t;
    }
    return c;
}

static void experts_mxfp4_2880_by_2880(void **state) {
    (void)state;
    uint64_t seed = 12;
    op_memory m = {.n = 0};
    experts_case c = experts_of_gpt_oss(&m, &seed);
    for (int n_tok = 1; n_tok <= 4; n_tok += 3) {
        c.n_tok = n_tok;
        fill_experts(&c, 3, MIXED, 1, &seed);
        compare(EXPERTS_QUANT, "experts 2880 x 2880", run_experts, &c);
        free_experts(&c);
    }
    op_free_memory(&m);
}

/* Blocks 2^60 smaller than their neighbours: a few, which may count as zero, and many, for which devices must have
 * another form of MXFP4. */
static void experts_mxfp4_scales_far_apart(void **state) {
    (void)state;
    static const int n_tok[] = {1, 9, 150};
    uint64_t seed = 15;
    for (size_t i = 0; i < 2 * ORCD_COUNT(n_tok); i++) {
        const size_t every = i % 2 ? 3 : 100;
        op_memory m = {.n = 0};
        experts_case c = {.n_tok = n_tok[i / 2], .top_k = 2};
        add_experts(&c, &m, &seed, Q_MXFP4, Q_MXFP4, 4, 96, 64, false);
        for (int part = 0; part < 3; part++)
            for (size_t b = 0; b < m.bytes[part] / 17; b += every)
                ((uint8_t *)m.at[part])[b * 17] = 60;
        fill_experts(&c, 4, MIXED, 1, &seed);
        compare(EXPERTS_QUANT, "experts of far scales", run_experts, &c);
        free_experts(&c);
        op_free_memory(&m);
    }
}

/* ---- a row alone and a row in any batch ---- */

/* The whole of a row operation against the same rows in pieces of every size: the same bits. */
static void linear_rows_do_not_depend_on_the_batch(void **state) {
    (void)state;
    enum { N = 130 };
    uint64_t seed = 13;
    for (size_t n = 0; n < 3 * q_count(); n++) {
        const size_t i = n / 3;
        op_memory m = {.n = 0};
        linear_case c = {.load = {.use = BE_USE_LINEAR},
                         .n_tok = N,
                         .form = BE_ACT_F32,
                         .epilogue = i % 2 ? BE_EPI_ADD : BE_EPI_NONE};
        const int narrow = q_at(i)->block_len == 256 ? 512 : 160, n_col = n % 3 == 0   ? narrow
                                                                          : n % 3 == 1 ? 2880
                                                                                       : 4096;
        if (n_col % q_at(i)->block_len != 0)
            continue;
        op_add_part(&c.load, &m, &seed, q_at(i)->type, 1, 72, (uint64_t)n_col, true);
        fill_linear(&c, &seed);
        for (int k = 0; k < n_tested; k++) {
            int64_t n_row, width;
            op_bench b = op_open(tested[k].dev);
            const float *whole = run_linear(&b, &c, &n_row, &width);
            for (size_t j = 0; j < ORCD_COUNT(token_counts); j += case_step) {
                linear_case p = c;
                for (int at = 0; at<N; at += p.n_tok> 43 ? p.n_tok : 43) { /* of small pieces, a few */
                    p.n_tok = token_counts[j] < N - at ? token_counts[j] : N - at;
                    p.x = c.x + at * n_col;
                    p.y = c.y + at * width;
                    op_bench q = op_open(tested[k].dev);
                    const float *piece = run_linear(&q, &p, &n_row, &width);
                    op_same_bits(q_at(i)->name, piece, whole + at * width, n_row * width);
                    op_close(&q);
                }
            }
            op_close(&b);
        }
        free_linear(&c);
        op_free_memory(&m);
    }
}

/* gpt-oss's widths, whose kernels differ with the rows, on GPUs, where that is soon done: the first and the last of N
 * rows alone and in company. */
enum { GPT_OSS_ROWS = 192 };
static const int gpt_oss_rows[] = {1, 9, 16, 24, 32, 60, 64, 97, 128};

static void experts_of_gpt_oss_in_any_batch(const subject *on, uint64_t *seed) {
    int64_t n_row, width;
    op_memory m = {.n = 0};
    experts_case c = experts_of_gpt_oss(&m, seed);
    c.n_tok = GPT_OSS_ROWS;
    fill_experts(&c, 3, MIXED, 1, seed);
    op_bench b = op_open(on->dev);
    const float *whole = run_experts(&b, &c, &n_row, &width);
    for (size_t j = 0; j < 2 * ORCD_COUNT(gpt_oss_rows); j++) {
        experts_case p = c;
        p.n_tok = gpt_oss_rows[j / 2];
        int at = j % 2 ? GPT_OSS_ROWS - p.n_tok : 0;
        p.x = c.x + at * width, p.y = c.y + at * width, p.route = c.route + at * 2 * c.top_k;
        op_bench q = op_open(on->dev);
        op_same_bits("experts of gpt-oss", run_experts(&q, &p, &n_row, &width), whole + at * width, p.n_tok * width);
        op_close(&q);
    }
    op_close(&b);
    free_experts(&c);
    op_free_memory(&m);
}

static void linear_of_gpt_oss_in_any_batch(const subject *on, int out, int in, int epilogue, uint64_t *seed) {
    int64_t n_row, width;
    op_memory m = {.n = 0};
    linear_case c = {
        .load = {.use = BE_USE_LINEAR}, .n_tok = GPT_OSS_ROWS, .form = BE_ACT_F32, .epilogue = (be_epilogue)epilogue};
    op_add_part(&c.load, &m, seed, Q_Q8_0, 1, (uint64_t)out, (uint64_t)in, true);
    fill_linear(&c, seed);
    op_bench b = op_open(on->dev);
    const float *whole = run_linear(&b, &c, &n_row, &width);
    for (size_t j = 0; j < 2 * ORCD_COUNT(gpt_oss_rows); j++) {
        linear_case p = c;
        p.n_tok = gpt_oss_rows[j / 2];
        int at = j % 2 ? GPT_OSS_ROWS - p.n_tok : 0;
        p.x = c.x + at * in, p.y = c.y + at * width;
        op_bench q = op_open(on->dev);
        op_same_bits("linear of gpt-oss", run_linear(&q, &p, &n_row, &width), whole + at * width, p.n_tok * width);
        op_close(&q);
    }
    op_close(&b);
    free_linear(&c);
    op_free_memory(&m);
}

static void rows_of_gpt_oss_do_not_depend_on_the_batch(void **state) {
    (void)state;
    uint64_t seed = 16;
    for (int k = 0; k < n_tested; k++)
        if (strcmp(tested[k].ops->name, "cuda") == 0) {
            experts_of_gpt_oss_in_any_batch(&tested[k], &seed);
            linear_of_gpt_oss_in_any_batch(&tested[k], 5120, 2880, BE_EPI_NONE, &seed);
            linear_of_gpt_oss_in_any_batch(&tested[k], 2880, 4096, BE_EPI_ADD, &seed);
        }
}

static void expert_rows_do_not_depend_on_the_batch(void **state) {
    (void)state;
    enum { N = 130, EXPERTS = 4, TOP = 2 };
    static const struct {
        q_type type;
        int n_embd, n_ff;
    } shapes[] = {{Q_MXFP4, 96, 160}, {Q_MXFP4, 2880, 32}, {Q_MXFP4, 32, 2880}, {Q_Q8_0, 96, 160},
                  {Q_Q8_0, 2880, 32}, {Q_BF16, 96, 160},   {Q_BF16, 32, 2880},  {Q_Q4_1, 96, 160}};
    uint64_t seed = 14;
    for (size_t i = 0; i < ORCD_COUNT(shapes); i++) {
        const int n_embd = shapes[i].n_embd;
        op_memory m = {.n = 0};
        experts_case c = {.n_tok = N, .top_k = TOP};
        add_experts(&c, &m, &seed, shapes[i].type, shapes[i].type, EXPERTS, n_embd, shapes[i].n_ff, true);
        fill_experts(&c, EXPERTS, MIXED, 2, &seed);
        for (int k = 0; k < n_tested; k++) {
            int64_t n_row, width;
            op_bench b = op_open(tested[k].dev);
            const float *whole = run_experts(&b, &c, &n_row, &width);
            for (size_t j = 0; j < ORCD_COUNT(token_counts); j += case_step) {
                experts_case p = c;
                for (int at = 0; at<N; at += p.n_tok> 43 ? p.n_tok : 43) {
                    p.n_tok = token_counts[j] < N - at ? token_counts[j] : N - at;
                    p.x = c.x + at * n_embd;
                    p.y = c.y + at * n_embd;
                    p.route = c.route + at * 2 * TOP;
                    op_bench q = op_open(tested[k].dev);
                    const float *piece = run_experts(&q, &p, &n_row, &width);
                    op_same_bits("experts", piece, whole + at * width, n_row * width);
                    op_close(&q);
                }
            }
            op_close(&b);
        }
        free_experts(&c);
        op_free_memory(&m);
    }
}

/* A row with a NaN in it (a sequence whose numbers broke) leaves its neighbours' bits alone and is seen to be broken.
 */
static void a_row_of_nan_stays_alone(void **state) {
    (void)state;
    enum { N = 17, COLS = 96, BAD = 5 };
    static const q_type types[] = {Q_F32, Q_BF16, Q_Q8_0, Q_MXFP4};
    uint64_t seed = 15;
    for (size_t i = 0; i < ORCD_COUNT(types); i++) {
        op_memory m = {.n = 0};
        linear_case c = {.load = {.use = BE_USE_LINEAR}, .n_tok = N, .form = BE_ACT_F32};
        op_add_part(&c.load, &m, &seed, types[i], 1, 48, COLS, true);
        fill_linear(&c, &seed);
        for (int k = 0; k < n_tested; k++) {
            int64_t n_row, width;
            op_bench b = op_open(tested[k].dev), p = op_open(tested[k].dev);
            const float *whole = run_linear(&b, &c, &n_row, &width);
            float x[N * COLS];
            memcpy(x, c.x, sizeof x);
            x[BAD * COLS + 40] = NAN;
            linear_case broken = c;
            broken.x = x;
            const float *got = run_linear(&p, &broken, &n_row, &width);
            for (int t = 0; t < N; t++)
                if (t != BAD)
                    op_same_bits("beside NaN", got + t * width, whole + t * width, width);
            for (int64_t r = 0; r < width; r++)
                if (!isnan(got[BAD * width + r]))
                    fail_msg("%s: a NaN in the input became %g", tested[k].ops->name, got[BAD * width + r]);
            op_close(&b);
            op_close(&p);
        }
        free_linear(&c);
        op_free_memory(&m);
    }
}

static int run(void) {
    const struct CMUnitTest tests[] = {
        /* first, while scratch is as small as its rows allow */
        cmocka_unit_test_teardown(expert_rows_do_not_depend_on_the_batch, print_worst),
        cmocka_unit_test_teardown(linear_every_type_shape_and_epilogue, print_worst),
        cmocka_unit_test_teardown(linear_stacked_parts_of_different_types, print_worst),
        cmocka_unit_test_teardown(linear_rows_of_very_different_size, print_worst),
        cmocka_unit_test_teardown(embed_every_type_with_and_without_positions, print_worst),
        cmocka_unit_test_teardown(norm_both_kinds_all_widths, print_worst),
        cmocka_unit_test_teardown(gather_out_takes_exactly_the_wanted_rows, print_worst),
        cmocka_unit_test_teardown(route_chooses_the_same_experts, print_worst),
        cmocka_unit_test_teardown(route_ties_take_the_lower_id, print_worst),
        cmocka_unit_test_teardown(experts_every_type_shape_and_routing, print_worst),
        cmocka_unit_test_teardown(experts_mxfp4_2880_by_2880, print_worst),
        cmocka_unit_test_teardown(experts_mxfp4_scales_far_apart, print_worst),
        cmocka_unit_test_teardown(linear_rows_do_not_depend_on_the_batch, print_worst),
        cmocka_unit_test_teardown(rows_of_gpt_oss_do_not_depend_on_the_batch, print_worst),
        cmocka_unit_test_teardown(a_row_of_nan_stays_alone, print_worst),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

int main(int argc, char **argv) { return op_main(argc, argv, run); }
