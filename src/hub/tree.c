#include "hub/internal.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/checked.h"
#include "base/part_name.h"

enum { MAX_ENTRIES = 10000, MAX_PAGES = 200 };
static const uint64_t max_size = (uint64_t)1 << 50;

void hub_tree_free(hub_tree *t) {
    free(t->entry);
    *t = (hub_tree){0};
}

static bool take_hex(const json_t *v, size_t digits, char *out) {
    const char *s = json_string_value(v);
    if (json_string_length(v) != digits || strspn(s, "0123456789abcdef") != digits)
        return false;
    memcpy(out, s, digits + 1);
    return true;
}

static orcd_status take_entry(const json_t *v, hub_entry *e, orcd_error *err) {
    const json_t *lfs = json_object_get(v, "lfs"), *size = json_object_get(json_is_object(lfs) ? lfs : v, "size");
    strcpy(e->path, json_string_value(json_object_get(v, "path")));
    bool named = json_is_object(lfs) ? take_hex(json_object_get(lfs, "oid"), 64, e->oid)
                                     : take_hex(json_object_get(v, "oid"), 40, e->oid);
    if (!named || !json_is_integer(size) || json_integer_value(size) < 0 ||
        (uint64_t)json_integer_value(size) > max_size)
        return orcd_fail(err, ORCD_ERR_FORMAT, "the hub's record of %s has no usable hash and size", e->path);
    e->size = (uint64_t)json_integer_value(size);
    return ORCD_OK;
}

orcd_status hub_tree_add(hub_tree *t, const char *json, size_t len, orcd_error *err) {
    json_t *root = json_loadb(json, len, JSON_REJECT_DUPLICATES, NULL), *v;
    size_t i, more = json_array_size(root);
    orcd_status st = ORCD_OK;
    hub_entry *grown = NULL;
    if (!json_is_array(root))
        st = orcd_fail(err, ORCD_ERR_FORMAT, "the hub's answer is no list of files");
    else if (more > MAX_ENTRIES - t->n)
        st = orcd_fail(err, ORCD_ERR_LIMIT, "the hub lists more than %d files", MAX_ENTRIES);
    else if (!(grown = realloc(t->entry, (t->n + more + 1) * sizeof *grown)))
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the hub's list of files");
    if (grown)
        t->entry = grown;
    json_array_foreach(root, i, v) {
        const json_t *path = json_object_get(v, "path"), *type = json_object_get(v, "type");
        const char *s = json_string_value(path);
        if (st != ORCD_OK || !s || !json_is_string(type) || strcmp(json_string_value(type), "file") != 0 ||
            strlen(s) != json_string_length(path) || !hub_is_file(s))
            continue;
        st = take_entry(v, &t->entry[t->n], err);
        for (size_t k = 0; st == ORCD_OK && k < t->n; k++)
            if (strcmp(t->entry[k].path, s) == 0)
                st = orcd_fail(err, ORCD_ERR_FORMAT, "the hub lists %s twice", s);
        t->n += st == ORCD_OK;
    }
    json_decref(root);
    return st;
}

orcd_status hub_tree_get(const hub_params *p, const char *repo, hub_tree *out, orcd_error *err) {
    buf url = {0}, body = {0};
    char *next = NULL;
    orcd_status st = ORCD_OK;
    *out = (hub_tree){0};
    buf_printf(&url, "%s/api/models/%s/tree/main?recursive=true", p->url, repo);
    for (int page = 0; st == ORCD_OK && url.len; page++) {
        if (url.failed || page == MAX_PAGES) {
            st = orcd_fail(err, ORCD_ERR_LIMIT, "the list of %s has too many pages, or memory ran out", repo);
            break;
        }
        ORCD_TRY_GOTO(st, done, hub_http_get(p, url.data, &body, &next, err));
        ORCD_TRY_GOTO(st, done, hub_tree_add(out, body.data ? body.data : "", body.len, err));
        if (next && (strncmp(next, p->url, strlen(p->url)) != 0 || next[strlen(p->url)] != '/'))
            st = orcd_fail(err, ORCD_ERR_FORMAT, "the list of %s continues at an address outside %s", repo, p->url);
        buf_clear(&url);
        buf_str(&url, next ? next : "");
        free(next);
        next = NULL;
    }
done:
    free(next);
    buf_free(&url);
    buf_free(&body);
    if (st != ORCD_OK)
        hub_tree_free(out);
    return st;
}

/* ---- which files ---- */

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcasecmp(s + n - m, end) == 0;
}

/* What orcd reads of a Hugging Face folder: root files only (original/ and metal/ hold the same weights again). */
static bool in_folder(const char *path) {
    static const char *const name[] = {"config.json",         "generation_config.json",
                                       "tokenizer.json",      "tokenizer_config.json",
                                       "chat_template.jinja", "model.safetensors.index.json"};
    for (size_t i = 0; i < ORCD_COUNT(name); i++)
        if (strcmp(path, name[i]) == 0)
            return true;
    return strncmp(path, "model", 5) == 0 && ends_with(path, ".safetensors") && !strchr(path, '/');
}

static size_t choose_folder(const hub_tree *t, const hub_entry **chosen) {
    size_t n = 0;
    bool config = false, weights = false;
    for (size_t i = 0; i < t->n; i++)
        if (in_folder(t->entry[i].path)) {
            config |= strcmp(t->entry[i].path, "config.json") == 0;
            weights |= ends_with(t->entry[i].path, ".safetensors");
            chosen[n++] = &t->entry[i];
        }
    return config && weights ? n : 0;
}

static const hub_entry *find(const hub_tree *t, const char *path) {
    for (size_t i = 0; i < t->n; i++)
        if (strcmp(t->entry[i].path, path) == 0)
            return &t->entry[i];
    return NULL;
}

static bool is_later_part(const char *path) {
    part_name p;
    return part_name_read(path, &p) && p.no > 1;
}

/* The file of that name, else the .gguf files with that in their names, of split models the first parts. */
static size_t choose_file(const hub_tree *t, const char *file, const hub_entry **chosen) {
    size_t n = 0;
    if (file && (chosen[0] = find(t, file)))
        return 1;
    for (size_t i = 0; i < t->n; i++)
        if (ends_with(t->entry[i].path, ".gguf") && !is_later_part(t->entry[i].path) &&
            (!file || strcasestr(t->entry[i].path, file)))
            chosen[n++] = &t->entry[i];
    return n;
}

/* chosen[0], or when it is a part of a split model all parts from the first on. */
static orcd_status choose_parts(const hub_tree *t, const char *repo, const hub_entry **chosen, size_t *n,
                                orcd_error *err) {
    char path[HUB_FILE];
    part_name p;
    strcpy(path, chosen[0]->path);
    for (*n = 0; part_name_read(path, &p) && *n < p.count; ++*n) {
        part_name_set(path, &p, (unsigned)*n + 1);
        if (!(chosen[*n] = find(t, path)))
            return orcd_fail(err, ORCD_ERR_FORMAT, "%s has no %s, one of the %u parts of that model", repo, path,
                             p.count);
    }
    *n += *n == 0;
    return ORCD_OK;
}

orcd_status hub_choose(const hub_tree *t, const char *repo, const char *file, const hub_entry **chosen, size_t *n,
                       bool *folder, orcd_error *err) {
    char names[300] = "";
    size_t at = 0;
    *n = file ? 0 : choose_folder(t, chosen);
    *folder = *n > 0;
    if (*n)
        return ORCD_OK;
    if ((*n = choose_file(t, file, chosen)) == 1)
        return choose_parts(t, repo, chosen, n, err);
    if (*n == 0 && file)
        return orcd_fail(err, ORCD_ERR_IO, "%s has no file %s and no .gguf file with that in its name", repo, file);
    if (*n == 0)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "%s holds neither config.json with model*.safetensors nor a .gguf file", repo);
    for (size_t i = 0; i < *n && at < sizeof names - 4; i++) {
        int len = snprintf(names + at, sizeof names - at, "%s%s", i ? ", " : "", chosen[i]->path);
        at += len > 0 ? (size_t)len : 0;
    }
    if (at >= sizeof names)
        strcpy(names + sizeof names - 4, "...");
    return orcd_fail(err, ORCD_ERR_ARG, "%s has %zu .gguf files%s%s; name one as %s:FILE: %s", repo, *n,
                     file ? " with that in their names: " : "", file ? file : "", repo, names);
}
