/* The engine on small real models (tests/golden: window 16 and gpt2 without windows), on the backend that this build
 * prefers or on the device named as argument. */
#include "base/file.h"
#include "engine_jobs.h"

#define GPT2 "tests/golden/gpt2-mini"

/* ---- counting allocations of this process ---- */

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && defined(__GLIBC__)
#define COUNTS_ALLOCATIONS 1
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *malloc(size_t n) {
    atomic_fetch_add_explicit(&n_alloc, 1, memory_order_relaxed);
    return __libc_malloc(n);
}
void *calloc(size_t n, size_t m) {
    atomic_fetch_add_explicit(&n_alloc, 1, memory_order_relaxed);
    return __libc_calloc(n, m);
}
void *realloc(void *p, size_t n) {
    atomic_fetch_add_explicit(&n_alloc, 1, memory_order_relaxed);
    return __libc_realloc(p, n);
}
#endif

/* ---- tokens ---- */

static void greedy__equals_transformers(void **state) {
    (void)state;
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 1024, .kv_type = BE_KV_F32});
    for (int i = 0; i < 4; i++) {
        char path[128];
        size_t n, n_want;
        snprintf(path, sizeof path, MINI "/prompt%d.i32", i);
        int32_t *prompt = (int32_t *)t_read(path, &n);
        snprintf(path, sizeof path, MINI "/greedy%d.i32", i);
        int32_t *want = (int32_t *)t_read(path, &n_want);
        job *j = wait_for(submit(e, new_job(prompt, (int)(n / 4), (int)(n_want / 4))));
        assert_int_equal(j->n_out, n_want / 4);
        assert_memory_equal(j->out, want, n_want);
        assert_int_equal(j->result.stop, ENG_STOP_LENGTH);
        assert_int_equal(j->result.n_new, j->n_out);
        free_job(j);
        free(prompt);
        free(want);
    }
    eng_close(e);
}

static void batch__sixty_four_at_once_equal_each_alone(void **state) {
    (void)state;
    enum { N = 64 };
    static int32_t prompt[N][400];
    job *together[N];
    eng *e = open_mini(N, 0), *alone;
    for (int i = 0; i < N; i++)
        together[i] = submit(e, mixed_job(i, prompt[i]));
    for (int i = 0; i < N; i++)
        wait_for(together[i]);
    assert_idle(e);
    eng_close(e);
    alone = open_engine((eng_params){.model = MINI, .n_ctx = 512, .chunk = 7, .cache_bytes = ENG_NO_CACHE});
    for (int i = 0; i < N; i++) {
        job *j = wait_for(submit(alone, mixed_job(i, prompt[i])));
        assert_int_equal(j->result.n_cached, 0);
        assert_same(j, together[i]);
        free_job(j);
        free_job(together[i]);
    }
    eng_close(alone);
}

static void batch__random_cancels_disturb_no_one(void **state) {
    (void)state;
    enum { N = 96 };
    static int32_t prompt[N][400];
    job *j[N];
    uint64_t rng = 3;
    eng *e = open_mini(8, 0);
    bool cancelled[N];
    for (int i = 0; i < N; i++) {
        j[i] = submit(e, mixed_job(i, prompt[i]));
        cancelled[i] = t_below(&rng, 3) == 0;
    }
    for (int i = 0; i < N; i++) {
        if (cancelled[i])
            eng_cancel(e, j[i]->ticket);
        usleep((useconds_t)t_below(&rng, 3000));
    }
    eng_cancel(e, 123456789); /* unknown ones are fine */
    int n_cancelled = 0;
    for (int i = 0; i < N; i++)
        n_cancelled += wait_for(j[i])->result.stop == ENG_STOP_CANCELLED;
    assert_true(n_cancelled > 0);
    assert_idle(e);
    for (int i = 0; i < N; i++) {
        if (j[i]->result.stop != ENG_STOP_CANCELLED) {
            job *again = wait_for(submit(e, mixed_job(i, prompt[i])));
            assert_same(again, j[i]);
            free_job(again);
        } else {
            assert_true(cancelled[i]);
        }
        free_job(j[i]);
    }
    assert_idle(e);
    eng_close(e);
}

/* ---- limits ---- */

static void queue__has_a_bound_and_keeps_order(void **state) {
    (void)state;
    int32_t prompt[4] = {1, 2, 3, 4};
    orcd_error err;
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 256, .max_queue = 3});
    job *first = new_job(prompt, 4, 3), *waiting[3], *refused = new_job(prompt, 4, 3);
    first->gate_at = 1;
    submit(e, first);
    wait_at_gate(first);
    for (int i = 0; i < 3; i++)
        waiting[i] = submit(e, new_job(prompt, 4, 2));
    assert_int_equal(try_submit(e, refused, &err), ORCD_ERR_LIMIT);
    assert_int_equal(err.pos, 1);
    eng_cancel(e, waiting[1]->ticket);
    open_gate(first);
    assert_int_equal(wait_for(waiting[1])->result.stop, ENG_STOP_CANCELLED);
    assert_int_equal(wait_for(waiting[2])->result.stop, ENG_STOP_LENGTH);
    assert_int_equal(waiting[0]->n_done, 1); /* it came before */
    assert_int_equal(wait_for(first)->result.stop, ENG_STOP_LENGTH);
    free_job(first);
    for (int i = 0; i < 3; i++)
        free_job(waiting[i]);
    refused->n_done = 1;
    free_job(refused);
    eng_drain(e);
    job *late = new_job(prompt, 4, 2);
    assert_int_equal(try_submit(e, late, &err), ORCD_ERR_CANCELLED);
    late->n_done = 1;
    free_job(late);
    eng_close(e);
}

static eng_verdict take_time(void *ctx, const eng_token *t) {
    (void)ctx, (void)t;
    usleep(2000);
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void deadline__ends_running_and_waiting_requests(void **state) {
    (void)state;
    int32_t prompt[4] = {1, 2, 3, 4};
    eng *e = open_mini(1, 0);
    job *running = new_job(prompt, 4, 0), *waiting = new_job(prompt, 4, 5);
    running->r.ignore_eos = true;
    running->r.on_token = take_time; /* or a fast machine would be done before the first deadline */
    running->r.deadline_s = 0.3;
    waiting->r.deadline_s = 0.1;
    submit(e, running);
    submit(e, waiting);
    assert_int_equal(wait_for(waiting)->result.stop, ENG_STOP_DEADLINE);
    assert_int_equal(waiting->result.n_new, 0);
    assert_int_equal(wait_for(running)->result.stop, ENG_STOP_DEADLINE);
    free_job(running);
    free_job(waiting);
    eng_close(e);
}

static void close__ends_what_runs_and_waits(void **state) {
    (void)state;
    int32_t prompt[4] = {1, 2, 3, 4};
    eng *e = open_mini(2, 0);
    job *j[5];
    for (int i = 0; i < 5; i++) {
        j[i] = new_job(prompt, 4, 0);
        j[i]->r.on_token = NULL;
        submit(e, j[i]);
    }
    eng_close(e);
    for (int i = 0; i < 5; i++)
        free_job(j[i]); /* on_done came exactly once */
}

static void submit__refuses_what_is_out_of_range(void **state) {
    (void)state;
    static int32_t prompt[300] = {1};
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 256});
    const int32_t bad_ids[] = {512, -1};
    const uint32_t bias_id[] = {512};
    const float bias[] = {1}, nan_bias[] = {NAN};
    const uint32_t good_id[] = {0};
    for (int k = 0; k < 14; k++) {
        job *j = new_job(prompt, 4, 1);
        orcd_status want = ORCD_ERR_ARG;
        switch (k) {
        case 0:
            j->r.n_prompt = 0;
            break;
        case 1:
            j->r.prompt = bad_ids, j->r.n_prompt = 1;
            break;
        case 2:
            j->r.prompt = bad_ids + 1, j->r.n_prompt = 1;
            break;
        case 3:
            j->r.n_prompt = 256, want = ORCD_ERR_LIMIT;
            break;
        case 4:
            j->r.sampling.temperature = 2.1f;
            break;
        case 5:
            j->r.sampling.temperature = NAN;
            break;
        case 6:
            j->r.sampling.top_p = -0.1f;
            break;
        case 7:
            j->r.sampling.min_p = 1.1f;
            break;
        case 8:
            j->r.sampling.top_k = -1;
            break;
        case 9:
            j->r.sampling.repetition_penalty = 0;
            break;
        case 10:
            j->r.top_logprobs = 21;
            break;
        case 11:
            j->r.bias_id = bias_id, j->r.bias = bias, j->r.n_bias = 1;
            break;
        case 12:
            j->r.bias_id = good_id, j->r.bias = nan_bias, j->r.n_bias = 1;
            break;
        case 13:
            j->r.n_stop_id = 2;
            break;
        }
        orcd_error err = {0};
        assert_int_equal(try_submit(e, j, &err), want);
        assert_true(err.message[0] != '\0');
        assert_true(want != ORCD_ERR_LIMIT || err.pos == 0);
        j->n_done = 1;
        free_job(j);
    }
    job *full = wait_for(submit(e, new_job(prompt, 255, 10))); /* one token fits */
    assert_int_equal(full->n_out, 1);
    assert_int_equal(full->result.stop, ENG_STOP_LENGTH);
    free_job(full);
    eng_close(e);
}

/* KV memory for three full contexts, eight slots: requests wait for memory, none fails. */
static void memory__admission_waits_until_it_fits(void **state) {
    (void)state;
    static int32_t prompt[24][400];
    uint64_t page = page_bytes();
    eng *e =
        open_engine((eng_params){.model = MINI, .n_ctx = 512, .max_batch = 8, .max_queue = 64, .kv_bytes = 60 * page});
    eng_stats s;
    eng_get_stats(e, &s);
    assert_true(s.pages_total[BE_POOL_FULL] < 30);
    job *j[24];
    for (int i = 0; i < 24; i++) {
        j[i] = mixed_job(i, prompt[i]);
        j[i]->r.max_new = i % 4 ? 100 : 500;
        j[i]->end_at = 8 + i % 9;
        submit(e, j[i]);
    }
    for (int i = 0; i < 24; i++)
        assert_int_equal(wait_for(j[i])->result.stop, ENG_STOP_CALLER);
    assert_idle(e);
    for (int i = 0; i < 24; i++)
        free_job(j[i]);
    orcd_error err;
    eng *none = NULL;
    assert_int_equal(eng_open(&(eng_params){.model = MINI, .n_ctx = 131072, .kv_bytes = 10 * page}, &none, &err),
                     ORCD_ERR_NOMEM);
    assert_null(none);
    eng_close(e);
}

/* 8 full pages and 24 of windows leave two for the rows of a step. */
static void memory__a_default_step_is_no_larger_than_the_kv_memory_carries(void **state) {
    (void)state;
    eng_params p = {.model = MINI, .n_ctx = 512, .max_batch = 8, .kv_bytes = 34 * page_bytes()};
    eng *e = open_engine(p), *none = NULL;
    orcd_error err;
    assert_int_equal(eng_get_info(e)->chunk, 64);
    eng_close(e);
    p.device = device;
    p.chunk = 256;
    assert_int_equal(eng_open(&p, &none, &err), ORCD_ERR_NOMEM);
    assert_null(none);
}

static void memory__answers_of_unknown_length_grow_and_the_youngest_give_way(void **state) {
    (void)state;
    job *const *want = open_ended_alone();
    for (int with_cache = 0; with_cache < 2; with_cache++) {
        eng *e = open_engine(scarce(with_cache ? 0 : ENG_NO_CACHE));
        check_growth(e, want);
        assert_idle(e);
        eng_close(e);
    }
    for (int i = 0; i < N_OPEN; i++)
        free_job(want[i]);
}

static void memory__those_who_gave_way_can_be_cancelled_and_expire(void **state) {
    (void)state;
    static int32_t prompt[N_OPEN][400];
    job *j[N_OPEN];
    eng_stats s;
    eng *e = open_engine(scarce(0));
    for (int round = 0; round < 3; round++) {
        uint64_t before;
        eng_get_stats(e, &s);
        before = s.n_preempted;
        for (int i = 0; i < N_OPEN; i++) {
            j[i] = open_ended(i + round, prompt[i]);
            j[i]->r.deadline_s = round == 1 ? 0.4 : 0;
            submit(e, j[i]);
        }
        do {
            eng_get_stats(e, &s);
            usleep(500);
        } while (s.n_preempted == before && s.n_running + s.n_waiting > 0);
        assert_true(round == 1 || s.n_preempted > before);
        for (int i = N_OPEN; i-- > 0 && round == 0;)
            eng_cancel(e, j[i]->ticket);
        if (round == 2) { /* closed while some wait for their place */
            eng_close(e);
            e = NULL;
        }
        for (int i = 0; i < N_OPEN; i++) {
            eng_stop stop = wait_for(j[i])->result.stop;
            assert_true(stop == (round == 1 ? ENG_STOP_DEADLINE : ENG_STOP_CANCELLED) || stop == ENG_STOP_LENGTH);
            assert_int_equal(j[i]->result.n_new, j[i]->n_out);
            free_job(j[i]);
        }
        if (e)
            assert_idle(e);
    }
}

/* ---- prefix cache ---- */

static void prefix__a_follow_up_computes_only_what_is_new(void **state) {
    (void)state;
    static int32_t text[1024];
    const char *const models[] = {MINI, GPT2};
    for (int m = 0; m < 2; m++) {
        eng *e = open_engine((eng_params){.model = models[m], .n_ctx = 500, .max_batch = 2, .chunk = 64});
        eng *plain = open_engine((eng_params){.model = models[m], .n_ctx = 500, .cache_bytes = ENG_NO_CACHE});
        fill_ids(text, 1024, 9);
        int n = 83;
        for (int turn = 0; turn < 5; turn++) {
            job *a = wait_for(submit(e, new_job(text, n, 20))), *b = wait_for(submit(plain, new_job(text, n, 20)));
            assert_same(a, b);
            assert_int_equal(b->result.n_cached, 0);
            assert_int_equal(a->result.n_cached, turn ? n - 12 : 0); /* all but the question; the answer's last token */
            for (int i = 0; i < 20; i++)
                text[n + i] = a->out[i]; /* the answer, then a question of 11 tokens */
            n += 31;
            free_job(a);
            free_job(b);
        }
        job *again = wait_for(submit(e, new_job(text, n - 31, 20)));
        assert_int_equal(again->result.n_cached, n - 31 - 1); /* the same prompt: all but its last token */
        free_job(again);
        eng_close(e);
        eng_close(plain);
    }
}

static void prefix__an_answer_that_is_dropped_resumes_at_the_prompts_end(void **state) {
    (void)state;
    static int32_t text[512];
    fill_ids(text, 512, 10);
    const size_t boundary[] = {70, 133};
    eng *e = open_mini(1, 0);
    job *a = new_job(text, 150, 30);
    a->r.boundary = boundary;
    a->r.n_boundary = 2;
    wait_for(submit(e, a));
    job *b = wait_for(submit(e, new_job(text, 400, 2))); /* goes on differently from the answer */
    assert_int_equal(b->result.n_cached, 150);
    text[140] ^= 1; /* another last message */
    job *c = wait_for(submit(e, new_job(text, 160, 2)));
    assert_int_equal(c->result.n_cached, 133);
    text[100] ^= 1;
    job *d = wait_for(submit(e, new_job(text, 160, 2)));
    assert_int_equal(d->result.n_cached, 100); /* the window of the entry at 133 reaches back that far */
    job *other = new_job(text, 160, 2);
    other->r.cache_salt = 5;
    wait_for(submit(e, other));
    assert_int_equal(other->result.n_cached, 0);
    free_job(a);
    free_job(b);
    free_job(c);
    free_job(d);
    free_job(other);
    eng_close(e);
}

static void prefix__a_hundred_turns_cost_the_same_each(void **state) {
    (void)state;
    static int32_t text[4096];
    fill_ids(text, 4096, 11);
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 4096, .chunk = 64});
    int n = 30;
    for (int turn = 0; turn < 100; turn++) {
        job *j = wait_for(submit(e, new_job(text, n, 8)));
        assert_true(turn == 0 || n - j->result.n_cached == 22 + 1);
        memcpy(text + n, j->out, 8 * sizeof *text);
        n += 30;
        free_job(j);
    }
    eng_close(e);
}

static void prefix__several_answers_compute_their_prompt_once(void **state) {
    (void)state;
    static int32_t text[400];
    fill_ids(text, 400, 17);
    eng *e = open_mini(8, 0);
    job *j[6];
    for (int i = 0; i < 6; i++) {
        j[i] = new_job(text, i < 4 ? 300 : 380, 5);
        submit(e, j[i]);
    }
    for (int i = 0; i < 6; i++)
        wait_for(j[i]);
    for (int i = 1; i < 6; i++) {
        assert_int_equal(j[i]->result.n_cached, i < 4 ? 299 : i == 4 ? 300 : 379);
        if (i < 4)
            assert_same(j[i], j[0]);
    }
    assert_same(j[4], j[5]);
    for (int i = 0; i < 6; i++)
        free_job(j[i]);
    eng_close(e);
}

static void prefix__a_small_cache_forgets_the_oldest(void **state) {
    (void)state;
    static int32_t text[3][256];
    uint64_t limit = 9 * page_bytes(); /* one of these requests leaves 4 full pages and 2 to 4 window pages */
    eng *e = open_engine((eng_params){.model = MINI, .n_ctx = 512, .cache_bytes = limit});
    for (int k = 0; k < 3; k++) {
        fill_ids(text[k], 256, 100 + (uint64_t)k);
        free_job(wait_for(submit(e, new_job(text[k], 200, 2))));
    }
    eng_stats s;
    eng_get_stats(e, &s);
    uint64_t bytes = 0;
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        bytes += (uint64_t)s.pages_cached[pool] * e->kv.pool[pool].page_bytes;
    assert_true(bytes <= limit && bytes > 0);
    job *newest = wait_for(submit(e, new_job(text[2], 200, 2)));
    assert_int_equal(newest->result.n_cached, 199);
    job *oldest = wait_for(submit(e, new_job(text[0], 200, 2)));
    assert_int_equal(oldest->result.n_cached, 0);
    free_job(newest);
    free_job(oldest);
    eng_close(e);
}

/* ---- verdicts, masks, log-probabilities ---- */

static void force__tokens_are_fed_reported_and_change_what_follows(void **state) {
    (void)state;
    int32_t prompt[20], with[40];
    const int32_t forced[] = {7, 300, 7, 411, 99999}; /* the last one is no token and is left out */
    fill_ids(prompt, 20, 12);
    eng *e = open_mini(2, 0);
    job *a = new_job(prompt, 20, 15);
    a->force_at = 3;
    a->force = forced;
    a->n_force = 5;
    wait_for(submit(e, a));
    assert_int_equal(a->n_out, 15);
    for (int i = 0; i < 15; i++)
        assert_int_equal(a->forced[i], i >= 3 && i < 7);
    assert_memory_equal(a->out + 3, forced, 4 * sizeof *forced);
    memcpy(with, prompt, sizeof prompt);
    memcpy(with + 20, a->out, 7 * sizeof *with);
    job *b = wait_for(submit(e, new_job(with, 27, 8)));
    assert_memory_equal(b->out, a->out + 7, 8 * sizeof *with);

    job *cut = new_job(prompt, 20, 5); /* the limit falls among the forced ones */
    cut->force_at = 3;
    cut->force = forced;
    cut->n_force = 4;
    wait_for(submit(e, cut));
    assert_int_equal(cut->n_out, 5);
    assert_int_equal(cut->result.stop, ENG_STOP_LENGTH);

    job *replaced = new_job(prompt, 20, 15); /* the third token is taken back */
    replaced->replace_at = 3;
    replaced->force = forced;
    replaced->n_force = 2;
    wait_for(submit(e, replaced));
    assert_int_equal(replaced->n_out, 15);
    assert_memory_equal(replaced->out, a->out, 2 * sizeof *forced);
    assert_memory_equal(replaced->out + 2, forced, 2 * sizeof *forced);
    memcpy(with + 20, replaced->out, 4 * sizeof *with);
    job *same = wait_for(submit(e, new_job(with, 24, 11)));
    assert_memory_equal(same->out, replaced->out + 4, 11 * sizeof *with);
    free_job(replaced);
    free_job(same);

    const int32_t stop_id = a->out[2];
    job *stop = new_job(prompt, 20, 15), *resisted = new_job(prompt, 20, 15);
    stop->r.stop_id = resisted->r.stop_id = &stop_id;
    stop->r.n_stop_id = resisted->r.n_stop_id = 1;
    wait_for(submit(e, stop));
    assert_int_equal(stop->result.stop, ENG_STOP_EOS);
    assert_int_equal(stop->out[stop->n_out - 1], stop_id);
    resisted->force_at = stop->n_out;
    resisted->force = forced;
    resisted->n_force = 1;
    wait_for(submit(e, resisted));
    assert_true(resisted->n_out > stop->n_out);
    free_job(a);
    free_job(b);
    free_job(cut);
    free_job(stop);
    free_job(resisted);
    eng_close(e);
}

static void verdict__end_stops_at_once(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    eng *e = open_mini(1, 0);
    job *j = new_job(prompt, 5, 50);
    j->end_at = 4;
    wait_for(submit(e, j));
    assert_int_equal(j->n_out, 4);
    assert_int_equal(j->result.stop, ENG_STOP_CALLER);
    free_job(j);
    eng_close(e);
}

static void mask__bias_and_logprobs(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    uint32_t bits[16] = {0};
    bits[100 / 32] |= 1u << 100 % 32;
    bits[301 / 32] |= 1u << 301 % 32;
    eng *e = open_mini(1, 0);
    job *j = new_job(prompt, 5, 20);
    j->mask = bits;
    j->r.mask = mask;
    j->r.sampling.temperature = 1;
    j->r.top_logprobs = 20;
    wait_for(submit(e, j));
    assert_int_equal(j->n_out, 20);
    for (int i = 0; i < 20; i++)
        assert_true(j->out[i] == 100 || j->out[i] == 301);
    assert_true(j->logprob < 0 && j->top_sum > 0 && j->top_sum <= 1.0001f);
    free_job(j);

    const uint32_t bias_id[] = {77};
    const float bias[] = {1000};
    j = new_job(prompt, 5, 3);
    j->r.bias_id = bias_id;
    j->r.bias = bias;
    j->r.n_bias = 1;
    wait_for(submit(e, j));
    for (int i = 0; i < 3; i++)
        assert_int_equal(j->out[i], 77);
    free_job(j);

    uint32_t none[16] = {0};
    j = new_job(prompt, 5, 3);
    j->mask = none;
    j->r.mask = mask;
    wait_for(submit(e, j));
    assert_int_equal(j->result.stop, ENG_STOP_ERROR);
    assert_int_equal(j->result.error.code, ORCD_ERR_INTERNAL);
    free_job(j);
    eng_close(e);
}

/* ---- steady state ---- */

static void window__pages_stay_few_however_long_the_sequence(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    eng *e = open_mini(1, ENG_NO_CACHE);
    job *j = new_job(prompt, 5, 900);
    j->gate_at = 850;
    submit(e, j);
    wait_at_gate(j);
    eng_stats s;
    eng_get_stats(e, &s);
    assert_true(s.pages_used[BE_POOL_WINDOW] <= 2);
    assert_true(s.pages_used[BE_POOL_FULL] >= 855 / BE_PAGE);
    open_gate(j);
    free_job(wait_for(j));
    eng_close(e);
}

static void thousand_requests__pages_return(void **state) {
    (void)state;
    enum { N = 1000 };
    static int32_t prompt[64];
    fill_ids(prompt, 64, 13);
    eng *e = open_mini(16, ENG_NO_CACHE);
    static job *j[N];
    for (int i = 0; i < N; i++) {
        j[i] = new_job(prompt + i % 32, 1 + i % 5, 1 + i % 3);
        submit(e, j[i]);
        if (i % 5 == 0)
            eng_cancel(e, j[i]->ticket);
    }
    for (int i = 0; i < N; i++)
        free_job(wait_for(j[i]));
    eng_stats s;
    eng_get_stats(e, &s);
    assert_int_equal(s.n_requests, N);
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        assert_int_equal(s.pages_used[pool], 0);
    uint64_t ended = 0;
    for (int i = 0; i <= ENG_STOP_ERROR; i++)
        ended += s.n_by_stop[i];
    assert_int_equal(ended, N);
    assert_true(s.heartbeat_age_s < 2);
    eng_close(e);
}

static void decode__allocates_nothing(void **state) {
    (void)state;
#ifndef COUNTS_ALLOCATIONS
    skip();
#else
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    eng *e = open_mini(2, 0);
    job *j[2];
    for (int i = 0; i < 2; i++) {
        j[i] = new_job(prompt, 5, 300);
        j[i]->r.sampling.temperature = 1;
        j[i]->r.sampling.frequency_penalty = 0.1f;
        j[i]->r.top_logprobs = 5;
        j[i]->count_from = 20;
        submit(e, j[i]);
    }
    for (int i = 0; i < 2; i++) {
        wait_for(j[i]);
        assert_int_equal(j[i]->n_out, 300);
    }
    /* the reference backend allocates its step, no other does */
    int own = strcmp(e->dev->ops->name, "ref") == 0 ? 299 - 20 : 0;
    assert_int_equal(j[0]->n_alloc_to - j[0]->n_alloc_from, own);
    assert_true(j[0]->n_alloc_from > 0);
    for (int i = 0; i < 2; i++)
        free_job(j[i]);
    eng_close(e);
#endif
}

enum { STREAMS = 4 };

/* A long prompt as it is computed, and how many tokens each stream had at each of its steps. */
typedef struct beside {
    job *stream[STREAMS];
    int32_t done;
    int told[STREAMS], n_call, most_rows, most_missed;
    bool ended;
} beside;

static void on_long_prefill(void *ctx, int32_t done, int32_t total) {
    beside *b = ctx;
    (void)total;
    if (b->n_call > 0 && done - b->done > b->most_rows) /* the first call comes before any step */
        b->most_rows = done - b->done;
    for (int i = 0; i < STREAMS; i++) {
        if (b->n_call > 1 && b->told[i] > 0 && b->stream[i]->n_out != b->told[i] + 1)
            b->most_missed++;
        b->told[i] = b->stream[i]->n_out;
    }
    b->done = done;
    b->n_call++;
}

static eng_verdict go_on(void *ctx, const eng_token *t) {
    (void)ctx, (void)t;
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void on_long_done(void *ctx, const eng_result *r) {
    beside *b = ctx;
    job *first = b->stream[0];
    (void)r;
    pthread_mutex_lock(&first->lock);
    b->ended = true;
    pthread_cond_broadcast(&first->cond);
    pthread_mutex_unlock(&first->lock);
}

/* However long a prompt is, at most one chunk of it stands between two tokens of every running stream. */
static void long_prompt__streams_go_on_beside_it(void **state) {
    (void)state;
    static int32_t prompt[1000];
    fill_ids(prompt, 1000, 14);
    eng *e = open_mini(STREAMS + 1, 0);
    beside b = {0};
    for (int i = 0; i < STREAMS; i++) {
        b.stream[i] = new_job(prompt + i, 5, 500);
        b.stream[i]->gate_at = i == 0 ? 3 : 0;
        submit(e, b.stream[i]);
    }
    wait_at_gate(b.stream[0]);
    const eng_request r = {.prompt = prompt,
                           .n_prompt = 900,
                           .max_new = 1,
                           .sampling = SAMP_DEFAULTS,
                           .top_logprobs = -1,
                           .on_token = go_on,
                           .on_prefill = on_long_prefill,
                           .on_done = on_long_done,
                           .ctx = &b};
    orcd_error err;
    eng_ticket ticket;
    assert_int_equal(eng_submit(e, &r, &ticket, &err), ORCD_OK);
    open_gate(b.stream[0]);
    pthread_mutex_lock(&b.stream[0]->lock);
    while (!b.ended)
        pthread_cond_wait(&b.stream[0]->cond, &b.stream[0]->lock);
    pthread_mutex_unlock(&b.stream[0]->lock);
    assert_true(b.n_call > 890 / 64);
    assert_true(b.most_rows > 0 && b.most_rows <= 64);
    assert_int_equal(b.most_missed, 0);
    for (int i = 0; i < STREAMS; i++)
        free_job(wait_for(b.stream[i]));
    eng_close(e);
}

static job *ended[8];
static int n_ended;

static void note_end(void *ctx, const eng_result *r) {
    ended[n_ended++] = ctx;
    on_done(ctx, r);
}

/* Each is ready as soon as it can be, and a short one does not wait for the long ones before it. */
static void prompts__are_computed_one_after_the_other(void **state) {
    (void)state;
    enum { LONG = 5 };
    static int32_t prompt[LONG + 2][300];
    job *j[LONG + 2];
    eng *e = open_mini(LONG + 2, 0);
    for (int i = 0; i < LONG + 2; i++) {
        fill_ids(prompt[i], 300, (uint64_t)i + 40);
        j[i] = new_job(prompt[i], i == 0 ? 4 : i <= LONG ? 300 : 20, 1);
        j[i]->r.on_done = note_end;
    }
    j[0]->gate_at = 1; /* holds the engine until all are there */
    n_ended = 0;
    submit(e, j[0]);
    wait_at_gate(j[0]);
    for (int i = 1; i < LONG + 2; i++)
        submit(e, j[i]);
    open_gate(j[0]);
    for (int i = 0; i < LONG + 2; i++)
        wait_for(j[i]);
    assert_ptr_equal(ended[1], j[LONG + 1]);
    for (int i = 1; i <= LONG; i++)
        assert_ptr_equal(ended[i + 1], j[i]);
    for (int i = 0; i < LONG + 2; i++)
        free_job(j[i]);
    eng_close(e);
}

/* ---- failures ---- */

static orcd_status bad_end(be_step *s, orcd_error *err);
static be_ops faulty;
static const be_ops *sound;
static orcd_status fault;

static orcd_status bad_end(be_step *s, orcd_error *err) {
    orcd_status st = sound->step_end(s, err);
    return st == ORCD_OK && fault != ORCD_OK ? orcd_fail(err, fault, "injected") : st;
}

static void failure__of_a_step_ends_its_requests_only(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    orcd_error err;
    eng *e = open_mini(2, 0);
    sound = e->dev->ops;
    faulty = *sound;
    faulty.step_end = bad_end;
    e->dev->ops = &faulty; /* idle: the queue's lock publishes it */
    fault = ORCD_ERR_NOMEM;
    job *bad = wait_for(submit(e, new_job(prompt, 5, 5)));
    assert_int_equal(bad->result.stop, ENG_STOP_ERROR);
    assert_int_equal(bad->result.error.code, ORCD_ERR_NOMEM);
    fault = ORCD_OK;
    job *good = wait_for(submit(e, new_job(prompt, 5, 5)));
    assert_int_equal(good->result.stop, ENG_STOP_LENGTH);
    assert_int_equal(good->result.n_cached, 0);
    fault = ORCD_ERR_DEVICE;
    job *lost = wait_for(submit(e, new_job(prompt, 5, 5))), *late = new_job(prompt, 5, 5);
    assert_int_equal(lost->result.error.code, ORCD_ERR_DEVICE);
    assert_int_equal(try_submit(e, late, &err), ORCD_ERR_DEVICE);
    late->n_done = 1;
    eng_stats s;
    eng_get_stats(e, &s);
    assert_true(s.failed);
    free_job(bad);
    free_job(good);
    free_job(lost);
    free_job(late);
    e->dev->ops = sound;
    eng_close(e);
}

static const float *nan_host(be_device *d, const be_act *a) {
    static float row[8 * 512];
    (void)d, (void)a;
    row[200] = fault == ORCD_OK ? 1 : NAN;
    return row;
}

static void failure__not_a_number_ends_the_request(void **state) {
    (void)state;
    int32_t prompt[5] = {5, 6, 7, 8, 9};
    eng *e = open_mini(1, 0);
    sound = e->dev->ops;
    faulty = *sound;
    faulty.act_host = nan_host;
    e->dev->ops = &faulty;
    fault = ORCD_ERR_INTERNAL;
    for (int temperature = 0; temperature < 2; temperature++) {
        job *j = new_job(prompt, 5, 5);
        j->r.sampling.temperature = (float)temperature;
        wait_for(submit(e, j));
        assert_int_equal(j->result.stop, ENG_STOP_ERROR);
        assert_int_equal(j->result.error.code, ORCD_ERR_INTERNAL);
        assert_non_null(strstr(j->result.error.message, "numerical error"));
        assert_int_equal(j->n_out, 0);
        free_job(j);
    }
    fault = ORCD_OK;
    job *fine = wait_for(submit(e, new_job(prompt, 5, 5)));
    assert_int_equal(fine->out[4], 200);
    free_job(fine);
    e->dev->ops = sound;
    eng_close(e);
}

static void cut_file(void *ctx, uint64_t n_done, uint64_t n_total) {
    if (n_done > 0 && n_done < n_total)
        assert_int_equal(truncate(ctx, 1500001), 0);
}

static void open__a_file_cut_while_loading_is_an_error(void **state) {
    (void)state;
    char path[] = "/tmp/orcd-test-XXXXXX";
    file_map from;
    orcd_error err;
    eng *e;
    int fd = mkstemp(path);
    assert_int_equal(file_open("models/fable.gguf", &from, &err), ORCD_OK);
    assert_int_equal(write(fd, from.data, from.size), from.size);
    close(fd);
    file_close(&from);
    const eng_params p = {.model = path, .device = device, .progress = cut_file, .progress_ctx = path};
    assert_int_equal(eng_open(&p, &e, &err), ORCD_ERR_IO);
    assert_non_null(strstr(err.message, "became shorter"));
    assert_null(e);
    unlink(path);
}

static void open__refuses_what_cannot_be(void **state) {
    (void)state;
    eng *e;
    orcd_error err;
    assert_int_equal(eng_open(&(eng_params){.model = "tests/none"}, &e, &err) == ORCD_OK, false);
    assert_int_equal(eng_open(&(eng_params){.model = MINI, .device = "tpu"}, &e, &err) == ORCD_OK, false);
    assert_int_equal(eng_open(&(eng_params){.model = MINI, .max_batch = 257}, &e, &err), ORCD_ERR_ARG);
    assert_int_equal(eng_open(&(eng_params){.model = MINI, .n_ctx = 131073}, &e, &err), ORCD_ERR_LIMIT);
    assert_int_equal(eng_open(&(eng_params){.model = MINI, .need_tokenizer = true}, &e, &err) == ORCD_OK, false);
    assert_int_equal(
        eng_open(&(eng_params){.model = MINI, .n_ctx = 131072, .max_batch = 1, .kv_bytes = 1 << 20}, &e, &err),
        ORCD_ERR_NOMEM);
    assert_non_null(strstr(err.message, "MiB"));
    assert_null(e);
    eng_close(NULL);
}

int main(int argc, char **argv) {
    const struct CMUnitTest anywhere[] = {
        cmocka_unit_test(batch__sixty_four_at_once_equal_each_alone),
        cmocka_unit_test(batch__random_cancels_disturb_no_one),
        cmocka_unit_test(queue__has_a_bound_and_keeps_order),
        cmocka_unit_test(deadline__ends_running_and_waiting_requests),
        cmocka_unit_test(close__ends_what_runs_and_waits),
        cmocka_unit_test(submit__refuses_what_is_out_of_range),
        cmocka_unit_test(memory__admission_waits_until_it_fits),
        cmocka_unit_test(memory__a_default_step_is_no_larger_than_the_kv_memory_carries),
        cmocka_unit_test(memory__answers_of_unknown_length_grow_and_the_youngest_give_way),
        cmocka_unit_test(memory__those_who_gave_way_can_be_cancelled_and_expire),
        cmocka_unit_test(prefix__a_follow_up_computes_only_what_is_new),
        cmocka_unit_test(prefix__an_answer_that_is_dropped_resumes_at_the_prompts_end),
        cmocka_unit_test(prefix__a_hundred_turns_cost_the_same_each),
        cmocka_unit_test(prefix__several_answers_compute_their_prompt_once),
        cmocka_unit_test(prefix__a_small_cache_forgets_the_oldest),
        cmocka_unit_test(force__tokens_are_fed_reported_and_change_what_follows),
        cmocka_unit_test(verdict__end_stops_at_once),
        cmocka_unit_test(mask__bias_and_logprobs),
        cmocka_unit_test(window__pages_stay_few_however_long_the_sequence),
        cmocka_unit_test(thousand_requests__pages_return),
        cmocka_unit_test(long_prompt__streams_go_on_beside_it),
        cmocka_unit_test(prompts__are_computed_one_after_the_other),
    };
    const struct CMUnitTest host[] = {
        /* these look into or replace what a CPU backend does */
        cmocka_unit_test(greedy__equals_transformers),
        cmocka_unit_test(decode__allocates_nothing),
        cmocka_unit_test(failure__of_a_step_ends_its_requests_only),
        cmocka_unit_test(failure__not_a_number_ends_the_request),
        cmocka_unit_test(open__refuses_what_cannot_be),
        cmocka_unit_test(open__a_file_cut_while_loading_is_an_error),
    };
    if (argc > 1)
        device = argv[1];
    int failed = cmocka_run_group_tests(anywhere, NULL, NULL);
    if (strncmp(device, "cuda", 4) == 0)
        return failed;
    device = argc > 1 ? device : "cpu";
    return failed + cmocka_run_group_tests(host, NULL, NULL);
}
