/* hub/pull.c: what was asked for, from the hub's record to checked files under their names. */
#include "hub/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

typedef struct pull {
    const hub_params *p;
    char repo[HUB_NAME], file[HUB_FILE]; /* file "": all of it */
    hub_tree tree;
    const hub_entry **chosen; /* [n] */
    size_t n;
    bool folder;
    hub_shelf shelf;
    hub_part *part; /* [n_part] what is not there yet */
    size_t n_part;
} pull;

static orcd_status read_name(pull *q, const char *name, orcd_error *err) {
    const char *alias = hub_alias(name), *colon = strchr(name, ':');
    size_t n = colon ? (size_t)(colon - name) : strlen(name);
    bool fits = n < sizeof q->repo && (!colon || strlen(colon + 1) < sizeof q->file);
    if (fits)
        snprintf(q->repo, sizeof q->repo, "%.*s", (int)n, name);
    if (alias)
        snprintf(q->repo, sizeof q->repo, "%s", alias);
    if (!fits || !hub_is_repo(q->repo))
        return orcd_fail(err, ORCD_ERR_ARG,
                         "\"%.200s\" is no model of the hub: OWNER/REPO, OWNER/REPO:FILE, gpt-oss-20b, gpt-oss-120b or "
                         "gpt2",
                         name);
    if (colon && !hub_is_file(colon + 1))
        return orcd_fail(err, ORCD_ERR_ARG, "\"%.200s\" is no file name that is allowed here", colon + 1);
    if (colon)
        strcpy(q->file, colon + 1);
    return ORCD_OK;
}

/* Who listens on the way must not learn the token; to this machine itself it may go in the clear. */
static orcd_status check_url(const hub_params *p, orcd_error *err) {
    static const char *const here[] = {"127.0.0.1", "localhost", "[::1]"};
    bool plain = strncmp(p->url, "http://", 7) == 0, local = false;
    if (!plain && strncmp(p->url, "https://", 8) != 0)
        return orcd_fail(err, ORCD_ERR_ARG, "the hub's address %.200s does not begin with https:// or http://", p->url);
    for (size_t i = 0; plain && i < ORCD_COUNT(here); i++) {
        size_t n = strlen(here[i]);
        local |= strncmp(p->url + 7, here[i], n) == 0 && strchr(":/", p->url[7 + n]);
    }
    if (p->token && plain && !local)
        return orcd_fail(err, ORCD_ERR_ARG, "a token is not sent to %.200s without encryption; use https", p->url);
    return ORCD_OK;
}

/* Is the file there, whole and as the hub has it? What is there but not in the list is checked and listed. */
static orcd_status is_here(pull *q, const hub_entry *e, bool *here, orcd_error *err) {
    char path[HUB_PATH], sha256[65];
    struct stat st;
    const sums_entry *sum = sums_find(&q->shelf.sums, false, e->path);
    *here = false;
    if (!hub_shelf_path(&q->shelf, e->path, path))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the name %s/%s is too long", q->shelf.dir, e->path);
    if (sum && strcmp(sum->hex, e->oid) == 0) {
        *here = stat(path, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size == e->size;
        return ORCD_OK;
    }
    ORCD_TRY(hub_file_is(path, e, here, sha256, err));
    if (*here && (!sum || strcmp(sum->hex, sha256) != 0))
        return hub_shelf_put(&q->shelf, e->path, sha256, err);
    return ORCD_OK;
}

static void close_parts(pull *q) {
    for (size_t i = 0; i < q->n_part; i++)
        hub_part_close(&q->part[i]);
    free(q->part);
    q->part = NULL;
    q->n_part = 0;
}

static orcd_status open_parts(pull *q, orcd_error *err) {
    bool here;
    q->part = calloc(q->n + 1, sizeof *q->part);
    if (!q->part)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu files", q->n);
    for (size_t i = 0; i < q->n; i++) {
        ORCD_TRY(is_here(q, q->chosen[i], &here, err));
        if (here)
            continue;
        ORCD_TRY(hub_part_open(&q->shelf, q->chosen[i], &q->part[q->n_part], err));
        q->n_part++;
    }
    return ORCD_OK;
}

static orcd_status check_room(const pull *q, orcd_error *err) {
    struct statvfs v;
    uint64_t need = 0;
    for (size_t i = 0; i < q->n_part; i++)
        need += q->part[i].entry->size - hub_part_bytes(&q->part[i]);
    if (statvfs(q->shelf.dir, &v) != 0 || need <= (uint64_t)v.f_bavail * v.f_frsize)
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_IO, "%s needs %.2f GiB more and %s has %.2f GiB free; make room or choose --cache",
                     q->repo, (double)need / 0x1p30, q->p->cache, (double)v.f_bavail * (double)v.f_frsize / 0x1p30);
}

/* *again: the bytes were wrong, but some came from an earlier run; worth one more try from nothing. */
static orcd_status install(pull *q, hub_part *part, bool *again, orcd_error *err) {
    char path[HUB_PATH];
    const hub_entry *e = part->entry;
    const char *got = e->oid[40] ? part->sha256 : part->git;
    if (strcmp(got, e->oid) != 0) {
        *again |= part->resumed;
        hub_part_drop(part);
        return orcd_fail(err, ORCD_ERR_FORMAT,
                         "%s has the %s %.16s..., the hub records %.16s...; the damaged copy is gone, run it again",
                         e->path, e->oid[40] ? "SHA-256" : "git hash", got, e->oid);
    }
    if (!hub_shelf_path(&q->shelf, e->path, path))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the name %s/%s is too long", q->shelf.dir, e->path);
    ORCD_TRY(hub_make_folders(path, err));
    if (fsync(part->data) != 0 || rename(part->data_path, path) != 0)
        return orcd_fail(err, ORCD_ERR_IO, "cannot put %s in its place: %s", path, strerror(errno));
    (void)unlink(part->map_path);
    return hub_shelf_put(&q->shelf, e->path, part->sha256, err);
}

static orcd_status fetch_missing(pull *q, hub_pulled *out, bool *again, orcd_error *err) {
    orcd_status st;
    ORCD_TRY_GOTO(st, done, open_parts(q, err));
    ORCD_TRY_GOTO(st, done, check_room(q, err));
    if (q->n_part == 0)
        goto done;
    if (q->folder)
        ORCD_TRY_GOTO(st, done, hub_shelf_set_pending(&q->shelf, true, err));
    for (size_t i = 0; i < q->n_part; i++)
        out->bytes_fetched += q->part[i].entry->size - hub_part_bytes(&q->part[i]);
    ORCD_TRY_GOTO(st, done, hub_fetch(q->p, q->repo, q->part, q->n_part, err));
    for (size_t i = 0; i < q->n_part; i++) {
        orcd_status one = install(q, &q->part[i], again, st == ORCD_OK ? err : NULL);
        st = st == ORCD_OK ? one : st;
        out->n_fetched += one == ORCD_OK;
    }
done:
    close_parts(q);
    if (st == ORCD_OK && q->folder)
        st = hub_shelf_set_pending(&q->shelf, false, err);
    return st;
}

orcd_status hub_pull(const hub_params *p, const char *name, hub_pulled *out, orcd_error *err) {
    pull q = {.p = p, .shelf.lock = -1};
    bool again = false;
    orcd_status st;
    *out = (hub_pulled){0};
    ORCD_TRY_GOTO(st, done, read_name(&q, name, err));
    ORCD_TRY_GOTO(st, done, check_url(p, err));
    ORCD_TRY_GOTO(st, done, hub_tree_get(p, q.repo, &q.tree, err));
    if (!(q.chosen = calloc(q.tree.n + 1, sizeof *q.chosen))) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %zu files", q.tree.n);
        goto done;
    }
    ORCD_TRY_GOTO(st, done, hub_choose(&q.tree, q.repo, q.file[0] ? q.file : NULL, q.chosen, &q.n, &q.folder, err));
    ORCD_TRY_GOTO(st, done, hub_shelf_lock(p, p->cache, q.repo, &q.shelf, err));
    st = fetch_missing(&q, out, &again, err);
    if (st == ORCD_ERR_FORMAT && again) {
        if (p->note)
            p->note(p->ctx, "bytes of an earlier run were damaged; fetching them anew");
        st = fetch_missing(&q, out, &again, err);
    }
    if (st != ORCD_OK)
        goto done;
    out->n_file = (int)q.n;
    for (size_t i = 0; i < q.n; i++)
        out->bytes += q.chosen[i]->size;
    snprintf(out->name, sizeof out->name, "%s%s%s", q.repo, q.folder ? "" : ":", q.folder ? "" : q.chosen[0]->path);
    if (q.folder)
        snprintf(out->path, sizeof out->path, "%s", q.shelf.dir);
    else
        (void)hub_shelf_path(&q.shelf, q.chosen[0]->path, out->path);
done:
    hub_shelf_close(&q.shelf);
    hub_tree_free(&q.tree);
    free(q.chosen);
    return st;
}
