/* cli/bench.c: `orcd bench`: tokens per second of prefill and decode, by length, depth and number of streams, measured
 * on the model's steps alone: no scheduler, tokenizer or sampler. */
#include "cli/cli.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/arch.h"

enum { MAX_LIST = 16 };

typedef struct options {
    const char *device, *prompt, *depth, *streams, *kv_type;
    int64_t threads, chunk, gen, reps, act_bits, cpu_experts;
    bool no_repack, json;
} options;

static const cli_option option[] = {
    {"device", 0, CLI_STR, offsetof(options, device), 0, 0, "auto|cpu|cuda[:N]|ref", "what computes (default auto)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"prompt", 'p', CLI_STR, offsetof(options, prompt), 0, 0, "N,N...", "prompt lengths (default 128,512; 0: none)"},
    {"depth", 0, CLI_STR, offsetof(options, depth), 0, 0, "N,N...", "positions before the first decoded (default 0)"},
    {"streams", 0, CLI_STR, offsetof(options, streams), 0, 0, "N,N...", "sequences decoded together (default 1)"},
    {"gen", 'n', CLI_INT, offsetof(options, gen), 0, 65536, "N", "decoded tokens a sequence (default 32; 0: none)"},
    {"reps", 'r', CLI_INT, offsetof(options, reps), 1, 100, "N", "repetitions (default 3)"},
    {"chunk", 0, CLI_INT, offsetof(options, chunk), 1, 8192, "N", "prompt tokens per step (default 2048)"},
    {"kv-type", 0, CLI_CHOICE, offsetof(options, kv_type), 0, 0, "f16|f32|f8", "precision of the KV cache"},
    {"act-bits", 0, CLI_INT, offsetof(options, act_bits), 8, 16, "8|16", "bits of the activations (cpu; default 16)"},
    {"cpu-experts", 0, CLI_INT, offsetof(options, cpu_experts), 0, 1024, "N",
     "experts of N layers in host memory (cuda)"},
    {"no-repack", 0, CLI_FLAG, offsetof(options, no_repack), 0, 0, "", "run from the mapped file (cpu)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "one JSON object on standard output"},
    {0},
};

typedef struct bench {
    const options *o;
    be_device *dev;
    arch_config cfg;
    arch_model *model;
    be_kv *kv;
    int n_prompt, n_depth, n_streams, prompt[MAX_LIST], depth[MAX_LIST], streams[MAX_LIST];
    int max_tok, max_streams, n_ctx;
    int32_t *token, *pos, *slot, *out_row, *id; /* [max_tok] */
    be_sample *greedy;                          /* [max_tok], all zero */
    float *row;                                 /* [n_vocab] */
    double load_s;
    uint64_t file_bytes, device_bytes; /* of weights; of everything on the device, 0 = not known */
} bench;

typedef struct result {
    double median, best; /* tokens per second */
} result;

static bool parse_list(const char *s, int lo, int *out, int *n) {
    char *end;
    for (*n = 0; *n < MAX_LIST; s = end + 1) {
        long v = strtol(s, &end, 10);
        if (end == s || v < lo || v > 1 << 20 || (*end != ',' && *end != 0))
            return false;
        if (v > 0 || lo == 0)
            out[(*n)++] = (int)v;
        if (*end == 0)
            return true;
    }
    return false;
}

static int largest(const int *v, int n) {
    int most = 0;
    for (int i = 0; i < n; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

static orcd_status open_kv(bench *b, orcd_error *err) {
    const char *t = b->o->kv_type;
    int per_slot = (b->n_ctx + BE_PAGE - 1) / BE_PAGE, n_page = per_slot * b->max_streams;
    be_kv_spec spec = {.type = strcmp(t, "f32") == 0  ? BE_KV_F32
                               : strcmp(t, "f8") == 0 ? BE_KV_F8
                                                      : BE_KV_F16,
                       .n_slot = b->max_streams,
                       .n_ctx = b->n_ctx,
                       .n_page = {n_page, n_page},
                       .max_tok = b->max_tok,
                       .max_out = b->max_streams};
    arch_kv_spec(&b->cfg, &spec);
    ORCD_TRY(b->dev->ops->kv_open(b->dev, &spec, &b->kv, err));
    for (int pool = 0; pool < BE_N_POOLS; pool++)
        for (int i = 0; i < n_page; i++)
            b->dev->ops->kv_map(b->kv, pool, i / per_slot, i % per_slot, i);
    return ORCD_OK;
}

static orcd_status open_model(bench *b, const char *path, orcd_error *err) {
    const options *o = b->o;
    const arch *a;
    mf_file *f = NULL;
    orcd_status st;
    bar progress;
    be_params params = {.n_threads = (int)o->threads, .no_repack = o->no_repack, .act_bits = (int)o->act_bits};
    arch_size size;
    ORCD_TRY_GOTO(st, done, mf_open(path, &f, err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &b->cfg, err));
    ORCD_TRY_GOTO(st, done, arch_measure(a, f, &b->cfg, &size, err));
    b->file_bytes = size.weight_bytes;
    b->cfg.n_host_layers = (int)o->cpu_experts < b->cfg.n_layer ? (int)o->cpu_experts : b->cfg.n_layer;
    b->n_ctx = b->n_ctx < b->cfg.n_ctx ? b->n_ctx : b->cfg.n_ctx;
    ORCD_TRY_GOTO(st, done, be_open(o->device, &params, &b->dev, err));
    bar_begin(&progress, "loading", "B");
    double t0 = now_s();
    st = arch_load(a, f, &b->cfg, b->dev, b->max_tok, b->max_streams, bar_update, &progress, &b->model, err);
    b->load_s = now_s() - t0;
    bar_end(&progress);
    if (st != ORCD_OK)
        goto done;
    ORCD_TRY_GOTO(st, done, open_kv(b, err));
    b->device_bytes = b->dev->ops->used ? b->dev->ops->used(b->dev) : 0;
    size_t n = (size_t)b->max_tok;
    b->token = calloc(n, sizeof *b->token);
    b->pos = calloc(n, sizeof *b->pos);
    b->slot = calloc(n, sizeof *b->slot);
    b->out_row = calloc(n, sizeof *b->out_row);
    b->id = calloc(n, sizeof *b->id);
    b->greedy = calloc(n, sizeof *b->greedy);
    b->row = calloc((size_t)b->cfg.n_vocab, sizeof *b->row);
    if (!b->token || !b->pos || !b->slot || !b->out_row || !b->id || !b->greedy || !b->row)
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
done:
    if (!o->no_repack || st != ORCD_OK) /* else the weights are read from it; it goes with the process */
        mf_close(f);
    return st;
}

/* A step of `n` rows of one sequence, or of one row of each of `n` sequences, with logits of the last (of each). Random
 * tokens, or without a seed what the device sampled last; with `sample` it samples again and nothing waits. */
static orcd_status submit(bench *b, int n, int pos0, bool one_sequence, uint32_t *seed, bool sample, be_act **logits,
                          orcd_error *err) {
    for (int i = 0; i < n; i++) {
        if (seed)
            *seed = *seed * 1664525u + 1013904223u;
        b->token[i] = seed ? (int32_t)((*seed >> 8) % (uint32_t)b->cfg.n_vocab) : BE_TOKEN_OF(i);
        b->pos[i] = one_sequence ? pos0 + i : pos0;
        b->slot[i] = one_sequence ? 0 : i;
        b->out_row[i] = one_sequence ? n - 1 : i;
    }
    be_batch batch = {n, b->token, b->pos, b->slot, one_sequence ? 1 : n, b->out_row};
    be_step *s;
    ORCD_TRY(b->dev->ops->step_begin(b->dev, b->kv, &batch, &s, err));
    *logits = arch_forward(b->model, s);
    if (sample)
        b->dev->ops->sample(s, *logits, b->greedy);
    return b->dev->ops->step_end(s, err);
}

static orcd_status step(bench *b, int n, int pos0, bool one_sequence, uint32_t *seed, orcd_error *err) {
    be_act *logits;
    ORCD_TRY(submit(b, n, pos0, one_sequence, seed, false, &logits, err));
    return b->dev->ops->act_read(b->dev, logits, 0, 1, b->row, err); /* waits */
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static result summarise(double *seconds, int n, double tokens) {
    qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    return (result){.median = tokens / seconds[n / 2], .best = tokens / seconds[0]};
}

static orcd_status prefill(bench *b, int n, result *out, orcd_error *err) {
    double seconds[100];
    uint32_t seed = 1;
    for (int r = 0; r < b->o->reps; r++) {
        double t0 = now_s();
        for (int at = 0; at < n; at += b->max_tok)
            ORCD_TRY(step(b, n - at < b->max_tok ? n - at : b->max_tok, at, true, &seed, err));
        seconds[r] = now_s() - t0;
    }
    *out = summarise(seconds, (int)b->o->reps, n);
    return ORCD_OK;
}

/* As the engine decodes on a device that samples: the next step is submitted before the last one's tokens are read. */
static orcd_status decode_ahead(bench *b, int depth, int streams, uint32_t *seed, orcd_error *err) {
    be_act *logits;
    for (int i = 0; i < b->o->gen; i++) {
        ORCD_TRY(submit(b, streams, depth + i, false, i ? NULL : seed, true, &logits, err));
        if (i)
            ORCD_TRY(b->dev->ops->sampled(b->dev, b->id, err));
    }
    return b->dev->ops->sampled(b->dev, b->id, err);
}

static orcd_status decode_waiting(bench *b, int depth, int streams, uint32_t *seed, orcd_error *err) {
    for (int i = 0; i < b->o->gen; i++)
        ORCD_TRY(step(b, streams, depth + i, false, seed, err));
    return ORCD_OK;
}

/* What lies in the cache before `depth` does not matter for the time. */
static orcd_status decode(bench *b, int depth, int streams, result *out, orcd_error *err) {
    double seconds[100];
    uint32_t seed = 1;
    orcd_status (*run)(bench *, int, int, uint32_t *, orcd_error *) =
        b->dev->ops->sample ? decode_ahead : decode_waiting;
    ORCD_TRY(step(b, streams, depth, false, &seed, err));
    for (int r = 0; r < b->o->reps; r++) {
        double t0 = now_s();
        ORCD_TRY(run(b, depth, streams, &seed, err));
        seconds[r] = now_s() - t0;
    }
    *out = summarise(seconds, (int)b->o->reps, (double)b->o->gen * streams);
    return ORCD_OK;
}

static void report(const bench *b, bool *first, const char *kind, int tokens, int depth, int streams, result r) {
    if (!b->o->json) {
        if (streams)
            printf("decode   depth %6d  streams %3d   %9.2f tok/s (best %.2f)\n", depth, streams, r.median, r.best);
        else
            printf("prefill  %6d tokens               %9.2f tok/s (best %.2f)\n", tokens, r.median, r.best);
        fflush(stdout);
        return;
    }
    printf(
        "%s{\"kind\": \"%s\", \"tokens\": %d, \"depth\": %d, \"streams\": %d, \"tok_s\": %.3f, \"best_tok_s\": %.3f}",
        *first ? "" : ", ", kind, tokens, depth, streams, r.median, r.best);
    *first = false;
}

static orcd_status measure(bench *b, const char *path, orcd_error *err) {
    char device[128];
    bool first = true;
    result r, best_prefill = {0}, first_decode = {0};
    b->dev->ops->describe(b->dev, device, sizeof device);
    if (b->o->json)
        printf("{\"model\": \"%s\", \"device\": \"%s\", \"results\": [", path, device);
    else
        printf("%s\n%s, loaded in %.2f s (%.1f GB/s)\n", path, device, b->load_s,
               1e-9 * (double)b->file_bytes / b->load_s);
    for (int i = 0; i < b->n_prompt; i++) {
        ORCD_TRY(prefill(b, b->prompt[i], &r, err));
        report(b, &first, "prefill", b->prompt[i], 0, 0, r);
        best_prefill = r.median > best_prefill.median ? r : best_prefill;
    }
    for (int i = 0; i < b->n_depth && b->o->gen > 0; i++)
        for (int k = 0; k < b->n_streams; k++) {
            ORCD_TRY(decode(b, b->depth[i], b->streams[k], &r, err));
            report(b, &first, "decode", (int)b->o->gen, b->depth[i], b->streams[k], r);
            if (i == 0 && k == 0)
                first_decode = r;
        }
    if (b->o->json)
        printf("], \"prefill_tok_s\": %.3f, \"decode_tok_s\": %.3f, \"load_s\": %.3f, \"load_gb_s\": %.3f, "
               "\"device_bytes\": %llu, \"peak_rss_bytes\": %llu}\n",
               best_prefill.median, first_decode.median, b->load_s, 1e-9 * (double)b->file_bytes / b->load_s,
               (unsigned long long)b->device_bytes, (unsigned long long)peak_rss_bytes());
    else if (b->device_bytes)
        printf("device memory %.2f GiB, peak resident memory %.2f GiB\n", (double)b->device_bytes / 0x1p30,
               (double)peak_rss_bytes() / 0x1p30);
    else
        printf("peak resident memory %.2f GiB\n", (double)peak_rss_bytes() / 0x1p30);
    return ORCD_OK;
}

static void close_bench(bench *b) {
    if (b->kv)
        b->dev->ops->kv_close(b->dev, b->kv);
    arch_unload(b->model);
    if (b->dev)
        b->dev->ops->close(b->dev);
    free(b->token);
    free(b->pos);
    free(b->slot);
    free(b->out_row);
    free(b->id);
    free(b->greedy);
    free(b->row);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device = "auto", .prompt = "128,512", .depth = "0", .streams = "1", .kv_type = "f16"};
    o.chunk = 2048, o.gen = 32, o.reps = 3;
    bench b = {.o = &o};
    const char *rest[1];
    int n_rest;
    char path[4096];
    orcd_error err = {0};
    orcd_status st;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (!parse_list(o.prompt, 0, b.prompt, &b.n_prompt) || !parse_list(o.depth, 0, b.depth, &b.n_depth) ||
        !parse_list(o.streams, 1, b.streams, &b.n_streams))
        return cli_usage(c, "--prompt, --depth and --streams are numbers separated by commas, at most %d", MAX_LIST);
    if (b.n_prompt == 1 && b.prompt[0] == 0)
        b.n_prompt = 0;
    int longest = largest(b.prompt, b.n_prompt);
    b.max_streams = largest(b.streams, b.n_streams);
    b.max_tok = longest < o.chunk ? longest : (int)o.chunk;
    b.max_tok = b.max_tok < b.max_streams ? b.max_streams : b.max_tok;
    b.n_ctx = largest(b.depth, b.n_depth) + (int)o.gen + 1;
    b.n_ctx = b.n_ctx < longest ? longest : b.n_ctx;
    ORCD_TRY_GOTO(st, done, cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err));
    ORCD_TRY_GOTO(st, done, open_model(&b, path, &err));
    if (longest > b.n_ctx || largest(b.depth, b.n_depth) + o.gen > b.n_ctx)
        st = orcd_fail(&err, ORCD_ERR_LIMIT, "the model has %d positions; lower --prompt, --depth or --gen", b.n_ctx);
    else
        st = measure(&b, path, &err);
done:
    close_bench(&b);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_bench = {"bench", "[MODEL] [--json]", "measure prefill and decode speed", option, run};
