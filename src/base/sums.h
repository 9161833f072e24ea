/* base/sums.h: lists of SHA-256 sums as sha256sum writes and checks them, "HEX  NAME"; sums of parts of files, such as
 * tensors, are lines that it skips: "# HEX  NAME". */
#ifndef ORCD_BASE_SUMS_H
#define ORCD_BASE_SUMS_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

enum { SUMS_NAME = 512 }; /* with the NUL; longer names are not listed */

typedef struct sums_entry {
    char hex[65];
    bool part; /* of a file */
    char name[SUMS_NAME];
} sums_entry;

typedef struct sums {
    sums_entry *entry; /* [n] */
    size_t n, cap;
} sums;

/* Every line that is a sum; others are skipped. A name may be anything but empty: who opens it judges it. */
orcd_status sums_read(const char *path, sums *out, orcd_error *err) ORCD_MUST_USE;
/* By way of PATH.new: the old list or the new one, never a part. */
orcd_status sums_write(const char *path, const sums *s, orcd_error *err) ORCD_MUST_USE;
void sums_free(sums *s);

const sums_entry *sums_find(const sums *s, bool part, const char *name); /* NULL when absent */
/* Set the sum of a name; hex NULL forgets it. */
orcd_status sums_put(sums *s, bool part, const char *name, const char *hex, orcd_error *err) ORCD_MUST_USE;

#endif
