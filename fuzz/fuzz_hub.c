/* Any bytes are an error or a list of files whose names and sizes are harmless, from which something is chosen or not;
 * seeds are in fuzz/corpus/hub. */
#include "../tests/relations.h"

#include <stdlib.h>
#include <string.h>

#include "hub/internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const wanted[] = {NULL, "gguf", "a.gguf"};
    hub_tree t = {0};
    orcd_error err = {0};
    orcd_status st = hub_tree_add(&t, (const char *)data, size, &err);
    MUST(st == ORCD_OK || (err.code && err.message[0]));
    for (size_t i = 0; i < t.n; i++)
        MUST(hub_is_file(t.entry[i].path) && t.entry[i].size <= (uint64_t)1 << 50 &&
             (strlen(t.entry[i].oid) == 64 || strlen(t.entry[i].oid) == 40));
    const hub_entry **chosen = calloc(t.n + 1, sizeof *chosen);
    for (size_t i = 0; chosen && st == ORCD_OK && i < ORCD_COUNT(wanted); i++) {
        size_t n;
        bool folder;
        if (hub_choose(&t, "o/r", wanted[i], chosen, &n, &folder, &err) == ORCD_OK)
            MUST(n > 0 && n <= t.n && (folder || n == 1));
        else
            MUST(err.message[0]);
    }
    free(chosen);
    hub_tree_free(&t);
    return 0;
}
