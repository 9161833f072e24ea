/* arch/gpt2.c: GPT-2: LayerNorm, learned positions, multi-head attention, GELU, tied or untied head.
 * Source: Radford et al. 2019 and Hugging Face's GPT2LMHeadModel. */
#include "arch/model.h"

#include <math.h>
#include <string.h>

extern const arch arch_gpt2;
static const char *const aliases[] = {NULL};

#define G(member) offsetof(arch_globals, member)
#define L(member) offsetof(arch_layer, member)

static const arch_slot global_slots[] = {
    {G(embd), BE_USE_EMBED, {{"token_embd", "wte", NULL, DIM_VOCAB, DIM_EMBD, 0}}},
    {G(pos_embd), BE_USE_EMBED, {{"position_embd", "wpe", NULL, DIM_CTX, DIM_EMBD, 0}}},
    {G(out_norm), BE_USE_VECTOR, {{"output_norm", "ln_f", NULL, DIM_1, DIM_EMBD, 0}}},
    {G(out_norm_bias), BE_USE_VECTOR, {{"output_norm.bias", "ln_f.bias", NULL, DIM_1, DIM_EMBD, 0}}},
    {G(head), BE_USE_LINEAR, {{"output", "lm_head", NULL, DIM_VOCAB, DIM_EMBD, TIED}}},
    {0},
};

static const arch_slot layer_slots[] = {
    {L(attn_norm), BE_USE_VECTOR, {{"attn_norm", "ln_1", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(attn_norm_bias), BE_USE_VECTOR, {{"attn_norm.bias", "ln_1.bias", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(qkv), BE_USE_LINEAR, {{"attn_qkv", "attn.c_attn", "attn.c_attn.bias", DIM_QKV, DIM_EMBD, HF_CONV1D}}},
    {L(attn_out), BE_USE_LINEAR, {{"attn_output", "attn.c_proj", "attn.c_proj.bias", DIM_EMBD, DIM_Q, HF_CONV1D}}},
    {L(ffn_norm), BE_USE_VECTOR, {{"ffn_norm", "ln_2", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(ffn_norm_bias), BE_USE_VECTOR, {{"ffn_norm.bias", "ln_2.bias", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(up), BE_USE_LINEAR, {{"ffn_up", "mlp.c_fc", "mlp.c_fc.bias", DIM_FF, DIM_EMBD, HF_CONV1D}}},
    {L(down), BE_USE_LINEAR, {{"ffn_down", "mlp.c_proj", "mlp.c_proj.bias", DIM_EMBD, DIM_FF, HF_CONV1D}}},
    {0},
};

static orcd_status config(const mf_file *f, arch_config *c, orcd_error *err) {
    double eps = 1e-5;
    char act[32] = "gelu_new";
    bool inverse_layer = false;
    ORCD_TRY(arch_get_int(f, "block_count", "n_layer", 1, ARCH_MAX_LAYERS, NULL, &c->n_layer, err));
    ORCD_TRY(arch_get_int(f, "embedding_length", "n_embd", 1, 65536, NULL, &c->n_embd, err));
    ORCD_TRY(arch_get_int(f, "attention.head_count", "n_head", 1, 1024, NULL, &c->n_head, err));
    c->n_kv_head = c->n_head;
    if (c->n_embd % c->n_head || c->n_embd / c->n_head > 512)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%d values do not divide into %d heads of at most 512", c->n_embd,
                         c->n_head);
    c->head_dim = c->n_embd / c->n_head;
    int64_t ff = 4 * (int64_t)c->n_embd;
    ORCD_TRY(arch_get_int(f, "feed_forward_length", "n_inner", 1, 1 << 20, &ff, &c->n_ff, err));
    ORCD_TRY(arch_get_int(f, "context_length", "n_positions", 1, 1 << 20, NULL, &c->n_ctx, err));
    ORCD_TRY(arch_get_num(f, "attention.layer_norm_epsilon", "layer_norm_epsilon", 0, 1, &eps, &eps, err));
    c->norm_eps = (float)eps;
    mf_string(f, NULL, "activation_function", act, sizeof act);
    c->gelu_tanh = strcmp(act, "gelu_new") == 0 || strcmp(act, "gelu_pytorch_tanh") == 0;
    if (!c->gelu_tanh && strcmp(act, "gelu") != 0)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "activation_function \"%s\" is not supported; GPT-2 uses gelu_new or gelu", act);
    mf_bool(f, NULL, "scale_attn_by_inverse_layer_idx", &inverse_layer);
    if (inverse_layer)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "scale_attn_by_inverse_layer_idx is not supported");
    return arch_get_vocab(f, "token_embd.weight", "wte.weight", &c->n_vocab, err);
}

static orcd_status put_keys(const arch_config *c, gguf_writer *w, orcd_error *err) {
    const arch *a = &arch_gpt2;
    if (!c->gelu_tanh)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "activation_function is gelu in config.json; GGUF has no key for it, GPT-2 has gelu_new");
    arch_put_int(a, w, "block_count", c->n_layer);
    arch_put_int(a, w, "context_length", c->n_ctx);
    arch_put_int(a, w, "embedding_length", c->n_embd);
    arch_put_int(a, w, "feed_forward_length", c->n_ff);
    arch_put_int(a, w, "attention.head_count", c->n_head);
    arch_put_num(a, w, "attention.layer_norm_epsilon", c->norm_eps);
    return ORCD_OK;
}

static be_act *forward(arch_model *m, be_step *s) {
    const arch_config *c = &m->cfg;
    const arch_acts *a = &m->act;
    const be_epilogue gelu = c->gelu_tanh ? BE_EPI_GELU_TANH : BE_EPI_GELU_ERF;

    be_embed(s, m->g.embd, m->g.pos_embd, a->x);
    arch_tap(m, s, "embed", -1, a->x);
    for (int i = 0; i < c->n_layer; i++) {
        const arch_layer *l = &m->layer[i];
        const be_norm attn_norm = {BE_NORM_LAYER, c->norm_eps, l->attn_norm, l->attn_norm_bias};
        const be_norm ffn_norm = {BE_NORM_LAYER, c->norm_eps, l->ffn_norm, l->ffn_norm_bias};

        be_attn_in(s, &attn_norm, l->qkv, &m->attn[i], a->x, a->normed, a->qkv);
        be_attention(s, &m->attn[i], a->qkv, a->att);
        arch_tap(m, s, "attention", i, a->att);
        be_linear(s, l->attn_out, a->att, a->x, BE_EPI_ADD);
        arch_tap(m, s, "attn_out", i, a->x);
        be_norm_linear(s, &ffn_norm, l->up, a->x, a->normed, a->hidden, gelu);
        be_linear(s, l->down, a->hidden, a->x, BE_EPI_ADD);
        arch_tap(m, s, "layer", i, a->x);
    }
    const be_norm out_norm = {BE_NORM_LAYER, c->norm_eps, m->g.out_norm, m->g.out_norm_bias};
    be_gather_out(s, a->x, a->out);
    be_norm_linear(s, &out_norm, m->g.head, a->out, a->out_normed, a->logits, BE_EPI_NONE);
    return a->logits;
}

const arch arch_gpt2 = {
    .name = "gpt2",
    .aliases = aliases,
    .config = config,
    .put_keys = put_keys,
    .gguf_layer = "blk.%d.",
    .hf_layer = "h.%d.",
    .hf_prefix = "transformer.",
    .global_slots = global_slots,
    .layer_slots = layer_slots,
    .forward = forward,
};
