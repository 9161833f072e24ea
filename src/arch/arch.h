/* arch/arch.h: architectures: hyperparameters, weights and forward(). May include backend, format, quant, base.
 * One file per architecture (gptoss.c, gpt2.c) and one line in list.def. */
#ifndef ORCD_ARCH_ARCH_H
#define ORCD_ARCH_ARCH_H

#include <stdbool.h>
#include <stdint.h>

#include "backend/backend.h"
#include "format/model_file.h"

#define ARCH_MAX_LAYERS 1024

/* Range-checked as a whole when it was read: no field is used unchecked after arch_config_read. */
typedef struct arch_config {
    int n_layer, n_embd, n_head, n_kv_head, head_dim, n_ff, n_vocab;
    int n_ctx;                   /* positions that the model was made for */
    int n_expert, n_expert_used; /* 0 without experts */
    int window[ARCH_MAX_LAYERS]; /* per layer: 0 = full attention, else the sliding window including self */
    float norm_eps;
    double rope_base, rope_factor, rope_beta_fast, rope_beta_slow;
    int rope_n_ctx_orig;
    bool rope_truncate;
    float glu_alpha, glu_limit;
    bool gelu_tanh;
    int n_host_layers; /* a choice, not the model's: layers, from the last, whose experts stay in host memory */
} arch_config;

typedef struct arch arch;
typedef struct arch_model arch_model;

/* Parameters and bytes by weight type, for inspect and plan. */
typedef struct arch_size {
    uint64_t n_param, n_param_active; /* per token: experts used only */
    uint64_t weight_bytes;            /* as stored */
    uint64_t kv_bytes_per_token;      /* F16, layers without window */
    uint64_t kv_bytes_window;         /* F16, per sequence, window layers */
} arch_size;

/* What this file is. Fails with a sentence naming what was found and what is supported. */
orcd_status arch_identify(const mf_file *f, const arch **out, orcd_error *err) ORCD_MUST_USE;
const char *arch_name(const arch *a); /* "gpt-oss", "gpt2" */
orcd_status arch_config_read(const arch *a, const mf_file *f, arch_config *out, orcd_error *err) ORCD_MUST_USE;
/* Sizes from the configuration and the file's types; every weight's shape is checked against the configuration. */
orcd_status arch_measure(const arch *a, const mf_file *f, const arch_config *c, arch_size *out,
                         orcd_error *err) ORCD_MUST_USE;

typedef struct arch_memory {
    uint64_t weights, acts /* and what steps need beside them */, kv; /* on the device */
    uint64_t host;                                                    /* experts that stay in host memory */
    uint64_t every_step, experts; /* of the weights: read by every step; experts, which a row reads a few of */
} arch_memory;

/* Memory that arch_load and kv_open would take on a device of this kind, which may be a dry one, before anything is
 * allocated. s: as for kv_open. Exact where the backend has `used`. */
orcd_status arch_plan(const arch *a, const mf_file *f, const arch_config *c, be_device *dev, const be_kv_spec *s,
                      arch_memory *out, orcd_error *err) ORCD_MUST_USE;
/* Activations of steps of at most max_tok rows and max_out outputs, as floats: an upper bound. */
uint64_t arch_act_bytes(const arch_config *c, int max_tok, int max_out);
/* Fill the model's part of a KV spec: layers, heads, windows. spec->window points into the configuration. */
void arch_kv_spec(const arch_config *c, be_kv_spec *spec);

/* One stored matrix or vector of a model, under its GGUF name. */
typedef struct arch_tensor {
    char name[96];
    int layer; /* -1: belongs to the whole model */
    be_use use;
    bool exact; /* norm, bias, sink, router or position: F32 in every mix, as llama.cpp writes it */
    bool tied;  /* the first file does without: the token embedding serves */
    uint32_t n_dims;
    uint64_t ne[3]; /* as GGUF counts: fastest dimension first */
} arch_tensor;

/* data[i]: the tensor in file i, valid during the call. A bias is read whole with mf_floats, its rows have no meaning.
 */
typedef orcd_status (*arch_tensor_fn)(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err);

/* Walk the weights of n_file (0 to 2) files of one architecture and configuration side by side; without files the
 * tensors are only described. Every shape is checked against the configuration. */
orcd_status arch_each_tensor(const arch *a, const arch_config *c, int n_file, const mf_file *const *file,
                             arch_tensor_fn fn, void *ctx, orcd_error *err) ORCD_MUST_USE;

typedef void (*arch_progress)(void *ctx, uint64_t done, uint64_t total); /* bytes as stored */

/* Load every weight onto the device and make the activations for steps of at most max_tok rows, max_out outputs. */
orcd_status arch_load(const arch *a, const mf_file *f, const arch_config *c, be_device *dev, int max_tok, int max_out,
                      arch_progress progress, void *ctx, arch_model **out, orcd_error *err) ORCD_MUST_USE;
void arch_unload(arch_model *m);

const arch_config *arch_config_of(const arch_model *m);
/* Record the whole model; the logits of the batch's output rows, [n_out, n_vocab] F32, are in the returned
 * activation after step_end. */
be_act *arch_forward(arch_model *m, be_step *s);
/* Ask forward to tap its named intermediates (parity tests); NULL switches off. */
void arch_set_tap(arch_model *m, be_tap_fn fn, void *ctx);

#endif
