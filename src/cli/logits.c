/* cli/logits.c: `orcd logits`: float32 logits of given token ids, for comparison with other implementations. */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

#include "engine/teacher.h"

typedef struct options {
    const char *ids, *out, *device;
    bool last;
    int64_t threads, chunk;
} options;

static const cli_option option[] = {
    {"ids", 0, CLI_STR, offsetof(options, ids), 0, 0, "FILE.i32", "little-endian int32 token ids"},
    {"out", 'o', CLI_STR, offsetof(options, out), 0, 0, "FILE.f32", "where the float32 rows go"},
    {"last", 0, CLI_FLAG, offsetof(options, last), 0, 0, "", "only the last position's row"},
    {"device", 0, CLI_STR, offsetof(options, device), 0, 0, "auto|cpu|cuda[:N]|ref", "what computes (default cpu)"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "CPU threads (default: all cores)"},
    {"chunk", 0, CLI_INT, offsetof(options, chunk), 1, 4096, "N", "positions per step (default 128)"},
    {0},
};

typedef struct sink {
    FILE *file;
    size_t n_vocab;
    bool failed;
} sink;

static bool write_row(void *ctx, int64_t pos, const float *logits) {
    sink *s = ctx;
    (void)pos;
    s->failed = fwrite(logits, sizeof *logits, s->n_vocab, s->file) != s->n_vocab;
    return !s->failed;
}

/* Run the ids through the open model into --out. */
static orcd_status write_logits(const options *o, teacher *t, const ids *prompt, orcd_error *err) {
    sink s = {fopen(o->out, "wb"), (size_t)teacher_config(t)->n_vocab, false};
    if (!s.file)
        return orcd_fail(err, ORCD_ERR_IO, "%s: cannot be written; name another --out", o->out);
    int64_t n = (int64_t)prompt->n;
    orcd_status st = teacher_run(t, prompt->data, n, o->last ? n - 1 : 0, write_row, &s, err);
    if ((fclose(s.file) != 0 || s.failed) && st == ORCD_OK)
        st = orcd_fail(err, ORCD_ERR_IO, "%s: writing failed; is the disk full?", o->out);
    return st;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {.device = "cpu", .chunk = 128};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (!o.ids || !o.out)
        return cli_usage(c, "--ids and --out are needed");

    char path[4096];
    orcd_error err = {0};
    orcd_status st;
    ids prompt = {0};
    teacher *t = NULL;
    bar b;
    ORCD_TRY_GOTO(st, done, cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err));
    ORCD_TRY_GOTO(st, done, cli_read_ids(o.ids, &prompt, &err));
    bar_begin(&b, "loading", "B");
    teacher_params p = {.model = path,
                        .backend = o.device,
                        .device = {.n_threads = (int)o.threads},
                        /* the reference keeps keys and values exact; the others as they run */
                        .kv_type = strcmp(o.device, "ref") == 0 ? BE_KV_F32 : BE_KV_F16,
                        .n_ctx = (int)prompt.n,
                        .chunk = (int)o.chunk,
                        .progress = bar_update,
                        .progress_ctx = &b};
    st = teacher_open(&p, &t, &err);
    bar_end(&b);
    if (st == ORCD_OK)
        st = write_logits(&o, t, &prompt, &err);
done:
    teacher_close(t);
    ids_free(&prompt);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_logits = {"logits", "[MODEL] --ids FILE.i32 --out FILE.f32 [--last]",
                                "write the logits of given token ids", option, run};
