/* format/safetensors.c: one file is 8 bytes of header length, a JSON header, then the tensors' bytes without gaps. */
#include "format/safetensors.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/buf.h"
#include "base/checked.h"

#define HEADER_MAX 100000000u /* the reference implementation's limit */
#define INDEX_MAX (64u << 20)
#define SHARDS_MAX 4096

typedef struct shard {
    char *name; /* basename, of a sharded model; else NULL */
    file_map map;
} shard;

struct st_model {
    shard *shard;
    size_t n_shards;
    st_tensor *tensor; /* sorted by name */
    uint64_t n, cap;
    uint64_t bytes;
};

static const struct {
    const char *name;
    unsigned bytes;
} dtype[] = {
    [ST_BOOL] = {"BOOL", 1}, [ST_U8] = {"U8", 1},           [ST_I8] = {"I8", 1},           [ST_U16] = {"U16", 2},
    [ST_I16] = {"I16", 2},   [ST_U32] = {"U32", 4},         [ST_I32] = {"I32", 4},         [ST_U64] = {"U64", 8},
    [ST_I64] = {"I64", 8},   [ST_F16] = {"F16", 2},         [ST_BF16] = {"BF16", 2},       [ST_F32] = {"F32", 4},
    [ST_F64] = {"F64", 8},   [ST_F8_E4M3] = {"F8_E4M3", 1}, [ST_F8_E5M2] = {"F8_E5M2", 1},
};

const char *st_type_name(st_type t) { return (size_t)t < ORCD_COUNT(dtype) ? dtype[t].name : "?"; }

/* Text from a file inside a message: nothing that a terminal would act on. */
static orcd_status refuse(orcd_error *err, orcd_status code, uint64_t pos, const char *fmt, ...) ORCD_PRINTF(4, 5);
static orcd_status refuse(orcd_error *err, orcd_status code, uint64_t pos, const char *fmt, ...) {
    char text[400];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    for (char *p = text; *p; p++)
        if ((unsigned char)*p < 32 || (unsigned char)*p > 126)
            *p = '?';
    return orcd_fail_at(err, code, pos, "%s", text);
}

/* ---- the header of one file ---- */

static orcd_status read_dtype(const char *name, const json_t *v, uint64_t pos, st_type *out, orcd_error *err) {
    const char *text = json_string_value(v);
    if (!text)
        return refuse(err, ORCD_ERR_FORMAT, pos, "tensor %.80s has no dtype", name);
    for (size_t i = 0; i < ORCD_COUNT(dtype); i++)
        if (strcmp(dtype[i].name, text) == 0) {
            *out = (st_type)i;
            return ORCD_OK;
        }
    return refuse(err, ORCD_ERR_UNSUPPORTED, pos, "tensor %.80s has dtype %.20s, which orcd does not read", name, text);
}

static bool read_count(const json_t *v, uint64_t *out) {
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return false;
    *out = (uint64_t)json_integer_value(v);
    return true;
}

/* Shape, and the bytes that it asks for. */
static orcd_status read_shape(const json_t *v, uint64_t pos, st_tensor *t, uint64_t *bytes, orcd_error *err) {
    size_t n = json_array_size(v);
    if (!json_is_array(v) || n > ST_MAX_DIMS)
        return refuse(err, ORCD_ERR_FORMAT, pos, "tensor %.80s has no shape of at most %d dimensions", t->name,
                      ST_MAX_DIMS);
    t->n_dims = (uint32_t)n;
    *bytes = dtype[t->type].bytes;
    for (size_t i = 0; i < n; i++) {
        if (!read_count(json_array_get(v, i), &t->shape[i]))
            return refuse(err, ORCD_ERR_FORMAT, pos, "dimension %zu of tensor %.80s is no count", i, t->name);
        if (!ck_mul(*bytes, t->shape[i], bytes))
            return refuse(err, ORCD_ERR_FORMAT, pos, "the size of tensor %.80s does not fit 64 bits", t->name);
    }
    return ORCD_OK;
}

/* t->data becomes data_start + its first offset; t->bytes their difference. */
static orcd_status read_tensor(const char *name, const json_t *info, const uint8_t *data, uint64_t data_start,
                               uint64_t size, st_tensor *t, orcd_error *err) {
    uint64_t begin, end, bytes = 0;
    *t = (st_tensor){.name = name};
    if (!json_is_object(info))
        return refuse(err, ORCD_ERR_FORMAT, 8, "the header's entry %.80s is not an object", name);
    ORCD_TRY(read_dtype(name, json_object_get(info, "dtype"), 8, &t->type, err));
    ORCD_TRY(read_shape(json_object_get(info, "shape"), 8, t, &bytes, err));
    const json_t *range = json_object_get(info, "data_offsets");
    if (json_array_size(range) != 2 || !read_count(json_array_get(range, 0), &begin) ||
        !read_count(json_array_get(range, 1), &end) || begin > end)
        return refuse(err, ORCD_ERR_FORMAT, 8, "tensor %.80s has no data_offsets [begin, end]", name);
    if (end > size - data_start)
        return refuse(
            err, ORCD_ERR_FORMAT, 8,
            "tensor %.80s ends at data offset %llu, but the file has only %llu bytes of data; the download may "
            "be incomplete",
            name, (unsigned long long)end, (unsigned long long)(size - data_start));
    if (end - begin != bytes)
        return refuse(err, ORCD_ERR_FORMAT, 8, "tensor %.80s has %llu bytes of data, but its shape and dtype need %llu",
                      name, (unsigned long long)(end - begin), (unsigned long long)bytes);
    t->data = data + data_start + begin;
    t->bytes = bytes;
    return ORCD_OK;
}

static orcd_status check_metadata(json_t *meta, orcd_error *err) {
    const char *key;
    json_t *v;
    if (!json_is_object(meta))
        return orcd_fail_at(err, ORCD_ERR_FORMAT, 8, "__metadata__ is not an object");
    json_object_foreach(meta, key, v) {
        if (!json_is_string(v))
            return refuse(err, ORCD_ERR_FORMAT, 8, "__metadata__ entry %.80s is not a string", key);
    }
    return ORCD_OK;
}

static int by_address(const void *a, const void *b) {
    const st_tensor *x = a, *y = b;
    if (x->data != y->data)
        return x->data < y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes; /* empty ones first */
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

/* The tensors lie one behind the other and cover the data exactly: no overlap, no hidden bytes. */
static orcd_status check_cover(st_tensor *t, uint64_t n, const uint8_t *data, uint64_t data_start, uint64_t size,
                               orcd_error *err) {
    uint64_t pos = data_start;
    qsort(t, n, sizeof *t, by_address);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t begin = (uint64_t)(t[i].data - data);
        if (begin != pos)
            return refuse(err, ORCD_ERR_FORMAT, begin,
                          "tensor %.80s begins at byte %llu, but the one before it ends at %llu", t[i].name,
                          (unsigned long long)begin, (unsigned long long)pos);
        pos += t[i].bytes;
    }
    if (pos != size)
        return refuse(err, ORCD_ERR_FORMAT, pos, "%llu bytes of the file belong to no tensor",
                      (unsigned long long)(size - pos));
    return ORCD_OK;
}

static orcd_status reserve(st_model *m, uint64_t n, orcd_error *err) {
    if (m->n + n <= m->cap)
        return ORCD_OK;
    uint64_t cap = m->n + n;
    st_tensor *grown = cap <= SIZE_MAX / sizeof *grown ? realloc(m->tensor, cap * sizeof *grown) : NULL;
    if (!grown)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for %llu tensors", (unsigned long long)cap);
    m->tensor = grown;
    m->cap = cap;
    return ORCD_OK;
}

/* Append one file's tensors to the model, in the order of their data. Their names are copied. */
static orcd_status add_header(st_model *m, json_t *root, const uint8_t *data, uint64_t data_start, uint64_t size,
                              orcd_error *err) {
    const char *key;
    json_t *v;
    uint64_t n = 0, first = m->n;
    ORCD_TRY(reserve(m, json_object_size(root) + 1, err));
    st_tensor *t = m->tensor + first;
    json_object_foreach(root, key, v) {
        if (strcmp(key, "__metadata__") == 0)
            ORCD_TRY(check_metadata(v, err));
        else
            ORCD_TRY(read_tensor(key, v, data, data_start, size, &t[n++], err));
    }
    ORCD_TRY(check_cover(t, n, data, data_start, size, err));
    for (; m->n < first + n; m->n++) {
        char *name = strdup(m->tensor[m->n].name);
        if (!name)
            return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for tensor names");
        m->tensor[m->n].name = name; /* owned from here on: m->n counts it */
    }
    return ORCD_OK;
}

static orcd_status add_file(st_model *m, const uint8_t *data, uint64_t size, orcd_error *err) {
    uint64_t len;
    if (size < 8)
        return orcd_fail_at(err, ORCD_ERR_FORMAT, 0, "the file has %llu bytes, too few for a safetensors header",
                            (unsigned long long)size);
    memcpy(&len, data, sizeof len);
    if (len > HEADER_MAX)
        return orcd_fail_at(err, ORCD_ERR_FORMAT, 0, "the header claims %llu bytes; at most %u are allowed",
                            (unsigned long long)len, HEADER_MAX);
    if (len > size - 8)
        return orcd_fail_at(err, ORCD_ERR_FORMAT, 0, "the header claims %llu bytes, but only %llu follow",
                            (unsigned long long)len, (unsigned long long)(size - 8));
    if (len < 2 || data[8] != '{')
        return orcd_fail_at(err, ORCD_ERR_FORMAT, 8, "the header is not a JSON object");
    json_error_t je;
    json_t *root = json_loadb((const char *)data + 8, len, JSON_REJECT_DUPLICATES, &je);
    if (!root)
        return refuse(err, ORCD_ERR_FORMAT, 8 + (uint64_t)(je.position > 0 ? je.position : 0),
                      "the header is not valid JSON: %s", je.text);
    orcd_status s = add_header(m, root, data, 8 + len, size, err);
    json_decref(root);
    m->bytes += size;
    return s;
}

orcd_status st_parse(const uint8_t *data, size_t size, st_model **out, orcd_error *err) {
    *out = NULL;
    st_model *m = calloc(1, sizeof *m);
    if (!m)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to read a safetensors file");
    orcd_status s = add_file(m, data, size, err);
    if (s != ORCD_OK) {
        st_close(m);
        return s;
    }
    qsort(m->tensor, m->n, sizeof *m->tensor, by_name);
    *out = m;
    return ORCD_OK;
}

/* ---- files and folders ---- */

/* Opens PATH as the model's next shard; errors carry the path. */
static orcd_status add_path(st_model *m, const char *path, orcd_error *err) {
    orcd_error inner = {0};
    shard *sh = &m->shard[m->n_shards];
    m->n_shards++; /* from here on st_close sees it; a failed map is zero */
    ORCD_TRY(file_open(path, &sh->map, err));
    orcd_status s = add_file(m, sh->map.data, sh->map.size, &inner);
    if (s != ORCD_OK)
        return orcd_fail_at(err, s, inner.pos, "%s: %s", path, inner.message);
    return ORCD_OK;
}

/* Shard names come from a file: they may only name a file in the same folder. */
static bool is_shard_name(const json_t *v) {
    static const char suffix[] = ".safetensors";
    const char *s = json_string_value(v);
    size_t n = json_string_length(v), tail = sizeof suffix - 1;
    return s && n > tail && n < 256 && strlen(s) == n && !strchr(s, '/') && s[0] != '.' &&
           strcmp(s + n - tail, suffix) == 0;
}

static bool has_shard(const st_model *m, const char *name) {
    for (size_t i = 0; i < m->n_shards; i++)
        if (strcmp(m->shard[i].name, name) == 0)
            return true;
    return false;
}

/* Every tensor of this shard, and no other, is what the index says it holds. */
static orcd_status add_shard(st_model *m, const char *dir, const char *name, json_t *weight_map, orcd_error *err) {
    buf path = {0};
    orcd_status s;
    uint64_t first = m->n;
    if (m->n_shards == SHARDS_MAX)
        return orcd_fail(err, ORCD_ERR_FORMAT, "the index in %s names more than %d files", dir, SHARDS_MAX);
    buf_printf(&path, "%s/%s", dir, name);
    if (path.failed || !(m->shard[m->n_shards].name = strdup(name))) {
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a file name");
        goto done;
    }
    ORCD_TRY_GOTO(s, done, add_path(m, path.data, err));
    for (uint64_t i = first; i < m->n; i++) {
        const char *where = json_string_value(json_object_get(weight_map, m->tensor[i].name));
        if (!where || strcmp(where, name) != 0) {
            s = refuse(err, ORCD_ERR_FORMAT, ORCD_POS_NONE, "%s holds tensor %.80s, but the index places it %s%.80s",
                       path.data, m->tensor[i].name, where ? "in " : "nowhere", where ? where : "");
            goto done;
        }
    }
done:
    buf_free(&path);
    return s;
}

static orcd_status open_index(st_model *m, const char *dir, const char *index_path, orcd_error *err) {
    char *text = NULL;
    size_t len;
    json_t *root = NULL, *map, *v;
    json_error_t je;
    const char *key;
    orcd_status s;
    ORCD_TRY_GOTO(s, done, file_slurp(index_path, INDEX_MAX, &text, &len, err));
    root = json_loadb(text, len, JSON_REJECT_DUPLICATES, &je);
    if (!root) {
        s = refuse(err, ORCD_ERR_FORMAT, (uint64_t)(je.position > 0 ? je.position : 0), "%s is not valid JSON: %s",
                   index_path, je.text);
        goto done;
    }
    map = json_object_get(root, "weight_map");
    if (!json_is_object(map)) {
        s = orcd_fail(err, ORCD_ERR_FORMAT, "%s has no weight_map", index_path);
        goto done;
    }
    if (!(m->shard = calloc(SHARDS_MAX, sizeof *m->shard))) {
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory to open %s", index_path);
        goto done;
    }
    json_object_foreach(map, key, v) {
        if (!is_shard_name(v)) {
            s = refuse(err, ORCD_ERR_FORMAT, ORCD_POS_NONE,
                       "%s places tensor %.80s in \"%.80s\", which is not the name of a .safetensors file", index_path,
                       key, json_is_string(v) ? json_string_value(v) : "");
            goto done;
        }
        if (!has_shard(m, json_string_value(v)))
            ORCD_TRY_GOTO(s, done, add_shard(m, dir, json_string_value(v), map, err));
    }
    if (m->n != json_object_size(map))
        s = refuse(err, ORCD_ERR_FORMAT, ORCD_POS_NONE, "%s lists %zu tensors, but its files hold %llu", index_path,
                   json_object_size(map), (unsigned long long)m->n);
done:
    json_decref(root);
    free(text);
    return s;
}

static orcd_status open_folder(st_model *m, const char *dir, orcd_error *err) {
    buf single = {0}, index = {0};
    orcd_status s;
    buf_printf(&single, "%s/model.safetensors", dir);
    buf_printf(&index, "%s/model.safetensors.index.json", dir);
    if (single.failed || index.failed)
        s = orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a file name");
    else if (file_exists(single.data) || !file_exists(index.data))
        s = (m->shard = calloc(1, sizeof *m->shard))
                ? add_path(m, single.data, err)
                : orcd_fail(err, ORCD_ERR_NOMEM, "no memory to open %s", single.data);
    else
        s = open_index(m, dir, index.data, err);
    buf_free(&single);
    buf_free(&index);
    return s;
}

orcd_status st_open(const char *path, st_model **out, orcd_error *err) {
    *out = NULL;
    st_model *m = calloc(1, sizeof *m);
    if (!m || (!file_is_dir(path) && !(m->shard = calloc(1, sizeof *m->shard)))) {
        st_close(m);
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to open %s", path);
    }
    orcd_status s = m->shard ? add_path(m, path, err) : open_folder(m, path, err);
    if (s != ORCD_OK) {
        st_close(m);
        return s;
    }
    qsort(m->tensor, m->n, sizeof *m->tensor, by_name);
    *out = m;
    return ORCD_OK;
}

void st_close(st_model *m) {
    if (!m)
        return;
    for (uint64_t i = 0; i < m->n; i++)
        free((char *)m->tensor[i].name);
    for (size_t i = 0; i < m->n_shards; i++) {
        file_close(&m->shard[i].map);
        free(m->shard[i].name);
    }
    free(m->tensor);
    free(m->shard);
    free(m);
}

uint64_t st_bytes(const st_model *m) { return m->bytes; }

bool st_changed(const st_model *m) {
    for (size_t i = 0; i < m->n_shards; i++)
        if (file_changed(&m->shard[i].map))
            return true;
    return false;
}

uint64_t st_n_tensors(const st_model *m) { return m->n; }

const st_tensor *st_tensor_at(const st_model *m, uint64_t i) { return i < m->n ? &m->tensor[i] : NULL; }

const st_tensor *st_find(const st_model *m, const char *name) {
    st_tensor key = {.name = name};
    return m->n ? bsearch(&key, m->tensor, m->n, sizeof key, by_name) : NULL;
}
