/* format/gguf.h: GGUF v2 and v3, little-endian. May include base and quant.
 * Source: the GGUF specification (ggml, docs/gguf.md). The reader trusts nothing: counts are checked
 * against the bytes that remain before anything is allocated, every extent against the file. */
#ifndef ORCD_FORMAT_GGUF_H
#define ORCD_FORMAT_GGUF_H

#include <stdbool.h>
#include <stdint.h>

#include "base/file.h"
#include "base/status.h"
#include "quant/quant.h"

typedef enum gguf_type {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_N_TYPES
} gguf_type;

typedef struct gguf_str { /* bytes inside the map, not NUL-terminated */
    const char *data;
    size_t len;
} gguf_str;

typedef struct gguf_kv {
    gguf_str key;
    gguf_type type;      /* GGUF_ARRAY: see elem and n */
    gguf_type elem;      /* element type of an array */
    uint64_t n;          /* elements of an array, else 1 */
    const uint8_t *data; /* first value's bytes in the map, unaligned */
    uint64_t pos;        /* byte position of the value in the file */
} gguf_kv;

#define GGUF_MAX_DIMS 4

typedef struct gguf_tensor {
    gguf_str name;
    uint32_t n_dims;
    uint64_t ne[GGUF_MAX_DIMS]; /* fastest dimension first; unused ones are 1 */
    q_type type;
    const uint8_t *data; /* in the map, inside the file, disjoint from every other tensor */
    uint64_t bytes;
    uint64_t pos; /* byte position of this tensor's info record */
    bool paired;  /* type number 4, early ollama: MXFP4 blocks whose byte b holds values 2b (low) and 2b + 1 (high) */
} gguf_tensor;

typedef struct gguf gguf;

/* Map and check a whole file. `err` carries the byte position. Thread-safe afterwards (read-only). A part of a model
 * that is split (NAME-00002-of-00003.gguf, keys split.no and split.count) stands for all: the first part's keys, and
 * the tensors of every part in their order. */
orcd_status gguf_open(const char *path, gguf **out, orcd_error *err) ORCD_MUST_USE;
/* The same over bytes that the caller keeps alive: for tests and fuzzing. */
orcd_status gguf_parse(const uint8_t *data, size_t size, gguf **out, orcd_error *err) ORCD_MUST_USE;
void gguf_close(gguf *g);

uint64_t gguf_bytes(const gguf *g); /* size of the file, or of all parts */
bool gguf_changed(const gguf *g);   /* a mapped file became shorter */
uint32_t gguf_version(const gguf *g);
uint64_t gguf_alignment(const gguf *g);
uint64_t gguf_n_kv(const gguf *g);
const gguf_kv *gguf_kv_at(const gguf *g, uint64_t i);
uint64_t gguf_n_tensors(const gguf *g);
const gguf_tensor *gguf_tensor_at(const gguf *g, uint64_t i);

/* NULL when absent. Hash look-ups. */
const gguf_kv *gguf_find(const gguf *g, const char *key);
const gguf_tensor *gguf_find_tensor(const gguf *g, const char *name);

/* Typed accessors: false when the key is absent OR has another type; *out is then unchanged. Integers of
 * any width convert when the value fits. */
bool gguf_u64(const gguf *g, const char *key, uint64_t *out);
bool gguf_i64(const gguf *g, const char *key, int64_t *out);
bool gguf_f64(const gguf *g, const char *key, double *out); /* F32, F64 and integers */
bool gguf_bool(const gguf *g, const char *key, bool *out);
bool gguf_string(const gguf *g, const char *key, gguf_str *out);
/* Arrays: the element type must match exactly, n is the element count. */
bool gguf_array(const gguf *g, const char *key, gguf_type elem, const gguf_kv **out);
/* Walk a string array: *cursor starts as kv->data and moves on; call at most kv->n times. */
gguf_str gguf_next_str(const uint8_t **cursor);
/* Bytes that the value, or all values of the array, take in the file. */
size_t gguf_kv_bytes(const gguf_kv *kv);

/* ---- writer: keys and tensor infos are declared first, then the data of each tensor in order ---- */
typedef struct gguf_writer gguf_writer;

/* Writes to PATH.part and renames on finish; an abandoned writer leaves nothing behind. Fails while another process
 * writes the same path. Always version 3. */
orcd_status gguf_create(const char *path, uint64_t alignment, gguf_writer **out, orcd_error *err) ORCD_MUST_USE;
void gguf_put_u32(gguf_writer *w, const char *key, uint32_t v);
void gguf_put_f32(gguf_writer *w, const char *key, float v);
void gguf_put_bool(gguf_writer *w, const char *key, bool v);
void gguf_put_str(gguf_writer *w, const char *key, const char *s, size_t len);
void gguf_put_kv(gguf_writer *w,
                 const gguf_kv *kv); /* a copy of another file's value; its general.alignment is ignored */
void gguf_put_str_array(gguf_writer *w, const char *key, const gguf_str *s, uint64_t n);
void gguf_put_i32_array(gguf_writer *w, const char *key, const int32_t *v, uint64_t n);
void gguf_put_tensor(gguf_writer *w, const char *name, q_type type, uint32_t n_dims, const uint64_t *ne);
/* Optional, after the last declaration: keep a journal beside the part file, and go on with what a killed writer left
 * there when its header and its `origin` (a text that names everything that the data depend on) were the same. The
 * first *n_done tensors are then written already, and the next gguf_write is of the one after them. */
orcd_status gguf_begin(gguf_writer *w, const char *origin, uint64_t *n_done, orcd_error *err) ORCD_MUST_USE;
/* Append bytes of the current tensor; moving to the next when it is full. The header is written by the
 * first call. Any earlier failure is reported here. */
orcd_status gguf_write(gguf_writer *w, const void *bytes, size_t n, orcd_error *err) ORCD_MUST_USE;
/* Fails when a tensor is incomplete. Frees the writer either way. */
orcd_status gguf_finish(gguf_writer *w, orcd_error *err) ORCD_MUST_USE;
void gguf_abandon(gguf_writer *w); /* accepts NULL */

#endif
