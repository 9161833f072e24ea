/* Where a model's tokenizer is: see tok_open_for. */
#include <libgen.h>
#include <stdlib.h>
#include <string.h>

#include "text/tokenizer.h"

#define NAME "tokenizer.json"

static orcd_status open_explicit(const char *path, tok **out, orcd_error *err) {
    buf full = {0};
    gguf *g = NULL;
    file_map f;
    orcd_status status;
    buf_printf(&full, file_is_dir(path) ? "%s/" NAME : "%s", path);
    if (!full.data || full.failed) {
        buf_free(&full);
        return orcd_fail(err, ORCD_ERR_NOMEM, "not enough memory for the path of the tokenizer");
    }
    ORCD_TRY_GOTO(status, done, file_open(full.data, &f, err));
    bool is_gguf = f.size >= 4 && memcmp(f.data, "GGUF", 4) == 0;
    file_close(&f);
    if (!is_gguf) {
        status = tok_open_json(full.data, out, err);
        goto done;
    }
    ORCD_TRY_GOTO(status, done, gguf_open(full.data, &g, err));
    status = tok_open_gguf(g, out, err);
done:
    gguf_close(g);
    buf_free(&full);
    return status;
}

/* "FOLDER/tokenizer.json" of the model, and of the folder above. False: out of memory. */
static bool places(const mf_file *f, buf *here, buf *above) {
    char *copy = strdup(mf_path(f));
    if (copy) {
        const char *folder = file_is_dir(copy) ? copy : dirname(copy);
        buf_printf(here, "%s/" NAME, folder);
        buf_printf(above, "%s/../" NAME, folder);
    }
    free(copy);
    return here->data && !here->failed && above->data && !above->failed;
}

char *tok_json_path(const mf_file *f) {
    buf here = {0}, above = {0};
    char *path = NULL;
    if (places(f, &here, &above))
        path = file_exists(here.data) ? strdup(here.data) : file_exists(above.data) ? strdup(above.data) : NULL;
    buf_free(&here);
    buf_free(&above);
    return path;
}

orcd_status tok_open_for(const mf_file *f, const char *explicit_path, tok **out, orcd_error *err) {
    *out = NULL;
    if (explicit_path)
        return open_explicit(explicit_path, out, err);
    const gguf *g = mf_gguf(f);
    if (g && gguf_find(g, "tokenizer.ggml.tokens"))
        return tok_open_gguf(g, out, err);

    buf here = {0}, above = {0};
    orcd_status status = ORCD_ERR_NOMEM;
    if (!places(f, &here, &above))
        orcd_fail(err, status, "not enough memory for the path of the tokenizer");
    else if (file_exists(here.data))
        status = tok_open_json(here.data, out, err);
    else if (file_exists(above.data))
        status = tok_open_json(above.data, out, err);
    else
        status = orcd_fail(err, ORCD_ERR_IO, "no tokenizer: searched %s%s and %s; name one with --tokenizer",
                           g ? "the GGUF file, " : "", here.data, above.data);
    buf_free(&here);
    buf_free(&above);
    return status;
}
