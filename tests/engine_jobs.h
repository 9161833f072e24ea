/* Engines on a small model, and requests whose outcome is kept: what the tests of the engine share. */
#ifndef ORCD_TESTS_ENGINE_JOBS_H
#define ORCD_TESTS_ENGINE_JOBS_H

#include "testing.h"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include "engine/internal.h"

#define MINI "tests/golden/gptoss-mini"

static atomic_int n_alloc; /* allocations of this process, where it counts them */

static const char *device = "auto";

/* ---- one request and what came of it ---- */

typedef struct job {
    eng_request r;
    eng_result result;
    int32_t out[1024];
    bool forced[1024];
    int n_out, n_done, n_prefill_calls, n_scored;
    float score[400]; /* log-probabilities of the prompt */
    float logprob, top_sum;
    uint64_t told; /* a hash of all log-probabilities */
    pthread_mutex_t lock;
    pthread_cond_t cond;
    /* what on_token does */
    int end_at, force_at, replace_at;
    const int32_t *force;
    int n_force;
    int gate_at; /* waits here until `open` */
    bool at_gate, open;
    const uint32_t *mask;
    int count_from, n_alloc_from, n_alloc_to; /* allocations between token count_from and the last one */
    eng_ticket ticket;
} job;

static inline void hash_logprob(uint64_t *hash, int32_t id, float logprob) {
    uint32_t bits;
    memcpy(&bits, &logprob, sizeof bits);
    *hash = ((*hash ^ (uint32_t)id) * 1099511628211u ^ bits) * 1099511628211u;
}

static inline eng_verdict on_token(void *ctx, const eng_token *t) {
    job *j = ctx;
    eng_verdict v = {ENG_GO, NULL, 0};
    assert_int_equal(t->index, j->n_out);
    assert_true(j->n_out < 1024);
    j->forced[j->n_out] = t->forced;
    j->out[j->n_out++] = t->id;
    j->logprob = t->logprob;
    j->top_sum = 0;
    hash_logprob(&j->told, t->id, t->logprob);
    for (int i = 0; i < t->n_top; i++) {
        j->top_sum += expf(t->top[i].logprob);
        hash_logprob(&j->told, t->top[i].id, t->top[i].logprob);
    }
    if (j->count_from && t->index == j->count_from)
        j->n_alloc_from = atomic_load(&n_alloc);
    if (j->count_from)
        j->n_alloc_to = atomic_load(&n_alloc);
    if (j->gate_at && j->n_out == j->gate_at) {
        pthread_mutex_lock(&j->lock);
        j->at_gate = true;
        pthread_cond_broadcast(&j->cond);
        while (!j->open)
            pthread_cond_wait(&j->cond, &j->lock);
        pthread_mutex_unlock(&j->lock);
    }
    if (j->end_at && j->n_out == j->end_at)
        v.action = ENG_END;
    if (j->force_at && j->n_out == j->force_at)
        v = (eng_verdict){ENG_FORCE, j->force, j->n_force};
    if (j->replace_at && j->n_out == j->replace_at) {
        v = (eng_verdict){ENG_REPLACE, j->force, j->n_force};
        j->replace_at = 0;
        j->n_out--;
    }
    return v;
}

static inline void on_prefill(void *ctx, int32_t done, int32_t total) {
    job *j = ctx;
    assert_true(done <= total);
    j->n_prefill_calls++;
}

static inline void on_prompt(void *ctx, const eng_token *t) {
    job *j = ctx;
    assert_int_equal(t->index, j->n_scored);
    assert_int_equal(t->id, j->r.prompt[t->index]);
    assert_int_equal(t->n_top, t->index ? j->r.top_logprobs : 0);
    j->score[j->n_scored++] = t->logprob;
}

static inline const uint32_t *mask(void *ctx) { return ((job *)ctx)->mask; }

/* Which two thirds of the ids may come depends on the last one. */
static inline const uint32_t *mask_by_last(void *ctx) {
    static const uint32_t word[3] = {0xdb6db6db, 0xb6db6db6, 0x6db6db6d};
    static uint32_t set[3][1 << 13];
    const job *j = ctx;
    int k = j->n_out ? j->out[j->n_out - 1] % 3 : 0;
    for (int i = 0; i < 1 << 13; i++)
        set[k][i] = word[k];
    return set[k];
}

static inline void on_done(void *ctx, const eng_result *r) {
    job *j = ctx;
    pthread_mutex_lock(&j->lock);
    j->result = *r;
    j->n_done++;
    pthread_cond_broadcast(&j->cond);
    pthread_mutex_unlock(&j->lock);
}

static inline job *new_job(const int32_t *prompt, int n_prompt, int max_new) {
    job *j = calloc(1, sizeof *j);
    pthread_mutex_init(&j->lock, NULL);
    pthread_cond_init(&j->cond, NULL);
    j->r = (eng_request){.prompt = prompt,
                         .n_prompt = (size_t)n_prompt,
                         .max_new = max_new,
                         .sampling = SAMP_DEFAULTS,
                         .top_logprobs = -1,
                         .on_token = on_token,
                         .on_prefill = on_prefill,
                         .on_done = on_done,
                         .ctx = j};
    j->r.sampling.temperature = 0;
    return j;
}

static inline orcd_status try_submit(eng *e, job *j, orcd_error *err) { return eng_submit(e, &j->r, &j->ticket, err); }

static inline job *submit(eng *e, job *j) {
    orcd_error err;
    if (try_submit(e, j, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return j;
}

static inline job *wait_for(job *j) {
    pthread_mutex_lock(&j->lock);
    while (j->n_done == 0)
        pthread_cond_wait(&j->cond, &j->lock);
    pthread_mutex_unlock(&j->lock);
    return j;
}

static inline void wait_at_gate(job *j) {
    pthread_mutex_lock(&j->lock);
    while (!j->at_gate)
        pthread_cond_wait(&j->cond, &j->lock);
    pthread_mutex_unlock(&j->lock);
}

static inline void open_gate(job *j) {
    pthread_mutex_lock(&j->lock);
    j->open = true;
    pthread_cond_broadcast(&j->cond);
    pthread_mutex_unlock(&j->lock);
}

static inline void free_job(job *j) {
    assert_int_equal(j->n_done, 1);
    pthread_mutex_destroy(&j->lock);
    pthread_cond_destroy(&j->cond);
    free(j);
}

static inline eng *open_engine(eng_params p) {
    eng *e = NULL;
    orcd_error err;
    p.device = device;
    p.backend.n_threads = 2;
    if (eng_open(&p, &e, &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return e;
}

static inline eng *open_mini(int max_batch, uint64_t cache_bytes) {
    return open_engine((eng_params){.model = MINI,
                                    .n_ctx = 1024,
                                    .max_batch = max_batch,
                                    .max_queue = 1200,
                                    .chunk = 64,
                                    .cache_bytes = cache_bytes});
}

static inline uint64_t page_bytes(void) {
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 64, .cache_bytes = ENG_NO_CACHE});
    uint64_t bytes = e->kv.pool[BE_POOL_FULL].page_bytes;
    eng_close(e);
    return bytes;
}

static inline void fill_ids(int32_t *id, int n, uint64_t seed) {
    for (int i = 0; i < n; i++)
        id[i] = (int32_t)t_below(&seed, 512);
}

static inline void assert_same(const job *a, const job *b) {
    assert_int_equal(a->n_out, b->n_out);
    for (int i = 0; i < a->n_out; i++)
        if (a->out[i] != b->out[i])
            fail_msg("token %d of %d differs: %d and %d (cached %d and %d)", i, a->n_out, a->out[i], b->out[i],
                     a->result.n_cached, b->result.n_cached);
    if (a->told != b->told)
        fail_msg("log-probabilities of %d tokens differ", a->n_out);
}

static inline void assert_idle(eng *e) {
    eng_stats s;
    eng_get_stats(e, &s);
    assert_int_equal(s.n_running, 0);
    assert_int_equal(s.n_waiting, 0);
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        assert_int_equal(s.pages_used[pool], s.pages_cached[pool]);
}

static inline job *mixed_job(int i, int32_t prompt[400]) {
    int n = 1 + i * 37 % 90;
    fill_ids(prompt, 400, i % 3 ? (uint64_t)i : 1); /* every third one shares its beginning */
    job *j = new_job(prompt, n, 8 + i % 9);
    if (i % 2) {
        j->r.sampling.temperature = 0.9f;
        j->r.sampling.top_p = i % 4 == 1 ? 1 : 0.9f;
        j->r.sampling.seed = (uint64_t)i;
        j->r.has_seed = true;
    }
    return j;
}

/* ---- answers of unknown length in less memory than they may come to ---- */

#ifdef __SANITIZE_THREAD__
enum { N_OPEN = 2, OPEN_CTX = 1024 }; /* each token is slow enough */
#else
enum { N_OPEN = 3, OPEN_CTX = 1024 };
#endif

static inline job *open_ended(int i, int32_t prompt[400]) {
    job *j = mixed_job(i, prompt);
    j->r.max_new = 0;
    j->r.ignore_eos = true;
    return j;
}

/* Pages for a context and a half: two answers begin, and only one of them can come to the end at a time. */
static inline eng_params scarce(uint64_t cache_bytes) {
    return (eng_params){.model = MINI,
                        .n_ctx = OPEN_CTX,
                        .max_batch = 6,
                        .max_queue = 64,
                        .chunk = 64,
                        .kv_bytes = 46 * page_bytes(),
                        .cache_bytes = cache_bytes};
}

/* Each of N_OPEN at once must be what it is alone; that some gave way is asserted. */
static inline void check_growth(eng *e, job *const want[N_OPEN]) {
    static int32_t prompt[N_OPEN][400];
    job *j[N_OPEN];
    eng_stats s;
    int most = 0;
    for (int i = 0; i < N_OPEN; i++)
        j[i] = submit(e, open_ended(i, prompt[i]));
    do {
        eng_get_stats(e, &s);
        assert_true(s.pages_total[BE_POOL_FULL] < 2 * OPEN_CTX / BE_PAGE);
        most = s.n_running > most ? s.n_running : most;
        usleep(500);
    } while (s.n_running + s.n_waiting > 0);
    for (int i = 0; i < N_OPEN; i++) {
        wait_for(j[i]);
        assert_int_equal(j[i]->result.stop, ENG_STOP_LENGTH);
        assert_int_equal(j[i]->result.n_prompt + j[i]->n_out, OPEN_CTX);
        assert_same(j[i], want[i]);
        free_job(j[i]);
    }
    eng_get_stats(e, &s);
    assert_true(most >= 2);
    assert_true(s.n_preempted > 0);
    assert_int_equal(s.n_requests, N_OPEN);
}

/* A long prompt whose tokens are to be scored. */
static inline job *scored(int i, int32_t prompt[400]) {
    job *j = mixed_job(i, prompt);
    j->r.n_prompt = 300;
    j->r.top_logprobs = 2;
    j->r.on_prompt = on_prompt;
    return j;
}

static inline void assert_same_scores(const job *a, const job *b) {
    assert_int_equal(a->n_scored, 300);
    assert_int_equal(b->n_scored, 300);
    assert_true(isnan(a->score[0]) && isnan(b->score[0]));
    assert_memory_equal(a->score + 1, b->score + 1, 299 * sizeof *a->score);
    assert_same(a, b);
}

/* What each gives alone, computed once and kept. */
static inline job *const *open_ended_alone(void) {
    static int32_t prompt[N_OPEN][400];
    static job *want[N_OPEN];
    eng *e =
        open_engine((eng_params){.model = MINI, .n_ctx = OPEN_CTX, .max_batch = N_OPEN, .cache_bytes = ENG_NO_CACHE});
    for (int i = 0; i < N_OPEN; i++)
        want[i] = submit(e, open_ended(i, prompt[i]));
    for (int i = 0; i < N_OPEN; i++)
        wait_for(want[i]);
    eng_close(e);
    return want;
}

#endif
