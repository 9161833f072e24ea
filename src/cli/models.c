/* cli/models.c: `orcd models`: the pulled models; `orcd models rm NAME` removes one. */
#include "cli/cache.h"
#include "cli/cli.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "arch/arch.h"

typedef struct options {
    const char *cache;
    bool json, names;
} options;

static const cli_option option[] = {
    {"cache", 0, CLI_STR, offsetof(options, cache), 0, 0, "DIR", "where models lie (default ~/.cache/orcd)"},
    {"names", 0, CLI_FLAG, offsetof(options, names), 0, 0, "", "print the names alone"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

/* "gpt-oss MXFP4": the architecture, and the weight type of the bulk. */
static void describe(const hub_model *m, char *out, size_t cap) {
    mf_file *f = NULL;
    const arch *a;
    mf_tensor bulk;
    bool found = false;
    static const char *const name[] = {"blk.0.ffn_up_exps.weight", "model.layers.0.mlp.experts.gate_up_proj",
                                       "blk.0.ffn_up.weight", "h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"};
    snprintf(out, cap, "%s", m->complete ? "no model" : "incomplete");
    if (!m->complete || mf_open(m->path, &f, NULL) != ORCD_OK)
        return;
    for (size_t i = 0; i < ORCD_COUNT(name) && !found; i++)
        if (mf_find(f, name[i], &bulk, &found, NULL) != ORCD_OK)
            found = false;
    snprintf(out, cap, "%.40s%s%s", arch_identify(f, &a, NULL) == ORCD_OK ? arch_name(a) : mf_arch_name(f),
             found ? " " : "", found ? q_find(bulk.type)->name : "");
    mf_close(f);
}

static void list(const options *o, const hub_models *all) {
    char type[64], size[32];
    int width = 4;
    json_t *array = json_array();
    for (size_t i = 0; i < all->n; i++) {
        const hub_model *m = &all->model[i];
        int len = (int)strlen(m->name);
        width = len > width ? len : width;
        if (o->names && m->complete)
            printf("%s\n", m->name);
        if (o->names)
            continue;
        describe(m, type, sizeof type);
        json_array_append_new(array,
                              json_pack("{s:s, s:I, s:s, s:b, s:s}", "name", m->name, "bytes", (json_int_t)m->bytes,
                                        "type", type, "complete", m->complete, "path", m->path));
    }
    if (o->json) {
        json_dumpf(array, stdout, JSON_INDENT(1));
        printf("\n");
    } else if (!o->names && all->n) {
        printf("%-*s  %10s  %-16s  %s\n", width, "name", "size", "type", "where");
        for (size_t i = 0; i < all->n; i++) {
            const json_t *row = json_array_get(array, i);
            printf("%-*s  %10s  %-16s  %s\n", width, all->model[i].name, human_bytes(all->model[i].bytes, size),
                   json_string_value(json_object_get(row, "type")), all->model[i].path);
        }
    }
    json_decref(array);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {0};
    const char *rest[2];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 2))
        return EXIT_USAGE;
    if (n_rest && (strcmp(rest[0], "rm") != 0 || n_rest != 2))
        return cli_usage(c, "\"%s\" is not understood; orcd models rm NAME removes a model", rest[0]);
    char cache[HUB_PATH], size[32];
    orcd_error err = {0};
    orcd_status st;
    hub_models all = {0};
    ORCD_TRY_GOTO(st, done, cli_cache_dir(o.cache, cache, sizeof cache, &err));
    ORCD_TRY_GOTO(st, done, hub_list(cache, &all, &err));
    if (!n_rest) {
        list(&o, &all);
        if (!all.n && !o.json && !o.names)
            fprintf(stderr, "no models in %s; orcd pull fetches one\n", cache);
        goto done;
    }
    const hub_model *m = hub_find(&all, rest[1]);
    if (m)
        st = hub_remove(cache, m, &err);
    else
        st = orcd_fail(&err, ORCD_ERR_IO,
                       "\"%.200s\" is none of the models in %s, or of several; orcd models lists them", rest[1], cache);
    if (st == ORCD_OK)
        fprintf(stderr, "%s removed, %s\n", m->name, human_bytes(m->bytes, size));
done:
    hub_models_free(&all);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_models = {"models", "[rm NAME]", "list the pulled models, or remove one", option, run};
