/* hub/shelf.c: one repository's folder in the cache: its lock, and the list of files that were checked. */
#include "hub/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"

#define OWN ".orcd" /* no name of the hub begins with a dot */
#define SUMS "SHA256SUMS"
#define PENDING "pending"

enum { MAX_SUMS_BYTES = 16 << 20 };

orcd_status hub_make_folders(const char *path, orcd_error *err) {
    char part[HUB_PATH];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        size_t n = (size_t)(slash - path);
        if (n >= sizeof part)
            return orcd_fail(err, ORCD_ERR_LIMIT, "the name %.100s... is too long", path);
        memcpy(part, path, n);
        part[n] = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return orcd_fail(err, ORCD_ERR_IO, "cannot make the folder %s: %s", part, strerror(errno));
    }
    return ORCD_OK;
}

bool hub_shelf_path(const hub_shelf *s, const char *path, char out[HUB_PATH]) {
    int n = snprintf(out, HUB_PATH, "%s/%s", s->dir, path);
    return n > 0 && n < HUB_PATH;
}

bool hub_shelf_own(const hub_shelf *s, const char *name, const char *ending, char out[HUB_PATH]) {
    int n = snprintf(out, HUB_PATH, "%s/" OWN "/%s%s", s->dir, name, ending);
    return n > 0 && n < HUB_PATH;
}

/* "HEX  PATH"; other lines are skipped. */
static void read_sums(hub_shelf *s, char *text) {
    size_t lines = 1;
    for (const char *p = text; (p = strchr(p, '\n')); p++)
        lines++;
    if (!(s->sum = calloc(lines, sizeof *s->sum)))
        return;
    for (char *save = NULL, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        hub_sum *to = &s->sum[s->n];
        if (strspn(line, "0123456789abcdef") != 64 || strncmp(line + 64, "  ", 2) != 0 || !hub_is_file(line + 66))
            continue;
        memcpy(to->hex, line, 64);
        strcpy(to->path, line + 66);
        s->n++;
    }
}

static void read_state(hub_shelf *s) {
    char path[HUB_PATH], *text = NULL;
    size_t len;
    s->pending = hub_shelf_own(s, PENDING, "", path) && file_exists(path);
    if (hub_shelf_own(s, SUMS, "", path) && file_slurp(path, MAX_SUMS_BYTES, &text, &len, NULL) == ORCD_OK)
        read_sums(s, text);
    free(text);
}

void hub_shelf_read(const char *cache, const char *repo, hub_shelf *s) {
    *s = (hub_shelf){.lock = -1};
    int n = snprintf(s->dir, sizeof s->dir, "%s/%s", cache, repo);
    if (n > 0 && n < HUB_PATH)
        read_state(s);
}

/* Whoever removes the folder removes the lock file too: what was waited for must still be the file of that name. */
static bool still_there(int fd, const char *path) {
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

orcd_status hub_shelf_lock(const hub_params *p, const char *cache, const char *repo, hub_shelf *s, orcd_error *err) {
    char path[HUB_PATH];
    *s = (hub_shelf){.lock = -1};
    int n = snprintf(s->dir, sizeof s->dir, "%s/%s", cache, repo);
    if (n <= 0 || n >= HUB_PATH || !hub_shelf_own(s, "lock", "", path))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the cache folder's name is too long");
    for (bool told = false;;) {
        ORCD_TRY(hub_make_folders(path, err));
        s->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (s->lock < 0 && errno == ENOENT)
            continue;
        if (s->lock < 0)
            return orcd_fail(err, ORCD_ERR_IO, "cannot open %s: %s", path, strerror(errno));
        bool busy = flock(s->lock, LOCK_EX | LOCK_NB) != 0;
        if (!busy && still_there(s->lock, path))
            break;
        close(s->lock);
        s->lock = -1;
        if (busy && !p)
            return orcd_fail(err, ORCD_ERR_IO, "%s is being pulled by another process; wait for it or stop it", repo);
        if (busy && !told && p->note)
            p->note(p->ctx, "another process is pulling this model; waiting for it");
        if (busy && p->stopped && p->stopped(p->ctx))
            return orcd_fail(err, ORCD_ERR_CANCELLED, "stopped while another process was pulling %s", repo);
        told |= busy;
        usleep(busy ? 200000 : 1000);
    }
    read_state(s);
    return ORCD_OK;
}

void hub_shelf_close(hub_shelf *s) {
    if (s->lock >= 0)
        close(s->lock);
    free(s->sum);
    *s = (hub_shelf){.lock = -1};
}

const hub_sum *hub_shelf_find(const hub_shelf *s, const char *path) {
    for (size_t i = 0; i < s->n; i++)
        if (strcmp(s->sum[i].path, path) == 0)
            return &s->sum[i];
    return NULL;
}

static orcd_status write_sums(const hub_shelf *s, orcd_error *err) {
    char path[HUB_PATH], new[HUB_PATH];
    if (!hub_shelf_own(s, SUMS, "", path) || !hub_shelf_own(s, SUMS, ".new", new))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the name of the folder %.100s... is too long", s->dir);
    FILE *f = fopen(new, "we");
    bool ok = f != NULL;
    for (size_t i = 0; ok && i < s->n; i++)
        ok = fprintf(f, "%s  %s\n", s->sum[i].hex, s->sum[i].path) > 0;
    ok = ok && fflush(f) == 0 && fsync(fileno(f)) == 0;
    if (f && fclose(f) != 0)
        ok = false;
    if (ok && rename(new, path) == 0)
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

orcd_status hub_shelf_put(hub_shelf *s, const char *path, const char *hex, orcd_error *err) {
    hub_sum *old = (hub_sum *)hub_shelf_find(s, path);
    if (old && !hex) {
        *old = s->sum[--s->n];
    } else if (hex) {
        hub_sum *grown = old ? s->sum : realloc(s->sum, (s->n + 1) * sizeof *grown);
        if (!grown)
            return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the list of files");
        s->sum = grown;
        hub_sum *to = old ? old : &grown[s->n++];
        snprintf(to->path, sizeof to->path, "%s", path);
        snprintf(to->hex, sizeof to->hex, "%s", hex);
    }
    return write_sums(s, err);
}

orcd_status hub_shelf_set_pending(hub_shelf *s, bool pending, orcd_error *err) {
    char path[HUB_PATH];
    if (!hub_shelf_own(s, PENDING, "", path))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the name of the folder %.100s... is too long", s->dir);
    int fd = pending ? open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd >= 0)
        close(fd);
    if ((pending && fd < 0) || (!pending && unlink(path) != 0 && errno != ENOENT))
        return orcd_fail(err, ORCD_ERR_IO, "cannot change %s: %s", path, strerror(errno));
    s->pending = pending;
    return ORCD_OK;
}
