#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/rng.h"
#include "engine/sampler.h"
#include "engine/softmax.h"

#define N_REAL 201088

static int32_t draw(samp *s, const float *logits, const samp_params *p, uint64_t index) {
    samp_input in = {.logits = logits, .params = p, .draw = index};
    int32_t id = -1;
    orcd_error err;
    if (samp_draw(s, &in, &id, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return id;
}

static samp *open_for(int32_t n) {
    samp *s = NULL;
    orcd_error err;
    assert_int_equal(samp_open(n, &s, &err), ORCD_OK);
    return s;
}

static float *gaussian(int n, uint64_t seed, float scale) {
    float *x = malloc((size_t)n * sizeof *x);
    for (int i = 0; i < n; i++) {
        double u = rng_uniform(seed, 1, (uint64_t)i), v = rng_uniform(seed, 2, (uint64_t)i);
        x[i] = scale * (float)(sqrt(-2 * log(1 - u)) * cos(6.283185307179586 * v));
    }
    return x;
}

/* ---- the obvious definition: sort everything, in double ---- */

typedef struct item {
    double p;
    float logit;
    int id;
} item;

static int by_probability(const void *a, const void *b) {
    const item *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit < y->logit ? 1 : -1;
    return x->id - y->id;
}

/* Probability of each id after temperature, top-k, top-p and min-p. */
static void distribution(const float *logits, int n, const samp_params *p, double *out) {
    item *it = malloc((size_t)n * sizeof *it);
    double max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++)
        max = logits[i] > max ? logits[i] : max;
    for (int i = 0; i < n; i++)
        it[i] = (item){exp((logits[i] - max) / p->temperature), logits[i], i};
    qsort(it, (size_t)n, sizeof *it, by_probability);
    int kept = p->top_k > 0 && p->top_k < n ? p->top_k : n;
    for (int i = 0; i < kept; i++)
        sum += it[i].p;
    double acc = 0;
    for (int i = 0; i < kept && p->top_p < 1; i++) {
        acc += it[i].p;
        if (acc >= p->top_p * sum)
            kept = i + 1;
    }
    while (kept > 1 && it[kept - 1].p < p->min_p)
        kept--;
    sum = 0;
    for (int i = 0; i < kept; i++)
        sum += it[i].p;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int i = 0; i < kept; i++)
        out[it[i].id] = it[i].p / sum;
    free(it);
}

/* Upper quantile of chi-square at p = 0.001, by Wilson and Hilferty. */
static double chi2_limit(int df) {
    double a = 2.0 / (9.0 * df), z = 3.0902;
    return df * pow(1 - a + z * sqrt(a), 3);
}

static void check_draws(const float *logits, int n, samp_params p, int n_draw) {
    double *want = malloc((size_t)n * sizeof *want);
    int *got = calloc((size_t)n, sizeof *got);
    samp *s = open_for(n);
    distribution(logits, n, &p, want);
    for (int i = 0; i < n_draw; i++)
        got[draw(s, logits, &p, (uint64_t)i)]++;
    double chi2 = 0, rest_want = 0, rest_got = 0;
    int df = -1;
    for (int i = 0; i < n; i++) {
        if (want[i] == 0 && got[i] != 0)
            fail_msg("id %d was drawn although the filters exclude it", i);
        double e = want[i] * n_draw;
        if (e < 10) { /* rare ones share a cell */
            rest_want += e;
            rest_got += got[i];
            continue;
        }
        chi2 += (got[i] - e) * (got[i] - e) / e;
        df++;
    }
    if (rest_want >= 10) {
        chi2 += (rest_got - rest_want) * (rest_got - rest_want) / rest_want;
        df++;
    }
    if (df > 0 && chi2 > chi2_limit(df))
        fail_msg("chi-square %.1f over %d degrees, limit %.1f", chi2, df, chi2_limit(df));
    samp_close(s);
    free(want);
    free(got);
}

static void draw__a_million_follow_the_softmax(void **state) {
    (void)state;
    float *x = gaussian(1000, 1, 2);
    samp_params p = SAMP_DEFAULTS;
    p.seed = 11;
    check_draws(x, 1000, p, 1000000);
    free(x);
}

static void draw__every_filter_follows_its_definition(void **state) {
    (void)state;
    float *x = gaussian(1500, 2, 2);
    const samp_params base = SAMP_DEFAULTS;
    samp_params p[12];
    for (size_t i = 0; i < ORCD_COUNT(p); i++) {
        p[i] = base;
        p[i].seed = i;
    }
    p[0].temperature = 0.3f;
    p[1].temperature = 2;
    p[2].top_k = 7;
    p[3].top_k = 900; /* more than there are blocks: no bound */
    p[4].top_p = 0.5f;
    p[5].top_p = 0.999f;
    p[6].min_p = 0.05f;
    p[7].min_p = 1;
    p[8].top_k = 50, p[8].top_p = 0.8f;
    p[9].top_k = 50, p[9].top_p = 0.8f, p[9].min_p = 0.2f;
    p[10].top_p = 0.9f, p[10].temperature = 1.7f;
    p[11].top_k = 5000; /* beyond the vocabulary: off */
    for (size_t i = 0; i < ORCD_COUNT(p); i++)
        check_draws(x, 1500, p[i], 60000);
    free(x);
}

static void draw__ties_go_to_the_lower_id(void **state) {
    (void)state;
    enum { N = 1000 };
    float x[N];
    for (int i = 0; i < N; i++)
        x[i] = 1;
    samp *s = open_for(N);
    samp_params p = SAMP_DEFAULTS;
    p.temperature = 0;
    assert_int_equal(draw(s, x, &p, 0), 0);
    x[700] = x[900] = 2;
    assert_int_equal(draw(s, x, &p, 0), 700);
    p.temperature = 1;
    p.top_k = 3;
    for (int i = 0; i < 300; i++) {
        int32_t id = draw(s, x, &p, (uint64_t)i);
        assert_true(id == 700 || id == 900 || id == 0);
    }
    p.top_k = 0;
    p.top_p = 1e-9f;
    assert_int_equal(draw(s, x, &p, 5), 700);
    samp_close(s);
}

static void draw__the_uniform_distribution_over_the_real_vocabulary(void **state) {
    (void)state;
    float *x = calloc(N_REAL, sizeof *x);
    samp *s = open_for(N_REAL);
    samp_params p = SAMP_DEFAULTS;
    p.top_p = 0.5f;
    for (int i = 0; i < 50; i++)
        assert_true(draw(s, x, &p, (uint64_t)i) < N_REAL / 2 + 8);
    p.top_p = 1;
    double sum = 0;
    for (int i = 0; i < 400; i++)
        sum += draw(s, x, &p, (uint64_t)i);
    assert_true(fabs(sum / 400 / N_REAL - 0.5) < 0.06);
    samp_close(s);
    free(x);
}

static void draw__same_seed_and_index_same_token(void **state) {
    (void)state;
    float *x = gaussian(5000, 3, 1);
    samp *a = open_for(5000), *b = open_for(5000);
    samp_params p = SAMP_DEFAULTS, q;
    p.seed = 0xfeedfacecafebeef;
    p.top_p = 0.95f;
    q = p;
    q.seed++;
    int differ = 0;
    for (uint64_t i = 0; i < 200; i++) {
        int32_t id = draw(a, x, &p, i);
        draw(b, x, &q, i + 7); /* whatever came before does not matter */
        assert_int_equal(id, draw(b, x, &p, i));
        differ += id != draw(a, x, &q, i);
    }
    assert_true(differ > 150);
    samp_close(a);
    samp_close(b);
    free(x);
}

static void draw__edges_of_temperature_and_top_p(void **state) {
    (void)state;
    float x[5] = {0, 3, 1, 2.9f, -1};
    samp *s = open_for(5);
    samp_params p = SAMP_DEFAULTS;
    for (uint64_t i = 0; i < 200; i++) {
        p = SAMP_DEFAULTS;
        p.temperature = 0;
        assert_int_equal(draw(s, x, &p, i), 1);
        p.temperature = 1e-30f;
        assert_int_equal(draw(s, x, &p, i), 1);
        p.temperature = 1e-42f; /* its inverse is infinite */
        assert_int_equal(draw(s, x, &p, i), 1);
        p = SAMP_DEFAULTS;
        p.top_p = 0;
        assert_int_equal(draw(s, x, &p, i), 1);
        p = SAMP_DEFAULTS;
        p.top_k = 1;
        assert_int_equal(draw(s, x, &p, i), 1);
    }
    samp_close(s);
    s = open_for(1);
    p = SAMP_DEFAULTS;
    assert_int_equal(draw(s, x, &p, 0), 0);
    samp_close(s);
}

static void draw__huge_spread_and_minus_infinity(void **state) {
    (void)state;
    enum { N = 600 };
    float x[N];
    for (int i = 0; i < N; i++)
        x[i] = -INFINITY;
    x[300] = 1e30f;
    x[599] = -3e38f;
    samp *s = open_for(N);
    samp_params p = SAMP_DEFAULTS;
    for (uint64_t i = 0; i < 100; i++) {
        assert_int_equal(draw(s, x, &p, i), 300);
        p.top_p = 0.9f;
        assert_int_equal(draw(s, x, &p, i), 300);
        p.top_k = 400;
        assert_int_equal(draw(s, x, &p, i), 300);
        p = SAMP_DEFAULTS;
    }
    samp_close(s);
}

static void draw__nan_and_infinity_are_numerical_errors(void **state) {
    (void)state;
    samp *s = open_for(700);
    samp_params p = SAMP_DEFAULTS;
    const float bad[] = {NAN, INFINITY};
    const int at[] = {0, 1, 255, 256, 600, 699};
    for (size_t b = 0; b < ORCD_COUNT(bad); b++) {
        for (size_t k = 0; k < ORCD_COUNT(at); k++) {
            float x[700] = {0};
            x[at[k]] = bad[b];
            for (int t = 0; t < 2; t++) {
                p.temperature = (float)t;
                samp_input in = {.logits = x, .params = &p};
                int32_t id;
                orcd_error err;
                assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_ERR_INTERNAL);
                assert_non_null(strstr(err.message, "numerical error"));
                assert_int_equal(id, -1);
            }
        }
    }
    samp_close(s);
}

static void mask__only_allowed_ids_and_none_is_an_error(void **state) {
    (void)state;
    enum { N = 301 };
    float *x = gaussian(N, 4, 3);
    uint32_t mask[(N + 31) / 32] = {0};
    samp *s = open_for(N);
    samp_params p = SAMP_DEFAULTS;
    samp_input in = {.logits = x, .params = &p, .mask = mask};
    int32_t id;
    orcd_error err;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_ERR_INTERNAL);
    mask[40 / 32] |= 1u << (40 % 32);
    mask[300 / 32] |= 1u << (300 % 32);
    int seen[N] = {0};
    for (uint64_t i = 0; i < 300; i++) {
        in.draw = i;
        p.top_p = i % 2 ? 1 : 0.999999f;
        assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
        seen[id]++;
    }
    assert_int_equal(seen[40] + seen[300], 300);
    p.temperature = 0;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, x[40] >= x[300] ? 40 : 300);
    samp_close(s);
    free(x);
}

static void bias__moves_the_choice_and_bad_ids_do_nothing(void **state) {
    (void)state;
    float x[4] = {0, 5, 1, 2};
    samp *s = open_for(4);
    samp_params p = SAMP_DEFAULTS;
    p.temperature = 0;
    const uint32_t ids[] = {1, 2, 4000000000u};
    const float bias[] = {-100, 100, 100};
    samp_input in = {.logits = x, .params = &p, .bias_id = ids, .bias = bias, .n_bias = 3};
    int32_t id;
    orcd_error err;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 2);
    assert_true(x[1] == 5);
    samp_close(s);
}

static void penalties__apply_once_per_token_to_their_own_part(void **state) {
    (void)state;
    samp *s = open_for(4);
    int32_t id;
    orcd_error err;
    samp_params p = SAMP_DEFAULTS;
    p.temperature = 0;
    const int32_t seen[] = {0, 0, 0, 1}; /* prompt 0 0, generated 0 1 */
    samp_input in = {.params = &p, .seen = seen, .n_seen = 4, .n_prompt = 2};

    float a[4] = {4, 0, 2.1f, -9}; /* 4 / 2 = 2 < 2.1: once, not once per occurrence */
    p.repetition_penalty = 2;
    in.logits = a;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 2);
    float b[4] = {-1, -1, -1.9f, -9}; /* negative ones are multiplied: -2, -2 */
    in.logits = b;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 2);

    p.repetition_penalty = 1;
    p.presence_penalty = 1;
    float c[4] = {3, 2.5f, 1.9f, -9}; /* 2, 1.5, 1.9 */
    in.logits = c;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 0);
    p.presence_penalty = 0;
    p.frequency_penalty = 1;
    const int32_t more[] = {0, 0, 1, 1, 1, 0};
    in.seen = more, in.n_seen = 6;        /* generated: 1 1 1 0 */
    float d[4] = {3.5f, 5.4f, 2.45f, -9}; /* 2.5, 2.4, 2.45 */
    in.logits = d;
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 0);
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK); /* counts were cleared */
    assert_int_equal(id, 0);
    in.n_prompt = 6; /* nothing generated: prompt tokens do not count */
    assert_int_equal(samp_draw(s, &in, &id, &err), ORCD_OK);
    assert_int_equal(id, 1);
    samp_close(s);
}

static void logprobs(const float *x, int32_t n_vocab, int32_t id, float *logprob, int n, int32_t *top_id, float *top) {
    be_likely l;
    samp_likely(x, n_vocab, id, n, &l);
    *logprob = l.logit - samp_log_sum(&l);
    for (int i = 0; i < n; i++) {
        top_id[i] = l.top_id[i];
        top[i] = l.top[i] - samp_log_sum(&l);
    }
}

static void logprobs__sum_to_one_and_are_ordered(void **state) {
    (void)state;
    enum { N = 700 };
    float *x = gaussian(N, 5, 3), top[20], lp;
    int32_t top_id[20];
    double sum = 0;
    for (int i = 0; i < N; i++) {
        logprobs(x, N, i, &lp, 0, NULL, NULL);
        sum += exp(lp);
    }
    assert_true(fabs(sum - 1) < 1e-4);
    logprobs(x, N, 3, &lp, 20, top_id, top);
    for (int i = 0; i < 20; i++) {
        logprobs(x, N, top_id[i], &lp, 0, NULL, NULL);
        assert_true(fabsf(lp - top[i]) < 1e-6f);
        assert_true(i == 0 || top[i] <= top[i - 1]);
        for (int j = 0; j < N && i == 19; j++) {
            int listed = 0;
            for (int k = 0; k < 20; k++)
                listed |= top_id[k] == j;
            assert_true(listed || x[j] <= x[top_id[19]]);
        }
    }
    free(x);
    float two[2] = {0, 0};
    logprobs(two, 2, 1, &lp, 5, top_id, top); /* more asked than there are */
    assert_true(fabsf(lp + 0.6931472f) < 1e-6f && top_id[0] == 0 && top_id[1] == 1 && top_id[2] == -1);
}

/* ---- the same bits on every machine ---- */

static void same_passes(const softmax_ops *a, const softmax_ops *b, const float *x, int32_t n, float inv_t) {
    enum { BLOCKS = 16 };
    float pa[BLOCKS], pb[BLOCKS], ea[SOFTMAX_BLOCK], eb[SOFTMAX_BLOCK];
    double ma[BLOCKS], mb[BLOCKS];
    uint32_t ra[SOFTMAX_BLOCK / 32], rb[SOFTMAX_BLOCK / 32];
    size_t blocks = (size_t)(n - 1) / SOFTMAX_BLOCK + 1;
    float max = a->peaks(x, n, pa);
    assert_true(max == b->peaks(x, n, pb) && max == a->peaks(x, n, NULL));
    assert_memory_equal(pa, pb, blocks * sizeof *pa);
    double sum = a->sum(x, n, max, inv_t, ma), again = b->sum(x, n, max, inv_t, mb), exact = 0;
    assert_memory_equal(&sum, &again, sizeof sum);
    assert_memory_equal(ma, mb, blocks * sizeof *ma);
    for (int32_t i = 0; i < n; i++)
        exact += exp((double)((x[i] - max) * inv_t));
    assert_true(fabs(sum / exact - 1) < 1e-6);
    for (int32_t at = 0; at < n; at += SOFTMAX_BLOCK) {
        int len = n - at < SOFTMAX_BLOCK ? n - at : SOFTMAX_BLOCK;
        a->weights(x + at, len, max, inv_t, ea);
        b->weights(x + at, len, max, inv_t, eb);
        assert_memory_equal(ea, eb, sizeof ea);
        a->reach(x + at, len, x[at], ra);
        b->reach(x + at, len, x[at], rb);
        assert_memory_equal(ra, rb, sizeof ra);
        for (int i = 0; i < SOFTMAX_BLOCK; i++) {
            double want = i < len ? exp((double)((x[at + i] - max) * inv_t)) : 0;
            assert_true(want < 1.5e-38 ? ea[i] < 1.5e-38f : fabs(ea[i] / want - 1) < 3e-7);
            assert_int_equal(ra[i / 32] >> (i % 32) & 1, i < len && x[at + i] >= x[at]);
        }
    }
}

static void softmax__every_tier_gives_the_bits_of_portable_c(void **state) {
    (void)state;
    const int length[] = {1, 3, 15, 16, 17, 255, 256, 257, 511, 600, 4096};
    for (int tier = CPU_PORTABLE; tier <= (int)cpu_tier_best(); tier++) {
        for (size_t k = 0; k < ORCD_COUNT(length); k++) {
            int n = length[k];
            const softmax_ops *ops = softmax_for((cpu_tier)tier);
            float *x = gaussian(n, k, k % 2 ? 2 : 30); /* wide enough that some exponentials vanish */
            for (float inv_t = 0.01f; inv_t < 200; inv_t *= 7)
                same_passes(&softmax_portable, ops, x, n, inv_t);
            x[n / 2] = -INFINITY;
            x[n - 1] = 3;
            same_passes(&softmax_portable, ops, x, n, 1);
            for (int i = 0; i < n; i += n / 16 + 1) {
                float keep = x[i];
                x[i] = NAN;
                assert_true(isnan(ops->peaks(x, n, NULL)));
                x[i] = keep;
            }
            free(x);
        }
    }
}

/* A hash of many draws, for a process of its own: the tier is chosen once. */
static int print_hash(void) {
    enum { N = 50257, DRAWS = 300 };
    float *x = gaussian(N, 77, 2.5f), lp, top[5];
    int32_t top_id[5];
    samp *s = open_for(N);
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < DRAWS; i++) {
        samp_params p = SAMP_DEFAULTS;
        p.seed = (uint64_t)i;
        p.temperature = 0.5f + (float)(i % 7) / 4;
        p.top_p = i % 3 == 1 ? 0.8f : 1;
        p.top_k = i % 4 == 2 ? 50 : 0;
        p.min_p = i % 5 == 3 ? 0.03f : 0;
        int32_t id = draw(s, x, &p, (uint64_t)i);
        logprobs(x, N, id, &lp, 5, top_id, top);
        uint32_t bits;
        memcpy(&bits, &lp, sizeof bits);
        hash = ((hash ^ (uint32_t)id) * 1099511628211u ^ bits) * 1099511628211u;
    }
    printf("%016llx\n", (unsigned long long)hash);
    samp_close(s);
    free(x);
    return 0;
}

static void draw__every_value_of_ORCD_CPU_draws_the_same(void **state) {
    (void)state;
    const char *const tier[] = {"portable", "avx2", "avxvnni", "avx512", "amx"};
    char self[4096] = {0}, command[4200], first[64] = {0}, line[64];
    assert_true(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    for (size_t i = 0; i < ORCD_COUNT(tier); i++) {
        snprintf(command, sizeof command, "ORCD_CPU=%s '%s' hash", tier[i], self);
        FILE *f = popen(command, "r");
        assert_non_null(f);
        assert_non_null(fgets(line, sizeof line, f));
        assert_int_equal(pclose(f), 0);
        if (i == 0)
            strcpy(first, line);
        assert_string_equal(line, first);
    }
}

int main(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "hash") == 0)
        return print_hash();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(softmax__every_tier_gives_the_bits_of_portable_c),
        cmocka_unit_test(draw__every_value_of_ORCD_CPU_draws_the_same),
        cmocka_unit_test(draw__a_million_follow_the_softmax),
        cmocka_unit_test(draw__every_filter_follows_its_definition),
        cmocka_unit_test(draw__ties_go_to_the_lower_id),
        cmocka_unit_test(draw__the_uniform_distribution_over_the_real_vocabulary),
        cmocka_unit_test(draw__same_seed_and_index_same_token),
        cmocka_unit_test(draw__edges_of_temperature_and_top_p),
        cmocka_unit_test(draw__huge_spread_and_minus_infinity),
        cmocka_unit_test(draw__nan_and_infinity_are_numerical_errors),
        cmocka_unit_test(mask__only_allowed_ids_and_none_is_an_error),
        cmocka_unit_test(bias__moves_the_choice_and_bad_ids_do_nothing),
        cmocka_unit_test(penalties__apply_once_per_token_to_their_own_part),
        cmocka_unit_test(logprobs__sum_to_one_and_are_ordered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
