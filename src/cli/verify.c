/* cli/verify.c: `orcd verify`: is a model file whole: structure, every weight a finite number, SHA-256. */
#include "cli/cli.h"

#include <jansson.h>
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>

#include "arch/arch.h"
#include "base/file.h"

typedef struct options {
    bool json;
} options;

static const cli_option option[] = {
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

typedef struct scan {
    uint64_t n_tensor, n_value, n_bad, done, total;
    char worst[96]; /* the first tensor with a bad value */
    bar b;
} scan;

static orcd_status scan_tensor(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    enum { CHUNK = 1 << 20 };
    scan *s = ctx;
    const mf_tensor *m = data[0];
    if (t->tied)
        return ORCD_OK;
    /* exact tensors are small and may be views that have no rows */
    uint64_t step = t->exact ? m->n_row : CHUNK / m->n_col + 1, bad = 0;
    uint64_t room = (step < m->n_row ? step : m->n_row) * m->n_col * (t->exact ? m->n_mat : 1);
    float *value = malloc(room * sizeof *value), *raw = malloc(room * sizeof *raw);
    orcd_status st = value && raw ? ORCD_OK : orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", t->name);
    for (uint64_t mat = 0; st == ORCD_OK && mat < (t->exact ? 1 : m->n_mat); mat++)
        for (uint64_t row = 0; row < m->n_row; row += step) {
            uint64_t rows = m->n_row - row < step ? m->n_row - row : step;
            uint64_t n = t->exact ? room : rows * m->n_col;
            if (t->exact) {
                mf_floats(m, value);
            } else {
                mf_rows(m, mat, row, rows, raw);
                q_find(m->type)->unpack(raw, value, n);
            }
            for (uint64_t i = 0; i < n; i++)
                bad += !isfinite(value[i]);
            s->n_value += n;
            bar_update(&s->b, s->done += n, s->total);
        }
    free(value);
    free(raw);
    if (bad && !s->n_bad)
        snprintf(s->worst, sizeof s->worst, "%s", t->name);
    s->n_bad += bad;
    s->n_tensor++;
    return st;
}

/* Of a single file; a folder has none and leaves hex empty. */
static orcd_status hash_file(const char *path, char hex[65], orcd_error *err) {
    enum { PIECE = 1 << 22 };
    file_map f;
    unsigned char sum[crypto_hash_sha256_BYTES];
    crypto_hash_sha256_state h;
    bar b;
    hex[0] = '\0';
    if (file_is_dir(path))
        return ORCD_OK;
    ORCD_TRY(file_open(path, &f, err));
    bar_begin(&b, "hashing", "B");
    crypto_hash_sha256_init(&h);
    for (size_t at = 0; at < f.size; at += PIECE) {
        crypto_hash_sha256_update(&h, f.data + at, f.size - at < PIECE ? f.size - at : PIECE);
        bar_update(&b, at, f.size);
    }
    crypto_hash_sha256_final(&h, sum);
    bar_end(&b);
    file_close(&f);
    sodium_bin2hex(hex, 65, sum, sizeof sum);
    return ORCD_OK;
}

static void print_result(bool json, const char *path, const char *kind, const scan *s, const char *hex) {
    char a[32], b[32];
    if (json) {
        json_t *j =
            json_pack("{s:s, s:s, s:I, s:I, s:I, s:s*, s:s*}", "model", path, "architecture", kind, "tensors",
                      (json_int_t)s->n_tensor, "values", (json_int_t)s->n_value, "not_finite", (json_int_t)s->n_bad,
                      "first_bad", s->n_bad ? s->worst : NULL, "sha256", *hex ? hex : NULL);
        json_dumpf(j, stdout, JSON_INDENT(1));
        printf("\n");
        json_decref(j);
        return;
    }
    printf("structure  %s, every shape as its configuration asks\n", kind);
    printf("values     %s in %llu tensors, %s not finite\n", human_count(s->n_value, a),
           (unsigned long long)s->n_tensor, human_count(s->n_bad, b));
    if (*hex)
        printf("sha256     %s\n", hex);
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {0};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    char path[4096], hex[65];
    orcd_error err = {0};
    orcd_status st;
    mf_file *f = NULL;
    const arch *a;
    arch_config cfg;
    arch_size size;
    scan s = {0};
    ORCD_TRY_GOTO(st, done, cli_model_path(n_rest ? rest[0] : NULL, path, sizeof path, &err));
    ORCD_TRY_GOTO(st, done, mf_open(path, &f, &err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, &err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &cfg, &err));
    ORCD_TRY_GOTO(st, done, arch_measure(a, f, &cfg, &size, &err));
    s.total = size.n_param;
    bar_begin(&s.b, "scanning", "values");
    st = arch_each_tensor(a, &cfg, 1, (const mf_file *const *)&f, scan_tensor, &s, &err);
    bar_end(&s.b);
    if (st != ORCD_OK)
        goto done;
    ORCD_TRY_GOTO(st, done, hash_file(path, hex, &err));
    print_result(o.json, path, arch_name(a), &s, hex);
    if (s.n_bad)
        st = orcd_fail(&err, ORCD_ERR_FORMAT, "%s: \"%s\" holds values that are not finite; fetch or convert it again",
                       path, s.worst);
done:
    mf_close(f);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_verify = {"verify", "[MODEL]", "is a model whole: structure, finite values, SHA-256", option,
                                run};
