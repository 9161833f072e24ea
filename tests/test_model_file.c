/* Model files: both kinds behind one face, views against direct indexing, MXFP4 layouts against the definition. */
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/half.h"
#include "format/model_file.h"
#include "gguf_image.h"
#include "testing.h"

/* ---- files made here ---- */

static char dir[] = "/tmp/orcd-mf-XXXXXX";

static int make_dir(void **state) {
    (void)state;
    return mkdtemp(dir) ? 0 : -1;
}

static int drop_dir(void **state) {
    char command[64];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

static const char *put_file(const char *name, const void *data, size_t len) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    fclose(f);
    return path;
}

static void put_config(const char *text) { put_file("config.json", text, strlen(text)); }

/* A safetensors file grown tensor by tensor. */
typedef struct st_image {
    buf head, data;
} st_image;

static uint64_t shape_count(const char *shape) {
    uint64_t n = 1;
    for (const char *p = shape; *p; p++)
        if (*p >= '0' && *p <= '9')
            n *= strtoull(p, (char **)&p, 10), p--;
    return n;
}

static void st_put(st_image *m, const char *name, const char *dtype, const char *shape, const void *bytes, size_t n) {
    buf_printf(&m->head, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", m->head.len ? "," : "{",
               name, dtype, shape, m->data.len, m->data.len + n);
    buf_add(&m->data, bytes, n);
}

/* Random bytes; returns them, free() them. Exponents of floats stay ordinary so that comparing values is exact. */
static uint8_t *st_put_random(st_image *m, const char *name, const char *dtype, const char *shape, uint64_t seed) {
    size_t size = strcmp(dtype, "U8") == 0 ? 1 : strcmp(dtype, "F32") == 0 ? 4 : 2;
    size_t n = shape_count(shape) * size;
    uint8_t *bytes = malloc(n ? n : 1);
    assert_non_null(bytes);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)t_random(&seed);
    for (size_t i = size - 1; size > 1 && i < n; i += size)
        bytes[i] = (uint8_t)((bytes[i] & 0x81) | 0x3c);
    st_put(m, name, dtype, shape, bytes, n);
    return bytes;
}

static void st_write(st_image *m) {
    buf file = {0};
    buf_str(&m->head, "}");
    uint64_t len = m->head.len;
    buf_add(&file, &len, 8);
    buf_add(&file, m->head.data, m->head.len);
    buf_add(&file, m->data.data, m->data.len);
    put_file("model.safetensors", file.data, file.len);
    buf_free(&file);
    buf_free(&m->head);
    buf_free(&m->data);
}

static mf_file *open_ok(const char *path) {
    mf_file *f;
    orcd_error err;
    if (mf_open(path, &f, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return f;
}

static mf_file *open_hf(st_image *m) {
    put_config("{\"model_type\":\"test\"}");
    st_write(m);
    return open_ok(dir);
}

static mf_file *open_image(image *m) {
    mf_file *f = open_ok(put_file("image", m->b.data, m->b.len));
    buf_free(&m->b);
    return f;
}

static mf_tensor find_ok(const mf_file *f, const char *name) {
    mf_tensor t;
    bool found;
    orcd_error err;
    if (mf_find(f, name, &t, &found, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    assert_true(found);
    assert_string_equal(t.name, name);
    return t;
}

static mf_tensor slice_ok(const mf_tensor *t, uint64_t first, uint64_t step, uint64_t count) {
    mf_tensor v;
    assert_int_equal(mf_slice_rows(t, first, step, count, &v, NULL), ORCD_OK);
    assert_true(v.n_row == count && v.n_col == t->n_col && v.n_mat == t->n_mat);
    return v;
}

static mf_tensor transpose_ok(const mf_tensor *t) {
    mf_tensor v;
    assert_int_equal(mf_transpose(t, &v, NULL), ORCD_OK);
    assert_true(v.n_row == t->n_col && v.n_col == t->n_row && v.n_mat == t->n_mat);
    return v;
}

/* Where the stored value of (matrix, row, column) lies, counted in values. */
typedef struct stored {
    const uint8_t *bytes;
    size_t size;                  /* of one value */
    uint64_t mat, row, col;       /* distances */
    uint64_t row_first, row_step; /* of the view under test */
} stored;

/* mf_rows in odd portions, mf_floats and t->data all agree with direct indexing. */
static void check_view(const mf_tensor *t, stored s) {
    size_t row_bytes = mf_row_bytes(t), n = t->n_mat * t->n_row * t->n_col;
    uint8_t *rows = malloc(n * s.size);
    float *values = malloc(n * sizeof *values);
    assert_true(rows && values && row_bytes == t->n_col * s.size);
    for (uint64_t m = 0; m < t->n_mat; m++)
        for (uint64_t r = 0, k; r < t->n_row; r += k) {
            k = r == 0 ? 66 : 7; /* more rows than a tile of the transposition, then odd portions */
            k = t->n_row - r < k ? t->n_row - r : k;
            mf_rows(t, m, r, k, rows + (m * t->n_row + r) * row_bytes);
        }
    mf_floats(t, values);
    for (uint64_t m = 0, i = 0; m < t->n_mat; m++)
        for (uint64_t r = 0; r < t->n_row; r++)
            for (uint64_t c = 0; c < t->n_col; c++, i++) {
                const uint8_t *want =
                    s.bytes + (m * s.mat + (s.row_first + r * s.row_step) * s.row + c * s.col) * s.size;
                float f;
                assert_memory_equal(rows + i * s.size, want, s.size);
                q_find(t->type)->unpack(want, &f, 1);
                assert_memory_equal(&values[i], &f, sizeof f);
            }
    if (t->data)
        assert_memory_equal(t->data, rows, n * s.size);
    free(rows);
    free(values);
}

/* ---- opening and configuration ---- */

static void golden_folders_open(void **state) {
    (void)state;
    const struct {
        const char *path, *arch, *layers_key;
        uint64_t layers;
    } golden[] = {{"tests/golden/gptoss-mini", "gpt_oss", "num_hidden_layers", 4},
                  {"tests/golden/gptoss-mini/model.safetensors", "gpt_oss", "num_hidden_layers", 4},
                  {"tests/golden/gptoss-mini-topk2", "gpt_oss", "num_hidden_layers", 3},
                  {"tests/golden/gpt2-mini", "gpt2", "n_layer", 4}};
    for (size_t i = 0; i < ORCD_COUNT(golden); i++) {
        mf_file *f = open_ok(golden[i].path);
        uint64_t n = 0;
        assert_int_equal(mf_kind_of(f), MF_HF);
        assert_string_equal(mf_arch_name(f), golden[i].arch);
        assert_string_equal(mf_path(f), golden[i].path);
        assert_true(mf_st(f) && !mf_gguf(f) && !mf_changed(f) && mf_bytes(f) > 300000);
        assert_true(mf_u64(f, "block_count", golden[i].layers_key, &n) && n == golden[i].layers);
        mf_close(f);
    }
    mf_file *f = open_ok("tests/golden/gptoss-mini");
    mf_tensor t = find_ok(f, "model.layers.0.mlp.experts.gate_up_proj");
    assert_true(t.type == Q_MXFP4 && t.n_mat == 8 && t.n_row == 192 && t.n_col == 128 && !t.data);
    t = find_ok(f, "model.layers.0.mlp.experts.gate_up_proj_bias");
    assert_true(t.type == Q_BF16 && t.n_mat == 1 && t.n_row == 8 && t.n_col == 192 && t.data);
    t = find_ok(f, "model.norm.weight");
    assert_true(t.n_mat == 1 && t.n_row == 1 && t.n_col == 128);
    mf_close(f);
}

static void configuration_by_path(void **state) {
    (void)state;
    put_config("{\"model_type\":\"gpt_oss\",\"a\":{\"b\":{\"c\":7}},\"neg\":-1,\"real\":2.5,\"yes\":true,\"null\":null,"
               "\"rope_scaling\":{\"factor\":32.0},\"rope_parameters\":{\"factor\":8,\"rope_type\":\"yarn\"},"
               "\"layer_types\":[\"sliding_attention\",\"full_attention\",3],\"nul\":\"a\\u0062\"}");
    st_image m = {0};
    st_put(&m, "t", "F32", "[1]", "abcd", 4);
    st_write(&m);
    mf_file *f = open_ok(dir);
    uint64_t u = 9;
    double d = 9;
    bool b = false;
    char text[17];
    assert_true(mf_u64(f, NULL, "a.b.c", &u) && u == 7);
    assert_false(mf_u64(f, "a.b.c", NULL, &u) || mf_u64(f, NULL, "a.b", &u) || mf_u64(f, NULL, "a.b.c.d", &u) ||
                 mf_u64(f, NULL, "neg", &u) || mf_u64(f, NULL, "real", &u) || mf_u64(f, NULL, "null", &u));
    assert_int_equal(u, 7);
    assert_true(mf_f64(f, NULL, "real", &d) && d == 2.5 && mf_f64(f, NULL, "neg", &d) && d == -1);
    assert_true(mf_f64(f, NULL, "rope_scaling.factor", &d) && d == 32);
    assert_true(mf_string(f, NULL, "rope_scaling.rope_type", text, sizeof text));
    assert_string_equal(text, "yarn");
    assert_true(mf_bool(f, NULL, "yes", &b) && b && !mf_bool(f, NULL, "neg", &b));
    assert_true(mf_hf_string_at(f, "layer_types", 1, text, sizeof text));
    assert_string_equal(text, "full_attention");
    assert_false(mf_hf_string_at(f, "layer_types", 0, text, sizeof text)); /* 17 letters and the end do not fit 17 */
    assert_string_equal(text, "");
    assert_false(mf_hf_string_at(f, "layer_types", 2, text, sizeof text) ||
                 mf_hf_string_at(f, "layer_types", 3, text, sizeof text) ||
                 mf_hf_string_at(f, "yes", 0, text, sizeof text));
    mf_close(f);
    put_config("{\"model_type\":\"x\",\"rope_scaling\":null,\"rope_parameters\":{\"factor\":8}}");
    f = open_ok(dir);
    assert_true(mf_f64(f, NULL, "rope_scaling.factor", &d) && d == 8);
    mf_close(f);
}

static void gguf_values_under_the_architecture(void **state) {
    (void)state;
    image m;
    img_begin(&m, 3);
    img_kv_str(&m, "general.architecture", "gpt-oss");
    img_kv_int(&m, "gpt-oss.block_count", GGUF_U32, 24, 4);
    img_kv_int(&m, "gpt-oss.flag", GGUF_BOOL, 1, 1);
    img_kv_int(&m, "block_count", GGUF_U32, 99, 4);
    img_kv_str(&m, "gpt-oss.rope.scaling.type", "yarn");
    mf_file *f = open_image(&m);
    uint64_t u = 0;
    double d = 0;
    bool b = false;
    char text[8];
    assert_int_equal(mf_kind_of(f), MF_GGUF);
    assert_string_equal(mf_arch_name(f), "gpt-oss");
    assert_true(mf_gguf(f) && !mf_st(f));
    assert_true(mf_u64(f, "block_count", "x", &u) && u == 24 && !mf_u64(f, NULL, "block_count", &u));
    assert_true(mf_f64(f, "block_count", NULL, &d) && d == 24 && mf_bool(f, "flag", NULL, &b) && b);
    assert_true(mf_string(f, "rope.scaling.type", NULL, text, sizeof text) && strcmp(text, "yarn") == 0);
    assert_false(mf_string(f, "rope.scaling.type", NULL, text, 4) || mf_hf_string_at(f, "layer_types", 0, text, 8));
    mf_close(f);
}

static void files_that_are_no_model(void **state) {
    (void)state;
    mf_file *f;
    orcd_error err;
    image m;
    char path[64];
#define REFUSED(where, code, says)                                                                                     \
    do {                                                                                                               \
        f = (mf_file *)1;                                                                                              \
        assert_int_equal(mf_open(where, &f, &err), code);                                                              \
        assert_null(f);                                                                                                \
        if (!strstr(err.message, says))                                                                                \
            fail_msg("\"%s\"", err.message);                                                                           \
    } while (0)
    REFUSED(put_file("note.gguf", "hello, world", 12), ORCD_ERR_UNSUPPORTED, "neither a GGUF nor");
    REFUSED(put_file("none.gguf", "", 0), ORCD_ERR_UNSUPPORTED, "neither a GGUF nor");
    REFUSED(put_file("half.bin", "GGUF\3", 5), ORCD_ERR_FORMAT, "half.bin");
    REFUSED("/nonexistent", ORCD_ERR_IO, "/nonexistent");
    REFUSED("/dev/zero", ORCD_ERR_IO, "regular");
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    REFUSED(dir, ORCD_ERR_IO, "config.json");
    put_config("{");
    REFUSED(dir, ORCD_ERR_FORMAT, "not valid JSON");
    put_config("{\"model_type\":\"a\",\"model_type\":\"b\"}");
    REFUSED(dir, ORCD_ERR_FORMAT, "not valid JSON");
    put_config("[]");
    REFUSED(dir, ORCD_ERR_FORMAT, "model_type");
    img_begin(&m, 3);
    REFUSED(put_file("a", m.b.data, m.b.len), ORCD_ERR_FORMAT, "general.architecture");
    img_kv_str(&m, "general.architecture", "gpt2");
    img_kv_int(&m, "split.count", GGUF_U16, 2, 2);
    REFUSED(put_file("a", m.b.data, m.b.len), ORCD_ERR_FORMAT, "one of 2 parts");
    buf_free(&m.b);
}

/* ---- MXFP4 ---- */

/* The value of element e of a block, by the definition: E2M1 codes in pairs, times 2^(scale - 127). */
static double pair_value(const uint8_t *codes, uint8_t scale, int e) {
    static const double magnitude[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    int code = codes[e / 2] >> (e % 2 * 4) & 15;
    return (code & 8 ? -1 : 1) * ldexp(magnitude[code & 7], scale - 127);
}

static void check_mxfp4(const mf_tensor *t, const uint8_t *codes, const uint8_t *scales, uint64_t mat_rows,
                        uint64_t first, uint64_t step) {
    uint64_t groups = t->n_col / 32;
    uint8_t *row = malloc(groups * 17);
    float *values = malloc(t->n_mat * t->n_row * t->n_col * sizeof *values), *v = values;
    assert_true(row && values && mf_row_bytes(t) == groups * 17);
    mf_floats(t, values);
    for (uint64_t m = 0; m < t->n_mat; m++)
        for (uint64_t r = 0; r < t->n_row; r++) {
            mf_rows(t, m, r, 1, row);
            for (uint64_t g = 0; g < groups; g++) {
                uint64_t block = (m * mat_rows + first + r * step) * groups + g;
                const uint8_t *to = row + g * 17;
                assert_int_equal(to[0], scales[block]);
                for (int e = 0; e < 32; e++) {
                    int code = codes[block * 16 + e / 2] >> (e % 2 * 4) & 15;
                    assert_int_equal(to[1 + e % 16] >> (e / 16 * 4) & 15, code);
                    double want = pair_value(codes + block * 16, scales[block], e);
                    float got = *v++;
                    assert_true(scales[block] == 255 ? isnan(got) || want == 0 : (double)got == (double)(float)want);
                }
            }
        }
    free(row);
    free(values);
}

static void mxfp4_pairs_become_canonical_blocks(void **state) {
    (void)state;
    for (int dots = 0; dots < 2; dots++) {
        st_image m = {0};
        uint8_t *codes = st_put_random(&m, dots ? "w.blocks" : "w_blocks", "U8", "[3,10,5,16]", 1);
        uint8_t *scales = st_put_random(&m, dots ? "w.scales" : "w_scales", "U8", "[3,10,5]", 2);
        uint8_t *flat = st_put_random(&m, "v_blocks", "U8", "[256,1,16]", 3);
        uint8_t every[256];
        for (int i = 0; i < 256; i++)
            every[i] = (uint8_t)i; /* all scales */
        st_put(&m, "v_scales", "U8", "[256,1]", every, 256);
        mf_file *f = open_hf(&m);
        mf_tensor t = find_ok(f, "w");
        assert_true(t.type == Q_MXFP4 && t.n_mat == 3 && t.n_row == 10 && t.n_col == 160 && !t.data);
        check_mxfp4(&t, codes, scales, 10, 0, 1);
        mf_tensor gate = slice_ok(&t, 0, 2, 5), up = slice_ok(&t, 1, 2, 5), one = slice_ok(&up, 3, 1, 2);
        check_mxfp4(&gate, codes, scales, 10, 0, 2);
        check_mxfp4(&up, codes, scales, 10, 1, 2);
        check_mxfp4(&one, codes, scales, 10, 7, 2);
        t = find_ok(f, "v");
        assert_true(t.n_mat == 1 && t.n_row == 256 && t.n_col == 32);
        check_mxfp4(&t, flat, every, 256, 0, 1);
        mf_tensor v;
        orcd_error err;
        assert_int_equal(mf_transpose(&t, &v, &err), ORCD_ERR_UNSUPPORTED);
        mf_close(f);
        free(codes);
        free(scales);
        free(flat);
    }
}

/* Early ollama: the scale before the codes as in GGUF, the codes in pairs as in safetensors. */
static void gguf_type_4_becomes_canonical_blocks(void **state) {
    (void)state;
    enum { BLOCKS = 2 * 6 * 3 };
    uint8_t codes[BLOCKS * 16], scales[BLOCKS];
    uint64_t seed = 4;
    image m;
    img_begin(&m, 3);
    img_kv_str(&m, "general.architecture", "gptoss");
    img_tensor(&m, "w", 4, 3, (uint64_t[]){96, 6, 2}, 0);
    img_data(&m, 32, 0);
    for (int i = 0; i < BLOCKS; i++) {
        scales[i] = (uint8_t)t_random(&seed);
        buf_add(&m.b, &scales[i], 1);
        for (int k = 0; k < 16; k++)
            codes[i * 16 + k] = (uint8_t)t_random(&seed);
        buf_add(&m.b, codes + i * 16, 16);
    }
    mf_file *f = open_image(&m);
    mf_tensor t = find_ok(f, "w");
    assert_true(t.type == Q_MXFP4 && t.n_mat == 2 && t.n_row == 6 && t.n_col == 96 && !t.data);
    check_mxfp4(&t, codes, scales, 6, 0, 1);
    mf_tensor s = slice_ok(&t, 1, 2, 3);
    check_mxfp4(&s, codes, scales, 6, 1, 2);
    mf_release(&t);
    check_mxfp4(&t, codes, scales, 6, 0, 1);
    mf_close(f);
}

static void unusable_pairs_are_refused(void **state) {
    (void)state;
    static const struct {
        const char *dtype, *blocks, *scales;
    } bad[] = {{"U8", "[2,1,8]", "[2,1]"},    {"U8", "[2,1,16]", "[1,1]"},
               {"U8", "[2,1,16]", "[2,1,1]"}, {"U8", "[2,1,16]", "[2]"},
               {"U8", "[16]", "[]"},          {"BF16", "[2,1,16]", "[2,1]"},
               {"U8", "[0,1,16]", "[0,1]"},   {"U8", "[1,1,1,1,16]", "[1,1,1,1]"}};
    for (size_t i = 0; i < ORCD_COUNT(bad); i++) {
        st_image m = {0};
        mf_tensor t;
        bool found;
        orcd_error err;
        free(st_put_random(&m, "w_blocks", bad[i].dtype, bad[i].blocks, 1));
        free(st_put_random(&m, "w_scales", "U8", bad[i].scales, 1));
        mf_file *f = open_hf(&m);
        assert_int_not_equal(mf_find(f, "w", &t, &found, &err), ORCD_OK);
        assert_non_null(strstr(err.message, "tensor w"));
        mf_close(f);
    }
}

static void a_lone_half_of_a_pair_is_refused(void **state) {
    (void)state;
    st_image m = {0};
    mf_tensor t;
    bool found;
    orcd_error err;
    free(st_put_random(&m, "w_blocks", "U8", "[2,1,16]", 1));
    free(st_put_random(&m, "v.scales", "U8", "[2,1]", 1));
    mf_file *f = open_hf(&m);
    assert_int_equal(mf_find(f, "w", &t, &found, &err), ORCD_ERR_FORMAT);
    assert_non_null(strstr(err.message, "no scales"));
    assert_int_equal(mf_find(f, "v", &t, &found, &err), ORCD_ERR_FORMAT);
    assert_non_null(strstr(err.message, "no blocks"));
    mf_close(f);
}

/* ---- plain tensors and views ---- */

static void views_of_every_plain_type(void **state) {
    (void)state;
    static const char *const dtype[] = {"F32", "F16", "BF16"};
    for (size_t k = 0; k < ORCD_COUNT(dtype); k++) {
        st_image m = {0};
        uint64_t size = k ? 2 : 4;
        uint8_t *w = st_put_random(&m, "w", dtype[k], "[3,130,67]", 5);
        mf_file *f = open_hf(&m);
        mf_tensor t = find_ok(f, "w");
        assert_true(t.n_mat == 3 && t.n_row == 130 && t.n_col == 67 && t.data);
        check_view(&t, (stored){w, size, 130 * 67, 67, 1, 0, 1});
        mf_tensor gate = slice_ok(&t, 0, 2, 65), up = slice_ok(&t, 1, 2, 65);
        check_view(&gate, (stored){w, size, 130 * 67, 67, 1, 0, 2});
        check_view(&up, (stored){w, size, 130 * 67, 67, 1, 1, 2});
        mf_tensor part = slice_ok(&t, 100, 1, 30), part_of = slice_ok(&up, 10, 3, 4);
        check_view(&part, (stored){w, size, 130 * 67, 67, 1, 100, 1});
        check_view(&part_of, (stored){w, size, 130 * 67, 67, 1, 21, 6});

        mf_tensor turned = transpose_ok(&t);
        assert_null(turned.data);
        check_view(&turned, (stored){w, size, 130 * 67, 1, 67, 0, 1});
        mf_tensor q = slice_ok(&turned, 3, 1, 64), odd = slice_ok(&turned, 1, 2, 33), odder = slice_ok(&odd, 1, 2, 16);
        check_view(&q, (stored){w, size, 130 * 67, 1, 67, 3, 1});
        check_view(&odd, (stored){w, size, 130 * 67, 1, 67, 1, 2});
        check_view(&odder, (stored){w, size, 130 * 67, 1, 67, 3, 4});
        mf_tensor back = transpose_ok(&turned);
        assert_true(back.data == t.data && back.view.row_bytes == t.view.row_bytes);
        check_view(&back, (stored){w, size, 130 * 67, 67, 1, 0, 1});
        mf_release(&turned);
        mf_release(&t);
        check_view(&t, (stored){w, size, 130 * 67, 67, 1, 0, 1});
        mf_close(f);
        free(w);
    }
}

static void contiguous_slices_keep_their_data(void **state) {
    (void)state;
    st_image m = {0};
    free(st_put_random(&m, "w", "F32", "[6,5]", 1));
    free(st_put_random(&m, "e", "F32", "[2,6,5]", 1));
    mf_file *f = open_hf(&m);
    mf_tensor w = find_ok(f, "w"), e = find_ok(f, "e");
    assert_true(slice_ok(&w, 2, 1, 4).data == w.data + 2 * 20);
    assert_true(slice_ok(&w, 3, 9, 1).data == w.data + 3 * 20);
    mf_tensor middle = slice_ok(&w, 1, 1, 4);
    assert_true(slice_ok(&middle, 1, 1, 2).data == w.data + 2 * 20);
    assert_null(slice_ok(&w, 0, 2, 3).data);
    assert_null(slice_ok(&e, 0, 1, 5).data); /* the matrices do not touch */
    assert_true(slice_ok(&e, 0, 1, 6).data == e.data);
    mf_close(f);
}

static void slices_that_leave_the_tensor(void **state) {
    (void)state;
    static const uint64_t bad[][3] = {{0, 1, 7},          {6, 1, 1},          {0, 2, 4},          {1, 2, 4},
                                      {0, 0, 1},          {0, 1, 0},          {UINT64_MAX, 1, 1}, {1, UINT64_MAX, 2},
                                      {2, 1ull << 63, 3}, {0, 1ull << 63, 3}, {0, 1, UINT64_MAX}, {UINT64_MAX, 1, 2}};
    st_image m = {0};
    free(st_put_random(&m, "w", "F32", "[6,5]", 1));
    mf_file *f = open_hf(&m);
    mf_tensor t = find_ok(f, "w"), v;
    orcd_error err;
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        assert_int_equal(mf_slice_rows(&t, bad[i][0], bad[i][1], bad[i][2], &v, &err), ORCD_ERR_FORMAT);
    v = slice_ok(&t, 0, 1, 3);
    assert_int_equal(mf_transpose(&v, &v, &err), ORCD_ERR_ARG);
    v = slice_ok(&t, 0, 2, 3);
    assert_int_equal(mf_transpose(&v, &v, &err), ORCD_ERR_ARG);
    v = transpose_ok(&t);
    v = slice_ok(&v, 0, 1, 4);
    assert_int_equal(mf_transpose(&v, &v, &err), ORCD_ERR_ARG);
    mf_close(f);
}

static void shapes_and_dtypes(void **state) {
    (void)state;
    st_image m = {0};
    mf_tensor t;
    bool found;
    orcd_error err;
    free(st_put_random(&m, "scalar", "F32", "[]", 1));
    free(st_put_random(&m, "empty", "F32", "[4,0]", 1));
    free(st_put_random(&m, "four", "F32", "[1,1,2,2]", 1));
    free(st_put_random(&m, "bytes", "U8", "[4]", 1));
    mf_file *f = open_hf(&m);
    t = find_ok(f, "scalar");
    assert_true(t.n_mat == 1 && t.n_row == 1 && t.n_col == 1);
    assert_int_equal(mf_find(f, "empty", &t, &found, &err), ORCD_ERR_FORMAT);
    assert_int_equal(mf_find(f, "four", &t, &found, &err), ORCD_ERR_UNSUPPORTED);
    assert_int_equal(mf_find(f, "bytes", &t, &found, &err), ORCD_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "dtype U8"));
    assert_int_equal(mf_find(f, "absent", &t, &found, &err), ORCD_OK);
    assert_false(found);
    mf_close(f);
}

static void gguf_tensors_of_every_type(void **state) {
    (void)state;
    image m;
    uint64_t offset = 0;
    img_begin(&m, 3);
    img_kv_str(&m, "general.architecture", "gpt2");
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *q = q_at(i);
        img_tensor(&m, q->name, q->type, 4, (uint64_t[]){2 * q->block_len, 3, 2, 2}, offset);
        offset += (24 * q->block_bytes + 31) / 32 * 32;
    }
    img_data(&m, 32, offset);
    mf_file *f = open_image(&m);
    for (size_t i = 0; i < q_count(); i++) {
        const q_traits *q = q_at(i);
        mf_tensor t = find_ok(f, q->name);
        size_t n = 24 * q->block_len, row = 2 * q->block_bytes;
        assert_true(t.type == q->type && t.n_mat == 4 && t.n_row == 3 && t.n_col == 2 * q->block_len && t.data);
        uint8_t rows[2048];
        mf_rows(&t, 3, 1, 2, rows);
        assert_memory_equal(rows, t.data + 10 * row, 2 * row);
        mf_tensor s = slice_ok(&t, 2, 1, 1);
        mf_rows(&s, 1, 0, 1, rows);
        assert_memory_equal(rows, t.data + 5 * row, row);
        float *all = malloc(n * sizeof *all), *some = malloc(n * sizeof *some);
        assert_true(all && some);
        mf_floats(&t, all);
        mf_floats(&s, some);
        q->unpack(t.data + 11 * row, all, 2 * q->block_len); /* all[0..) now holds row 2 of matrix 3 */
        assert_memory_equal(all, some + 3 * 2 * q->block_len, 2 * q->block_len * sizeof *all);
        free(all);
        free(some);
    }
    mf_close(f);
}

static void a_shrunken_file_is_noticed(void **state) {
    (void)state;
    st_image m = {0};
    char path[64];
    free(st_put_random(&m, "w", "F32", "[6,5]", 1));
    mf_file *f = open_hf(&m);
    assert_false(mf_changed(f));
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    assert_int_equal(truncate(path, 20), 0);
    assert_true(mf_changed(f));
    mf_close(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(golden_folders_open),
        cmocka_unit_test(configuration_by_path),
        cmocka_unit_test(gguf_values_under_the_architecture),
        cmocka_unit_test(files_that_are_no_model),
        cmocka_unit_test(mxfp4_pairs_become_canonical_blocks),
        cmocka_unit_test(gguf_type_4_becomes_canonical_blocks),
        cmocka_unit_test(unusable_pairs_are_refused),
        cmocka_unit_test(a_lone_half_of_a_pair_is_refused),
        cmocka_unit_test(views_of_every_plain_type),
        cmocka_unit_test(contiguous_slices_keep_their_data),
        cmocka_unit_test(slices_that_leave_the_tensor),
        cmocka_unit_test(shapes_and_dtypes),
        cmocka_unit_test(gguf_tensors_of_every_type),
        cmocka_unit_test(a_shrunken_file_is_noticed),
    };
    return cmocka_run_group_tests(tests, make_dir, drop_dir);
}
