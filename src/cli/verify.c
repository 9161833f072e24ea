/* cli/verify.c: `orcd verify`: is a model whole: its files as a list of sums has them, its structure, every weight a
 * finite number. */
#include "cli/cli.h"

#include <dirent.h>
#include <jansson.h>
#include <math.h>
#include <sodium.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arch/arch.h"
#include "base/file.h"
#include "base/part_name.h"
#include "base/pool.h"
#include "base/sums.h"

typedef struct options {
    const char *write, *check;
    int64_t threads;
    bool json;
} options;

static const cli_option option[] = {
    {"check", 0, CLI_STR, offsetof(options, check), 0, 0, "FILE",
     "compare with these SHA-256 sums (default: those that orcd pull wrote)"},
    {"write", 0, CLI_STR, offsetof(options, write), 0, 0, "FILE",
     "write the sums of the files, for sha256sum too, and of every tensor"},
    {"threads", 't', CLI_INT, offsetof(options, threads), 0, 1024, "N", "threads (default: all cores)"},
    {"json", 0, CLI_FLAG, offsetof(options, json), 0, 0, "", "print one JSON object"},
    {0},
};

typedef struct verify {
    char path[4096], dir[4096]; /* the model; the folder that names in the lists start from */
    char list[4200];            /* the list to compare with, "" for none */
    sums want, have;
    pool *pool;
    bar b;

    size_t n_wrong; /* files that differ or are missing, tensors that differ */
    char wrong[200];
    size_t n_wrong_tensor;
    char wrong_tensor[96];

    /* scan */
    const char *kind;
    bool hash_tensors;
    uint64_t n_tensor, n_value, n_bad, done, total;
    char bad[96]; /* the first tensor with a value that is not finite */
} verify;

/* ---- files ---- */

typedef struct hashing { /* files, one a thread at a time */
    verify *v;
    atomic_size_t next;
    _Atomic uint64_t done;
    uint64_t total;
    char (*hex)[65]; /* [v->have.n]; "" for a file that cannot be read */
} hashing;

static void hash_one(hashing *h, const char *name, char hex[65], bool draw) {
    enum { PIECE = 1 << 22 };
    char path[4700];
    file_map f;
    unsigned char sum[crypto_hash_sha256_BYTES];
    crypto_hash_sha256_state state;
    snprintf(path, sizeof path, "%s/%s", h->v->dir, name);
    if (file_open(path, &f, NULL) != ORCD_OK)
        return;
    crypto_hash_sha256_init(&state);
    for (size_t at = 0, n; at < f.size; at += n) {
        n = f.size - at < PIECE ? f.size - at : PIECE;
        crypto_hash_sha256_update(&state, f.data + at, n);
        uint64_t done = atomic_fetch_add(&h->done, n) + n;
        if (draw)
            bar_update(&h->v->b, done, h->total);
    }
    crypto_hash_sha256_final(&state, sum);
    file_close(&f);
    sodium_bin2hex(hex, 65, sum, sizeof sum);
}

static void hash_share(void *arg, int thread, int n_threads) {
    hashing *h = arg;
    (void)n_threads;
    for (size_t i; (i = atomic_fetch_add(&h->next, 1)) < h->v->have.n;)
        hash_one(h, h->v->have.entry[i].name, h->hex[i], thread == 0);
}

/* The sums of all files of v->have. */
static orcd_status hash_files(verify *v, orcd_error *err) {
    hashing h = {.v = v, .hex = calloc(v->have.n + 1, sizeof *h.hex)};
    char path[4700];
    file_map f;
    if (!h.hex)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu files", v->have.n);
    for (size_t i = 0; i < v->have.n; i++) {
        snprintf(path, sizeof path, "%s/%s", v->dir, v->have.entry[i].name);
        if (file_open(path, &f, NULL) == ORCD_OK) {
            h.total += f.size;
            file_close(&f);
        }
    }
    bar_begin(&v->b, "hashing", "B");
    pool_run(v->pool, hash_share, &h);
    bar_end(&v->b);
    for (size_t i = 0; i < v->have.n; i++)
        memcpy(v->have.entry[i].hex, h.hex[i], 65);
    free(h.hex);
    return ORCD_OK;
}

/* What may be opened below the folder: no way out of it, nothing hidden. */
static bool may_open(const char *name) {
    return name[0] != '.' && name[0] != '/' && !strstr(name, "/.") && strlen(name) < SUMS_NAME;
}

static bool is_list(const char *name) {
    size_t n = strlen(name);
    return n > 7 && strcmp(name + n - 7, ".sha256") == 0;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const sums_entry *)a)->name, ((const sums_entry *)b)->name);
}

/* Every file of a folder but lists of sums. */
static orcd_status name_files(verify *v, orcd_error *err) {
    char path[4700];
    DIR *dir = opendir(v->dir);
    orcd_status st = ORCD_OK;
    for (struct dirent *d; dir && st == ORCD_OK && (d = readdir(dir));) {
        snprintf(path, sizeof path, "%s/%s", v->dir, d->d_name);
        if (may_open(d->d_name) && !strchr(d->d_name, '\n') && !is_list(d->d_name) && !file_is_dir(path))
            st = sums_put(&v->have, false, d->d_name, "", err);
    }
    if (dir)
        closedir(dir);
    if (v->have.n)
        qsort(v->have.entry, v->have.n, sizeof *v->have.entry, by_name);
    return st;
}

/* The folder and list of a pulled model: .orcd/SHA256SUMS beside the file or up to 8 folders above it. */
static void find_pulled_list(verify *v) {
    char base[sizeof v->dir], list[sizeof v->list];
    snprintf(base, sizeof base, "%s", v->dir);
    for (int depth = 0; depth <= 8; depth++) {
        snprintf(list, sizeof list, "%s/.orcd/SHA256SUMS", base);
        if (file_exists(list)) {
            snprintf(v->list, sizeof v->list, "%s", list);
            snprintf(v->dir, sizeof v->dir, "%s", base);
            return;
        }
        char *slash = strrchr(base, '/');
        if (!slash || slash == base)
            return;
        *slash = '\0';
    }
}

static orcd_status choose_file(verify *v, const options *o, const char *name, orcd_error *err) {
    bool listed = sums_find(&v->want, false, name) != NULL;
    if (o->check && !listed)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s has no sum of %s", v->list, name);
    if (!listed)
        v->list[0] = '\0'; /* a file of somebody else in a pulled model's folder */
    return sums_put(&v->have, false, name, "", err);
}

/* The file of this name, or of a split model every part. */
static orcd_status choose_parts(verify *v, const options *o, const char *name, orcd_error *err) {
    char part[SUMS_NAME];
    part_name p;
    if (!part_name_read(name, &p))
        return choose_file(v, o, name, err);
    snprintf(part, sizeof part, "%s", name);
    for (unsigned no = 1; no <= p.count; no++) {
        part_name_set(part, &p, no);
        ORCD_TRY(choose_file(v, o, part, err));
    }
    return ORCD_OK;
}

static orcd_status choose_files(verify *v, const options *o, orcd_error *err) {
    bool folder = file_is_dir(v->path);
    char *slash = strrchr(v->path, '/');
    snprintf(v->dir, sizeof v->dir, "%.*s",
             folder  ? (int)strlen(v->path)
             : slash ? (int)(slash - v->path)
                     : 1,
             folder || slash ? v->path : ".");
    if (o->check)
        snprintf(v->list, sizeof v->list, "%s", o->check);
    else if (!o->write)
        find_pulled_list(v);
    if (v->list[0])
        ORCD_TRY(sums_read(v->list, &v->want, err));
    if (folder && !v->list[0])
        return name_files(v, err);
    if (!folder) {
        const char *name =
            strncmp(v->path, v->dir, strlen(v->dir)) == 0 && slash ? v->path + strlen(v->dir) + 1 : v->path;
        if (strlen(name) >= SUMS_NAME)
            return orcd_fail(err, ORCD_ERR_LIMIT, "the name %.60s... is too long for a list", name);
        return choose_parts(v, o, name, err);
    }
    for (size_t i = 0; i < v->want.n; i++) {
        const sums_entry *e = &v->want.entry[i];
        if (e->part)
            continue;
        if (!may_open(e->name))
            return orcd_fail(err, ORCD_ERR_FORMAT, "%s lists \"%.100s\", which is no file of a model", v->list,
                             e->name);
        ORCD_TRY(sums_put(&v->have, false, e->name, "", err));
    }
    return v->have.n ? ORCD_OK : orcd_fail(err, ORCD_ERR_FORMAT, "%s lists no file", v->list);
}

static void compare_files(verify *v) {
    for (size_t i = 0; i < v->have.n && v->list[0]; i++) {
        const sums_entry *e = &v->have.entry[i], *want = sums_find(&v->want, false, e->name);
        if (want && strcmp(want->hex, e->hex) == 0)
            continue;
        if (!v->n_wrong++)
            snprintf(v->wrong, sizeof v->wrong, "%.150s %s", e->name, e->hex[0] ? "differs" : "is missing");
    }
}

/* ---- tensors ---- */

typedef struct share { /* rows of a tensor, in the hands of all threads */
    const mf_tensor *m;
    const q_traits *q;
    uint64_t mat, row, rows;
    uint8_t *raw; /* [rows] as stored */
    float *value; /* [rows][n_col] */
    atomic_uint_fast64_t bad;
} share;

static uint64_t not_finite(const float *value, uint64_t n) {
    uint64_t bad = 0;
    for (uint64_t i = 0; i < n; i++)
        bad += !isfinite(value[i]);
    return bad;
}

static void scan_share(void *arg, int thread, int n_threads) {
    share *s = arg;
    uint64_t from = s->rows * (uint64_t)thread / (uint64_t)n_threads;
    uint64_t n = s->rows * ((uint64_t)thread + 1) / (uint64_t)n_threads - from, n_col = s->m->n_col;
    uint8_t *raw = s->raw + from * q_row_bytes(s->q, n_col);
    if (!n)
        return;
    mf_rows(s->m, s->mat, s->row + from, n, raw);
    s->q->unpack(raw, s->value + from * n_col, n * n_col);
    atomic_fetch_add(&s->bad, not_finite(s->value + from * n_col, n * n_col));
}

static void scanned(verify *v, uint64_t n) {
    v->n_value += n;
    bar_update(&v->b, v->done += n, v->total);
}

static orcd_status scan_rows(verify *v, const mf_tensor *m, crypto_hash_sha256_state *hash, uint64_t *bad,
                             orcd_error *err) {
    enum { CHUNK = 1 << 22 };
    uint64_t step = CHUNK / m->n_col + 1;
    step = step < m->n_row ? step : m->n_row;
    share s = {.m = m, .q = q_find(m->type)};
    s.value = malloc(step * m->n_col * sizeof *s.value);
    s.raw = malloc(step * mf_row_bytes(m));
    orcd_status st = s.value && s.raw ? ORCD_OK : orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", m->name);
    for (s.mat = 0; st == ORCD_OK && s.mat < m->n_mat; s.mat++)
        for (s.row = 0; s.row < m->n_row; s.row += step) {
            s.rows = m->n_row - s.row < step ? m->n_row - s.row : step;
            pool_run(v->pool, scan_share, &s);
            if (v->hash_tensors)
                crypto_hash_sha256_update(hash, s.raw, s.rows * mf_row_bytes(m));
            scanned(v, s.rows * m->n_col);
        }
    *bad = atomic_load(&s.bad);
    free(s.value);
    free(s.raw);
    mf_release(m);
    return st;
}

/* Small, and perhaps a view that has no rows. */
static orcd_status scan_whole(verify *v, const mf_tensor *m, crypto_hash_sha256_state *hash, uint64_t *bad,
                              orcd_error *err) {
    uint64_t n = m->n_mat * m->n_row * m->n_col;
    float *value = malloc(n * sizeof *value);
    if (!value)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for \"%s\"", m->name);
    mf_floats(m, value);
    *bad = not_finite(value, n);
    crypto_hash_sha256_update(hash, (const unsigned char *)value, n * sizeof *value);
    scanned(v, n);
    free(value);
    return ORCD_OK;
}

static orcd_status scan_tensor(void *ctx, const arch_tensor *t, const mf_tensor *const *data, orcd_error *err) {
    verify *v = ctx;
    uint64_t bad = 0;
    char hex[65];
    unsigned char sum[crypto_hash_sha256_BYTES];
    crypto_hash_sha256_state hash;
    if (t->tied)
        return ORCD_OK;
    crypto_hash_sha256_init(&hash);
    ORCD_TRY((t->exact ? scan_whole : scan_rows)(v, data[0], &hash, &bad, err));
    if (bad && !v->n_bad)
        snprintf(v->bad, sizeof v->bad, "%s", t->name);
    v->n_bad += bad;
    v->n_tensor++;
    if (!v->hash_tensors)
        return ORCD_OK;
    crypto_hash_sha256_final(&hash, sum);
    sodium_bin2hex(hex, sizeof hex, sum, sizeof sum);
    const sums_entry *want = sums_find(&v->want, true, t->name);
    if (want && strcmp(want->hex, hex) != 0 && !v->n_wrong_tensor++)
        snprintf(v->wrong_tensor, sizeof v->wrong_tensor, "%s", t->name);
    return sums_put(&v->have, true, t->name, hex, err);
}

static orcd_status scan(verify *v, orcd_error *err) {
    mf_file *f = NULL;
    const arch *a;
    arch_config cfg;
    arch_size size;
    orcd_status st;
    ORCD_TRY_GOTO(st, done, mf_open(v->path, &f, err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &cfg, err));
    ORCD_TRY_GOTO(st, done, arch_measure(a, f, &cfg, &size, err));
    v->kind = arch_name(a);
    v->total = size.n_param;
    bar_begin(&v->b, "scanning", "values");
    st = arch_each_tensor(a, &cfg, 1, (const mf_file *const *)&f, scan_tensor, v, err);
    bar_end(&v->b);
done:
    mf_close(f);
    return st;
}

/* ---- the answer ---- */

static void print_json(const verify *v) {
    json_t *files = json_object();
    const char *only = NULL;
    size_t n_file = 0;
    for (size_t i = 0; i < v->have.n; i++)
        if (!v->have.entry[i].part) {
            json_object_set_new(files, v->have.entry[i].name, json_string(v->have.entry[i].hex));
            only = n_file++ ? NULL : v->have.entry[i].hex;
        }
    json_t *j = json_pack("{s:s, s:s, s:I, s:I, s:I, s:s*, s:s*, s:o, s:s*, s:b}", "model", v->path, "architecture",
                          v->kind, "tensors", (json_int_t)v->n_tensor, "values", (json_int_t)v->n_value, "not_finite",
                          (json_int_t)v->n_bad, "first_bad", v->n_bad ? v->bad : NULL, "sha256", only, "files", files,
                          "list", v->list[0] ? v->list : NULL, "as_listed", v->list[0] && !v->n_wrong);
    json_dumpf(j, stdout, JSON_INDENT(1));
    printf("\n");
    json_decref(j);
}

static void print_text(const verify *v) {
    char a[32], b[32];
    printf("structure  %s, every shape as its configuration asks\n", v->kind);
    printf("values     %s in %llu tensors, %s not finite\n", human_count(v->n_value, a),
           (unsigned long long)v->n_tensor, human_count(v->n_bad, b));
    for (size_t i = 0; i < v->have.n; i++)
        if (!v->have.entry[i].part)
            printf("sha256     %s  %s\n", v->have.entry[i].hex, v->have.entry[i].name);
    if (v->list[0])
        printf("files      as %s has them\n", v->list);
}

static orcd_status wrong_files(const verify *v, orcd_error *err) {
    char others[64] = "", tensors[200] = "";
    if (v->n_wrong > 1)
        snprintf(others, sizeof others, " and %zu more", v->n_wrong - 1);
    if (v->n_wrong_tensor)
        snprintf(tensors, sizeof tensors, "; %zu tensor%s, the first %s", v->n_wrong_tensor,
                 v->n_wrong_tensor == 1 ? "" : "s", v->wrong_tensor);
    return orcd_fail(err, ORCD_ERR_UNSUPPORTED, "%s is not what %.200s lists: %s%s%s; fetch or convert it again",
                     v->path, v->list, v->wrong, others, tensors);
}

static orcd_status examine(verify *v, const options *o, orcd_error *err) {
    orcd_error damage = {0};
    ORCD_TRY(pool_open(o->threads ? (int)o->threads : (int)sysconf(_SC_NPROCESSORS_ONLN), &v->pool, err));
    ORCD_TRY(choose_files(v, o, err));
    ORCD_TRY(hash_files(v, err));
    compare_files(v);
    v->hash_tensors = o->write || v->n_wrong;
    orcd_status st = scan(v, &damage);
    if (v->n_wrong)
        return wrong_files(v, err); /* says more than what a damaged file looks like */
    if (st != ORCD_OK) {
        *err = damage;
        return st;
    }
    (o->json ? print_json : print_text)(v);
    if (v->n_bad)
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: \"%s\" holds values that are not finite; fetch or convert it again",
                         v->path, v->bad);
    return o->write ? sums_write(o->write, &v->have, err) : ORCD_OK;
}

static int run(const cli_command *c, int argc, char **argv) {
    options o = {0};
    const char *rest[1];
    int n_rest;
    if (!cli_parse(c, argc, argv, &o, rest, &n_rest, 1))
        return EXIT_USAGE;
    if (o.write && o.check)
        return cli_usage(c, "--write and --check do not go together");
    orcd_error err = {0};
    verify *v = calloc(1, sizeof *v);
    orcd_status st = v ? ORCD_OK : orcd_fail(&err, ORCD_ERR_NOMEM, "out of memory");
    if (st == ORCD_OK)
        st = cli_model_path(n_rest ? rest[0] : NULL, v->path, sizeof v->path, &err);
    if (st == ORCD_OK)
        st = examine(v, &o, &err);
    if (v) {
        pool_close(v->pool);
        sums_free(&v->want);
        sums_free(&v->have);
    }
    free(v);
    return st == ORCD_OK ? EXIT_OK : cli_fail(&err);
}

const cli_command cmd_verify = {"verify", "[MODEL]", "is a model whole: sums, structure, finite values", option, run};
