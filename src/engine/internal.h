/* engine/internal.h: the engine from inside. open.c makes it, sequence.c holds what belongs to one request,
 * scheduler.c is the thread. Only engine/ includes this. */
#ifndef ORCD_ENGINE_INTERNAL_H
#define ORCD_ENGINE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/disk.h"
#include "engine/engine.h"
#include "engine/kv.h"
#include "engine/prefix.h"

#define MAX_BATCH 256
#define N_PACE 16
#define MAX_SAVES 8 /* message boundaries of one prompt that are kept: the first two and the last six */

typedef struct seq seq;

/* A step whose tokens the device samples and the host has not read yet. */
typedef struct flight {
    int n_out;
    seq **seq;      /* [max_batch]: of each output row; NULL = the token is of no use any more */
    int32_t *score; /* [max_batch]: 0, or the prompt's position whose log-probability the row gives, and no token */
    be_act *logits;
    bool likely, masked; /* a row asks for log-probabilities, has a mask */
    int n_decode, n_prefill;
    double t_submit;
} flight;

/* One request, waiting or running. Everything is allocated when it is submitted. */
struct seq {
    eng_ticket ticket;
    eng_request r; /* its pointers are copies that `token` and `copies` own */
    void *copies;
    atomic_bool cancelled;

    int32_t *token;  /* [n_limit]: prompt, then what was generated or forced */
    int32_t n_limit; /* most tokens that there can be */
    int32_t n_tok;   /* tokens known */
    int32_t n_told;  /* of them reported through on_token, prompt included */
    int32_t n_fed;   /* of them in the KV memory */
    int32_t n_cached;
    int32_t n_scored; /* of the prompt told through on_prompt */
    int32_t n_said;   /* of the prompt reported through on_prefill, -1 = it never ran */
    be_edit *edit;    /* [n_edit], by id: what bias and penalties change, as of n_tok tokens */
    int32_t n_edit;

    int slot;
    int rows;             /* of the step in hand */
    const flight *awaits; /* the next token is this one's output row number `awaited`; it counts as known below */
    int awaited;
    bool turned; /* a verdict on the last token put others after it or in its place */
    prefix_cursor cursor;
    int next_boundary;
    double t_submit, t_start, t_first, t_last; /* seconds; t_first 0 = no token yet */
};

/* Running means over the steps of 2^k to 2^(k+1) - 1 rows; 0 = there was none. */
typedef struct pace {
    double rows, s;
} pace;

typedef struct eng_counters { /* written by the engine thread, read by anyone */
    atomic_int running, waiting;
    atomic_uint_fast64_t requests, preempted, tokens_in, tokens_cached, tokens_out, steps, by_stop[ENG_STOP_ERROR + 1],
        hits, lookups;
    atomic_uint_fast64_t step_ns, forward_ns, callback_ns, heartbeat_ns;
    atomic_uint_fast64_t work_steps[ENG_N_WORK], work_decode[ENG_N_WORK], work_prefill[ENG_N_WORK], work_ns[ENG_N_WORK];
    atomic_bool failed, astray; /* astray: memory of the model was found outside the device */
} eng_counters;

struct eng {
    eng_info info;
    char name[128];
    const arch *arch;
    arch_config cfg;
    mf_file *file;
    tok *tok;
    be_device *dev;
    arch_model *model;
    kv_store kv;
    bool reads_file;    /* the backend computes from the mapped file */
    orcd_error failure; /* written before n.failed is set */
    prefix *cache;      /* NULL when off */
    disk *disk;         /* what it keeps on disk; NULL when off */
    samp *samp;
    int max_rows; /* of one step: a chunk beside max_batch that decode */

    pthread_t thread;
    bool started;
    eng_counters n;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake;
    seq **queue; /* [queue_cap] ring: what was submitted, at most max_queue, and before it what lost its place */
    int queue_head, n_queue, max_queue, queue_cap;
    seq **slot; /* [max_batch]: running; changed by the engine thread only, under the lock */
    eng_ticket last_ticket;
    bool draining, closing;
    bool poked; /* a cancel or a new request: look before the next step */

    /* engine thread only */
    seq **order; /* [max_batch]: running, oldest first */
    int n_running;
    bool may_admit;                                    /* something changed since the head of the queue did not fit */
    double look_at;                                    /* when the queue is next searched for deadlines */
    int32_t *row_token, *row_pos, *row_slot, *out_row; /* [max_rows] */
    be_sample *sample;                                 /* [max_batch] */
    int32_t *sampled;                                  /* [max_batch] */
    be_likely *likely;                                 /* [max_batch] */
    flight flight[2], *open;                           /* the one in hand is not `open` */
    float *logits;                                     /* [n_vocab], where the host cannot address the device */
    pace pace[N_PACE];                                 /* what steps cost */
    double in_model, in_callbacks;                     /* seconds of this round that went to the model, to callbacks */
    double resident_at;                                /* when that is next looked at */
    double t_ready;                                    /* when the device was last known to be done */
};

double eng_now(void);
static inline void eng_count(atomic_uint_fast64_t *v, uint64_t n) {
    atomic_fetch_add_explicit(v, n, memory_order_relaxed);
}

/* ---- plan.c ---- */

/* Fills what spec leaves open: n_ctx, pages, rows. c->n_host_layers is chosen here. On ORCD_ERR_NOMEM *p says how much
 * would be needed. */
orcd_status plan_make(const char *name, const arch *a, const mf_file *f, arch_config *c, be_device *dev,
                      const eng_params *prm, be_kv_spec *spec, eng_plan *p, orcd_error *err) ORCD_MUST_USE;

/* ---- sequence.c ---- */

/* Check and copy. */
orcd_status seq_new(const eng *e, const eng_request *r, seq **out, orcd_error *err) ORCD_MUST_USE;
void seq_free(seq *s);
/* Tell on_done and free. The sequence is in no list any more. */
void seq_end(eng *e, seq *s, eng_stop why, const orcd_error *error);
/* Tell on_prefill how much of the prompt is done, if it is more than it knows. */
void seq_prefilled(eng *e, seq *s);
static inline int32_t seq_n_top(const eng *e, const seq *s) {
    return s->r.top_logprobs < e->cfg.n_vocab ? s->r.top_logprobs : e->cfg.n_vocab;
}
/* What a device needs to draw the token at position `next`, or to score the one that is there; not the mask. */
be_sample seq_sample(const eng *e, const seq *s, int32_t next, bool scores);
/* True when nothing but the largest logit decides, and nothing else is told. */
bool seq_wants_best(const seq *s);
/* What may follow the tokens known; NULL = everything. */
const uint32_t *seq_mask(eng *e, const seq *s);
/* Draw the next token from the last row's logits. */
orcd_status seq_draw(eng *e, const seq *s, const float *logits, int32_t *id, orcd_error *err) ORCD_MUST_USE;
/* Tokens of the prompt that on_prompt still waits for. */
static inline bool seq_scores(const seq *s) { return s->r.on_prompt && s->n_scored < (int32_t)s->r.n_prompt; }
/* How likely the token at position `at` of the prompt is; NULL for the first. */
void seq_score(eng *e, seq *s, int32_t at, const be_likely *likely);
/* The next token is known (likely: NULL unless log-probabilities are wanted): report it, stop or go on. True when the
 * sequence goes on; else *why is set. */
bool seq_take(eng *e, seq *s, int32_t id, const be_likely *likely, eng_stop *why);
/* Tokens known or awaited that are not in the KV memory yet. */
static inline int seq_pending(const seq *s) { return s->n_tok - s->n_fed + (s->awaits != NULL); }
static inline bool seq_decodes(const seq *s) {
    return s->n_tok + (s->awaits != NULL) > (int32_t)s->r.n_prompt && seq_pending(s) == 1;
}

/* The model's file is as long as it was, and every byte of it that was read was there. */
orcd_status eng_check_file(const eng *e, orcd_error *err) ORCD_MUST_USE;

/* ---- fingerprint.c ---- */

/* A hash of all that the bits of the KV memory depend on, save the tokens: model, precision, backend, processor. */
void eng_fingerprint(const eng *e, const be_params *p, uint8_t out[DISK_HASH]);

/* ---- scheduler.c ---- */

void *eng_loop(void *engine);

#endif
