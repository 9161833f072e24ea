/* cli/convert.c: `orcd convert` and `orcd quantize`: a model as GGUF, as it is or in other weight types. */
#include "cli/cli.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arch/export.h"
#include "base/file.h"
#include "base/part_name.h"
#include "text/tokenizer.h"

typedef struct options {
    const char *dense, *experts, *type, *tokenizer;
    int64_t threads;
    bool force, quiet;
} options;

static const cli_option option[] = {
    {"experts", 0, CLI_STR, offsetof(options, experts), 0, 0, "TYPE", "type of the experts (default: as stored)"},
    {"dense", 0, CLI_STR, offsetof(options, dense), 0, 0, "TYPE", "type of everything else (default: as stored)"},
    {"type", 0, CLI_STR, offsetof(options, type), 0, 0, "TYPE", "type of both"},
    {"tokenizer", 0, CLI_STR, offsetof(options, tokenizer), 0, 0, "FILE", "tokenizer.json to put into the file"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "threads (default: all cores)"},
    {"force", 'f', CLI_FLAG, offsetof(options, force), 0, 0, "", "replace DST when it exists"},
    {"quiet", 'q', CLI_FLAG, offsetof(options, quiet), 0, 0, "", "say nothing on success"},
    {0},
};

static orcd_status put_tokenizer(const options *o, const mf_file *f, const arch_config *c, gguf_writer *w,
                                 orcd_error *err) {
    if (!o->tokenizer && mf_gguf(f))
        return ORCD_OK; /* copied with the other keys */
    char *path = o->tokenizer ? strdup(o->tokenizer) : tok_json_path(f);
    if (!path) {
        fprintf(stderr, "orcd: no tokenizer.json beside %s: the file will run token ids only\n", mf_path(f));
        return ORCD_OK;
    }
    orcd_status st = tok_export(path, c->n_vocab, w, err);
    free(path);
    return st;
}

static void add_identity(buf *out, const char *path) {
    struct stat st;
    if (stat(path, &st) == 0 && S_ISREG(st.st_mode))
        buf_printf(out, "%s %llu %llu %lld.%09ld\n", path, (unsigned long long)st.st_ino,
                   (unsigned long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
}

/* What the tensors' bytes depend on beside the header of the new file: this program, and the files they come from. */
static void describe_origin(const char *from, buf *out) {
    struct dirent **entry = NULL;
    char *full = realpath(from, NULL), *one = strdup(from);
    part_name part;
    int n = full && file_is_dir(full) ? scandir(full, &entry, NULL, alphasort) : 0;
    buf_printf(out, "orcd " ORCD_VERSION "\n");
    if (full)
        add_identity(out, full);
    for (unsigned no = 1; one && part_name_read(from, &part) && no <= part.count; no++) {
        part_name_set(one, &part, no);
        add_identity(out, one);
    }
    for (int i = 0; i < n; i++) {
        buf path = {0};
        buf_printf(&path, "%s/%s", full, entry[i]->d_name);
        if (path.data)
            add_identity(out, path.data);
        buf_free(&path);
        free(entry[i]);
    }
    free(entry);
    free(one);
    free(full);
}

/* `w` is finished or abandoned in every case. */
static orcd_status write_file(const options *o, const arch *a, const mf_file *f, const arch_config *c, gguf_writer *w,
                              arch_exported *sum, orcd_error *err) {
    const arch_types types = {o->dense, o->experts};
    int threads = o->threads ? (int)o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN);
    bar b;
    buf origin = {0};
    orcd_status st;
    describe_origin(mf_path(f), &origin);
    bar_begin(&b, "writing", "B");
    ORCD_TRY_GOTO(st, done, arch_put_keys(a, f, c, !o->tokenizer, w, err));
    ORCD_TRY_GOTO(st, done, put_tokenizer(o, f, c, w, err));
    ORCD_TRY_GOTO(
        st, done,
        arch_export(a, f, c, &types, origin.failed ? NULL : origin.data, threads, bar_update, &b, w, sum, err));
    st = gguf_finish(w, err);
    w = NULL;
done:
    bar_end(&b);
    gguf_abandon(w);
    buf_free(&origin);
    return st;
}

static void print_sum(const char *path, const arch_exported *sum, double seconds) {
    char in[32], out[32], rate[32];
    if (sum->n_before)
        fprintf(stderr, "%s: went on after %llu tensors that an earlier run had written\n", path,
                (unsigned long long)sum->n_before);
    fprintf(stderr, "%s: %llu tensors, %llu of them bit by bit; %s from %s in %.1f s (%s/s)\n", path,
            (unsigned long long)sum->n_tensor, (unsigned long long)sum->n_same, human_bytes(sum->bytes_out, out),
            human_bytes(sum->bytes_in, in), seconds,
            human_bytes((uint64_t)((double)sum->bytes_in / (seconds + 1e-9)), rate));
}

static int run_convert(const options *o, const char *source, const char *to) {
    char from[4096];
    orcd_error err = {0};
    orcd_status st;
    mf_file *f = NULL;
    const arch *a;
    arch_config c;
    gguf_writer *w;
    arch_exported sum;
    double t0 = now_s();
    if (!o->force && access(to, F_OK) == 0) {
        st = orcd_fail(&err, ORCD_ERR_IO, "%s exists already; --force replaces it", to);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, cli_model_path(source, from, sizeof from, &err));
    ORCD_TRY_GOTO(st, done, mf_open(from, &f, &err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, &err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &c, &err));
    ORCD_TRY_GOTO(st, done, gguf_create(to, 32, &w, &err));
    ORCD_TRY_GOTO(st, done, write_file(o, a, f, &c, w, &sum, &err));
    if (!o->quiet)
        print_sum(to, &sum, now_s() - t0);
done:
    mf_close(f);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {0};
    bool quantize = strcmp(c->name, "quantize") == 0;
    const char *rest[3];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, quantize ? 3 : 2))
        return EXIT_USAGE;
    if (n_rest == 3)
        o.type = rest[2];
    if (n_rest < 2 || (quantize && !o.type && !o.dense && !o.experts))
        return cli_usage(c, quantize ? "SRC, DST.gguf and a TYPE are needed" : "SRC and DST.gguf are needed");
    o.dense = o.dense ? o.dense : o.type;
    o.experts = o.experts ? o.experts : o.type;
    const char *given[] = {o.dense, o.experts};
    for (size_t i = 0; i < ORCD_COUNT(given); i++)
        if (given[i] && !arch_types_known(given[i]))
            return cli_usage(c, "type \"%s\" is none of %s", given[i], arch_types_list());
    return run_convert(&o, rest[0], rest[1]);
}

const cli_command cmd_convert = {"convert", "SRC DST.gguf [--dense TYPE] [--experts TYPE]",
                                 "write a model folder or file as GGUF", option, run};
const cli_command cmd_quantize = {"quantize", "SRC DST.gguf TYPE", "write a model in a smaller weight type", option,
                                  run};
