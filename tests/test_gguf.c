/* The GGUF reader on good, limiting and hostile images. T-n are the names of facts about past vulnerabilities. */
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "gguf_image.h"
#include "relations.h"
#include "testing.h"

#ifdef __SANITIZE_ADDRESS__
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static const uint64_t edge[] = {0,          1,          0x7fffffffu, 0x80000000u, 0xffffffffu, 1ull << 32,
                                ~0ull >> 1, 1ull << 63, ~0ull,       0x20000000u, (1ull << 60)};

/* Parse a copy that ends where a page of its own ends would be caught by the address sanitizer. */
static orcd_status parse(const void *data, size_t size, orcd_error *err) {
    uint8_t *copy = malloc(size ? size : 1);
    gguf *g = NULL;
    assert_non_null(copy);
    memcpy(copy, data, size);
    *err = (orcd_error){.pos = ORCD_POS_NONE};
    orcd_status s = gguf_parse(copy, size, &g, err);
    if (s == ORCD_OK) {
        assert_non_null(g);
        gguf_relations(copy, size, g);
    } else {
        assert_null(g);
        assert_int_equal(err->code, s);
        assert_true(err->message[0] != '\0');
        assert_true(err->pos <= size);
        for (const char *p = err->message; *p; p++)
            assert_true(*p >= 32 && *p < 127);
    }
    gguf_close(g);
    free(copy);
    return s;
}

static void refused(image *m, orcd_status code, uint64_t pos, const char *part) {
    orcd_error err;
    orcd_status s = parse(m->b.data, m->b.len, &err);
    if (s != code || err.pos != pos || !strstr(err.message, part))
        fail_msg("status %d at %llu \"%s\", expected %d at %llu \"%s\"", s, (unsigned long long)err.pos, err.message,
                 code, (unsigned long long)pos, part);
    buf_free(&m->b);
}

static void accepted(image *m) {
    orcd_error err;
    if (parse(m->b.data, m->b.len, &err) != ORCD_OK)
        fail_msg("refused: %s", err.message);
    buf_free(&m->b);
}

/* Every value type, a string array, two tensors. */
static void good(image *m) {
    img_begin(m, 3);
    img_kv_str(m, "general.architecture", "gpt2");
    img_kv_int(m, "general.alignment", GGUF_U32, 32, 4);
    img_kv_int(m, "u8", GGUF_U8, 200, 1);
    img_kv_int(m, "i8", GGUF_I8, 0x85, 1);
    img_kv_int(m, "u16", GGUF_U16, 60000, 2);
    img_kv_int(m, "i16", GGUF_I16, 0x8000, 2);
    img_kv_int(m, "u32", GGUF_U32, 0xfffffffe, 4);
    img_kv_int(m, "i32", GGUF_I32, 0xfffffffe, 4);
    img_kv_int(m, "f32", GGUF_F32, 0x3fc00000, 4);
    img_kv_int(m, "bool", GGUF_BOOL, 1, 1);
    img_kv_int(m, "u64", GGUF_U64, ~0ull, 8);
    img_kv_int(m, "i64", GGUF_I64, ~0ull, 8);
    img_kv_int(m, "f64", GGUF_F64, 0x4004000000000000, 8);
    img_kv_array(m, "tokens", GGUF_STRING, 2);
    img_str(m, "string length", "hello", 5);
    img_str(m, "string length", "", 0);
    img_kv_array(m, "scores", GGUF_F32, 3);
    buf_add(&m->b, "\0\0\x80?\0\0\0@\0\0@@", 12);
    img_kv_array(m, "none", GGUF_U64, 0);
    img_tensor(m, "a.weight", Q_F32, 2, (uint64_t[]){4, 3}, 0);
    img_tensor(m, "b.weight", Q_MXFP4, 1, (uint64_t[]){64}, 64);
    img_data(m, 32, 64 + 34);
}

static void reads_every_value_type(void **state) {
    (void)state;
    image m;
    gguf *g;
    good(&m);
    assert_int_equal(gguf_parse((uint8_t *)m.b.data, m.b.len, &g, NULL), ORCD_OK);
    uint64_t u = 7;
    int64_t i = 7;
    double f = 7;
    bool b = false;
    gguf_str s;
    const gguf_kv *kv;
    assert_true(gguf_u64(g, "u8", &u) && u == 200);
    assert_true(gguf_u64(g, "u16", &u) && u == 60000);
    assert_true(gguf_u64(g, "u32", &u) && u == 0xfffffffe);
    assert_true(gguf_u64(g, "u64", &u) && u == ~0ull);
    assert_true(gguf_i64(g, "i8", &i) && i == -123);
    assert_true(gguf_i64(g, "i16", &i) && i == -32768);
    assert_true(gguf_i64(g, "i32", &i) && i == -2);
    assert_true(gguf_i64(g, "i64", &i) && i == -1);
    assert_true(gguf_f64(g, "f32", &f) && f == 1.5);
    assert_true(gguf_f64(g, "f64", &f) && f == 2.5);
    assert_true(gguf_f64(g, "i8", &f) && f == -123);
    assert_true(gguf_bool(g, "bool", &b) && b);
    assert_true(gguf_string(g, "general.architecture", &s) && s.len == 4 && memcmp(s.data, "gpt2", 4) == 0);
    assert_true(gguf_array(g, "tokens", GGUF_STRING, &kv) && kv->n == 2);
    const uint8_t *cursor = kv->data;
    s = gguf_next_str(&cursor);
    assert_true(s.len == 5 && memcmp(s.data, "hello", 5) == 0);
    assert_int_equal(gguf_next_str(&cursor).len, 0);
    assert_true(gguf_array(g, "none", GGUF_U64, &kv) && kv->n == 0);
    const gguf_tensor *t = gguf_find_tensor(g, "b.weight");
    assert_true(t && t->type == Q_MXFP4 && t->bytes == 34 && t->ne[0] == 64 && t->ne[1] == 1 && t->data[0] == 64);
    assert_true(!t->paired);
    assert_null(gguf_find_tensor(g, "c.weight"));
    assert_null(gguf_find(g, ""));
    gguf_close(g);
    buf_free(&m.b);
}

static void accessors_refuse_other_types_and_leave_out_alone(void **state) {
    (void)state;
    image m;
    gguf *g;
    good(&m);
    assert_int_equal(gguf_parse((uint8_t *)m.b.data, m.b.len, &g, NULL), ORCD_OK);
    uint64_t u = 7;
    int64_t i = 7;
    double f = 7;
    bool b = true;
    gguf_str s = {0};
    assert_false(gguf_u64(g, "i8", &u) || gguf_u64(g, "f32", &u) || gguf_u64(g, "bool", &u) ||
                 gguf_u64(g, "tokens", &u) || gguf_u64(g, "absent", &u));
    assert_false(gguf_i64(g, "u64", &i) || gguf_i64(g, "f64", &i));
    assert_false(gguf_f64(g, "bool", &f) || gguf_f64(g, "general.architecture", &f) || gguf_f64(g, "scores", &f));
    assert_false(gguf_bool(g, "u8", &b) || gguf_string(g, "u8", &s) || gguf_string(g, "tokens", &s));
    assert_true(u == 7 && i == 7 && f == 7 && b && !s.data);
    gguf_close(g);
    buf_free(&m.b);
}

static void T1_integers_at_their_boundaries(void **state) {
    (void)state;
    image m;
    orcd_error err;
    good(&m);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    clock_t longest = 0;
    for (int f = 0; f < m.n_fields; f++) {
        uint64_t old = 0;
        memcpy(&old, m.b.data + m.field[f].pos, (size_t)m.field[f].bytes);
        for (size_t e = 0; e < ORCD_COUNT(edge); e++) {
            clock_t t0 = clock();
            img_patch(&m, m.field[f].pos, edge[e], m.field[f].bytes);
            orcd_status s = parse(m.b.data, m.b.len, &err);
            bool count = strstr(m.field[f].name, "length") || strstr(m.field[f].name, "n_") ||
                         strcmp(m.field[f].name, "ne") == 0 || strcmp(m.field[f].name, "offset") == 0;
            if (count && edge[e] >= 0x7fffffff && (m.field[f].bytes == 8 || edge[e] <= 0xffffffff))
                assert_int_not_equal(s, ORCD_OK);
            clock_t t = clock() - t0;
            longest = t > longest ? t : longest;
        }
        img_patch(&m, m.field[f].pos, old, m.field[f].bytes);
    }
    getrusage(RUSAGE_SELF, &after);
    if (!SANITIZED) {
        assert_true(after.ru_maxrss - before.ru_maxrss < 64 << 10); /* KiB */
        assert_true(longest < CLOCKS_PER_SEC / 20);
    }
    buf_free(&m.b);
}

/* One more than the bytes left could hold at the smallest encoding: refused at the count, before any allocation. */
static void T1_counts_are_judged_by_the_bytes_left(void **state) {
    (void)state;
    image m;
    good(&m);
    img_patch(&m, 8, (m.b.len - 16) / 33 + 1, 8);
    refused(&m, ORCD_ERR_FORMAT, 8, "the number of tensors is");
    good(&m);
    img_patch(&m, 16, (m.b.len - 24) / 14 + 1, 8);
    refused(&m, ORCD_ERR_FORMAT, 16, "the number of keys is");
}

static void T2_sizes_whose_sum_wraps(void **state) {
    (void)state;
    image m;
    for (uint64_t more = 0; more <= 32; more += 32) {
        img_begin(&m, 3);
        img_tensor(&m, "a", Q_F32, 1, (uint64_t[]){(1ull << 61) + more}, 0);
        img_tensor(&m, "b", Q_F32, 1, (uint64_t[]){(1ull << 61) + more}, 1ull << 63);
        size_t pos = m.field[3].pos;
        img_data(&m, 32, 128);
        refused(&m, ORCD_ERR_FORMAT, pos, "past the end");
    }
}

static void T3_sizes_that_wrap_or_leave_the_file(void **state) {
    (void)state;
    image m;
    const struct {
        uint32_t type, n_dims;
        uint64_t ne[4];
        const char *says;
    } bad[] = {
        {Q_F32, 2, {1ull << 32, 1ull << 32}, "does not fit"},
        {Q_F32, 4, {1ull << 16, 1ull << 16, 1ull << 16, 1ull << 16}, "does not fit"},
        {Q_Q8_0, 1, {32 * 542551296285575048ull}, "does not fit"}, /* 34 bytes each: 2^64 + 16 */
        {Q_MXFP4, 2, {1ull << 36, 1ull << 33}, "does not fit"},    /* the values wrap, the bytes do not fit either */
        {Q_F32, 1, {33}, "past the end"},
        {Q_F32, 1, {1ull << 40}, "past the end"},
    };
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        img_begin(&m, 3);
        img_tensor(&m, "a", bad[i].type, bad[i].n_dims, bad[i].ne, 0);
        img_data(&m, 32, 128);
        refused(&m, ORCD_ERR_FORMAT, 24, bad[i].says);
    }
    for (size_t bytes = 127; bytes <= 128; bytes++) {
        img_begin(&m, 3);
        img_tensor(&m, "a", Q_F32, 1, (uint64_t[]){32}, 0);
        img_data(&m, 32, bytes);
        if (bytes == 128)
            accepted(&m);
        else
            refused(&m, ORCD_ERR_FORMAT, 24, "past the end");
    }
}

static void T4_every_scalar_zero(void **state) {
    (void)state;
    image m;
    orcd_error err;
    good(&m);
    for (int f = 0; f < m.n_fields; f++) {
        uint64_t old = 0;
        memcpy(&old, m.b.data + m.field[f].pos, (size_t)m.field[f].bytes);
        img_patch(&m, m.field[f].pos, 0, m.field[f].bytes);
        orcd_status s = parse(m.b.data, m.b.len, &err);
        if (strcmp(m.field[f].name, "ne") == 0 || strcmp(m.field[f].name, "n_dims") == 0)
            assert_int_not_equal(s, ORCD_OK);
        img_patch(&m, m.field[f].pos, old, m.field[f].bytes);
    }
    buf_free(&m.b);
}

static void T5_alignment_is_a_power_of_two_from_8_to_4096(void **state) {
    (void)state;
    image m;
    static const uint64_t bad[] = {0, 1, 2, 4, 7, 12, 24, 33, 4097, 8192, 0x80000000u, 0xffffffffu};
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        img_begin(&m, 3);
        img_kv_int(&m, "general.alignment", GGUF_U32, bad[i], 4);
        refused(&m, ORCD_ERR_FORMAT, m.field[m.n_fields - 1].pos, "general.alignment is");
    }
    for (uint64_t a = 8; a <= 4096; a *= 2) {
        img_begin(&m, 3);
        img_kv_int(&m, "general.alignment", GGUF_U32, a, 4);
        img_tensor(&m, "a", Q_F32, 1, (uint64_t[]){1}, 0);
        img_tensor(&m, "b", Q_F32, 1, (uint64_t[]){1}, a);
        img_data(&m, a, a + 4);
        accepted(&m);
    }
    img_begin(&m, 3);
    img_kv_int(&m, "general.alignment", GGUF_U64, 32, 8);
    refused(&m, ORCD_ERR_FORMAT, m.field[m.n_fields - 1].pos, "instead of uint32");
}

static void T6_arrays_answer_only_to_their_own_type(void **state) {
    (void)state;
    for (gguf_type stored = 0; stored < GGUF_N_TYPES; stored++) {
        image m;
        gguf *g;
        img_begin(&m, 3);
        img_kv_array(&m, "tokenizer.ggml.scores", stored, 4);
        for (int i = 0; i < 32; i++)
            buf_char(&m.b, 0);
        size_t used = m.b.len; /* a trailing half is no error: data may follow */
        orcd_status s = gguf_parse((uint8_t *)m.b.data, used, &g, NULL);
        assert_int_equal(s, stored == GGUF_ARRAY ? ORCD_ERR_UNSUPPORTED : ORCD_OK);
        for (gguf_type asked = 0; s == ORCD_OK && asked < GGUF_N_TYPES; asked++) {
            const gguf_kv *kv = NULL;
            assert_int_equal(gguf_array(g, "tokenizer.ggml.scores", asked, &kv), asked == stored);
            assert_true((kv != NULL) == (asked == stored));
        }
        gguf_close(g);
        buf_free(&m.b);
    }
}

static void T10_truncated_at_every_byte(void **state) {
    (void)state;
    image m;
    orcd_error err;
    good(&m);
    for (size_t n = 0; n < m.b.len; n++)
        assert_int_equal(parse(m.b.data, n, &err), ORCD_ERR_FORMAT);
    assert_int_equal(parse(m.b.data, m.b.len, &err), ORCD_OK);
    buf_free(&m.b);
}

static void T12_a_million_keys_in_linear_time(void **state) {
    (void)state;
    static const uint64_t sizes[] = {100000, 1000000};
    static const double limit[] = {0.1, 1.0};
    for (int k = 0; k < 2; k++) {
        buf b = {0};
        gguf *g;
        uint64_t head[3] = {0, 0, sizes[k]}, key_len = 12;
        memcpy(head, "GGUF\3\0\0\0", 8);
        buf_add(&b, head, sizeof head);
        for (uint64_t i = 0; i < sizes[k]; i++) {
            char key[32];
            snprintf(key, sizeof key, "key.%08llu", (unsigned long long)i);
            buf_add(&b, &key_len, 8);
            buf_add(&b, key, 12);
            buf_add(&b, "\0\0\0\0\1", 5);
        }
        clock_t t0 = clock();
        assert_int_equal(gguf_parse((uint8_t *)b.data, b.len, &g, NULL), ORCD_OK);
        double took = (double)(clock() - t0) / CLOCKS_PER_SEC;
        printf("%llu keys: %.3f s\n", (unsigned long long)sizes[k], took);
        uint64_t v = 0;
        assert_true(gguf_u64(g, "key.00099999", &v) && v == 1);
        assert_true(SANITIZED || took < limit[k]);
        gguf_close(g);
        buf_free(&b);
    }
}

static void T13_a_file_that_shrinks_is_noticed(void **state) {
    (void)state;
    char path[] = "/tmp/orcd-gguf-XXXXXX";
    image m;
    gguf *g;
    good(&m);
    int fd = mkstemp(path);
    assert_int_equal(write(fd, m.b.data, m.b.len), (ssize_t)m.b.len);
    assert_int_equal(gguf_open(path, &g, NULL), ORCD_OK);
    assert_int_equal(gguf_bytes(g), m.b.len);
    assert_false(gguf_changed(g));
    assert_int_equal(ftruncate(fd, (off_t)m.b.len - 1), 0);
    assert_true(gguf_changed(g));
    gguf_close(g);
    close(fd);
    unlink(path);
    buf_free(&m.b);
}

static void T34_only_regular_files_are_opened(void **state) {
    (void)state;
    char dir[] = "/tmp/orcd-gguf-XXXXXX", fifo[64], loop[64], empty[64];
    assert_non_null(mkdtemp(dir));
    snprintf(fifo, sizeof fifo, "%s/fifo", dir);
    snprintf(loop, sizeof loop, "%s/loop", dir);
    snprintf(empty, sizeof empty, "%s/empty", dir);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(symlink(loop, loop), 0);
    FILE *f = fopen(empty, "w");
    assert_non_null(f);
    fclose(f);
    const char *bad[] = {fifo, loop, dir, "/dev/zero", "/nonexistent/x.gguf"};
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        gguf *g = (gguf *)1;
        orcd_error err;
        assert_int_equal(gguf_open(bad[i], &g, &err), ORCD_ERR_IO);
        assert_null(g);
        assert_non_null(strstr(err.message, bad[i]));
    }
    gguf *g;
    orcd_error err;
    assert_int_equal(gguf_open(empty, &g, &err), ORCD_ERR_FORMAT);
    assert_non_null(strstr(err.message, empty));
    unlink(fifo);
    unlink(loop);
    unlink(empty);
    rmdir(dir);
}

static void magic_and_versions(void **state) {
    (void)state;
    image m;
    static const uint32_t bad[] = {0, 1, 4, 0x02000000, 0x03000000};
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        img_begin(&m, bad[i]);
        refused(&m, ORCD_ERR_UNSUPPORTED, 4, i < 3 ? "version" : "big-endian");
    }
    img_begin(&m, 2);
    accepted(&m);
    img_begin(&m, 3);
    m.b.data[0] = 'g';
    refused(&m, ORCD_ERR_FORMAT, 0, "not a GGUF");
}

static void duplicate_names_are_refused(void **state) {
    (void)state;
    image m;
    img_begin(&m, 3);
    img_kv_int(&m, "x", GGUF_U8, 1, 1);
    size_t second = m.b.len;
    img_kv_int(&m, "x", GGUF_U8, 1, 1);
    refused(&m, ORCD_ERR_FORMAT, second, "key x appears twice");
    img_begin(&m, 3);
    img_tensor(&m, "t", Q_F32, 1, (uint64_t[]){1}, 0);
    second = m.b.len;
    img_tensor(&m, "t", Q_F32, 1, (uint64_t[]){1}, 32);
    img_data(&m, 32, 64);
    refused(&m, ORCD_ERR_FORMAT, second, "tensor t appears twice");
}

static void names_and_strings_at_their_limits(void **state) {
    (void)state;
    static char text[(1 << 20) + 2];
    const struct {
        size_t key, value, name;
        const char *says; /* NULL: accepted */
    } cases[] = {
        {64 << 10, 1 << 20, 64, NULL},
        {(64 << 10) + 1, 1, 1, "a key has 65537 bytes"},
        {1, (1 << 20) + 1, 1, "a string value has 1048577 bytes"},
        {1, 1, 65, "a tensor's name has 65 bytes"},
        {0, 1, 1, "a key is empty"},
        {1, 1, 0, "a tensor's name is empty"},
    };
    for (size_t i = 0; i < ORCD_COUNT(cases); i++) {
        image m;
        memset(text, 'k', sizeof text);
        img_begin(&m, 3);
        text[cases[i].key] = '\0';
        img_key(&m, text, GGUF_STRING);
        text[cases[i].key] = 'k';
        size_t value = m.b.len;
        img_str(&m, "string length", text, cases[i].value);
        size_t name = m.b.len;
        text[cases[i].name] = '\0';
        img_tensor(&m, text, Q_F32, 1, (uint64_t[]){1}, 0);
        img_data(&m, 32, 4);
        if (!cases[i].says)
            accepted(&m);
        else
            refused(&m, ORCD_ERR_FORMAT,
                    strstr(cases[i].says, "key")    ? 24
                    : strstr(cases[i].says, "name") ? name
                                                    : value,
                    cases[i].says);
    }
}

static void nul_and_control_bytes_in_names(void **state) {
    (void)state;
    image m;
    img_begin(&m, 3);
    img_str(&m, "key length", "a\0b", 3);
    img_int(&m, "value type", GGUF_U8, 4);
    buf_char(&m.b, 1);
    img_patch(&m, 16, 1, 8);
    refused(&m, ORCD_ERR_FORMAT, 24, "NUL");
    img_begin(&m, 3);
    img_key(&m, "\x1b[2J\xff", 99); /* parse() checks that the message is printable */
    refused(&m, ORCD_ERR_FORMAT, m.b.len - 4, "key ?[2J? has value type 99");
}

static void odd_values(void **state) {
    (void)state;
    image m;
    img_begin(&m, 3);
    img_kv_int(&m, "b", GGUF_BOOL, 2, 1);
    refused(&m, ORCD_ERR_FORMAT, m.b.len - 1, "boolean value is 2");
    img_begin(&m, 3);
    img_kv_array(&m, "b", GGUF_BOOL, 3);
    buf_add(&m.b, "\0\1\7", 3);
    refused(&m, ORCD_ERR_FORMAT, m.b.len - 1, "boolean value is 7");
    img_begin(&m, 3);
    img_kv_array(&m, "aa", GGUF_ARRAY, 1);
    refused(&m, ORCD_ERR_UNSUPPORTED, m.b.len - 12, "array of arrays");
    img_begin(&m, 3);
    img_kv_array(&m, "a", GGUF_U64, 2);
    buf_add(&m.b, "12345678", 8);
    refused(&m, ORCD_ERR_FORMAT, m.b.len - 16, "claims an array of 2 elements");
}

static void tensor_records(void **state) {
    (void)state;
    image m;
    const uint64_t five[] = {1, 1, 1, 1, 1};
    for (uint32_t n = 0; n <= 5; n += 5) {
        img_begin(&m, 3);
        img_tensor(&m, "t", Q_F32, n, five, 0);
        img_data(&m, 32, 4);
        refused(&m, ORCD_ERR_FORMAT, 33, "dimensions; 1 to 4");
    }
    img_begin(&m, 3);
    img_tensor(&m, "t", Q_MXFP4, 1, (uint64_t[]){48}, 0);
    img_data(&m, 32, 64);
    refused(&m, ORCD_ERR_FORMAT, 24, "48 values, not a multiple of MXFP4's 32");
    img_begin(&m, 3);
    img_tensor(&m, "t", 28, 1, (uint64_t[]){1}, 0); /* F64 */
    img_data(&m, 32, 8);
    refused(&m, ORCD_ERR_UNSUPPORTED, 24 + 9 + 12, "weight type 28");
    img_begin(&m, 3);
    img_tensor(&m, "t", Q_F32, 1, (uint64_t[]){1}, 8);
    img_data(&m, 32, 64);
    refused(&m, ORCD_ERR_FORMAT, m.field[m.n_fields - 1].pos, "data offset 8, not a multiple");
}

static void overlapping_tensors_are_refused_in_any_order(void **state) {
    (void)state;
    static const uint64_t offset[][3] = {{0, 32, 32}, {0, 0, 64}, {64, 32, 0}, {32, 0, 64}};
    for (size_t i = 0; i < ORCD_COUNT(offset); i++) {
        image m;
        orcd_error err;
        img_begin(&m, 3);
        for (int k = 0; k < 3; k++)
            img_tensor(&m, (const char *[]){"a", "b", "c"}[k], Q_F32, 1, (uint64_t[]){i == 2 ? 9 : 8}, offset[i][k]);
        img_data(&m, 32, 128);
        orcd_status s = parse(m.b.data, m.b.len, &err);
        assert_int_equal(s, i == 3 ? ORCD_OK : ORCD_ERR_FORMAT);
        assert_true(i == 3 || strstr(err.message, "overlap"));
        buf_free(&m.b);
    }
}

static void type_4_is_mxfp4_with_paired_values(void **state) {
    (void)state;
    image m;
    gguf *g;
    img_begin(&m, 3);
    img_tensor(&m, "t", 4, 2, (uint64_t[]){64, 3}, 0);
    img_data(&m, 32, 102);
    assert_int_equal(gguf_parse((uint8_t *)m.b.data, m.b.len, &g, NULL), ORCD_OK);
    const gguf_tensor *t = gguf_tensor_at(g, 0);
    assert_true(t->type == Q_MXFP4 && t->paired && t->bytes == 102);
    gguf_close(g);
    m.b.len--;
    refused(&m, ORCD_ERR_FORMAT, 24, "past the end");
}

/* Bit flips, integers at their edges, in twos and threes: an error or a file that keeps every relation. */
static void mutations_never_crash(void **state) {
    (void)state;
    uint64_t seed = 0x9e3779b97f4a7c15ull;
    int ok = 0;
    for (int n = 0; n < 20000; n++) {
        image m;
        orcd_error err;
        good(&m);
        size_t header = m.b.len - 98;
        for (uint64_t k = 1 + t_random(&seed) % 3; k > 0; k--) {
            uint64_t r = t_random(&seed);
            const field *f = &m.field[r % (uint64_t)m.n_fields];
            if (r >> 62 == 0)
                m.b.data[(r >> 8) % header] ^= (char)(1 << (r % 8));
            else if (r >> 62 == 1)
                m.b.data[(r >> 8) % header] = (char)(r >> 40);
            else
                img_patch(&m, f->pos, edge[(r >> 16) % ORCD_COUNT(edge)] + (r >> 30) % 3 - 1, f->bytes);
        }
        ok += parse(m.b.data, m.b.len, &err) == ORCD_OK;
        buf_free(&m.b);
    }
    printf("%d of 20000 mutations accepted\n", ok);
    assert_true(ok > 100 && ok < 19000); /* the mutations reach past the first check, and bite */
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_every_value_type),
        cmocka_unit_test(accessors_refuse_other_types_and_leave_out_alone),
        cmocka_unit_test(T1_integers_at_their_boundaries),
        cmocka_unit_test(T1_counts_are_judged_by_the_bytes_left),
        cmocka_unit_test(T2_sizes_whose_sum_wraps),
        cmocka_unit_test(T3_sizes_that_wrap_or_leave_the_file),
        cmocka_unit_test(T4_every_scalar_zero),
        cmocka_unit_test(T5_alignment_is_a_power_of_two_from_8_to_4096),
        cmocka_unit_test(T6_arrays_answer_only_to_their_own_type),
        cmocka_unit_test(T10_truncated_at_every_byte),
        cmocka_unit_test(T12_a_million_keys_in_linear_time),
        cmocka_unit_test(T13_a_file_that_shrinks_is_noticed),
        cmocka_unit_test(T34_only_regular_files_are_opened),
        cmocka_unit_test(magic_and_versions),
        cmocka_unit_test(duplicate_names_are_refused),
        cmocka_unit_test(names_and_strings_at_their_limits),
        cmocka_unit_test(nul_and_control_bytes_in_names),
        cmocka_unit_test(odd_values),
        cmocka_unit_test(tensor_records),
        cmocka_unit_test(overlapping_tensors_are_refused_in_any_order),
        cmocka_unit_test(type_4_is_mxfp4_with_paired_values),
        cmocka_unit_test(mutations_never_crash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
