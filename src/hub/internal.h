/* hub/internal.h: what the files of hub/ share. Private to hub/. */
#ifndef ORCD_HUB_INTERNAL_H
#define ORCD_HUB_INTERNAL_H

#include <curl/curl.h>
#include <stdatomic.h>

#include "base/buf.h"
#include "base/sums.h"
#include "hub/hub.h"

/* ---- the hub's record (tree.c) ---- */

typedef struct hub_entry {
    char path[HUB_FILE]; /* passed hub_is_file */
    uint64_t size;
    char oid[65]; /* lower-case hex: 64 digits of an LFS file's SHA-256, or the 40 of git's SHA-1 of the blob */
} hub_entry;

typedef struct hub_tree {
    hub_entry *entry; /* [n] */
    size_t n;
} hub_tree;

orcd_status hub_tree_get(const hub_params *p, const char *repo, hub_tree *out, orcd_error *err) ORCD_MUST_USE;
/* Append one answer of /api/models/REPO/tree. Entries whose names are not allowed are left out. */
orcd_status hub_tree_add(hub_tree *t, const char *json, size_t len, orcd_error *err) ORCD_MUST_USE;
void hub_tree_free(hub_tree *t);
/* The files that make up what was asked for: chosen[0..*n) points into the tree and has room for all of it; `file`
 * NULL: the whole model. *folder: they are a safetensors folder, else the file chosen[0], with the other
 * parts behind it when it is the first of a split model. */
orcd_status hub_choose(const hub_tree *t, const char *repo, const char *file, const hub_entry **chosen, size_t *n,
                       bool *folder, orcd_error *err) ORCD_MUST_USE;

/* ---- HTTP (http.c) ---- */

/* A request for `url` with redirects, time limits and, when `own` (the URL is below p->url), the token. */
void hub_http_prepare(const hub_params *p, CURL *easy, const char *url, bool own);
/* The answer to a small request, retried; *next (free() it) is the address of the following page, NULL at the end. */
orcd_status hub_http_get(const hub_params *p, const char *url, buf *body, char **next, orcd_error *err) ORCD_MUST_USE;
/* May the same request do better later? */
bool hub_http_transient(CURLcode code, long status);
/* The sentence for a request that failed; `what` is what was asked for. */
orcd_status hub_http_failed(const hub_params *p, CURLcode code, long status, const char *what, orcd_error *err);
/* Seconds to wait before try number `failures` (from 1), or what the server asked for. */
double hub_http_pause(int failures, long retry_after);
/* The value of header line [line, line + n) when its name is `name`: into out, NUL-terminated, cut to cap. */
bool hub_http_header(const char *line, size_t n, const char *name, char *out, size_t cap);
/* PATH with every part escaped for a URL. */
void hub_http_escape(CURL *easy, const char *path, buf *url);

/* ---- one repository's folder in the cache (shelf.c) ---- */

typedef struct hub_shelf {
    char dir[HUB_PATH]; /* CACHE/OWNER/REPO */
    int lock;           /* held; -1 when only read */
    sums sums;          /* SHA256SUMS; its names pass hub_is_file */
    bool pending;
} hub_shelf;

/* Make the folder when missing and take its lock; waits for it when `p` is given, else fails when it is taken. */
orcd_status hub_shelf_lock(const hub_params *p, const char *cache, const char *repo, hub_shelf *s,
                           orcd_error *err) ORCD_MUST_USE;
/* Read it without the lock; one that is not there is empty. */
void hub_shelf_read(const char *cache, const char *repo, hub_shelf *s);
void hub_shelf_close(hub_shelf *s); /* accepts a zeroed shelf whose lock is -1 */

/* DIR/PATH, or DIR/.orcd/NAME. False when it does not fit. */
bool hub_shelf_path(const hub_shelf *s, const char *path, char out[HUB_PATH]);
bool hub_shelf_own(const hub_shelf *s, const char *name, const char *ending, char out[HUB_PATH]);
/* Record (hex) or forget (hex NULL) a file, atomically. */
orcd_status hub_shelf_put(hub_shelf *s, const char *path, const char *hex, orcd_error *err) ORCD_MUST_USE;
orcd_status hub_shelf_set_pending(hub_shelf *s, bool pending, orcd_error *err) ORCD_MUST_USE;
/* Make every folder above `path`. */
orcd_status hub_make_folders(const char *path, orcd_error *err) ORCD_MUST_USE;

/* ---- bytes (part.c, fetch.c) ---- */

enum { HUB_TODO, HUB_TAKEN, HUB_DONE };

typedef struct hub_part { /* one file under way */
    const hub_entry *entry;
    char data_path[HUB_PATH], map_path[HUB_PATH];
    int data, map;  /* open files */
    uint8_t *state; /* [n_piece] HUB_TODO ... */
    uint64_t piece; /* bytes of one; the last is shorter */
    uint64_t n_piece, n_done;
    bool resumed;  /* some pieces were here before */
    bool no_range; /* the server sends the whole file or nothing */
    bool taken;    /* no_range: somebody is at it */
    char *url;     /* where the hub's address led; NULL: not yet known, or no longer good */

    _Atomic uint64_t ready;   /* bytes from the start that are written for good */
    _Atomic int era;          /* counts the times that everything began anew */
    char sha256[65], git[41]; /* made by the hasher once all is ready */
} hub_part;

/* Open or begin the part file; pieces that an earlier process wrote count. */
orcd_status hub_part_open(hub_shelf *s, const hub_entry *e, hub_part *part, orcd_error *err) ORCD_MUST_USE;
void hub_part_close(hub_part *part);
void hub_part_drop(hub_part *part);            /* delete the bytes; closes it */
uint64_t hub_part_bytes(const hub_part *part); /* in whole pieces */

/* Follow the bytes as they become ready to the end and fill sha256 and git (git of small files only: LFS files have
 * none). False when it was told to quit, or a read failed. */
bool hub_part_hash(hub_part *part, const atomic_bool *quit);
/* Is the file of that path what the hub records? Its SHA-256 when it is. */
orcd_status hub_file_is(const char *path, const hub_entry *e, bool *same, char sha256[65],
                        orcd_error *err) ORCD_MUST_USE;

/* Fetch what is missing of all parts, several ranges at once, and hash them while they are written. */
orcd_status hub_fetch(const hub_params *p, const char *repo, hub_part *part, size_t n, orcd_error *err) ORCD_MUST_USE;

#endif
