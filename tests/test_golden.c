/* Logits and greedy tokens against Hugging Face transformers in float32 (tests/golden; made by torch from random
 * checkpoints in published form), for every backend of this build. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/file.h"
#include "engine/teacher.h"

typedef struct golden {
    const char *folder; /* under tests/golden */
    const char *model;  /* NULL: the folder is the checkpoint */
    int n_prompt, n_ctx;
} golden;

static const golden goldens[] = {{"gptoss-mini", NULL, 5, 5120},
                                 {"gptoss-mini-topk2", NULL, 1, 128},
                                 {"gpt2-mini", NULL, 3, 256},
                                 {"fable", "models/fable.gguf", 3, 1024}};

typedef struct compare {
    const float *want; /* rows from `first` on */
    int64_t first, n_vocab;
    double max_abs, min_cosine;
    int64_t n, n_top1;
    const int32_t *greedy; /* expected argmax of rows >= greedy_from */
    int64_t greedy_from, n_greedy_wrong;
} compare;

static int64_t argmax(const float *v, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (v[i] > v[best])
            best = i;
    return best;
}

static bool compare_row(void *ctx, int64_t pos, const float *got) {
    compare *c = ctx;
    if (c->greedy) {
        if (pos >= c->greedy_from)
            c->n_greedy_wrong += argmax(got, c->n_vocab) != c->greedy[pos - c->greedy_from];
        return true;
    }
    const float *want = c->want + (pos - c->first) * c->n_vocab;
    double dot = 0, g2 = 0, w2 = 0;
    for (int64_t i = 0; i < c->n_vocab; i++) {
        assert_true(isfinite(got[i]));
        c->max_abs = fmax(c->max_abs, fabs((double)got[i] - want[i]));
        dot += (double)got[i] * want[i];
        g2 += (double)got[i] * got[i];
        w2 += (double)want[i] * want[i];
    }
    c->min_cosine = fmin(c->min_cosine, dot / sqrt(g2 * w2));
    c->n++;
    c->n_top1 += argmax(got, c->n_vocab) == argmax(want, c->n_vocab);
    return true;
}

/* Map a file of the golden folder; false when it does not exist. */
static bool map(const char *folder, const char *what, int k, const char *ending, file_map *f) {
    char path[256];
    orcd_error err;
    snprintf(path, sizeof path, "tests/golden/%s/%s%d.%s", folder, what, k, ending);
    return file_exists(path) && file_open(path, f, &err) == ORCD_OK;
}

/* How a model is run: on which backend, in which steps, with what precision of the KV cache, with the experts of how
 * many layers in host memory. */
typedef struct how {
    const char *backend;
    int chunk;
    be_kv_type kv_type;
    int n_host_layers;
} how;

static teacher *open_model(const golden *g, const how *w) {
    char path[256];
    orcd_error err;
    teacher *t = NULL;
    snprintf(path, sizeof path, "tests/golden/%s", g->folder);
    teacher_params p = {.model = g->model ? g->model : path,
                        .backend = w->backend,
                        .n_host_layers = w->n_host_layers,
                        .kv_type = w->kv_type,
                        .n_ctx = g->n_ctx,
                        .chunk = w->chunk};
    if (teacher_open(&p, &t, &err) != ORCD_OK)
        fail_msg("%s on %s: %s", g->folder, w->backend, err.message);
    return t;
}

static void run(teacher *t, const int32_t *id, int64_t n, int64_t first, compare *c) {
    orcd_error err;
    if (teacher_run(t, id, n, first, compare_row, c, &err) != ORCD_OK)
        fail_msg("%s", err.message);
}

/* All prompts of one model: the sums over its positions are in *total. */
static void run_model(const golden *g, const how *w, compare *total) {
    teacher *t = open_model(g, w);
    int64_t n_vocab = teacher_config(t)->n_vocab;
    *total = (compare){.min_cosine = 1, .n_vocab = n_vocab};
    for (int k = 0; k < g->n_prompt; k++) {
        file_map prompt, logits, greedy;
        assert_true(map(g->folder, "prompt", k, "i32", &prompt));
        assert_true(map(g->folder, "logits", k, "f32", &logits));
        int64_t n = (int64_t)(prompt.size / 4), rows = (int64_t)(logits.size / 4) / n_vocab;
        total->want = (const float *)(const void *)logits.data;
        total->first = n - rows;
        total->greedy = NULL;
        run(t, (const int32_t *)(const void *)prompt.data, n, n - rows, total);
        if (map(g->folder, "greedy", k, "i32", &greedy)) {
            /* greedy decoding gives these tokens iff every argmax under teacher forcing is the next of them */
            int64_t m = (int64_t)(greedy.size / 4);
            int32_t *all = malloc((size_t)(n + m) * 4);
            memcpy(all, prompt.data, (size_t)n * 4);
            memcpy(all + n, greedy.data, (size_t)m * 4);
            total->greedy = all + n;
            total->greedy_from = n - 1;
            if (n + m - 1 <= g->n_ctx)
                run(t, all, n + m - 1, n - 1, total);
            free(all);
            file_close(&greedy);
        }
        file_close(&prompt);
        file_close(&logits);
    }
    printf("%-18s %-5s KV type %d, %d host layers: max abs %.2e  min cosine %.7f  top-1 %lld/%lld  greedy wrong %lld\n",
           g->folder, w->backend, w->kv_type, w->n_host_layers, total->max_abs, total->min_cosine,
           (long long)total->n_top1, (long long)total->n, (long long)total->n_greedy_wrong);
    teacher_close(t);
}

static void test_ref_matches_transformers(void **state) {
    (void)state;
    for (size_t i = 0; i < ORCD_COUNT(goldens); i++) {
        compare c;
        run_model(&goldens[i], &(how){"ref", 96, BE_KV_F32, 0}, &c);
        assert_true(c.max_abs <= 2e-3);
        assert_int_equal(c.n_top1, c.n);
        assert_int_equal(c.n_greedy_wrong, 0);
    }
}

static void test_cpu_matches_transformers(void **state) {
    (void)state;
    compare sum = {0};
    if (!be_find("cpu"))
        skip();
    for (size_t i = 0; i < ORCD_COUNT(goldens); i++) {
        compare c;
        run_model(&goldens[i], &(how){"cpu", 96, BE_KV_F32, 0}, &c);
        assert_true(c.min_cosine >= 0.999);
        assert_true((double)c.n_top1 >= 0.99 * (double)c.n);
        sum.n += c.n;
        sum.n_top1 += c.n_top1;
    }
    assert_true((double)sum.n_top1 >= 0.99 * (double)sum.n);
}

/* True when this machine has the device; says so when it has not. */
static bool opens(const char *backend) {
    be_device *dev;
    orcd_error err;
    const be_ops *ops = be_find(backend);
    if (!ops)
        return false;
    if (ops->open(&(be_params){0}, &dev, &err) != ORCD_OK) {
        printf("SKIP: %s\n", err.message);
        return false;
    }
    ops->close(dev);
    return true;
}

static void test_cuda_matches_transformers(void **state) {
    (void)state;
    static const how way[] = {{"cuda", 96, BE_KV_F32, 0},
                              {"cuda", 96, BE_KV_F16, 0},
                              {"cuda", 96, BE_KV_F16, 1},
                              {"cuda", 1, BE_KV_F16, 2},
                              {"cuda", 512, BE_KV_F16, 99}};
    if (!opens("cuda"))
        skip();
    for (size_t k = 0; k < ORCD_COUNT(way); k++) {
        compare sum = {0};
        for (size_t i = 0; i < ORCD_COUNT(goldens); i++) {
            compare c;
            run_model(&goldens[i], &way[k], &c);
            assert_true(c.min_cosine >= 0.9995);
            sum.n += c.n;
            sum.n_top1 += c.n_top1;
        }
        assert_true((double)sum.n_top1 >= 0.99 * (double)sum.n);
    }
}

/* A key or value is off by 0.6 % in the mean. Trained models bear it; random ones with sharp attention, as the other
 * golden models are, less. */
static void test_cuda_with_an_8_bit_cache(void **state) {
    (void)state;
    compare c;
    if (!opens("cuda"))
        skip();
    run_model(&goldens[3], &(how){"cuda", 96, BE_KV_Q8, 0}, &c);
    assert_true(c.min_cosine >= 0.99);
    assert_true((double)c.n_top1 >= 0.9 * (double)c.n);
    run_model(&goldens[2], &(how){"cuda", 1, BE_KV_Q8, 0}, &c);
    assert_true(c.min_cosine >= 0.99);
}

/* The likeliest token after each of `n` ids, by one backend. */
typedef struct best {
    int32_t *id;
    int64_t n_vocab;
} best;

static bool note_best(void *ctx, int64_t pos, const float *logits) {
    best *b = ctx;
    b->id[pos] = (int32_t)argmax(logits, b->n_vocab);
    return true;
}

/* 2,000 tokens of the bundled model, teacher forced: the CPU and the GPU would go on alike. */
static void test_cuda_agrees_with_cpu_on_fable(void **state) {
    (void)state;
    enum { N = 1000 };
    static int32_t id[N], of[2][N];
    int64_t same = 0, all = 0;
    orcd_error err;
    if (!opens("cuda"))
        skip();
    for (int k = 1; k <= 2; k++) { /* two contexts: prompts of the golden data, then what follows them */
        file_map prompt;
        assert_true(map("fable", "prompt", k, "i32", &prompt));
        size_t have = prompt.size / 4;
        for (size_t i = 0; i < N; i++) /* real text, over and over */
            id[i] = ((const int32_t *)(const void *)prompt.data)[i % have];
        file_close(&prompt);
        for (int b = 0; b < 2; b++) {
            teacher *t = open_model(&goldens[3], &(how){b ? "cuda" : "cpu", 96, BE_KV_F32, 0});
            best into = {of[b], teacher_config(t)->n_vocab};
            if (teacher_run(t, id, N, 0, note_best, &into, &err) != ORCD_OK)
                fail_msg("%s", err.message);
            teacher_close(t);
        }
        for (int i = 0; i < N; i++, all++)
            same += of[0][i] == of[1][i];
    }
    printf("fable: CPU and GPU agree on %lld of %lld\n", (long long)same, (long long)all);
    assert_true((double)same >= 0.99 * (double)all);
}

/* A sequence fed in pieces of any size gives what it gives at once. */
static void test_prefill_equals_decode(void **state) {
    (void)state;
    static const int chunk[] = {1, 7, 128};
    file_map prompt;
    assert_true(map("gptoss-mini", "prompt", 3, "i32", &prompt));
    int64_t n = (int64_t)(prompt.size / 4);
    for (size_t b = 0; b < be_count(); b++) {
        if (!opens(be_at(b)->name))
            continue;
        file_map logits;
        assert_true(map("gptoss-mini", "logits", 3, "f32", &logits));
        for (size_t k = 0; k < ORCD_COUNT(chunk); k++) {
            teacher *t = open_model(&goldens[0], &(how){be_at(b)->name, chunk[k], BE_KV_F32, 0});
            compare c = {.want = (const float *)(const void *)logits.data, .n_vocab = 512, .min_cosine = 1};
            run(t, (const int32_t *)(const void *)prompt.data, n, 0, &c);
            assert_true(c.min_cosine >= 0.999);
            teacher_close(t);
        }
        file_close(&logits);
    }
    file_close(&prompt);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ref_matches_transformers),  cmocka_unit_test(test_cpu_matches_transformers),
        cmocka_unit_test(test_cuda_matches_transformers), cmocka_unit_test(test_cuda_agrees_with_cpu_on_fable),
        cmocka_unit_test(test_cuda_with_an_8_bit_cache),  cmocka_unit_test(test_prefill_equals_decode),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
