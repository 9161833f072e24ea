/* engine/engine.h: a loaded model and the one thread that runs it: continuous batching over paged KV, prefix
 * cache, sampling, stopping. May include arch and below. The command line and every server dialect use this door.
 *
 * Threads: eng_submit, eng_cancel and eng_stats may be called from any thread. Callbacks of a request come from the
 * engine thread, one at a time and in order; they must not block and must not call eng_submit or eng_close. */
#ifndef ORCD_ENGINE_ENGINE_H
#define ORCD_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arch/arch.h"
#include "base/status.h"
#include "engine/sampler.h"
#include "text/tokenizer.h"

typedef struct eng eng;

typedef struct eng_params {
    const char *model;     /* GGUF file or Hugging Face folder */
    const char *tokenizer; /* tokenizer.json, or NULL: found beside the model */
    bool need_tokenizer;   /* false: a model without one is fine (ids in, ids out) */
    const char *device;    /* "auto", "cpu", "ref", "cuda", "cuda:N" */
    be_params backend;
    int n_ctx;     /* positions per sequence; 0 = the largest that fits, at most the model's */
    int max_batch; /* sequences in flight, 1..256; 0 = 1 */
    int max_queue; /* waiting requests beyond them; 0 = 4 * max_batch */
    int chunk;     /* prefill rows per step; 0 = what eng_plan_chunk says */
    be_kv_type kv_type;
    uint64_t memory_bytes;     /* plan for a device with so much; 0 = what is available there now */
    uint64_t kv_bytes;         /* KV memory in all; 0 = what n_ctx and max_batch ask for, within what is free */
    uint64_t cache_bytes;      /* of it, for prefixes no one is using now; 0 = a default share; ENG_NO_CACHE = off */
    const char *cache_dir;     /* prefixes are kept there too and found again at the next start; NULL = nowhere */
    uint64_t cache_disk_bytes; /* of files in cache_dir at most; 0 = 4 GiB */
    void (*note)(void *ctx, const char *sentence); /* for a log, from any thread; may be NULL */
    void *note_ctx;
    arch_progress progress; /* while loading; may be NULL */
    void *progress_ctx;
} eng_params;
#define ENG_NO_CACHE UINT64_MAX

/* What was opened, for start-up lines, /health and inspect. Strings live as long as the engine. */
typedef struct eng_info {
    const char *model_name; /* file or folder name without ending */
    const char *arch;
    const char *quant; /* dominant stored type: "MXFP4", "Q8_0", ... */
    char device[96];   /* "cpu: 2 threads, AVX-512 VNNI" */
    int n_ctx, n_ctx_train, max_batch, n_vocab, chunk;
    bool has_harmony;                           /* the tokenizer knows the harmony control tokens */
    uint64_t weight_bytes, kv_bytes, act_bytes; /* on the device */
    uint64_t host_bytes;                        /* experts in host memory beside it */
    uint64_t free_bytes, total_bytes;           /* of the device: left over when it was opened; in all */
    double load_s, load_gb_s;                   /* until it was ready; weights as stored, per second of loading them */
} eng_info;

/* What a model takes on a device, to the byte, before anything is loaded. */
typedef struct eng_plan {
    char device[96];
    int n_ctx, n_ctx_train;         /* positions of a sequence; that the model was made for */
    int max_batch, chunk, max_rows; /* sequences; prompt rows per step; rows of the largest step */
    int most_one, most_all;         /* the largest context that would fit: for one sequence, for max_batch at once */
    int n_page[BE_N_POOLS], least_full;
    uint64_t page_bytes[BE_N_POOLS];
    int n_entry;       /* of the prefix cache */
    int n_host_layers; /* whose experts stay in host memory */
    arch_memory m;
    uint64_t total, available, margin; /* of the device; of `available`, for what the plan does not know */
    int window;                        /* the longest of the layers that have one */
    double expert_share;               /* of the experts, those that a row reads */
} eng_plan;

/* Tokens a second, of all streams together, when every step reads each weight that it needs and the keys and values of
 * `depth` positions a stream once, at these bytes a second; host_rate: of the memory where experts were left. */
double eng_plan_speed(const eng_plan *p, int streams, int depth, double rate, double host_rate);

/* The prompt rows of a step where none are asked for, of the device's memory `available`; spec: layers and slots. */
orcd_status eng_plan_chunk(const arch *a, const mf_file *f, const arch_config *c, be_device *dev,
                           const be_kv_spec *spec, uint64_t available, int *chunk, orcd_error *err) ORCD_MUST_USE;

/* The plan that eng_open follows, made by the same code. Of p->device only a name, not "auto", says something about the
 * others. ORCD_ERR_NOMEM when it does not fit: `out` then says what is missing. With p->backend.dry the device need
 * not be here. */
orcd_status eng_plan_only(const eng_params *p, eng_plan *out, orcd_error *err) ORCD_MUST_USE;

/* Open file, tokenizer, device; plan memory (fails with required and available numbers before allocating); load;
 * start the engine thread. */
orcd_status eng_open(const eng_params *p, eng **out, orcd_error *err) ORCD_MUST_USE;
/* Cancels what runs, joins the thread, frees everything. Accepts NULL. */
void eng_close(eng *e);

const eng_info *eng_get_info(const eng *e);
const tok *eng_tok(const eng *e); /* NULL without a tokenizer */
const arch_config *eng_config(const eng *e);
be_device *eng_device(eng *e);

/* ---- requests ---- */

typedef enum eng_stop {                     /* why a request ended */
                        ENG_STOP_EOS,       /* a token of stop_id */
                        ENG_STOP_LENGTH,    /* max_new reached, or the context is full */
                        ENG_STOP_CALLER,    /* on_token answered ENG_END */
                        ENG_STOP_CANCELLED, /* eng_cancel, shutdown */
                        ENG_STOP_DEADLINE,
                        ENG_STOP_ERROR, /* see result.error */
} eng_stop;

typedef struct eng_logprob {
    int32_t id;
    float logprob;
} eng_logprob;

typedef struct eng_token {
    int32_t id;
    int32_t index; /* 0-based among generated tokens */
    bool forced;   /* injected by ENG_FORCE, not sampled */
    float logprob; /* of this token, when top_logprobs >= 0, from the unmodified logits */
    int n_top;
    const eng_logprob *top; /* [n_top], best first */
} eng_token;

typedef enum eng_action { ENG_GO, ENG_END, ENG_FORCE, ENG_REPLACE } eng_action;
typedef struct eng_verdict {
    eng_action action;
    /* ENG_FORCE: these come next (they are reported through on_token too), then sampling goes on. ENG_REPLACE: the
     * same in place of the token just reported, which was sampled and is taken back. */
    const int32_t *id;
    int n;
} eng_verdict;

typedef struct eng_result {
    eng_stop stop;
    orcd_error error; /* ENG_STOP_ERROR */
    int32_t n_prompt, n_cached, n_new;
    double queue_s, prefill_s, decode_s; /* waiting; to the first token; from it to the last */
    uint64_t seed;                       /* used, drawn when the request had none */
} eng_result;

typedef struct eng_request {
    const int32_t *prompt; /* copied */
    size_t n_prompt;       /* 1.. ; prompt + 1 must fit the context, else ORCD_ERR_LIMIT */
    /* <= 0: up to the context's end. KV memory is kept for max_new tokens, at most 2,048, ahead; without it for 512;
     * and when it runs out the youngest request waits until there is room and then goes on as if nothing had been. */
    int32_t max_new;
    samp_params sampling;
    bool has_seed;          /* else one is drawn and reported */
    const int32_t *stop_id; /* copied; tokens that end the request; none given: tok_ends of the tokenizer */
    int n_stop_id;
    bool ignore_eos;
    int top_logprobs;        /* -1 = none, 0..20 */
    const uint32_t *bias_id; /* logit bias: copied */
    const float *bias;
    int n_bias;
    const size_t *boundary; /* copied; prompt offsets (ascending) worth a cache entry: ends of messages */
    int n_boundary;
    uint64_t cache_salt; /* prefixes are shared among equal salts only */
    double deadline_s;   /* from submission; 0 = none */

    /* Every generated token, in order. NULL = just generate. */
    eng_verdict (*on_token)(void *ctx, const eng_token *t);
    /* Bitset over the vocabulary of what may come next, or NULL for everything; asked before each sampling. */
    const uint32_t *(*mask)(void *ctx);
    /* Prefill progress: tokens of the prompt done (cached ones included). May be NULL. */
    void (*on_prefill)(void *ctx, int32_t done, int32_t total);
    /* Every token of the prompt in order, with its log-probability after those before it (NAN for the first) and the
     * top_logprobs best; needs top_logprobs >= 0. The prompt is computed a few rows at a time then, without the prefix
     * cache. NULL = not asked. */
    void (*on_prompt)(void *ctx, const eng_token *t);
    /* Exactly once, last, for every request that eng_submit accepted. */
    void (*on_done)(void *ctx, const eng_result *r);
    void *ctx;
} eng_request;

typedef uint64_t eng_ticket;

/* Checks everything about the request now: ORCD_ERR_ARG, ORCD_ERR_LIMIT (context; queue full: err says which, code
 * ORCD_ERR_LIMIT with pos 0 = context, 1 = queue, 2 = never fits the KV memory), else it is queued. */
orcd_status eng_submit(eng *e, const eng_request *r, eng_ticket *out, orcd_error *err) ORCD_MUST_USE;
/* Idempotent; an ended or unknown ticket is fine. on_done still comes. */
void eng_cancel(eng *e, eng_ticket t);
/* No new requests (ORCD_ERR_CANCELLED); what runs goes on. */
void eng_drain(eng *e);

/* What steps carried: tokens that follow others, prompts, or both. */
typedef enum eng_work_kind { ENG_DECODE, ENG_PREFILL, ENG_MIXED, ENG_N_WORK } eng_work_kind;
typedef struct eng_work {
    uint64_t n_steps, n_decode, n_prefill; /* steps done; rows in them */
    double s;                              /* that they took */
} eng_work;

typedef struct eng_stats { /* a snapshot, never blocking on the engine thread */
    int n_running, n_waiting, max_batch;
    uint64_t n_requests, n_preempted, n_tokens_in, n_tokens_cached, n_tokens_out, n_steps;
    uint64_t n_by_stop[6];
    int pages_used[BE_N_POOLS], pages_total[BE_N_POOLS], pages_cached[BE_N_POOLS];
    uint64_t cache_hits, cache_lookups;
    /* Sums: time in steps; of it in the model's forward; of it in the callbacks of requests. What is left is the
     * engine itself. */
    double step_s, forward_s, callback_s;
    eng_work work[ENG_N_WORK];
    double heartbeat_age_s; /* since the engine thread last went round its loop */
    bool resident;          /* the model lies in the device's own memory; looked at once a minute */
    bool failed;            /* for good: see eng_failure */
} eng_stats;
void eng_get_stats(const eng *e, eng_stats *out);
/* Why the engine can do nothing any more: ORCD_ERR_DEVICE, a sticky device error (the process should end with 74), or
 * ORCD_ERR_IO, the model's file is not what it was (70). False while it works. Any thread. */
bool eng_failure(const eng *e, orcd_error *why);

#endif
