#include "base/status.h"

#include <stdio.h>

static orcd_status fill(orcd_error *err, orcd_status code, uint64_t pos, const char *fmt, va_list args) {
    if (err) {
        err->code = code;
        err->pos = pos;
        vsnprintf(err->message, sizeof err->message, fmt, args);
    }
    return code;
}

orcd_status orcd_fail(orcd_error *err, orcd_status code, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fill(err, code, ORCD_POS_NONE, fmt, args);
    va_end(args);
    return code;
}

orcd_status orcd_fail_at(orcd_error *err, orcd_status code, uint64_t pos, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fill(err, code, pos, fmt, args);
    va_end(args);
    return code;
}

const char *orcd_status_name(orcd_status s) {
    static const char *const name[] = {
        [ORCD_OK] = "ok",
        [ORCD_ERR_ARG] = "bad argument",
        [ORCD_ERR_IO] = "input/output error",
        [ORCD_ERR_FORMAT] = "malformed data",
        [ORCD_ERR_UNSUPPORTED] = "not supported",
        [ORCD_ERR_NOMEM] = "out of memory",
        [ORCD_ERR_LIMIT] = "limit exceeded",
        [ORCD_ERR_DEVICE] = "device error",
        [ORCD_ERR_CANCELLED] = "cancelled",
        [ORCD_ERR_TIMEOUT] = "timed out",
        [ORCD_ERR_INTERNAL] = "internal error",
    };
    return (size_t)s < ORCD_COUNT(name) ? name[s] : "unknown status";
}
