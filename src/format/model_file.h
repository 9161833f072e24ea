/* format/model_file.h: one model as found on disk, GGUF or Hugging Face folder, behind one face.
 * May include base and quant. The architectures (arch/) ask it for values and weights by name. */
#ifndef ORCD_FORMAT_MODEL_FILE_H
#define ORCD_FORMAT_MODEL_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "format/gguf.h"
#include "format/safetensors.h"
#include "quant/quant.h"

typedef struct mf_file mf_file;

typedef enum mf_kind { MF_GGUF, MF_HF } mf_kind;

/* PATH is a .gguf file, a Hugging Face folder (config.json beside the tensors), or a .safetensors file whose
 * folder holds config.json. Decided by content, not by the name's ending. */
orcd_status mf_open(const char *path, mf_file **out, orcd_error *err) ORCD_MUST_USE;
void mf_close(mf_file *f);

mf_kind mf_kind_of(const mf_file *f);
const char *mf_path(const mf_file *f);
uint64_t mf_bytes(const mf_file *f);     /* size on disk of the tensor files */
const gguf *mf_gguf(const mf_file *f);   /* NULL for MF_HF */
const st_model *mf_st(const mf_file *f); /* NULL for MF_GGUF */
bool mf_changed(const mf_file *f);       /* a mapped file became shorter */

/* general.architecture or config.json's model_type, as found ("gpt-oss", "gptoss", "gpt_oss", "gpt2"). */
const char *mf_arch_name(const mf_file *f);

/* Configuration values. For GGUF, `key` is looked up as "<general.architecture>.KEY"; for HF, as a path into
 * config.json ("rope_scaling.factor"; a value inside "rope_parameters" is found under "rope_scaling" too).
 * False when absent or of another type. */
bool mf_u64(const mf_file *f, const char *gguf_key, const char *hf_key, uint64_t *out);
bool mf_f64(const mf_file *f, const char *gguf_key, const char *hf_key, double *out);
bool mf_string(const mf_file *f, const char *gguf_key, const char *hf_key, char *out, size_t cap);
bool mf_bool(const mf_file *f, const char *gguf_key, const char *hf_key, bool *out);
/* The i-th element of an HF array of strings such as layer_types; false past its end or when absent. */
bool mf_hf_string_at(const mf_file *f, const char *hf_key, uint64_t i, char *out, size_t cap);

/* A weight as a model wants it: n_mat matrices of n_row rows of n_col values, every row in canonical blocks
 * of `type`. The view's fields are private to model_file.c. Plain data: copy freely, valid while the file is. */
typedef struct mf_tensor {
    char name[96];
    q_type type;
    uint64_t n_col, n_row, n_mat;
    const uint8_t *data; /* all rows, contiguous and canonical, in the map; NULL when rows must be made by mf_rows */
    uint64_t pos;        /* where the file describes it, for error messages */
    struct mf_view {
        const uint8_t *base, *scales; /* stored values; scales: E8M0 of MXFP4 that is not canonical, else NULL */
        uint64_t row_bytes, mat_bytes, scale_row_bytes, scale_mat_bytes;
        uint32_t block_step, scale_step; /* bytes from one MXFP4 block, or scale, to the next */
        uint64_t row_first, row_step;    /* row r of the view is stored row row_first + r * row_step */
        bool transposed;                 /* stored [n_col][n_row]: Conv1D and unquantised HF experts */
        uint64_t stored_rows;            /* stored row count when transposed */
    } view;
} mf_tensor;

/* Find a weight. Names ending in nothing special are looked up as they are; for HF MXFP4, "X" is also found as
 * the pair X_blocks, X_scales (or X.blocks, X.scales) and comes back as type Q_MXFP4. A vector is one row.
 * False when absent. Fails only when the stored form is unusable (dtype, shape). */
orcd_status mf_find(const mf_file *f, const char *name, mf_tensor *out, bool *found, orcd_error *err) ORCD_MUST_USE;

/* Views: rows first, first+step, ... (count of them), of every matrix; a tensor with rows and columns exchanged
 * (types with block_len 1 only). ORCD_ERR_FORMAT when the slice leaves the tensor. */
orcd_status mf_slice_rows(const mf_tensor *t, uint64_t first, uint64_t step, uint64_t count, mf_tensor *out,
                          orcd_error *err) ORCD_MUST_USE;
orcd_status mf_transpose(const mf_tensor *t, mf_tensor *out, orcd_error *err) ORCD_MUST_USE;

/* Bytes of one row in canonical form. */
size_t mf_row_bytes(const mf_tensor *t);
/* Write rows [row0, row0 + n) of matrix `mat` to dst in canonical form. In range by contract (asserted). */
void mf_rows(const mf_tensor *t, uint64_t mat, uint64_t row0, uint64_t n, void *dst);
/* These rows are read next, from their beginning: lets the system map them at once. */
void mf_expect(const mf_tensor *t, uint64_t mat, uint64_t row0, uint64_t n);
/* The rows were copied elsewhere and will not be read again soon: lets the system drop them from this process and,
 * where memory is short, from its cache. */
void mf_release(const mf_tensor *t);
/* All values of a small tensor (norms, biases) as float, n_mat * n_row * n_col of them. */
void mf_floats(const mf_tensor *t, float *dst);

#endif
