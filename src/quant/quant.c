#include "quant/quant.h"

#include <strings.h>

#include "base/status.h"
#include "quant/block.h"

static const q_traits *const list[] = {
#define QUANT(name) &q_traits_##name,
#include "quant/list.def"
#undef QUANT
};

size_t q_count(void) { return ORCD_COUNT(list); }

const q_traits *q_at(size_t i) { return i < q_count() ? list[i] : NULL; }

const q_traits *q_find(uint32_t type) {
    for (size_t i = 0; i < q_count(); i++)
        if ((uint32_t)list[i]->type == type)
            return list[i];
    return NULL;
}

const q_traits *q_find_name(const char *name) {
    for (size_t i = 0; i < q_count(); i++)
        if (strcasecmp(list[i]->name, name) == 0)
            return list[i];
    return NULL;
}
