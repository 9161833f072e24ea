/* cli/engine_options.h: the options of every command that runs a model. */
#ifndef ORCD_CLI_ENGINE_OPTIONS_H
#define ORCD_CLI_ENGINE_OPTIONS_H

#include "cli/cli.h"
#include "engine/engine.h"

/* All weights but experts, router and norms, when they are stored in more bits. */
#define DENSE_TYPES "q4_k|q5_k|q6_k|q8_0", "requantise attention and head when loading (cpu; default: as stored)"

#define KV_TYPES "f16|f32|q8|f8", "precision of the KV cache (cuda: q8 too; f8 is its older name)"

typedef struct engine_options {
    const char *device, *tokenizer, *kv_type, *dense_type;
    int64_t threads, ctx, chunk, batch, cpu_experts, act_bits;
    bool no_repack;
    const char *cache_dir;
    int64_t cache_disk_mb;
    void (*note)(void *ctx, const char *sentence); /* of the engine; NULL = a line on standard error */
    void *note_ctx;
} engine_options;

#define ENGINE_DEFAULTS                                                                                                \
    { .device = "auto", .kv_type = "f16", .cache_disk_mb = 4096 }

#define ENGINE_OPTIONS(owner, member)                                                                                  \
    {"device", 0, CLI_STR, offsetof(owner, member.device), 0, 0, "auto|cpu|cuda[:N]|ref", "what computes"},            \
        {"threads", 't', CLI_INT, offsetof(owner, member.threads), 0, 1024, "N", "CPU threads (default: all cores)"},  \
        {"ctx", 'c',     CLI_INT, offsetof(owner, member.ctx),                                                         \
         0,     1 << 20, "N",     "context length (default: the largest that fits)"},                                  \
        {"chunk", 0, CLI_INT, offsetof(owner, member.chunk), 0, 8192, "N", "prompt tokens per step"},                  \
        {"kv-type", 0, CLI_CHOICE, offsetof(owner, member.kv_type), 0, 0, KV_TYPES},                                   \
        {"dense-type", 0, CLI_CHOICE, offsetof(owner, member.dense_type), 0, 0, DENSE_TYPES},                          \
        {"cpu-experts",                                                                                                \
         0,                                                                                                            \
         CLI_INT,                                                                                                      \
         offsetof(owner, member.cpu_experts),                                                                          \
         0,                                                                                                            \
         1024,                                                                                                         \
         "N|auto",                                                                                                     \
         "experts of the last N layers in host memory (cuda; default 0)"},                                             \
        {"act-bits", 0,  CLI_INT, offsetof(owner, member.act_bits),                                                    \
         8,          16, "8|16",  "8: nearly twice the prompt speed, less exact (cpu; default 16)"},                   \
        {"no-repack", 0, CLI_FLAG, offsetof(owner, member.no_repack),                                                  \
         0,           0, "",       "start at once from the mapped file, with slower steps (cpu)"},                     \
        {"cache-dir", 0, CLI_STR, offsetof(owner, member.cache_dir),                                                   \
         0,           0, "DIR",   "keep prompts' KV memory there, across restarts (default: nowhere)"},                \
        {"cache-disk-mb",                                                                                              \
         0,                                                                                                            \
         CLI_INT,                                                                                                      \
         offsetof(owner, member.cache_disk_mb),                                                                        \
         1,                                                                                                            \
         1 << 30,                                                                                                      \
         "N",                                                                                                          \
         "MiB there at most; the longest unused goes first (default 4096)"},                                           \
    {                                                                                                                  \
        "tokenizer", 0, CLI_STR, offsetof(owner, member.tokenizer), 0, 0, "FILE",                                      \
            "tokenizer.json, when it is not beside the model"                                                          \
    }

typedef struct sampling_options {
    double temp, top_p, min_p, repeat, presence, frequency;
    int64_t top_k;
    cli_u64 seed;
} sampling_options;

#define SAMPLING_DEFAULTS                                                                                              \
    { .temp = 1, .top_p = 1, .repeat = 1 }

#define SAMPLING_OPTIONS(owner, member)                                                                                 \
    {                                                                                                                   \
        "temp", 0, CLI_NUM, offsetof(owner, member.temp),                                                               \
        0,      2, "X",     "temperature (default 1; 0 = always the likeliest)"},                                       \
        {"top-k", 0, CLI_INT, offsetof(owner, member.top_k), 0, 1 << 20, "N", "keep the N likeliest (default 0: all)"}, \
        {"top-p", 0, CLI_NUM, offsetof(owner, member.top_p), 0, 1, "X", "keep this share of probability (default 1)"},  \
        {"min-p", 0, CLI_NUM, offsetof(owner, member.min_p), 0, 1, "X", "keep at least X of the best's (default 0)"},   \
        {"repeat-penalty", 0, CLI_NUM, offsetof(owner, member.repeat), 0.01, 2, "X", "against repetition (default 1)"}, \
        {"presence-penalty", 0, CLI_NUM, offsetof(owner, member.presence), -2, 2, "X", "off at 0"},                     \
        {"frequency-penalty", 0, CLI_NUM, offsetof(owner, member.frequency), -2, 2, "X", "off at 0"}, {                 \
        "seed", 's', CLI_U64, offsetof(owner, member.seed), 0, 0, "N", "same seed, same text (default: drawn)"          \
    }

be_kv_type kv_type_of(const char *name); /* one of KV_TYPES */
q_type dense_type_of(const char *name);  /* one of DENSE_TYPES, or NULL */
samp_params sampling_of(const sampling_options *o);
eng_params engine_params(const engine_options *o, const char *path);

/* Open with a load bar on the terminal. model NULL = the bundled one. */
orcd_status open_engine(const engine_options *o, const char *model, bool need_tokenizer, eng **out,
                        orcd_error *err) ORCD_MUST_USE;

/* What the model takes of the device, in one line. Returns text. */
const char *memory_line(const eng_info *i, char *text, size_t cap);

#endif
