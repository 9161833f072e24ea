/* hub/hub.h: models from the Hugging Face hub and the cache that they lie in. May include base.
 *
 *   CACHE/OWNER/REPO/FILE                 whole, hash-checked files: nothing else ever has such a name
 *   CACHE/OWNER/REPO/.orcd/SHA256SUMS     what was checked: a file that it does not list is not there
 *   CACHE/OWNER/REPO/.orcd/OID.part       bytes under way, and in OID.map which pieces of them are written
 *   CACHE/OWNER/REPO/.orcd/pending        a folder model is not complete yet
 *   CACHE/OWNER/REPO/.orcd/lock           held by the one process that changes the folder
 *
 * Names from the user and from the hub are checked before they touch a path; no name of the hub begins with a dot. */
#ifndef ORCD_HUB_HUB_H
#define ORCD_HUB_HUB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define HUB_URL "https://huggingface.co"

enum { HUB_NAME = 256, HUB_FILE = 512, HUB_PATH = 4096 }; /* with the NUL */

/* ---- names ---- */

/* OWNER/REPO as the hub allows it; FILE: relative, at most 8 folders deep, no part begins with a dot, no control
 * characters, backslashes or colons. */
bool hub_is_repo(const char *name);
bool hub_is_file(const char *name);
/* "gpt-oss-20b" to "openai/gpt-oss-20b"; NULL when the name is no alias. */
const char *hub_alias(const char *name);

/* ---- fetching ---- */

typedef struct hub_params {
    const char *url;   /* http:// or https://, without a slash at the end; HUB_URL */
    const char *cache; /* made when missing */
    const char *token; /* NULL: none. Sent to `url` alone, never after a redirect to another host */
    int n_conn;        /* ranges in flight together */
    int retries;       /* requests that may fail in a row without a byte of progress */
    int stall_s;       /* seconds of silence after which a request has failed */
    void (*progress)(void *ctx, uint64_t done, uint64_t total); /* bytes written; may be NULL */
    void (*note)(void *ctx, const char *sentence);              /* may be NULL */
    bool (*stopped)(void *ctx);                                 /* may be NULL */
    void *ctx;
} hub_params;

typedef struct hub_pulled {
    char name[HUB_NAME + HUB_FILE]; /* under which hub_find finds it */
    char path[HUB_PATH];            /* the model: a file or a folder */
    int n_file, n_fetched;          /* n_fetched: were not there yet */
    uint64_t bytes, bytes_fetched;  /* of all files; over the network now */
} hub_pulled;

/* NAME is an alias, OWNER/REPO or OWNER/REPO:FILE, FILE being a file of the repository or a part of the name of just
 * one of its .gguf files. OWNER/REPO alone is a safetensors folder, or the only .gguf file. Waits while another
 * process pulls into the same folder. After any failure, ORCD_ERR_CANCELLED included, the same call continues. */
orcd_status hub_pull(const hub_params *p, const char *name, hub_pulled *out, orcd_error *err) ORCD_MUST_USE;

/* ---- the cache ---- */

typedef struct hub_model {
    char name[HUB_NAME + HUB_FILE]; /* OWNER/REPO or OWNER/REPO:FILE.gguf */
    char path[HUB_PATH];
    uint64_t bytes; /* on disk */
    bool complete;
} hub_model;

typedef struct hub_models {
    hub_model *model; /* [n], by name */
    size_t n;
} hub_models;

/* A cache that does not exist holds nothing. */
orcd_status hub_list(const char *cache, hub_models *out, orcd_error *err) ORCD_MUST_USE;
void hub_models_free(hub_models *m);
/* By full name, alias, or what follows the owner when that is the name of just one. NULL when there is none. */
const hub_model *hub_find(const hub_models *m, const char *name);
/* Refuses while the model is being pulled. */
orcd_status hub_remove(const char *cache, const hub_model *m, orcd_error *err) ORCD_MUST_USE;

#endif
