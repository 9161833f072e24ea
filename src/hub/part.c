/* hub/part.c: a file under way: its bytes, and the map that says which pieces of them are written. */
#include "hub/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hub/sha1.h"

/* From the size alone, so that every run cuts alike: at most about 256 pieces, of 1 to 16 MiB. */
static uint64_t piece_bytes(uint64_t size) {
    const uint64_t mib = 1 << 20, want = (size / 256 + mib - 1) / mib * mib;
    return want < mib ? mib : want > 16 * mib ? 16 * mib : want;
}

/* Pieces of an earlier process. The map is written after the bytes; should it be ahead of them after a power cut, the
 * hash tells. */
static void read_map(hub_part *part) {
    ssize_t got = pread(part->map, part->state, part->n_piece, 0);
    for (uint64_t i = 0; i < part->n_piece; i++) {
        part->state[i] = got > 0 && i < (uint64_t)got && part->state[i] == HUB_DONE ? HUB_DONE : HUB_TODO;
        part->n_done += part->state[i] == HUB_DONE;
    }
    part->resumed = part->n_done > 0;
}

orcd_status hub_part_open(hub_shelf *s, const hub_entry *e, hub_part *part, orcd_error *err) {
    struct stat st;
    orcd_status status = ORCD_OK;
    *part = (hub_part){.entry = e, .data = -1, .map = -1, .piece = piece_bytes(e->size)};
    part->n_piece = (e->size + part->piece - 1) / part->piece;
    part->state = calloc(part->n_piece + 1, 1);
    if (!part->state)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %s", e->path);
    if (!hub_shelf_own(s, e->oid, ".part", part->data_path) || !hub_shelf_own(s, e->oid, ".map", part->map_path)) {
        status = orcd_fail(err, ORCD_ERR_LIMIT, "the cache folder's name is too long");
        goto done;
    }
    part->data = open(part->data_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    part->map = open(part->map_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (part->data < 0 || part->map < 0 || fstat(part->data, &st) != 0) {
        status = orcd_fail(err, ORCD_ERR_IO, "cannot open %s: %s", part->data_path, strerror(errno));
        goto done;
    }
    if ((uint64_t)st.st_size == e->size)
        read_map(part);
    else if (ftruncate(part->map, 0) != 0 || ftruncate(part->data, (off_t)e->size) != 0)
        status = orcd_fail(err, ORCD_ERR_IO, "cannot write %s: %s", part->data_path, strerror(errno));
done:
    if (status != ORCD_OK)
        hub_part_close(part);
    return status;
}

void hub_part_close(hub_part *part) {
    if (part->data >= 0)
        close(part->data);
    if (part->map >= 0)
        close(part->map);
    part->data = part->map = -1;
    free(part->state);
    free(part->url);
    part->state = NULL;
    part->url = NULL;
}

void hub_part_drop(hub_part *part) {
    (void)unlink(part->map_path);
    (void)unlink(part->data_path);
    hub_part_close(part);
}

uint64_t hub_part_bytes(const hub_part *part) {
    uint64_t n = part->n_done * part->piece;
    bool last = part->n_piece && part->state[part->n_piece - 1] == HUB_DONE;
    return last ? n - (part->n_piece * part->piece - part->entry->size) : n;
}

/* ---- hashes ---- */

static void begin(crypto_hash_sha256_state *sha256, sha1 *git, uint64_t size) {
    char head[40];
    int n = snprintf(head, sizeof head, "blob %llu", (unsigned long long)size);
    crypto_hash_sha256_init(sha256);
    sha1_init(git);
    sha1_update(git, head, (size_t)n + 1); /* the NUL belongs to it */
}

static void end(crypto_hash_sha256_state *sha256, sha1 *git, char hex[65], char git_hex[41]) {
    unsigned char sum[crypto_hash_sha256_BYTES], short_sum[20];
    crypto_hash_sha256_final(sha256, sum);
    sha1_final(git, short_sum);
    sodium_bin2hex(hex, 65, sum, sizeof sum);
    sodium_bin2hex(git_hex, 41, short_sum, sizeof short_sum);
}

bool hub_part_hash(hub_part *part, const atomic_bool *quit) {
    enum { PIECE = 1 << 20, WAIT_US = 2000 };
    crypto_hash_sha256_state sha256;
    sha1 git;
    uint64_t at = 0, size = part->entry->size;
    bool lfs = part->entry->oid[40] != '\0';
    uint8_t *bytes = malloc(PIECE);
    int era = atomic_load(&part->era);
    begin(&sha256, &git, size);
    while (bytes && at < size && !atomic_load(quit)) {
        uint64_t ready = atomic_load(&part->ready), n = ready - at < PIECE ? ready - at : PIECE;
        ssize_t got = ready > at ? pread(part->data, bytes, n, (off_t)at) : 0;
        if (era != atomic_load(&part->era)) { /* what was read may have been written over */
            era = atomic_load(&part->era);
            begin(&sha256, &git, size);
            at = 0;
        } else if (got > 0) {
            crypto_hash_sha256_update(&sha256, bytes, (size_t)got);
            if (!lfs)
                sha1_update(&git, bytes, (size_t)got);
            at += (uint64_t)got;
        } else if (ready == at) {
            usleep(WAIT_US);
        } else if (got == 0 || errno != EINTR) {
            break;
        }
    }
    free(bytes);
    if (at == size)
        end(&sha256, &git, part->sha256, part->git);
    return at == size;
}

orcd_status hub_file_is(const char *path, const hub_entry *e, bool *same, char sha256[65], orcd_error *err) {
    hub_part part = {.entry = e, .ready = e->size};
    const atomic_bool never = false;
    struct stat st;
    *same = false;
    part.data = open(path, O_RDONLY | O_CLOEXEC);
    if (part.data < 0)
        return ORCD_OK;
    if (fstat(part.data, &st) != 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != e->size) {
        close(part.data);
        return ORCD_OK;
    }
    bool read = hub_part_hash(&part, &never);
    close(part.data);
    if (!read)
        return orcd_fail(err, ORCD_ERR_IO, "cannot read %s", path);
    *same = strcmp(e->oid, e->oid[40] ? part.sha256 : part.git) == 0;
    memcpy(sha256, part.sha256, 65);
    return ORCD_OK;
}
