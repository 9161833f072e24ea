#include "cli/cli.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "arch/arch.h"
#include "base/file.h"
#include "cli/cache.h"
#include "text/tokenizer.h"

orcd_status cli_model_path(const char *given, char *path, size_t cap, orcd_error *err) {
    static const char *const place[] = {"models", "../models", "../share/orcd"};
    if (given && !file_exists(given))
        return cli_find_pulled(given, path, cap, err);
    if (given) {
        snprintf(path, cap, "%s", given);
        return ORCD_OK;
    }
    char program[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    program[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(program, '/');
    if (slash)
        *slash = '\0';
    for (size_t i = 0; i < ORCD_COUNT(place); i++) {
        int len = snprintf(path, cap, "%s/%s/fable.gguf", program, place[i]);
        if (len > 0 && (size_t)len < cap && file_exists(path)) {
            char *plain = realpath(path, NULL);
            if (plain && strlen(plain) < cap)
                memcpy(path, plain, strlen(plain) + 1);
            free(plain);
            return ORCD_OK;
        }
    }
    return orcd_fail(err, ORCD_ERR_IO, "the bundled model fable.gguf is not beside the program in %s; name a MODEL",
                     program);
}

orcd_status cli_read_text(const char *path, char **text, size_t *len, orcd_error *err) {
    const size_t limit = (size_t)1 << 30;
    if (strcmp(path, "-") != 0)
        return file_slurp(path, limit, text, len, err);
    char piece[65536];
    buf all = {0};
    for (size_t n; (n = fread(piece, 1, sizeof piece, stdin)) > 0 && all.len <= limit;)
        buf_add(&all, piece, n);
    buf_str(&all, "");
    *text = NULL;
    if (all.failed || all.len > limit) {
        buf_free(&all);
        return orcd_fail(err, ORCD_ERR_LIMIT, "standard input is longer than %zu bytes, or memory ran out", limit);
    }
    *text = all.data;
    *len = all.len;
    return ORCD_OK;
}

orcd_status cli_read_ids(const char *path, ids *out, orcd_error *err) {
    file_map f;
    ORCD_TRY(file_open(path, &f, err));
    if (f.size == 0 || f.size % 4 != 0) {
        size_t size = f.size;
        file_close(&f);
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: %zu bytes are not a list of int32 token ids", path, size);
    }
    for (size_t i = 0; i < f.size; i += 4)
        ids_push(out, (int32_t)((uint32_t)f.data[i] | (uint32_t)f.data[i + 1] << 8 | (uint32_t)f.data[i + 2] << 16 |
                                (uint32_t)f.data[i + 3] << 24));
    file_close(&f);
    return out->failed ? orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the ids of %s", path) : ORCD_OK;
}

orcd_status cli_encode(const char *model, const char *tokenizer, const char *text, size_t len, ids *out, int *n_ctx,
                       orcd_error *err) {
    mf_file *f = NULL;
    tok *t = NULL;
    const arch *a;
    arch_config c;
    orcd_status st;
    ORCD_TRY_GOTO(st, done, mf_open(model, &f, err));
    ORCD_TRY_GOTO(st, done, arch_identify(f, &a, err));
    ORCD_TRY_GOTO(st, done, arch_config_read(a, f, &c, err));
    ORCD_TRY_GOTO(st, done, tok_open_for(f, tokenizer, &t, err));
    *n_ctx = c.n_ctx;
    st = tok_encode(t, text, len, false, out);
    if (st != ORCD_OK)
        orcd_fail(err, st, "the text of %zu bytes cannot be tokenised: %s", len, orcd_status_name(st));
done:
    tok_close(t);
    mf_close(f);
    return st;
}
