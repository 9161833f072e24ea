/* What the bits of the KV memory depend on. */
#include <sodium.h>
#include <string.h>

#include "base/buf.h"
#include "base/cpu.h"
#include "engine/internal.h"

#define N_SAMPLE 8 /* pieces of each tensor that are looked at */
#define SAMPLE_BYTES 256

typedef crypto_generichash_state hash;

static void add(hash *h, const void *bytes, size_t n) { crypto_generichash_update(h, bytes, n); }

static void add_u64(hash *h, uint64_t v) { add(h, &v, sizeof v); }

static void add_text(hash *h, const char *s, size_t n) {
    add_u64(h, n);
    add(h, s, n);
}

static void add_tensor(hash *h, const char *name, size_t n_name, int type, const uint64_t *shape, size_t n_dims,
                       const uint8_t *data, uint64_t bytes) {
    add_text(h, name, n_name);
    add_u64(h, (uint64_t)type);
    add_text(h, (const char *)shape, n_dims * sizeof *shape);
    add_u64(h, bytes);
    if (bytes <= N_SAMPLE * SAMPLE_BYTES) {
        add(h, data, bytes);
        return;
    }
    uint64_t step = (bytes - SAMPLE_BYTES) / (N_SAMPLE - 1);
    for (uint64_t i = 0; i < N_SAMPLE; i++)
        add(h, data + i * step, SAMPLE_BYTES);
}

static void add_file(hash *h, const mf_file *f) {
    const gguf *g = mf_gguf(f);
    const st_model *m = mf_st(f);
    add_u64(h, mf_bytes(f));
    for (uint64_t i = 0; g && i < gguf_n_tensors(g); i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        add_tensor(h, t->name.data, t->name.len, (int)t->type, t->ne, GGUF_MAX_DIMS, t->data, t->bytes);
        add_u64(h, t->paired);
    }
    for (uint64_t i = 0; m && i < st_n_tensors(m); i++) {
        const st_tensor *t = st_tensor_at(m, i);
        add_tensor(h, t->name, strlen(t->name), (int)t->type, t->shape, t->n_dims, t->data, t->bytes);
    }
}

static void add_config(hash *h, const arch *a, const arch_config *c) {
    buf b = {0};
    buf_printf(&b, "%s %d %d %d %d %d %d %d %d %d %d", arch_name(a), c->n_layer, c->n_embd, c->n_head, c->n_kv_head,
               c->head_dim, c->n_ff, c->n_vocab, c->n_ctx, c->n_expert, c->n_expert_used);
    buf_printf(&b, " %a %a %a %a %a %d %d %a %a %d", (double)c->norm_eps, c->rope_base, c->rope_factor,
               c->rope_beta_fast, c->rope_beta_slow, c->rope_n_ctx_orig, c->rope_truncate, (double)c->glu_alpha,
               (double)c->glu_limit, c->gelu_tanh);
    for (int i = 0; i < c->n_layer; i++)
        buf_printf(&b, " %d", c->window[i]);
    add_text(h, b.data ? b.data : "", b.len);
    buf_free(&b);
}

void eng_fingerprint(const eng *e, const be_params *p, uint8_t out[DISK_HASH]) {
    hash h;
    bool cpu = strcmp(e->dev->ops->name, "cpu") == 0;
    char device[96]; /* the description of cpu counts threads, on which nothing depends */
    e->dev->ops->describe(e->dev, device, sizeof device);
    const char *processor = cpu_tier_name(cpu_tier_best());
    crypto_generichash_init(&h, NULL, 0, DISK_HASH);
    add_file(&h, e->file);
    add_config(&h, e->arch, &e->cfg);
    add_text(&h, e->dev->ops->name, strlen(e->dev->ops->name));
    add_text(&h, device, cpu ? 0 : strlen(device));
    add_text(&h, processor, strlen(processor));
    add_u64(&h, p->act_bits ? (uint64_t)p->act_bits : 16);
    add_u64(&h, (uint64_t)p->dense_type);
    add_u64(&h, p->no_repack);
    add_u64(&h, (uint64_t)e->cfg.n_host_layers);
    add_u64(&h, e->kv.kv->spec.type);
    add_u64(&h, BE_PAGE);
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        add_u64(&h, e->kv.pool[pool].page_bytes);
    crypto_generichash_final(&h, out, DISK_HASH);
}
