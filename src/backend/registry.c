#include "backend/backend.h"

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
