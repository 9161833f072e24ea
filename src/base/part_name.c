#include "base/part_name.h"

#include <string.h>
#include <strings.h>

enum { MOST = 1024, DIGITS = 5, TAIL = 1 + DIGITS + 4 + DIGITS + 5 }; /* "-" "00001" "-of-" "00003" ".gguf" */

/* Five digits as a number; 0, which is no part's, when there are others. */
static unsigned number(const char *s) {
    unsigned n = 0;
    for (int i = 0; i < DIGITS; i++) {
        if (s[i] < '0' || s[i] > '9')
            return 0;
        n = n * 10 + (unsigned)(s[i] - '0');
    }
    return n;
}

bool part_name_read(const char *path, part_name *out) {
    size_t n = strlen(path);
    if (n <= TAIL)
        return false;
    const char *tail = path + n - TAIL, *of = tail + 1 + DIGITS;
    *out = (part_name){.no = number(tail + 1), .count = number(of + 4), .stem = n - TAIL};
    return tail[0] == '-' && memcmp(of, "-of-", 4) == 0 && strcasecmp(of + 4 + DIGITS, ".gguf") == 0 && out->no >= 1 &&
           out->no <= out->count && out->count <= MOST;
}

void part_name_set(char *path, const part_name *name, unsigned no) {
    for (int i = DIGITS; i > 0; i--, no /= 10)
        path[name->stem + (size_t)i] = (char)('0' + no % 10);
}
