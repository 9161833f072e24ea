/* arch/export.h: a model written as GGUF, in other weight types or as it is. May include what arch may. */
#ifndef ORCD_ARCH_EXPORT_H
#define ORCD_ARCH_EXPORT_H

#include "arch/arch.h"
#include "format/gguf.h"

/* Names of types ("Q8_0", "MXFP4") or mixes ("Q4_K_M", "Q5_K_M"); NULL leaves each tensor as it is stored. Norms,
 * biases, sinks, the router and positions become F32 in any case. A row that does not divide into blocks of 256 takes
 * Q5_0, Q5_1 or Q8_0 for Q4_K, Q5_K or Q6_K, one that does not divide into blocks of 32 takes F16. */
typedef struct arch_types {
    const char *dense, *experts;
} arch_types;

bool arch_types_known(const char *name);
const char *arch_types_list(void); /* "F32, F16, ..." for messages */

/* The type that a tensor gets; `stored` where none is asked for. tied: the file has no output.weight. */
q_type arch_type_of(const arch_types *types, const arch_tensor *t, int n_layer, bool tied, q_type stored);
/* general.file_type as llama.cpp numbers it, by the types of the token embedding and of the experts (F32: none). */
void arch_put_file_type(const arch_types *types, q_type embd, q_type experts, gguf_writer *w);

/* general.* and the configuration: copied from a GGUF file (without its tokenizer when `tokenizer` is false), or made
 * from config.json as llama.cpp's converter makes them. */
orcd_status arch_put_keys(const arch *a, const mf_file *f, const arch_config *c, bool tokenizer, gguf_writer *w,
                          orcd_error *err) ORCD_MUST_USE;

typedef struct arch_exported {
    uint64_t n_tensor, n_same; /* n_same: copied bit by bit */
    uint64_t n_before;         /* written by an earlier run that was killed */
    uint64_t bytes_in, bytes_out;
} arch_exported;

/* Declare and write every weight; memory stays below about 64 MB whatever the model's size. origin: as for gguf_begin,
 * NULL begins anew in any case. */
orcd_status arch_export(const arch *a, const mf_file *f, const arch_config *c, const arch_types *types,
                        const char *origin, int n_threads, arch_progress progress, void *progress_ctx, gguf_writer *w,
                        arch_exported *out, orcd_error *err) ORCD_MUST_USE;

#endif
