/* backend/backend.h: the operations that a model is made of, and what a backend implements. May include
 * base, quant and format. Model code (arch/) calls the be_* functions of compose.h, never the table.
 *
 * A backend RECORDS: operations between step_begin and step_end describe work on a flat ragged batch and may run
 * at once (ref), in step_end (cpu: all workers walk the list) or on a stream (cuda). They take handles, keep no
 * hidden state, never allocate and never fail by themselves: a failure is reported by step_end.
 *
 * Determinism (every backend, tested): a row's results depend on that row, its sequence's KV and the weights
 * only: never on the other rows of the batch, on how a prompt was cut into chunks, or on the thread count. So every
 * reduction has an order that is a function of shapes and absolute positions alone. */
#ifndef ORCD_BACKEND_BACKEND_H
#define ORCD_BACKEND_BACKEND_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "format/model_file.h"
#include "quant/quant.h"

typedef struct be_ops be_ops;

typedef struct be_params {
    int n_threads;     /* cpu: 0 = all cores allowed to this process */
    int device;        /* cuda: ordinal */
    bool no_repack;    /* start at once from the mapped file, slower steps */
    int act_bits;      /* cpu: 8 lets products with integer weights round activations to 8 bits: prefill nearly twice as
                          fast, 0.5 % of noise in each product. Else 16 */
    q_type dense_type; /* cpu: dense weights (be_load) that are stored in more bits are requantised to this type when
                          loaded; Q_F32 = none is */
    int cpu_experts;   /* cuda: layers whose experts stay in host memory; -1 = as many as needed */
    bool dry;          /* nothing is allocated and no hardware is needed, where the backend has `used`: what is made can
                          only be freed, and `used` tells what it would take */
} be_params;

typedef struct be_device { /* first member of each backend's own struct */
    const be_ops *ops;
    be_params params; /* as it was opened, so that a dry one can be opened like it */
} be_device;

/* ---- weights ---- */

typedef enum be_use {
    BE_USE_VECTOR,  /* float vector read whole: norms, sinks. One part, n_row = 1 */
    BE_USE_EMBED,   /* rows are gathered */
    BE_USE_LINEAR,  /* y = W x + b; parts are stacked by rows (q, k, v) and may differ in type */
    BE_USE_GATE_UP, /* experts: part 0 = gate, part 1 = up, each [n_mat][n_ff][n_embd] */
    BE_USE_DOWN,    /* experts: one part [n_mat][n_embd][n_ff] */
} be_use;

typedef struct be_load {
    be_use use;
    int n_part;        /* 1..3 */
    mf_tensor part[3]; /* equal n_col and n_mat */
    bool has_bias[3];
    mf_tensor bias[3]; /* bias[i]: part[i].n_mat * part[i].n_row values */
    bool dense;        /* be_params.dense_type may lower the precision of its parts: not a router's */
    bool host;         /* experts: stay in host memory, where the device has a way to compute there (cuda) */
    bool head;         /* its products are the logits, see be_batch.best */
} be_load;

typedef struct be_weight { /* first member of each backend's own struct */
    be_use use;
    q_type type;                 /* of part 0 */
    int64_t n_col, n_row, n_mat; /* n_row summed over parts */
    uint64_t bytes;              /* memory it occupies on the device */
} be_weight;

/* ---- activations: [n_row][width] on the device ---- */

typedef enum be_form {
    BE_ACT_F32,   /* float, row-major: the residual stream and logits */
    BE_ACT_FREE,  /* the backend's own precision and layout: normed rows, q/k/v, attention output */
    BE_ACT_ROUTE, /* width experts per row: chosen ids and their weights */
} be_form;

typedef struct be_act { /* first member of each backend's own struct */
    be_form form;
    int64_t width, cap_row;
    int64_t n_row; /* set by the operation that writes it: n_tok or n_out of the step */
} be_act;

/* ---- KV cache: pages of BE_PAGE positions in two pools ---- */

#define BE_PAGE 64
enum { BE_POOL_FULL, BE_POOL_WINDOW, BE_N_POOLS };

/* ref and cpu: F16 and F32. Q8, cuda: 8-bit integers, a scale for each position, KV head, and K and V */
typedef enum be_kv_type { BE_KV_F16, BE_KV_F32, BE_KV_Q8 } be_kv_type;

/* A page holds K (after RoPE) and V of 64 consecutive positions for ALL layers of its pool: layers without a
 * window live in BE_POOL_FULL, layers with one in BE_POOL_WINDOW. Position p of sequence slot s is in page
 * table[pool][s][p / 64] at p % 64. The engine owns the mapping, frees window pages that slid out, and may map one
 * page in several slots (prefix cache): a page that is shared is never written. What a page held before, NaN included,
 * never reaches a result. */
typedef struct be_kv_spec {
    int n_layer, n_kv_head, head_dim;
    const int *window; /* [n_layer]: 0 = full attention, else window length including self */
    be_kv_type type;
    int n_slot; /* sequences in flight */
    int n_ctx;  /* positions per sequence; tables have ceil(n_ctx / 64) entries */
    int n_page[BE_N_POOLS];
    int max_tok, max_out; /* of one step */
} be_kv_spec;

typedef struct be_kv { /* first member of each backend's own struct */
    be_kv_spec spec;   /* with its own copy of window */
    uint64_t page_bytes[BE_N_POOLS];
} be_kv;

/* ---- one step ---- */

/* Rows of one sequence are contiguous, their positions consecutive; a slot occurs once. Arrays stay valid until
 * step_end returns. Every page that a row reads or writes is mapped before step_begin. */
typedef struct be_batch {
    int n_tok; /* 1..max_tok */
    const int32_t
        *token; /* [n_tok]; BE_TOKEN_OF(k): what the last step sampled for its k-th output row (needs ops->sample) */
    const int32_t *pos;     /* [n_tok] */
    const int32_t *slot;    /* [n_tok] */
    int n_out;              /* 0..max_out: rows whose logits are wanted */
    const int32_t *out_row; /* [n_out], ascending */
    bool best;              /* of each row's logits only the largest is looked at: smaller ones may become -INFINITY */
} be_batch;
#define BE_TOKEN_OF(k) (-1 - (k))

typedef struct be_step { /* first member of each backend's own struct */
    be_device *dev;
    be_kv *kv;
    be_batch batch;
} be_step;

typedef enum be_norm_kind { BE_NORM_RMS, BE_NORM_LAYER } be_norm_kind;
typedef struct be_norm {
    be_norm_kind kind;
    float eps;
    const be_weight *weight; /* [n_embd] */
    const be_weight *bias;   /* LAYER only, may be NULL */
} be_norm;

typedef enum be_epilogue { BE_EPI_NONE, BE_EPI_ADD /* y += */, BE_EPI_GELU_TANH, BE_EPI_GELU_ERF } be_epilogue;

typedef struct be_attn { /* a layer's attention, for rope, kv_write and attention */
    int layer, n_head, n_kv_head, head_dim;
    int window;             /* 0 = full; key k is visible to query q iff 0 <= q - k < window */
    float scale;            /* on q.k; sinks are not scaled */
    const be_weight *sinks; /* [n_head] or NULL: an extra softmax column without value */
    bool rotary;            /* rotate the q and k heads of qkv, split halves (NeoX) */
    const float *inv_freq;  /* [head_dim / 2] host memory, lives as long as the model; YaRN already blended in */
    float rope_scale;       /* multiplies cos and sin (YaRN's attention factor) */
} be_attn;

typedef struct be_glu { /* gpt-oss: g = min(g, limit), u = clamp(u, +-limit), g * sigmoid(alpha g) * (u + 1) */
    float alpha, limit;
} be_glu;

/* A logit that is not drawn from as it is. */
typedef struct be_edit {
    int32_t id;
    float bias;    /* added first */
    int32_t n_new; /* times it was generated */
    bool in_prompt;
} be_edit;

/* What the sampler of a device needs for one output row; see engine/sampler.h for the order of application. Zeroes are
 * the best token and nothing else. */
typedef struct be_sample {
    float temperature; /* 0 = greedy */
    float top_p, min_p;
    int32_t top_k;
    uint64_t seed, draw;  /* Philox counter: draw-th number of the sequence */
    const be_edit *edit;  /* [n_edit], each id once */
    const uint32_t *mask; /* only with `masked`: bitset of the ids that are allowed, NULL = all; told by `allow` */
    int32_t n_edit;
    bool masked;
    bool penalties; /* these three are applied. A row whose own token is BE_TOKEN_OF was not told of it: it is generated
                       once more than `edit` says */
    float repetition, presence, frequency;
    bool given; /* the next token is `id` and not drawn */
    bool likely;
    int32_t id, n_top; /* n_top: of be_likely, at most BE_MAX_TOP and the vocabulary */
} be_sample;

/* What the log-probability of a row's token is made of, from its logits as they were computed. */
#define BE_MAX_TOP 20
typedef struct be_likely {
    float logit, max;
    double sum; /* of exp(logit - max) over the vocabulary, in the order of engine/softmax.h */
    int32_t top_id[BE_MAX_TOP];
    float top[BE_MAX_TOP]; /* the n_top largest logits, lower ids first among equal ones */
} be_likely;

typedef void (*be_tap_fn)(void *ctx, const char *name, int layer, int64_t n_row, int64_t width, const float *value);

struct be_ops {
    const char *name; /* "ref", "cpu", "cuda" */

    orcd_status (*open)(const be_params *p, be_device **out, orcd_error *err);
    void (*close)(be_device *d);
    void (*describe)(be_device *d, char *text, size_t cap); /* "cpu: 2 threads, AVX-512 VNNI" */
    void (*memory)(be_device *d, uint64_t *total, uint64_t *available);

    /* Memory that load would take, before anything is allocated. */
    uint64_t (*load_bytes)(be_device *d, const be_load *l);
    orcd_status (*load)(be_device *d, const be_load *l, be_weight **out, orcd_error *err);
    void (*unload)(be_device *d, be_weight *w);

    orcd_status (*act_new)(be_device *d, be_form form, int64_t cap_row, int64_t width, be_act **out, orcd_error *err);
    void (*act_free)(be_device *d, be_act *a);
    /* Between steps, for tests and for logits on the host: rows as float (BE_ACT_ROUTE: id, weight pairs). */
    orcd_status (*act_read)(be_device *d, const be_act *a, int64_t row, int64_t n, float *dst, orcd_error *err);
    /* Any form; n_row becomes row + n, so that operations take what was written as their input. */
    orcd_status (*act_write)(be_device *d, be_act *a, int64_t row, int64_t n, const float *src, orcd_error *err);
    /* F32 rows without a copy where the host can address them, else NULL. */
    const float *(*act_host)(be_device *d, const be_act *a);

    uint64_t (*kv_page_bytes)(be_device *d, const be_kv_spec *s, int pool);
    orcd_status (*kv_open)(be_device *d, const be_kv_spec *s, be_kv **out, orcd_error *err);
    void (*kv_close)(be_device *d, be_kv *kv);
    void (*kv_map)(be_kv *kv, int pool, int slot, int index, int32_t page);                     /* -1 unmaps */
    void (*kv_copy_page)(be_kv *kv, int pool, int32_t dst, int32_t src);                        /* ordered with steps */
    orcd_status (*kv_read_page)(be_kv *kv, int pool, int32_t page, void *dst, orcd_error *err); /* page_bytes[pool] */
    orcd_status (*kv_write_page)(be_kv *kv, int pool, int32_t page, const void *src, orcd_error *err);

    orcd_status (*step_begin)(be_device *d, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err);
    /* Everything recorded is done (or, with `sample`, submitted) when this returns; the step is gone. */
    orcd_status (*step_end)(be_step *s, orcd_error *err);

    /* required operations; n rows = rows of the input */
    void (*embed)(be_step *s, const be_weight *table, const be_weight *pos_table,
                  be_act *y); /* pos_table may be NULL */
    void (*norm)(be_step *s, const be_norm *n, const be_act *x, be_act *y);
    void (*linear)(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e);
    void (*rope)(be_step *s, const be_attn *a, be_act *qkv); /* rows: q heads, k heads, v heads */
    void (*kv_write)(be_step *s, const be_attn *a, const be_act *qkv);
    void (*attention)(be_step *s, const be_attn *a, const be_act *qkv, be_act *y /* [n_tok, n_head * head_dim] */);
    /* top-k of W x + b (ties: lower id first), softmax over the chosen */
    void (*route)(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route);
    /* y += sum over chosen experts of weight * (down(glu(gate_up x)) + bias) */
    void (*experts)(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                    const be_act *route, be_act *y);
    void (*gather_out)(be_step *s, const be_act *x, be_act *y); /* y[i] = x[out_row[i]] */
    void (*tap)(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx);

    /* optional fused operations, NULL = composed of the required ones (compose.c); equal within tolerance, tested */
    void (*norm_linear)(be_step *s, const be_norm *n, const be_weight *w, const be_act *x, be_act *tmp, be_act *y,
                        be_epilogue e);
    void (*attn_in)(be_step *s, const be_norm *n, const be_weight *wqkv, const be_attn *a, const be_act *x, be_act *tmp,
                    be_act *qkv);
    void (*moe)(be_step *s, const be_norm *n, const be_weight *router, int top_k, const be_weight *gate_up,
                const be_weight *down, const be_glu *g, be_act *tmp, be_act *route, be_act *x);

    /* optional device sampling: one id per output row, without a host round trip; -1 where a logit is not a number
     * or nothing is allowed.
     * `row` and what it points to stay valid until step_end returns. `sampled` waits for the oldest step with `sample`
     * that it has not answered for; at most two are open, so that the next step can be submitted first. `likely`, which
     * may be NULL, gets the rows that asked for it. Results are those of engine/sampler.h.
     * What is allowed may depend on a token that the host has yet to see: a step with `masked` rows is drawn when
     * `allow` is called, after its step_end and before the next step_begin, with the same rows and their masks. */
    void (*sample)(be_step *s, const be_act *logits, const be_sample *row /* [n_out] */);
    orcd_status (*allow)(be_device *d, const be_sample *row /* [n_out] */, orcd_error *err);
    orcd_status (*sampled)(be_device *d, int32_t *id /* [n_out of that step] */, be_likely *likely /* [n_out] */,
                           orcd_error *err);

    /* optional: bytes on the device of all that was made on it and not freed: weights, activations, caches, and what
     * steps need beside them, which kv_open makes. NULL: load_bytes, kv_page_bytes and floats of activations are all.
     */
    uint64_t (*used)(be_device *d);
    /* optional: all of that still lies in the device's own memory */
    orcd_status (*resident)(be_device *d, orcd_error *err);
};

/* The backends of this build: list.def. NULL when the name is none of them. */
const be_ops *be_find(const char *name);
/* The same for "cpu", "cuda", "cuda:1" ...; *ordinal becomes the number, or stays as it is without one. */
const be_ops *be_named(const char *device, int *ordinal);
/* Open what be_named finds, or for "auto" the first of cuda, cpu and ref that opens. */
orcd_status be_open(const char *device, const be_params *p, be_device **out, orcd_error *err) ORCD_MUST_USE;
size_t be_count(void);
const be_ops *be_at(size_t i);

#endif
