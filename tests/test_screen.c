/* The CPU backend's screen of the head: where only the largest logit is wanted, it and all that equal it have the bits
 * that the whole head gives, and whatever is left out is smaller. */
#include "ops.h"

#include "backend/cpu/internal.h"

typedef struct screen_case {
    q_type type;
    int n_row, n_col, n_tok, act_bits;
    float *w, *x; /* [n_row][n_col], [n_tok][n_col] */
} screen_case;

static screen_case make(q_type type, int n_row, int n_col, int n_tok, uint64_t *seed) {
    screen_case c = {type, n_row, n_col, n_tok, 16, NULL, NULL};
    c.w = malloc((size_t)n_row * n_col * sizeof *c.w);
    c.x = malloc((size_t)n_tok * n_col * sizeof *c.x);
    assert_true(c.w && c.x);
    t_fill_normal(seed, c.w, (size_t)n_row * n_col);
    t_fill_normal(seed, c.x, (size_t)n_tok * n_col);
    return c;
}

static const float *logits(op_bench *b, const screen_case *c, be_weight *w, bool best) {
    be_act *x = op_act(b, BE_ACT_FREE, c->n_tok, c->n_col, c->x), *y = op_act(b, BE_ACT_F32, c->n_tok, c->n_row, NULL);
    op_batch batch = {.b.best = best};
    op_rows(&batch, 0, 0, c->n_tok);
    be_step *s = op_begin(b, &batch);
    b->ops->linear(s, w, x, y, BE_EPI_NONE);
    op_end(b, s);
    return op_read(b, y);
}

/* One row: what is left out, or -1 where nothing can be said because the whole is not finite and both must be broken.
 */
static int judge_row(const char *what, const float *got, const float *whole, int n) {
    float most = -INFINITY;
    bool broken = false, got_broken = false;
    for (int i = 0; i < n; i++) {
        broken |= whole[i] != whole[i] || whole[i] == INFINITY;
        got_broken |= got[i] != got[i] || got[i] == INFINITY;
        most = whole[i] > most ? whole[i] : most;
    }
    if (broken) {
        if (!got_broken)
            fail_msg("%s: a row that is not finite looks sound", what);
        return -1;
    }
    int out = 0;
    for (int i = 0; i < n; i++) {
        bool same = memcmp(&got[i], &whole[i], sizeof got[i]) == 0;
        if (!same && !(got[i] == -INFINITY && whole[i] < most))
            fail_msg("%s: logit %d of %d is %.9g, the whole head has %.9g, its largest is %.9g", what, i, n,
                     (double)got[i], (double)whole[i], (double)most);
        out += !same;
    }
    return out;
}

/* Both ways on 1 to 3 threads; how many logits of all rows were left out. Frees the case. */
static int judge(const char *what, screen_case *c) {
    op_memory m = {.n = 0};
    mf_tensor t = op_tensor(&m, c->type, 1, (uint64_t)c->n_row, (uint64_t)c->n_col, c->w);
    int out = 0;
    for (int threads = 1; threads <= 3; threads++) {
        be_device *d = NULL;
        be_load l = {.use = BE_USE_LINEAR, .n_part = 1, .part = {t}, .head = true};
        OP_OK(be_ops_cpu.open(&(be_params){.n_threads = threads, .act_bits = c->act_bits}, &d, &err_));
        op_bench b = op_open(d);
        op_plain_kv(&b);
        be_weight *w = op_load(&b, &l);
        const float *got = logits(&b, c, w, true), *whole = logits(&b, c, w, false);
        out = 0;
        for (int i = 0; i < c->n_tok; i++) {
            int n = judge_row(what, got + (size_t)i * c->n_row, whole + (size_t)i * c->n_row, c->n_row);
            out += n > 0 ? n : 0;
        }
        op_close(&b);
        d->ops->close(d);
    }
    op_free_memory(&m);
    free(c->w);
    free(c->x);
    return out;
}

static bool is_screened(void) { return cpu_tier_best() >= CPU_AVX512; }

static void every_type_shape_and_number_of_rows(void **state) {
    (void)state;
    static const q_type types[] = {Q_Q8_0, Q_BF16, Q_F16, Q_F32, Q_Q4_0, Q_MXFP4};
    static const int n_col[] = {32, 96, 256, 2880}, n_row[] = {1, 15, 16, 1000};
    uint64_t seed = 1;
    int out = 0;
    for (size_t t = 0; t < ORCD_COUNT(types); t++)
        for (size_t k = 0; k < ORCD_COUNT(n_col); k++)
            for (size_t r = 0; r < ORCD_COUNT(n_row); r++)
                for (int n = 1; n <= (n_col[k] < 2880 ? 5 : 2); n++) {
                    screen_case c = make(types[t], n_row[r], n_col[k], n, &seed);
                    c.act_bits = seed & 64 ? 8 : 16;
                    out += judge(q_find(types[t])->name, &c);
                }
    if (is_screened() && out < 10000)
        fail_msg("the screen left only %d logits out", out);
}

/* Rows that are the same, or differ by less than the screen can see, all over the vocabulary. */
static void equal_and_nearly_equal_rows(void **state) {
    (void)state;
    enum { ROWS = 1200, COLS = 128 };
    uint64_t seed = 2;
    for (int round = 0; round < 20; round++) {
        screen_case c = make(round % 2 ? Q_Q8_0 : Q_BF16, ROWS, COLS, 1 + round % 4, &seed);
        for (int r = 0; r < ROWS; r += 7) {
            memcpy(c.w + r * COLS, c.w, COLS * sizeof *c.w);
            if (round >= 10)
                c.w[r * COLS + (int)t_below(&seed, COLS)] *= 1.01f;
        }
        memcpy(c.x, c.w, COLS * sizeof *c.x);
        judge("nearly equal rows", &c);
    }
}

/* The row that wins is one that the screen rounds away: its values lie between two codes, all on the side of x. Those
 * that it beats by little lie on codes. */
static void a_winner_made_of_rounding_errors(void **state) {
    (void)state;
    enum { ROWS = 640, COLS = 512 };
    static const float between[] = {0.3f, 0.45f, 0.49f};
    uint64_t seed = 3;
    for (int round = 0; round < 30; round++) {
        screen_case c = make(round % 2 ? Q_F32 : Q_F16, ROWS, COLS, 1, &seed);
        int winner = (int)t_below(&seed, ROWS);
        for (int k = 0; k < COLS; k++)
            c.x[k] = k % 64 == 0 ? 0 : t_below(&seed, 2) ? 1 : -1;
        for (int r = 0; r < ROWS; r++)
            for (int k = 0; k < COLS; k++) {
                bool counts = k % 64 != 0 && k % 4 == 1;
                float decoy = counts && k < COLS / 2 ? c.x[k] : 0, won = between[round % 3] * c.x[k];
                c.w[r * COLS + k] = k % 64 == 0 ? -16 : r == winner ? won : decoy;
            }
        int out = judge("a winner of rounding errors", &c);
        if (round % 3 == 0 && is_screened())
            assert_true(out < ROWS * 3);
    }
}

static void what_is_not_finite_is_seen(void **state) {
    (void)state;
    enum { ROWS = 320, COLS = 128 };
    static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e30f, 1e-31f, 0};
    uint64_t seed = 4;
    for (size_t i = 0; i < ORCD_COUNT(odd); i++)
        for (int in_x = 0; in_x < 2; in_x++)
            for (int all = 0; all < 2; all++) {
                screen_case c = make(Q_F32, ROWS, COLS, 2, &seed);
                float *at = in_x ? c.x : c.w + 200 * COLS;
                for (int k = 0; k < COLS; k++)
                    at[k] = all ? odd[i] * (odd[i] == 1e-31f ? c.w[k] : 1) : k == 77 ? odd[i] : at[k];
                judge("odd values", &c);
            }
}

/* Very small and very large weights: scales that a half cannot hold. */
static void weights_of_any_size(void **state) {
    (void)state;
    enum { ROWS = 320, COLS = 192 };
    static const float size[] = {1e-30f, 1e-8f, 1e-6f, 1e5f, 1e7f, 1e30f};
    uint64_t seed = 5;
    for (size_t i = 0; i < ORCD_COUNT(size); i++)
        for (int some = 0; some < 2; some++) {
            screen_case c = make(i % 2 ? Q_F32 : Q_BF16, ROWS, COLS, 3, &seed);
            for (int k = 0; k < ROWS * COLS; k++)
                c.w[k] *= !some || k / 64 % 5 == 0 ? size[i] : 1;
            judge("weights of another size", &c);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_shape_and_number_of_rows),
        cmocka_unit_test(equal_and_nearly_equal_rows),
        cmocka_unit_test(a_winner_made_of_rounding_errors),
        cmocka_unit_test(what_is_not_finite_is_seen),
        cmocka_unit_test(weights_of_any_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
