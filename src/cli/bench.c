/* cli/bench.c: `orcd bench`: tokens per second of prefill and decode, by length, depth and number of streams, measured
 * on the model's steps alone: no scheduler, tokenizer or sampler. */
#include "cli/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bandwidth.h"
#include "cli/engine_options.h"

enum { MAX_LIST = 16, MAX_REPS = 100 };

typedef struct options {
    const char *device, *prompt, *depth, *streams, *kv_type, *dense_type, *svg;
    int64_t threads, chunk, gen, reps, act_bits, cpu_experts, kernel_mib;
    bool no_repack, no_ceilings, kernels, csv, json, all_logits;
} options;

static const cli_option option[] = {
    {"device", 0, CLI_STR, offsetof(options, device), 0, 0, "auto|cpu|cuda[:N]|ref", "what computes (default auto)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"prompt", 'p', CLI_STR, offsetof(options, prompt), 0, 0, "N,N...", "prompt lengths (default 128,512; 0: none)"},
    {"depth", 0, CLI_STR, offsetof(options, depth), 0, 0, "N,N...", "positions before the first token (default 0)"},
    {"streams", 0, CLI_STR, offsetof(options, streams), 0, 0, "N,N...", "sequences together (default 1)"},
    {"gen", 'n', CLI_INT, offsetof(options, gen), 0, 65536, "N", "decoded tokens a sequence (default 32; 0: none)"},
    {"reps", 'r', CLI_INT, offsetof(options, reps), 1, 100, "N", "repetitions after a warm-up (default 3)"},
    {"chunk", 0, CLI_INT, offsetof(options, chunk), 1, 8192, "N", "prompt tokens per step (default: as serve)"},
    {"kv-type", 0, CLI_CHOICE, offsetof(options, kv_type), 0, 0, KV_TYPES},
    {"dense-type", 0, CLI_CHOICE, offsetof(options, dense_type), 0, 0, DENSE_TYPES},
    {"act-bits", 0, CLI_INT, offsetof(options, act_bits), 8, 16, "8|16", "bits of the activations (cpu; default 16)"},
    {"cpu-experts", 0, CLI_INT, offsetof(options, cpu_experts), 0, 1024, "N",
     "experts of N layers in host memory (cuda)"},
    {"no-repack", 0, CLI_FLAG, offsetof(options, no_repack), 0, 0, "", "run from the mapped file (cpu)"},
    {"all-logits", 0, CLI_FLAG, offsetof(options, all_logits), 0, 0, "", "decode as with a temperature, not greedily"},
    {"no-ceilings", 0, CLI_FLAG, offsetof(options, no_ceilings), 0, 0, "", "do not measure the device itself"},
    {"kernels", 0, CLI_FLAG, offsetof(options, kernels), 0, 0, "", "products of each weight type instead of a model"},
    {"kernel-mib", 0, CLI_INT, offsetof(options, kernel_mib), 1, 16384, "N", "size of their weights (default 256)"},
    {"csv", 0, CLI_FLAG, offsetof(options, csv), 0, 0, "", "comma-separated values instead of a table"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "one JSON object on standard output"},
    {"svg", 0, CLI_STR, offsetof(options, svg), 0, 0, "FILE", "plot the results"},
    {0},
};

/* Multiply-adds that weights ask of a row, and how many of them with each stored type. */
typedef struct products {
    double body, head; /* head: from the last layer to the logits */
    double by_type[256], expert_share;
} products;

typedef struct bench {
    const options *o;
    mf_file *file; /* weights may be read from it until the end */
    be_device *dev;
    arch_config cfg;
    arch_model *model;
    be_kv *kv;
    int n_prompt, n_depth, n_streams, prompt[MAX_LIST], depth[MAX_LIST], streams[MAX_LIST];
    int max_tok, max_streams, n_ctx;
    int32_t *token, *pos, *slot, *out_row, *id; /* [max_tok] */
    be_sample *greedy;                          /* [max_tok], all zero */
    float *row;                                 /* [n_vocab] */
    products work;
    eng_plan plan;    /* as far as the ceilings need it */
    double host_rate; /* of the memory where experts were left */
    bench_report r;
} bench;

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

static bench_form form_of(const options *o) { return o->json ? BENCH_JSON : o->csv ? BENCH_CSV : BENCH_TABLE; }

static be_params params_of(const options *o) {
    return (be_params){.n_threads = (int)o->threads,
                       .no_repack = o->no_repack,
                       .act_bits = (int)o->act_bits,
                       .dense_type = dense_type_of(o->dense_type)};
}

/* ---- the device itself ---- */

static orcd_status count_products(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    products *p = ctx;
    const mf_tensor *m = data[0];
    (void)err;
    if (t->exact || t->use == BE_USE_EMBED || t->use == BE_USE_VECTOR)
        return ORCD_OK;
    double n = (double)(m->n_row * m->n_col) * (t->use == BE_USE_LINEAR ? 1 : (double)m->n_mat * p->expert_share);
    *(t->layer < 0 ? &p->head : &p->body) += n;
    p->by_type[(uint8_t)m->type] += n;
    return ORCD_OK;
}

/* On a device opened for it alone, so that nothing stays behind. */
static orcd_status measure_device(const options *o, const be_params *params, q_type type, bench_report *r,
                                  orcd_error *err) {
    orcd_status st;
    be_device *d = NULL;
    be_product p = {.type = type, .n_col = 4096, .n_row = 4096, .n = 1, .rows = {512}};
    ORCD_TRY(be_open(o->device, params, &d, err));
    st = be_time_product(d, &p, err);
    if (st == ORCD_OK)
        st = be_read_speed(d, &r->read_rate, err);
    r->mac_type = type;
    r->mac_rate = (double)p.n_row * (double)p.n_col * p.rows[0] / p.seconds[0];
    d->ops->close(d);
    return st;
}

/* Multiply-adds of one row that looks back on `depth` positions. */
static double work_of_row(const bench *b, double depth, bool logits) {
    const arch_config *c = &b->cfg;
    double sum = b->work.body + (logits ? b->work.head : 0);
    for (int i = 0; i < c->n_layer; i++)
        sum += 2.0 * c->n_head * c->head_dim * (c->window[i] && c->window[i] < depth ? c->window[i] : depth);
    return sum;
}

/* What the device allows: reading what the steps need once, and multiplying at its best rate. */
static void set_ceiling(const bench *b, bench_row *r) {
    const bench_report *rep = &b->r;
    int rows = r->decode ? r->streams : r->tokens * r->streams < b->max_tok ? r->tokens * r->streams : b->max_tok;
    double middle = r->depth + r->tokens / 2.0;
    if (rep->read_rate <= 0)
        return;
    double memory = eng_plan_speed(&b->plan, rows, r->decode ? (int)middle : 0, rep->read_rate, b->host_rate);
    double product = rep->mac_rate / work_of_row(b, middle, r->decode);
    r->by_memory = memory < product;
    r->ceiling = r->by_memory ? memory : product;
}

/* ---- the model ---- */

static orcd_status open_kv(bench *b, be_kv_spec *spec, orcd_error *err) {
    int per_slot = (b->n_ctx + BE_PAGE - 1) / BE_PAGE;
    ORCD_TRY(b->dev->ops->kv_open(b->dev, spec, &b->kv, err));
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        b->plan.page_bytes[pool] = b->kv->page_bytes[pool];
        for (int i = 0; i < spec->n_page[pool]; i++)
            b->dev->ops->kv_map(b->kv, pool, i / per_slot, i % per_slot, i);
    }
    return ORCD_OK;
}

static be_kv_spec kv_spec_of(bench *b) {
    int n_page = (b->n_ctx + BE_PAGE - 1) / BE_PAGE * b->max_streams;
    be_kv_spec spec = {.type = kv_type_of(b->o->kv_type),
                       .n_slot = b->max_streams,
                       .n_ctx = b->n_ctx,
                       .n_page = {n_page, n_page},
                       .max_tok = b->max_tok,
                       .max_out = b->max_streams};
    arch_kv_spec(&b->cfg, &spec);
    return spec;
}

static orcd_status make_tables(bench *b, orcd_error *err) {
    size_t n = (size_t)b->max_tok;
    b->token = calloc(n, sizeof *b->token);
    b->pos = calloc(n, sizeof *b->pos);
    b->slot = calloc(n, sizeof *b->slot);
    b->out_row = calloc(n, sizeof *b->out_row);
    b->id = calloc(n, sizeof *b->id);
    b->greedy = calloc(n, sizeof *b->greedy);
    b->row = calloc((size_t)b->cfg.n_vocab, sizeof *b->row);
    if (!b->token || !b->pos || !b->slot || !b->out_row || !b->id || !b->greedy || !b->row)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    return ORCD_OK;
}

static orcd_status read_file(bench *b, const char *path, const arch **a, orcd_error *err) {
    arch_size size;
    arch_config *c = &b->cfg;
    ORCD_TRY(mf_open(path, &b->file, err));
    ORCD_TRY(arch_identify(b->file, a, err));
    ORCD_TRY(arch_config_read(*a, b->file, c, err));
    ORCD_TRY(arch_measure(*a, b->file, c, &size, err));
    if (b->n_ctx > c->n_ctx)
        return orcd_fail(err, ORCD_ERR_LIMIT, "the model has %d positions; lower --prompt, --depth or --gen", c->n_ctx);
    b->r.model = path;
    b->r.file_bytes = size.weight_bytes;
    c->n_host_layers = (int)b->o->cpu_experts < c->n_layer ? (int)b->o->cpu_experts : c->n_layer;
    b->plan.expert_share = b->work.expert_share = c->n_expert ? (double)c->n_expert_used / c->n_expert : 0;
    for (int i = 0; i < c->n_layer; i++)
        b->plan.window = c->window[i] > b->plan.window ? c->window[i] : b->plan.window;
    return arch_each_tensor(*a, c, 1, (const mf_file *const *)&b->file, count_products, &b->work, err);
}

/* Rows of the largest step: prompts in pieces as large as the engine's. */
static orcd_status choose_step(bench *b, const arch *a, orcd_error *err) {
    int chunk = (int)b->o->chunk, rows = largest(b->prompt, b->n_prompt) * b->max_streams;
    be_kv_spec spec = kv_spec_of(b);
    uint64_t total, available;
    b->dev->ops->memory(b->dev, &total, &available);
    if (!chunk)
        ORCD_TRY(eng_plan_chunk(a, b->file, &b->cfg, b->dev, &spec, available, &chunk, err));
    b->max_tok = rows < chunk ? rows : chunk;
    b->max_tok = b->max_tok < b->max_streams ? b->max_streams : b->max_tok;
    return ORCD_OK;
}

static orcd_status open_model(bench *b, const char *path, orcd_error *err) {
    const options *o = b->o;
    const arch *a;
    bar progress;
    be_params params = params_of(o);
    int type = 0;
    ORCD_TRY(read_file(b, path, &a, err));
    for (int i = 1; i < 256; i++)
        type = b->work.by_type[i] > b->work.by_type[type] ? i : type;
    if (!o->no_ceilings && strcmp(o->device, "ref") != 0)
        ORCD_TRY(measure_device(o, &params, (q_type)type, &b->r, err));
    if (!o->no_ceilings && b->cfg.n_host_layers)
        ORCD_TRY(mem_bandwidth(8, &b->host_rate, err));
    reset_peak_rss();
    ORCD_TRY(be_open(o->device, &params, &b->dev, err));
    ORCD_TRY(choose_step(b, a, err));
    be_kv_spec spec = kv_spec_of(b);
    ORCD_TRY(arch_plan(a, b->file, &b->cfg, b->dev, &spec, &b->plan.m, err));
    bar_begin(&progress, "loading", "B");
    double t0 = now_s();
    orcd_status st =
        arch_load(a, b->file, &b->cfg, b->dev, b->max_tok, b->max_streams, bar_update, &progress, &b->model, err);
    b->r.load_s = now_s() - t0;
    bar_end(&progress);
    ORCD_TRY(st);
    ORCD_TRY(open_kv(b, &spec, err));
    b->dev->ops->describe(b->dev, b->r.device, sizeof b->r.device);
    b->r.device_bytes = b->dev->ops->used ? b->dev->ops->used(b->dev) : 0;
    return make_tables(b, err);
}

/* ---- steps ---- */

static int32_t draw(const bench *b, uint32_t *seed) {
    *seed = *seed * 1664525u + 1013904223u;
    return (int32_t)((*seed >> 8) % (uint32_t)b->cfg.n_vocab);
}

/* Rows at .. at + n - 1 of the prompts of all streams laid end to end. As the engine does: logits only of a prompt's
 * last row, and where the device samples, only its token comes back. */
static orcd_status prefill_step(bench *b, const bench_row *r, int at, int n, uint32_t *seed, orcd_error *err) {
    be_batch batch = {n, b->token, b->pos, b->slot, 0, b->out_row, false};
    for (int i = 0; i < n; i++) {
        b->token[i] = draw(b, seed);
        b->pos[i] = r->depth + (at + i) % r->tokens;
        b->slot[i] = (at + i) / r->tokens;
        if ((at + i + 1) % r->tokens == 0)
            b->out_row[batch.n_out++] = i;
    }
    const bool sample = batch.n_out && b->dev->ops->sample;
    be_step *s;
    ORCD_TRY(b->dev->ops->step_begin(b->dev, b->kv, &batch, &s, err));
    be_act *logits = arch_forward(b->model, s);
    if (sample)
        b->dev->ops->sample(s, logits, b->greedy);
    ORCD_TRY(b->dev->ops->step_end(s, err));
    if (sample)
        return b->dev->ops->sampled(b->dev, b->id, NULL, err);
    return batch.n_out ? b->dev->ops->act_read(b->dev, logits, 0, 1, b->row, err) : ORCD_OK;
}

/* One row of each stream: random tokens, or without a seed what the device sampled last; with `sample` it samples again
 * and nothing waits. */
static orcd_status decode_step(bench *b, int streams, int pos, uint32_t *seed, bool sample, be_act **logits,
                               orcd_error *err) {
    for (int i = 0; i < streams; i++) {
        b->token[i] = seed ? draw(b, seed) : BE_TOKEN_OF(i);
        b->pos[i] = pos;
        b->slot[i] = b->out_row[i] = i;
    }
    be_step *s;
    be_batch batch = {streams, b->token, b->pos, b->slot, streams, b->out_row, !b->o->all_logits};
    ORCD_TRY(b->dev->ops->step_begin(b->dev, b->kv, &batch, &s, err));
    *logits = arch_forward(b->model, s);
    if (sample)
        b->dev->ops->sample(s, *logits, b->greedy);
    return b->dev->ops->step_end(s, err);
}

/* ---- measuring ---- */

static orcd_status prefill(bench *b, const bench_row *r, bool warm_up, uint32_t *seed, orcd_error *err) {
    int total = r->tokens * r->streams, end = warm_up && b->max_tok < total ? b->max_tok : total;
    for (int at = 0; at < end; at += b->max_tok)
        ORCD_TRY(prefill_step(b, r, at, total - at < b->max_tok ? total - at : b->max_tok, seed, err));
    return ORCD_OK;
}

/* As the engine decodes: a device that samples is given the next step before the last one's tokens are read. */
static orcd_status decode(bench *b, const bench_row *r, bool warm_up, uint32_t *seed, orcd_error *err) {
    be_act *logits;
    bool ahead = b->dev->ops->sample;
    int n = warm_up && r->tokens > 2 ? 2 : r->tokens;
    for (int i = 0; i < n; i++) {
        ORCD_TRY(decode_step(b, r->streams, r->depth + i, ahead && i ? NULL : seed, ahead, &logits, err));
        if (!ahead)
            ORCD_TRY(b->dev->ops->act_read(b->dev, logits, 0, 1, b->row, err));
        else if (i)
            ORCD_TRY(b->dev->ops->sampled(b->dev, b->id, NULL, err));
    }
    return ahead ? b->dev->ops->sampled(b->dev, b->id, NULL, err) : ORCD_OK;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What lies in the cache before the first position does not matter for the time. */
static orcd_status measure_row(bench *b, bench_row *r, orcd_error *err) {
    double seconds[MAX_REPS], tokens = (double)r->tokens * r->streams;
    uint32_t seed = 1;
    int n = (int)b->o->reps;
    orcd_status (*once)(bench *, const bench_row *, bool, uint32_t *, orcd_error *) = r->decode ? decode : prefill;
    ORCD_TRY(once(b, r, true, &seed, err));
    for (int i = 0; i < n; i++) {
        double t0 = now_s();
        ORCD_TRY(once(b, r, false, &seed, err));
        seconds[i] = now_s() - t0;
    }
    qsort(seconds, (size_t)n, sizeof *seconds, by_value);
    r->median = tokens / (n % 2 ? seconds[n / 2] : (seconds[n / 2] + seconds[n / 2 - 1]) / 2);
    r->max = tokens / seconds[0];
    r->min = tokens / seconds[n - 1];
    set_ceiling(b, r);
    return ORCD_OK;
}

static orcd_status add_row(bench *b, bool is_decode, int tokens, int depth, int streams, orcd_error *err) {
    bench_row *r = &b->r.row[b->r.n_row];
    if (b->r.n_row == BENCH_MAX_ROWS)
        return orcd_fail(err, ORCD_ERR_LIMIT, "more than %d measurements were asked for", BENCH_MAX_ROWS);
    *r = (bench_row){.decode = is_decode, .tokens = tokens, .depth = depth, .streams = streams};
    ORCD_TRY(measure_row(b, r, err));
    b->r.n_row++;
    bench_print_row(form_of(b->o), r);
    return ORCD_OK;
}

static orcd_status measure(bench *b, orcd_error *err) {
    const options *o = b->o;
    bench_print_head(form_of(o), &b->r);
    for (int i = 0; i < b->n_prompt; i++)
        for (int d = 0; d < b->n_depth; d++)
            for (int k = 0; k < b->n_streams; k++)
                ORCD_TRY(add_row(b, false, b->prompt[i], b->depth[d], b->streams[k], err));
    for (int d = 0; d < b->n_depth && o->gen > 0; d++)
        for (int k = 0; k < b->n_streams; k++)
            ORCD_TRY(add_row(b, true, (int)o->gen, b->depth[d], b->streams[k], err));
    bench_print_tail(form_of(o), &b->r);
    return o->svg ? bench_plot(&b->r, o->svg, err) : ORCD_OK;
}

static void close_bench(bench *b) {
    if (b->kv)
        b->dev->ops->kv_close(b->dev, b->kv);
    arch_unload(b->model);
    if (b->dev)
        b->dev->ops->close(b->dev);
    mf_close(b->file);
    free(b->token);
    free(b->pos);
    free(b->slot);
    free(b->out_row);
    free(b->id);
    free(b->greedy);
    free(b->row);
    free(b);
}

static int run_kernels(const options *o) {
    orcd_error err = {0};
    be_device *d = NULL;
    be_params params = params_of(o);
    orcd_status st = be_open(o->device, &params, &d, &err);
    if (st == ORCD_OK)
        st = bench_kernels(d, o->kernel_mib, form_of(o), &err);
    if (d)
        d->ops->close(d);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

/* And the largest context that the lists ask for. */
static bool read_lists(bench *b) {
    const options *o = b->o;
    if (!parse_list(o->prompt, 0, b->prompt, &b->n_prompt) || !parse_list(o->depth, 0, b->depth, &b->n_depth) ||
        !parse_list(o->streams, 1, b->streams, &b->n_streams))
        return false;
    if (b->n_prompt == 1 && b->prompt[0] == 0)
        b->n_prompt = 0;
    int longest = largest(b->prompt, b->n_prompt);
    b->max_streams = largest(b->streams, b->n_streams);
    b->n_ctx = largest(b->depth, b->n_depth) + (longest > o->gen ? longest : (int)o->gen);
    b->n_ctx = b->n_ctx > 0 ? b->n_ctx : 1;
    for (int i = 0; i < b->n_prompt; i++)
        if (b->prompt[i] == 0 || (int64_t)b->prompt[i] * b->max_streams > INT32_MAX)
            return false;
    return true;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device = "auto", .prompt = "128,512", .depth = "0", .streams = "1", .kv_type = "f16"};
    o.gen = 32, o.reps = 3, o.kernel_mib = 256;
    const char *rest[1];
    int n_rest;
    char path[4096];
    orcd_error err = {0};
    orcd_status st;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (o.kernels)
        return run_kernels(&o);
    bench *b = calloc(1, sizeof *b);
    if (!b)
        return EXIT_FAILED;
    b->o = &o;
    if (!read_lists(b)) {
        close_bench(b);
        return cli_usage(c, "--prompt, --depth and --streams are numbers separated by commas, at most %d", MAX_LIST);
    }
    ORCD_TRY_GOTO(st, done, cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err));
    ORCD_TRY_GOTO(st, done, open_model(b, path, &err));
    st = measure(b, &err);
done:
    close_bench(b);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_bench = {"bench", "[MODEL]", "measure prefill and decode speed, or the device's products", option,
                               run};
