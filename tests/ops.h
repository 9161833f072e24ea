/* tests/ops.h: the bench on which backends are judged: every operation against the reference backend, with a stated
 * bound, and the promises of backend.h. Used by test_ops.c (operations on rows) and test_ops_sequence.c (rotation,
 * attention, KV cache, whole models); each takes the name of one backend as its argument, which then must open.
 *
 * A new backend needs one row in `bounds` below, with a reason for each number that is not float arithmetic.
 *
 * A BENCH is one device with everything that one case makes on it; it is closed as a whole. Outputs are poisoned with
 * NaN before an operation, KV pages before they are written. */
#ifndef ORCD_TESTS_OPS_H
#define ORCD_TESTS_OPS_H

#include "testing.h"

#include <sys/mman.h>

#include "backend/backend.h"
#include "backend/compose.h"

/* ---- weights ---- */

typedef struct op_memory { /* mappings that live as long as a case: backends may keep views of them */
    void *at[256];
    size_t bytes[256];
    int n;
} op_memory;

static inline void op_free_memory(op_memory *m) {
    while (m->n > 0) {
        m->n--;
        munmap(m->at[m->n], m->bytes[m->n]);
    }
}

/* A tensor as a file would give it. Shared memory, because mf_release drops private pages' contents. */
static inline mf_tensor op_tensor(op_memory *m, q_type type, uint64_t n_mat, uint64_t n_row, uint64_t n_col,
                                  const float *values) {
    const q_traits *q = q_find((uint32_t)type);
    assert_int_equal(n_col % q->block_len, 0);
    assert_true(m->n < (int)ORCD_COUNT(m->at));
    size_t row_bytes = q_row_bytes(q, n_col), bytes = n_mat * n_row * row_bytes;
    uint8_t *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(data != MAP_FAILED);
    m->at[m->n] = data;
    m->bytes[m->n++] = bytes;
    q->pack(values, data, n_mat * n_row * n_col);
    mf_tensor t = {.type = type, .n_col = n_col, .n_row = n_row, .n_mat = n_mat, .data = data, .pos = ORCD_POS_NONE};
    t.view.base = data;
    t.view.row_bytes = row_bytes;
    t.view.mat_bytes = row_bytes * n_row;
    t.view.row_step = 1;
    snprintf(t.name, sizeof t.name, "test.%s", q->name);
    return t;
}

/* Normal values of standard deviation `scale`. */
static inline mf_tensor op_random_tensor(op_memory *m, uint64_t *seed, q_type type, uint64_t n_mat, uint64_t n_row,
                                         uint64_t n_col, float scale) {
    size_t n = n_mat * n_row * n_col;
    float *v = malloc(n * sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = t_normal(seed) * scale;
    mf_tensor t = op_tensor(m, type, n_mat, n_row, n_col, v);
    free(v);
    return t;
}

/* One part of a weight, scaled so that outputs are about as large as inputs; with bias: n_mat rows of n_row. */
static inline void op_add_part(be_load *l, op_memory *m, uint64_t *seed, q_type type, uint64_t n_mat, uint64_t n_row,
                               uint64_t n_col, bool bias) {
    static const q_type bias_type[] = {Q_F32, Q_BF16, Q_F16};
    int i = l->n_part++;
    l->part[i] = op_random_tensor(m, seed, type, n_mat, n_row, n_col, 1 / sqrtf((float)n_col));
    l->has_bias[i] = bias;
    if (bias)
        l->bias[i] = op_random_tensor(m, seed, bias_type[t_below(seed, 3)], 1, n_mat, n_row, 0.3f);
}

static inline be_load op_vector(op_memory *m, uint64_t *seed, q_type type, uint64_t n, float middle, float spread) {
    be_load l = {.use = BE_USE_VECTOR, .n_part = 1};
    float *v = malloc(n * sizeof *v);
    assert_non_null(v);
    for (size_t i = 0; i < n; i++)
        v[i] = middle + spread * t_normal(seed);
    l.part[0] = op_tensor(m, type, 1, 1, n, v);
    free(v);
    return l;
}

/* ---- a bench: one device during one case ---- */

typedef struct op_bench {
    be_device *dev;
    const be_ops *ops;
    be_kv *kv;
    be_weight *weight[64];
    be_act *act[32];
    float *read[32];
    int n_weight, n_act, n_read;
} op_bench;

#define OP_OK(call)                                                                                                    \
    do {                                                                                                               \
        orcd_error err_ = {.message = ""};                                                                             \
        orcd_status status_ = (call);                                                                                  \
        if (status_ != ORCD_OK)                                                                                        \
            fail_msg("%s: %s: %s", #call, orcd_status_name(status_), err_.message);                                    \
    } while (0)

static inline op_bench op_open(be_device *dev) { return (op_bench){.dev = dev, .ops = dev->ops}; }

static inline void op_close(op_bench *b) {
    for (int i = 0; i < b->n_weight; i++)
        b->ops->unload(b->dev, b->weight[i]);
    for (int i = 0; i < b->n_act; i++)
        b->ops->act_free(b->dev, b->act[i]);
    for (int i = 0; i < b->n_read; i++)
        free(b->read[i]);
    if (b->kv)
        b->ops->kv_close(b->dev, b->kv);
    *b = (op_bench){0};
}

static inline be_weight *op_load(op_bench *b, const be_load *l) {
    assert_true(b->n_weight < (int)ORCD_COUNT(b->weight));
    be_weight **w = &b->weight[b->n_weight++];
    OP_OK(b->ops->load(b->dev, l, w, &err_));
    return *w;
}

static inline int64_t op_stride(const be_act *a) { return a->form == BE_ACT_ROUTE ? 2 * a->width : a->width; }

/* rows of NaN where values is NULL */
static inline void op_write(op_bench *b, be_act *a, int64_t n_row, const float *values) {
    float *v = malloc((size_t)(n_row * op_stride(a) + 1) * sizeof *v);
    assert_non_null(v);
    for (int64_t i = 0; i < n_row * op_stride(a); i++)
        v[i] = values ? values[i] : NAN;
    OP_OK(b->ops->act_write(b->dev, a, 0, n_row, v, &err_));
    free(v);
}

static inline be_act *op_act(op_bench *b, be_form form, int64_t n_row, int64_t width, const float *values) {
    assert_true(b->n_act < (int)ORCD_COUNT(b->act));
    be_act **a = &b->act[b->n_act++];
    OP_OK(b->ops->act_new(b->dev, form, n_row, width, a, &err_));
    if (values || form != BE_ACT_ROUTE)
        op_write(b, *a, n_row, values);
    return *a;
}

/* All rows that the last operation wrote; belongs to the bench. */
static inline const float *op_read(op_bench *b, const be_act *a) {
    assert_true(b->n_read < (int)ORCD_COUNT(b->read));
    float *v = malloc((size_t)(a->n_row * op_stride(a) + 1) * sizeof *v);
    assert_non_null(v);
    b->read[b->n_read++] = v;
    OP_OK(b->ops->act_read(b->dev, a, 0, a->n_row, v, &err_));
    return v;
}

static inline void op_poison_pages(op_bench *b) {
    for (int p = 0; p < BE_N_POOLS; p++) {
        size_t bytes = b->kv->page_bytes[p];
        uint8_t *nan = malloc(bytes + 1);
        assert_non_null(nan);
        memset(nan, 0xff, bytes); /* a NaN in f32, f16 and E4M3 */
        for (int i = 0; bytes && i < b->kv->spec.n_page[p]; i++)
            OP_OK(b->ops->kv_write_page(b->kv, p, i, nan, &err_));
        free(nan);
    }
}

/* A cache whose slots have all pages that n_ctx positions need, scattered: entry i of slot s is not page i. Pools
 * without layers get none. */
static inline void op_kv(op_bench *b, const be_kv_spec *spec) {
    be_kv_spec s = *spec;
    int n_entry = (s.n_ctx + BE_PAGE - 1) / BE_PAGE, n = s.n_slot * n_entry;
    bool used[BE_N_POOLS] = {false};
    for (int i = 0; i < s.n_layer; i++)
        used[s.window[i] ? BE_POOL_WINDOW : BE_POOL_FULL] = true;
    for (int p = 0; p < BE_N_POOLS; p++)
        s.n_page[p] = used[p] ? n : 0;
    OP_OK(b->ops->kv_open(b->dev, &s, &b->kv, &err_));
    for (int p = 0; p < BE_N_POOLS; p++)
        for (int i = 0; used[p] && i < n; i++)
            b->ops->kv_map(b->kv, p, i / n_entry, i % n_entry, n - 1 - i);
    op_poison_pages(b);
}

/* A cache for cases that do not use it. */
static inline void op_plain_kv(op_bench *b) {
    static const int window[1] = {0};
    op_kv(b, &(be_kv_spec){.n_layer = 1,
                           .n_kv_head = 1,
                           .head_dim = 64,
                           .window = window,
                           .type = BE_KV_F16,
                           .n_slot = 4,
                           .n_ctx = 192,
                           .max_tok = 192,
                           .max_out = 192});
}

/* ---- batches ---- */

#define OP_MAX_TOK 512

typedef struct op_batch {
    be_batch b;
    int32_t token[OP_MAX_TOK], pos[OP_MAX_TOK], slot[OP_MAX_TOK], out_row[OP_MAX_TOK];
} op_batch;

/* n rows of a slot from position pos on; tokens are a function of slot and position alone, below 32. */
static inline void op_rows(op_batch *b, int slot, int pos, int n) {
    for (int i = 0; i < n; i++) {
        int r = b->b.n_tok++;
        assert_true(r < OP_MAX_TOK);
        b->slot[r] = slot;
        b->pos[r] = pos + i;
        b->token[r] = (int32_t)(((uint32_t)(slot * 131 + pos + i) * 2654435761u) >> 27);
    }
}

static inline be_step *op_begin(op_bench *b, op_batch *batch) {
    batch->b.token = batch->token;
    batch->b.pos = batch->pos;
    batch->b.slot = batch->slot;
    batch->b.out_row = batch->out_row;
    be_step *s = NULL;
    OP_OK(b->ops->step_begin(b->dev, b->kv, &batch->b, &s, &err_));
    return s;
}

static inline void op_end(op_bench *b, be_step *s) { OP_OK(b->ops->step_end(s, &err_)); }

/* A step of n rows of slot 0, for operations that look at rows only. */
static inline be_step *op_begin_rows(op_bench *b, op_batch *batch, int n) {
    *batch = (op_batch){0};
    op_rows(batch, 0, 0, n);
    return op_begin(b, batch);
}

/* ---- judging ---- */

static inline double op_row_norm(const float *a, const float *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = (double)a[i] - (b ? b[i] : 0);
        sum += d * d;
    }
    return sqrt(sum);
}

/* ||out - ref|| / ||ref|| <= bound over the whole; four times that for each row and ten times that for each element, so
 * that one wrong row or value among many is seen (measured against the row's size, or a quarter of the mean row's when
 * the row is small). NaN and infinity never pass. Returns the error. */
static inline double op_judge(const char *what, const float *out, const float *ref, int64_t n_row, int64_t width,
                              double bound) {
    /* per element: below this, errors are measured as if of it (GELU of a large negative; a few sums that cancel) */
    const double least = n_row * width < 8 ? 0.5 : 0.05;
    double all = fmax(op_row_norm(ref, NULL, n_row * width), least * sqrt((double)(n_row * width))),
           error = op_row_norm(out, ref, n_row * width);
    double mean_row = all / sqrt((double)n_row);
    for (int64_t i = 0; i < n_row * width; i++)
        if (!isfinite(out[i]))
            fail_msg("%s: row %lld column %lld is %g", what, (long long)(i / width), (long long)(i % width), out[i]);
    for (int64_t r = 0; r < n_row; r++) {
        const float *o = out + r * width, *f = ref + r * width;
        double size = fmax(fmax(op_row_norm(f, NULL, width), mean_row / 4), least * sqrt((double)width));
        double miss = op_row_norm(o, f, width);
        if (miss > 4 * bound * size)
            fail_msg("%s: row %lld has error %.3g, more than %.3g", what, (long long)r, miss / size, 4 * bound);
        for (int64_t c = 0; c < width; c++)
            if (fabs((double)o[c] - f[c]) > 10 * bound * size / sqrt((double)width))
                fail_msg("%s: row %lld column %lld is %g, not %g", what, (long long)r, (long long)c, o[c], f[c]);
    }
    if (error > bound * all)
        fail_msg("%s: error %.3g is more than %.3g", what, error / all, bound);
    return error / all;
}

static inline void op_same_bits(const char *what, const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("%s: value %lld is %a in one and %a in the other", what, (long long)i, a[i], b[i]);
}

/* ---- who is tested, and by which bounds ---- */

enum bound {
    EMBED,         /* unpacked rows, one addition */
    NORM,          /* read back from a FREE activation */
    DENSE,         /* linear with F32, F16, BF16 weights */
    QUANT,         /* linear with block types */
    EXPERTS_DENSE, /* two products and the activation between them */
    EXPERTS_QUANT,
    ROPE,
    ATTN_F16, /* a key or value that lies on the edge of two halves may round the other way */
    ATTN_F32,
    ATTN_Q8, /* against the reference's F32 cache; 0 = not offered */
    ROUTE,
    MODEL_DENSE, /* two layers from tokens to logits */
    MODEL_QUANT,
    N_BOUNDS
};

static const struct bounds {
    const char *backend;
    double of[N_BOUNDS];
} bounds[] = {
    /* float sums in another order; for block types activations become 16-bit integers under one scale for 64: 2^-16 of
     * the largest of them, 5e-5 on normal data, more beside outliers */
    {"cpu",
     {[EMBED] = 1e-6,
      [NORM] = 1e-5,
      [DENSE] = 1e-5,
      [QUANT] = 5e-4,
      [EXPERTS_DENSE] = 1e-5,
      [EXPERTS_QUANT] = 5e-4,
      [ROPE] = 1e-6,
      [ATTN_F16] = 1e-4,
      [ATTN_F32] = 1e-5,
      [ROUTE] = 1e-5,
      [MODEL_DENSE] = 2e-4,
      [MODEL_QUANT] = 1e-3}},
    /* activations are halves in products and in attention: 2^-11 a value, 0.03 % in the mean; 8 bits of cache are
     * off by up to 1/254 of the largest of a head's 64: 0.6 % in the mean on normal data, in keys and in values */
    {"cuda",
     {[EMBED] = 1e-6,
      [NORM] = 1e-3,
      [DENSE] = 1e-3,
      [QUANT] = 1e-3,
      [EXPERTS_DENSE] = 2e-3,
      [EXPERTS_QUANT] = 2e-3,
      [ROPE] = 1e-3,
      [ATTN_F16] = 2e-3,
      [ATTN_F32] = 2e-3,
      [ATTN_Q8] = 2e-2,
      [ROUTE] = 1e-3,
      [MODEL_DENSE] = 1e-2,
      [MODEL_QUANT] = 1e-2}},
    /* the reference against itself, and anything unknown: float rounding */
    {NULL,
     {[EMBED] = 1e-6,
      [NORM] = 1e-5,
      [DENSE] = 1e-5,
      [QUANT] = 1e-5,
      [EXPERTS_DENSE] = 1e-5,
      [EXPERTS_QUANT] = 1e-5,
      [ROPE] = 1e-5,
      [ATTN_F16] = 1e-3,
      [ATTN_F32] = 1e-4,
      [ROUTE] = 1e-5,
      [MODEL_DENSE] = 2e-3,
      [MODEL_QUANT] = 2e-3}},
};

typedef struct subject {
    const be_ops *ops;
    be_device *dev;
    const double *bound;
} subject;

static subject ref, tested[8]; /* ref is among the tested for the promises; it is not compared with itself */
static int n_tested;

static inline be_device *open_device(const be_ops *ops, be_params params, orcd_error *err) {
    be_device *dev = NULL;
    return ops->open(&params, &dev, err) == ORCD_OK ? dev : NULL;
}

/* A device with other parameters than the tested one; must open. */
static inline be_device *must_open(const be_ops *ops, be_params params) {
    orcd_error err = {.message = ""};
    be_device *dev = open_device(ops, params, &err);
    if (!dev)
        fail_msg("%s does not open: %s", ops->name, err.message);
    return dev;
}

/* The largest error seen by each comparison of the running test, for the log. */
static struct worst {
    char what[48];
    double error, bound;
    int n;
} worst[64];
static int n_worst;

static inline void note(const char *what, double error, double bound) {
    int i = 0;
    while (i < n_worst && (strcmp(worst[i].what, what) != 0 || worst[i].bound != bound))
        i++;
    if (i == (int)ORCD_COUNT(worst))
        return;
    if (i == n_worst)
        worst[n_worst++] = (struct worst){.bound = bound};
    snprintf(worst[i].what, sizeof worst[i].what, "%s", what);
    worst[i].error = fmax(worst[i].error, error);
    worst[i].n++;
}

static inline int print_worst(void **state) {
    (void)state;
    for (int i = 0; i < n_worst; i++)
        print_message("           %-28s %4d cases, error %.1e of %.1e\n", worst[i].what, worst[i].n, worst[i].error,
                      worst[i].bound);
    n_worst = 0;
    return 0;
}

/* A case computes rows on the bench's device; it must do the same, from the same values, on each. The result belongs
 * to the bench. */
typedef const float *(*case_fn)(op_bench *b, const void *arg, int64_t *n_row, int64_t *width);

static inline void compare(enum bound kind, const char *what, case_fn fn, const void *arg) {
    int64_t n_row = 0, width = 0;
    op_bench r = op_open(ref.dev);
    const float *want = fn(&r, arg, &n_row, &width);
    for (int i = 0; i < n_tested; i++) {
        double limit = tested[i].bound[kind];
        if (tested[i].ops == ref.ops || limit == 0)
            continue;
        int64_t rows = -1, columns = -1;
        char label[160], group[48];
        snprintf(label, sizeof label, "%s: %s", tested[i].ops->name, what);
        snprintf(group, sizeof group, "%s %.*s", tested[i].ops->name, (int)strcspn(what, ":"), what);
        op_bench b = op_open(tested[i].dev);
        const float *got = fn(&b, arg, &rows, &columns);
        assert_int_equal(rows, n_row);
        assert_int_equal(columns, width);
        note(group, op_judge(label, got, want, n_row, width, limit), limit);
        op_close(&b);
    }
    op_close(&r);
}

static inline bool is_dense(q_type t) { return t == Q_F32 || t == Q_F16 || t == Q_BF16; }

static const int token_counts[] = {1, 2, 3, 5, 9, 17, 33, 64, 65, 130};

/* `BACKEND quick`, for compute-sanitizer: every third case of the long lists. */
static size_t case_step = 1;

/* Smallest distance between the k-th and the next logit of a row; w and bias as the weight holds them. */
static inline double route_gap(const float *w, const float *bias, int n_expert, int n_col, const float *x, int top_k) {
    double logit[128];
    for (int e = 0; e < n_expert; e++) {
        logit[e] = bias ? bias[e] : 0;
        for (int i = 0; i < n_col; i++)
            logit[e] += (double)w[e * n_col + i] * x[i];
    }
    for (int i = 0; i <= top_k && i < n_expert; i++) /* the k + 1 largest to the front */
        for (int j = i + 1; j < n_expert; j++)
            if (logit[j] > logit[i]) {
                double swap = logit[i];
                logit[i] = logit[j];
                logit[j] = swap;
            }
    return top_k < n_expert ? logit[top_k - 1] - logit[top_k] : INFINITY;
}

/* The row's choice is clear by 0.03, so that a backend's rounding cannot change it. */
static inline bool op_clear_row(const be_load *l, int top_k, const float *x) {
    int n_expert = (int)l->part[0].n_row, n_col = (int)l->part[0].n_col;
    float *w = malloc((size_t)n_expert * (size_t)n_col * sizeof *w), bias[128];
    assert_non_null(w);
    mf_floats(&l->part[0], w);
    if (l->has_bias[0])
        mf_floats(&l->bias[0], bias);
    double gap = route_gap(w, l->has_bias[0] ? bias : NULL, n_expert, n_col, x, top_k);
    free(w);
    return gap >= 0.03;
}

/* Opens ref, and what the command line names or everything that opens; closes them after the tests. */
static inline int op_main(int argc, char **argv, int (*run)(void)) {
    orcd_error err = {.message = ""};
    const char *only = argc > 1 ? argv[1] : NULL;
    case_step = argc > 2 && strcmp(argv[2], "quick") == 0 ? 3 : 1;
    ref = (subject){be_find("ref"), NULL, bounds[ORCD_COUNT(bounds) - 1].of};
    ref.dev = open_device(ref.ops, (be_params){0}, &err);
    for (size_t i = 0; i < be_count(); i++) {
        const be_ops *ops = be_at(i);
        if (only && strcmp(only, ops->name) != 0)
            continue;
        size_t row = 0;
        while (bounds[row].backend && strcmp(bounds[row].backend, ops->name) != 0)
            row++;
        be_device *dev = open_device(ops, (be_params){0}, &err);
        if (dev)
            tested[n_tested++] = (subject){ops, dev, bounds[row].of};
        else
            printf("%s: %s: %s\n", only ? "FAIL" : "SKIP", ops->name, err.message);
    }
    if (!ref.dev || (only && n_tested == 0))
        return 1;
    for (int i = 0; i < n_tested; i++) {
        char text[256];
        tested[i].ops->describe(tested[i].dev, text, sizeof text);
        printf("testing %s\n", text);
    }
    int failed = run();
    for (int i = 0; i < n_tested; i++)
        tested[i].ops->close(tested[i].dev);
    ref.ops->close(ref.dev);
    return failed;
}

#endif
