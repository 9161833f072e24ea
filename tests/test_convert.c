/* Models written as GGUF: every type against its own pack, bit-exact copies, the keys of folders, failures. */
#include <unistd.h>

#include "arch/export.h"
#include "testing.h"

#define FABLE "models/fable.gguf"

static char dir[] = "/tmp/orcd-convert-XXXXXX";

static const char *path_of(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

typedef struct model {
    mf_file *f;
    const arch *a;
    arch_config c;
} model;

static model open_model(const char *path) {
    model m;
    orcd_error err = {0};
    if (mf_open(path, &m.f, &err) || arch_identify(m.f, &m.a, &err) || arch_config_read(m.a, m.f, &m.c, &err))
        fail_msg("%s: %s", path, err.message);
    return m;
}

static orcd_status convert(const char *from, const char *to, const char *dense, const char *experts, int threads,
                           arch_exported *sum, orcd_error *err) {
    const arch_types types = {dense, experts};
    gguf_writer *w;
    model m = open_model(from);
    orcd_status st = gguf_create(to, 32, &w, err);
    if (st == ORCD_OK) {
        st = arch_put_keys(m.a, m.f, &m.c, true, w, err);
        if (st == ORCD_OK)
            st = arch_export(m.a, m.f, &m.c, &types, NULL, threads, NULL, NULL, w, sum, err);
        if (st == ORCD_OK)
            st = gguf_finish(w, err);
        else
            gguf_abandon(w);
    }
    mf_close(m.f);
    return st;
}

static void convert_ok(const char *from, const char *to, const char *dense, const char *experts, int threads) {
    arch_exported sum;
    orcd_error err = {0};
    if (convert(from, to, dense, experts, threads, &sum, &err))
        fail_msg("%s to %s: %s", from, to, err.message);
}

/* What a tensor of the new file must hold: the old one's values packed row by row. */
typedef struct expected {
    int n, n_packed;
} expected;

static orcd_status check_tensor(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    expected *e = ctx;
    (void)err;
    const mf_tensor *old = data[0], *new = data[1];
    size_t n = old->n_mat * old->n_row * old->n_col;
    const q_traits *q = q_find(new->type);
    e->n++;
    assert_non_null(new->data);
    if (t->tied)
        return ORCD_OK;
    float *value = malloc(n * sizeof *value);
    uint8_t *want = malloc(q_row_bytes(q, n));
    mf_floats(old, value);
    if (new->type == old->type) { /* bits, not values */
        for (uint64_t m = 0; m < old->n_mat && !t->exact; m++)
            mf_rows(old, m, 0, old->n_row, want + m * old->n_row * mf_row_bytes(old));
        if (t->exact)
            memcpy(want, value, n * sizeof *value);
    } else {
        q->pack(value, want, n);
        e->n_packed++;
    }
    assert_memory_equal(new->data, want, q_row_bytes(q, n));
    free(value);
    free(want);
    return ORCD_OK;
}

static expected compare(const char *old, const char *new) {
    model a = open_model(old), b = open_model(new);
    const mf_file *files[] = {a.f, b.f};
    expected e = {0};
    orcd_error err = {0};
    if (arch_each_tensor(a.a, &a.c, 2, files, check_tensor, &e, &err))
        fail_msg("%s", err.message);
    assert_memory_equal(&a.c, &b.c, sizeof a.c);
    mf_close(a.f);
    mf_close(b.f);
    return e;
}

static void every_type_of_a_file(void **state) {
    (void)state;
    for (size_t i = 0; i < q_count(); i++) {
        convert_ok(FABLE, path_of("t.gguf"), q_at(i)->name, q_at(i)->name, 1 + (int)i % 3);
        expected e = compare(FABLE, path_of("t.gguf"));
        assert_int_equal(e.n, 117);
        assert_true(e.n_packed >= 18); /* all the experts, or all but them */
    }
}

static void as_stored_is_bit_by_bit(void **state) {
    (void)state;
    convert_ok(FABLE, path_of("t.gguf"), NULL, NULL, 2);
    assert_int_equal(compare(FABLE, path_of("t.gguf")).n_packed, 0);
}

static void folders_as_stored(void **state) {
    (void)state;
    static const char *const folder[] = {"tests/golden/gptoss-mini", "tests/golden/gptoss-mini-topk2",
                                         "tests/golden/gpt2-mini"};
    for (size_t i = 0; i < 3; i++) {
        convert_ok(folder[i], path_of("t.gguf"), NULL, NULL, 2);
        expected e = compare(folder[i], path_of("t.gguf"));
        assert_true(e.n > 40);
    }
}

static void folders_in_other_types(void **state) {
    (void)state;
    convert_ok("tests/golden/gpt2-mini", path_of("t.gguf"), "Q8_0", NULL, 3);
    assert_true(compare("tests/golden/gpt2-mini", path_of("t.gguf")).n_packed > 8);
    convert_ok("tests/golden/gptoss-mini", path_of("t.gguf"), "MXFP4", "Q5_1", 3);
    assert_true(compare("tests/golden/gptoss-mini", path_of("t.gguf")).n_packed > 20);
}

static q_type type_in(const char *path, const char *name) {
    orcd_error err = {0};
    gguf *g;
    assert_int_equal(gguf_open(path, &g, &err), ORCD_OK);
    const gguf_tensor *t = gguf_find_tensor(g, name);
    assert_non_null(t);
    q_type type = t->type;
    gguf_close(g);
    return type;
}

static void q4_k_m_gives_more_to_what_suffers(void **state) {
    (void)state;
    convert_ok(FABLE, path_of("t.gguf"), "Q4_K_M", NULL, 2);
    assert_int_equal(type_in(path_of("t.gguf"), "output.weight"), Q_Q6_K);
    assert_int_equal(type_in(path_of("t.gguf"), "token_embd.weight"), Q_Q4_K);
    assert_int_equal(type_in(path_of("t.gguf"), "blk.1.attn_v.weight"), Q_Q4_K);
    assert_int_equal(type_in(path_of("t.gguf"), "blk.2.attn_v.weight"), Q_Q6_K);
    assert_int_equal(type_in(path_of("t.gguf"), "blk.1.ffn_gate_inp.weight"), Q_F32);
    assert_int_equal(type_in(path_of("t.gguf"), "blk.1.ffn_up_exps.weight"), Q_MXFP4);
}

/* Rows of 64 and of 96 values: no blocks of 256. */
static void rows_that_do_not_divide(void **state) {
    (void)state;
    static const struct {
        const char *mix;
        q_type got;
    } fallback[] = {{"Q4_K", Q_Q5_0}, {"Q5_K", Q_Q5_1}, {"Q6_K", Q_Q8_0}};
    for (size_t i = 0; i < 3; i++) {
        convert_ok("tests/golden/gpt2-mini", path_of("t.gguf"), fallback[i].mix, NULL, 2);
        assert_int_equal(type_in(path_of("t.gguf"), "blk.0.attn_output.weight"), fallback[i].got);
        compare("tests/golden/gpt2-mini", path_of("t.gguf"));
    }
}

static void failure_leaves_nothing(void **state) {
    (void)state;
    arch_exported sum;
    orcd_error err = {0};
    char target[256];
    snprintf(target, sizeof target, "%s/folder", dir);
    assert_int_equal(mkdtemp(strcat(target, "XXXXXX")) != NULL, 1);
    assert_int_equal(convert("tests/golden/gpt2-mini", target, NULL, NULL, 1, &sum, &err), ORCD_ERR_IO);
    assert_non_null(strstr(err.message, target));
    strcat(target, ".part");
    assert_int_equal(access(target, F_OK), -1);
    target[strlen(target) - 5] = '\0';
    rmdir(target);
}

static int make_dir(void **state) {
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int drop_dir(void **state) {
    (void)state;
    unlink(path_of("t.gguf"));
    return rmdir(dir);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_type_of_a_file),    cmocka_unit_test(as_stored_is_bit_by_bit),
        cmocka_unit_test(folders_as_stored),       cmocka_unit_test(folders_in_other_types),
        cmocka_unit_test(rows_that_do_not_divide), cmocka_unit_test(q4_k_m_gives_more_to_what_suffers),
        cmocka_unit_test(failure_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, make_dir, drop_dir);
}
