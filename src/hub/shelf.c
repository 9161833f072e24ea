/* hub/shelf.c: one repository's folder in the cache: its lock, and the list of files that were checked. */
#include "hub/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"

#define OWN ".orcd" /* no name of the hub begins with a dot */
#define SUMS "SHA256SUMS"
#define PENDING "pending"

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

static void read_state(hub_shelf *s) {
    char path[HUB_PATH];
    size_t kept = 0;
    s->pending = hub_shelf_own(s, PENDING, "", path) && file_exists(path);
    if (!hub_shelf_own(s, SUMS, "", path) || sums_read(path, &s->sums, NULL) != ORCD_OK)
        return;
    for (size_t i = 0; i < s->sums.n; i++)
        if (!s->sums.entry[i].part && hub_is_file(s->sums.entry[i].name))
            s->sums.entry[kept++] = s->sums.entry[i];
    s->sums.n = kept;
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
    bool told = false;
    for (int removed = 0;;) {
        ORCD_TRY(hub_make_folders(path, err));
        s->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (s->lock < 0 && errno == ENOENT && removed++ < 10) /* between the two calls, or a link to nowhere */
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
    sums_free(&s->sums);
    *s = (hub_shelf){.lock = -1};
}

orcd_status hub_shelf_put(hub_shelf *s, const char *path, const char *hex, orcd_error *err) {
    char list[HUB_PATH];
    if (!hub_shelf_own(s, SUMS, "", list))
        return orcd_fail(err, ORCD_ERR_LIMIT, "the name of the folder %.100s... is too long", s->dir);
    ORCD_TRY(sums_put(&s->sums, false, path, hex, err));
    return sums_write(list, &s->sums, err);
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
