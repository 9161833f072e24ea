#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>

#define BACKEND(name) extern const be_ops be_ops_##name;
#include "backend/list.def"
#undef BACKEND

static const be_ops *const list[] = {
#define BACKEND(name) &be_ops_##name,
#include "backend/list.def"
#undef BACKEND
    NULL, /* ends the list */
};

size_t be_count(void) { return ORCD_COUNT(list) - 1; }

const be_ops *be_at(size_t i) { return i < be_count() ? list[i] : NULL; }

const be_ops *be_find(const char *name) {
    for (size_t i = 0; i < be_count(); i++)
        if (strcmp(list[i]->name, name) == 0)
            return list[i];
    return NULL;
}

const be_ops *be_named(const char *device, int *ordinal) {
    size_t n = strcspn(device, ":");
    for (size_t i = 0; i < be_count(); i++) {
        if (strncmp(list[i]->name, device, n) != 0 || list[i]->name[n])
            continue;
        if (!device[n])
            return list[i];
        char *end;
        long v = strtol(device + n + 1, &end, 10);
        if (strcmp(list[i]->name, "cuda") != 0 || device[n + 1] < '0' || device[n + 1] > '9' || *end || v > 1023)
            return NULL;
        *ordinal = (int)v;
        return list[i];
    }
    return NULL;
}

static orcd_status open_one(const be_ops *ops, const be_params *p, be_device **out, orcd_error *err) {
    *out = NULL;
    if (p->dense_type != Q_F32 && strcmp(ops->name, "cpu") != 0)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "device %s computes with weights as they are stored: leave out --dense-type, or use "
                         "--device cpu",
                         ops->name);
    return ops->open(p, out, err);
}

orcd_status be_open(const char *device, const be_params *p, be_device **out, orcd_error *err) {
    static const char *const order[] = {"cuda", "cpu", "ref"};
    orcd_status st = ORCD_ERR_UNSUPPORTED;
    be_params at = *p;
    *out = NULL;
    if (strcmp(device, "auto") == 0) {
        for (size_t i = 0; i < ORCD_COUNT(order) && st != ORCD_OK; i++)
            if (be_find(order[i]))
                st = open_one(be_find(order[i]), p, out, err);
        return st;
    }
    const be_ops *ops = be_named(device, &at.device);
    if (!ops)
        return orcd_fail(err, ORCD_ERR_ARG,
                         "device \"%s\" is none of auto, cpu, ref, cuda and cuda:N, or not in this build", device);
    return open_one(ops, &at, out, err);
}
