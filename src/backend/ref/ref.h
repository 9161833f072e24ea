/* backend/ref: the reference: every operation as one obvious loop nest with sums in double, executed when it is
 * recorded. What the other backends are compared with, and the checker of the contract: a batch or a shape that
 * breaks backend.h fails here with a sentence.
 *
 * Activations are floats. Weights stay where the file is mapped and are unpacked row by row. KV pages hold floats,
 * rounded to half precision when the cache is F16. */
#ifndef ORCD_BACKEND_REF_REF_H
#define ORCD_BACKEND_REF_REF_H

#include "backend/backend.h"

typedef struct ref_weight {
    be_weight base;
    int n_part;
    mf_tensor part[3];
    const q_traits *q[3];
    float *bias;    /* [n_mat][n_row], zeros without bias; VECTOR: unused */
    float *vector;  /* VECTOR: the values */
    uint8_t *bytes; /* scratch: one canonical row */
    float *rows;    /* scratch: one row, or the n_row rows of one expert */
    double *out;    /* scratch: [n_row] */
    float *hidden;  /* scratch: [n_row] */
} ref_weight;

typedef struct ref_act {
    be_act base;
    int64_t stride; /* floats per row: width, or 2 * width (id, weight) for routes */
    float *data;
} ref_act;

typedef struct ref_kv {
    be_kv base;
    int *pool, *index;          /* [n_layer]: where a layer lives: its pool, and which of the pool's layers it is */
    int n_layer[BE_N_POOLS];    /* layers of a pool */
    int window[BE_N_POOLS];     /* the longest window of a pool's layers; 0 = full */
    int n_entry;                /* table entries per slot */
    int32_t *table[BE_N_POOLS]; /* [n_slot][n_entry] */
    float *page[BE_N_POOLS];    /* [n_page][n_layer of the pool][K, V][BE_PAGE][n_kv_head][head_dim] */
    double *score;              /* scratch: [n_ctx] */
    double *value;              /* scratch: [head_dim] */
} ref_kv;

typedef struct ref_step {
    be_step base;
    orcd_error error; /* the first failure of an operation; code ORCD_OK = none */
} ref_step;

extern const be_ops be_ops_ref;

/* Remember the first failure; returns `ok`. Operations return at once when it is false. */
bool ref_check(be_step *s, bool ok, orcd_status code, const char *what);
/* y is about to be written with n_row rows of `width`: checks that they fit and sets n_row. */
bool ref_output(be_step *s, be_act *y, int64_t n_row, int64_t width, const char *what);
float *ref_at(const be_act *a, int64_t row);

/* Row r of matrix m as floats, r counted over all parts. */
void ref_row(ref_weight *w, int64_t m, int64_t r, float *dst);
double ref_dot(const float *a, const float *b, int64_t n);

/* K (which = 0) or V (1) of a position: [n_kv_head * head_dim]. The page must be mapped. */
float *ref_kv_at(const ref_kv *kv, int layer, int slot, int pos, int which);

uint64_t ref_load_bytes(be_device *d, const be_load *l);
orcd_status ref_load(be_device *d, const be_load *l, be_weight **out, orcd_error *err) ORCD_MUST_USE;
void ref_unload(be_device *d, be_weight *w);

uint64_t ref_kv_page_bytes(be_device *d, const be_kv_spec *s, int pool);
orcd_status ref_kv_open(be_device *d, const be_kv_spec *s, be_kv **out, orcd_error *err) ORCD_MUST_USE;
void ref_kv_close(be_device *d, be_kv *kv);
void ref_kv_map(be_kv *kv, int pool, int slot, int index, int32_t page);
void ref_kv_copy_page(be_kv *kv, int pool, int32_t dst, int32_t src);
orcd_status ref_kv_read_page(be_kv *kv, int pool, int32_t page, void *dst, orcd_error *err) ORCD_MUST_USE;
orcd_status ref_kv_write_page(be_kv *kv, int pool, int32_t page, const void *src, orcd_error *err) ORCD_MUST_USE;
orcd_status ref_step_begin(be_device *d, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err) ORCD_MUST_USE;
orcd_status ref_step_end(be_step *s, orcd_error *err) ORCD_MUST_USE;

void ref_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y);
void ref_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y);
void ref_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e);
void ref_gather_out(be_step *s, const be_act *x, be_act *y);
void ref_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx);
void ref_rope(be_step *s, const be_attn *a, be_act *qkv);
void ref_kv_write(be_step *s, const be_attn *a, const be_act *qkv);
void ref_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y);
void ref_route(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route);
void ref_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                 const be_act *route, be_act *y);

#endif
