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

static orcd_status add_shelf(hub_models *m, const char *cache, const char *repo, orcd_error *err) {
    hub_shelf s;
    char path[HUB_PATH];
    orcd_status st = ORCD_OK;
    uint64_t bytes = 0;
    bool folder = false;
    hub_shelf_read(cache, repo, &s);
    for (size_t i = 0; i < s.sums.n && st == ORCD_OK; i++) {
        uint64_t size = hub_shelf_path(&s, s.sums.entry[i].name, path) ? file_bytes(path) : 0;
        if (is_gguf(s.sums.entry[i].name))
            st = add(m, repo, s.sums.entry[i].name, path, size, size > 0, err);
        else
            bytes += size;
        folder |= strcmp(s.sums.entry[i].name, "config.json") == 0;
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

orcd_status hub_remove(const char *cache, const hub_model *m, orcd_error *err) {
    const char *colon = strchr(m->name, ':');
    hub_shelf s;
    char repo[HUB_NAME];
    orcd_status st = ORCD_OK;
    snprintf(repo, sizeof repo, "%.*s", colon ? (int)(colon - m->name) : HUB_NAME - 1, m->name);
    ORCD_TRY(hub_shelf_lock(NULL, cache, repo, &s, err));
    if (colon && unlink(m->path) != 0 && errno != ENOENT)
        st = orcd_fail(err, ORCD_ERR_IO, "cannot remove %s: %s", m->path, strerror(errno));
    else if (colon)
        st = hub_shelf_put(&s, colon + 1, NULL, err);
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
