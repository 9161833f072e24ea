#include "cli/serve_options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"

enum { KEY_FILE_BYTES = 1 << 20, PEM_BYTES = 1 << 20 };

orcd_status keys_read(const char *path, key_list *out, orcd_error *err) {
    size_t len, n = 0;
    char *rest, *line;
    *out = (key_list){0};
    if (!path)
        return ORCD_OK;
    ORCD_TRY(file_slurp(path, KEY_FILE_BYTES, &out->text, &len, err));
    out->key = calloc(len / 2 + 2, sizeof *out->key);
    if (!out->key) {
        keys_free(out);
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    }
    rest = out->text;
    while ((line = strsep(&rest, "\r\n")))
        if (*line && *line != '#')
            out->key[n++] = line;
    if (n > 0)
        return ORCD_OK;
    keys_free(out);
    return orcd_fail(err, ORCD_ERR_ARG, "%s holds no key: write one a line", path);
}

void keys_free(key_list *k) {
    free(k->text);
    free(k->key);
    *k = (key_list){0};
}

orcd_status tls_read(const char *cert_path, const char *key_path, char **cert, char **key, orcd_error *err) {
    size_t len;
    *cert = *key = NULL;
    if (!cert_path != !key_path)
        return orcd_fail(err, ORCD_ERR_ARG, "TLS needs both --tls-cert and --tls-key");
    if (!cert_path)
        return ORCD_OK;
    ORCD_TRY(file_slurp(cert_path, PEM_BYTES, cert, &len, err));
    return file_slurp(key_path, PEM_BYTES, key, &len, err);
}

void note_event(void *ctx, const char *sentence) { log_event(ctx, "note", "s:s", "message", sentence); }

int serve_until_end(server *s, eng *e) {
    server_end end = server_run(s);
    orcd_error why = {0};
    int code = end == SERVER_AT_ONCE ? EXIT_FAILED : EXIT_OK;
    if (end == SERVER_FAILED && eng_failure(e, &why))
        code = why.code == ORCD_ERR_DEVICE ? EXIT_DEVICE : EXIT_MODEL;
    if (end == SERVER_DRAINED && !server_is_idle(s))
        code = EXIT_FAILED;
    if (end == SERVER_AT_ONCE || !server_is_idle(s)) { /* an engine that hangs cannot be closed */
        fflush(NULL);
        _exit(code);
    }
    server_close(s);
    eng_close(e);
    return code;
}
