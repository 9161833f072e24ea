/* arch/model.h: what the architectures share: the weight table, the loaded model and its activations. Private to arch/.
 */
#ifndef ORCD_ARCH_MODEL_H
#define ORCD_ARCH_MODEL_H

#include "arch/arch.h"
#include "backend/compose.h"

/* A dimension of a weight, by name, so that the table below reads like the model's description. */
typedef enum arch_dim {
    DIM_1,
    DIM_EMBD,
    DIM_Q,
    DIM_KV,
    DIM_QKV,
    DIM_HEADS,
    DIM_FF,
    DIM_EXPERTS,
    DIM_VOCAB,
    DIM_CTX
} arch_dim;

/* How Hugging Face stores it when not as [n_row][n_col]. */
enum {
    HF_CONV1D = 1, /* [n_col][n_row]: GPT-2's Conv1D */
    HF_EVEN = 2,   /* rows 0, 2, 4 ... of a tensor twice as high: the gate of gate_up_proj */
    HF_ODD = 4,    /* rows 1, 3, 5 ...: the up of gate_up_proj */
    TIED = 8,      /* absent: the token embedding serves */
};

/* One stored matrix. Names without the layer prefix and without ".weight"; the bias is NAME.bias in GGUF, and
 * hf_bias in Hugging Face folders. */
typedef struct arch_part {
    const char *gguf, *hf, *hf_bias; /* hf_bias NULL: no bias */
    arch_dim row, col;
    int flags;
} arch_part;

typedef struct arch_slot { /* one be_weight of the model: ends with a slot of no parts */
    size_t field;          /* offset of its pointer in arch_layer or arch_globals */
    be_use use;
    arch_part part[3];
} arch_slot;

typedef struct arch_layer {
    be_weight *attn_norm, *attn_norm_bias, *qkv, *sinks, *attn_out;
    be_weight *ffn_norm, *ffn_norm_bias, *router, *gate_up, *up, *down;
} arch_layer;

typedef struct arch_globals {
    be_weight *embd, *pos_embd, *out_norm, *out_norm_bias, *head;
} arch_globals;

typedef struct arch_acts {    /* width in comments; rows: max_tok, for the last two max_out */
    be_act *x;                /* [n_embd] residual stream */
    be_act *normed;           /* [n_embd] */
    be_act *qkv;              /* [(n_head + 2 n_kv_head) * head_dim] */
    be_act *att;              /* [n_head * head_dim] */
    be_act *hidden;           /* [n_ff], without experts */
    be_act *route;            /* [n_expert_used], with experts */
    be_act *out, *out_normed; /* [n_embd] rows whose logits are wanted */
    be_act *logits;           /* [n_vocab] */
} arch_acts;

struct arch_model {
    const arch *arch;
    arch_config cfg;
    be_device *dev;
    arch_globals g;
    arch_layer *layer; /* [n_layer] */
    be_attn *attn;     /* [n_layer] */
    float *inv_freq;   /* [head_dim / 2] */
    arch_acts act;
    uint64_t weight_bytes; /* on the device */
    be_tap_fn tap;
    void *tap_ctx;
};

struct arch {
    const char *name;           /* GGUF's general.architecture */
    const char *const *aliases; /* other spellings, ends with NULL */
    orcd_status (*config)(const mf_file *f, arch_config *c, orcd_error *err);
    /* The configuration as GGUF keys; fails when GGUF has no word for it. */
    orcd_status (*put_keys)(const arch_config *c, gguf_writer *w, orcd_error *err);
    const char *gguf_layer, *hf_layer; /* "blk.%d.", "model.layers.%d." */
    const char *hf_prefix;             /* before every HF name, tried without it too: "transformer." */
    const arch_slot *global_slots, *layer_slots;
    void (*setup)(arch_model *m); /* derived values such as inv_freq */
    be_act *(*forward)(arch_model *m, be_step *s);
};

/* Named intermediates for parity tests; nothing when no tap is set. */
static inline void arch_tap(arch_model *m, be_step *s, const char *name, int layer, const be_act *a) {
    if (m->tap)
        s->dev->ops->tap(s, name, layer, a, m->tap, m->tap_ctx);
}

static inline bool arch_is_experts(const arch_tensor *t) { return t->use == BE_USE_GATE_UP || t->use == BE_USE_DOWN; }

/* Write "<architecture>.KEY". */
void arch_put_int(const arch *a, gguf_writer *w, const char *key, int v);
void arch_put_num(const arch *a, gguf_writer *w, const char *key, double v);
void arch_put_str(const arch *a, gguf_writer *w, const char *key, const char *v);

/* Integer and float configuration values with a stated range; fail with a sentence naming key, value and range. */
orcd_status arch_get_int(const mf_file *f, const char *gguf_key, const char *hf_key, int64_t lo, int64_t hi,
                         const int64_t *fallback, int *out, orcd_error *err) ORCD_MUST_USE;
orcd_status arch_get_num(const mf_file *f, const char *gguf_key, const char *hf_key, double lo, double hi,
                         const double *fallback, double *out, orcd_error *err) ORCD_MUST_USE;
/* Rows of the token embedding: the vocabulary as stored. */
orcd_status arch_get_vocab(const mf_file *f, const char *gguf_name, const char *hf_name, int *out,
                           orcd_error *err) ORCD_MUST_USE;

#endif
