/* hub/cache.c: the models that lie in the cache. */
#include "hub/internal.h"

#include <dirent.h>
#include <errno.h>
#include <ftw.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/part_name.h"

static bool is_gguf(const char *path) {
    size_t n = strlen(path);
    return n > 5 && strcasecmp(path + n - 5, ".gguf") == 0;
}

static uint64_t file_bytes(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* What of the bytes under way is really on the disk. */
static uint64_t bytes_under_way(const hub_shelf *s) {
    char path[HUB_PATH];
    struct stat st;
    uint64_t sum = 0;
    DIR *dir = hub_shelf_own(s, "", "", path) ? opendir(path) : NULL;
    for (struct dirent *d; dir && (d = readdir(dir));)
        if (strstr(d->d_name, ".part") && hub_shelf_own(s, d->d_name, "", path) && stat(path, &st) == 0)
            sum += (uint64_t)st.st_blocks * 512;
    if (dir)
        closedir(dir);
    return sum;
}

static orcd_status add(hub_models *m, const char *repo, const char *file, const char *path, uint64_t bytes,
                       bool complete, orcd_error *err) {
    hub_model *grown = realloc(m->model, (m->n + 1) * sizeof *grown);
    if (!grown)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the list of models");
    m->model = grown;
    hub_model *to = &grown[m->n++];
    *to = (hub_model){.bytes = bytes, .complete = complete};
    snprintf(to->name, sizeof to->name, "%s%s%s", repo, file ? ":" : "", file ? file : "");
    snprintf(to->path, sizeof to->path, "%s", path);
    return ORCD_OK;
}

/* Bytes of the file, or of all parts of a split model; 0 while one is missing. */
static uint64_t whole_bytes(const hub_shelf *s, const char *name) {
    char path[HUB_PATH], part[HUB_FILE];
    part_name p;
    uint64_t sum = 0;
    snprintf(part, sizeof part, "%s", name);
    unsigned n_part = part_name_read(part, &p) ? p.count : 1;
    for (unsigned no = 1; no <= n_part; no++) {
        if (n_part > 1)
            part_name_set(part, &p, no);
        uint64_t bytes = sums_find(&s->sums, false, part) && hub_shelf_path(s, part, path) ? file_bytes(path) : 0;
        if (bytes == 0)
            return 0;
        sum += bytes;
    }
    return sum;
}

/* A .gguf file; of a split model the first part stands for all. */
static orcd_status add_file(hub_models *m, const hub_shelf *s, const char *repo, const char *name, orcd_error *err) {
    char path[HUB_PATH];
    part_name p;
    if ((part_name_read(name, &p) && p.no > 1) || !hub_shelf_path(s, name, path))
        return ORCD_OK;
    uint64_t whole = whole_bytes(s, name);
    return add(m, repo, name, path, whole ? whole : file_bytes(path), whole > 0, err);
}

static orcd_status add_shelf(hub_models *m, const char *cache, const char *repo, orcd_error *err) {
    hub_shelf s;
    char path[HUB_PATH];
    orcd_status st = ORCD_OK;
    uint64_t bytes = 0;
    bool folder = false;
    hub_shelf_read(cache, repo, &s);
    for (size_t i = 0; i < s.sums.n && st == ORCD_OK; i++) {
        const char *name = s.sums.entry[i].name;
        if (is_gguf(name))
            st = add_file(m, &s, repo, name, err);
        else if (hub_shelf_path(&s, name, path))
            bytes += file_bytes(path);
        folder |= strcmp(name, "config.json") == 0;
    }
    uint64_t under_way = bytes_under_way(&s);
    if (st == ORCD_OK && (folder || s.pending || under_way))
        st = add(m, repo, NULL, s.dir, bytes + under_way, folder && !s.pending, err);
    hub_shelf_close(&s);
    return st;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const hub_model *)a)->name, ((const hub_model *)b)->name);
}

static orcd_status add_owner(hub_models *m, const char *cache, const char *owner, orcd_error *err) {
    char path[HUB_PATH], repo[HUB_NAME];
    orcd_status st = ORCD_OK;
    int n = snprintf(path, sizeof path, "%s/%s", cache, owner);
    DIR *dir = n > 0 && n < HUB_PATH ? opendir(path) : NULL;
    for (struct dirent *d; dir && st == ORCD_OK && (d = readdir(dir));) {
        n = snprintf(repo, sizeof repo, "%.127s/%.127s", owner, d->d_name);
        if (n > 0 && n < HUB_NAME && hub_is_repo(repo))
            st = add_shelf(m, cache, repo, err);
    }
    if (dir)
        closedir(dir);
    return st;
}

orcd_status hub_list(const char *cache, hub_models *out, orcd_error *err) {
    *out = (hub_models){0};
    DIR *dir = opendir(cache);
    orcd_status st = ORCD_OK;
    if (!dir && errno != ENOENT && errno != ENOTDIR)
        return orcd_fail(err, ORCD_ERR_IO, "cannot read the cache %s: %s", cache, strerror(errno));
    for (struct dirent *d; dir && st == ORCD_OK && (d = readdir(dir));)
        if (d->d_name[0] != '.')
            st = add_owner(out, cache, d->d_name, err);
    if (dir)
        closedir(dir);
    if (st != ORCD_OK)
        hub_models_free(out);
    else if (out->n)
        qsort(out->model, out->n, sizeof *out->model, by_name);
    return st;
}

void hub_models_free(hub_models *m) {
    free(m->model);
    *m = (hub_models){0};
}

/* OWNER/REPO:FILE may be called REPO:FILE, OWNER/REPO or REPO when that is clear. */
static bool goes_by(const char *full, const char *name) {
    const char *repo = strchr(full, '/') + 1;
    size_t n = strlen(name);
    return strcmp(repo, name) == 0 || (strncmp(full, name, n) == 0 && full[n] == ':') ||
           (strncmp(repo, name, n) == 0 && repo[n] == ':');
}

const hub_model *hub_find(const hub_models *m, const char *name) {
    const hub_model *found = NULL;
    const char *alias = hub_alias(name), *full = alias ? alias : name;
    size_t n = 0;
    for (size_t i = 0; i < m->n; i++)
        if (strcmp(m->model[i].name, full) == 0)
            return &m->model[i];
    for (size_t i = 0; i < m->n && *name; i++)
        if (goes_by(m->model[i].name, full)) {
            found = &m->model[i];
            n++;
        }
    return n == 1 ? found : NULL;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)kind, (void)at;
    return remove(path);
}

/* The file, or all parts of a split model, and what the list says of them. */
static orcd_status remove_files(hub_shelf *s, const char *name, orcd_error *err) {
    char path[HUB_PATH], part[HUB_FILE];
    part_name p;
    orcd_status st = ORCD_OK;
    snprintf(part, sizeof part, "%s", name);
    unsigned n_part = part_name_read(part, &p) ? p.count : 1;
    for (unsigned no = 1; no <= n_part && st == ORCD_OK; no++) {
        if (n_part > 1)
            part_name_set(part, &p, no);
        if (hub_shelf_path(s, part, path) && unlink(path) != 0 && errno != ENOENT)
            st = orcd_fail(err, ORCD_ERR_IO, "cannot remove %s: %s", path, strerror(errno));
        else
            st = hub_shelf_put(s, part, NULL, err);
    }
    return st;
}

orcd_status hub_remove(const char *cache, const hub_model *m, orcd_error *err) {
    const char *colon = strchr(m->name, ':');
    hub_shelf s;
    char repo[HUB_NAME];
    orcd_status st = ORCD_OK;
    snprintf(repo, sizeof repo, "%.*s", colon ? (int)(colon - m->name) : HUB_NAME - 1, m->name);
    ORCD_TRY(hub_shelf_lock(NULL, cache, repo, &s, err));
    if (colon)
        st = remove_files(&s, colon + 1, err);
    if (st == ORCD_OK && (!colon || (s.sums.n == 0 && !s.pending)) &&
        nftw(s.dir, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0)
        st = orcd_fail(err, ORCD_ERR_IO, "cannot remove all of %s: %s", s.dir, strerror(errno));
    char *slash = strrchr(s.dir, '/');
    if (st == ORCD_OK && slash) {
        *slash = '\0';
        (void)rmdir(s.dir); /* the owner's folder, when this was its last */
    }
    hub_shelf_close(&s);
    return st;
}
