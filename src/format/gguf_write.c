/* format/gguf_write.c: the writer. The reader judges the header: it is checked by gguf_open on the part file, grown to
 * its final size, before a byte of tensor data is written.
 *
 * PATH.part is locked while it is written. With an origin, PATH.part.done tells how many tensors lie safely on the disk
 * and what they were made from; whoever writes the same header from the same origin after a kill goes on from there. */
#include "format/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/checked.h"

struct gguf_writer {
    char *path, *part, *journal_path;
    FILE *file;
    int journal;     /* -1: none is kept */
    uint64_t unsafe; /* bytes since the journal was last written */
    uint64_t alignment;
    buf kv, infos; /* encoded records */
    buf sizes;     /* uint64_t per tensor: its bytes */
    uint64_t n_kv, n_tensors;
    uint64_t data_bytes; /* of all tensors declared, each padded */
    bool header_done;
    uint64_t current, written; /* the tensor being filled, its bytes so far */
    orcd_error err;            /* the first failure; code ORCD_OK when none */
};

static orcd_status fail_io(gguf_writer *w, const char *what) {
    return w->err.code ? w->err.code
                       : orcd_fail(&w->err, ORCD_ERR_IO, "cannot %s %s: %s", what, w->part, strerror(errno));
}

static void writer_free(gguf_writer *w) {
    if (w->file)
        fclose(w->file);
    if (w->journal >= 0)
        close(w->journal);
    buf_free(&w->kv);
    buf_free(&w->infos);
    buf_free(&w->sizes);
    free(w->path);
    free(w->part);
    free(w->journal_path);
    free(w);
}

/* Takes what is being written out of the way; the finished file is not touched. */
static void remove_part(const gguf_writer *w) {
    (void)unlink(w->journal_path);
    (void)unlink(w->part);
}

static char *joined(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b) + 1;
    char *s = malloc(n + m);
    if (s) {
        memcpy(s, a, n);
        memcpy(s + n, b, m);
    }
    return s;
}

/* One writer at a time: the lock goes with the process. A writer that finished meanwhile has renamed what was opened.
 */
static orcd_status open_part(gguf_writer *w, orcd_error *err) {
    struct stat a, b;
    for (;;) {
        int fd = open(w->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
        if (fd < 0)
            return orcd_fail(err, ORCD_ERR_IO, "cannot create %s: %s", w->part, strerror(errno));
        bool locked = flock(fd, LOCK_EX | LOCK_NB) == 0;
        bool same = fstat(fd, &a) == 0 && stat(w->part, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
        if (locked && same && (w->file = fdopen(fd, "r+b")))
            return ORCD_OK;
        close(fd);
        if (!locked && errno == EWOULDBLOCK)
            return orcd_fail(err, ORCD_ERR_IO, "another process is writing %s; wait for it or stop it", w->path);
        if (!locked || same)
            return orcd_fail(err, ORCD_ERR_IO, "cannot lock %s: %s", w->part, strerror(errno));
    }
}

orcd_status gguf_create(const char *path, uint64_t alignment, gguf_writer **out, orcd_error *err) {
    *out = NULL;
    orcd_status st;
    gguf_writer *w = calloc(1, sizeof *w);
    if (!w)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to write %s", path);
    w->journal = -1;
    w->path = strdup(path);
    w->part = joined(path, ".part");
    w->journal_path = joined(path, ".part.done");
    if (!w->path || !w->part || !w->journal_path)
        st = orcd_fail(err, ORCD_ERR_NOMEM, "no memory to write %s", path);
    else
        st = open_part(w, err);
    if (st != ORCD_OK) {
        writer_free(w);
        return st;
    }
    w->alignment = alignment;
    if (alignment > UINT32_MAX)
        orcd_fail(&w->err, ORCD_ERR_ARG, "an alignment of %llu is not allowed", (unsigned long long)alignment);
    else if (alignment != 32)
        gguf_put_u32(w, "general.alignment", (uint32_t)alignment);
    *out = w;
    return ORCD_OK;
}

/* ---- declarations ---- */

static void put_u32(buf *b, uint32_t v) { buf_add(b, &v, sizeof v); }
static void put_u64(buf *b, uint64_t v) { buf_add(b, &v, sizeof v); }

static void put_str(buf *b, const char *s, size_t len) {
    put_u64(b, len);
    buf_add(b, s, len);
}

static void late(gguf_writer *w, const char *what) {
    if (w->header_done && !w->err.code)
        orcd_fail(&w->err, ORCD_ERR_ARG, "%s was declared after the first data of %s", what, w->path);
}

static void put_key(gguf_writer *w, const char *key, size_t len, gguf_type type) {
    late(w, "a key");
    put_str(&w->kv, key, len);
    put_u32(&w->kv, type);
    w->n_kv++;
}

static void put_array(gguf_writer *w, const char *key, gguf_type elem, uint64_t n) {
    put_key(w, key, strlen(key), GGUF_ARRAY);
    put_u32(&w->kv, elem);
    put_u64(&w->kv, n);
}

void gguf_put_u32(gguf_writer *w, const char *key, uint32_t v) {
    put_key(w, key, strlen(key), GGUF_U32);
    put_u32(&w->kv, v);
}

void gguf_put_f32(gguf_writer *w, const char *key, float v) {
    put_key(w, key, strlen(key), GGUF_F32);
    buf_add(&w->kv, &v, sizeof v);
}

void gguf_put_bool(gguf_writer *w, const char *key, bool v) {
    put_key(w, key, strlen(key), GGUF_BOOL);
    buf_char(&w->kv, v ? 1 : 0);
}

void gguf_put_str(gguf_writer *w, const char *key, const char *s, size_t len) {
    put_key(w, key, strlen(key), GGUF_STRING);
    put_str(&w->kv, s, len);
}

void gguf_put_str_array(gguf_writer *w, const char *key, const gguf_str *s, uint64_t n) {
    put_array(w, key, GGUF_STRING, n);
    for (uint64_t i = 0; i < n; i++)
        put_str(&w->kv, s[i].data, s[i].len);
}

void gguf_put_i32_array(gguf_writer *w, const char *key, const int32_t *v, uint64_t n) {
    put_array(w, key, GGUF_I32, n);
    buf_add(&w->kv, v, n * sizeof *v);
}

void gguf_put_kv(gguf_writer *w, const gguf_kv *kv) {
    static const char alignment[] = "general.alignment";
    if (kv->key.len == sizeof alignment - 1 && memcmp(kv->key.data, alignment, kv->key.len) == 0)
        return;
    put_key(w, kv->key.data, kv->key.len, kv->type);
    if (kv->type == GGUF_ARRAY) {
        put_u32(&w->kv, kv->elem);
        put_u64(&w->kv, kv->n);
    }
    buf_add(&w->kv, kv->data, gguf_kv_bytes(kv));
}

void gguf_put_tensor(gguf_writer *w, const char *name, q_type type, uint32_t n_dims, const uint64_t *ne) {
    const q_traits *q = q_find(type);
    uint64_t bytes = 0, padded;
    late(w, "a tensor");
    bool fits = q && n_dims >= 1 && n_dims <= GGUF_MAX_DIMS && ne[0] % q->block_len == 0 &&
                ck_mul(ne[0] / q->block_len, q->block_bytes, &bytes);
    for (uint32_t i = 1; fits && i < n_dims; i++)
        fits = ck_mul(bytes, ne[i], &bytes);
    fits = fits && ck_align(bytes, w->alignment, &padded);
    if (!fits) {
        if (!w->err.code)
            orcd_fail(&w->err, ORCD_ERR_ARG,
                      "tensor %.64s cannot be written: its type, shape or alignment is not allowed", name);
        return;
    }
    put_str(&w->infos, name, strlen(name));
    put_u32(&w->infos, n_dims);
    for (uint32_t i = 0; i < n_dims; i++)
        put_u64(&w->infos, ne[i]);
    put_u32(&w->infos, type);
    put_u64(&w->infos, w->data_bytes);
    put_u64(&w->sizes, bytes);
    w->n_tensors++;
    if (!ck_add(w->data_bytes, padded, &w->data_bytes) && !w->err.code)
        orcd_fail(&w->err, ORCD_ERR_ARG, "the tensors of %s together do not fit 64 bits", w->path);
}

/* ---- data ---- */

static uint64_t tensor_bytes(const gguf_writer *w, uint64_t i) {
    uint64_t bytes;
    memcpy(&bytes, w->sizes.data + i * sizeof bytes, sizeof bytes);
    return bytes;
}

static orcd_status pad(gguf_writer *w, uint64_t pos) {
    static const uint8_t zero[4096];
    uint64_t n = -pos & (w->alignment - 1);
    if (fwrite(zero, 1, n, w->file) != n)
        return fail_io(w, "write to");
    return ORCD_OK;
}

/* "NNNNNNNNNN" of tensors that are safe, then the origin: the number alone is written over, in one write. */
enum { JOURNAL_DIGITS = 10, CHECKPOINT = 64 << 20 /* bytes */ };

static orcd_status write_journal(gguf_writer *w) {
    char number[JOURNAL_DIGITS + 1];
    w->unsafe = 0;
    snprintf(number, sizeof number, "%0*u", JOURNAL_DIGITS, (unsigned)w->current);
    if (fflush(w->file) != 0 || fdatasync(fileno(w->file)) != 0 ||
        pwrite(w->journal, number, JOURNAL_DIGITS, 0) != JOURNAL_DIGITS)
        return fail_io(w, "write to");
    return ORCD_OK;
}

/* The tensors of an earlier writer that are safe: it had this origin, this header and this size. */
static uint64_t tensors_left(gguf_writer *w, const char *origin, const buf *head, uint64_t end) {
    char *text = NULL, *begun = malloc(head->len);
    size_t len;
    struct stat st;
    uint64_t n = 0;
    if (begun && file_slurp(w->journal_path, (size_t)1 << 24, &text, &len, NULL) == ORCD_OK && len > JOURNAL_DIGITS &&
        strcmp(text + JOURNAL_DIGITS, origin) == 0 && fstat(fileno(w->file), &st) == 0 && (uint64_t)st.st_size == end &&
        pread(fileno(w->file), begun, head->len, 0) == (ssize_t)head->len &&
        memcmp(begun, head->data, head->len) == 0) {
        text[JOURNAL_DIGITS] = '\0';
        n = strtoull(text, NULL, 10);
    }
    free(begun);
    free(text);
    return n <= w->n_tensors ? n : 0;
}

static orcd_status start_journal(gguf_writer *w, const char *origin) {
    size_t n = strlen(origin);
    w->journal = open(w->journal_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (w->journal < 0 || pwrite(w->journal, origin, n, JOURNAL_DIGITS) != (ssize_t)n)
        return fail_io(w, "keep a journal of");
    return write_journal(w);
}

static orcd_status go_on(gguf_writer *w, uint64_t n, uint64_t at) {
    for (w->current = 0; w->current < n; w->current++)
        at += tensor_bytes(w, w->current) + (-tensor_bytes(w, w->current) & (w->alignment - 1));
    w->journal = open(w->journal_path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    return w->journal >= 0 && fseeko(w->file, (off_t)at, SEEK_SET) == 0 ? ORCD_OK : fail_io(w, "go on with");
}

static orcd_status begin_file(gguf_writer *w, const buf *head, uint64_t end) {
    gguf *check = NULL;
    orcd_error why = {0};
    if (ftruncate(fileno(w->file), 0) != 0 || fwrite(head->data, 1, head->len, w->file) != head->len ||
        fflush(w->file) != 0 || ftruncate(fileno(w->file), (off_t)end) != 0)
        return fail_io(w, "write to");
    orcd_status s = gguf_open(w->part, &check, &why);
    gguf_close(check);
    if (s != ORCD_OK)
        w->err = why;
    return s == ORCD_OK ? pad(w, head->len) : s;
}

static orcd_status write_header(gguf_writer *w, const char *origin) {
    buf head = {0};
    uint64_t size, end, left;
    orcd_status s;
    w->header_done = true;
    buf_str(&head, "GGUF");
    put_u32(&head, 3);
    put_u64(&head, w->n_tensors);
    put_u64(&head, w->n_kv);
    buf_add(&head, w->kv.data, w->kv.len);
    buf_add(&head, w->infos.data, w->infos.len);
    if (head.failed || w->kv.failed || w->infos.failed || w->sizes.failed) {
        s = orcd_fail(&w->err, ORCD_ERR_NOMEM, "no memory for the header of %s", w->path);
        goto done;
    }
    if (w->alignment == 0 || w->alignment > 4096 || !ck_align(head.len, w->alignment, &size) ||
        !ck_add(size, w->data_bytes, &end) || end > INT64_MAX) {
        s = orcd_fail(&w->err, ORCD_ERR_ARG, "%s cannot be written: the alignment %llu or the size is not allowed",
                      w->path, (unsigned long long)w->alignment);
        goto done;
    }
    left = origin ? tensors_left(w, origin, &head, end) : 0;
    if (left) {
        s = go_on(w, left, size);
        goto done;
    }
    (void)unlink(w->journal_path); /* first: it must not vouch for what begins now */
    s = begin_file(w, &head, end);
    if (s == ORCD_OK && origin)
        s = start_journal(w, origin);
done:
    buf_free(&head);
    return s;
}

orcd_status gguf_begin(gguf_writer *w, const char *origin, uint64_t *n_done, orcd_error *err) {
    *n_done = 0;
    if (!w->err.code && !w->header_done && write_header(w, origin) == ORCD_OK)
        *n_done = w->current;
    if (w->err.code && err)
        *err = w->err;
    return w->err.code;
}

orcd_status gguf_write(gguf_writer *w, const void *bytes, size_t n, orcd_error *err) {
    const uint8_t *from = bytes;
    if (!w->err.code && !w->header_done)
        (void)write_header(w, NULL);
    while (!w->err.code && n > 0) {
        if (w->current == w->n_tensors) {
            orcd_fail(&w->err, ORCD_ERR_ARG, "more data than the tensors of %s declare", w->path);
            break;
        }
        uint64_t total = tensor_bytes(w, w->current), room = total - w->written;
        size_t now = n < room ? n : (size_t)room;
        if (fwrite(from, 1, now, w->file) != now) {
            fail_io(w, "write to");
            break;
        }
        from += now;
        n -= now;
        w->written += now;
        if (w->written == total) {
            (void)pad(w, total);
            w->current++;
            w->written = 0;
            w->unsafe += total;
            if (w->journal >= 0 && w->unsafe >= CHECKPOINT)
                (void)write_journal(w);
        }
    }
    if (w->err.code && err)
        *err = w->err;
    return w->err.code;
}

orcd_status gguf_finish(gguf_writer *w, orcd_error *err) {
    if (gguf_write(w, NULL, 0, NULL) == ORCD_OK) {
        if (w->current < w->n_tensors)
            orcd_fail(&w->err, ORCD_ERR_ARG, "only %llu of the %llu tensors of %s are complete",
                      (unsigned long long)w->current, (unsigned long long)w->n_tensors, w->path);
        else if (fflush(w->file) != 0 || fsync(fileno(w->file)) != 0)
            fail_io(w, "write to");
        else if (rename(w->part, w->path) != 0)
            fail_io(w, "rename");
    }
    orcd_status s = w->err.code;
    if (s != ORCD_OK) {
        remove_part(w);
        if (err)
            *err = w->err;
    } else {
        (void)unlink(w->journal_path);
    }
    writer_free(w);
    return s;
}

void gguf_abandon(gguf_writer *w) {
    if (!w)
        return;
    remove_part(w);
    writer_free(w);
}
