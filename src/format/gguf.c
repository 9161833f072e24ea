/* format/gguf.c: the reader. One pass over the header; the tables point into the map. */
#include "format/gguf.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/checked.h"
#include "base/part_name.h"

enum {
    ALIGN_DEFAULT = 32,
    ALIGN_MIN = 8,
    ALIGN_MAX = 4096,
    KEY_MAX = 64 << 10,
    STRING_MAX = 1 << 20,
    NAME_MAX_BYTES = 64, /* the specification's limit on tensor names */
    N_KV_MAX = 1 << 24,
    N_TENSORS_MAX = 1 << 20,
    MIN_KV_BYTES = 8 + 1 + 4 + 1,             /* key of one letter, type, one byte */
    MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8, /* name of one letter, one dimension, type, offset */
    TYPE_OLLAMA_MXFP4 = 4,
};

/* Names to record numbers, open addressing. The hash is keyed with random bytes: a file cannot choose collisions.
 * Every record begins with its name (gguf_str). */
typedef struct name_index {
    uint32_t *slot; /* record number + 1; 0 is free */
    uint64_t mask;
    const char *records;
    size_t stride;
    unsigned char key[crypto_shorthash_KEYBYTES];
} name_index;

struct gguf {
    file_map map; /* zero when the caller owns the bytes */
    const uint8_t *data;
    uint64_t size;
    uint32_t version;
    uint64_t alignment;
    uint64_t n_kv, n_tensors;
    gguf_kv *kv;
    gguf_tensor *tensor; /* of all parts */
    name_index kv_index, tensor_index;
    gguf **part; /* the parts after this one, which keep their maps and keys; their tensors are here */
    uint64_t n_part;
};

/* ---- names ---- */

static orcd_status index_init(name_index *ix, uint64_t n, const void *records, size_t stride, orcd_error *err) {
    uint64_t n_slots = 16;
    while (n_slots < 2 * n)
        n_slots *= 2;
    ix->slot = calloc(n_slots, sizeof *ix->slot);
    if (!ix->slot)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for an index of %llu names", (unsigned long long)n);
    ix->mask = n_slots - 1;
    ix->records = records;
    ix->stride = stride;
    if (getrandom(ix->key, sizeof ix->key, GRND_NONBLOCK) < 0)
        memset(ix->key, 0, sizeof ix->key); /* still correct, only predictable */
    return ORCD_OK;
}

/* The slot that holds this name, or the free one where it belongs. */
static uint32_t *index_slot(const name_index *ix, const char *name, size_t len) {
    uint64_t h;
    _Static_assert(sizeof h == crypto_shorthash_BYTES, "the hash is 64 bits");
    crypto_shorthash((unsigned char *)&h, (const unsigned char *)name, len, ix->key);
    for (uint64_t i = h & ix->mask;; i = (i + 1) & ix->mask) {
        uint32_t *s = &ix->slot[i];
        if (*s == 0)
            return s;
        const gguf_str *other = (const gguf_str *)(const void *)(ix->records + (*s - 1) * ix->stride);
        if (other->len == len && memcmp(other->data, name, len) == 0)
            return s;
    }
}

/* ---- cursor ---- */

typedef struct reader {
    const uint8_t *data;
    uint64_t size, pos;
    orcd_error *err;
} reader;

static uint64_t left(const reader *r) { return r->size - r->pos; }

static uint32_t get_u32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t get_u64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static orcd_status need(reader *r, uint64_t n, const char *what) {
    if (left(r) >= n)
        return ORCD_OK;
    return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos,
                        "the file ends inside %s: %llu bytes needed, %llu left; the download may be incomplete", what,
                        (unsigned long long)n, (unsigned long long)left(r));
}

static orcd_status read_u32(reader *r, const char *what, uint32_t *out) {
    ORCD_TRY(need(r, 4, what));
    *out = get_u32(r->data + r->pos);
    r->pos += 4;
    return ORCD_OK;
}

static orcd_status read_u64(reader *r, const char *what, uint64_t *out) {
    ORCD_TRY(need(r, 8, what));
    *out = get_u64(r->data + r->pos);
    r->pos += 8;
    return ORCD_OK;
}

static orcd_status read_str(reader *r, const char *what, uint64_t limit, gguf_str *out) {
    uint64_t len, pos = r->pos;
    ORCD_TRY(read_u64(r, what, &len));
    if (len > limit)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos, "%s has %llu bytes, more than the limit of %llu", what,
                            (unsigned long long)len, (unsigned long long)limit);
    ORCD_TRY(need(r, len, what));
    *out = (gguf_str){(const char *)r->data + r->pos, len};
    r->pos += len;
    return ORCD_OK;
}

/* A name that may be printed, searched as a C string and compared. */
static orcd_status read_name(reader *r, const char *what, uint64_t limit, gguf_str *out) {
    uint64_t pos = r->pos;
    ORCD_TRY(read_str(r, what, limit, out));
    if (out->len == 0)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos, "%s is empty", what);
    if (memchr(out->data, 0, out->len))
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos, "%s contains a NUL byte", what);
    return ORCD_OK;
}

/* A name for an error message: at most 64 bytes, nothing that a terminal would act on. */
typedef struct shown {
    char text[68];
} shown;

static shown show(gguf_str s) {
    shown out;
    size_t n = s.len < 64 ? s.len : 64;
    for (size_t i = 0; i < n; i++)
        out.text[i] = s.data[i] >= 32 && s.data[i] < 127 ? s.data[i] : '?';
    memcpy(out.text + n, s.len > 64 ? "..." : "", s.len > 64 ? 4 : 1);
    return out;
}

/* ---- keys and values ---- */

/* Bytes of one value; 0 for strings and arrays. */
static uint32_t value_bytes(gguf_type t) {
    static const uint8_t bytes[GGUF_N_TYPES] = {
        [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_U16] = 2,  [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4,
        [GGUF_F32] = 4, [GGUF_U64] = 8, [GGUF_BOOL] = 1, [GGUF_I64] = 8, [GGUF_F64] = 8,
    };
    return bytes[t];
}

static orcd_status read_type(reader *r, const gguf_kv *kv, gguf_type *out) {
    uint64_t pos = r->pos;
    uint32_t type;
    ORCD_TRY(read_u32(r, "a value type", &type));
    if (type >= GGUF_N_TYPES)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos, "key %s has value type %u; 0 to %d are known",
                            show(kv->key).text, type, GGUF_N_TYPES - 1);
    *out = (gguf_type)type;
    return ORCD_OK;
}

/* n values of one type lie at the cursor: check them and move past. */
static orcd_status skip_values(reader *r, gguf_type type, uint64_t n) {
    if (type == GGUF_STRING) {
        gguf_str s;
        for (uint64_t i = 0; i < n; i++)
            ORCD_TRY(read_str(r, "a string value", STRING_MAX, &s));
        return ORCD_OK;
    }
    uint64_t bytes;
    if (!ck_mul(n, value_bytes(type), &bytes))
        bytes = UINT64_MAX;
    ORCD_TRY(need(r, bytes, "a value"));
    for (uint64_t i = 0; type == GGUF_BOOL && i < n; i++)
        if (r->data[r->pos + i] > 1)
            return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos + i, "a boolean value is %u instead of 0 or 1",
                                r->data[r->pos + i]);
    r->pos += bytes;
    return ORCD_OK;
}

static orcd_status read_kv(reader *r, gguf_kv *kv) {
    ORCD_TRY(read_name(r, "a key", KEY_MAX, &kv->key));
    ORCD_TRY(read_type(r, kv, &kv->type));
    kv->elem = kv->type;
    kv->n = 1;
    if (kv->type == GGUF_ARRAY) {
        uint64_t pos = r->pos;
        ORCD_TRY(read_type(r, kv, &kv->elem));
        if (kv->elem == GGUF_ARRAY)
            return orcd_fail_at(r->err, ORCD_ERR_UNSUPPORTED, pos, "key %s is an array of arrays, which no model needs",
                                show(kv->key).text);
        pos = r->pos;
        ORCD_TRY(read_u64(r, "an array length", &kv->n));
        if (kv->n > left(r) / (kv->elem == GGUF_STRING ? 8 : value_bytes(kv->elem)))
            return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos,
                                "key %s claims an array of %llu elements, but only %llu bytes of file are left",
                                show(kv->key).text, (unsigned long long)kv->n, (unsigned long long)left(r));
    }
    kv->pos = r->pos;
    kv->data = r->data + r->pos;
    return skip_values(r, kv->elem, kv->n);
}

static orcd_status read_kvs(reader *r, gguf *g) {
    g->kv = calloc(g->n_kv ? g->n_kv : 1, sizeof *g->kv);
    if (!g->kv)
        return orcd_fail(r->err, ORCD_ERR_NOMEM, "no memory for %llu keys", (unsigned long long)g->n_kv);
    ORCD_TRY(index_init(&g->kv_index, g->n_kv, g->kv, sizeof *g->kv, r->err));
    for (uint64_t i = 0; i < g->n_kv; i++) {
        uint64_t pos = r->pos;
        gguf_kv *kv = &g->kv[i];
        ORCD_TRY(read_kv(r, kv));
        uint32_t *slot = index_slot(&g->kv_index, kv->key.data, kv->key.len);
        if (*slot)
            return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos, "key %s appears twice", show(kv->key).text);
        *slot = (uint32_t)(i + 1);
    }
    return ORCD_OK;
}

static orcd_status read_alignment(const reader *r, gguf *g) {
    const gguf_kv *kv = gguf_find(g, "general.alignment");
    g->alignment = ALIGN_DEFAULT;
    if (!kv)
        return ORCD_OK;
    if (kv->type != GGUF_U32)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, kv->pos, "general.alignment has value type %d instead of uint32",
                            kv->type);
    g->alignment = get_u32(kv->data);
    if (g->alignment < ALIGN_MIN || g->alignment > ALIGN_MAX || (g->alignment & (g->alignment - 1)) != 0)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, kv->pos,
                            "general.alignment is %llu; a power of two from %d to %d is allowed",
                            (unsigned long long)g->alignment, ALIGN_MIN, ALIGN_MAX);
    return ORCD_OK;
}

/* ---- tensors ---- */

static orcd_status read_shape(reader *r, gguf_tensor *t) {
    ORCD_TRY(read_u32(r, "a tensor's dimension count", &t->n_dims));
    if (t->n_dims < 1 || t->n_dims > GGUF_MAX_DIMS)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos - 4, "tensor %s has %u dimensions; 1 to %d are allowed",
                            show(t->name).text, t->n_dims, GGUF_MAX_DIMS);
    for (uint32_t i = 0; i < GGUF_MAX_DIMS; i++)
        t->ne[i] = 1;
    for (uint32_t i = 0; i < t->n_dims; i++) {
        ORCD_TRY(read_u64(r, "a tensor's dimensions", &t->ne[i]));
        if (t->ne[i] == 0)
            return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos - 8, "dimension %u of tensor %s is 0", i,
                                show(t->name).text);
    }
    return ORCD_OK;
}

static orcd_status read_weight_type(reader *r, gguf_tensor *t, const q_traits **traits) {
    uint32_t type;
    ORCD_TRY(read_u32(r, "a tensor's type", &type));
    t->paired = type == TYPE_OLLAMA_MXFP4;
    *traits = q_find(t->paired ? Q_MXFP4 : type);
    if (!*traits)
        return orcd_fail_at(r->err, ORCD_ERR_UNSUPPORTED, r->pos - 4,
                            "tensor %s has weight type %u, which orcd does not know", show(t->name).text, type);
    t->type = (*traits)->type;
    return ORCD_OK;
}

/* Reads one record; t->data is set later, when the start of the data is known. */
static orcd_status read_tensor(reader *r, uint64_t alignment, gguf_tensor *t, uint64_t *offset) {
    const q_traits *traits;
    t->pos = r->pos;
    ORCD_TRY(read_name(r, "a tensor's name", NAME_MAX_BYTES, &t->name));
    ORCD_TRY(read_shape(r, t));
    ORCD_TRY(read_weight_type(r, t, &traits));
    if (t->ne[0] % traits->block_len != 0)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, t->pos,
                            "rows of tensor %s have %llu values, not a multiple of %s's %u", show(t->name).text,
                            (unsigned long long)t->ne[0], traits->name, traits->block_len);
    bool fits = ck_mul(t->ne[0] / traits->block_len, traits->block_bytes, &t->bytes);
    uint64_t n_values = t->ne[0];
    for (int i = 1; i < GGUF_MAX_DIMS; i++)
        fits = fits && ck_mul(t->bytes, t->ne[i], &t->bytes) && ck_mul(n_values, t->ne[i], &n_values);
    if (!fits)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, t->pos, "the size of tensor %s does not fit 64 bits",
                            show(t->name).text);
    ORCD_TRY(read_u64(r, "a tensor's offset", offset));
    if (*offset % alignment != 0)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos - 8,
                            "tensor %s begins at data offset %llu, not a multiple of the alignment %llu",
                            show(t->name).text, (unsigned long long)*offset, (unsigned long long)alignment);
    return ORCD_OK;
}

static int by_address(const void *a, const void *b) {
    const gguf_tensor *x = *(const gguf_tensor *const *)a, *y = *(const gguf_tensor *const *)b;
    return x->data < y->data ? -1 : x->data > y->data;
}

/* Two tensors over the same bytes: one would be read as the other's values. */
static orcd_status check_disjoint(const gguf *g, orcd_error *err) {
    orcd_status s = ORCD_OK;
    const gguf_tensor **order = malloc((g->n_tensors ? g->n_tensors : 1) * sizeof *order);
    if (!order)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to check %llu tensors", (unsigned long long)g->n_tensors);
    for (uint64_t i = 0; i < g->n_tensors; i++)
        order[i] = &g->tensor[i];
    qsort(order, g->n_tensors, sizeof *order, by_address);
    for (uint64_t i = 1; i < g->n_tensors && s == ORCD_OK; i++) {
        const gguf_tensor *a = order[i - 1], *b = order[i];
        if ((uint64_t)(b->data - a->data) < a->bytes)
            s = orcd_fail_at(err, ORCD_ERR_FORMAT, b->pos, "tensors %s and %s overlap in the file", show(a->name).text,
                             show(b->name).text);
    }
    free(order);
    return s;
}

static orcd_status place_tensors(const reader *r, gguf *g, const uint64_t *offset) {
    uint64_t start, pos, end;
    if (!ck_align(r->pos, g->alignment, &start))
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, r->pos, "the header's end does not fit 64 bits");
    for (uint64_t i = 0; i < g->n_tensors; i++) {
        gguf_tensor *t = &g->tensor[i];
        if (!ck_add(start, offset[i], &pos) || !ck_add(pos, t->bytes, &end) || end > g->size)
            return orcd_fail_at(
                r->err, ORCD_ERR_FORMAT, t->pos,
                "tensor %s (%llu bytes at data offset %llu) reaches past the end of the file (%llu bytes); "
                "the download may be incomplete",
                show(t->name).text, (unsigned long long)t->bytes, (unsigned long long)offset[i],
                (unsigned long long)g->size);
        t->data = g->data + pos;
    }
    return check_disjoint(g, r->err);
}

static orcd_status read_tensors(reader *r, gguf *g) {
    orcd_status s;
    uint64_t n = g->n_tensors ? g->n_tensors : 1;
    uint64_t *offset = calloc(n, sizeof *offset);
    g->tensor = calloc(n, sizeof *g->tensor);
    if (!g->tensor || !offset) {
        s = orcd_fail(r->err, ORCD_ERR_NOMEM, "no memory for %llu tensors", (unsigned long long)g->n_tensors);
        goto done;
    }
    ORCD_TRY_GOTO(s, done, index_init(&g->tensor_index, g->n_tensors, g->tensor, sizeof *g->tensor, r->err));
    for (uint64_t i = 0; i < g->n_tensors; i++) {
        gguf_tensor *t = &g->tensor[i];
        ORCD_TRY_GOTO(s, done, read_tensor(r, g->alignment, t, &offset[i]));
        uint32_t *slot = index_slot(&g->tensor_index, t->name.data, t->name.len);
        if (*slot) {
            s = orcd_fail_at(r->err, ORCD_ERR_FORMAT, t->pos, "tensor %s appears twice", show(t->name).text);
            goto done;
        }
        *slot = (uint32_t)(i + 1);
    }
    s = place_tensors(r, g, offset);
done:
    free(offset);
    return s;
}

/* ---- the file ---- */

static orcd_status read_count(reader *r, const char *what, uint64_t min_bytes, uint64_t limit, uint64_t *out) {
    uint64_t pos = r->pos;
    ORCD_TRY(read_u64(r, what, out));
    if (*out > left(r) / min_bytes || *out > limit)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, pos,
                            "%s is %llu, which cannot be: %llu bytes of file are left, and the limit is %llu", what,
                            (unsigned long long)*out, (unsigned long long)left(r), (unsigned long long)limit);
    return ORCD_OK;
}

static orcd_status read_header(reader *r, gguf *g) {
    if (left(r) < 4 || memcmp(r->data, "GGUF", 4) != 0)
        return orcd_fail_at(r->err, ORCD_ERR_FORMAT, 0, "this is not a GGUF file: it does not begin with \"GGUF\"");
    r->pos = 4;
    ORCD_TRY(read_u32(r, "the version", &g->version));
    if (g->version == 0x02000000u || g->version == 0x03000000u)
        return orcd_fail_at(r->err, ORCD_ERR_UNSUPPORTED, 4,
                            "this GGUF file is big-endian; only little-endian is read");
    if (g->version != 2 && g->version != 3)
        return orcd_fail_at(r->err, ORCD_ERR_UNSUPPORTED, 4, "GGUF version %u is not supported; 2 and 3 are",
                            g->version);
    ORCD_TRY(read_count(r, "the number of tensors", MIN_TENSOR_BYTES, N_TENSORS_MAX, &g->n_tensors));
    ORCD_TRY(read_count(r, "the number of keys", MIN_KV_BYTES, N_KV_MAX, &g->n_kv));
    ORCD_TRY(read_kvs(r, g));
    ORCD_TRY(read_alignment(r, g));
    return read_tensors(r, g);
}

orcd_status gguf_parse(const uint8_t *data, size_t size, gguf **out, orcd_error *err) {
    *out = NULL;
    gguf *g = calloc(1, sizeof *g);
    if (!g)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to read a GGUF file");
    g->data = data;
    g->size = size;
    reader r = {.data = data, .size = size, .err = err};
    orcd_status s = read_header(&r, g);
    if (s != ORCD_OK)
        gguf_close(g);
    else
        *out = g;
    return s;
}

static orcd_status open_file(const char *path, gguf **out, orcd_error *err) {
    file_map map;
    orcd_error inner = {0};
    *out = NULL;
    ORCD_TRY(file_open(path, &map, err));
    orcd_status s = gguf_parse(map.data, map.size, out, &inner);
    if (s != ORCD_OK) {
        file_close(&map);
        return orcd_fail_at(err, s, inner.pos, "%s: %s", path, inner.message);
    }
    (*out)->map = map;
    return ORCD_OK;
}

/* ---- a model in several files ---- */

static uint64_t split_key(const gguf *g, const char *key) {
    uint64_t v = 0;
    (void)gguf_u64(g, key, &v);
    return v;
}

static orcd_status open_part(const char *path, const part_name *name, unsigned no, gguf **out, orcd_error *err) {
    *out = NULL;
    if (!file_exists(path))
        return orcd_fail(err, ORCD_ERR_IO, "%s is missing: the model has %u parts, and all must lie in one folder",
                         path, name->count);
    ORCD_TRY(open_file(path, out, err));
    if (split_key(*out, "split.no") == no - 1 && split_key(*out, "split.count") == name->count)
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_FORMAT, "%s says that it is part %llu of %llu; its name says otherwise", path,
                     (unsigned long long)split_key(*out, "split.no") + 1,
                     (unsigned long long)split_key(*out, "split.count"));
}

/* The tensors of all parts in one table. */
static orcd_status join_tensors(gguf *g, const char *path, orcd_error *err) {
    uint64_t n = g->n_tensors, at = n, said = 0;
    for (uint64_t i = 0; i < g->n_part; i++)
        n += g->part[i]->n_tensors;
    if (gguf_u64(g, "split.tensors.count", &said) && said != n)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s says that all parts hold %llu tensors, but they hold %llu", path,
                         (unsigned long long)said, (unsigned long long)n);
    gguf_tensor *all = realloc(g->tensor, (n ? n : 1) * sizeof *all);
    if (!all)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for %llu tensors", (unsigned long long)n);
    g->tensor = all;
    free(g->tensor_index.slot);
    g->tensor_index.slot = NULL;
    for (uint64_t i = 0; i < g->n_part; at += g->part[i++]->n_tensors)
        memcpy(all + at, g->part[i]->tensor, g->part[i]->n_tensors * sizeof *all);
    ORCD_TRY(index_init(&g->tensor_index, n, all, sizeof *all, err));
    for (g->n_tensors = 0; g->n_tensors < n; g->n_tensors++) {
        gguf_str name = all[g->n_tensors].name;
        uint32_t *slot = index_slot(&g->tensor_index, name.data, name.len);
        if (*slot)
            return orcd_fail(err, ORCD_ERR_FORMAT, "two parts of %s hold a tensor %s", path, show(name).text);
        *slot = (uint32_t)(g->n_tensors + 1);
    }
    return ORCD_OK;
}

/* PATH is the first part and name its name: opens the others. */
static orcd_status add_parts(gguf *g, char *path, const part_name *name, orcd_error *err) {
    if (!(g->part = calloc(name->count, sizeof *g->part)))
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for %u parts", name->count);
    for (unsigned no = 2; no <= name->count; no++) {
        part_name_set(path, name, no);
        orcd_status s = open_part(path, name, no, &g->part[g->n_part], err);
        g->n_part += g->part[g->n_part] != NULL;
        if (s != ORCD_OK)
            return s;
    }
    part_name_set(path, name, 1);
    return join_tensors(g, path, err);
}

static orcd_status open_all(const char *path, uint64_t count, gguf **out, orcd_error *err) {
    part_name name;
    if (!part_name_read(path, &name) || name.count != count)
        return orcd_fail(
            err, ORCD_ERR_FORMAT,
            "%s is one of %llu parts, but its name does not end in -00001-of-%05llu.gguf or the like: give "
            "the parts the names that they were published with",
            path, (unsigned long long)count, (unsigned long long)count);
    char *first = strdup(path);
    if (!first)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a file name");
    part_name_set(first, &name, 1);
    orcd_status s = open_part(first, &name, 1, out, err);
    if (s == ORCD_OK)
        s = add_parts(*out, first, &name, err);
    free(first);
    return s;
}

orcd_status gguf_open(const char *path, gguf **out, orcd_error *err) {
    ORCD_TRY(open_file(path, out, err));
    uint64_t count = split_key(*out, "split.count");
    if (count <= 1)
        return ORCD_OK;
    gguf_close(*out);
    *out = NULL;
    orcd_status s = open_all(path, count, out, err);
    if (s != ORCD_OK) {
        gguf_close(*out);
        *out = NULL;
    }
    return s;
}

void gguf_close(gguf *g) {
    if (!g)
        return;
    for (uint64_t i = 0; i < g->n_part; i++)
        gguf_close(g->part[i]);
    free(g->part);
    free(g->kv);
    free(g->tensor);
    free(g->kv_index.slot);
    free(g->tensor_index.slot);
    file_close(&g->map);
    free(g);
}

uint64_t gguf_bytes(const gguf *g) {
    uint64_t sum = g->size;
    for (uint64_t i = 0; i < g->n_part; i++)
        sum += g->part[i]->size;
    return sum;
}

bool gguf_changed(const gguf *g) {
    bool changed = file_changed(&g->map);
    for (uint64_t i = 0; i < g->n_part; i++)
        changed |= file_changed(&g->part[i]->map);
    return changed;
}

uint32_t gguf_version(const gguf *g) { return g->version; }
uint64_t gguf_alignment(const gguf *g) { return g->alignment; }
uint64_t gguf_n_kv(const gguf *g) { return g->n_kv; }
const gguf_kv *gguf_kv_at(const gguf *g, uint64_t i) { return i < g->n_kv ? &g->kv[i] : NULL; }
uint64_t gguf_n_tensors(const gguf *g) { return g->n_tensors; }
const gguf_tensor *gguf_tensor_at(const gguf *g, uint64_t i) { return i < g->n_tensors ? &g->tensor[i] : NULL; }

const gguf_kv *gguf_find(const gguf *g, const char *key) {
    uint32_t i = *index_slot(&g->kv_index, key, strlen(key));
    return i ? &g->kv[i - 1] : NULL;
}

const gguf_tensor *gguf_find_tensor(const gguf *g, const char *name) {
    uint32_t i = *index_slot(&g->tensor_index, name, strlen(name));
    return i ? &g->tensor[i - 1] : NULL;
}

/* ---- typed access ---- */

/* An integer of any width as sign and magnitude bits: negative values only in *i. */
static bool get_integer(const gguf_kv *kv, bool *negative, uint64_t *bits) {
    int64_t i = 0;
    uint64_t u = 0;
    switch (kv->type) {
    case GGUF_U8:
        u = kv->data[0];
        break;
    case GGUF_U16:
        u = (uint64_t)kv->data[0] | (uint64_t)kv->data[1] << 8;
        break;
    case GGUF_U32:
        u = get_u32(kv->data);
        break;
    case GGUF_U64:
        u = get_u64(kv->data);
        break;
    case GGUF_I8:
        i = (int8_t)kv->data[0];
        break;
    case GGUF_I16:
        i = (int16_t)(kv->data[0] | kv->data[1] << 8);
        break;
    case GGUF_I32:
        i = (int32_t)get_u32(kv->data);
        break;
    case GGUF_I64:
        i = (int64_t)get_u64(kv->data);
        break;
    default:
        return false;
    }
    *negative = i < 0;
    *bits = u | (uint64_t)i; /* one of the two is 0 */
    return true;
}

bool gguf_u64(const gguf *g, const char *key, uint64_t *out) {
    const gguf_kv *kv = gguf_find(g, key);
    bool negative;
    uint64_t bits;
    if (!kv || !get_integer(kv, &negative, &bits) || negative)
        return false;
    *out = bits;
    return true;
}

bool gguf_i64(const gguf *g, const char *key, int64_t *out) {
    const gguf_kv *kv = gguf_find(g, key);
    bool negative;
    uint64_t bits;
    if (!kv || !get_integer(kv, &negative, &bits) || (!negative && bits > INT64_MAX))
        return false;
    *out = (int64_t)bits;
    return true;
}

bool gguf_f64(const gguf *g, const char *key, double *out) {
    const gguf_kv *kv = gguf_find(g, key);
    bool negative;
    uint64_t bits;
    if (!kv)
        return false;
    if (kv->type == GGUF_F32) {
        float f;
        memcpy(&f, kv->data, sizeof f);
        *out = (double)f;
    } else if (kv->type == GGUF_F64) {
        memcpy(out, kv->data, sizeof *out);
    } else if (get_integer(kv, &negative, &bits)) {
        *out = negative ? (double)(int64_t)bits : (double)bits;
    } else {
        return false;
    }
    return true;
}

bool gguf_bool(const gguf *g, const char *key, bool *out) {
    const gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->type != GGUF_BOOL)
        return false;
    *out = kv->data[0] != 0;
    return true;
}

bool gguf_string(const gguf *g, const char *key, gguf_str *out) {
    const gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->type != GGUF_STRING)
        return false;
    const uint8_t *cursor = kv->data;
    *out = gguf_next_str(&cursor);
    return true;
}

bool gguf_array(const gguf *g, const char *key, gguf_type elem, const gguf_kv **out) {
    const gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->type != GGUF_ARRAY || kv->elem != elem)
        return false;
    *out = kv;
    return true;
}

gguf_str gguf_next_str(const uint8_t **cursor) {
    gguf_str s = {.len = get_u64(*cursor), .data = (const char *)*cursor + 8};
    *cursor += 8 + s.len;
    return s;
}

size_t gguf_kv_bytes(const gguf_kv *kv) {
    if (kv->elem != GGUF_STRING)
        return kv->n * value_bytes(kv->elem);
    const uint8_t *cursor = kv->data;
    for (uint64_t i = 0; i < kv->n; i++)
        (void)gguf_next_str(&cursor);
    return (size_t)(cursor - kv->data);
}
