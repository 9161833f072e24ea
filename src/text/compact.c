#include "text/compact.h"

#include <stdlib.h>

void compact_json(const json_t *v, buf *out) {
    char *text = NULL;
    for (size_t digits = 15; digits <= 17; digits++) {
        free(text);
        text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(digits));
        json_t *again = text ? json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL) : NULL;
        bool exact = again && json_equal(again, v);
        json_decref(again);
        if (exact)
            break;
    }
    if (text)
        buf_str(out, text);
    else
        out->failed = true;
    free(text);
}
