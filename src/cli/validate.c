/* cli/validate.c: `orcd validate`: how far a model is from another, or one backend from another, and whether that is
 * near enough. */
#include "cli/engine_options.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/chart.h"
#include "engine/validate.h"

enum { N_SHOWN = 8 }; /* tensors in the table for people */

typedef struct options {
    const char *text, *ids, *device_a, *device_b, *tokenizer, *dense_type_b, *svg;
    int64_t tokens, ctx, threads, act_bits_b;
    double cosine, agreement, perplexity, tensor, tap;
    bool taps, no_tensors, json;
} options;

static const cli_option option[] = {
    {"text", 0, CLI_STR, offsetof(options, text), 0, 0, "FILE", "what both read (default: a text in the program)"},
    {"ids", 0, CLI_STR, offsetof(options, ids), 0, 0, "FILE.i32", "little-endian int32 token ids instead of a text"},
    {"tokens", 'n', CLI_INT, offsetof(options, tokens), 2, 1e9, "N", "tokens to compare at most (default 512)"},
    {"ctx", 'c', CLI_INT, offsetof(options, ctx), 2, 1 << 20, "N", "tokens per window (default 1024 or the model's)"},
    {"device-a", 0, CLI_STR, offsetof(options, device_a), 0, 0, "cpu|cuda[:N]|ref", "what computes A (default cpu)"},
    {"device-b", 0, CLI_STR, offsetof(options, device_b), 0, 0, "cpu|cuda[:N]|ref", "what computes B (default cpu)"},
    {"act-bits-b", 0, CLI_INT, offsetof(options, act_bits_b), 8, 16, "8|16", "bits of B's activations (cpu)"},
    {"dense-type-b", 0, CLI_CHOICE, offsetof(options, dense_type_b), 0, 0, "q4_k|q5_k|q6_k|q8_0",
     "requantise B's attention and head when loading (cpu)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE", "tokenizer.json, when not beside A"},
    {"taps", 0, CLI_FLAG, offsetof(options, taps), 0, 0, "", "compare the intermediates layer by layer"},
    {"no-tensors", 0, CLI_FLAG, offsetof(options, no_tensors), 0, 0, "", "do not compare the weights themselves"},
    {"min-cosine", 0, CLI_NUM, offsetof(options, cosine), -1, 1, "X", "least mean cosine of logits (default 0.99)"},
    {"min-agreement", 0, CLI_NUM, offsetof(options, agreement), 0, 100, "X", "least top-1 agreement in % (default 95)"},
    {"max-perplexity", 0, CLI_NUM, offsetof(options, perplexity), 0, 1e9, "X", "most change in % (default 1)"},
    {"max-tensor", 0, CLI_NUM, offsetof(options, tensor), 0, 1e9, "X", "largest error of a weight (default 0.25)"},
    {"tap-limit", 0, CLI_NUM, offsetof(options, tap), 0, 1e9, "X", "error where runs are said to part (default 0.1)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {"svg", 0, CLI_STR, offsetof(options, svg), 0, 0, "FILE", "plot the KL divergence by position"},
    {0},
};

typedef struct result {
    const options *o;
    const char *path[2];
    char device[2][128];
    agreement g;
    tensor_error *tensor;
    tap_error *tap;
    int n_tensor, n_tap;
    double change; /* of the perplexity, in percent */
} result;

/* ---- verdict ---- */

typedef struct check {
    const char *name;
    double value, limit;
    bool at_least, pass;
} check;

enum { COSINE, AGREEMENT, PERPLEXITY, TENSOR, N_CHECKS };

static const tensor_error *worst_tensor(const result *r) {
    const tensor_error *worst = r->tensor;
    for (int i = 1; i < r->n_tensor; i++)
        if (!(r->tensor[i].rel <= worst->rel))
            worst = &r->tensor[i];
    return worst;
}

static bool judge(const result *r, check c[N_CHECKS]) {
    const options *o = r->o;
    const agreement *g = &r->g;
    c[COSINE] = (check){"cosine", g->cos_mean, o->cosine, true, false};
    c[AGREEMENT] = (check){"agreement", 100.0 * (double)g->n_same / (double)g->n, o->agreement, true, false};
    c[PERPLEXITY] = (check){"perplexity", fabs(r->change), o->perplexity, false, false};
    c[TENSOR] = (check){"tensors", r->n_tensor ? worst_tensor(r)->rel : 0, o->tensor, false, false};
    bool pass = true;
    for (int i = 0; i < N_CHECKS; i++) {
        c[i].pass = c[i].at_least ? c[i].value >= c[i].limit : c[i].value <= c[i].limit;
        pass = pass && c[i].pass;
    }
    return pass;
}

/* The first intermediate whose error passes the limit; NULL when none does. */
static const tap_error *parting(const result *r) {
    for (int i = 0; i < r->n_tap; i++)
        if (!(r->tap[i].rel <= r->o->tap))
            return &r->tap[i];
    return NULL;
}

static const char *tap_words(const tap_error *t, char out[96]) {
    static const char *const word[][2] = {{"embed", "the token embedding"},
                                          {"attention", "the attention"},
                                          {"attn_out", "the attention's output projection"},
                                          {"layer", "the feed-forward block"}};
    const char *what = t->name;
    for (size_t i = 0; i < ORCD_COUNT(word); i++)
        if (strcmp(t->name, word[i][0]) == 0)
            what = word[i][1];
    if (t->layer < 0)
        snprintf(out, 96, "%s", what);
    else
        snprintf(out, 96, "%s of layer %d", what, t->layer);
    return out;
}

/* ---- for people ---- */

static int by_error(const void *a, const void *b) {
    double x = ((const tensor_error *)a)->rel, y = ((const tensor_error *)b)->rel;
    return (x < y) - (x > y);
}

static void print_tensors(const result *r) {
    int n_different = 0;
    tensor_error *sorted = malloc((size_t)r->n_tensor * sizeof *sorted);
    if (!sorted)
        return;
    memcpy(sorted, r->tensor, (size_t)r->n_tensor * sizeof *sorted);
    qsort(sorted, (size_t)r->n_tensor, sizeof *sorted, by_error);
    while (n_different < r->n_tensor && sorted[n_different].rel != 0)
        n_different++;
    printf("\nweights: %d of %d tensors differ%s\n", n_different, r->n_tensor,
           n_different > N_SHOWN ? "; the worst of them" : "");
    for (int i = 0; i < n_different && i < N_SHOWN; i++)
        printf("  %-34s %-6s %-6s error %.5f  cosine %.6f\n", sorted[i].name, q_find(sorted[i].type[0])->name,
               q_find(sorted[i].type[1])->name, sorted[i].rel, sorted[i].cosine);
    free(sorted);
}

static void print_taps(const result *r) {
    const tap_error *part = parting(r);
    char words[96];
    printf("\nintermediates: error of all positions, of the worst one, and which\n");
    for (int i = 0; i < r->n_tap; i++) {
        const tap_error *t = &r->tap[i];
        char layer[16] = "";
        if (t->layer >= 0)
            snprintf(layer, sizeof layer, "%d", t->layer);
        printf("%c %5s %-10s %.2e  %.2e  %lld\n", t == part ? '>' : ' ', layer, t->name, t->rel, t->rel_worst,
               (long long)t->at);
    }
    if (!part)
        printf("the runs stay together: no error above %g\n", r->o->tap);
    else if (part == r->tap)
        printf("the runs part in %s: error %.3g\n", tap_words(part, words), part->rel);
    else
        printf("the runs part in %s: error %.3g, before it %.3g\n", tap_words(part, words), part->rel, part[-1].rel);
}

static void print_check(const char *name, const char *value, const check *c, const char *unit) {
    printf("%-18s %-34s %s %g%s  %s\n", name, value, c->at_least ? "at least" : "at most ", c->limit, unit,
           c->pass ? "ok" : "FAILED");
}

static void print_table(const result *r, const check c[N_CHECKS], bool pass) {
    const agreement *g = &r->g;
    char line[160];
    for (int i = 0; i < 2; i++)
        printf("%c  %s on %s\n", 'A' + i, r->path[i], r->device[i]);
    printf("%lld tokens\n\n", (long long)g->n);
    snprintf(line, sizeof line, "%.6f", g->cos_mean);
    print_check("cosine, mean", line, &c[COSINE], "");
    printf("%-18s %.6f at token %lld\n", "cosine, worst", g->cos_worst, (long long)g->cos_at);
    snprintf(line, sizeof line, "%.2f %%", c[AGREEMENT].value);
    print_check("top-1 agreement", line, &c[AGREEMENT], " %");
    printf("%-18s mean %.6f, p99 %.6f, max %.6f at token %lld\n", "KL(A || B), nats", g->kl_mean, g->kl_p99, g->kl_max,
           (long long)g->kl_at);
    snprintf(line, sizeof line, "%.4f and %.4f: %+.3f %%", perplexity_of(&g->a), perplexity_of(&g->b), r->change);
    print_check("perplexity", line, &c[PERPLEXITY], " %");
    if (r->n_tensor) {
        snprintf(line, sizeof line, "%.5f %s", c[TENSOR].value, c[TENSOR].value > 0 ? worst_tensor(r)->name : "");
        print_check("weights, worst", line, &c[TENSOR], "");
        print_tensors(r);
    }
    if (r->n_tap)
        print_taps(r);
    printf("\n%s\n", pass ? "PASS" : "FAIL");
}

/* ---- for machines ---- */

/* JSON has no infinity: an error beside weights or values that are all zero. */
static double number(double v) { return isfinite(v) ? v : DBL_MAX; }

static json_t *json_taps(const result *r) {
    const tap_error *part = parting(r);
    json_t *all = json_array();
    char words[96];
    for (int i = 0; i < r->n_tap; i++)
        json_array_append_new(all, json_pack("{s:s, s:i, s:f, s:f, s:I}", "name", r->tap[i].name, "layer",
                                             r->tap[i].layer, "error", number(r->tap[i].rel), "worst",
                                             number(r->tap[i].rel_worst), "at", (json_int_t)r->tap[i].at));
    json_t *first = part ? json_pack("{s:s, s:i, s:f, s:s}", "name", part->name, "layer", part->layer, "error",
                                     number(part->rel), "where", tap_words(part, words))
                         : json_null();
    return json_pack("{s:f, s:o, s:o}", "limit", r->o->tap, "parting", first, "all", all);
}

static void print_json(const result *r, const check c[N_CHECKS], bool pass) {
    const agreement *g = &r->g;
    json_t *checks = json_object(), *tensors = json_array();
    for (int i = 0; i < N_CHECKS; i++)
        if (i != TENSOR || r->n_tensor)
            json_object_set_new(
                checks, c[i].name,
                json_pack("{s:f, s:f, s:b}", "value", number(c[i].value), "limit", c[i].limit, "pass", c[i].pass));
    for (int i = 0; i < r->n_tensor; i++)
        json_array_append_new(tensors, json_pack("{s:s, s:s, s:s, s:f, s:f}", "name", r->tensor[i].name, "type_a",
                                                 q_find(r->tensor[i].type[0])->name, "type_b",
                                                 q_find(r->tensor[i].type[1])->name, "error", number(r->tensor[i].rel),
                                                 "cosine", isfinite(r->tensor[i].cosine) ? r->tensor[i].cosine : 0));
    json_t *j =
        json_pack("{s:{s:s, s:s, s:f}, s:{s:s, s:s, s:f}, s:I, s:{s:f, s:f, s:I}, s:f, s:{s:f, s:f, s:f, s:I}, s:f}",
                  "a", "model", r->path[0], "device", r->device[0], "perplexity", perplexity_of(&g->a), "b", "model",
                  r->path[1], "device", r->device[1], "perplexity", perplexity_of(&g->b), "tokens", (json_int_t)g->n,
                  "cosine", "mean", g->cos_mean, "worst", g->cos_worst, "at", (json_int_t)g->cos_at,
                  "agreement_percent", c[AGREEMENT].value, "kl", "mean", g->kl_mean, "p99", g->kl_p99, "max", g->kl_max,
                  "at", (json_int_t)g->kl_at, "perplexity_change_percent", r->change);
    if (r->n_tensor)
        json_object_set(j, "tensors", tensors);
    if (r->n_tap)
        json_object_set_new(j, "taps", json_taps(r));
    json_object_set_new(j, "checks", checks);
    json_object_set_new(j, "pass", json_boolean(pass));
    json_dumpf(j, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(tensors);
    json_decref(j);
}

/* KL by position; of many positions the largest of each group, so that peaks stay visible. */
static orcd_status plot(const result *r, const char *path, orcd_error *err) {
    enum { MOST = 1200 };
    const agreement *g = &r->g;
    int64_t group = (g->n + MOST - 1) / MOST;
    int n = 0;
    double x[MOST], y[MOST];
    char label[64];
    buf out = {0};
    for (int64_t i = 0; i < g->n; i += group, n++) {
        x[n] = (double)i;
        y[n] = g->kl[i];
        for (int64_t k = i; k < i + group && k < g->n; k++)
            y[n] = fmax(y[n], g->kl[k]);
    }
    chart c = {.title = "KL divergence of B from A",
               .x_label = "token",
               .y_label = "nats",
               .x1 = (double)g->n,
               .y0 = 1e-7,
               .y1 = fmax(g->kl_max, 1e-6),
               .log_y = true};
    chart_begin(&c, &out);
    chart_line(&c, &out, x, y, n, false, NULL);
    snprintf(label, sizeof label, "mean %.3g", g->kl_mean);
    chart_level(&c, &out, g->kl_mean, label);
    snprintf(label, sizeof label, "p99 %.3g", g->kl_p99);
    chart_level(&c, &out, g->kl_p99, label);
    chart_end(&out);
    orcd_status st = cli_write_text(path, &out, err);
    buf_free(&out);
    return st;
}

/* ---- the run ---- */

/* A runs as it is stored, B as the options say. */
static orcd_status open_teacher(const options *o, const char *path, bool is_b, int n_ctx, teacher **out,
                                orcd_error *err) {
    const char *device = is_b ? o->device_b : o->device_a;
    bar b;
    teacher_params p = {.model = path,
                        .backend = device,
                        .device = {.n_threads = (int)o->threads,
                                   .act_bits = is_b ? (int)o->act_bits_b : 16,
                                   .dense_type = dense_type_of(is_b ? o->dense_type_b : NULL)},
                        /* the reference keeps keys and values exact; the others as they run */
                        .kv_type = strcmp(device, "ref") == 0 ? BE_KV_F32 : BE_KV_F16,
                        .n_ctx = n_ctx,
                        .chunk = o->taps ? 32 : 128,
                        .progress = bar_update,
                        .progress_ctx = &b};
    bar_begin(&b, "loading", "B");
    orcd_status st = teacher_open(&p, out, err);
    bar_end(&b);
    return st;
}

static orcd_status compare_weights(result *r, orcd_error *err) {
    int64_t threads = r->o->threads ? r->o->threads : sysconf(_SC_NPROCESSORS_ONLN);
    bar b;
    if (r->o->no_tensors || strcmp(r->path[0], r->path[1]) == 0)
        return ORCD_OK;
    bar_begin(&b, "weights", "values");
    orcd_status st = validate_tensors(r->path[0], r->path[1], threads > 0 ? (int)threads : 1, bar_update, &b,
                                      &r->tensor, &r->n_tensor, err);
    bar_end(&b);
    return st;
}

static orcd_status compare(result *r, const ids *tokens, int64_t ctx, orcd_error *err) {
    const options *o = r->o;
    orcd_status st;
    teacher *a = NULL, *b = NULL;
    taps *t = NULL;
    bar progress;
    int64_t n = (int64_t)tokens->n < o->tokens ? (int64_t)tokens->n : o->tokens;
    ctx = ctx < n ? ctx : n;
    ORCD_TRY_GOTO(st, done, open_teacher(o, r->path[0], false, (int)ctx, &a, err));
    ORCD_TRY_GOTO(st, done, open_teacher(o, r->path[1], true, (int)ctx, &b, err));
    teacher_describe(a, r->device[0], sizeof *r->device);
    teacher_describe(b, r->device[1], sizeof *r->device);
    if (o->taps)
        ORCD_TRY_GOTO(st, done, taps_open(a, b, &t, err));
    bar_begin(&progress, "scoring", "tok");
    st = validate_logits(a, b, tokens->data, n, ctx, bar_update, &progress, &r->g, err);
    bar_end(&progress);
    if (st == ORCD_OK && t)
        st = taps_result(t, &r->tap, &r->n_tap, err);
    if (st == ORCD_OK)
        r->change = 100 * expm1(r->g.b.mean - r->g.a.mean);
done:
    taps_close(t);
    teacher_close(a);
    teacher_close(b);
    return st;
}

/* The ids to compare on, and the positions of a window. */
static orcd_status read_tokens(const options *o, const char *model, ids *out, int64_t *ctx, orcd_error *err) {
    orcd_status st;
    char *text = NULL;
    size_t len = strlen(validate_text);
    int n_ctx = 1 << 20;
    if (o->ids) {
        mf_file *f = NULL;
        const arch *a;
        arch_config c;
        ORCD_TRY_GOTO(st, opened, mf_open(model, &f, err));
        ORCD_TRY_GOTO(st, opened, arch_identify(f, &a, err));
        ORCD_TRY_GOTO(st, opened, arch_config_read(a, f, &c, err));
        n_ctx = c.n_ctx;
        st = cli_read_ids(o->ids, out, err);
    opened:
        mf_close(f);
    } else {
        st = o->text ? cli_read_text(o->text, &text, &len, err) : ORCD_OK;
        if (st == ORCD_OK)
            st = cli_encode(model, o->tokenizer, text ? text : validate_text, len, out, &n_ctx, err);
        free(text);
    }
    *ctx = o->ctx ? o->ctx : n_ctx < 1024 ? n_ctx : 1024;
    return st;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device_a = "cpu", .device_b = "cpu", .tokens = 512, .act_bits_b = 16};
    o.cosine = 0.99, o.agreement = 95, o.perplexity = 1, o.tensor = 0.25, o.tap = 0.1;
    const char *rest[2];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    if (n_rest == 0)
        return cli_usage(c, "MODEL A is needed, and B unless only the devices differ");
    char path[2][4096];
    result r = {.o = &o, .path = {path[0], path[1]}};
    orcd_error err = {0};
    orcd_status st;
    ids tokens = {0};
    int64_t ctx;
    check checks[N_CHECKS];
    bool pass = false;
    ORCD_TRY_GOTO(st, done, cli_model_path(rest[0], path[0], sizeof path[0], &err));
    ORCD_TRY_GOTO(st, done, cli_model_path(rest[n_rest - 1], path[1], sizeof path[1], &err));
    ORCD_TRY_GOTO(st, done, read_tokens(&o, r.path[0], &tokens, &ctx, &err));
    ORCD_TRY_GOTO(st, done, compare_weights(&r, &err));
    ORCD_TRY_GOTO(st, done, compare(&r, &tokens, ctx, &err));
    pass = judge(&r, checks);
    if (o.json)
        print_json(&r, checks, pass);
    else
        print_table(&r, checks, pass);
    if (o.svg)
        st = plot(&r, o.svg, &err);
done:
    agreement_free(&r.g);
    ids_free(&tokens);
    free(r.tensor);
    free(r.tap);
    return st != ORCD_OK ? cli_fail(&err) : pass ? EXIT_OK : EXIT_FAILED;
}

const cli_command cmd_validate = {"validate", "A [B]", "how far a model or a backend is from another, with a verdict",
                                  option, run};
