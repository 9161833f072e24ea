/* format/safetensors.h: safetensors files, single or sharded by an index. May include base.
 * Source: the safetensors format description and its reference limits (header <= 100,000,000 bytes,
 * offsets contiguous and covering the buffer, no duplicate keys). */
#ifndef ORCD_FORMAT_SAFETENSORS_H
#define ORCD_FORMAT_SAFETENSORS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/file.h"
#include "base/status.h"

typedef enum st_type {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_U16,
    ST_I16,
    ST_U32,
    ST_I32,
    ST_U64,
    ST_I64,
    ST_F16,
    ST_BF16,
    ST_F32,
    ST_F64,
    ST_F8_E4M3,
    ST_F8_E5M2
} st_type;

#define ST_MAX_DIMS 8

typedef struct st_tensor {
    const char *name; /* owned by the model */
    st_type type;
    uint32_t n_dims;
    uint64_t shape[ST_MAX_DIMS]; /* slowest first, as in the file */
    const uint8_t *data;
    uint64_t bytes;
} st_tensor;

typedef struct st_model st_model;

/* PATH is a .safetensors file, or a folder holding model.safetensors or model.safetensors.index.json. */
orcd_status st_open(const char *path, st_model **out, orcd_error *err) ORCD_MUST_USE;
/* One file's bytes, kept alive by the caller: for tests and fuzzing. */
orcd_status st_parse(const uint8_t *data, size_t size, st_model **out, orcd_error *err) ORCD_MUST_USE;
void st_close(st_model *m);

uint64_t st_bytes(const st_model *m); /* size of all files */
bool st_changed(const st_model *m);   /* a mapped file became shorter */
uint64_t st_n_tensors(const st_model *m);
const st_tensor *st_tensor_at(const st_model *m, uint64_t i);
const st_tensor *st_find(const st_model *m, const char *name); /* NULL when absent */
const char *st_type_name(st_type t);

#endif
