/* cli/perplexity.c: `orcd perplexity`: how well a model predicts a text, over strided windows. */
#include "cli/engine_options.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/validate.h"

typedef struct options {
    const char *device, *tokenizer, *dense_type;
    int64_t ctx, stride, threads;
    bool json;
} options;

static const cli_option option[] = {
    {"ctx", 'c', CLI_INT, offsetof(options, ctx), 2, 1 << 20, "N", "tokens per window (default 1024 or the model's)"},
    {"stride", 0, CLI_INT, offsetof(options, stride), 1, 1 << 20, "N", "tokens between windows (default ctx / 2)"},
    {"device", 0, CLI_STR, offsetof(options, device), 0, 0, "auto|cpu|cuda[:N]|ref", "what computes (default cpu)"},
    {"dense-type", 0, CLI_CHOICE, offsetof(options, dense_type), 0, 0, DENSE_TYPES},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE", "tokenizer.json, when not beside the model"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

static void print_result(const options *o, const char *model, const char *file, const nll_sum *s, double seconds) {
    char n[32];
    double rate = (double)s->n / (seconds + 1e-9);
    if (!o->json) {
        printf("perplexity     %.4f +- %.4f\n", perplexity_of(s), perplexity_stderr(s));
        printf("nats per token %.5f +- %.5f\n", s->mean, nll_stderr(s));
        printf("scored         %s tokens of %s, windows of %lld every %lld\n", human_count((uint64_t)s->n, n), file,
               (long long)o->ctx, (long long)o->stride);
        printf("speed          %.0f tokens/s on %s\n", rate, o->device);
        return;
    }
    json_t *j = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f}", "model", model, "file", file,
                          "backend", o->device, "tokens", (json_int_t)s->n, "ctx", (json_int_t)o->ctx, "stride",
                          (json_int_t)o->stride, "nll", s->mean, "nll_stderr", nll_stderr(s), "perplexity",
                          perplexity_of(s), "perplexity_stderr", perplexity_stderr(s), "tokens_per_second", rate);
    json_dumpf(j, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(j);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device = "cpu"};
    const char *rest[2];
    int n_rest, n_ctx;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    if (n_rest != 2)
        return cli_usage(c, "MODEL and FILE are needed");

    orcd_error err = {0};
    orcd_status st;
    char model[4096], *text = NULL;
    size_t len;
    ids tokens = {0};
    teacher *t = NULL;
    nll_sum sum;
    bar b;
    ORCD_TRY_GOTO(st, done, cli_model_path(rest[0], model, sizeof model, &err));
    ORCD_TRY_GOTO(st, done, cli_read_text(rest[1], &text, &len, &err));
    ORCD_TRY_GOTO(st, done, cli_encode(model, o.tokenizer, text, len, &tokens, &n_ctx, &err));
    if (!o.ctx)
        o.ctx = n_ctx < 1024 ? n_ctx : 1024;
    if (!o.stride)
        o.stride = o.ctx / 2;
    bar_begin(&b, "loading", "B");
    teacher_params p = {.model = model,
                        .backend = o.device,
                        .device = {.n_threads = (int)o.threads, .dense_type = dense_type_of(o.dense_type)},
                        .kv_type = strcmp(o.device, "ref") == 0 ? BE_KV_F32 : BE_KV_F16,
                        .n_ctx = (int)o.ctx,
                        .progress = bar_update,
                        .progress_ctx = &b};
    st = teacher_open(&p, &t, &err);
    bar_end(&b);
    if (st != ORCD_OK)
        goto done;
    bar_begin(&b, "scoring", "tok");
    st = perplexity_run(t, tokens.data, (int64_t)tokens.n, o.ctx, o.stride, bar_update, &b, &sum, &err);
    bar_end(&b);
    if (st == ORCD_OK)
        print_result(&o, model, rest[1], &sum, now_s() - b.t0);
done:
    teacher_close(t);
    ids_free(&tokens);
    free(text);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_perplexity = {"perplexity", "MODEL FILE", "how well a model predicts a text, with its error",
                                    option, run};
