/* What the engine itself costs beside the model: of the time in steps, the share that is neither in the model's forward
 * nor in the callbacks of requests, while N sequences decode. bench/serve prints the same number. Usage:
 * engine_overhead MODEL [TOKENS [DEVICE]]; build it with make bench. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/engine.h"

typedef struct done {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int left;
} done;

static void on_done(void *ctx, const eng_result *r) {
    done *d = ctx;
    (void)r;
    pthread_mutex_lock(&d->lock);
    d->left--;
    pthread_cond_signal(&d->cond);
    pthread_mutex_unlock(&d->lock);
}

static eng_verdict on_token(void *ctx, const eng_token *t) {
    (void)ctx, (void)t;
    return (eng_verdict){ENG_GO, NULL, 0};
}

static void measure(eng *e, const char *name, int n, int n_tokens, float temperature, int32_t first) {
    done d = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, n};
    int32_t prompt[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    eng_stats a, b;
    eng_get_stats(e, &a);
    for (int i = 0; i < n; i++) {
        prompt[0] = first++; /* nothing of it is in the prefix cache */
        eng_request r = {.prompt = prompt,
                         .n_prompt = 8,
                         .max_new = n_tokens,
                         .sampling = SAMP_DEFAULTS,
                         .ignore_eos = true,
                         .top_logprobs = -1,
                         .on_token = on_token,
                         .on_done = on_done,
                         .ctx = &d};
        r.sampling.temperature = temperature;
        eng_ticket t;
        orcd_error err;
        if (eng_submit(e, &r, &t, &err) != ORCD_OK) {
            fprintf(stderr, "%s\n", err.message);
            exit(1);
        }
    }
    pthread_mutex_lock(&d.lock);
    while (d.left)
        pthread_cond_wait(&d.cond, &d.lock);
    pthread_mutex_unlock(&d.lock);
    eng_get_stats(e, &b);
    double step = b.step_s - a.step_s, engine = step - (b.forward_s - a.forward_s) - (b.callback_s - a.callback_s);
    printf("%-8s batch %2d: %6.2f %% overhead, %7.1f us of %9.1f us per step, %7.1f tok/s\n", name, n,
           100 * engine / step, 1e6 * engine / (double)(b.n_steps - a.n_steps),
           1e6 * step / (double)(b.n_steps - a.n_steps), (double)(b.n_tokens_out - a.n_tokens_out) / step);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: engine_overhead MODEL [TOKENS [DEVICE]]\n");
        return 2;
    }
    int n_tokens = argc > 2 ? atoi(argv[2]) : 64;
    eng_params p = {.model = argv[1], .n_ctx = 1024, .max_batch = 64, .device = argc > 3 ? argv[3] : "auto"};
    eng *e;
    orcd_error err;
    if (eng_open(&p, &e, &err) != ORCD_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    printf("%s on %s\n", argv[1], eng_get_info(e)->device);
    for (int k = 0; k < 2; k++)
        for (int n = 1; n <= 64; n *= 64)
            measure(e, k ? "sampled" : "greedy", n, n_tokens, (float)k, 100 + 200 * k + n);
    eng_close(e);
    return 0;
}
