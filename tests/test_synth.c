/* Random models: the presets against the published numbers, the numbers against what they claim to be. */
#include <unistd.h>

#include "arch/synth.h"
#include "testing.h"

static char dir[] = "/tmp/orcd-synth-XXXXXX";

static const char *path_of(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static orcd_status count(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    (void)data, (void)err;
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dims; i++)
        n *= t->ne[i];
    *(uint64_t *)ctx += n;
    return ORCD_OK;
}

/* gpt-oss model card, table 1: 20.91 and 116.83 billion parameters; GPT-2: 124,439,808 with the head tied. */
static void presets_have_the_published_number_of_parameters(void **state) {
    (void)state;
    static const struct {
        const char *name;
        double billions;
    } want[] = {{"gpt-oss-20b", 20.91}, {"gpt-oss-120b", 116.83}, {"gpt2", 0.124439808 + 0.0385973}};
    for (size_t i = 0; i < ORCD_COUNT(want); i++) {
        const arch *a;
        arch_config c;
        uint64_t n = 0;
        assert_true(arch_preset(want[i].name, &a, &c));
        assert_int_equal(arch_each_tensor(a, &c, 0, NULL, count, &n, NULL), ORCD_OK);
        assert_true(fabs((double)n / 1e9 - want[i].billions) < 0.005);
    }
}

static void unknown_preset(void **state) {
    (void)state;
    const arch *a;
    arch_config c;
    assert_false(arch_preset("gpt-3", &a, &c));
    assert_false(arch_preset("", &a, &c));
}

static void make(const char *preset, const char *path, const char *type, uint64_t seed, int threads) {
    const arch_types types = {type, type};
    const arch *a;
    arch_config c;
    arch_exported sum;
    gguf_writer *w;
    orcd_error err = {0};
    assert_true(arch_preset(preset, &a, &c));
    if (gguf_create(path, 32, &w, &err) || arch_synth_keys(a, &c, preset, w, &err) ||
        arch_synth(a, &c, &types, seed, threads, NULL, NULL, w, &sum, &err) || gguf_finish(w, &err))
        fail_msg("%s", err.message);
}

static void same_bytes_whatever_the_threads(void **state) {
    (void)state;
    size_t n[3];
    uint8_t *bytes[3];
    make("gpt-oss-mini", path_of("a"), NULL, 7, 1);
    bytes[0] = t_read(path_of("a"), &n[0]);
    make("gpt-oss-mini", path_of("a"), NULL, 7, 3);
    bytes[1] = t_read(path_of("a"), &n[1]);
    make("gpt-oss-mini", path_of("a"), NULL, 8, 3);
    bytes[2] = t_read(path_of("a"), &n[2]);
    assert_int_equal(n[0], n[1]);
    assert_int_equal(n[0], n[2]);
    assert_memory_equal(bytes[0], bytes[1], n[0]);
    assert_memory_not_equal(bytes[0], bytes[2], n[0]);
    for (int i = 0; i < 3; i++)
        free(bytes[i]);
}

static double deviation(const mf_file *f, const char *name) {
    mf_tensor t;
    bool found;
    double sum = 0, squares = 0;
    assert_int_equal(mf_find(f, name, &t, &found, NULL), ORCD_OK);
    assert_true(found);
    size_t n = t.n_mat * t.n_row * t.n_col;
    float *v = malloc(n * sizeof *v);
    mf_floats(&t, v);
    for (size_t i = 0; i < n; i++) {
        sum += v[i];
        squares += (double)v[i] * v[i];
    }
    free(v);
    return sqrt(squares / (double)n - sum / (double)n * (sum / (double)n));
}

/* Of 65,536 values and more: 5 %. MXFP4's scale is a power of two, so its deviation may be off by half of one. */
static void values_spread_as_they_should(void **state) {
    (void)state;
    mf_file *f;
    make("gpt-oss-mini", path_of("b"), NULL, 1, 2);
    assert_int_equal(mf_open(path_of("b"), &f, NULL), ORCD_OK);
    assert_true(fabs(deviation(f, "blk.1.attn_q.weight") * 16 - 1) < 0.05);
    assert_true(fabs(deviation(f, "token_embd.weight") - 1) < 0.05);
    assert_true(fabs(deviation(f, "blk.3.ffn_up_exps.weight") * 16 - 1) < 0.5);
    assert_true(fabs(deviation(f, "blk.3.ffn_up_exps.bias") * 10 - 1) < 0.1);
    mf_close(f);
}

static void every_type_loads(void **state) {
    (void)state;
    for (size_t i = 0; i < q_count(); i++) {
        mf_file *f;
        const arch *a;
        arch_config c, want;
        arch_size size;
        orcd_error err = {0};
        make("gpt2-mini", path_of("c"), q_at(i)->name, 1, 2);
        if (mf_open(path_of("c"), &f, &err) || arch_identify(f, &a, &err) || arch_config_read(a, f, &c, &err) ||
            arch_measure(a, f, &c, &size, &err))
            fail_msg("%s: %s", q_at(i)->name, err.message);
        assert_true(arch_preset("gpt2-mini", &a, &want));
        assert_int_equal(c.n_layer, want.n_layer);
        assert_int_equal(c.n_vocab, want.n_vocab);
        assert_int_equal(c.n_ctx, want.n_ctx);
        mf_close(f);
    }
}

/* What is read back is the preset: nothing of it gets lost in the keys. */
static void the_file_says_what_the_preset_says(void **state) {
    (void)state;
    mf_file *f;
    const arch *a;
    arch_config c, want;
    make("gpt-oss-mini", path_of("d"), "Q8_0", 1, 2);
    assert_int_equal(mf_open(path_of("d"), &f, NULL), ORCD_OK);
    assert_int_equal(arch_identify(f, &a, NULL), ORCD_OK);
    memset(&c, 0, sizeof c);
    assert_int_equal(arch_config_read(a, f, &c, NULL), ORCD_OK);
    assert_true(arch_preset("gpt-oss-mini", &a, &want));
    for (int i = want.n_layer; i < ARCH_MAX_LAYERS; i++)
        want.window[i] = 0;
    assert_memory_equal(c.window, want.window, sizeof c.window);
    assert_true(c.n_embd == want.n_embd && c.n_head == want.n_head && c.n_kv_head == want.n_kv_head &&
                c.head_dim == want.head_dim && c.n_ff == want.n_ff && c.n_expert == want.n_expert &&
                c.n_expert_used == want.n_expert_used && c.rope_base == want.rope_base &&
                c.rope_factor == want.rope_factor && c.rope_n_ctx_orig == want.rope_n_ctx_orig &&
                c.glu_limit == want.glu_limit && c.norm_eps == want.norm_eps && !c.rope_truncate);
    mf_close(f);
}

static int begin(void **state) {
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int end(void **state) {
    (void)state;
    for (const char *n = "abcd"; *n; n++)
        unlink(path_of((char[]){*n, 0}));
    return rmdir(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(presets_have_the_published_number_of_parameters),
        cmocka_unit_test(unknown_preset),
        cmocka_unit_test(same_bytes_whatever_the_threads),
        cmocka_unit_test(values_spread_as_they_should),
        cmocka_unit_test(every_type_loads),
        cmocka_unit_test(the_file_says_what_the_preset_says),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
