/* arch/gptoss.c: OpenAI's gpt-oss-20b and -120b: RMSNorm, YaRN rotary positions, grouped-query attention with sinks and
 * alternating 128-token windows, mixture of experts with clamped SwiGLU. Source: the gpt-oss model card and OpenAI's
 * reference implementation. */
#include "arch/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

extern const arch arch_gptoss;
static const char *const aliases[] = {"gptoss", "gpt_oss", NULL};

#define G(member) offsetof(arch_globals, member)
#define L(member) offsetof(arch_layer, member)

static const arch_slot global_slots[] = {
    {G(embd), BE_USE_EMBED, {{"token_embd", "model.embed_tokens", NULL, DIM_VOCAB, DIM_EMBD, 0}}},
    {G(out_norm), BE_USE_VECTOR, {{"output_norm", "model.norm", NULL, DIM_1, DIM_EMBD, 0}}},
    {G(head), BE_USE_LINEAR, {{"output", "lm_head", NULL, DIM_VOCAB, DIM_EMBD, TIED}}},
    {0},
};

static const arch_slot layer_slots[] = {
    {L(attn_norm), BE_USE_VECTOR, {{"attn_norm", "input_layernorm", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(qkv),
     BE_USE_LINEAR,
     {{"attn_q", "self_attn.q_proj", "self_attn.q_proj.bias", DIM_Q, DIM_EMBD, 0},
      {"attn_k", "self_attn.k_proj", "self_attn.k_proj.bias", DIM_KV, DIM_EMBD, 0},
      {"attn_v", "self_attn.v_proj", "self_attn.v_proj.bias", DIM_KV, DIM_EMBD, 0}}},
    {L(sinks), BE_USE_VECTOR, {{"attn_sinks", "self_attn.sinks", NULL, DIM_1, DIM_HEADS, 0}}},
    {L(attn_out), BE_USE_LINEAR, {{"attn_output", "self_attn.o_proj", "self_attn.o_proj.bias", DIM_EMBD, DIM_Q, 0}}},
    {L(ffn_norm), BE_USE_VECTOR, {{"post_attention_norm", "post_attention_layernorm", NULL, DIM_1, DIM_EMBD, 0}}},
    {L(router), BE_USE_LINEAR, {{"ffn_gate_inp", "mlp.router", "mlp.router.bias", DIM_EXPERTS, DIM_EMBD, 0}}},
    {L(gate_up),
     BE_USE_GATE_UP,
     {{"ffn_gate_exps", "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", DIM_FF, DIM_EMBD, HF_EVEN},
      {"ffn_up_exps", "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias", DIM_FF, DIM_EMBD, HF_ODD}}},
    {L(down),
     BE_USE_DOWN,
     {{"ffn_down_exps", "mlp.experts.down_proj", "mlp.experts.down_proj_bias", DIM_EMBD, DIM_FF, 0}}},
    {0},
};

/* Even layers look back 128 positions, odd ones at everything, unless the file says otherwise. */
static orcd_status read_windows(const mf_file *f, arch_config *c, orcd_error *err) {
    int window;
    uint64_t period = 2;
    char kind[32];
    ORCD_TRY(arch_get_int(f, "attention.sliding_window", "sliding_window", 1, 1 << 20, NULL, &window, err));
    mf_u64(f, "attention.sliding_window_pattern", NULL, &period);
    if (period < 1 || period > ARCH_MAX_LAYERS)
        return orcd_fail(err, ORCD_ERR_FORMAT, "attention.sliding_window_pattern is %llu; expected 1 to %d",
                         (unsigned long long)period, ARCH_MAX_LAYERS);
    for (int i = 0; i < c->n_layer; i++) {
        bool windowed = (uint64_t)i % period < period - 1;
        if (mf_hf_string_at(f, "layer_types", (uint64_t)i, kind, sizeof kind)) {
            windowed = strcmp(kind, "sliding_attention") == 0;
            if (!windowed && strcmp(kind, "full_attention") != 0)
                return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                                 "layer_types[%d] is \"%s\"; supported are sliding_attention and full_attention", i,
                                 kind);
        }
        c->window[i] = windowed ? window : 0;
    }
    return ORCD_OK;
}

static orcd_status read_rope(const mf_file *f, arch_config *c, orcd_error *err) {
    char type[32] = "none";
    double factor = 1, fast = 32, slow = 1, base = 150000;
    int64_t orig = 4096;
    double nested = base;
    mf_f64(f, NULL, "rope_scaling.rope_theta", &nested);
    ORCD_TRY(arch_get_num(f, "rope.freq_base", "rope_theta", 1.0001, 1e12, &nested, &c->rope_base, err));
    if (!mf_string(f, "rope.scaling.type", "rope_scaling.rope_type", type, sizeof type))
        mf_string(f, NULL, "rope_scaling.type", type, sizeof type);
    if (strcmp(type, "yarn") != 0 && strcmp(type, "none") != 0 && strcmp(type, "default") != 0)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "rope scaling \"%s\" is not supported; gpt-oss uses yarn", type);
    if (strcmp(type, "yarn") == 0)
        ORCD_TRY(arch_get_num(f, "rope.scaling.factor", "rope_scaling.factor", 1, 65536, NULL, &c->rope_factor, err));
    else
        c->rope_factor = factor;
    ORCD_TRY(arch_get_num(f, "rope.scaling.yarn_beta_fast", "rope_scaling.beta_fast", 1e-3, 1e6, &fast,
                          &c->rope_beta_fast, err));
    ORCD_TRY(arch_get_num(f, "rope.scaling.yarn_beta_slow", "rope_scaling.beta_slow", 1e-3, 1e6, &slow,
                          &c->rope_beta_slow, err));
    ORCD_TRY(arch_get_int(f, "rope.scaling.original_context_length", "rope_scaling.original_max_position_embeddings", 1,
                          1 << 24, &orig, &c->rope_n_ctx_orig, err));
    /* OpenAI and transformers do not round the ramp for these models ("truncate": false) */
    mf_bool(f, NULL, "rope_scaling.truncate", &c->rope_truncate);
    return ORCD_OK;
}

static orcd_status config(const mf_file *f, arch_config *c, orcd_error *err) {
    double eps = 1e-5, limit = 7;
    c->glu_alpha = 1.702f;
    ORCD_TRY(arch_get_int(f, "block_count", "num_hidden_layers", 1, ARCH_MAX_LAYERS, NULL, &c->n_layer, err));
    ORCD_TRY(arch_get_int(f, "embedding_length", "hidden_size", 1, 65536, NULL, &c->n_embd, err));
    ORCD_TRY(arch_get_int(f, "attention.head_count", "num_attention_heads", 1, 1024, NULL, &c->n_head, err));
    ORCD_TRY(arch_get_int(f, "attention.head_count_kv", "num_key_value_heads", 1, 1024, NULL, &c->n_kv_head, err));
    int64_t head_dim = c->n_embd / c->n_head; /* only when the file does not say */
    ORCD_TRY(arch_get_int(f, "attention.key_length", "head_dim", 2, 512, &head_dim, &c->head_dim, err));
    int value_dim;
    head_dim = c->head_dim;
    ORCD_TRY(arch_get_int(f, "attention.value_length", "head_dim", 2, 512, &head_dim, &value_dim, err));
    if (c->n_head % c->n_kv_head || c->head_dim % 2 || value_dim != c->head_dim)
        return orcd_fail(
            err, ORCD_ERR_FORMAT,
            "%d query heads do not share %d key/value heads evenly, or head sizes %d and %d differ or are odd",
            c->n_head, c->n_kv_head, c->head_dim, value_dim);
    int64_t ff = 0;
    mf_u64(f, "feed_forward_length", NULL, (uint64_t *)&ff);
    ORCD_TRY(arch_get_int(f, "expert_feed_forward_length", "intermediate_size", 1, 1 << 20, ff > 0 ? &ff : NULL,
                          &c->n_ff, err));
    ORCD_TRY(arch_get_int(f, "expert_count", "num_local_experts", 1, 1024, NULL, &c->n_expert, err));
    ORCD_TRY(arch_get_int(f, "expert_used_count", "num_experts_per_tok", 1, 64, NULL, &c->n_expert_used, err));
    if (c->n_expert_used > c->n_expert)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%d experts per token of only %d", c->n_expert_used, c->n_expert);
    ORCD_TRY(arch_get_int(f, "context_length", "max_position_embeddings", 1, 1 << 20, NULL, &c->n_ctx, err));
    ORCD_TRY(arch_get_num(f, "attention.layer_norm_rms_epsilon", "rms_norm_eps", 0, 1, &eps, &eps, err));
    ORCD_TRY(arch_get_num(f, "swiglu_limit", "swiglu_limit", 1e-3, 1e6, &limit, &limit, err));
    c->norm_eps = (float)eps;
    c->glu_limit = (float)limit;
    ORCD_TRY(arch_get_vocab(f, "token_embd.weight", "model.embed_tokens.weight", &c->n_vocab, err));
    ORCD_TRY(read_rope(f, c, err));
    return read_windows(f, c, err);
}

/* The shortest period that says which layers are full; 0 when none does. */
static int window_period(const arch_config *c) {
    for (int period = 1; period <= c->n_layer + 1; period++) {
        bool fits = true;
        for (int i = 0; i < c->n_layer; i++)
            fits = fits && (c->window[i] > 0) == (i % period < period - 1);
        if (fits)
            return period;
    }
    return 0;
}

static orcd_status put_keys(const arch_config *c, gguf_writer *w, orcd_error *err) {
    const arch *a = &arch_gptoss;
    int period = window_period(c), window = 128;
    if (c->rope_truncate)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "rope_scaling.truncate is true in config.json; GGUF has no key for it, gpt-oss has false");
    if (!period)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "layer_types of config.json has no period; GGUF knows only every n-th layer full");
    for (int i = 0; i < c->n_layer; i++)
        window = c->window[i] ? c->window[i] : window;
    arch_put_int(a, w, "block_count", c->n_layer);
    arch_put_int(a, w, "context_length", c->n_ctx);
    arch_put_int(a, w, "embedding_length", c->n_embd);
    arch_put_int(a, w, "feed_forward_length", c->n_ff);
    arch_put_int(a, w, "attention.head_count", c->n_head);
    arch_put_int(a, w, "attention.head_count_kv", c->n_kv_head);
    arch_put_int(a, w, "attention.key_length", c->head_dim);
    arch_put_int(a, w, "attention.value_length", c->head_dim);
    arch_put_num(a, w, "attention.layer_norm_rms_epsilon", c->norm_eps);
    arch_put_int(a, w, "attention.sliding_window", window);
    if (period != 2)
        arch_put_int(a, w, "attention.sliding_window_pattern", period);
    arch_put_int(a, w, "expert_count", c->n_expert);
    arch_put_int(a, w, "expert_used_count", c->n_expert_used);
    arch_put_int(a, w, "expert_feed_forward_length", c->n_ff);
    if (c->glu_limit != 7)
        arch_put_num(a, w, "swiglu_limit", c->glu_limit);
    arch_put_int(a, w, "rope.dimension_count", c->head_dim);
    arch_put_num(a, w, "rope.freq_base", c->rope_base);
    arch_put_str(a, w, "rope.scaling.type", c->rope_factor > 1 ? "yarn" : "none");
    if (c->rope_factor > 1) {
        arch_put_num(a, w, "rope.scaling.factor", c->rope_factor);
        arch_put_int(a, w, "rope.scaling.original_context_length", c->rope_n_ctx_orig);
        arch_put_num(a, w, "rope.scaling.yarn_beta_fast", c->rope_beta_fast);
        arch_put_num(a, w, "rope.scaling.yarn_beta_slow", c->rope_beta_slow);
    }
    return ORCD_OK;
}

/* YaRN (Peng et al. 2023): low frequencies are interpolated by the factor, high ones kept, a ramp between. */
static void setup(arch_model *m) {
    const arch_config *c = &m->cfg;
    int half = c->head_dim / 2;
    double per_turn = half / log(c->rope_base);
    double low = per_turn * log(c->rope_n_ctx_orig / (c->rope_beta_fast * 2 * M_PI));
    double high = per_turn * log(c->rope_n_ctx_orig / (c->rope_beta_slow * 2 * M_PI));
    if (c->rope_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, c->head_dim - 1);
    if (low == high)
        high += 0.001;
    for (int i = 0; i < half; i++) {
        double freq = pow(c->rope_base, -(double)i / half);
        double ramp = fmin(fmax((i - low) / (high - low), 0), 1);
        m->inv_freq[i] = (float)(freq / c->rope_factor * ramp + freq * (1 - ramp));
    }
    for (int i = 0; i < c->n_layer; i++) {
        m->attn[i].rotary = true;
        m->attn[i].inv_freq = m->inv_freq;
        m->attn[i].rope_scale = c->rope_factor > 1 ? (float)(0.1 * log(c->rope_factor) + 1) : 1;
        m->attn[i].sinks = m->layer[i].sinks;
    }
}

static be_act *forward(arch_model *m, be_step *s) {
    const arch_config *c = &m->cfg;
    const arch_acts *a = &m->act;
    const be_glu glu = {c->glu_alpha, c->glu_limit};

    be_embed(s, m->g.embd, NULL, a->x);
    arch_tap(m, s, "embed", -1, a->x);
    for (int i = 0; i < c->n_layer; i++) {
        const arch_layer *l = &m->layer[i];
        const be_norm attn_norm = {BE_NORM_RMS, c->norm_eps, l->attn_norm, NULL};
        const be_norm ffn_norm = {BE_NORM_RMS, c->norm_eps, l->ffn_norm, NULL};

        be_attn_in(s, &attn_norm, l->qkv, &m->attn[i], a->x, a->normed, a->qkv);
        be_attention(s, &m->attn[i], a->qkv, a->att);
        arch_tap(m, s, "attention", i, a->att);
        be_linear(s, l->attn_out, a->att, a->x, BE_EPI_ADD);
        arch_tap(m, s, "attn_out", i, a->x);
        be_moe(s, &ffn_norm, l->router, c->n_expert_used, l->gate_up, l->down, &glu, a->normed, a->route, a->x);
        arch_tap(m, s, "layer", i, a->x);
    }
    const be_norm out_norm = {BE_NORM_RMS, c->norm_eps, m->g.out_norm, NULL};
    be_gather_out(s, a->x, a->out);
    be_norm_linear(s, &out_norm, m->g.head, a->out, a->out_normed, a->logits, BE_EPI_NONE);
    return a->logits;
}

const arch arch_gptoss = {
    .name = "gpt-oss",
    .aliases = aliases,
    .config = config,
    .put_keys = put_keys,
    .gguf_layer = "blk.%d.",
    .hf_layer = "model.layers.%d.",
    .hf_prefix = "",
    .global_slots = global_slots,
    .layer_slots = layer_slots,
    .setup = setup,
    .forward = forward,
};
