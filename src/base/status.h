/* base/status.h: how every floor reports failure. Includes nothing of orcd. */
#ifndef ORCD_BASE_STATUS_H
#define ORCD_BASE_STATUS_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

/* Every function that can fail returns one of these. Zero is success. */
typedef enum orcd_status {
    ORCD_OK = 0,
    ORCD_ERR_ARG,         /* the caller passed something senseless */
    ORCD_ERR_IO,          /* the operating system refused: open, read, map */
    ORCD_ERR_FORMAT,      /* bytes of a file or a request are malformed */
    ORCD_ERR_UNSUPPORTED, /* well-formed, but not something orcd runs */
    ORCD_ERR_NOMEM,       /* host or device memory */
    ORCD_ERR_LIMIT,       /* a stated limit (context, queue, size) would be passed */
    ORCD_ERR_DEVICE,      /* the accelerator failed; sticky */
    ORCD_ERR_CANCELLED,
    ORCD_ERR_TIMEOUT,
    ORCD_ERR_INTERNAL,
} orcd_status;

#define ORCD_POS_NONE UINT64_MAX

/* What went wrong, where, and what to do: one sentence. `pos` is a byte position in the file or
 * request at fault, ORCD_POS_NONE when there is none. */
typedef struct orcd_error {
    orcd_status code;
    uint64_t pos;
    char message[512];
} orcd_error;

#define ORCD_MUST_USE __attribute__((warn_unused_result))
#define ORCD_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* Fill *err (NULL is allowed) and return `code`, so that `return orcd_fail(err, ...)` is one line. */
orcd_status orcd_fail(orcd_error *err, orcd_status code, const char *fmt, ...) ORCD_PRINTF(3, 4);
orcd_status orcd_fail_at(orcd_error *err, orcd_status code, uint64_t pos, const char *fmt, ...) ORCD_PRINTF(4, 5);

/* "out of memory", "malformed file", ... Never NULL. */
const char *orcd_status_name(orcd_status s);

#define ORCD_TRY(expr)                                                                                                 \
    do {                                                                                                               \
        orcd_status try_status_ = (expr);                                                                              \
        if (try_status_ != ORCD_OK)                                                                                    \
            return try_status_;                                                                                        \
    } while (0)

#define ORCD_TRY_GOTO(status, label, expr)                                                                             \
    do {                                                                                                               \
        (status) = (expr);                                                                                             \
        if ((status) != ORCD_OK)                                                                                       \
            goto label;                                                                                                \
    } while (0)

#define ORCD_COUNT(array) (sizeof(array) / sizeof((array)[0]))

#endif
