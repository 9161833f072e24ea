#include "arch/export.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "arch/model.h"
#include "base/pool.h"

/* ---- which type a tensor gets ---- */

/* file_type: llama.cpp's number for general.file_type. */
typedef struct named_mix {
    const char *name;
    q_type type, more, qkv; /* more: for the tensors that suffer most */
    uint32_t file_type;
} named_mix;

static const named_mix mixes[] = {
    {"F32", Q_F32, Q_F32, Q_F32, 0},      {"F16", Q_F16, Q_F16, Q_F16, 1},
    {"BF16", Q_BF16, Q_BF16, Q_BF16, 32}, {"Q8_0", Q_Q8_0, Q_Q8_0, Q_Q8_0, 7},
    {"Q4_0", Q_Q4_0, Q_Q4_0, Q_Q4_0, 2},  {"Q4_1", Q_Q4_1, Q_Q4_1, Q_Q4_1, 3},
    {"Q5_0", Q_Q5_0, Q_Q5_0, Q_Q5_0, 8},  {"Q5_1", Q_Q5_1, Q_Q5_1, Q_Q5_1, 9},
    {"Q4_K", Q_Q4_K, Q_Q4_K, Q_Q4_K, 15}, {"Q4_K_M", Q_Q4_K, Q_Q6_K, Q_Q5_K, 15},
    {"Q5_K", Q_Q5_K, Q_Q5_K, Q_Q5_K, 17}, {"Q5_K_M", Q_Q5_K, Q_Q6_K, Q_Q6_K, 17},
    {"Q6_K", Q_Q6_K, Q_Q6_K, Q_Q6_K, 18}, {"MXFP4", Q_MXFP4, Q_MXFP4, Q_MXFP4, 38},
};

static const named_mix *find_mix(const char *name) {
    for (size_t i = 0; name && i < ORCD_COUNT(mixes); i++)
        if (strcasecmp(mixes[i].name, name) == 0)
            return &mixes[i];
    return NULL;
}

bool arch_types_known(const char *name) { return find_mix(name) != NULL; }

const char *arch_types_list(void) {
    return "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, Q4_K_M, Q5_K_M, MXFP4";
}

static bool name_has(const arch_tensor *t, const char *what) {
    return strstr(t->name, what) != NULL; /* what carries its dots: ".attn_v." */
}

/* llama.cpp's choice for its _M mixes: the first and last eighth of the layers and every third between. */
static bool more_bits(int i, int n) { return i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2; }

static q_type mixed(const named_mix *m, const arch_tensor *t, int n_layer, bool tied) {
    if (strcmp(t->name, "output.weight") == 0 || (tied && strcmp(t->name, "token_embd.weight") == 0))
        return m->more;
    if (name_has(t, ".attn_qkv."))
        return m->qkv;
    bool tender = name_has(t, ".attn_v.") || name_has(t, ".ffn_down");
    return tender && more_bits(t->layer, n_layer) ? m->more : m->type;
}

static q_type that_divides(q_type type, uint64_t n_col) {
    if (n_col % q_find(type)->block_len == 0)
        return type;
    q_type less = type == Q_Q4_K ? Q_Q5_0 : type == Q_Q5_K ? Q_Q5_1 : type == Q_Q6_K ? Q_Q8_0 : Q_F16;
    return n_col % q_find(less)->block_len == 0 ? less : Q_F16;
}

/* ---- keys ---- */

static bool key_is(const gguf_kv *kv, const char *key) {
    return kv->key.len == strlen(key) && memcmp(kv->key.data, key, kv->key.len) == 0;
}

static bool key_begins(const gguf_kv *kv, const char *key) {
    return kv->key.len > strlen(key) && memcmp(kv->key.data, key, strlen(key)) == 0;
}

/* Everything but what describes the old file; "gptoss.KEY" is spelled as it should be. */
static void copy_keys(const arch *a, const mf_file *f, bool tokenizer, gguf_writer *w) {
    const gguf *g = mf_gguf(f);
    char old[128], full[256];
    snprintf(old, sizeof old, "%s.", mf_arch_name(f));
    for (uint64_t i = 0; i < gguf_n_kv(g); i++) {
        gguf_kv kv = *gguf_kv_at(g, i);
        if (key_is(&kv, "general.architecture") || key_is(&kv, "general.file_type") ||
            key_is(&kv, "general.quantization_version") || key_begins(&kv, "split.") ||
            (!tokenizer && key_begins(&kv, "tokenizer.")))
            continue;
        if (key_begins(&kv, old) && kv.key.len < 128) {
            int n = snprintf(full, sizeof full, "%s.%.*s", a->name, (int)(kv.key.len - strlen(old)),
                             kv.key.data + strlen(old));
            kv.key = (gguf_str){full, (size_t)n};
        }
        gguf_put_kv(w, &kv);
    }
}

orcd_status arch_put_keys(const arch *a, const mf_file *f, const arch_config *c, bool tokenizer, gguf_writer *w,
                          orcd_error *err) {
    gguf_put_str(w, "general.architecture", a->name, strlen(a->name));
    if (mf_gguf(f)) {
        copy_keys(a, f, tokenizer, w);
        return ORCD_OK;
    }
    char *path = realpath(mf_path(f), NULL);
    const char *slash = path ? strrchr(path, '/') : NULL, *name = slash ? slash + 1 : a->name;
    gguf_put_str(w, "general.name", name, strlen(name));
    free(path);
    return a->put_keys(c, w, err);
}

/* ---- tensors ---- */

enum { CHUNK_VALUES = 2 << 20 };

typedef struct exporting {
    const arch_types *types;
    int n_layer;
    bool tied;
    q_type embd_type, expert_type;
    gguf_writer *w;
    pool *pool;
    arch_exported *sum;
    uint64_t total, n_skip; /* n_skip: tensors that are there already */
    arch_progress progress;
    void *progress_ctx;

    /* the chunk in hand */
    const mf_tensor *from;
    const q_traits *in, *out;
    uint64_t mat, row0, n_row;
    float *value;  /* [rows of a chunk, n_col] */
    uint8_t *raw;  /* the same as stored */
    uint8_t *made; /* the same as written */
    size_t cap;    /* values that the three have room for */
} exporting;

q_type arch_type_of(const arch_types *types, const arch_tensor *t, int n_layer, bool tied, q_type stored) {
    if (t->exact)
        return Q_F32;
    const named_mix *m = find_mix(arch_is_experts(t) ? types->experts : types->dense);
    return m ? that_divides(mixed(m, t, n_layer, tied), t->ne[0]) : stored;
}

static q_type choose(const exporting *e, const arch_tensor *t, q_type stored) {
    return arch_type_of(e->types, t, e->n_layer, e->tied, stored);
}

static orcd_status find_tied(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    (void)data, (void)err;
    ((exporting *)ctx)->tied |= t->tied;
    return ORCD_OK;
}

static orcd_status declare(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    exporting *e = ctx;
    (void)err;
    if (t->tied)
        return ORCD_OK;
    q_type type = choose(e, t, data[0]->type);
    gguf_put_tensor(e->w, t->name, type, t->n_dims, t->ne);
    e->sum->n_tensor++;
    e->sum->n_same += type == data[0]->type;
    e->total += mf_row_bytes(data[0]) * data[0]->n_row * data[0]->n_mat;
    if (t->use == BE_USE_EMBED && !t->exact)
        e->embd_type = type;
    if (arch_is_experts(t) && !t->exact)
        e->expert_type = type;
    return ORCD_OK;
}

void arch_put_file_type(const arch_types *types, q_type embd, q_type experts, gguf_writer *w) {
    const named_mix *m = find_mix(types->dense);
    q_type type = experts == Q_MXFP4 ? Q_MXFP4 : embd;
    uint32_t number = m && type != Q_MXFP4 ? m->file_type : find_mix(q_find(type)->name)->file_type;
    gguf_put_u32(w, "general.file_type", number);
    gguf_put_u32(w, "general.quantization_version", 2);
}

/* One thread's share of the rows: as stored, to float, to the new type. */
static void convert_rows(void *arg, int thread, int n_threads) {
    exporting *e = arg;
    uint64_t first = e->n_row * (uint64_t)thread / (uint64_t)n_threads;
    uint64_t n = e->n_row * (uint64_t)(thread + 1) / (uint64_t)n_threads - first;
    size_t n_col = e->from->n_col, n_value = (size_t)n * n_col, at = (size_t)first * n_col;
    uint8_t *made = e->made + q_row_bytes(e->out, at), *raw = e->raw + q_row_bytes(e->in, at);
    if (!n)
        return;
    if (e->in == e->out) {
        mf_rows(e->from, e->mat, e->row0 + first, n, made);
        return;
    }
    mf_rows(e->from, e->mat, e->row0 + first, n, raw);
    e->in->unpack(raw, e->value + at, n_value);
    e->out->pack(e->value + at, made, n_value);
}

static orcd_status reserve(exporting *e, size_t n_value, orcd_error *err) {
    if (n_value <= e->cap)
        return ORCD_OK;
    free(e->value);
    free(e->raw);
    free(e->made);
    e->value = malloc(n_value * sizeof(float));
    e->raw = malloc(n_value * sizeof(float)); /* no type is wider than F32 */
    e->made = malloc(n_value * sizeof(float));
    e->cap = e->value && e->raw && e->made ? n_value : 0;
    return e->cap ? ORCD_OK : orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu values", n_value);
}

static orcd_status write_exact(exporting *e, const mf_tensor *from, orcd_error *err) {
    size_t n = from->n_mat * from->n_row * from->n_col;
    ORCD_TRY(reserve(e, n, err));
    mf_floats(from, e->value);
    return gguf_write(e->w, e->value, n * sizeof(float), err);
}

static orcd_status write_matrix(exporting *e, const mf_tensor *from, q_type type, orcd_error *err) {
    uint64_t chunk = CHUNK_VALUES / from->n_col + 1;
    if (chunk > from->n_row)
        chunk = from->n_row;
    ORCD_TRY(reserve(e, chunk * from->n_col, err));
    e->from = from;
    e->in = q_find(from->type);
    e->out = q_find(type);
    for (e->mat = 0; e->mat < from->n_mat; e->mat++)
        for (e->row0 = 0; e->row0 < from->n_row; e->row0 += e->n_row) {
            e->n_row = from->n_row - e->row0 < chunk ? from->n_row - e->row0 : chunk;
            pool_run(e->pool, convert_rows, e);
            ORCD_TRY(gguf_write(e->w, e->made, e->n_row * q_row_bytes(e->out, from->n_col), err));
            e->sum->bytes_in += e->n_row * mf_row_bytes(from);
            if (e->progress)
                e->progress(e->progress_ctx, e->sum->bytes_in, e->total);
        }
    return ORCD_OK;
}

static orcd_status write_one(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    exporting *e = ctx;
    const mf_tensor *from = data[0];
    if (t->tied)
        return ORCD_OK;
    q_type type = choose(e, t, from->type);
    uint64_t n = from->n_mat * from->n_row * from->n_col;
    e->sum->bytes_out += q_row_bytes(q_find(type), n);
    if (e->n_skip) {
        e->n_skip--;
        e->sum->bytes_in += mf_row_bytes(from) * from->n_row * from->n_mat;
        return ORCD_OK;
    }
    if (t->exact) {
        e->sum->bytes_in += mf_row_bytes(from) * from->n_row * from->n_mat;
        return write_exact(e, from, err);
    }
    ORCD_TRY(write_matrix(e, from, type, err));
    mf_release(from);
    return ORCD_OK;
}

orcd_status arch_export(const arch *a, const mf_file *f, const arch_config *c, const arch_types *types,
                        const char *origin, int n_threads, arch_progress progress, void *progress_ctx, gguf_writer *w,
                        arch_exported *out, orcd_error *err) {
    exporting e = {.types = types,
                   .n_layer = c->n_layer,
                   .embd_type = Q_F32,
                   .expert_type = Q_F32,
                   .w = w,
                   .sum = out,
                   .progress = progress,
                   .progress_ctx = progress_ctx};
    orcd_status st;
    *out = (arch_exported){0};
    ORCD_TRY(pool_open(n_threads, &e.pool, err));
    ORCD_TRY_GOTO(st, done, arch_each_tensor(a, c, 1, &f, find_tied, &e, err));
    ORCD_TRY_GOTO(st, done, arch_each_tensor(a, c, 1, &f, declare, &e, err));
    arch_put_file_type(types, e.embd_type, e.expert_type, w);
    if (origin)
        ORCD_TRY_GOTO(st, done, gguf_begin(w, origin, &out->n_before, err));
    e.n_skip = out->n_before;
    st = arch_each_tensor(a, c, 1, &f, write_one, &e, err);
done:
    pool_close(e.pool);
    free(e.value);
    free(e.raw);
    free(e.made);
    return st;
}
