/* cli/inspect.c: `orcd inspect`: what a model file is and what it needs, without loading it. */
#include "cli/cli.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/arch.h"
#include "text/tokenizer.h"

typedef struct options {
    bool tensors, json;
    int64_t ctx;
    const char *tokenizer;
} options;

static const cli_option option[] = {
    {"tensors", 0, CLI_FLAG, offsetof(options, tensors), 0, 0, "", "list every tensor"},
    {"ctx", 'c', CLI_INT, offsetof(options, ctx), 1, 1 << 20, "N", "context length to plan for (default: the model's)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE", "tokenizer.json, when not beside the model"},
    {0},
};

/* Bytes and tensors by stored type, in order of first appearance. */
enum { MAX_TYPES = 24 };
typedef struct type_sum {
    const char *name;
    uint64_t n, bytes;
} type_sum;

static void add_type(type_sum *sum, const char *name, uint64_t bytes) {
    int i = 0;
    while (i < MAX_TYPES - 1 && sum[i].name && strcmp(sum[i].name, name) != 0)
        i++;
    sum[i].name = name;
    sum[i].n++;
    sum[i].bytes += bytes;
}

static void sum_types(const mf_file *f, type_sum sum[MAX_TYPES]) {
    const gguf *g = mf_gguf(f);
    const st_model *s = mf_st(f);
    for (uint64_t i = 0; g && i < gguf_n_tensors(g); i++)
        add_type(sum, q_find(gguf_tensor_at(g, i)->type)->name, gguf_tensor_at(g, i)->bytes);
    for (uint64_t i = 0; s && i < st_n_tensors(s); i++) {
        const st_tensor *t = st_tensor_at(s, i);
        size_t n = strlen(t->name);
        bool mx = n > 7 && (strcmp(t->name + n - 7, "_blocks") == 0 || strcmp(t->name + n - 7, "_scales") == 0);
        add_type(sum, mx ? "MXFP4" : st_type_name(t->type), t->bytes);
    }
}

static void print_tensors(const mf_file *f) {
    char size[32];
    const gguf *g = mf_gguf(f);
    const st_model *s = mf_st(f);
    printf("\n%-44s %-6s %-24s %s\n", "tensor", "type", "shape", "bytes");
    for (uint64_t i = 0; g && i < gguf_n_tensors(g); i++) {
        const gguf_tensor *t = gguf_tensor_at(g, i);
        char shape[96];
        int at = 0;
        for (uint32_t d = t->n_dims; d-- > 0;)
            at +=
                snprintf(shape + at, sizeof shape - (size_t)at, "%llu%s", (unsigned long long)t->ne[d], d ? " x " : "");
        printf("%-44.*s %-6s %-24s %s\n", (int)t->name.len, t->name.data, q_find(t->type)->name, shape,
               human_bytes(t->bytes, size));
    }
    for (uint64_t i = 0; s && i < st_n_tensors(s); i++) {
        const st_tensor *t = st_tensor_at(s, i);
        char shape[192] = "";
        int at = 0;
        for (uint32_t d = 0; d < t->n_dims; d++)
            at += snprintf(shape + at, sizeof shape - (size_t)at, "%s%llu", d ? " x " : "",
                           (unsigned long long)t->shape[d]);
        printf("%-44s %-6s %-24s %s\n", t->name, st_type_name(t->type), shape, human_bytes(t->bytes, size));
    }
}

typedef struct report {
    const char *arch, *path;
    const arch_config *c;
    const arch_size *size;
    const type_sum *types;
    const tok *tok; /* NULL: none found; tok_error says why */
    const char *tok_error;
    uint64_t file_bytes, kv_bytes, act_bytes;
    int64_t ctx;
} report;

static int windowed_layers(const arch_config *c) {
    int n = 0;
    for (int i = 0; i < c->n_layer; i++)
        n += c->window[i] != 0;
    return n;
}

static void print_report(const report *r) {
    char a[32], b[32], d[32];
    const arch_config *c = r->c;
    printf("%s\n", r->path);
    printf("architecture   %s: %d layers, width %d, %d query and %d key/value heads of %d, feed-forward %d\n", r->arch,
           c->n_layer, c->n_embd, c->n_head, c->n_kv_head, c->head_dim, c->n_ff);
    if (c->n_expert)
        printf("experts        %d, of which %d per token\n", c->n_expert, c->n_expert_used);
    printf("parameters     %s, active per token %s\n", human_count(r->size->n_param, a),
           human_count(r->size->n_param_active, b));
    printf("types         ");
    for (int i = 0; i < MAX_TYPES && r->types[i].name; i++)
        printf("%s %s %s (%llu tensors)", i ? "," : "", r->types[i].name, human_bytes(r->types[i].bytes, a),
               (unsigned long long)r->types[i].n);
    printf("\ncontext        %s positions", human_count((uint64_t)c->n_ctx, a));
    if (windowed_layers(c))
        printf(", %d of %d layers look back %d", windowed_layers(c), c->n_layer,
               c->window[0] ? c->window[0] : c->window[1]);
    printf("\n");
    if (r->tok)
        printf("tokenizer      %s, %s tokens, begin %d, end %d\n",
               tok_kind_of(r->tok) == TOK_HF_JSON ? "hf-json" : "gguf-bpe",
               human_count((uint64_t)tok_n_vocab(r->tok), a), tok_bos(r->tok), tok_eos(r->tok));
    else
        printf("tokenizer      none: %s\n", r->tok_error);
    printf("memory         weights %s + KV cache %s (F16, context %lld) + activations %s = ",
           human_bytes(r->size->weight_bytes, a), human_bytes(r->kv_bytes, b), (long long)r->ctx,
           human_bytes(r->act_bytes, d));
    printf("%s\n", human_bytes(r->size->weight_bytes + r->kv_bytes + r->act_bytes, a));
}

static void print_json(const report *r) {
    const arch_config *c = r->c;
    json_t *types = json_object();
    for (int i = 0; i < MAX_TYPES && r->types[i].name; i++)
        json_object_set_new(types, r->types[i].name, json_integer((json_int_t)r->types[i].bytes));
    json_t *tok_info =
        r->tok
            ? json_pack("{s:s, s:i, s:i, s:i}", "kind", tok_kind_of(r->tok) == TOK_HF_JSON ? "hf-json" : "gguf-bpe",
                        "n_vocab", (int)tok_n_vocab(r->tok), "bos", (int)tok_bos(r->tok), "eos", (int)tok_eos(r->tok))
            : json_null();
    json_t *o =
        json_pack("{s:s, s:s, s:{s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i}, s:I, s:I, s:o, s:o, s:{s:I, "
                  "s:I, s:I, s:I}}",
                  "path", r->path, "architecture", r->arch, "config", "n_layer", c->n_layer, "n_embd", c->n_embd,
                  "n_head", c->n_head, "n_kv_head", c->n_kv_head, "head_dim", c->head_dim, "n_ff", c->n_ff, "n_vocab",
                  c->n_vocab, "n_ctx", c->n_ctx, "n_expert", c->n_expert, "n_expert_used", c->n_expert_used,
                  "window_layers", windowed_layers(c), "parameters", (json_int_t)r->size->n_param, "active_parameters",
                  (json_int_t)r->size->n_param_active, "types", types, "tokenizer", tok_info, "memory", "ctx",
                  (json_int_t)r->ctx, "weight_bytes", (json_int_t)r->size->weight_bytes, "kv_bytes",
                  (json_int_t)r->kv_bytes, "activation_bytes", (json_int_t)r->act_bytes);
    json_dumpf(o, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(o);
}

static int run(const cli_command *c, int argc, char **argv) {
    enum { CHUNK = 512 };
    options o = {0};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;

    char path[4096];
    orcd_error err = {0}, tok_err = {0};
    orcd_status st;
    mf_file *f = NULL;
    tok *t = NULL;
    const arch *a;
    arch_config cfg;
    arch_size size;
    type_sum types[MAX_TYPES] = {0};
    ORCD_TRY_GOTO(st, done, cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err));
    ORCD_TRY_GOTO(st, done, mf_open(path, &f, &err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, &err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &cfg, &err));
    ORCD_TRY_GOTO(st, done, arch_measure(a, f, &cfg, &size, &err));
    if (tok_open_for(f, o.tokenizer, &t, &tok_err) != ORCD_OK)
        t = NULL;
    sum_types(f, types);
    int64_t ctx = o.ctx ? o.ctx : cfg.n_ctx;
    report r = {.arch = arch_name(a),
                .path = path,
                .c = &cfg,
                .size = &size,
                .types = types,
                .tok = t,
                .tok_error = tok_err.message,
                .file_bytes = mf_bytes(f),
                .kv_bytes = size.kv_bytes_per_token * (uint64_t)ctx + size.kv_bytes_window,
                .act_bytes = arch_act_bytes(&cfg, CHUNK, 1),
                .ctx = ctx};
    (o.json ? print_json : print_report)(&r);
    if (o.tensors && !o.json)
        print_tensors(f);
done:
    tok_close(t);
    mf_close(f);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_inspect = {"inspect", "[MODEL]", "say what a model is and what memory it needs", option, run};
