/* engine/internal.h: the engine from inside. open.c makes it, sequence.c holds what belongs to one request,
 * scheduler.c is the thread. Only engine/ includes this. */
#ifndef ORCD_ENGINE_INTERNAL_H
#define ORCD_ENGINE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/engine.h"
#include "engine/kv.h"
#include "engine/prefix.h"

#define MAX_BATCH 256
#define MAX_TOP_LOGPROBS 20
#define MAX_SAVES 8 /* message boundaries of one prompt that are kept: the first two and the last six */

/* One request, waiting or running. Everything is allocated when it is submitted. */
typedef struct seq {
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

    int slot;
    int rows, out; /* of the step in hand: rows fed, index of the output row or -1 */
    prefix_cursor cursor;
    int next_boundary;
    double t_submit, t_start, t_first, t_last; /* seconds; t_first 0 = no token yet */
} seq;

typedef struct eng_counters { /* written by the engine thread, read by anyone */
    atomic_int running, waiting;
    atomic_uint_fast64_t requests, tokens_in, tokens_cached, tokens_out, steps, by_stop[ENG_STOP_ERROR + 1], hits,
        lookups;
    atomic_uint_fast64_t step_ns, forward_ns, heartbeat_ns;
    atomic_bool failed;
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
    prefix *cache; /* NULL when off */
    samp *samp;
    int max_rows; /* rows of one step: chunk, at least max_batch */

    pthread_t thread;
    bool started;
    eng_counters n;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake;
    seq **queue; /* [max_queue] ring */
    int queue_head, n_queue, max_queue;
    seq **slot; /* [max_batch]: running; changed by the engine thread only, under the lock */
    eng_ticket last_ticket;
    bool draining, closing;
    bool poked; /* a cancel or a new request: look before the next step */

    /* engine thread only */
    seq **order; /* [max_batch]: running, oldest first */
    int n_running;
    int turn;                                          /* whose prefill goes first */
    bool may_admit;                                    /* something changed since the head of the queue did not fit */
    double look_at;                                    /* when the queue is next searched for deadlines */
    int32_t *row_token, *row_pos, *row_slot, *out_row; /* [max_rows] */
    seq **out_seq;                                     /* [max_batch] */
    float *logits;                                     /* [n_vocab], where the host cannot address the device */
    double decode_s, row_s;                            /* running means: a step without prefill, one more prefill row */
};

double eng_now(void);
static inline void eng_count(atomic_uint_fast64_t *v, uint64_t n) {
    atomic_fetch_add_explicit(v, n, memory_order_relaxed);
}

/* ---- sequence.c ---- */

/* Check and copy. */
orcd_status seq_new(const eng *e, const eng_request *r, seq **out, orcd_error *err) ORCD_MUST_USE;
void seq_free(seq *s);
/* Tell on_done and free. The sequence is in no list any more. */
void seq_end(eng *e, seq *s, eng_stop why, const orcd_error *error);
/* The last row's logits are there: sample, report, stop or go on. True when the sequence goes on; else *why is set. */
bool seq_sample(eng *e, seq *s, const float *logits, eng_stop *why, orcd_error *err);
/* True when sampling needs nothing but the logits and the parameters: fit for a device's own sampler. */
bool seq_is_plain(const seq *s);
static inline bool seq_decodes(const seq *s) { return (size_t)s->n_tok > s->r.n_prompt && s->n_tok - s->n_fed == 1; }

/* ---- scheduler.c ---- */

void *eng_loop(void *engine);

#endif
