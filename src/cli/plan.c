/* cli/plan.c: `orcd plan`: what a model would take of each device, what context that leaves, and how fast it can be. */
#include "cli/engine_options.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/speed.h"
#include "base/bandwidth.h"

enum { MAX_DEVICES = 4, CELLS = 40 };

typedef struct options {
    const char *device, *kv_type, *dense_type;
    int64_t ctx, streams, threads, chunk, cpu_experts, act_bits;
    double memory, bandwidth;
    bool no_repack, json;
} options;

static const cli_option option[] = {
    {"ctx", 'c', CLI_INT, offsetof(options, ctx), 0, 1 << 20, "N", "context length (default: the largest that fits)"},
    {"streams", 0, CLI_INT, offsetof(options, streams), 1, 256, "N", "sequences at once (default 1; serve has 16)"},
    {"device", 0, CLI_STR, offsetof(options, device), 0, 0, "auto|cpu|cuda[:N]|ref", "where (default auto: each)"},
    {"memory", 0, CLI_NUM, offsetof(options, memory), 0.001, 1e6, "GIB", "a device with so much free memory instead"},
    {"bandwidth", 0, CLI_NUM, offsetof(options, bandwidth), 0.001, 1e6, "GB/S", "of it, instead of measuring"},
    {"kv-type", 0, CLI_CHOICE, offsetof(options, kv_type), 0, 0, KV_TYPES},
    {"chunk", 0, CLI_INT, offsetof(options, chunk), 0, 8192, "N", "prompt tokens per step"},
    {"cpu-experts", 0, CLI_INT, offsetof(options, cpu_experts), 0, 1024, "N|auto",
     "experts of the last N layers in host memory (cuda; default 0)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"dense-type", 0, CLI_CHOICE, offsetof(options, dense_type), 0, 0, DENSE_TYPES},
    {"act-bits", 0, CLI_INT, offsetof(options, act_bits), 8, 16, "8|16", "bits of the activations (cpu; default 16)"},
    {"no-repack", 0, CLI_FLAG, offsetof(options, no_repack), 0, 0, "", "run from the mapped file (cpu)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

typedef enum outcome { FITS, TOO_LARGE, ABSENT /* the device is not here: only the need is known */, FAILED } outcome;

typedef struct report {
    const char *device;
    outcome outcome;
    eng_plan p;
    orcd_error why;         /* not FITS */
    double rate, host_rate; /* bytes a second; 0: not known */
    int host_layers; /* TOO_LARGE: would fit with the experts of so many layers in host memory; 0: it would not */
} report;

static uint64_t need(const eng_plan *p) { return p->m.weights + p->m.acts + p->m.kv; }

static uint64_t pool_bytes(const eng_plan *p, int pool) { return (uint64_t)p->n_page[pool] * p->page_bytes[pool]; }

/* ---- making it ---- */

static void measure(const options *o, const eng_params *ep, report *r) {
    be_device *d = NULL;
    orcd_error err;
    if (r->p.m.host && mem_bandwidth(8, &r->host_rate, &err) != ORCD_OK)
        r->rate = 0;
    if (ep->backend.dry || o->bandwidth > 0)
        return;
    if (be_open(r->device, &ep->backend, &d, &err) == ORCD_OK && be_read_speed(d, &r->rate, &err) != ORCD_OK)
        r->rate = 0;
    if (d)
        d->ops->close(d);
}

static outcome outcome_of(orcd_status st) { return st == ORCD_OK ? FITS : st == ORCD_ERR_NOMEM ? TOO_LARGE : FAILED; }

/* For a device that is not here: one with the memory that was named, or as much as it takes. */
static void plan_without(eng_params *p, report *r) {
    orcd_error err;
    bool named = p->memory_bytes > 0;
    p->backend.dry = true;
    if (!named)
        p->memory_bytes = UINT64_MAX / 2;
    orcd_status st = eng_plan_only(p, &r->p, &err);
    r->outcome = outcome_of(st);
    if (st == ORCD_OK && !named)
        r->outcome = ABSENT;
    if (st == ORCD_ERR_NOMEM)
        r->why = err;
}

static void make_report(const options *o, const char *model, const char *device, report *r) {
    eng_params p = {.model = model,
                    .device = device,
                    .backend = {.n_threads = (int)o->threads,
                                .no_repack = o->no_repack,
                                .act_bits = (int)o->act_bits,
                                .dense_type = dense_type_of(o->dense_type),
                                .cpu_experts = (int)o->cpu_experts},
                    .n_ctx = (int)o->ctx,
                    .max_batch = (int)o->streams,
                    .chunk = (int)o->chunk,
                    .memory_bytes = (uint64_t)(o->memory * 0x1p30),
                    .kv_type = kv_type_of(o->kv_type)};
    *r = (report){.device = device, .rate = o->bandwidth * 1e9};
    orcd_status st = eng_plan_only(&p, &r->p, &r->why);
    if (st == ORCD_ERR_DEVICE || (st == ORCD_ERR_UNSUPPORTED && strncmp(device, "cuda", 4) == 0))
        plan_without(&p, r);
    else
        r->outcome = outcome_of(st);
    if (r->outcome == FITS || r->outcome == ABSENT)
        measure(o, &p, r);
    if (r->outcome == TOO_LARGE && p.backend.cpu_experts == 0) {
        eng_plan with;
        orcd_error err;
        p.backend.cpu_experts = CLI_AUTO;
        r->host_layers = eng_plan_only(&p, &with, &err) == ORCD_OK ? with.n_host_layers : 0;
    }
}

/* ---- for people ---- */

/* A part of the device's memory, drawn where it begins. */
static void draw(const char *label, uint64_t from, uint64_t bytes, uint64_t whole, const char *cell, const char *more) {
    char size[32];
    int lo = (int)floor(CELLS * (double)from / (double)whole),
        hi = (int)ceil(CELLS * (double)(from + bytes) / (double)whole);
    hi = hi > CELLS ? CELLS : hi;
    lo = lo < hi ? lo : hi - 1;
    printf("  %-12s %10s  ", label, human_bytes(bytes, size));
    for (int i = 0; i < (*more ? CELLS : hi) && bytes; i++)
        fputs(i < lo || i >= hi ? " " : cell, stdout);
    printf(*more ? "  %s\n" : "\n", more);
}

static void print_speed(const options *o, const report *r) {
    const eng_plan *p = &r->p;
    if (r->rate <= 0 || r->outcome == TOO_LARGE)
        return;
    int full = p->n_ctx - 1;
    printf("  decode       at most %.1f tok/s at the start, %.1f at %d positions", //
           eng_plan_speed(p, 1, 0, r->rate, r->host_rate), eng_plan_speed(p, 1, full, r->rate, r->host_rate), full);
    if (o->streams > 1)
        printf("; %d streams together %.1f", (int)o->streams,
               eng_plan_speed(p, (int)o->streams, 0, r->rate, r->host_rate));
    printf("\n               reading %.1f GB/s%s", r->rate / 1e9, o->bandwidth > 0 ? "" : ", measured");
    if (p->m.host)
        printf("; host memory %.1f GB/s, measured", r->host_rate / 1e9);
    printf("\n");
}

static void print_report(const options *o, const report *r) {
    const eng_plan *p = &r->p;
    char a[32], b[32], more[128];
    uint64_t sum = need(p), whole = sum > p->available || r->outcome == ABSENT ? sum : p->available;
    if (r->outcome == FAILED) {
        printf("\n%s\n  %s\n", r->device, r->why.message);
        return;
    }
    printf("\n%s%s%s\n", r->outcome == ABSENT ? r->device : p->device, r->outcome == ABSENT ? ": not here: " : "",
           r->outcome == ABSENT ? r->why.message : "");
    draw("weights", 0, p->m.weights, whole, "█", "");
    snprintf(more, sizeof more, "%s pages of 64 positions", human_count((uint64_t)p->n_page[BE_POOL_FULL], a));
    draw("KV", p->m.weights, pool_bytes(p, BE_POOL_FULL), whole, "▓", p->n_page[BE_POOL_FULL] ? more : "");
    snprintf(more, sizeof more, "%s pages, %d positions back", human_count((uint64_t)p->n_page[BE_POOL_WINDOW], a),
             p->window);
    if (p->window)
        draw("KV, windows", p->m.weights + pool_bytes(p, BE_POOL_FULL), pool_bytes(p, BE_POOL_WINDOW), whole, "▒",
             more);
    snprintf(more, sizeof more, "steps of %d rows", p->max_rows);
    draw("activations", p->m.weights + p->m.kv, p->m.acts, whole, "░", more);
    if (r->outcome == FITS)
        draw("free", sum, p->available - sum, whole, "·", "");
    if (r->outcome == TOO_LARGE)
        draw("missing", p->available, sum - p->available, whole, "×", "");
    if (p->m.host)
        printf("  experts of %d layers stay in host memory: %s\n", p->n_host_layers, human_bytes(p->m.host, a));
    if (r->outcome == ABSENT)
        printf("  needs        %s\n", human_bytes(sum, a));
    else
        printf("  needs        %s of %s: %s\n", human_bytes(sum, a), human_bytes(p->available, b),
               r->outcome == FITS ? "fits" : "does not fit");
    printf("  context      %s positions", human_count((uint64_t)p->n_ctx, a));
    if (r->outcome != ABSENT && o->streams > 1)
        printf("; at most %s for one sequence, %s for each of %d at once", human_count((uint64_t)p->most_one, a),
               human_count((uint64_t)p->most_all, b), p->max_batch);
    else if (r->outcome != ABSENT)
        printf("; at most %s", human_count((uint64_t)p->most_one, a));
    printf("\n");
    if (r->host_layers)
        printf("  fits with --cpu-experts auto: experts of %d layers in host memory\n", r->host_layers);
    print_speed(o, r);
}

/* ---- for machines ---- */

static json_t *json_of(const options *o, const report *r) {
    static const char *const word[] = {"fits", "too large", "no such device", "failed"};
    const eng_plan *p = &r->p;
    json_t *j =
        json_pack("{s:s, s:s, s:b}", "device", r->device, "outcome", word[r->outcome], "fits", r->outcome == FITS);
    if (r->outcome != FITS)
        json_object_set_new(j, "reason", json_string(r->why.message));
    if (r->outcome == FAILED)
        return j;
    if (r->host_layers)
        json_object_set_new(j, "fits_with_host_layers", json_integer(r->host_layers));
    json_object_set_new(j, "name", json_string(p->device));
    const struct {
        const char *key;
        uint64_t value;
    } number[] = {{"weight_bytes", p->m.weights},
                  {"kv_bytes", p->m.kv},
                  {"kv_full_bytes", pool_bytes(p, BE_POOL_FULL)},
                  {"kv_window_bytes", pool_bytes(p, BE_POOL_WINDOW)},
                  {"activation_bytes", p->m.acts},
                  {"need_bytes", need(p)},
                  {"host_bytes", p->m.host},
                  {"host_layers", (uint64_t)p->n_host_layers},
                  {"ctx", (uint64_t)p->n_ctx},
                  {"streams", (uint64_t)p->max_batch},
                  {"chunk", (uint64_t)p->chunk}};
    for (size_t i = 0; i < ORCD_COUNT(number); i++)
        json_object_set_new(j, number[i].key, json_integer((json_int_t)number[i].value));
    if (r->outcome != ABSENT) {
        json_object_set_new(j, "available_bytes", json_integer((json_int_t)p->available));
        json_object_set_new(j, "total_bytes", json_integer((json_int_t)p->total));
        json_object_set_new(j, "max_ctx_one", json_integer(p->most_one));
        json_object_set_new(j, "max_ctx_all", json_integer(p->most_all));
    }
    if (r->rate > 0) {
        json_object_set_new(j, "read_bytes_per_second", json_real(r->rate));
        json_object_set_new(j, "decode_tok_s", json_real(eng_plan_speed(p, 1, 0, r->rate, r->host_rate)));
        json_object_set_new(j, "decode_tok_s_full",
                            json_real(eng_plan_speed(p, 1, p->n_ctx - 1, r->rate, r->host_rate)));
        json_object_set_new(j, "decode_tok_s_streams",
                            json_real(eng_plan_speed(p, (int)o->streams, 0, r->rate, r->host_rate)));
    }
    return j;
}

static void print_json(const options *o, const char *model, const report *r, int n) {
    json_t *list = json_array(), *j = json_pack("{s:s, s:o}", "model", model, "devices", list);
    for (int i = 0; i < n; i++)
        json_array_append_new(list, json_of(o, &r[i]));
    json_dumpf(j, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(j);
}

/* ---- the run ---- */

/* Each device that this build knows, without the reference. */
static int list_devices(const char *wanted, const char *name[MAX_DEVICES]) {
    static const char *const order[] = {"cuda", "cpu"};
    int n = 0;
    if (strcmp(wanted, "auto") != 0) {
        name[n++] = wanted;
        return n;
    }
    for (size_t i = 0; i < ORCD_COUNT(order); i++)
        if (be_find(order[i]))
            name[n++] = order[i];
    return n;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device = "auto", .kv_type = "f16", .streams = 1};
    const char *rest[1], *name[MAX_DEVICES];
    char path[4096];
    int n_rest;
    orcd_error err = {0};
    report r[MAX_DEVICES];
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err) != ORCD_OK)
        return cli_fail(&err);
    int n = list_devices(o.device, name), best = FAILED;
    for (int i = 0; i < n; i++) {
        make_report(&o, path, name[i], &r[i]);
        best = (int)r[i].outcome < best ? (int)r[i].outcome : best;
    }
    if (best == FAILED)
        return cli_fail(&r[n - 1].why);
    if (o.json)
        print_json(&o, path, r, n);
    else
        printf("%s\n", path);
    for (int i = 0; i < n && !o.json; i++)
        print_report(&o, &r[i]);
    return best == TOO_LARGE ? EXIT_FAILED : EXIT_OK;
}

const cli_command cmd_plan = {"plan", "[MODEL]", "what memory a model takes where, what fits, how fast it can be",
                              option, run};
