/* The GGUF writer: what it wrote reads back the same, and a failed writer leaves no file. */
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gguf_image.h"
#include "relations.h"
#include "testing.h"

static char dir[] = "/tmp/orcd-gw-XXXXXX", path[64], part[64];

static int make_dir(void **state) {
    (void)state;
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof path, "%s/x.gguf", dir);
    snprintf(part, sizeof part, "%s/x.gguf.part", dir);
    return 0;
}

static int drop_dir(void **state) {
    (void)state;
    unlink(path);
    return rmdir(dir); /* fails when a part file was left behind */
}

static gguf_writer *create(uint64_t alignment) {
    gguf_writer *w;
    orcd_error err;
    unlink(path);
    assert_int_equal(gguf_create(path, alignment, &w, &err), ORCD_OK);
    return w;
}

static gguf *read_back(void) {
    gguf *g;
    file_map f;
    orcd_error err;
    if (gguf_open(path, &g, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    assert_false(file_exists(part));
    assert_int_equal(file_open(path, &f, &err), ORCD_OK);
    gguf *parsed;
    assert_int_equal(gguf_parse(f.data, f.size, &parsed, &err), ORCD_OK);
    gguf_relations(f.data, f.size, parsed);
    gguf_close(parsed);
    file_close(&f);
    return g;
}

/* One key of every type, scalar and array, by hand; copied through gguf_put_kv. */
static void every_value_type_survives_a_copy(void **state) {
    (void)state;
    static const uint8_t bytes[64] = {1, 0, 1, 1, 0, 0, 1};
    image m;
    gguf *from;
    orcd_error err;
    img_begin(&m, 3);
    img_kv_int(&m, "general.alignment", GGUF_U32, 64, 4);
    for (gguf_type t = 0; t < GGUF_N_TYPES; t++) {
        char key[32];
        if (t == GGUF_ARRAY)
            continue;
        snprintf(key, sizeof key, "scalar.%d", t);
        img_key(&m, key, t);
        size_t size = (size_t[]){1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8}[t];
        if (t == GGUF_STRING)
            img_str(&m, "s", "x\0y", 3);
        buf_add(&m.b, bytes, size);
        snprintf(key, sizeof key, "array.%d", t);
        img_kv_array(&m, key, t, 5);
        for (int i = 0; t == GGUF_STRING && i < 5; i++)
            img_str(&m, "s", "abcde", (size_t)i);
        buf_add(&m.b, bytes, 5 * size);
        snprintf(key, sizeof key, "empty.%d", t);
        img_kv_array(&m, key, t, 0);
    }
    assert_int_equal(gguf_parse((uint8_t *)m.b.data, m.b.len, &from, &err), ORCD_OK);
    gguf_writer *w = create(32);
    for (uint64_t i = 0; i < gguf_n_kv(from); i++)
        gguf_put_kv(w, gguf_kv_at(from, i));
    assert_int_equal(gguf_finish(w, &err), ORCD_OK);
    gguf *to = read_back();
    assert_int_equal(gguf_version(to), 3);
    assert_int_equal(gguf_alignment(to), 32); /* the writer's own */
    assert_int_equal(gguf_n_kv(to), 36);
    for (uint64_t i = 1; i < gguf_n_kv(from); i++) {
        const gguf_kv *a = gguf_kv_at(from, i), *b = gguf_kv_at(to, i - 1);
        assert_true(a->type == b->type && a->elem == b->elem && a->n == b->n && a->key.len == b->key.len);
        assert_memory_equal(a->key.data, b->key.data, a->key.len);
        assert_int_equal(gguf_kv_bytes(a), gguf_kv_bytes(b));
        assert_memory_equal(a->data, b->data, gguf_kv_bytes(a));
    }
    gguf_close(to);
    gguf_close(from);
    buf_free(&m.b);
}

static void typed_puts_read_back(void **state) {
    (void)state;
    orcd_error err;
    gguf_writer *w = create(4096);
    gguf_put_u32(w, "u", 0xfffffffe);
    gguf_put_f32(w, "f", -1.5f);
    gguf_put_bool(w, "b", true);
    gguf_put_str(w, "s", "na\0me", 5);
    gguf_put_str_array(w, "sa", (gguf_str[]){{"a", 1}, {"", 0}, {"ccc", 3}}, 3);
    gguf_put_i32_array(w, "ia", (int32_t[]){-1, 2}, 2);
    assert_int_equal(gguf_finish(w, &err), ORCD_OK);
    gguf *g = read_back();
    uint64_t u;
    double f;
    bool b;
    gguf_str s;
    const gguf_kv *kv;
    assert_int_equal(gguf_alignment(g), 4096);
    assert_true(gguf_u64(g, "u", &u) && u == 0xfffffffe);
    assert_true(gguf_f64(g, "f", &f) && f == -1.5);
    assert_true(gguf_bool(g, "b", &b) && b);
    assert_true(gguf_string(g, "s", &s) && s.len == 5 && memcmp(s.data, "na\0me", 5) == 0);
    assert_true(gguf_array(g, "sa", GGUF_STRING, &kv) && kv->n == 3);
    const uint8_t *cursor = kv->data;
    gguf_next_str(&cursor);
    gguf_next_str(&cursor);
    s = gguf_next_str(&cursor);
    assert_true(s.len == 3 && memcmp(s.data, "ccc", 3) == 0);
    assert_true(gguf_array(g, "ia", GGUF_I32, &kv) && kv->n == 2 && memcmp(kv->data, (int32_t[]){-1, 2}, 8) == 0);
    gguf_close(g);
}

static void every_tensor_type_reads_back(void **state) {
    (void)state;
    orcd_error err;
    for (uint64_t alignment = 8; alignment <= 4096; alignment *= 8) {
        gguf_writer *w = create(alignment);
        uint8_t row[4096], value = 0;
        for (size_t i = 0; i < q_count(); i++)
            gguf_put_tensor(w, q_at(i)->name, q_at(i)->type, 2, (uint64_t[]){q_at(i)->block_len, 3});
        for (size_t i = 0; i < q_count(); i++) {
            size_t n = 3 * q_at(i)->block_bytes;
            for (size_t k = 0; k < n; k++)
                row[k] = value++;
            /* in two parts: the border of a call is not the border of a tensor */
            assert_int_equal(gguf_write(w, row, n / 2, &err), ORCD_OK);
            assert_int_equal(gguf_write(w, row + n / 2, n - n / 2, &err), ORCD_OK);
        }
        assert_true(file_exists(part) && !file_exists(path));
        assert_int_equal(gguf_finish(w, &err), ORCD_OK);
        gguf *g = read_back();
        value = 0;
        for (size_t i = 0; i < q_count(); i++) {
            const gguf_tensor *t = gguf_find_tensor(g, q_at(i)->name);
            assert_true(t && t->type == q_at(i)->type && t->ne[0] == q_at(i)->block_len && t->ne[1] == 3);
            for (size_t k = 0; k < t->bytes; k++)
                assert_int_equal(t->data[k], value++);
        }
        gguf_close(g);
    }
}

static void one_write_may_span_tensors(void **state) {
    (void)state;
    orcd_error err;
    gguf_writer *w = create(32);
    gguf_put_tensor(w, "a", Q_F32, 1, (uint64_t[]){1});
    gguf_put_tensor(w, "b", Q_F32, 1, (uint64_t[]){1});
    assert_int_equal(gguf_write(w, "aaaabbbb", 8, &err), ORCD_OK);
    assert_int_equal(gguf_finish(w, &err), ORCD_OK);
    gguf *g = read_back();
    assert_memory_equal(gguf_find_tensor(g, "a")->data, "aaaa", 4);
    assert_memory_equal(gguf_find_tensor(g, "b")->data, "bbbb", 4);
    gguf_close(g);
}

/* Each way to misuse the writer; the error says it and nothing remains on disk. */
static void failures_are_reported_and_leave_nothing(void **state) {
    (void)state;
    static const char *const says[] = {"only 0 of the 1",   "more data than",       "key k appears twice",
                                       "cannot be written", "after the first data", "alignment",
                                       "cannot be written", "appears twice",        "name has 65 bytes"};
    for (size_t i = 0; i < ORCD_COUNT(says); i++) {
        orcd_error err = {0};
        char name[66];
        memset(name, 'n', 65);
        name[65] = '\0';
        gguf_writer *w = create(i == 5 ? 48 : 32);
        gguf_put_u32(w, "k", 1);
        if (i == 2)
            gguf_put_u32(w, "k", 2);
        gguf_put_tensor(w, i == 8 ? name : "t", i == 6 ? (q_type)28 : Q_MXFP4, 1, (uint64_t[]){i == 3 ? 33 : 32});
        if (i == 7)
            gguf_put_tensor(w, "t", Q_F32, 1, (uint64_t[]){1});
        orcd_status s = ORCD_OK;
        if (i > 0)
            s = gguf_write(w, says, i == 1 ? 18 : 17, NULL);
        if (i == 4)
            gguf_put_u32(w, "late", 1);
        assert_true(s != ORCD_OK || i == 0 || i == 4);
        assert_int_not_equal(gguf_finish(w, &err), ORCD_OK);
        if (!strstr(err.message, says[i]))
            fail_msg("%zu: \"%s\"", i, err.message);
        assert_false(file_exists(part) || file_exists(path));
    }
}

static void abandoning_leaves_nothing(void **state) {
    (void)state;
    orcd_error err;
    gguf_abandon(NULL);
    gguf_abandon(create(32));
    assert_false(file_exists(part) || file_exists(path));
    gguf_writer *w = create(32);
    gguf_put_tensor(w, "t", Q_F32, 1, (uint64_t[]){2});
    assert_int_equal(gguf_write(w, "1234", 4, &err), ORCD_OK);
    gguf_abandon(w);
    assert_false(file_exists(part) || file_exists(path));
}

static void an_old_file_is_replaced_only_on_success(void **state) {
    (void)state;
    orcd_error err;
    gguf_writer *w = create(32);
    gguf_put_u32(w, "old", 1);
    assert_int_equal(gguf_finish(w, &err), ORCD_OK);
    assert_int_equal(gguf_create(path, 32, &w, &err), ORCD_OK);
    gguf_put_tensor(w, "t", Q_F32, 1, (uint64_t[]){1});
    assert_int_not_equal(gguf_finish(w, &err), ORCD_OK);
    gguf *g = read_back();
    assert_non_null(gguf_find(g, "old"));
    gguf_close(g);
}

static void impossible_places(void **state) {
    (void)state;
    gguf_writer *w = (gguf_writer *)1;
    orcd_error err;
    assert_int_equal(gguf_create("/nonexistent/x.gguf", 32, &w, &err), ORCD_ERR_IO);
    assert_null(w);
    assert_non_null(strstr(err.message, "/nonexistent/x.gguf.part"));
    char folder[64];
    snprintf(folder, sizeof folder, "%s/d", dir);
    assert_int_equal(mkdir(folder, 0700), 0);
    assert_int_equal(gguf_create(folder, 32, &w, &err), ORCD_OK);
    assert_int_equal(gguf_finish(w, &err), ORCD_ERR_IO); /* a folder cannot be replaced by a file */
    assert_non_null(strstr(err.message, "cannot rename"));
    assert_int_equal(rmdir(folder), 0); /* drop_dir sees a part file that was left */
}

/* ---- going on after a kill ---- */

enum { N_BIG = 4, BIG = 33 << 20 /* bytes; the journal is written every 64 MiB */ };

static void declare_big(gguf_writer *w, uint32_t key) {
    gguf_put_u32(w, "some.key", key);
    for (char name[] = "a"; *name < 'a' + N_BIG; ++*name)
        gguf_put_tensor(w, name, Q_F32, 1, (uint64_t[]){BIG / 4});
}

static bool write_big(gguf_writer *w, uint64_t from, uint64_t to_byte) {
    static uint8_t chunk[1 << 20];
    bool ok = true;
    for (uint64_t at = from * BIG; at < to_byte; at += sizeof chunk) {
        memset(chunk, (int)(1 + at / BIG + at / sizeof chunk), sizeof chunk);
        ok = ok && gguf_write(w, chunk, to_byte - at < sizeof chunk ? to_byte - at : sizeof chunk, NULL) == ORCD_OK;
    }
    return ok;
}

static int begin_big(gguf_writer **w, uint32_t key, const char *origin) {
    uint64_t n_done;
    if (gguf_create(path, 32, w, NULL) != ORCD_OK)
        return -1;
    declare_big(*w, key);
    return gguf_begin(*w, origin, &n_done, NULL) == ORCD_OK ? (int)n_done : -1;
}

/* A writer that is killed in the middle of its third tensor; a writer in this process gets nothing meanwhile. */
static void killed_writer(void) {
    int up[2], down[2], status;
    char c;
    unlink(path);
    unlink(part);
    assert_true(pipe(up) == 0 && pipe(down) == 0);
    pid_t child = fork();
    if (child == 0) { /* no assert here: it would run the other tests in this process */
        gguf_writer *w;
        close(up[0]);
        close(down[1]);
        if (begin_big(&w, 1, "origin") == 0 && write_big(w, 0, 2 * (uint64_t)BIG + BIG / 2) &&
            write(up[1], "x", 1) == 1 && read(down[0], &c, 1) == 1)
            kill(getpid(), SIGKILL);
        _exit(1);
    }
    close(up[1]);
    close(down[0]);
    gguf_writer *second;
    orcd_error err;
    assert_int_equal(read(up[0], &c, 1), 1);
    assert_int_equal(gguf_create(path, 32, &second, &err), ORCD_ERR_IO);
    assert_non_null(strstr(err.message, "another process"));
    assert_int_equal(write(down[1], "x", 1), 1);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    close(up[0]);
    close(down[1]);
    assert_true(file_exists(part) && !file_exists(path));
}

static void check_big(gguf_writer *w) {
    assert_int_equal(gguf_finish(w, NULL), ORCD_OK);
    gguf *g = read_back();
    for (uint64_t i = 0; i < N_BIG; i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        assert_int_equal(t->bytes, BIG);
        for (uint64_t at = 0; at < BIG; at += 4093)
            assert_int_equal(t->data[at], (uint8_t)(1 + i + (i * BIG + at) / (1 << 20)));
    }
    gguf_close(g);
    unlink(path);
}

static void what_a_killed_writer_left_is_gone_on_with(void **state) {
    (void)state;
    gguf_writer *w;
    killed_writer();
    assert_int_equal(begin_big(&w, 1, "origin"), 2);
    assert_true(write_big(w, 2, (uint64_t)N_BIG * BIG));
    check_big(w);
}

static void another_header_or_origin_begins_anew(void **state) {
    (void)state;
    static const struct {
        uint32_t key;
        const char *origin;
    } other[] = {{2, "origin"}, {1, "origin "}, {1, ""}, {1, NULL}};
    for (size_t i = 0; i < ORCD_COUNT(other); i++) {
        gguf_writer *w;
        killed_writer();
        assert_int_equal(begin_big(&w, other[i].key, other[i].origin), 0);
        assert_true(write_big(w, 0, (uint64_t)N_BIG * BIG));
        check_big(w);
    }
}

static void a_part_of_another_size_begins_anew(void **state) {
    (void)state;
    gguf_writer *w;
    killed_writer();
    assert_int_equal(truncate(part, 3 * (off_t)BIG), 0);
    assert_int_equal(begin_big(&w, 1, "origin"), 0);
    assert_true(write_big(w, 0, (uint64_t)N_BIG * BIG));
    check_big(w);
}

static void a_damaged_journal_begins_anew(void **state) {
    (void)state;
    static const char *const journal[] = {"", "0000000002", "9999999999origin", "0000000002orig", "x000000002origin"};
    char name[80];
    snprintf(name, sizeof name, "%s.done", part);
    for (size_t i = 0; i < ORCD_COUNT(journal); i++) {
        gguf_writer *w;
        killed_writer();
        FILE *f = fopen(name, "w");
        fputs(journal[i], f);
        fclose(f);
        assert_int_equal(begin_big(&w, 1, "origin"), 0);
        gguf_abandon(w);
        assert_false(file_exists(part) || file_exists(name));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_value_type_survives_a_copy),
        cmocka_unit_test(typed_puts_read_back),
        cmocka_unit_test(every_tensor_type_reads_back),
        cmocka_unit_test(one_write_may_span_tensors),
        cmocka_unit_test(failures_are_reported_and_leave_nothing),
        cmocka_unit_test(abandoning_leaves_nothing),
        cmocka_unit_test(an_old_file_is_replaced_only_on_success),
        cmocka_unit_test(impossible_places),
        cmocka_unit_test(what_a_killed_writer_left_is_gone_on_with),
        cmocka_unit_test(another_header_or_origin_begins_anew),
        cmocka_unit_test(a_part_of_another_size_begins_anew),
        cmocka_unit_test(a_damaged_journal_begins_anew),
    };
    return cmocka_run_group_tests(tests, make_dir, drop_dir);
}
