#include "engine/disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/internal.h"

#define NAME_FINGERPRINT 8 /* bytes of it, and of the key, in a file's name */
#define NAME_KEY 16
#define NAME_CAP 96

static const char magic[8] = "orcdKV1"; /* another layout needs another number */

typedef struct head { /* as in the file: no padding, little-endian like every machine that orcd runs on */
    char magic[8];
    uint8_t fingerprint[DISK_HASH], key[DISK_HASH];
    uint64_t salt;
    uint32_t is_point;
    int32_t n_pos; /* of a point */
} head;
_Static_assert(sizeof(head) == 88, "head has padding");

struct disk {
    disk_params p;
    kv_store *kv;
    prefix *cache;
    int fd;         /* of the folder */
    uint64_t total; /* bytes of cache files there, as far as this process knows */
    bool failed;
    size_t cap;            /* of `file`: the largest file there can be */
    uint8_t *file;         /* what is being read or written */
    uint8_t *page;         /* a full page's file while a point is in `file` */
    int32_t *id, *page_of; /* [n_index * BE_PAGE], [n_index]: of the entry in hand */
    char prefix[2 * NAME_FINGERPRINT + 1];
};

static void note(const disk *d, const char *fmt, ...) ORCD_PRINTF(2, 3);
static void note(const disk *d, const char *fmt, ...) {
    char text[512];
    va_list args;
    if (!d->p.note)
        return;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    d->p.note(d->p.note_ctx, text);
}

/* ---- names ---- */

static void first_key(const disk *d, uint64_t salt, uint8_t key[DISK_HASH]) {
    crypto_generichash(key, DISK_HASH, (const uint8_t *)&salt, sizeof salt, d->p.fingerprint, DISK_HASH);
}

/* From the key of the pages before to the key with n more tokens. */
static void next_key(uint8_t key[DISK_HASH], const int32_t *id, int32_t n) {
    uint8_t next[DISK_HASH];
    crypto_generichash(next, DISK_HASH, (const uint8_t *)id, (size_t)n * sizeof *id, key, DISK_HASH);
    memcpy(key, next, DISK_HASH);
}

static void file_name(const disk *d, const uint8_t key[DISK_HASH], bool is_point, char name[NAME_CAP]) {
    char hex[2 * NAME_KEY + 1];
    sodium_bin2hex(hex, sizeof hex, key, NAME_KEY);
    snprintf(name, NAME_CAP, "%s-%s.%s", d->prefix, hex, is_point ? "point" : "page");
}

/* True for names that this file makes, of any model: "16 hex digits-32 hex digits.page", or an abandoned part. */
static bool is_ours(const char *name, bool *is_point) {
    size_t a = strspn(name, "0123456789abcdef");
    if (a != 2 * NAME_FINGERPRINT || name[a] != '-')
        return false;
    const char *rest = name + a + 1 + strspn(name + a + 1, "0123456789abcdef");
    size_t n = strlen(rest);
    *is_point = strcmp(rest, ".point") == 0;
    return (size_t)(rest - name) == a + 1 + 2 * NAME_KEY &&
           (*is_point || strcmp(rest, ".page") == 0 || (n > 5 && strcmp(rest + n - 5, ".part") == 0));
}

/* ---- the folder ---- */

typedef struct item {
    char name[NAME_CAP];
    struct timespec used;
    uint64_t bytes;
    bool is_point;
} item;

/* Longest unused first; a point before the pages that it needs. */
static int by_use(const void *pa, const void *pb) {
    const item *a = pa, *b = pb;
    if (a->used.tv_sec != b->used.tv_sec)
        return a->used.tv_sec < b->used.tv_sec ? -1 : 1;
    if (a->used.tv_nsec != b->used.tv_nsec)
        return a->used.tv_nsec < b->used.tv_nsec ? -1 : 1;
    return a->is_point != b->is_point ? (a->is_point ? -1 : 1) : strcmp(a->name, b->name);
}

/* All cache files, sorted; d->total becomes their size. */
static size_t list(disk *d, item **out) {
    size_t n = 0, cap = 0;
    int fd = openat(d->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    *out = NULL;
    if (!dir && fd >= 0)
        close(fd);
    d->total = 0;
    for (struct dirent *e; dir && (e = readdir(dir));) {
        struct stat s;
        item it = {0};
        if (strlen(e->d_name) >= NAME_CAP || !is_ours(e->d_name, &it.is_point) ||
            fstatat(d->fd, e->d_name, &s, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(s.st_mode))
            continue;
        if (n == cap) {
            item *more = realloc(*out, (cap = 2 * cap + 64) * sizeof *more);
            if (!more)
                break;
            *out = more;
        }
        strcpy(it.name, e->d_name);
        it.used = s.st_mtim;
        it.bytes = (uint64_t)s.st_size;
        d->total += it.bytes;
        (*out)[n++] = it;
    }
    if (dir)
        closedir(dir);
    if (n)
        qsort(*out, n, sizeof **out, by_use);
    return n;
}

static uint64_t target(const disk *d) { return d->p.max_bytes - d->p.max_bytes / 16; }

static void evict(disk *d) {
    item *it;
    if (d->total <= d->p.max_bytes)
        return;
    size_t n = list(d, &it);
    for (size_t i = 0; i < n && d->total > target(d); i++)
        if (unlinkat(d->fd, it[i].name, 0) == 0)
            d->total -= it[i].bytes;
    free(it);
}

/* ---- one file ---- */

static size_t page_file_bytes(const disk *d) {
    return sizeof(head) + (size_t)d->kv->pool[BE_POOL_FULL].page_bytes + DISK_HASH;
}

static int n_window(const disk *d, int32_t n_pos) {
    return d->kv->window ? kv_n_index(n_pos) - kv_window_first(d->kv, n_pos) : 0;
}

static size_t point_file_bytes(const disk *d, int32_t n_pos) {
    return sizeof(head) + (size_t)n_pos * sizeof(int32_t) +
           (n_pos % BE_PAGE ? (size_t)d->kv->pool[BE_POOL_FULL].page_bytes : 0) +
           (size_t)n_window(d, n_pos) * (size_t)d->kv->pool[BE_POOL_WINDOW].page_bytes + DISK_HASH;
}

/* The file's time becomes now; false when it is not there. */
static bool touch(const disk *d, const char *name) {
    return utimensat(d->fd, name, (struct timespec[2]){{0, UTIME_NOW}, {0, UTIME_NOW}}, AT_SYMLINK_NOFOLLOW) == 0;
}

/* What `file` holds, hash added, as `name`. */
static bool put(disk *d, const char *name, uint8_t *file, size_t n) {
    char part[NAME_CAP + 32];
    size_t done = 0;
    crypto_generichash(file + n - DISK_HASH, DISK_HASH, file, n - DISK_HASH, NULL, 0);
    snprintf(part, sizeof part, "%s.%d.part", name, (int)getpid());
    int fd = openat(d->fd, part, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    bool ok = fd >= 0;
    while (ok && done < n) {
        ssize_t k = write(fd, file + done, n - done);
        ok = k > 0 || (k < 0 && errno == EINTR);
        done += k > 0 ? (size_t)k : 0;
    }
    ok = ok && fsync(fd) == 0;
    int error = errno;
    if (fd >= 0 && close(fd) != 0 && ok)
        ok = false, error = errno;
    if (ok && renameat(d->fd, part, d->fd, name) != 0)
        ok = false, error = errno;
    if (!ok) {
        if (fd >= 0)
            unlinkat(d->fd, part, 0);
        d->failed = true;
        note(d, "nothing more is kept in %s: a file cannot be written: %s", d->p.dir, strerror(error));
        return false;
    }
    d->total += n;
    evict(d);
    return true;
}

/* Read a whole file of `least` to `most` bytes and check all but what is in it. False with the reason; NULL = it is
 * not there. */
static bool get(const disk *d, const char *name, size_t least, size_t most, uint8_t *file, size_t *n,
                const char **why) {
    struct stat s;
    uint8_t sum[DISK_HASH];
    bool ok = false;
    int fd = openat(d->fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    *why = fd < 0 && errno == ENOENT ? NULL : "it cannot be read";
    if (fd < 0 || fstat(fd, &s) != 0 || !S_ISREG(s.st_mode))
        goto done;
    *why = "its length is wrong";
    if (s.st_size < 0 || (uint64_t)s.st_size < least || (uint64_t)s.st_size > most)
        goto done;
    *n = 0;
    for (ssize_t k = 1; k > 0 && *n<(size_t)s.st_size; *n += k> 0 ? (size_t)k : 0)
        k = read(fd, file + *n, (size_t)s.st_size - *n);
    const head *h = (const head *)file;
    if (*n != (size_t)s.st_size)
        goto done;
    *why = "it is damaged";
    crypto_generichash(sum, DISK_HASH, file, *n - DISK_HASH, NULL, 0);
    if (memcmp(sum, file + *n - DISK_HASH, DISK_HASH) != 0)
        goto done;
    *why = "it belongs to another model, or another orcd wrote it";
    ok = memcmp(h->magic, magic, sizeof magic) == 0 && memcmp(h->fingerprint, d->p.fingerprint, DISK_HASH) == 0;
done:
    if (fd >= 0)
        close(fd);
    return ok;
}

/* ---- saving ---- */

static uint8_t *begin(const disk *d, uint8_t *file, const uint8_t key[DISK_HASH], uint64_t salt, int32_t n_pos) {
    head h = {.salt = salt, .is_point = n_pos > 0, .n_pos = n_pos};
    memcpy(h.magic, magic, sizeof magic);
    memcpy(h.fingerprint, d->p.fingerprint, DISK_HASH);
    memcpy(h.key, key, DISK_HASH);
    memcpy(file, &h, sizeof h);
    return file + sizeof h;
}

/* Append one page; *to moves on. */
static bool add_page(disk *d, int pool, int32_t page, uint8_t **to) {
    orcd_error err;
    if (d->kv->dev->ops->kv_read_page(d->kv->kv, pool, page, *to, &err) != ORCD_OK) {
        d->failed = true;
        note(d, "nothing more is kept in %s: %s", d->p.dir, err.message);
        return false;
    }
    *to += d->kv->pool[pool].page_bytes;
    return true;
}

/* Everything of one entry that is not there yet. False when it failed or time is up. */
static bool save_point(disk *d, const prefix_point *e, double until) {
    uint8_t key[DISK_HASH], *to;
    char name[NAME_CAP];
    int32_t full = e->n_pos / BE_PAGE, n_tail = e->n_pos % BE_PAGE;
    prefix_read(d->cache, e->entry, d->id, d->page_of);
    first_key(d, e->salt, key);
    for (int32_t i = 0; i < full; i++) {
        next_key(key, d->id + i * BE_PAGE, BE_PAGE);
        file_name(d, key, false, name);
        if (touch(d, name))
            continue;
        to = begin(d, d->file, key, e->salt, 0);
        if (!add_page(d, BE_POOL_FULL, d->page_of[i], &to) || !put(d, name, d->file, page_file_bytes(d)) ||
            eng_now() > until)
            return false;
    }
    next_key(key, d->id + full * BE_PAGE, n_tail);
    file_name(d, key, true, name);
    if (touch(d, name))
        return true;
    to = begin(d, d->file, key, e->salt, e->n_pos);
    memcpy(to, d->id, (size_t)e->n_pos * sizeof *d->id);
    to += (size_t)e->n_pos * sizeof *d->id;
    if (n_tail && !add_page(d, BE_POOL_FULL, e->tail_page, &to))
        return false;
    for (int i = 0; i < e->n_window; i++)
        if (!add_page(d, BE_POOL_WINDOW, e->window[i], &to))
            return false;
    return put(d, name, d->file, point_file_bytes(d, e->n_pos));
}

bool disk_save(disk *d, double until) {
    prefix_point e;
    while (!d->failed && prefix_unkept(d->cache, DISK_MIN_POS, &e)) {
        uint64_t bytes = (uint64_t)(e.n_pos / BE_PAGE) * page_file_bytes(d) + point_file_bytes(d, e.n_pos);
        if (bytes <= target(d) && !save_point(d, &e, until))
            return !d->failed;
        prefix_keep(d->cache, e.entry);
        if (eng_now() > until)
            return true;
    }
    return false;
}

/* ---- restoring ---- */

/* Read a point into d->file and d->id. */
static bool read_point(const disk *d, const char *name, head *h, const char **why) {
    uint8_t key[DISK_HASH];
    char right_name[NAME_CAP];
    size_t n;
    if (!get(d, name, point_file_bytes(d, 1), d->cap, d->file, &n, why))
        return false;
    memcpy(h, d->file, sizeof *h);
    *why = "its lengths do not fit this model and context";
    if (!h->is_point || h->n_pos < 1 || h->n_pos > d->kv->n_index * BE_PAGE || n != point_file_bytes(d, h->n_pos))
        return false;
    memcpy(d->id, d->file + sizeof *h, (size_t)h->n_pos * sizeof *d->id);
    *why = "its tokens are not what its name says";
    for (int32_t i = 0; i < h->n_pos; i++)
        if (d->id[i] < 0 || d->id[i] >= d->p.n_vocab)
            return false;
    first_key(d, h->salt, key);
    for (int32_t i = 0; i < h->n_pos / BE_PAGE; i++)
        next_key(key, d->id + i * BE_PAGE, BE_PAGE);
    next_key(key, d->id + h->n_pos / BE_PAGE * BE_PAGE, h->n_pos % BE_PAGE);
    file_name(d, key, true, right_name);
    return memcmp(key, h->key, DISK_HASH) == 0 && strcmp(name, right_name) == 0;
}

/* Fill page `index` of slot 0 from its file, whose name is then in `name`. */
static bool load_page(disk *d, const uint8_t key[DISK_HASH], uint64_t salt, int index, char name[NAME_CAP],
                      const char **why) {
    size_t n = page_file_bytes(d);
    const head *h = (const head *)d->page;
    file_name(d, key, false, name);
    if (!get(d, name, n, n, d->page, &n, why))
        return false;
    *why = "its content is not what its name says";
    if (h->is_point || h->n_pos != 0 || h->salt != salt || memcmp(h->key, key, DISK_HASH) != 0)
        return false;
    *why = "its page cannot be written to the device";
    return d->kv->dev->ops->kv_write_page(d->kv->kv, BE_POOL_FULL, kv_at(d->kv, BE_POOL_FULL, 0, index),
                                          d->page + sizeof *h, NULL) == ORCD_OK;
}

/* Page i of the prompt in d->id is of no use: those behind it are not either. */
static void forget_behind(const disk *d, uint8_t key[DISK_HASH], int32_t i, int32_t full) {
    char name[NAME_CAP];
    while (++i < full) {
        next_key(key, d->id + i * BE_PAGE, BE_PAGE);
        file_name(d, key, false, name);
        unlinkat(d->fd, name, 0);
    }
}

/* Map fresh pages behind the first `depth` ones of slot 0 and fill them. `name`: the file at fault. */
static bool fill_slot(disk *d, const head *h, int32_t depth, char name[NAME_CAP], const char **why) {
    kv_store *kv = d->kv;
    const be_ops *ops = kv->dev->ops;
    uint8_t key[DISK_HASH];
    int32_t full = h->n_pos / BE_PAGE, first = kv_window_first(kv, h->n_pos);
    const uint8_t *from = d->file + sizeof *h + (size_t)h->n_pos * sizeof *d->id;
    kv->window_first[0] = kv->end[BE_POOL_WINDOW][0] = kv->window ? first : 0;
    *why = "no memory is left for it";
    if (!kv_extend(kv, 0, h->n_pos))
        return false;
    first_key(d, h->salt, key);
    for (int32_t i = 0; i < full; i++) {
        next_key(key, d->id + i * BE_PAGE, BE_PAGE);
        if (i >= depth && !load_page(d, key, h->salt, i, name, why)) {
            forget_behind(d, key, i, full);
            return false;
        }
    }
    *why = "its pages cannot be written to the device";
    if (h->n_pos % BE_PAGE) {
        if (ops->kv_write_page(kv->kv, BE_POOL_FULL, kv_at(kv, BE_POOL_FULL, 0, full), from, NULL) != ORCD_OK)
            return false;
        from += kv->pool[BE_POOL_FULL].page_bytes;
    }
    for (int i = 0; i < n_window(d, h->n_pos); i++, from += kv->pool[BE_POOL_WINDOW].page_bytes)
        if (ops->kv_write_page(kv->kv, BE_POOL_WINDOW, kv_at(kv, BE_POOL_WINDOW, 0, first + i), from, NULL) != ORCD_OK)
            return false;
    return true;
}

/* Bring one point back. False when the cache is full. A file that is of no use is removed, so that it is written
 * anew. */
static bool restore(disk *d, const char *point, int *n_restored, int64_t *n_pos) {
    head h = {0};
    prefix_cursor cur = {0};
    char name[NAME_CAP];
    const char *why;
    bool room = true, ok = false;
    snprintf(name, sizeof name, "%s", point);
    if (read_point(d, point, &h, &why)) {
        int32_t depth = prefix_map(d->cache, 0, d->id, h.n_pos, h.salt, &cur);
        room = prefix_has_room(d->cache, (int[BE_N_POOLS]){kv_n_index(h.n_pos) - depth, n_window(d, h.n_pos)});
        ok = room && fill_slot(d, &h, depth, name, &why);
        if (ok)
            prefix_save(d->cache, 0, d->id, h.n_pos, h.salt, &cur);
        kv_release(d->kv, 0);
        prefix_leave(d->cache, &cur);
    } else if (h.n_pos > d->kv->n_index * BE_PAGE) { /* for a longer context */
        return true;
    }
    if (ok) {
        ++*n_restored;
        *n_pos += h.n_pos;
    } else if (room) {
        if (why)
            note(d, "the cache file %s/%s is ignored: %s", d->p.dir, name, why);
        unlinkat(d->fd, name, 0);
        unlinkat(d->fd, point, 0);
    }
    return room;
}

static void restore_all(disk *d) {
    item *it;
    int n_restored = 0;
    int64_t n_pos = 0;
    double t0 = eng_now();
    size_t n = list(d, &it);
    while (n-- > 0) /* newest first */
        if (it[n].is_point && it[n].bytes <= d->cap && strncmp(it[n].name, d->prefix, sizeof d->prefix - 1) == 0 &&
            !restore(d, it[n].name, &n_restored, &n_pos))
            break;
    free(it);
    prefix_restored(d->cache);
    if (n_restored)
        note(d, "%d prefixes of %lld tokens came back from %s in %.2f s", n_restored, (long long)n_pos, d->p.dir,
             eng_now() - t0);
    evict(d);
}

orcd_status disk_open(const disk_params *p, kv_store *kv, prefix *cache, disk **out, orcd_error *err) {
    orcd_status st;
    *out = NULL;
    disk *d = calloc(1, sizeof *d);
    if (!d)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the cache on disk");
    d->p = *p;
    d->kv = kv;
    d->cache = cache;
    d->fd = -1;
    d->p.dir = strdup(p->dir);
    sodium_bin2hex(d->prefix, sizeof d->prefix, p->fingerprint, NAME_FINGERPRINT);
    size_t n_ctx = (size_t)kv->n_index * BE_PAGE, full = (size_t)kv->pool[BE_POOL_FULL].page_bytes;
    d->cap = sizeof(head) + n_ctx * sizeof(int32_t) + full +
             (size_t)prefix_entry_pages(kv->window) * (size_t)kv->pool[BE_POOL_WINDOW].page_bytes + DISK_HASH;
    d->file = malloc(d->cap);
    d->page = malloc(page_file_bytes(d));
    d->id = calloc(n_ctx, sizeof *d->id);
    d->page_of = calloc((size_t)kv->n_index, sizeof *d->page_of);
    if (!d->p.dir || !d->file || !d->page || !d->id || !d->page_of) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for the cache on disk");
        goto done;
    }
    if (mkdir(p->dir, 0700) == 0 || errno == EEXIST)
        d->fd = open(p->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->fd < 0 || faccessat(d->fd, ".", W_OK | X_OK, AT_EACCESS) != 0) {
        st = orcd_fail(err, ORCD_ERR_IO, "the cache folder %s cannot be used: %s", p->dir, strerror(errno));
        goto done;
    }
    restore_all(d);
    *out = d;
    return ORCD_OK;
done:
    disk_close(d);
    return st;
}

void disk_close(disk *d) {
    if (!d)
        return;
    if (d->fd >= 0)
        close(d->fd);
    free((char *)d->p.dir);
    free(d->file);
    free(d->page);
    free(d->id);
    free(d->page_of);
    free(d);
}
