/* Validation: what quantisation costs, that equal models are equal to the last bit, that a spoilt tensor is named. */
#include <unistd.h>

#include "arch/export.h"
#include "engine/validate.h"
#include "testing.h"
#include "text/tokenizer.h"

#define FABLE "models/fable.gguf"
#define GPT2 "tests/golden/gpt2-mini"
#define GPT2_IDS "tests/golden/gpt2-mini/prompt2.i32"

static char dir[] = "/tmp/orcd-validate-XXXXXX";
static ids fable_ids, gpt2_ids;

static const char *file(void) {
    static char path[64];
    snprintf(path, sizeof path, "%s/t.gguf", dir);
    return path;
}

/* `from` as file(), every matrix in the type or mix; NULL: as it is. */
static void quantise(const char *from, const char *type) {
    const arch_types types = {type, type};
    orcd_error err = {0};
    arch_exported sum;
    arch_config c;
    gguf_writer *w;
    mf_file *f;
    const arch *a;
    if (mf_open(from, &f, &err) || arch_identify(f, &a, &err) || arch_config_read(a, f, &c, &err) ||
        gguf_create(file(), 32, &w, &err) || arch_put_keys(a, f, &c, true, w, &err) ||
        arch_export(a, f, &c, &types, NULL, 2, NULL, NULL, w, &sum, &err) || gguf_finish(w, &err))
        fail_msg("%s as %s: %s", from, type, err.message);
    mf_close(f);
}

static teacher *open_teacher(const char *path, const char *backend, int chunk, int n_ctx) {
    orcd_error err = {0};
    teacher *t;
    teacher_params p = {.model = path,
                        .backend = backend,
                        .device = {.n_threads = 2},
                        .kv_type = strcmp(backend, "ref") == 0 ? BE_KV_F32 : BE_KV_F16,
                        .n_ctx = n_ctx,
                        .chunk = chunk};
    if (teacher_open(&p, &t, &err))
        fail_msg("%s on %s: %s", path, backend, err.message);
    return t;
}

static agreement measure(teacher *a, teacher *b, const ids *text, int64_t ctx) {
    agreement g;
    orcd_error err = {0};
    if (validate_logits(a, b, text->data, (int64_t)text->n, ctx, NULL, NULL, &g, &err))
        fail_msg("%s", err.message);
    assert_int_equal(g.n, text->n);
    return g;
}

static agreement compare(const char *a, const char *b, const char *backend_b, const ids *text) {
    teacher *ta = open_teacher(a, "cpu", 64, (int)text->n), *tb = open_teacher(b, backend_b, 64, (int)text->n);
    agreement g = measure(ta, tb, text, (int64_t)text->n);
    teacher_close(ta);
    teacher_close(tb);
    return g;
}

/* ---- divergence ---- */

static void itself_is_equal_to_the_bit(void **state) {
    (void)state;
    agreement g = compare(FABLE, FABLE, "cpu", &fable_ids);
    assert_int_equal(g.n_same, g.n);
    assert_true(g.kl_max == 0 && g.kl_mean == 0 && g.kl_p99 == 0 && g.cos_worst == 1 && g.cos_mean == 1);
    assert_true(g.a.mean == g.b.mean && g.a.n == g.n - 1);
    agreement_free(&g);
}

static void backends_are_near(void **state) {
    (void)state;
    agreement g = compare(FABLE, FABLE, "ref", &fable_ids);
    assert_true(g.kl_mean > 0 && g.kl_mean < 1e-4 && g.cos_worst > 0.9999);
    assert_true(g.n_same >= g.n - 2);
    agreement_free(&g);
}

/* Bounds: about twice what was measured when they were set. */
static void check_type(const char *from, const char *type, const ids *text, double kl_mean, double change) {
    quantise(from, type);
    agreement g = compare(from, file(), "cpu", text);
    double ratio = fabs(expm1(g.b.mean - g.a.mean));
    print_message("%-24s %-7s KL mean %.5f p99 %.5f, cosine %.5f, agreement %.1f %%, perplexity %.2f %%\n", from, type,
                  g.kl_mean, g.kl_p99, g.cos_mean, 100.0 * (double)g.n_same / (double)g.n, 100 * ratio);
    assert_true(g.kl_mean > 0 && g.kl_mean < kl_mean);
    assert_true(g.kl_p99 >= g.kl_mean && g.kl_p99 <= g.kl_max);
    assert_true(ratio < change);
    agreement_free(&g);
}

static void quantised_fable_is_within_bounds(void **state) {
    (void)state;
    check_type(FABLE, "Q8_0", &fable_ids, 0.02, 0.01);
    check_type(FABLE, "Q6_K", &fable_ids, 0.05, 0.02);
    check_type(FABLE, "Q4_K_M", &fable_ids, 0.3, 0.04);
    check_type(FABLE, "MXFP4", &fable_ids, 0.6, 0.06);
}

static void quantised_gpt2_is_within_bounds(void **state) {
    (void)state;
    check_type(GPT2, "Q8_0", &gpt2_ids, 0.003, 0.03);
    check_type(GPT2, "Q6_K", &gpt2_ids, 0.008, 0.12);
    check_type(GPT2, "Q4_K_M", &gpt2_ids, 0.1, 0.08);
    check_type(GPT2, "MXFP4", &gpt2_ids, 1.2, 0.25);
}

/* Windows start from nothing: the second is scored like a text of its own. */
static void windows_are_texts_of_their_own(void **state) {
    (void)state;
    quantise(FABLE, "Q8_0");
    teacher *a = open_teacher(FABLE, "cpu", 32, 100), *b = open_teacher(file(), "cpu", 32, 100);
    ids two = {.data = fable_ids.data, .n = 170}, second = {.data = fable_ids.data + 100, .n = 70};
    agreement all = measure(a, b, &two, 100), last = measure(a, b, &second, 100);
    for (int i = 0; i < 70; i++)
        assert_true(all.kl[100 + i] == last.kl[i]);
    assert_int_equal(all.a.n, 99 + 69);
    assert_true(all.kl[all.kl_at] == (float)all.kl_max);
    agreement_free(&all);
    agreement_free(&last);
    teacher_close(a);
    teacher_close(b);
}

static void other_vocabularies_are_refused(void **state) {
    (void)state;
    agreement g;
    orcd_error err = {0};
    teacher *a = open_teacher(FABLE, "cpu", 8, 16), *b = open_teacher(GPT2, "cpu", 8, 16);
    assert_int_equal(validate_logits(a, b, gpt2_ids.data, 8, 8, NULL, NULL, &g, &err), ORCD_ERR_ARG);
    assert_null(g.kl);
    teacher_close(a);
    teacher_close(b);
    tensor_error *t;
    int n;
    assert_int_equal(validate_tensors(FABLE, GPT2, 1, NULL, NULL, &t, &n, &err), ORCD_ERR_ARG);
    assert_non_null(strstr(err.message, "gpt2"));
    assert_null(t);
}

/* ---- weights ---- */

static void error_of_a_tensor_is_that_of_its_values(void **state) {
    (void)state;
    tensor_error *one, *three;
    int n, n3;
    orcd_error err = {0};
    quantise(FABLE, "Q4_0");
    assert_int_equal(validate_tensors(FABLE, file(), 1, NULL, NULL, &one, &n, &err), ORCD_OK);
    assert_int_equal(validate_tensors(FABLE, file(), 3, NULL, NULL, &three, &n3, &err), ORCD_OK);
    assert_int_equal(n, n3);
    mf_file *f[2];
    assert_int_equal(mf_open(FABLE, &f[0], &err) | mf_open(file(), &f[1], &err), ORCD_OK);
    for (int i = 0; i < n; i++) {
        mf_tensor t[2];
        bool found;
        float *v[2];
        assert_true(one[i].rel == three[i].rel); /* sums have one order */
        for (int k = 0; k < 2; k++) {
            assert_int_equal(mf_find(f[k], one[i].name, &t[k], &found, &err), ORCD_OK);
            assert_true(found && one[i].type[k] == t[k].type);
            v[k] = malloc(one[i].n_value * sizeof **v);
            mf_floats(&t[k], v[k]);
        }
        double rel = t_rel_error(v[1], v[0], one[i].n_value);
        assert_true(fabs(one[i].rel - rel) <= 1e-9 * rel);
        free(v[0]);
        free(v[1]);
    }
    mf_close(f[0]);
    mf_close(f[1]);
    free(one);
    free(three);
}

/* ---- a spoilt tensor ---- */

/* Every fourth block of a Q8_0 tensor of file() changes its sign. */
static void spoil(const char *name) {
    gguf *g;
    orcd_error err = {0};
    size_t size;
    uint8_t *whole = t_read(file(), &size);
    assert_int_equal(gguf_parse(whole, size, &g, &err), ORCD_OK);
    const gguf_tensor *t = gguf_find_tensor(g, name);
    assert_true(t && t->type == Q_Q8_0);
    uint8_t *block = whole + (t->data - whole);
    for (uint64_t at = 1; at < t->bytes; at += 4 * 34)
        block[at] ^= 0x80; /* the sign of the block's scale */
    gguf_close(g);
    FILE *out = fopen(file(), "wb");
    assert_true(out && fwrite(whole, 1, size, out) == size && fclose(out) == 0);
    free(whole);
}

static void check_spoilt(const char *tensor, const char *tap, int layer) {
    teacher *a, *b;
    taps *t;
    tap_error *p;
    tensor_error *e;
    int n, worst = 0, first = 0;
    orcd_error err = {0};
    quantise(FABLE, "Q8_0");
    spoil(tensor);
    assert_int_equal(validate_tensors(FABLE, file(), 2, NULL, NULL, &e, &n, &err), ORCD_OK);
    for (int i = 0; i < n; i++)
        worst = e[i].rel > e[worst].rel ? i : worst;
    assert_string_equal(e[worst].name, tensor);
    assert_true(e[worst].rel > 0.5 && e[worst].cosine < 0.9);
    free(e);

    a = open_teacher(FABLE, "cpu", 32, 256);
    b = open_teacher(file(), "cpu", 32, 256);
    assert_int_equal(taps_open(a, b, &t, &err), ORCD_OK);
    agreement g = measure(a, b, &(ids){.data = fable_ids.data, .n = 256}, 128);
    assert_int_equal(taps_result(t, &p, &n, &err), ORCD_OK);
    taps_close(t);
    assert_int_equal(n, 1 + 3 * 6);
    while (first < n && p[first].rel <= 0.05)
        first++;
    assert_true(first < n);
    assert_string_equal(p[first].name, tap);
    assert_int_equal(p[first].layer, layer);
    assert_true(p[first].at < 256 && p[first].rel_worst >= p[first].rel);
    free(p);
    agreement_free(&g);
    teacher_close(a);
    teacher_close(b);
}

static void spoilt_tensor_is_named_by_its_weights_and_by_taps(void **state) {
    (void)state;
    check_spoilt("token_embd.weight", "embed", -1);
    check_spoilt("blk.1.attn_v.weight", "attention", 1);
    check_spoilt("blk.3.attn_output.weight", "attn_out", 3);
    check_spoilt("blk.4.ffn_down_exps.weight", "layer", 4);
}

static void taps_of_equal_runs_are_equal(void **state) {
    (void)state;
    taps *t;
    tap_error *p;
    int n;
    orcd_error err = {0};
    teacher *a = open_teacher(GPT2, "cpu", 16, 64), *b = open_teacher(GPT2, "cpu", 16, 64);
    assert_int_equal(taps_open(a, b, &t, &err), ORCD_OK);
    agreement g = measure(a, b, &(ids){.data = gpt2_ids.data, .n = 50}, 50);
    assert_int_equal(taps_result(t, &p, &n, &err), ORCD_OK);
    assert_true(n > 3);
    for (int i = 0; i < n; i++)
        assert_true(p[i].rel == 0 && p[i].rel_worst == 0);
    free(p);
    taps_close(t);
    agreement_free(&g);
    teacher_close(a);
    teacher_close(b);
}

static int set_up(void **state) {
    (void)state;
    orcd_error err = {0};
    mf_file *f;
    tok *t;
    size_t n;
    if (mf_open(FABLE, &f, &err) || tok_open_for(f, NULL, &t, &err) ||
        tok_encode(t, validate_text, strlen(validate_text), false, &fable_ids))
        return -1;
    tok_close(t);
    mf_close(f);
    fable_ids.n = fable_ids.n < 512 ? fable_ids.n : 512;
    int32_t *id = (int32_t *)(void *)t_read(GPT2_IDS, &n);
    ids_add(&gpt2_ids, id, n / 4);
    free(id);
    return mkdtemp(dir) ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    ids_free(&fable_ids);
    ids_free(&gpt2_ids);
    unlink(file());
    return rmdir(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(itself_is_equal_to_the_bit),
        cmocka_unit_test(backends_are_near),
        cmocka_unit_test(quantised_fable_is_within_bounds),
        cmocka_unit_test(quantised_gpt2_is_within_bounds),
        cmocka_unit_test(windows_are_texts_of_their_own),
        cmocka_unit_test(other_vocabularies_are_refused),
        cmocka_unit_test(error_of_a_tensor_is_that_of_its_values),
        cmocka_unit_test(spoilt_tensor_is_named_by_its_weights_and_by_taps),
        cmocka_unit_test(taps_of_equal_runs_are_equal),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
