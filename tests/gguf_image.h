/* tests/gguf_image.h: GGUF images built byte by byte, independent of the writer, with the position of every integer. */
#ifndef ORCD_TESTS_GGUF_IMAGE_H
#define ORCD_TESTS_GGUF_IMAGE_H

#include <stdint.h>
#include <string.h>

#include "base/buf.h"
#include "format/gguf.h"

typedef struct field {
    const char *name;
    size_t pos;
    int bytes;
} field;

typedef struct image {
    buf b;
    uint32_t n_kv;
    uint64_t n_tensors;
    field field[256];
    int n_fields;
} image;

static inline void img_int(image *m, const char *name, uint64_t v, int bytes) {
    if (m->n_fields < (int)(sizeof m->field / sizeof *m->field))
        m->field[m->n_fields++] = (field){name, m->b.len, bytes};
    buf_add(&m->b, &v, (size_t)bytes);
}

static inline void img_patch(image *m, size_t pos, uint64_t v, int bytes) {
    memcpy(m->b.data + pos, &v, (size_t)bytes);
}

static inline void img_begin(image *m, uint32_t version) {
    *m = (image){0};
    buf_str(&m->b, "GGUF");
    img_int(m, "version", version, 4);
    img_int(m, "n_tensors", 0, 8);
    img_int(m, "n_kv", 0, 8);
}

static inline void img_str(image *m, const char *what, const char *s, size_t len) {
    img_int(m, what, len, 8);
    buf_add(&m->b, s, len);
}

static inline void img_key(image *m, const char *key, uint32_t type) {
    img_str(m, "key length", key, strlen(key));
    img_int(m, "value type", type, 4);
    img_patch(m, 16, ++m->n_kv, 8);
}

static inline void img_kv_int(image *m, const char *key, gguf_type type, uint64_t v, int bytes) {
    img_key(m, key, type);
    img_int(m, key, v, bytes);
}

static inline void img_kv_str(image *m, const char *key, const char *s) {
    img_key(m, key, GGUF_STRING);
    img_str(m, "string length", s, strlen(s));
}

/* The elements are appended by the caller. */
static inline void img_kv_array(image *m, const char *key, gguf_type elem, uint64_t n) {
    img_key(m, key, GGUF_ARRAY);
    img_int(m, "element type", elem, 4);
    img_int(m, "array length", n, 8);
}

static inline void img_tensor(image *m, const char *name, uint32_t type, uint32_t n_dims, const uint64_t *ne,
                              uint64_t offset) {
    img_str(m, "name length", name, strlen(name));
    img_int(m, "n_dims", n_dims, 4);
    for (uint32_t i = 0; i < n_dims; i++)
        img_int(m, "ne", ne[i], 8);
    img_int(m, "tensor type", type, 4);
    img_int(m, "offset", offset, 8);
    img_patch(m, 8, ++m->n_tensors, 8);
}

/* Pad to the alignment, then n bytes that count 0, 1, 2, ... */
static inline void img_data(image *m, size_t alignment, size_t n) {
    while (m->b.len % alignment)
        buf_char(&m->b, 0);
    for (size_t i = 0; i < n; i++)
        buf_char(&m->b, (char)i);
}

#endif
