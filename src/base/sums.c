#include "base/sums.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/file.h"

enum { MAX_BYTES = 64 << 20, DIGITS = 64 };

static orcd_status append(sums *s, bool part, const char *name, const char *hex, orcd_error *err) {
    if (s->n == s->cap) {
        size_t cap = s->cap ? 2 * s->cap : 16;
        sums_entry *grown = realloc(s->entry, cap * sizeof *grown);
        if (!grown)
            return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu sums", cap);
        s->entry = grown;
        s->cap = cap;
    }
    sums_entry *e = &s->entry[s->n++];
    *e = (sums_entry){.part = part};
    snprintf(e->hex, sizeof e->hex, "%.64s", hex);
    snprintf(e->name, sizeof e->name, "%s", name);
    return ORCD_OK;
}

orcd_status sums_read(const char *path, sums *out, orcd_error *err) {
    char *text = NULL, *save = NULL;
    size_t len;
    orcd_status st = ORCD_OK;
    *out = (sums){0};
    ORCD_TRY(file_slurp(path, MAX_BYTES, &text, &len, err));
    for (char *line = strtok_r(text, "\n", &save); line && st == ORCD_OK; line = strtok_r(NULL, "\n", &save)) {
        bool part = strncmp(line, "# ", 2) == 0;
        const char *hex = line + (part ? 2 : 0);
        if (strspn(hex, "0123456789abcdef") != DIGITS || hex[DIGITS] != ' ' ||
            (hex[DIGITS + 1] != ' ' && hex[DIGITS + 1] != '*')) /* sha256sum marks binary files with a star */
            continue;
        const char *name = hex + DIGITS + 2;
        if (*name && strlen(name) < SUMS_NAME)
            st = append(out, part, name, hex, err);
    }
    free(text);
    if (st != ORCD_OK)
        sums_free(out);
    return st;
}

orcd_status sums_write(const char *path, const sums *s, orcd_error *err) {
    buf new = {0};
    buf_printf(&new, "%s.new", path);
    FILE *f = new.failed ? NULL : fopen(new.data, "we");
    bool ok = f != NULL;
    for (size_t i = 0; ok && i < s->n; i++)
        ok = fprintf(f, "%s%s  %s\n", s->entry[i].part ? "# " : "", s->entry[i].hex, s->entry[i].name) > 0;
    ok = ok && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (f && fclose(f) != 0)
        ok = false;
    ok = ok && rename(new.data, path) == 0;
    orcd_status st = ok ? ORCD_OK : orcd_fail(err, ORCD_ERR_IO, "cannot write %s: %s", path, strerror(errno));
    if (!ok && f)
        (void)unlink(new.data);
    buf_free(&new);
    return st;
}

void sums_free(sums *s) {
    free(s->entry);
    *s = (sums){0};
}

const sums_entry *sums_find(const sums *s, bool part, const char *name) {
    for (size_t i = 0; i < s->n; i++)
        if (s->entry[i].part == part && strcmp(s->entry[i].name, name) == 0)
            return &s->entry[i];
    return NULL;
}

orcd_status sums_put(sums *s, bool part, const char *name, const char *hex, orcd_error *err) {
    const sums_entry *old = sums_find(s, part, name);
    if (!old && !hex)
        return ORCD_OK;
    if (!old)
        return append(s, part, name, hex, err);
    size_t at = (size_t)(old - s->entry);
    if (hex)
        memmove(s->entry[at].hex, hex, DIGITS);
    else
        memmove(s->entry + at, s->entry + at + 1, (--s->n - at) * sizeof *s->entry);
    return ORCD_OK;
}
