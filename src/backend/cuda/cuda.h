/* backend/cuda/cuda.h: the CUDA backend's own structures. Private to backend/cuda.
 *
 * A step is recorded as a list of commands (step.cu). step_end either finds the list among the recorded CUDA graphs and
 * replays one, or launches the commands, capturing them on the way when the step is small. So every kernel takes sizes
 * that a graph fixes from its arguments, and everything that changes from step to step from device memory: the batch
 * header, tokens, positions, page tables, routing.
 *
 * One arithmetic for every number of rows, so that results do not depend on the batch: a product is a chain of
 * mma.m16n8k16 over columns in ascending order, cut into at most 16 segments of seg_len(units) units of 64 columns,
 * each from zero, added in ascending order. Kernels differ only in who computes which segment. */
#ifndef ORCD_BACKEND_CUDA_CUDA_H
#define ORCD_BACKEND_CUDA_CUDA_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

extern "C" {
#include "backend/backend.h"
#include "base/half.h"
#include "base/pool.h"
}

#define CUDA_MAX_SPLIT 16 /* segments of a product */

/* ---- weights ---- */

/* How a packed matrix is stored. FAR: scales too far apart for f16; rare, so that few kernels are made for it. */
enum cuda_form { CUDA_FORM_MXFP4, CUDA_FORM_MXFP4_FAR, CUDA_FORM_Q8_0, CUDA_FORM_F16, CUDA_FORM_F16X2 };
/* Which rows a tile of 16 holds; tile row r and r + 8 meet in one thread. */
enum cuda_rowmap {
    CUDA_ROWS_PLAIN,  /* 16 consecutive rows */
    CUDA_ROWS_PAIR64, /* of a head of 64: 8 rows and the 8 rows 32 further, which RoPE rotates together */
    CUDA_ROWS_GLU,    /* 8 gate rows and the 8 up rows of the same index */
};

struct cuda_matrix { /* [n_mat][n_tile][n_unit] chunks of 16 rows x 64 columns */
    cuda_form form;
    cuda_rowmap map;
    float factor; /* every sum is multiplied by it: a power of two */
    uint8_t *data;
    int64_t n_col, n_row, n_mat; /* as the model sees it; GATE_UP: n_row = n_ff, tiles hold 8 gate and 8 up rows */
    int n_tile, n_unit, chunk_bytes;
    int row0; /* first row in the stacked weight */
};

struct cuda_weight {
    be_weight base;
    int n_matrix;          /* LINEAR: one for all parts when their types are equal, else one a part */
    cuda_matrix matrix[3]; /* LINEAR, GATE_UP, DOWN */
    float *bias;           /* [n_mat][n_row] of all parts, or NULL; GATE_UP: [n_mat][2][n_ff] */
    float *dense;          /* VECTOR; small LINEAR (may be a router): [n_row][n_col] */
    float *gained; /* small LINEAR: [tile of 16 columns][4][n_row][4] times a norm's gain, for norm and router in one */
    const cuda_weight *gain_of;
    uint8_t *rows; /* EMBED: canonical rows of rows_type */
    q_type rows_type;
    int64_t row_bytes;
    /* experts in host memory: nothing of the above; see host.cu */
    bool on_host;
    struct cuda_dev *dev;
    be_weight *host, *host_down; /* the cpu backend's; of a GATE_UP what goes with it, set when it is used */
    be_glu host_glu;
};

/* ---- activations ---- */

struct cuda_act {
    be_act base;
    float *f32;            /* F32, FREE: [cap_row][width] */
    uint16_t *f16;         /* FREE: [cap_row][ld], zero past width; what a product reads */
    int64_t ld;            /* elements: width rounded up to 64 */
    bool outs;             /* rows are those of the batch's outputs */
    bool has_f32, has_f16; /* which of them the last writer filled */
    int32_t *id;           /* ROUTE: [cap_row][width] */
    float *expert_w;       /* ROUTE: [cap_row][width] */
};

/* ---- KV ---- */

struct cuda_dev;
struct cuda_kv {
    be_kv base;
    cuda_dev *dev;
    int *window;    /* [n_layer], spec.window's copy */
    int dim;        /* head_dim rounded up to 32, 64 or 128 */
    int head_bytes; /* keys and values of a page, layer and KV head: see kv.cuh */
    int *sub;       /* [n_layer] index of the layer in its pool */
    int n_sub[BE_N_POOLS];
    uint8_t *pages[BE_N_POOLS]; /* [n_page][layer of the pool][kv head][head_bytes] */
    int32_t *table[BE_N_POOLS]; /* device: [n_slot][n_entry] */
    int n_entry;
    struct cuda_map { /* page-table changes since the last step */
        int32_t pool, index, page;
    } * map;
    int n_map, cap_map;
    orcd_status failed;
    int32_t *change[BE_N_POOLS]; /* [n_slot][n_entry]: where in map an entry changed last; maybe of an older list */
};

/* A layer's keys and values in page 0. */
static inline uint8_t *cuda_kv_layer(const cuda_kv *kv, int pool, int layer) {
    return kv->pages[pool] + (int64_t)kv->sub[layer] * kv->base.spec.n_kv_head * kv->head_bytes;
}

/* Whether attention_many.cu can take this many single rows of heads that share a KV head among `group`. */
#define CUDA_MANY_ROWS 256
#define CUDA_MAX_PARTIAL 8192 /* partial results of one attention; counters */
static inline bool cuda_attn_many(const cuda_kv *kv, int ones, int group) {
    const be_kv_spec *s = &kv->base.spec;
    return s->head_dim == 64 && s->type != BE_KV_F32 && group <= 8 && ones <= CUDA_MANY_ROWS &&
           (int64_t)ones * s->n_kv_head <= CUDA_MAX_PARTIAL;
}

/* ---- one step ---- */

/* In device memory, at the head of the batch block: everything about a batch that a replayed graph must read. */
struct alignas(16) cuda_batch { /* read in four pieces */
    int32_t n_tok, n_out, n_map;
    int32_t n_one, n_tile; /* rows of sequences with one row; tiles of longer ones */
    int32_t off_token, off_pos, off_slot, off_out, off_map, off_one, off_tile,
        off_sample;  /* in the upload, int32 units */
    int32_t id_part; /* half of host_id that this step's ids go to */
};

#define CUDA_TILE_ROWS 32
struct cuda_tile { /* rows row .. row + n - 1 of one sequence, the first at position pos */
    int32_t row, n, pos, slot;
};

struct cuda_arrays { /* device copies, at fixed addresses */
    cuda_batch *batch;
    int32_t *token, *pos, *slot, *out_row, *one;
    cuda_tile *tile;
    be_sample *sample;
    int32_t *id;       /* sampled by the last step, [max_id] */
    int32_t *unseen;   /* of them, the token of each output row that the host has not seen, else -1, [max_id] */
    int32_t *host_id;  /* ids for the host, in its memory: [2][max_id], steps in turn */
    be_likely *likely; /* likewise */
    int max_id;
};

enum cuda_op {
    CUDA_OP_EMBED,
    CUDA_OP_NORM,
    CUDA_OP_LINEAR,
    CUDA_OP_ROPE,
    CUDA_OP_KV_WRITE,
    CUDA_OP_ATTENTION,
    CUDA_OP_ROUTE,
    CUDA_OP_EXPERTS,
    CUDA_OP_MOE,
    CUDA_OP_GATHER,
    CUDA_OP_SAMPLE,
    CUDA_OP_TO_F16,
    CUDA_OP_TAP,
};

enum cuda_rows { CUDA_ROWS_TOK, CUDA_ROWS_OUT, CUDA_ROWS_LITERAL }; /* the batch's, its outputs', a fixed count */

/* Zeroed before it is filled: commands are compared by memcmp. */
struct cuda_cmd {
    cuda_op op;
    int freq; /* ROPE: index into the device's tables */
    const cuda_weight *w, *w2, *w3;
    cuda_act *x, *y, *z;
    cuda_rows rows; /* of x */
    int n_row;      /* CUDA_ROWS_LITERAL */
    be_attn attn;
    int k, epilogue, norm_kind;
    float eps;
    be_glu glu;
    const char *name; /* TAP */
    int layer;
    be_tap_fn fn;
    void *ctx;
};

struct cuda_shape {      /* what a recorded graph has fixed beside its commands */
    int32_t rows, outs;  /* buckets */
    int32_t reach;       /* super-chunks of keys that the longest single row spans, a power of two */
    int32_t ones, tiles; /* attention has single rows, has tiles (bucketed count) */
};

struct cuda_graph {
    cuda_graph *next;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaGraphNode_t begin; /* its first kernel */
    cuda_kv *kv;
    cuda_shape shape;
    int n_cmd;
    cuda_cmd *cmd;
};

/* What a command's launcher needs. */
struct cuda_run {
    cuda_dev *dev;
    cuda_kv *kv;
    cudaStream_t stream;
    cuda_shape shape;
    bool pdl;
    int freq; /* table whose cos and sin are in scratch.rope, -1 none */
    float rope_scale;
    const int32_t *upload; /* of this step, in host memory */
    int n_upload;          /* words */
    cudaError_t error;
    const cuda_act *packed; /* an act whose rows the command before left in `pack`, too (pack.cuh) */
    uint8_t *pack;
};

struct cuda_step {
    be_step base;
    cuda_cmd *cmd;
    int n_cmd, cap_cmd;
    bool samples, masked, taps;
    int group;        /* query heads that share a KV head, at most */
    orcd_error error; /* of recording; code ORCD_OK = none */
    const be_sample *sample;
    struct cuda_staging *staging;
    /* with `masked`, for cuda_allow: */
    cuda_cmd draw;
    cuda_run run;
    uint32_t *mask; /* of the masked rows, one after the other, in host memory */
};

#define CUDA_N_FREQ 8
#define CUDA_N_STAGING 3
struct cuda_staging { /* pinned; free again once `done` has passed */
    int32_t *host;
    size_t cap; /* int32 units */
    cudaEvent_t done;
};

#define CUDA_SAMPLE_PARTS 64
#define CUDA_MASK_WORDS 8192
static inline int cuda_mask_words(int64_t n_vocab) { return (int)((n_vocab + 31) / 32); }
#define CUDA_MAX_EXPERT 1024
#define CUDA_ROUTE_ROWS 64 /* steps of more rows route several rows a block where cuda_routes_many */
#define CUDA_ROUTE_EXPERTS 128
#define CUDA_ROUTE_MOST 3200
static inline bool cuda_routes_many(int64_t n_embd, int64_t n_expert) {
    return n_expert <= CUDA_ROUTE_EXPERTS && n_embd <= CUDA_ROUTE_MOST && n_embd % 4 == 0;
}
struct cuda_scratch { /* shared by all operations of a step, sized by the largest */
    uint16_t *hidden; /* [pairs][ff rounded up to 64] f16, rows in expert order; as wide.cuh has them, too */
    float *down;      /* [pairs][n_embd]; before it, or behind, the rows of any product in wide.cuh's order */
    int32_t *perm;    /* [pairs] expert order -> pair = row * k + j */
    int4 *tile;       /* [max tiles] expert, first, count, 0: what broad.cuh counts */
    int32_t *count;   /* [0] tiles */
    float *partial;   /* attention splits, [CUDA_MAX_PARTIAL][16][dim + 2] */
    uint32_t *arrived;
    float *route_part;       /* router: [row][tile of 16 columns][expert] */
    uint32_t *route_arrived; /* [row] */
    float2 *rope;            /* [max_tok][64] cos, sin */
    uint64_t *best;          /* sampling, [outs][CUDA_SAMPLE_PARTS] */
    size_t hidden_bytes, down_bytes, pairs, tiles, tok, outs, n_count, n_partial, n_arrived, n_route,
        n_route_rows; /* what is there */
};

struct cuda_block { /* of device memory */
    uint8_t *at;
    size_t bytes;
};

struct cuda_dev {
    be_device base;
    int ordinal, n_sm, major, minor;
    bool dry;          /* be_params.dry: addresses are made up and never used */
    uintptr_t made_up; /* the last of them */
    cuda_block *block;
    int n_block, cap_block;
    uint64_t used; /* bytes in blocks */
    be_params params;
    cudaStream_t stream, copy;
    cudaError_t sticky;
    pool *workers; /* for loading */
    uint8_t *load_host[2], *load_dev[2];
    cudaEvent_t load_done[2];
    int *flag; /* device: pack kernels report here */

    cuda_arrays arr;
    int max_tok, max_out;
    cuda_staging staging[CUDA_N_STAGING];
    int next_staging;
    struct { /* steps that `sampled` has not answered for, oldest first from id_first */
        cudaEvent_t ready;
        int n;
    } ids[2];
    int id_first, n_id_open;

    int64_t want_pairs, want_ff, want_embd, want_expert, want_col, want_route; /* largest asked for, for scratch */
    bool route_all_rows;       /* a router may meet more than CUDA_ROUTE_ROWS rows in norm_route_kernel */
    int64_t want_k, host_embd; /* of the route and of the experts in host memory */
    cuda_scratch scratch;
    struct {
        float f[64];
        int n;
        float *dev;
    } freq[CUDA_N_FREQ];
    int n_freq;

    struct cuda_host *host;     /* host.cu's own */
    struct cuda_decode *decode; /* decode.cu's own */
    int n_fused;                /* steps recorded with its kernels */
    cuda_graph *graphs;
    int n_graph;
    cuda_step step; /* one at a time */
    bool in_step;
    char name[128];
};

/* ---- device.cu ---- */

orcd_status cuda_fail(cuda_dev *d, cudaError_t e, const char *what, orcd_error *err);
/* 256-byte aligned, NULL with ORCD_ERR_NOMEM saying required and available; zero bytes give one. */
orcd_status cuda_alloc(cuda_dev *d, void *out, size_t bytes, const char *what, orcd_error *err);
void cuda_free(cuda_dev *d, void *p); /* accepts NULL */
/* Memory of cuda_alloc to one byte value, now. */
orcd_status cuda_fill(cuda_dev *d, void *p, int value, size_t bytes, const char *what, orcd_error *err);
/* Bytes of host memory are there when it returns. */
orcd_status cuda_upload(cuda_dev *d, void *to, const void *from, size_t bytes, const char *what, orcd_error *err);
orcd_status cuda_use(cuda_dev *d, orcd_error *err); /* make it this thread's device */
void cuda_quiet(cuda_dev *d);                       /* the same, and wait until nothing runs: before memory is freed */

#define CUDA_TRY(d, what, expr)                                                                                        \
    do {                                                                                                               \
        cudaError_t cuda_error_ = (expr);                                                                              \
        if (cuda_error_ != cudaSuccess)                                                                                \
            return cuda_fail(d, cuda_error_, what, err);                                                               \
    } while (0)

/* ---- weight.cu, act.cu, kv.cu, step.cu: the table's functions ---- */

extern "C" {
uint64_t cuda_load_bytes(be_device *d, const be_load *l);
orcd_status cuda_load(be_device *d, const be_load *l, be_weight **out, orcd_error *err);
void cuda_unload(be_device *d, be_weight *w);

orcd_status cuda_act_new(be_device *d, be_form form, int64_t cap_row, int64_t width, be_act **out, orcd_error *err);
void cuda_act_free(be_device *d, be_act *a);
orcd_status cuda_act_read(be_device *d, const be_act *a, int64_t row, int64_t n, float *dst, orcd_error *err);
orcd_status cuda_act_write(be_device *d, be_act *a, int64_t row, int64_t n, const float *src, orcd_error *err);
const float *cuda_act_host(be_device *d, const be_act *a);

uint64_t cuda_kv_page_bytes(be_device *d, const be_kv_spec *s, int pool);
orcd_status cuda_kv_open(be_device *d, const be_kv_spec *s, be_kv **out, orcd_error *err);
void cuda_kv_close(be_device *d, be_kv *kv);
void cuda_kv_map(be_kv *kv, int pool, int slot, int index, int32_t page);
void cuda_kv_copy_page(be_kv *kv, int pool, int32_t dst, int32_t src);
orcd_status cuda_kv_read_page(be_kv *kv, int pool, int32_t page, void *dst, orcd_error *err);
orcd_status cuda_kv_write_page(be_kv *kv, int pool, int32_t page, const void *src, orcd_error *err);

orcd_status cuda_step_begin(be_device *d, be_kv *kv, const be_batch *b, be_step **out, orcd_error *err);
orcd_status cuda_step_end(be_step *s, orcd_error *err);
void cuda_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y);
void cuda_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y);
void cuda_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e);
void cuda_rope(be_step *s, const be_attn *a, be_act *qkv);
void cuda_kv_write(be_step *s, const be_attn *a, const be_act *qkv);
void cuda_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y);
void cuda_route(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route);
void cuda_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                  const be_act *route, be_act *y);
void cuda_moe(be_step *s, const be_norm *n, const be_weight *router, int top_k, const be_weight *gate_up,
              const be_weight *down, const be_glu *g, be_act *tmp, be_act *route, be_act *x);
void cuda_gather_out(be_step *s, const be_act *x, be_act *y);
void cuda_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx);
void cuda_sample(be_step *s, const be_act *logits, const be_sample *row);
orcd_status cuda_allow(be_device *d, const be_sample *row, orcd_error *err);
orcd_status cuda_sampled(be_device *d, int32_t *id, be_likely *likely, orcd_error *err);

/* For tests, which must know that the fused step is what they tested. */
int cuda_n_fused(const be_device *d);
}
void cuda_loaded(cuda_dev *d);
orcd_status cuda_host_load(cuda_dev *d, const be_load *l, cuda_weight *w, orcd_error *err);
void cuda_host_unload(cuda_dev *d, be_weight *w); /* accepts NULL */
orcd_status cuda_host_reserve(cuda_dev *d, orcd_error *err);
orcd_status cuda_host_check(cuda_dev *d, orcd_error *err); /* what failed on the host since the last call */
void cuda_host_free(cuda_dev *d);
void cuda_graphs_drop(cuda_dev *d, const cuda_kv *kv); /* NULL: all */
orcd_status cuda_reserve(cuda_dev *d, int max_tok, int max_out, orcd_error *err);

/* ---- launchers, one per command; errors collect in r->error ---- */

void cuda_run_begin(cuda_run *r); /* spread the upload, apply page-table changes */
void cuda_run_embed(cuda_run *r, const cuda_cmd *c);
void cuda_run_norm(cuda_run *r, const cuda_cmd *c);
void cuda_run_linear(cuda_run *r, const cuda_cmd *c);
bool cuda_can_linear_rope(const cuda_run *r, const cuda_cmd *c, const cuda_cmd *rope);
void cuda_run_linear_rope(cuda_run *r, const cuda_cmd *c, const cuda_cmd *rope); /* and RoPE that follows; NULL */
void cuda_run_rope(cuda_run *r, const cuda_cmd *c);
void cuda_run_kv_write(cuda_run *r, const cuda_cmd *c);
bool cuda_can_rope_write(const cuda_run *r, const cuda_cmd *rope, const cuda_cmd *write);
void cuda_run_rope_write(cuda_run *r, const cuda_cmd *rope, const cuda_cmd *write);
void cuda_run_attention(cuda_run *r, const cuda_cmd *c);
void cuda_run_route(cuda_run *r, const cuda_cmd *c);
void cuda_run_experts(cuda_run *r, const cuda_cmd *c);
bool cuda_can_combine_norm(const cuda_cmd *experts, const cuda_cmd *norm);
void cuda_run_experts_norm(cuda_run *r, const cuda_cmd *c, const cuda_cmd *norm); /* and the norm that follows; NULL */
void cuda_run_gather(cuda_run *r, const cuda_cmd *c);
void cuda_run_sample(cuda_run *r, const cuda_cmd *c);
void cuda_run_moe(cuda_run *r, const cuda_cmd *c);
void cuda_run_host_experts(cuda_run *r, const cuda_cmd *c);
void cuda_run_to_f16(cuda_run *r, const cuda_cmd *c);
void cuda_run_rope_table(cuda_run *r, const cuda_cmd *c); /* cos and sin of the command's frequencies, once a step */
/* The whole list of a step of few rows by fused kernels; false, and nothing launched, when it is no such list. */
bool cuda_decode_run(cuda_run *r, const cuda_cmd *cmd, int n_cmd);
orcd_status cuda_decode_reserve(cuda_dev *d, orcd_error *err);
void cuda_decode_free(cuda_dev *d);
cudaError_t cuda_apply_gain(cuda_dev *d, cuda_weight *router, const cuda_weight *norm);

/* Rows of a command's input as kernels see them: at most cap, exactly *n when n is not NULL. */
struct cuda_count {
    const int32_t *n;
    int cap;
};
static inline cuda_count cuda_rows_of(const cuda_run *r, const cuda_cmd *c) {
    if (c->rows == CUDA_ROWS_LITERAL)
        return {NULL, c->n_row};
    if (c->rows == CUDA_ROWS_OUT)
        return {&r->dev->arr.batch->n_out, r->shape.outs};
    return {&r->dev->arr.batch->n_tok, r->shape.rows};
}
#ifdef __CUDACC__
static __device__ __forceinline__ int count_rows(cuda_count c) { return c.n ? *(const volatile int32_t *)c.n : c.cap; }
#endif

/* Whether a product leaves f16 too: not q, k and v, which attention reads as floats. */
static inline bool cuda_linear_f16(const cuda_weight *w, const be_act *y) {
    return y->form == BE_ACT_FREE && w->matrix[0].map != CUDA_ROWS_PAIR64;
}

/* A checked launch of clusters of blocks along x, with programmatic dependence on the kernel before it where the device
 * has that. */
template <class... Param, class... Arg>
static inline void cuda_launch_clusters(cuda_run *r, void (*kernel)(Param...), dim3 grid, unsigned cluster, dim3 block,
                                        size_t shared, Arg... arg) {
    if (r->error != cudaSuccess || !grid.x || !grid.y || !grid.z)
        return;
    /* kernels with different shares of shared memory cannot overlap; long steps rather have the L1 */
    const int carve = r->shape.rows <= 64 ? cudaSharedmemCarveoutMaxShared : cudaSharedmemCarveoutDefault;
    r->error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carve);
    if (r->error != cudaSuccess)
        return;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = shared;
    c.stream = r->stream;
    cudaLaunchAttribute a[2];
    c.attrs = a;
    if (r->pdl) {
        a[c.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a[c.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        a[c.numAttrs].id = cudaLaunchAttributeClusterDimension;
        a[c.numAttrs++].val.clusterDim = {cluster, 1, 1};
    }
    r->error = cudaLaunchKernelEx(&c, kernel, (Param)arg...);
}

template <class... Param, class... Arg>
static inline void cuda_launch(cuda_run *r, void (*kernel)(Param...), dim3 grid, dim3 block, size_t shared,
                               Arg... arg) {
    cuda_launch_clusters(r, kernel, grid, 1, block, shared, arg...);
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Products of many rows by wgmma (wide.cuh). A dry device plans for them. */
static inline bool cuda_has_wide(const cuda_dev *d) { return d->dry || (d->major == 9 && d->minor == 0); }
/* Pairs in order of experts, each expert's padded to 8. */
static inline int64_t cuda_wide_pairs(int64_t pairs, int64_t n_expert) {
    return round_up(pairs + 7 * (n_expert < pairs ? n_expert : pairs), 8);
}

/* Experts that broad.cuh computes have so many rows on average, at most; their rows lie behind their results. */
#define CUDA_BROAD_MEAN 48
static inline int64_t cuda_broad_at(int64_t pairs, int64_t n_embd) { return round_up(pairs * n_embd * 4, 1024); }

/* Units of 64 columns per segment. */
static inline __host__ __device__ int seg_len(int units) { return (units + CUDA_MAX_SPLIT - 1) / CUDA_MAX_SPLIT; }

#endif
