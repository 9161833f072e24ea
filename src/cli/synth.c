/* cli/synth.c: `orcd synth`: a model of a known shape with random weights, for benchmarks. */
#include "cli/cli.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arch/synth.h"
#include "text/tokenizer.h"

typedef struct options {
    const char *dense, *experts, *type, *tokenizer;
    int64_t threads, layers;
    cli_u64 seed;
    bool force, quiet;
} options;

static const cli_option option[] = {
    {"seed", 's', CLI_U64, offsetof(options, seed), 0, 0, "N", "same seed, same file (default 1)"},
    {"experts", 0, CLI_STR, offsetof(options, experts), 0, 0, "TYPE", "type of the experts (default: as published)"},
    {"dense", 0, CLI_STR, offsetof(options, dense), 0, 0, "TYPE", "type of everything else (default: as published)"},
    {"type", 0, CLI_STR, offsetof(options, type), 0, 0, "TYPE", "type of both"},
    {"layers", 0, CLI_INT, offsetof(options, layers), 1, ARCH_MAX_LAYERS, "N", "layers (default: as the real model)"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE",
     "tokenizer.json or a GGUF file to take the tokens of (default: bytes and numbered words)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "threads (default: all cores)"},
    {"force", 'f', CLI_FLAG, offsetof(options, force), 0, 0, "", "replace DST when it exists"},
    {"quiet", 'q', CLI_FLAG, offsetof(options, quiet), 0, 0, "", "say nothing on success"},
    {0},
};

/* The tokenizer named with --tokenizer: of a GGUF file, or else the path of a tokenizer.json. */
typedef struct words {
    gguf *file;
    const char *json;
} words;

/* The vocabulary grows to what the tokenizer has. */
static orcd_status open_words(const char *path, arch_config *c, words *v, orcd_error *err) {
    tok *t = NULL;
    char magic[4] = "";
    FILE *f = fopen(path, "rb");
    bool is_gguf = f && fread(magic, 1, 4, f) == 4 && memcmp(magic, "GGUF", 4) == 0;
    if (f)
        fclose(f);
    if (is_gguf)
        ORCD_TRY(gguf_open(path, &v->file, err));
    else
        v->json = path;
    ORCD_TRY(is_gguf ? tok_open_gguf(v->file, &t, err) : tok_open_json(path, &t, err));
    if (is_gguf || tok_n_vocab(t) > c->n_vocab)
        c->n_vocab = tok_n_vocab(t);
    tok_close(t);
    return ORCD_OK;
}

static orcd_status put_words(const words *v, const arch *a, const arch_config *c, gguf_writer *w, orcd_error *err) {
    static const char prefix[] = "tokenizer.";
    if (v->json)
        return tok_export(v->json, c->n_vocab, w, err);
    if (!v->file)
        return tok_export_synthetic(strcmp(arch_name(a), "gpt2") == 0 ? TOK_SPLIT_GPT2 : TOK_SPLIT_O200K, c->n_vocab, w,
                                    err);
    for (uint64_t i = 0; i < gguf_n_kv(v->file); i++) {
        const gguf_kv *kv = gguf_kv_at(v->file, i);
        if (kv->key.len > sizeof prefix && memcmp(kv->key.data, prefix, sizeof prefix - 1) == 0)
            gguf_put_kv(w, kv);
    }
    return ORCD_OK;
}

static orcd_status write_file(const options *o, const char *preset, const arch *a, const arch_config *c, const words *v,
                              const char *to, orcd_error *err) {
    const arch_types types = {o->dense, o->experts};
    int threads = o->threads ? (int)o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN);
    arch_exported sum;
    gguf_writer *w;
    bar b;
    orcd_status st;
    char size[32], rate[32];
    double t0 = now_s();
    ORCD_TRY(gguf_create(to, 32, &w, err));
    bar_begin(&b, "writing", "B");
    ORCD_TRY_GOTO(st, done, arch_synth_keys(a, c, preset, w, err));
    ORCD_TRY_GOTO(st, done, put_words(v, a, c, w, err));
    ORCD_TRY_GOTO(st, done,
                  arch_synth(a, c, &types, o->seed.given ? o->seed.value : 1, threads, bar_update, &b, w, &sum, err));
    st = gguf_finish(w, err);
    w = NULL;
done:
    bar_end(&b);
    gguf_abandon(w);
    if (st == ORCD_OK && !o->quiet)
        fprintf(stderr, "%s: %llu tensors, %s in %.1f s (%s/s)\n", to, (unsigned long long)sum.n_tensor,
                human_bytes(sum.bytes_out, size), now_s() - t0,
                human_bytes((uint64_t)((double)sum.bytes_out / (now_s() - t0 + 1e-9)), rate));
    return st;
}

static int run(const cli_command *cmd, int argc, char **argv) {
    options o = {0};
    const char *rest[2];
    int n_rest;
    const arch *a;
    arch_config c;
    words v = {0};
    orcd_error err = {0};
    orcd_status st = ORCD_OK;
    if (!cli_parse(cmd, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    if (n_rest < 2)
        return cli_usage(cmd, "PRESET and DST.gguf are needed; presets are %s", arch_presets());
    if (!arch_preset(rest[0], &a, &c))
        return cli_usage(cmd, "\"%s\" is none of the presets %s", rest[0], arch_presets());
    o.dense = o.dense ? o.dense : o.type;
    o.experts = o.experts ? o.experts : o.type;
    const char *given[] = {o.dense, o.experts};
    for (size_t i = 0; i < ORCD_COUNT(given); i++)
        if (given[i] && !arch_types_known(given[i]))
            return cli_usage(cmd, "type \"%s\" is none of %s", given[i], arch_types_list());
    if (o.layers)
        c.n_layer = (int)o.layers;
    if (!o.force && access(rest[1], F_OK) == 0)
        st = orcd_fail(&err, ORCD_ERR_IO, "%s exists already; --force replaces it", rest[1]);
    if (st == ORCD_OK && o.tokenizer)
        st = open_words(o.tokenizer, &c, &v, &err);
    if (st == ORCD_OK)
        st = write_file(&o, rest[0], a, &c, &v, rest[1], &err);
    gguf_close(v.file);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_synth = {"synth", "PRESET DST.gguf", "write a model with random weights, for benchmarks", option,
                               run};
