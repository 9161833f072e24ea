/* engine/disk.h: the prefix cache on disk, so that a prompt costs little after a restart too. May include kv, prefix.
 * Used by the engine thread only, or before it starts.
 *
 * Files in one folder, which several models and processes may share:
 *
 *     FINGERPRINT-KEY.page    one full page; the key is a hash of all tokens up to its end, and the salt
 *     FINGERPRINT-KEY.point   one entry: its tokens, the partly filled page, the window pages
 *
 * A file is written beside its name and renamed, ends with a hash of all its bytes, and is believed only when name,
 * lengths and hash agree. The modification time is the time of the last use; the longest unused files go first. */
#ifndef ORCD_ENGINE_DISK_H
#define ORCD_ENGINE_DISK_H

#include "engine/prefix.h"

#define DISK_HASH 32
#define DISK_DEFAULT_BYTES ((uint64_t)4 << 30)
#define DISK_MIN_POS 256 /* shorter prefixes are computed faster than it is worth */

typedef struct disk disk;

typedef struct disk_params {
    const char *dir;
    uint64_t max_bytes;
    uint8_t fingerprint[DISK_HASH]; /* see eng_fingerprint */
    int n_vocab;
    void (*note)(void *ctx, const char *sentence); /* may be NULL */
    void *note_ctx;
} disk_params;

/* Makes the folder if need be (its parent must exist) and restores what fits without displacing anything, newest
 * first. Files that cannot be used are no failure: a note says so. Slot 0 must be empty. */
orcd_status disk_open(const disk_params *p, kv_store *kv, prefix *cache, disk **out, orcd_error *err) ORCD_MUST_USE;
void disk_close(disk *d);

/* Write what was made or used since; stops at the time `until` (eng_now), but writes one page at least. True when
 * there is more. A failure is noted once and ends all writing. */
bool disk_save(disk *d, double until);

#endif
