/* backend/cpu/internal.h: what the files of the CPU backend share. May include base, quant, format, backend. */
#ifndef ORCD_BACKEND_CPU_INTERNAL_H
#define ORCD_BACKEND_CPU_INTERNAL_H

#include <stdatomic.h>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "base/pool.h"

/* Up to this many rows every thread prepares its own copy of the activations (norm, integers): cheaper than a phase
 * of its own with a barrier. */
#define CPU_FEW 4
#define CPU_MAX_EXPERTS_FEW 16 /* rows x chosen experts that count as few */
#define CPU_MAX_PARTS 3

typedef struct cpu_part { /* n_mat matrices of one stored type */
    cpu_fmt fmt;
    const q_traits *src;    /* what is packed: the file's type, or the one it is requantised to */
    int64_t n_row, n_panel; /* of one matrix */
    size_t panel_bytes;
    uint8_t *data;  /* [n_mat][n_panel] panels; NULL: `rows` or `file` are packed when used */
    uint8_t *rows;  /* canonical rows in memory */
    mf_tensor file; /* canonical rows in the mapped file (no_repack) */
} cpu_part;

typedef struct cpu_weight {
    be_weight base;
    int n_part;
    cpu_part part[CPU_MAX_PARTS];
    float *bias[CPU_MAX_PARTS]; /* [n_mat * n_row of the part] or NULL */
    float *vector;              /* BE_USE_VECTOR: [n_col] */
    int64_t n_panel;            /* of one matrix, all parts */
    uint8_t *screen;            /* the head's: [n_panel] of cpu_screen_bytes, or NULL */
} cpu_weight;

typedef struct cpu_act {
    be_act base;
    float *data;    /* [cap_row][stride] */
    int64_t stride; /* width; BE_ACT_ROUTE: 2 * width, pairs of id and weight */
} cpu_act;

typedef struct cpu_kv {
    be_kv base;
    uint8_t *page[BE_N_POOLS]; /* [n_page][page_bytes] */
    uint64_t pool_bytes[BE_N_POOLS];
    int32_t *table[BE_N_POOLS]; /* [n_slot][n_index] */
    int n_index;
    int *layer_index;        /* [n_layer]: place of a layer inside its pool's pages */
    size_t elem, head_bytes; /* of a value; of K or V of one head in a page */
} cpu_kv;

struct cpu_step;
typedef struct cpu_cmd {
    void (*run)(struct cpu_step *s, struct cpu_cmd *c, int thread);
    const cpu_weight *w, *w2;
    const cpu_act *x;
    cpu_act *y, *route;
    be_norm norm; /* weight NULL: none */
    be_attn attn;
    be_epilogue epilogue;
    be_glu glu;
    int top_k;
    bool make_table; /* rope: cos and sin of this step's positions are not there yet */
    struct {
        const char *name;
        int layer;
        be_tap_fn fn;
        void *ctx;
    } tap;
    atomic_int next[4]; /* work items handed out, by phase */
} cpu_cmd;

/* How a thread comes by its items 0 .. total - 1 of a phase: first a run of its own, because memory is read fastest
 * where each core goes straight on, then whatever is left, so that all end together. */
typedef struct cpu_turns {
    int64_t at, end; /* of its own run */
    int64_t rest;    /* the first that nobody owns */
    atomic_int *next;
} cpu_turns;

static inline cpu_turns cpu_turns_of(atomic_int *next, int64_t total, int thread, int n_thread) {
    int64_t own = total * 3 / 4 / n_thread;
    return (cpu_turns){own * thread, own * (thread + 1), own * n_thread, next};
}

static inline int64_t cpu_turn(cpu_turns *t) {
    return t->at < t->end ? t->at++ : t->rest + atomic_fetch_add_explicit(t->next, 1, memory_order_relaxed);
}

/* Memory of one thread. */
typedef struct cpu_local {
    uint8_t *dot;   /* [2] cpu_dot_scratch */
    uint8_t *panel; /* a panel packed when used */
    float *row;     /* a row of floats */
    uint8_t *q;     /* CPU_MAX_EXPERTS_FEW integer rows of the widest */
    float *norm;    /* CPU_FEW float rows */
    float *y;       /* [4][CPU_TOKENS][16] */
    int32_t *list;  /* experts: see moe.c */
} cpu_local;

/* Memory shared by the threads of a step. */
typedef struct cpu_shared {
    uint8_t *q;    /* integer rows */
    float *norm;   /* [max_tok][widest] normed rows of the fused operations */
    float *logits; /* router: [max_tok][experts] */
    float *hidden; /* [max_tok * top_k][n_ff]: after gate and up */
    float *down;   /* [max_tok * top_k][n_ff]: after down */
    int32_t *list; /* experts: see moe.c */
    float *rope;   /* [max_tok][head_dim / 2][2] cos, sin */
    float *peak;   /* screen: [CPU_FEW][panels] what no logit of a panel exceeds */
} cpu_shared;

typedef struct cpu_dims { /* the widest of everything loaded so far: sizes the scratch memory */
    int64_t n_col, n_expert, n_ff /* or n_embd where wider */, top_k, head_dim, max_tok, n_screen /* panels */;
} cpu_dims;

typedef struct cpu_step {
    be_step base;
    struct cpu_device *dev;
    cpu_cmd *cmd;
    int n_cmd, cap_cmd;
    orcd_error error;       /* first failure while recording */
    const float *rope_freq; /* what shared.rope holds at this point of the list */
    float rope_scale;
    bool open;
} cpu_step;

/* Where the screen leaves too much to compute, more and more steps do without it. */
typedef struct cpu_screening {
    int pause, length; /* steps still to come, and in all */
} cpu_screening;

typedef struct cpu_device {
    be_device base;
    cpu_tier tier;
    const cpu_kernels *k;
    pool *pool;
    int n_thread;
    cpu_dims dims, sized; /* wanted; what the memory below was made for */
    void *arena;
    size_t arena_bytes;
    uint64_t used;    /* bytes of cpu_take that were not given back */
    cpu_local *local; /* [n_thread] */
    cpu_shared shared;
    cpu_screening screening;
    cpu_step step;
} cpu_device;

extern const be_ops be_ops_cpu;

/* memory.c: zeroed, 64-byte aligned, in huge pages where large. NULL when out of memory. */
void *cpu_alloc(size_t bytes);
void cpu_free(void *p, size_t bytes);
/* The same for what a device keeps: counted, and on a dry device there is nothing at the address. */
void *cpu_take(cpu_device *d, size_t bytes);
void cpu_give(cpu_device *d, void *p, size_t bytes); /* as many as were taken */
/* Grow the scratch memory to dev->dims. */
orcd_status cpu_scratch(cpu_device *d, orcd_error *err);

/* weight.c */
uint64_t cpu_load_bytes(be_device *d, const be_load *l);
orcd_status cpu_load(be_device *d, const be_load *l, be_weight **out, orcd_error *err);
void cpu_unload(be_device *d, be_weight *w);
/* Panel p of matrix m: stored, or packed now into the thread's memory. */
const uint8_t *cpu_panel(const cpu_part *p, int64_t n_col, int64_t mat, int64_t index, cpu_local *l);

/* pack.c: 16 rows (the missing ones of the last panel are zero) from canonical blocks to a panel. */
cpu_fmt cpu_fmt_of(q_type t);
void cpu_pack(cpu_fmt f, const q_traits *src, const uint8_t *rows, size_t row_bytes, int n_row, int64_t n_col,
              uint8_t *panel);

/* ops.c */

/* Rows of x as the kernels of w read them: pointers to float rows and integer rows, after an optional norm. */
typedef struct cpu_rows {
    const float *f;
    int64_t f_stride;
    const uint8_t *q;
    size_t q_stride;
} cpu_rows;

cpu_cmd *cpu_record(be_step *s, void (*run)(cpu_step *, cpu_cmd *, int));
void cpu_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y);
void cpu_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y);
void cpu_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e);
void cpu_norm_linear(be_step *s, const be_norm *n, const be_weight *w, const be_act *x, be_act *tmp, be_act *y,
                     be_epilogue e);
/* Panel `index` of c->w, for n rows of x from `row`, to c->y. */
void cpu_linear_panel(cpu_step *s, cpu_cmd *c, int thread, const cpu_rows *x, int64_t row, int64_t n, int64_t index);
void cpu_gather_out(be_step *s, const be_act *x, be_act *y);
void cpu_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx);
void cpu_widen(int64_t *have, int64_t want);
static inline const void *cpu_row_of(const cpu_rows *x, bool ints, int64_t i) {
    return ints ? (const void *)(x->q + (size_t)i * x->q_stride) : (const void *)(x->f + i * x->f_stride);
}
void cpu_prepare(cpu_step *s, int thread, const be_norm *n, const float *x, int64_t n_row, int64_t width, bool ints,
                 cpu_rows *out);
bool cpu_wants_ints(const cpu_weight *w);

/* screen.c: the largest logits without reading the whole head. */
bool cpu_has_screen(const cpu_device *d, const be_load *l, cpu_fmt fmt);
/* n rows of src's type to one panel of the screen; row: memory for n_col + 256 floats. */
void cpu_screen_pack(const cpu_device *d, const cpu_part *part, const uint8_t *rows, size_t row_bytes, int n,
                     int64_t n_col, float *row, uint8_t *panel);
/* This product may go through the screen, and it will probably pay. */
bool cpu_screen_now(cpu_step *s, const cpu_weight *w, int64_t n_row);
void cpu_run_screen(cpu_step *s, cpu_cmd *c, int thread);

/* attn.c */
void cpu_rope(be_step *s, const be_attn *a, be_act *qkv);
void cpu_kv_write(be_step *s, const be_attn *a, const be_act *qkv);
void cpu_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y);

/* kv.c */
uint64_t cpu_kv_page_bytes(be_device *d, const be_kv_spec *s, int kind);
orcd_status cpu_kv_open(be_device *d, const be_kv_spec *s, be_kv **out, orcd_error *err);
void cpu_kv_close(be_device *d, be_kv *kv);
void cpu_kv_map(be_kv *kv, int kind, int slot, int index, int32_t page);
void cpu_kv_copy_page(be_kv *kv, int kind, int32_t dst, int32_t src);
orcd_status cpu_kv_read_page(be_kv *kv, int kind, int32_t page, void *dst, orcd_error *err);
orcd_status cpu_kv_write_page(be_kv *kv, int kind, int32_t page, const void *src, orcd_error *err);

/* moe.c */
void cpu_route(be_step *s, const be_weight *w, const be_act *x, int top_k, be_act *route);
void cpu_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                 const be_act *route, be_act *y);

#endif
