/* engine/teacher.h: a model under teacher forcing: logits of a given token sequence, without scheduler or sampler.
 * For `orcd logits`, the golden tests, validation and perplexity. May include arch and below. */
#ifndef ORCD_ENGINE_TEACHER_H
#define ORCD_ENGINE_TEACHER_H

#include "arch/arch.h"
#include "base/status.h"

typedef struct teacher teacher;

typedef struct teacher_params {
    const char *model;
    const char *backend; /* "ref", "cpu", "cuda", "cuda:1", "auto" */
    be_params device;
    int n_host_layers; /* cuda: layers, from the last, whose experts stay in host memory */
    be_kv_type kv_type;
    int n_ctx; /* longest sequence */
    int chunk; /* rows per step; 0 = 128 */
    arch_progress progress;
    void *progress_ctx;
} teacher_params;

orcd_status teacher_open(const teacher_params *p, teacher **out, orcd_error *err) ORCD_MUST_USE;
void teacher_close(teacher *t);
const arch_config *teacher_config(const teacher *t);
arch_model *teacher_model(teacher *t);
void teacher_describe(const teacher *t, char *text, size_t cap); /* the device: "cpu: 2 threads, AVX-512 VNNI" */

/* Row `pos` of the sequence: logits [n_vocab], valid during the call. A false answer ends the run. */
typedef bool (*teacher_fn)(void *ctx, int64_t pos, const float *logits);

/* Run ids[0..n) from an empty context; fn sees rows from `first` on, in order. ORCD_ERR_ARG names an id outside the
 * vocabulary, ORCD_ERR_LIMIT a sequence longer than n_ctx. */
orcd_status teacher_run(teacher *t, const int32_t *ids, int64_t n, int64_t first, teacher_fn fn, void *ctx,
                        orcd_error *err) ORCD_MUST_USE;

/* The same with the caller at the wheel, so that two models can go side by side: start, then next until *logits is
 * NULL. ids must live until then; a row is valid until the next call. Steps are computed as rows are asked for. */
orcd_status teacher_start(teacher *t, const int32_t *ids, int64_t n, int64_t first, orcd_error *err) ORCD_MUST_USE;
orcd_status teacher_next(teacher *t, int64_t *pos, const float **logits, orcd_error *err) ORCD_MUST_USE;

#endif
