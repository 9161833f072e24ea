/* The safetensors reader: the unit tests of the reference under their own names, sharded folders, mutations. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "relations.h"
#include "testing.h"

static orcd_status parse(const void *data, size_t size, orcd_error *err) {
    uint8_t *copy = malloc(size ? size : 1);
    st_model *m = NULL;
    assert_non_null(copy);
    if (size)
        memcpy(copy, data, size);
    *err = (orcd_error){.pos = ORCD_POS_NONE};
    orcd_status s = st_parse(copy, size, &m, err);
    if (s == ORCD_OK) {
        st_relations(copy, size, m);
    } else {
        assert_null(m);
        assert_true(err->code == s && err->message[0] && err->pos <= size);
        for (const char *p = err->message; *p; p++)
            assert_true(*p >= 32 && *p < 127);
    }
    st_close(m);
    free(copy);
    return s;
}

/* Header text and n bytes of data as one file. */
static void image(buf *b, const char *header, size_t n_data) {
    uint64_t len = strlen(header);
    buf_clear(b);
    buf_add(b, &len, sizeof len);
    buf_str(b, header);
    for (size_t i = 0; i < n_data; i++)
        buf_char(b, (char)i);
}

static void expect(const char *header, size_t n_data, orcd_status code, const char *part) {
    buf b = {0};
    orcd_error err;
    image(&b, header, n_data);
    orcd_status s = parse(b.data, b.len, &err);
    if (s != code || !strstr(err.message, part))
        fail_msg("%s: status %d \"%s\", expected %d \"%s\"", header, s, err.message, code, part);
    buf_free(&b);
}

#define ONE(dtype, shape, begin, end)                                                                                  \
    "{\"t\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}}"

static void reads_names_shapes_and_data(void **state) {
    (void)state;
    buf b = {0};
    st_model *m;
    image(&b,
          "{\"__metadata__\":{\"format\":\"pt\"},\"z\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[8,20]},"
          "\"a.b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
          20);
    assert_int_equal(st_parse((uint8_t *)b.data, b.len, &m, NULL), ORCD_OK);
    assert_int_equal(st_n_tensors(m), 2);
    assert_int_equal(st_bytes(m), b.len);
    const st_tensor *t = st_find(m, "z");
    assert_true(t && t->type == ST_BF16 && t->n_dims == 2 && t->shape[0] == 2 && t->shape[1] == 3 && t->bytes == 12);
    assert_int_equal(t->data[0], 8);
    assert_string_equal(st_tensor_at(m, 0)->name, "a.b");
    assert_null(st_find(m, "__metadata__"));
    assert_null(st_find(m, "a"));
    assert_null(st_tensor_at(m, 2));
    assert_string_equal(st_type_name(ST_F8_E4M3), "F8_E4M3");
    st_close(m);
    buf_free(&b);
}

/* Many entries over the same bytes: the file would unpack to far more than its size. */
static void json_attack(void **state) {
    (void)state;
    buf h = {0};
    buf_str(&h, "{");
    for (int i = 0; i < 10; i++)
        buf_printf(&h, "%s\"weight_%d\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}", i ? "," : "", i);
    buf_str(&h, "}");
    expect(h.data, 16, ORCD_ERR_FORMAT, "the one before it ends at");
    buf_free(&h);
}

static void metadata_incomplete_buffer(void **state) {
    (void)state;
    expect(ONE("I32", "[2,2]", 0, 16), 17, ORCD_ERR_FORMAT, "1 bytes of the file belong to no tensor");
    expect(ONE("I32", "[2,2]", 0, 16), 15, ORCD_ERR_FORMAT, "only 15 bytes of data");
    expect(ONE("I32", "[2,2]", 4, 20), 20, ORCD_ERR_FORMAT, "the one before it ends at");
    expect("{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
           "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[5,9]}}",
           9, ORCD_ERR_FORMAT, "the one before it ends at");
    expect(ONE("I32", "[2,2]", 0, 16), 16, ORCD_OK, "");
}

static void header_too_large(void **state) {
    (void)state;
    orcd_error err;
    uint8_t bytes[16] = {0};
    static const uint64_t lens[] = {100000001, 1ull << 32, 1ull << 63, ~0ull, ~0ull - 7};
    for (size_t i = 0; i < ORCD_COUNT(lens); i++) {
        memcpy(bytes, &lens[i], 8);
        bytes[8] = '{';
        assert_int_equal(parse(bytes, sizeof bytes, &err), ORCD_ERR_FORMAT);
        assert_non_null(strstr(err.message, "at most 100000000"));
    }
}

static void header_too_small(void **state) {
    (void)state;
    orcd_error err;
    for (size_t n = 0; n < 8; n++)
        assert_int_equal(parse("\0\0\0\0\0\0\0\0", n, &err), ORCD_ERR_FORMAT);
    assert_non_null(strstr(err.message, "7 bytes, too few"));
}

static void invalid_header_length(void **state) {
    (void)state;
    orcd_error err;
    assert_int_equal(parse("\x3c\0\0\0\0\0\0\0", 8, &err), ORCD_ERR_FORMAT);
    assert_non_null(strstr(err.message, "claims 60 bytes, but only 0 follow"));
    assert_int_equal(parse("\0\0\0\0\0\0\0\0", 8, &err), ORCD_ERR_FORMAT);
}

static void invalid_header_non_utf8(void **state) {
    (void)state;
    expect("\xff", 0, ORCD_ERR_FORMAT, "not a JSON object");
    expect("{\"\xff\":1}", 0, ORCD_ERR_FORMAT, "not valid JSON");
    expect("{\"\xed\xa0\x80\":1}", 0, ORCD_ERR_FORMAT, "not valid JSON"); /* a surrogate */
}

static void invalid_header_not_json(void **state) {
    (void)state;
    static const char *const bad[] = {
        "{", "{\"a\"", "{}x", "{\"a\":nan}", "{\"a\":1,}", "{\"a\":01}", "{'a':1}", "{\"\\u0000\":1}", "{\"a\":1e999}"};
    expect("[]", 0, ORCD_ERR_FORMAT, "not a JSON object");
    expect(" {}", 0, ORCD_ERR_FORMAT, "not a JSON object"); /* the reference demands the brace first */
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        expect(bad[i], 0, ORCD_ERR_FORMAT, "");
}

static void whitespace_padded_header(void **state) {
    (void)state;
    expect("{}      ", 0, ORCD_OK, "");
    expect(ONE("U8", "[1]", 0, 1) "   ", 1, ORCD_OK, "");
}

static void zero_sized_tensor(void **state) {
    (void)state;
    expect(ONE("I32", "[2,0]", 0, 0), 0, ORCD_OK, "");
    expect("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
           "\"b\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[2,2]},"
           "\"c\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}",
           3, ORCD_OK, "");
}

static void invalid_info(void **state) {
    (void)state;
    expect(ONE("I32", "[2,2]", 0, 4), 4, ORCD_ERR_FORMAT, "4 bytes of data, but its shape and dtype need 16");
    expect(ONE("I32", "[1]", 4, 0), 4, ORCD_ERR_FORMAT, "no data_offsets");
    static const char *const bad[] = {
        "{\"t\":1}",
        "{\"t\":{}}",
        "{\"t\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":{},\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[-1],\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1.0],\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[\"1\"],\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[-1,0]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,9223372036854775807]}}",
        "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,9223372036854775808]}}",
        "{\"__metadata__\":1}",
        "{\"__metadata__\":{\"a\":1}}",
        "{\"__metadata__\":{\"a\":{}}}",
    };
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        expect(bad[i], 1, ORCD_ERR_FORMAT, "");
}

static void validation_overflow(void **state) {
    (void)state;
    expect(ONE("U8", "[2,9223372036854775807,2]", 0, 16), 16, ORCD_ERR_FORMAT, "does not fit");
    expect(ONE("F64", "[4611686018427387904]", 0, 16), 16, ORCD_ERR_FORMAT, "does not fit");
    expect(ONE("U8", "[9223372036854775807,2]", 0, 16), 16, ORCD_ERR_FORMAT, "shape and dtype need");
}

static void fp4_misaligned(void **state) {
    (void)state;
    expect(ONE("F4", "[3]", 0, 1), 1, ORCD_ERR_UNSUPPORTED, "dtype F4");
    expect(ONE("f32", "[1]", 0, 4), 4, ORCD_ERR_UNSUPPORTED, "dtype f32");
}

static void empty_shapes_allowed(void **state) {
    (void)state;
    expect(ONE("F32", "[]", 0, 4), 4, ORCD_OK, "");
    expect("{}", 0, ORCD_OK, "");
}

static void duplicate_keys(void **state) {
    (void)state;
    expect("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
           "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}",
           1, ORCD_ERR_FORMAT, "duplicate");
    expect("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, ORCD_ERR_FORMAT,
           "duplicate");
    expect("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, ORCD_ERR_FORMAT, "duplicate");
}

static void deep_nesting(void **state) {
    (void)state;
    buf h = {0};
    buf_str(&h, "{\"a\":");
    for (int i = 0; i < 100000; i++)
        buf_char(&h, '[');
    expect(h.data, 0, ORCD_ERR_FORMAT, "not valid JSON");
    buf_free(&h);
}

/* ---- folders ---- */

typedef struct folder {
    char path[32];
    st_model *m;
    orcd_error err;
} folder;

static void make_folder(folder *d) {
    *d = (folder){.path = "/tmp/orcd-st-XXXXXX"};
    assert_non_null(mkdtemp(d->path));
}

static void put_file(const folder *d, const char *name, const void *data, size_t len) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", d->path, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    fclose(f);
}

static void put_shard(const folder *d, const char *file, const char *tensor) {
    char header[128];
    buf b = {0};
    snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", tensor);
    image(&b, header, 2);
    put_file(d, file, b.data, b.len);
    buf_free(&b);
}

static void drop_folder(folder *d) {
    char command[64];
    st_close(d->m);
    snprintf(command, sizeof command, "rm -r %s", d->path);
    assert_int_equal(system(command), 0);
}

static orcd_status open_with_index(folder *d, const char *index) {
    put_file(d, "model.safetensors.index.json", index, strlen(index));
    st_close(d->m);
    d->err.message[0] = '\0';
    return st_open(d->path, &d->m, &d->err);
}

static void sharded_folder(void **state) {
    (void)state;
    folder d;
    make_folder(&d);
    put_shard(&d, "m-1.safetensors", "a");
    put_shard(&d, "m-2.safetensors", "b");
    assert_int_equal(open_with_index(&d, "{\"metadata\":{\"total_size\":4},"
                                         "\"weight_map\":{\"b\":\"m-2.safetensors\",\"a\":\"m-1.safetensors\"}}"),
                     ORCD_OK);
    assert_int_equal(st_n_tensors(d.m), 2);
    assert_non_null(st_find(d.m, "a"));
    assert_int_equal(st_find(d.m, "b")->bytes, 2);
    assert_false(st_changed(d.m));
    char path[64];
    snprintf(path, sizeof path, "%s/m-2.safetensors", d.path);
    assert_int_equal(truncate(path, 3), 0);
    assert_true(st_changed(d.m));
    drop_folder(&d);
}

static void index_may_name_only_files_beside_it(void **state) {
    (void)state;
    static const char *const bad[] = {"\"../m.safetensors\"",
                                      "\"/m.safetensors\"",
                                      "\"x/m.safetensors\"",
                                      "\"..\"",
                                      "\".safetensors\"",
                                      "\".m.safetensors\"",
                                      "\"m.bin\"",
                                      "\"\"",
                                      "1",
                                      "null",
                                      "\"m.safetensors\\u0000\"",
                                      "[\"m.safetensors\"]"};
    folder d;
    make_folder(&d);
    put_shard(&d, "m.safetensors", "a");
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        char index[128];
        snprintf(index, sizeof index, "{\"weight_map\":{\"a\":%s}}", bad[i]);
        assert_int_equal(open_with_index(&d, index), ORCD_ERR_FORMAT);
        assert_null(d.m);
    }
    assert_int_equal(open_with_index(&d, "{\"weight_map\":{\"a\":\"m.safetensors\"}}"), ORCD_OK);
    drop_folder(&d);
}

static void index_and_files_must_agree(void **state) {
    (void)state;
    static const struct {
        const char *index;
        orcd_status code;
        const char *says;
    } bad[] = {
        {"{\"weight_map\":{\"a\":\"m-2.safetensors\"}}", ORCD_ERR_FORMAT, "nowhere"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\",\"b\":\"m-1.safetensors\"}}", ORCD_ERR_FORMAT, "lists 2 tensors"},
        {"{\"weight_map\":{\"a\":\"m-2.safetensors\",\"b\":\"m-1.safetensors\"}}", ORCD_ERR_FORMAT, "places it in m-"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\",\"c\":\"m-3.safetensors\"}}", ORCD_ERR_IO, "m-3.safetensors"},
        {"{\"weight_map\":[]}", ORCD_ERR_FORMAT, "no weight_map"},
        {"{}", ORCD_ERR_FORMAT, "no weight_map"},
        {"{\"weight_map\":{\"a\":\"m-1.safetensors\",\"a\":\"m-2.safetensors\"}}", ORCD_ERR_FORMAT, "duplicate"},
        {"", ORCD_ERR_FORMAT, "not valid JSON"},
    };
    folder d;
    make_folder(&d);
    put_shard(&d, "m-1.safetensors", "a");
    put_shard(&d, "m-2.safetensors", "b");
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        assert_int_equal(open_with_index(&d, bad[i].index), bad[i].code);
        if (!strstr(d.err.message, bad[i].says))
            fail_msg("%s: \"%s\"", bad[i].index, d.err.message);
    }
    drop_folder(&d);
}

static void folder_without_tensors_names_the_missing_file(void **state) {
    (void)state;
    folder d;
    make_folder(&d);
    assert_int_equal(st_open(d.path, &d.m, &d.err), ORCD_ERR_IO);
    assert_non_null(strstr(d.err.message, "model.safetensors"));
    put_shard(&d, "model.safetensors", "a");
    assert_int_equal(st_open(d.path, &d.m, &d.err), ORCD_OK);
    drop_folder(&d);
}

/* ---- mutations ---- */

static const char valid[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                            "\"w.blocks\":{\"dtype\":\"U8\",\"shape\":[2,1,16],\"data_offsets\":[16,48]},"
                            "\"w.scales\":{\"dtype\":\"U8\",\"shape\":[2,1],\"data_offsets\":[48,50]},"
                            "\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}} ";

static void truncated_at_every_byte(void **state) {
    (void)state;
    buf b = {0};
    orcd_error err;
    image(&b, valid, 50);
    for (size_t n = 0; n < b.len; n++)
        assert_int_equal(parse(b.data, n, &err), ORCD_ERR_FORMAT);
    assert_int_equal(parse(b.data, b.len, &err), ORCD_OK);
    buf_free(&b);
}

/* Replace one run of digits of the header by a number at an edge; the header length follows. */
static void mutate_number(buf *b, uint64_t r) {
    static const char *const edge[] = {"0",
                                       "1",
                                       "2147483647",
                                       "2147483648",
                                       "4294967295",
                                       "4294967296",
                                       "9223372036854775807",
                                       "9223372036854775808",
                                       "18446744073709551615",
                                       "-1",
                                       "1e3",
                                       "17",
                                       "48",
                                       "50",
                                       "51"};
    const char *with = edge[r % ORCD_COUNT(edge)];
    size_t at = 8 + (r >> 8) % (sizeof valid - 1), end;
    while (at < b->len - 50 && (b->data[at] < '0' || b->data[at] > '9'))
        at++;
    for (end = at; end < b->len - 50 && b->data[end] >= '0' && b->data[end] <= '9'; end++)
        ;
    buf out = {0};
    uint64_t len = b->len - 8 - 50 - (end - at) + strlen(with);
    buf_add(&out, &len, 8);
    buf_add(&out, b->data + 8, at - 8);
    buf_str(&out, with);
    buf_add(&out, b->data + end, b->len - end);
    buf_free(b);
    *b = out;
}

static void mutations_never_crash(void **state) {
    (void)state;
    uint64_t seed = 0x2545f4914f6cdd1dull;
    int ok = 0;
    for (int n = 0; n < 10000; n++) {
        buf b = {0};
        orcd_error err;
        image(&b, valid, 50);
        for (uint64_t k = 1 + t_random(&seed) % 2; k > 0; k--) {
            uint64_t r = t_random(&seed);
            if (r >> 62 == 0)
                b.data[(r >> 8) % (b.len - 50)] ^= (char)(1 << (r % 8));
            else if (r >> 62 == 1)
                b.data[(r >> 8) % (b.len - 50)] = "{}[]\",:0 \\u\x80"[(r >> 40) % 12];
            else
                mutate_number(&b, r >> 2);
        }
        ok += parse(b.data, b.len, &err) == ORCD_OK;
        buf_free(&b);
    }
    printf("%d of 10000 mutations accepted\n", ok);
    assert_true(ok > 50 && ok < 9000);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_names_shapes_and_data),
        cmocka_unit_test(json_attack),
        cmocka_unit_test(metadata_incomplete_buffer),
        cmocka_unit_test(header_too_large),
        cmocka_unit_test(header_too_small),
        cmocka_unit_test(invalid_header_length),
        cmocka_unit_test(invalid_header_non_utf8),
        cmocka_unit_test(invalid_header_not_json),
        cmocka_unit_test(whitespace_padded_header),
        cmocka_unit_test(zero_sized_tensor),
        cmocka_unit_test(invalid_info),
        cmocka_unit_test(validation_overflow),
        cmocka_unit_test(fp4_misaligned),
        cmocka_unit_test(empty_shapes_allowed),
        cmocka_unit_test(duplicate_keys),
        cmocka_unit_test(deep_nesting),
        cmocka_unit_test(sharded_folder),
        cmocka_unit_test(index_may_name_only_files_beside_it),
        cmocka_unit_test(index_and_files_must_agree),
        cmocka_unit_test(folder_without_tensors_names_the_missing_file),
        cmocka_unit_test(truncated_at_every_byte),
        cmocka_unit_test(mutations_never_crash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
