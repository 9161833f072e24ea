/* base/file.h: read-only files as mapped memory, and atomic writing. */
#ifndef ORCD_BASE_FILE_H
#define ORCD_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct file_map {
    const uint8_t *data; /* NULL for an empty file */
    size_t size;
    int fd; /* stays open: a truncation can be noticed by file_changed */
} file_map;

/* Map a regular file. On failure *out is zeroed and err names the path. */
orcd_status file_open(const char *path, file_map *out, orcd_error *err) ORCD_MUST_USE;
void file_close(file_map *f);         /* accepts a zeroed map */
bool file_changed(const file_map *f); /* true when the file has become shorter than the map */

/* What happens when a mapped file becomes shorter and a page beyond its new end is read; without either call the system
 * ends the process without a word. Process-wide. */
void file_shrunk_exits(int code);       /* one sentence on standard error, then _exit(code) */
void file_shrunk_reads_zeros(bool yes); /* instead, and file_shrunk() is true for good: ask it before using a result */
bool file_shrunk(void);

/* The whole of a small file (at most `limit` bytes) as a NUL-terminated string; free() it. */
orcd_status file_slurp(const char *path, size_t limit, char **text, size_t *len, orcd_error *err) ORCD_MUST_USE;

bool file_exists(const char *path);
bool file_is_dir(const char *path);

#endif
