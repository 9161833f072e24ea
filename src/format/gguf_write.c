/* format/gguf_write.c: the writer. The reader judges the header: it is checked by gguf_open on the part file, grown to
 * its final size, before a byte of tensor data is written. */
#include "format/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/buf.h"
#include "base/checked.h"

struct gguf_writer {
    char *path, *part;
    FILE *file;
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
    buf_free(&w->kv);
    buf_free(&w->infos);
    buf_free(&w->sizes);
    free(w->path);
    free(w->part);
    free(w);
}

orcd_status gguf_create(const char *path, uint64_t alignment, gguf_writer **out, orcd_error *err) {
    *out = NULL;
    gguf_writer *w = calloc(1, sizeof *w);
    size_t len = strlen(path);
    if (!w || !(w->path = strdup(path)) || !(w->part = malloc(len + sizeof ".part"))) {
        if (w)
            writer_free(w);
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory to write %s", path);
    }
    memcpy(w->part, path, len);
    memcpy(w->part + len, ".part", sizeof ".part");
    w->alignment = alignment;
    (void)unlink(w->part); /* of a writer that was killed */
    int fd = open(w->part, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 || !(w->file = fdopen(fd, "wb"))) {
        orcd_fail(err, ORCD_ERR_IO, "cannot create %s: %s", w->part, strerror(errno));
        if (fd >= 0) {
            close(fd);
            unlink(w->part);
        }
        writer_free(w);
        return ORCD_ERR_IO;
    }
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

static orcd_status write_header(gguf_writer *w) {
    buf head = {0};
    gguf *check = NULL;
    orcd_error why = {0};
    uint64_t size, end;
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
    if (fwrite(head.data, 1, head.len, w->file) != head.len || fflush(w->file) != 0 ||
        ftruncate(fileno(w->file), (off_t)end) != 0) {
        s = fail_io(w, "write to");
        goto done;
    }
    s = gguf_open(w->part, &check, &why);
    if (s != ORCD_OK)
        w->err = why;
    else
        s = pad(w, head.len);
done:
    gguf_close(check);
    buf_free(&head);
    return s;
}

orcd_status gguf_write(gguf_writer *w, const void *bytes, size_t n, orcd_error *err) {
    const uint8_t *from = bytes;
    if (!w->err.code && !w->header_done)
        (void)write_header(w);
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
        (void)unlink(w->part);
        if (err)
            *err = w->err;
    }
    writer_free(w);
    return s;
}

void gguf_abandon(gguf_writer *w) {
    if (!w)
        return;
    (void)unlink(w->part);
    writer_free(w);
}
