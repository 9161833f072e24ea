#include "format/model_file.h"

#include <assert.h>
#include <emmintrin.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/checked.h"

#define CONFIG_MAX (16u << 20)

enum { MX_LEN = 32, MX_BYTES = 17, MX_CODES = 16 }; /* one MXFP4 block: values, bytes, bytes without the scale */

struct mf_file {
    mf_kind kind;
    char *path;
    char arch_name[64];
    gguf *g;        /* MF_GGUF */
    st_model *st;   /* MF_HF */
    json_t *config; /* MF_HF: config.json */
};

/* ---- opening ---- */

/* GGUF by its first bytes, safetensors by the brace after the header length. */
static orcd_status detect(const char *path, mf_kind *kind, orcd_error *err) {
    file_map map;
    ORCD_TRY(file_open(path, &map, err));
    orcd_status s = ORCD_OK;
    if (map.size >= 4 && memcmp(map.data, "GGUF", 4) == 0)
        *kind = MF_GGUF;
    else if (map.size > 8 && map.data[8] == '{')
        *kind = MF_HF;
    else
        s = orcd_fail_at(err, ORCD_ERR_UNSUPPORTED, 0,
                         "%s is neither a GGUF nor a safetensors file; give a .gguf file or a Hugging Face folder",
                         path);
    file_close(&map);
    return s;
}

static orcd_status open_gguf(mf_file *f, orcd_error *err) {
    gguf_str name;
    ORCD_TRY(gguf_open(f->path, &f->g, err));
    if (!gguf_string(f->g, "general.architecture", &name) || name.len == 0 || name.len >= sizeof f->arch_name)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s does not say its general.architecture", f->path);
    memcpy(f->arch_name, name.data, name.len);
    return ORCD_OK;
}

static orcd_status read_config(mf_file *f, const char *path, orcd_error *err) {
    char *text = NULL;
    size_t len;
    json_error_t je;
    orcd_status s = ORCD_OK;
    ORCD_TRY(file_slurp(path, CONFIG_MAX, &text, &len, err));
    f->config = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
    if (!f->config)
        s = orcd_fail_at(err, ORCD_ERR_FORMAT, (uint64_t)(je.position > 0 ? je.position : 0), "%s is not valid JSON",
                         path);
    else if (!mf_string(f, NULL, "model_type", f->arch_name, sizeof f->arch_name))
        s = orcd_fail(err, ORCD_ERR_FORMAT, "%s does not say its model_type", path);
    free(text);
    return s;
}

/* PATH is a folder, or a .safetensors file in one. */
static orcd_status open_hf(mf_file *f, bool folder, orcd_error *err) {
    const char *slash = strrchr(f->path, '/');
    buf config = {0};
    orcd_status s;
    if (folder)
        buf_printf(&config, "%s/config.json", f->path);
    else
        buf_printf(&config, "%.*sconfig.json", slash ? (int)(slash - f->path + 1) : 0, f->path);
    if (config.failed)
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a file name");
    else if (!file_exists(config.data))
        s = orcd_fail(err, ORCD_ERR_IO, "there is no %s; a model is a .gguf file or a folder with config.json",
                      config.data);
    else if ((s = read_config(f, config.data, err)) == ORCD_OK)
        s = st_open(f->path, &f->st, err);
    buf_free(&config);
    return s;
}

orcd_status mf_open(const char *path, mf_file **out, orcd_error *err) {
    orcd_status s;
    *out = NULL;
    mf_file *f = calloc(1, sizeof *f);
    bool folder = file_is_dir(path);
    if (!f || !(f->path = strdup(path))) {
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory to open %s", path);
        goto done;
    }
    f->kind = MF_HF;
    if (!folder)
        ORCD_TRY_GOTO(s, done, detect(path, &f->kind, err));
    s = f->kind == MF_GGUF ? open_gguf(f, err) : open_hf(f, folder, err);
done:
    if (s != ORCD_OK)
        mf_close(f);
    else
        *out = f;
    return s;
}

void mf_close(mf_file *f) {
    if (!f)
        return;
    gguf_close(f->g);
    st_close(f->st);
    json_decref(f->config);
    free(f->path);
    free(f);
}

mf_kind mf_kind_of(const mf_file *f) { return f->kind; }
const char *mf_path(const mf_file *f) { return f->path; }
uint64_t mf_bytes(const mf_file *f) { return f->g ? gguf_bytes(f->g) : st_bytes(f->st); }
const gguf *mf_gguf(const mf_file *f) { return f->g; }
const st_model *mf_st(const mf_file *f) { return f->st; }
bool mf_changed(const mf_file *f) { return f->g ? gguf_changed(f->g) : st_changed(f->st); }
const char *mf_arch_name(const mf_file *f) { return f->arch_name; }

/* ---- configuration ---- */

/* "<architecture>.KEY", or NULL when it cannot be a key of this file. */
static const char *gguf_key_of(const mf_file *f, const char *key, char full[160]) {
    int n = key && f->g ? snprintf(full, 160, "%s.%s", f->arch_name, key) : -1;
    return n > 0 && n < 160 ? full : NULL;
}

static const json_t *walk(const json_t *v, const char *path) {
    char part[64];
    while (v && *path) {
        size_t n = strcspn(path, ".");
        if (n >= sizeof part)
            return NULL;
        memcpy(part, path, n);
        part[n] = '\0';
        v = json_object_get(v, part);
        path += n + (path[n] == '.');
    }
    return v;
}

/* transformers 5 writes rope_parameters where earlier versions wrote rope_scaling. */
static const json_t *config_value(const mf_file *f, const char *path) {
    static const char scaling[] = "rope_scaling.";
    if (!f->config || !path)
        return NULL;
    const json_t *v = walk(f->config, path);
    if (!v && strncmp(path, scaling, sizeof scaling - 1) == 0)
        v = walk(json_object_get(f->config, "rope_parameters"), path + sizeof scaling - 1);
    return v;
}

bool mf_u64(const mf_file *f, const char *gguf_key, const char *hf_key, uint64_t *out) {
    char full[160];
    const char *key = gguf_key_of(f, gguf_key, full);
    if (f->g)
        return key && gguf_u64(f->g, key, out);
    const json_t *v = config_value(f, hf_key);
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *out = (uint64_t)json_integer_value(v);
    return true;
}

bool mf_f64(const mf_file *f, const char *gguf_key, const char *hf_key, double *out) {
    char full[160];
    const char *key = gguf_key_of(f, gguf_key, full);
    if (f->g)
        return key && gguf_f64(f->g, key, out);
    const json_t *v = config_value(f, hf_key);
    if (!json_is_number(v))
        return false;
    *out = json_number_value(v);
    return true;
}

bool mf_bool(const mf_file *f, const char *gguf_key, const char *hf_key, bool *out) {
    char full[160];
    const char *key = gguf_key_of(f, gguf_key, full);
    if (f->g)
        return key && gguf_bool(f->g, key, out);
    const json_t *v = config_value(f, hf_key);
    if (!json_is_boolean(v))
        return false;
    *out = json_is_true(v);
    return true;
}

/* False, and out empty, when it does not fit or holds a NUL. */
static bool copy_string(const char *s, size_t len, char *out, size_t cap) {
    if (cap)
        out[0] = '\0';
    if (!s || len >= cap || memchr(s, 0, len))
        return false;
    memcpy(out, s, len);
    out[len] = '\0';
    return true;
}

bool mf_string(const mf_file *f, const char *gguf_key, const char *hf_key, char *out, size_t cap) {
    char full[160];
    gguf_str s = {0};
    const char *key = gguf_key_of(f, gguf_key, full);
    if (f->g)
        return key && gguf_string(f->g, key, &s) && copy_string(s.data, s.len, out, cap);
    const json_t *v = config_value(f, hf_key);
    return copy_string(json_string_value(v), json_string_length(v), out, cap);
}

bool mf_hf_string_at(const mf_file *f, const char *hf_key, uint64_t i, char *out, size_t cap) {
    const json_t *v = json_array_get(config_value(f, hf_key), i);
    return copy_string(json_string_value(v), json_string_length(v), out, cap);
}

/* ---- finding a weight ---- */

static void find_gguf(const gguf_tensor *g, mf_tensor *t) {
    t->type = g->type;
    t->pos = g->pos;
    t->n_col = g->ne[0];
    t->n_row = g->ne[1];
    t->n_mat = g->ne[2] * g->ne[3];
    t->view.row_bytes = mf_row_bytes(t);
    t->view.mat_bytes = t->view.row_bytes * t->n_row;
    t->view.base = g->data;
    if (!g->paired) {
        t->data = g->data;
        return;
    }
    t->view.scales = g->data; /* scale and codes lie in one block, only the codes' order differs */
    t->view.base = g->data + 1;
    t->view.block_step = t->view.scale_step = MX_BYTES;
    t->view.scale_row_bytes = t->view.row_bytes;
    t->view.scale_mat_bytes = t->view.mat_bytes;
}

/* 0 to 3 dimensions, slowest first, to matrices, rows and columns. */
static orcd_status set_shape(mf_tensor *t, const st_tensor *s, uint32_t n_dims, orcd_error *err) {
    uint64_t d[3] = {1, 1, 1};
    if (n_dims > 3)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "tensor %s has %u dimensions; at most 3 are expected", t->name,
                         n_dims);
    for (uint32_t i = 0; i < n_dims; i++) {
        d[3 - n_dims + i] = s->shape[i];
        if (s->shape[i] == 0)
            return orcd_fail(err, ORCD_ERR_FORMAT, "tensor %s is empty: dimension %u is 0", t->name, i);
    }
    t->n_mat = d[0];
    t->n_row = d[1];
    t->n_col = d[2];
    return ORCD_OK;
}

static orcd_status find_plain(const st_tensor *s, mf_tensor *t, orcd_error *err) {
    switch (s->type) {
    case ST_F32:
        t->type = Q_F32;
        break;
    case ST_F16:
        t->type = Q_F16;
        break;
    case ST_BF16:
        t->type = Q_BF16;
        break;
    default:
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "tensor %s has dtype %s; F32, F16 and BF16 are supported", t->name,
                         st_type_name(s->type));
    }
    ORCD_TRY(set_shape(t, s, s->n_dims, err));
    t->data = t->view.base = s->data;
    t->view.row_bytes = mf_row_bytes(t);
    t->view.mat_bytes = t->view.row_bytes * t->n_row;
    return ORCD_OK;
}

/* blocks U8 [.., G, 16] and scales U8 [.., G] for rows of 32 G values. */
static orcd_status find_pair(const st_tensor *blocks, const st_tensor *scales, mf_tensor *t, orcd_error *err) {
    uint32_t n = scales->n_dims;
    bool same = blocks->type == ST_U8 && scales->type == ST_U8 && n >= 1 && blocks->n_dims == n + 1 &&
                blocks->shape[n] == MX_CODES && memcmp(blocks->shape, scales->shape, n * sizeof *scales->shape) == 0;
    if (!same)
        return orcd_fail(err, ORCD_ERR_FORMAT,
                         "the MXFP4 pair of tensor %s does not have the shapes [.., G, 16] and [.., G] of U8", t->name);
    ORCD_TRY(set_shape(t, scales, n, err));
    uint64_t groups = t->n_col;
    if (!ck_mul(groups, MX_LEN, &t->n_col))
        return orcd_fail(err, ORCD_ERR_FORMAT, "the rows of tensor %s are too long", t->name);
    t->type = Q_MXFP4;
    t->view = (struct mf_view){
        .base = blocks->data,
        .scales = scales->data,
        .block_step = MX_CODES,
        .scale_step = 1,
        .row_bytes = groups * MX_CODES,
        .mat_bytes = groups * MX_CODES * t->n_row,
        .scale_row_bytes = groups,
        .scale_mat_bytes = groups * t->n_row,
        .row_step = 1,
    };
    return ORCD_OK;
}

static const st_tensor *find_part(const st_model *st, const char *name, char separator, const char *part) {
    char full[256];
    int n = snprintf(full, sizeof full, "%s%c%s", name, separator, part);
    return n > 0 && (size_t)n < sizeof full ? st_find(st, full) : NULL;
}

orcd_status mf_find(const mf_file *f, const char *name, mf_tensor *out, bool *found, orcd_error *err) {
    *out = (mf_tensor){.pos = ORCD_POS_NONE, .view.row_step = 1};
    *found = false;
    snprintf(out->name, sizeof out->name, "%s", name);
    if (f->g) {
        const gguf_tensor *g = gguf_find_tensor(f->g, name);
        *found = g != NULL;
        if (g)
            find_gguf(g, out);
        return ORCD_OK;
    }
    const st_tensor *plain = st_find(f->st, name);
    if (plain) {
        *found = true;
        return find_plain(plain, out, err);
    }
    for (const char *separator = "_."; *separator; separator++) {
        const st_tensor *blocks = find_part(f->st, name, *separator, "blocks");
        const st_tensor *scales = find_part(f->st, name, *separator, "scales");
        if (!blocks && !scales)
            continue;
        *found = true;
        if (!blocks || !scales)
            return orcd_fail(err, ORCD_ERR_FORMAT, "tensor %s has MXFP4 %s but no %s", name,
                             blocks ? "blocks" : "scales", blocks ? "scales" : "blocks");
        return find_pair(blocks, scales, out, err);
    }
    return ORCD_OK;
}

/* ---- views ---- */

orcd_status mf_slice_rows(const mf_tensor *t, uint64_t first, uint64_t step, uint64_t count, mf_tensor *out,
                          orcd_error *err) {
    uint64_t last;
    if (step == 0 || count == 0 || !ck_mul(count - 1, step, &last) || !ck_add(last, first, &last) || last >= t->n_row)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%llu rows from %llu in steps of %llu leave tensor %s, which has %llu",
                         (unsigned long long)count, (unsigned long long)first, (unsigned long long)step, t->name,
                         (unsigned long long)t->n_row);
    mf_tensor v = *t;
    v.n_row = count;
    v.view.row_first += first * t->view.row_step;
    v.view.row_step *= step;
    bool contiguous = count == t->n_row || (v.n_mat == 1 && (step == 1 || count == 1));
    v.data = v.data && contiguous ? v.data + first * v.view.row_bytes : NULL;
    *out = v;
    return ORCD_OK;
}

orcd_status mf_transpose(const mf_tensor *t, mf_tensor *out, orcd_error *err) {
    const q_traits *q = q_find(t->type);
    uint64_t stored = t->view.transposed ? t->view.stored_rows * t->n_col : t->n_row * t->n_col;
    if (q->block_len != 1)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "tensor %s cannot be transposed: %s values come in blocks of %u",
                         t->name, q->name, q->block_len);
    if (t->view.row_first != 0 || t->view.row_step != 1 || stored * q->block_bytes != t->view.mat_bytes ||
        (t->view.transposed && t->view.stored_rows != t->n_row))
        return orcd_fail(err, ORCD_ERR_ARG, "tensor %s was sliced before it was transposed", t->name);
    mf_tensor v = *t;
    v.n_col = t->n_row;
    v.n_row = t->n_col;
    v.view.transposed = !t->view.transposed;
    v.view.stored_rows = v.view.transposed ? v.n_row : 0;
    v.view.row_bytes = v.view.transposed ? 0 : mf_row_bytes(&v);
    v.data = v.view.transposed ? NULL : v.view.base;
    *out = v;
    return ORCD_OK;
}

/* ---- reading rows ---- */

size_t mf_row_bytes(const mf_tensor *t) { return q_row_bytes(q_find(t->type), t->n_col); }

/* Sixteen bytes of value pairs (2b, 2b + 1) to canonical order: byte j has value j low, value j + 16 high.
 * Values 0..15 are bytes 0..7, values 16..31 bytes 8..15: byte i of either half makes bytes 2i and 2i + 1. */
static void mx_block(uint8_t *dst, const uint8_t *codes, uint8_t scale) {
    const __m128i low_mask = _mm_set1_epi8(0x0f), high_mask = _mm_set1_epi8((char)0xf0);
    __m128i a = _mm_loadl_epi64((const __m128i *)(const void *)codes);
    __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)(codes + 8));
    __m128i even = _mm_or_si128(_mm_and_si128(a, low_mask), _mm_slli_epi16(_mm_and_si128(b, low_mask), 4));
    __m128i odd = _mm_or_si128(_mm_srli_epi16(_mm_and_si128(a, high_mask), 4), _mm_and_si128(b, high_mask));
    dst[0] = scale;
    _mm_storeu_si128((__m128i *)(void *)(dst + 1), _mm_unpacklo_epi8(even, odd));
}

static void mx_row(const mf_tensor *t, uint64_t mat, uint64_t stored_row, uint8_t *dst) {
    const struct mf_view *v = &t->view;
    const uint8_t *codes = v->base + mat * v->mat_bytes + stored_row * v->row_bytes;
    const uint8_t *scale = v->scales + mat * v->scale_mat_bytes + stored_row * v->scale_row_bytes;
    for (uint64_t i = 0; i < t->n_col / MX_LEN; i++)
        mx_block(dst + i * MX_BYTES, codes + i * v->block_step, scale[i * v->scale_step]);
}

/* In tiles, so that the stored lines that a tile reads stay in the first cache and its pages in the TLB. */
static void rows_transposed(const mf_tensor *t, uint64_t mat, uint64_t row0, uint64_t n, uint8_t *dst) {
    enum { TILE_ROWS = 32, TILE_COLS = 16 };
    const struct mf_view *v = &t->view;
    size_t size = q_find(t->type)->block_bytes, line = v->stored_rows * size;
    const uint8_t *src = v->base + mat * v->mat_bytes + (v->row_first + row0 * v->row_step) * size;
    for (uint64_t r0 = 0; r0 < n; r0 += TILE_ROWS)
        for (uint64_t c0 = 0; c0 < t->n_col; c0 += TILE_COLS)
            for (uint64_t r = r0; r < r0 + TILE_ROWS && r < n; r++) {
                uint8_t *to = dst + (r * t->n_col + c0) * size;
                const uint8_t *from = src + r * v->row_step * size + c0 * line;
                for (uint64_t c = c0; c < c0 + TILE_COLS && c < t->n_col; c++, to += size, from += line) {
                    if (size == 2)
                        memcpy(to, from, 2);
                    else
                        memcpy(to, from, 4);
                }
            }
}

void mf_rows(const mf_tensor *t, uint64_t mat, uint64_t row0, uint64_t n, void *dst) {
    assert(mat < t->n_mat && row0 <= t->n_row && n <= t->n_row - row0);
    const struct mf_view *v = &t->view;
    size_t bytes = mf_row_bytes(t);
    uint8_t *to = dst;
    if (v->transposed) {
        rows_transposed(t, mat, row0, n, to);
    } else if (v->scales) {
        for (uint64_t r = row0; r < row0 + n; r++, to += bytes)
            mx_row(t, mat, v->row_first + r * v->row_step, to);
    } else if (v->row_step == 1) {
        memcpy(to, v->base + mat * v->mat_bytes + (v->row_first + row0) * v->row_bytes, n * bytes);
    } else {
        for (uint64_t r = row0; r < row0 + n; r++, to += bytes)
            memcpy(to, v->base + mat * v->mat_bytes + (v->row_first + r * v->row_step) * v->row_bytes, bytes);
    }
}

/* Advice about the pages that lie inside, or (inner false) that touch, n bytes. Failure changes nothing. */
static void advise(const uint8_t *p, uint64_t n, bool inner, int advice) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), more = page - 1;
    uintptr_t begin = ((uintptr_t)p + (inner ? more : 0)) & ~more,
              end = ((uintptr_t)p + n + (inner ? 0 : more)) & ~more;
    if (begin < end)
        (void)madvise((void *)begin, end - begin, advice);
}

void mf_expect(const mf_tensor *t, uint64_t mat, uint64_t row0, uint64_t n) {
#ifdef MADV_POPULATE_READ
    const struct mf_view *v = &t->view;
    if (!v->transposed && v->row_step == 1) /* one call instead of a fault for every 64 KiB */
        advise(v->base + mat * v->mat_bytes + (v->row_first + row0) * v->row_bytes, n * v->row_bytes, false,
               MADV_POPULATE_READ);
#endif
}

/* The file and a copy of it may not both fit: what was read would push out of the cache what is still to be read. */
static bool memory_is_short(void) { return sysconf(_SC_AVPHYS_PAGES) < sysconf(_SC_PHYS_PAGES) / 2; }

void mf_release(const mf_tensor *t) {
    for (int drop = !memory_is_short(); drop < 2; drop++) {
        int advice = drop ? MADV_DONTNEED : MADV_PAGEOUT;
        advise(t->view.base, t->n_mat * t->view.mat_bytes, true, advice);
        if (t->view.scales)
            advise(t->view.scales, t->n_mat * t->view.scale_mat_bytes, true, advice);
    }
}

/* Block by block, so that no memory is needed whatever the row's length. */
void mf_floats(const mf_tensor *t, float *dst) {
    const q_traits *q = q_find(t->type);
    const struct mf_view *v = &t->view;
    if (t->data) {
        q->unpack(t->data, dst, t->n_mat * t->n_row * t->n_col);
        return;
    }
    for (uint64_t m = 0; m < t->n_mat; m++)
        for (uint64_t r = 0; r < t->n_row; r++, dst += t->n_col) {
            uint64_t stored = v->row_first + r * v->row_step;
            const uint8_t *mat = v->base + m * v->mat_bytes;
            if (v->transposed) {
                for (uint64_t c = 0; c < t->n_col; c++)
                    q->unpack(mat + (c * v->stored_rows + stored) * q->block_bytes, dst + c, 1);
            } else if (v->scales) {
                const uint8_t *scale = v->scales + m * v->scale_mat_bytes + stored * v->scale_row_bytes;
                for (uint64_t i = 0; i < t->n_col / MX_LEN; i++) {
                    uint8_t block[MX_BYTES];
                    mx_block(block, mat + stored * v->row_bytes + i * v->block_step, scale[i * v->scale_step]);
                    q->unpack(block, dst + i * MX_LEN, MX_LEN);
                }
            } else {
                q->unpack(mat + stored * v->row_bytes, dst, t->n_col);
            }
        }
}
