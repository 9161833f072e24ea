/* Models in several GGUF files: fable cut into three as llama.cpp's gguf-split does it, and sets that are not whole. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/part_name.h"
#include "format/model_file.h"
#include "gguf_image.h"
#include "testing.h"

#define FABLE "models/fable.gguf"

static char dir[64];

static int make_dir(void **state) {
    (void)state;
    strcpy(dir, "/tmp/orcd-parts-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int drop_dir(void **state) {
    char command[96];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

static const char *path_of(int no, int count) {
    static char path[128];
    snprintf(path, sizeof path, "%s/m-%05d-of-%05d.gguf", dir, no, count);
    return path;
}

static void put(int no, int count, image *m) {
    FILE *f = fopen(path_of(no, count), "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(m->b.data, 1, m->b.len, f), m->b.len);
    fclose(f);
    buf_free(&m->b);
}

static void begin_part(image *m, int no, int count, int n_tensors) {
    img_begin(m, 3);
    img_kv_int(m, "split.no", GGUF_U16, (uint64_t)no - 1, 2);
    img_kv_int(m, "split.count", GGUF_U16, (uint64_t)count, 2);
    img_kv_int(m, "split.tensors.count", GGUF_I32, (uint64_t)n_tensors, 4);
}

static uint64_t aligned(uint64_t n) { return (n + 31) / 32 * 32; }

/* Tensors first, first + 1, ... (n of them) of g in one part; the first part has fable's keys too. */
static void put_part_of(const gguf *g, int no, uint64_t first, uint64_t n) {
    image m;
    uint64_t at = 0;
    begin_part(&m, no, 3, (int)gguf_n_tensors(g));
    for (uint64_t i = 0; no == 1 && i < gguf_n_kv(g); i++) {
        const gguf_kv *kv = gguf_kv_at(g, i);
        char key[256];
        snprintf(key, sizeof key, "%.*s", (int)kv->key.len, kv->key.data);
        if (kv->type == GGUF_ARRAY)
            img_kv_array(&m, key, kv->elem, kv->n);
        else
            img_key(&m, key, kv->type);
        buf_add(&m.b, kv->data, gguf_kv_bytes(kv));
    }
    for (uint64_t i = first; i < first + n; i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        char name[96];
        snprintf(name, sizeof name, "%.*s", (int)t->name.len, t->name.data);
        img_tensor(&m, name, t->type, t->n_dims, t->ne, at);
        at += aligned(t->bytes);
    }
    img_data(&m, 32, 0);
    for (uint64_t i = first; i < first + n; i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        buf_add(&m.b, t->data, t->bytes);
        img_data(&m, 32, 0);
    }
    put(no, 3, &m);
}

static void every_part_opens_the_whole_model(void **state) {
    (void)state;
    gguf *whole, *g;
    mf_file *f;
    orcd_error err;
    assert_int_equal(gguf_open(FABLE, &whole, &err), ORCD_OK);
    uint64_t n = gguf_n_tensors(whole);
    put_part_of(whole, 1, 0, 0); /* --no-tensor-first-split */
    put_part_of(whole, 2, 0, n / 3);
    put_part_of(whole, 3, n / 3, n - n / 3);
    for (int no = 1; no <= 3; no++) {
        if (gguf_open(path_of(no, 3), &g, &err) != ORCD_OK)
            fail_msg("%s", err.message);
        assert_int_equal(gguf_n_tensors(g), n);
        assert_true(gguf_bytes(g) > gguf_bytes(whole));
        for (uint64_t i = 0; i < n; i++) {
            const gguf_tensor *t = gguf_tensor_at(whole, i);
            char name[96];
            snprintf(name, sizeof name, "%.*s", (int)t->name.len, t->name.data);
            const gguf_tensor *u = gguf_find_tensor(g, name);
            assert_non_null(u);
            assert_ptr_equal(u, gguf_tensor_at(g, i));
            assert_int_equal(u->bytes, t->bytes);
            assert_memory_equal(u->data, t->data, t->bytes);
        }
        assert_false(gguf_changed(g));
        if (no == 3)
            assert_int_equal(truncate(path_of(2, 3), 100), 0);
        assert_int_equal(gguf_changed(g), no == 3);
        gguf_close(g);
    }
    put_part_of(whole, 2, 0, n / 3);
    assert_int_equal(mf_open(path_of(2, 3), &f, &err), ORCD_OK);
    assert_string_equal(mf_arch_name(f), "gpt-oss");
    mf_close(f);
    gguf_close(whole);
}

static void refused(int no, int count, orcd_status code, const char *says) {
    gguf *g;
    orcd_error err;
    assert_int_equal(gguf_open(path_of(no, count), &g, &err), code);
    assert_null(g);
    if (!strstr(err.message, says))
        fail_msg("\"%s\" does not say \"%s\"", err.message, says);
}

/* Part `no` of two, that says it is `says_no` of `says_count`, with one tensor. */
static void put_small(int no, int says_no, int says_count, int n_tensors, const char *tensor) {
    image m;
    begin_part(&m, says_no, says_count, n_tensors);
    img_tensor(&m, tensor, Q_F32, 1, (uint64_t[]){4}, 0);
    img_data(&m, 32, 16);
    put(no, 2, &m);
}

static void sets_that_are_not_whole_are_refused(void **state) {
    (void)state;
    gguf *g;
    orcd_error err;
    put_small(1, 1, 2, 2, "a");
    refused(1, 2, ORCD_ERR_IO, "m-00002-of-00002.gguf is missing: the model has 2 parts");
    put_small(2, 2, 2, 2, "a");
    refused(1, 2, ORCD_ERR_FORMAT, "two parts of");
    put_small(2, 1, 2, 2, "b");
    refused(1, 2, ORCD_ERR_FORMAT, "says that it is part 1 of 2");
    put_small(2, 2, 3, 2, "b");
    refused(1, 2, ORCD_ERR_FORMAT, "says that it is part 2 of 3");
    refused(2, 2, ORCD_ERR_FORMAT, "is one of 3 parts, but its name");
    put_small(2, 2, 2, 2, "b");
    assert_int_equal(truncate(path_of(2, 2), 40), 0);
    refused(1, 2, ORCD_ERR_FORMAT, "m-00002-of-00002.gguf: the number of tensors is 1, which cannot be");
    put_small(2, 2, 2, 3, "b");
    put_small(1, 1, 2, 3, "a");
    refused(2, 2, ORCD_ERR_FORMAT, "all parts hold 3 tensors, but they hold 2");
    put_small(1, 1, 2, 2, "a");
    assert_int_equal(gguf_open(path_of(2, 2), &g, &err), ORCD_OK);
    assert_int_equal(gguf_n_tensors(g), 2);
    gguf_close(g);
}

static void names_of_parts(void **state) {
    (void)state;
    static const char *const bad[] = {"",
                                      "-00001-of-00002.gguf",
                                      "m-00000-of-00002.gguf",
                                      "m-00003-of-00002.gguf",
                                      "m-0001-of-00002.gguf",
                                      "m-00001-of-0000x.gguf",
                                      "m-00001_of-00002.gguf",
                                      "m-00001-of-00002.gguf.part",
                                      "m-00001-of-01025.gguf"};
    char path[] = "a/m-00002-of-00123.GGUF";
    part_name p;
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        assert_false(part_name_read(bad[i], &p));
    assert_true(part_name_read(path, &p));
    assert_int_equal(p.no, 2);
    assert_int_equal(p.count, 123);
    part_name_set(path, &p, 104);
    assert_string_equal(path, "a/m-00104-of-00123.GGUF");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_part_opens_the_whole_model),
        cmocka_unit_test(sets_that_are_not_whole_are_refused),
        cmocka_unit_test(names_of_parts),
    };
    return cmocka_run_group_tests(tests, make_dir, drop_dir);
}
