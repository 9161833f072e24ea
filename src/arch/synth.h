/* arch/synth.h: models with random weights, of the shape of real ones: for benchmarks and tests. May include what arch
 * may. */
#ifndef ORCD_ARCH_SYNTH_H
#define ORCD_ARCH_SYNTH_H

#include "arch/export.h"

/* "gpt-oss-20b, gpt-oss-120b, ...", for messages. */
const char *arch_presets(void);
/* The configuration of a preset, with as many layers as the real one. False when the name is none. */
bool arch_preset(const char *name, const arch **a, arch_config *c);

/* Write every weight of such a model, after the keys that arch_synth_keys writes: every number is a function of the
 * seed, its tensor and its place, and activations and logits stay of the order of one. Types that are not given are
 * those that were published: BF16 and MXFP4 for gpt-oss, F32 for GPT-2. */
orcd_status arch_synth_keys(const arch *a, const arch_config *c, const char *name, gguf_writer *w,
                            orcd_error *err) ORCD_MUST_USE;
orcd_status arch_synth(const arch *a, const arch_config *c, const arch_types *types, uint64_t seed, int n_threads,
                       arch_progress progress, void *progress_ctx, gguf_writer *w, arch_exported *out,
                       orcd_error *err) ORCD_MUST_USE;

#endif
