#include "arch/synth.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/model.h"
#include "base/pool.h"
#include "base/rng.h"

extern const arch arch_gptoss, arch_gpt2;

/* ---- presets ---- */

typedef struct preset {
    const char *name;
    const arch *arch;
    int n_layer, n_embd, n_head, n_kv_head, n_ff, n_expert, n_ctx, n_vocab;
} preset;

static const preset presets[] = {
    {"gpt-oss-20b", &arch_gptoss, 24, 2880, 64, 8, 2880, 32, 131072, 201088},
    {"gpt-oss-120b", &arch_gptoss, 36, 2880, 64, 8, 2880, 128, 131072, 201088},
    {"gpt-oss-mini", &arch_gptoss, 4, 256, 8, 2, 256, 8, 131072, 1024},
    {"gpt2", &arch_gpt2, 12, 768, 12, 12, 3072, 0, 1024, 50257},
    {"gpt2-mini", &arch_gpt2, 4, 128, 4, 4, 512, 0, 512, 512},
};

const char *arch_presets(void) { return "gpt-oss-20b, gpt-oss-120b, gpt-oss-mini, gpt2, gpt2-mini"; }

bool arch_preset(const char *name, const arch **a, arch_config *c) {
    const preset *p = NULL;
    for (size_t i = 0; i < ORCD_COUNT(presets); i++)
        if (strcmp(presets[i].name, name) == 0)
            p = &presets[i];
    if (!p)
        return false;
    bool oss = p->arch == &arch_gptoss;
    *a = p->arch;
    *c = (arch_config){.n_layer = p->n_layer,
                       .n_embd = p->n_embd,
                       .n_head = p->n_head,
                       .n_kv_head = p->n_kv_head,
                       .head_dim = oss ? 64 : p->n_embd / p->n_head,
                       .n_ff = p->n_ff,
                       .n_vocab = p->n_vocab,
                       .n_ctx = p->n_ctx,
                       .n_expert = p->n_expert,
                       .n_expert_used = oss ? 4 : 0,
                       .norm_eps = 1e-5f,
                       .gelu_tanh = !oss};
    if (!oss)
        return true;
    c->rope_base = 150000;
    c->rope_factor = 32;
    c->rope_beta_fast = 32;
    c->rope_beta_slow = 1;
    c->rope_n_ctx_orig = 4096;
    c->glu_alpha = 1.702f;
    c->glu_limit = 7;
    for (int i = 0; i < ARCH_MAX_LAYERS; i += 2)
        c->window[i] = 128;
    return true;
}

/* ---- numbers ---- */

enum { CHUNK_VALUES = 4 << 20 };

typedef struct synth {
    const arch_config *c;
    const arch_types *types;
    bool tied, oss;
    q_type embd_type, expert_type;
    uint32_t key[2];
    uint32_t tensor; /* its number: the stream of its draws */
    uint64_t done, total;
    gguf_writer *w;
    pool *pool;
    arch_exported *sum;
    arch_progress progress;
    void *progress_ctx;

    /* the chunk in hand */
    const q_traits *q;
    float std, mean;
    uint64_t first, n; /* values */
    float *value;      /* [CHUNK_VALUES] */
    uint8_t *made;     /* the same in the file's type */
} synth;

static void draw(const synth *s, uint64_t n, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)n, (uint32_t)(n >> 32), s->tensor, 0};
    rng_philox(counter, s->key, out);
}

/* Nearly normal: the sum of four bytes has mean 510 and deviation 147.8. */
static void make_floats(const synth *s, uint64_t first, uint64_t n, float *out) {
    const float scale = s->std / 147.802f;
    uint32_t u[4];
    for (uint64_t i = 0; i < n; i++) {
        if (i == 0 || (first + i) % 4 == 0)
            draw(s, (first + i) / 4, u);
        uint32_t v = u[(first + i) % 4];
        int sum = (int)((v & 255) + (v >> 8 & 255) + (v >> 16 & 255) + (v >> 24));
        out[i] = (float)(sum - 510) * scale + s->mean;
    }
}

/* MXFP4 blocks directly: uniform codes have deviation 2.926, and a block's scale is one of three around what std asks
 * for. Packing floats would take twenty times as long, and the experts are nearly all of a model. */
static void make_mxfp4(const synth *s, uint64_t first_block, uint64_t n, uint8_t *out) {
    const int e = (int)lrintf(127 + log2f(s->std / 2.926f));
    uint32_t u[4];
    for (uint64_t i = 0; i < n; i++, out += 17) {
        draw(s, first_block + i, u);
        out[0] = (uint8_t)(e - 1 + (int)(u[0] & 1) + (int)(u[3] >> 31));
        memcpy(out + 1, u, sizeof u);
    }
}

static void make_share(void *arg, int thread, int n_threads) {
    synth *s = arg;
    uint64_t blocks = s->n / s->q->block_len, from = blocks * (uint64_t)thread / (uint64_t)n_threads;
    uint64_t n = blocks * (uint64_t)(thread + 1) / (uint64_t)n_threads - from, at = from * s->q->block_len;
    uint8_t *made = s->made + from * s->q->block_bytes;
    if (s->q->type == Q_MXFP4) {
        make_mxfp4(s, s->first / s->q->block_len + from, n, made);
        return;
    }
    make_floats(s, s->first + at, n * s->q->block_len, s->value + at);
    s->q->pack(s->value + at, made, n * s->q->block_len);
}

/* ---- tensors ---- */

static bool named(const arch_tensor *t, const char *what) { return strstr(t->name, what) != NULL; }

/* Inputs of matrices are normalised, so 1 / sqrt(columns) keeps a product's deviation at one. */
static void set_spread(synth *s, const arch_tensor *t) {
    float by_width = 1 / sqrtf((float)t->ne[0]);
    s->mean = 0;
    s->std = by_width;
    if (named(t, "_norm.weight"))
        s->mean = 1, s->std = 0.1f;
    else if (named(t, ".bias") || named(t, "position_embd"))
        s->std = 0.1f;
    else if (named(t, "attn_sinks"))
        s->std = 1;
    else if (named(t, "token_embd"))
        s->std = s->tied ? 2.5f * by_width : 1;
    else if (strcmp(t->name, "output.weight") == 0)
        s->std = 2.5f * by_width;
    else if (named(t, "ffn_gate_inp"))
        s->std = 2 * by_width;
}

static q_type type_of(const synth *s, const arch_tensor *t) {
    q_type published = !s->oss ? Q_F32 : arch_is_experts(t) ? Q_MXFP4 : Q_BF16;
    return arch_type_of(s->types, t, s->c->n_layer, s->tied, published);
}

static bool left_out(const synth *s, const arch_tensor *t) { return s->tied && strcmp(t->name, "output.weight") == 0; }

static uint64_t values_of(const arch_tensor *t) {
    uint64_t n = 1;
    for (uint32_t i = 0; i < t->n_dims; i++)
        n *= t->ne[i]; /* of our own presets: far from 2^64 */
    return n;
}

static orcd_status declare(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    synth *s = ctx;
    (void)data, (void)err;
    if (left_out(s, t))
        return ORCD_OK;
    q_type type = type_of(s, t);
    gguf_put_tensor(s->w, t->name, type, t->n_dims, t->ne);
    s->sum->n_tensor++;
    s->total += q_row_bytes(q_find(type), values_of(t));
    if (strcmp(t->name, "token_embd.weight") == 0)
        s->embd_type = type;
    if (arch_is_experts(t) && !t->exact)
        s->expert_type = type;
    return ORCD_OK;
}

static orcd_status write_one(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    synth *s = ctx;
    (void)data;
    if (left_out(s, t))
        return ORCD_OK;
    uint64_t n = values_of(t);
    s->q = q_find(type_of(s, t));
    s->tensor++;
    set_spread(s, t);
    for (s->first = 0; s->first < n; s->first += s->n) {
        s->n = n - s->first < CHUNK_VALUES ? n - s->first : CHUNK_VALUES;
        size_t bytes = q_row_bytes(s->q, s->n);
        pool_run(s->pool, make_share, s);
        ORCD_TRY(gguf_write(s->w, s->made, bytes, err));
        s->sum->bytes_out += bytes;
        if (s->progress)
            s->progress(s->progress_ctx, s->sum->bytes_out, s->total);
    }
    return ORCD_OK;
}

orcd_status arch_synth_keys(const arch *a, const arch_config *c, const char *name, gguf_writer *w, orcd_error *err) {
    char full[96];
    snprintf(full, sizeof full, "random %.64s", name);
    gguf_put_str(w, "general.architecture", a->name, strlen(a->name));
    gguf_put_str(w, "general.name", full, strlen(full));
    return a->put_keys(c, w, err);
}

orcd_status arch_synth(const arch *a, const arch_config *c, const arch_types *types, uint64_t seed, int n_threads,
                       arch_progress progress, void *progress_ctx, gguf_writer *w, arch_exported *out,
                       orcd_error *err) {
    bool oss = a == &arch_gptoss;
    synth s = {.c = c,
               .types = types,
               .oss = oss,
               .tied = !oss, /* as published */
               .embd_type = Q_F32,
               .expert_type = Q_F32,
               .key = {(uint32_t)seed, (uint32_t)(seed >> 32)},
               .w = w,
               .sum = out,
               .progress = progress,
               .progress_ctx = progress_ctx};
    orcd_status st;
    *out = (arch_exported){0};
    ORCD_TRY(pool_open(n_threads, &s.pool, err));
    s.value = malloc(CHUNK_VALUES * sizeof *s.value);
    s.made = malloc(CHUNK_VALUES * sizeof *s.value); /* no type is wider */
    if (!s.value || !s.made) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %d values", CHUNK_VALUES);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, arch_each_tensor(a, c, 0, NULL, declare, &s, err));
    arch_put_file_type(types, s.embd_type, s.expert_type, w);
    st = arch_each_tensor(a, c, 0, NULL, write_one, &s, err);
done:
    pool_close(s.pool);
    free(s.value);
    free(s.made);
    return st;
}
