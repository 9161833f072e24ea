#include "cli/engine_options.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

be_kv_type kv_type_of(const char *name) {
    return strcmp(name, "f32") == 0 ? BE_KV_F32 : strcmp(name, "f16") == 0 ? BE_KV_F16 : BE_KV_Q8;
}

q_type dense_type_of(const char *name) { return name ? q_find_name(name)->type : Q_F32; }

samp_params sampling_of(const sampling_options *o) {
    return (samp_params){.temperature = (float)o->temp,
                         .top_p = (float)o->top_p,
                         .min_p = (float)o->min_p,
                         .top_k = (int32_t)o->top_k,
                         .repetition_penalty = (float)o->repeat,
                         .presence_penalty = (float)o->presence,
                         .frequency_penalty = (float)o->frequency,
                         .seed = o->seed.value};
}

static void print_note(void *ctx, const char *sentence) {
    (void)ctx;
    fprintf(stderr, "%sorcd: %s\n", isatty(STDERR_FILENO) ? "\r\033[K" : "", sentence); /* over the load bar */
}

eng_params engine_params(const engine_options *o, const char *path) {
    return (eng_params){.model = path,
                        .tokenizer = o->tokenizer,
                        .device = o->device,
                        .backend = {.n_threads = (int)o->threads,
                                    .no_repack = o->no_repack,
                                    .act_bits = (int)o->act_bits,
                                    .dense_type = dense_type_of(o->dense_type),
                                    .cpu_experts = (int)o->cpu_experts},
                        .n_ctx = (int)o->ctx,
                        .max_batch = (int)o->batch,
                        .chunk = (int)o->chunk,
                        .cache_dir = o->cache_dir,
                        .cache_disk_bytes = (uint64_t)o->cache_disk_mb << 20,
                        .note = o->note ? o->note : print_note,
                        .note_ctx = o->note_ctx,
                        .kv_type = kv_type_of(o->kv_type)};
}

orcd_status open_engine(const engine_options *o, const char *model, bool need_tokenizer, eng **out, orcd_error *err) {
    char path[4096];
    bar b;
    ORCD_TRY(cli_model_path(model, path, sizeof path, err));
    eng_params p = engine_params(o, path);
    p.need_tokenizer = need_tokenizer;
    p.progress = bar_update;
    p.progress_ctx = &b;
    bar_begin(&b, "loading", "B");
    orcd_status st = eng_open(&p, out, err);
    bar_end(&b);
    return st;
}

const char *memory_line(const eng_info *i, char *text, size_t cap) {
    char w[32], k[32], a[32], h[48], f[32], t[32];
    snprintf(h, sizeof h, i->host_bytes ? " (+ experts in host memory %s)" : "", human_bytes(i->host_bytes, w));
    snprintf(text, cap, "weights %s%s + KV %s + activations %s; %s of %s stay free", human_bytes(i->weight_bytes, w), h,
             human_bytes(i->kv_bytes, k), human_bytes(i->act_bytes, a), human_bytes(i->free_bytes, f),
             human_bytes(i->total_bytes, t));
    return text;
}
