/* Many requests that join and leave at random, all at once, against the same requests alone: every token. On a GPU with
 * a random model of the real widths and two layers, else with the small one of the tree. Usage: test_engine_many
 * [DEVICE [MODEL [REQUESTS]]] */
#include "arch/synth.h"
#include "engine_jobs.h"

#define FABLE "models/fable.gguf"

enum { GROUPS = 4 }; /* a third of the prompts begins like others of its group */

static char made[] = "/tmp/orcd-many-XXXXXX";
static const char *model;
static int n_request, at_once, most_prompt, most_new;

/* Request i: everything about it follows from its number. */
static job *request(int i, int n_vocab, int32_t *prompt) {
    static const uint32_t bias_id[] = {9, 300, 4};
    static const float bias[] = {3, -100, 1};
    uint64_t rng = 1000 + (uint64_t)i, group = (uint64_t)(i / 3 % GROUPS);
    int n = 1 + (int)t_below(&rng, (uint64_t)most_prompt), n_shared = i % 3 ? 0 : (int)t_below(&rng, (uint64_t)n);
    for (int k = 0; k < n; k++)
        prompt[k] = (int32_t)t_below(k < n_shared ? &group : &rng, (uint64_t)n_vocab);
    job *j = new_job(prompt, n, 1 + (int)t_below(&rng, (uint64_t)most_new));
    samp_params *p = &j->r.sampling;
    if (i % 2) {
        p->temperature = 0.3f + 0.01f * (float)t_below(&rng, 120);
        p->top_p = i % 4 == 1 ? 0.9f : 1;
        p->top_k = i % 8 == 3 ? 40 : 0;
        p->min_p = i % 8 == 7 ? 0.02f : 0;
        p->seed = (uint64_t)i;
        j->r.has_seed = true;
    }
    if (i > n_request / 2 && i % 8 == 5)
        j->r.mask = mask_by_last;
    if (i % 8 == 2)
        p->repetition_penalty = 1.2f;
    if (i % 8 == 3)
        p->presence_penalty = 0.6f, p->frequency_penalty = 0.2f;
    if (i % 16 == 6)
        j->r.bias_id = bias_id, j->r.bias = bias, j->r.n_bias = 3;
    if (i % 4 == 3)
        j->r.top_logprobs = i % 21;
    j->r.ignore_eos = i % 4 != 0;
    return j;
}

static bool leaves_early(int i) { return i % 10 == 7; }

/* Submits them all, as many as may run without a pause, the others as time goes by; some are cancelled. */
static void run_together(eng *e, job **j, int32_t *prompt) {
    uint64_t rng = 5;
    eng_stats s;
    int most = 0;
    for (int i = 0; i < n_request; i++) {
        j[i] = submit(e, request(i, eng_get_info(e)->n_vocab, prompt + (ptrdiff_t)i * most_prompt));
        if (i < at_once - 1)
            continue;
        usleep((useconds_t)t_below(&rng, 3000));
        for (int k = i + 1 - at_once; k <= i; k++)
            if (leaves_early(k) && t_below(&rng, 10) == 0)
                eng_cancel(e, j[k]->ticket);
        eng_get_stats(e, &s);
        most = s.n_running > most ? s.n_running : most;
    }
    do {
        eng_get_stats(e, &s);
        most = s.n_running > most ? s.n_running : most;
        usleep(500);
    } while (s.n_running + s.n_waiting > 0);
    for (int i = 0; i < n_request; i++)
        wait_for(j[i]);
    for (int k = 0; k < ENG_N_WORK; k++)
        printf("%s: %llu steps, %.1f rows of decoding and %.1f of prompts in each\n",
               k == ENG_DECODE    ? "decode"
               : k == ENG_PREFILL ? "prefill"
                                  : "mixed",
               (unsigned long long)s.work[k].n_steps, (double)s.work[k].n_decode / (double)(s.work[k].n_steps + 1),
               (double)s.work[k].n_prefill / (double)(s.work[k].n_steps + 1));
    printf("at most %d at once; %llu of %llu prompt tokens were cached\n", most, (unsigned long long)s.n_tokens_cached,
           (unsigned long long)s.n_tokens_in);
    assert_true(most > at_once / 2);
    assert_true(s.n_tokens_cached > 0);
    assert_true(s.work[ENG_MIXED].n_steps > 0);
}

/* What came is what comes alone, to the end or to where the request was cancelled. */
static bool same(const job *got, const job *alone, int i) {
    bool whole = got->result.stop != ENG_STOP_CANCELLED;
    int n = 0;
    assert_true(whole || leaves_early(i));
    while (n < got->n_out && n < alone->n_out && got->out[n] == alone->out[n])
        n++;
    if (n == got->n_out &&
        (!whole || (n == alone->n_out && got->result.stop == alone->result.stop && got->told == alone->told)))
        return true;
    printf("request %d (%zu tokens of prompt, %d cached, %s) is another from token %d of %d (alone %d) on, or its "
           "log-probabilities are\n",
           i, got->r.n_prompt, got->result.n_cached, i % 2 ? "sampled" : "greedy", n, got->n_out, alone->n_out);
    return false;
}

/* The widths, experts and vocabulary of gpt-oss-20b. */
static void make_wide_model(const char *path) {
    const arch_types types = {"Q8_0", "MXFP4"};
    const arch *a;
    arch_config c;
    arch_exported sum;
    gguf_writer *w;
    orcd_error err;
    if (!arch_preset("gpt-oss-20b", &a, &c))
        fail();
    c.n_layer = 2;
    if (gguf_create(path, 32, &w, &err) || arch_synth_keys(a, &c, "gpt-oss-20b", w, &err) ||
        arch_synth(a, &c, &types, 1, 8, NULL, NULL, w, &sum, &err) || gguf_finish(w, &err))
        fail_msg("%s", err.message);
}

static void requests__equal_the_same_alone(void **state) {
    (void)state;
    const int n_ctx = most_prompt + most_new;
    if (!model) {
        int fd = mkstemp(made);
        assert_true(fd >= 0);
        close(fd);
        make_wide_model(model = made);
    }
    job **j = calloc((size_t)n_request, sizeof *j);
    int32_t *prompt = calloc((size_t)n_request * (size_t)most_prompt, sizeof *prompt);
    assert_true(j && prompt);
    eng *e = open_engine((eng_params){.model = model, .n_ctx = n_ctx, .max_batch = at_once, .max_queue = n_request});
    run_together(e, j, prompt);
    assert_idle(e);
    eng_close(e);
    e = open_engine((eng_params){.model = model, .n_ctx = n_ctx, .cache_bytes = ENG_NO_CACHE});
    int n_same = 0, n_cancelled = 0;
    for (int i = 0; i < n_request; i++) {
        job *alone = wait_for(submit(e, request(i, eng_get_info(e)->n_vocab, prompt + (ptrdiff_t)i * most_prompt)));
        n_same += same(j[i], alone, i);
        n_cancelled += j[i]->result.stop == ENG_STOP_CANCELLED;
        free_job(alone);
        free_job(j[i]);
    }
    eng_close(e);
    printf("%d of %d requests equal the same alone; %d of them were cancelled\n", n_same, n_request, n_cancelled);
    assert_int_equal(n_same, n_request);
    free(j);
    free(prompt);
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(requests__equal_the_same_alone)};
    device = argc > 1 ? argv[1] : "cpu";
    bool gpu = strncmp(device, "cuda", 4) == 0;
    model = argc > 2 ? argv[2] : gpu ? NULL : FABLE; /* NULL: made */
    n_request = argc > 3 ? atoi(argv[3]) : gpu ? 500 : 60;
    at_once = gpu ? 256 : 16;
    at_once = at_once < n_request * 2 / 3 ? at_once : n_request * 2 / 3; /* the others find prompts in the cache */
    most_prompt = gpu ? 700 : 200;
    most_new = gpu ? 160 : 40;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (model == made)
        unlink(made);
    return failed;
}
