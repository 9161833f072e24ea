/* base/part_name.h: NAME-00002-of-00003.gguf, one file of a model that was published in parts. */
#ifndef ORCD_BASE_PART_NAME_H
#define ORCD_BASE_PART_NAME_H

#include <stdbool.h>
#include <stddef.h>

typedef struct part_name {
    unsigned no, count; /* 1 <= no <= count <= 1,024 */
    size_t stem;        /* bytes of the path before "-00002-of-" */
} part_name;

/* False when the path ends in no such name. */
bool part_name_read(const char *path, part_name *out);
/* Rewrites a path that part_name_read accepted into that of part `no`, at most 99,999. */
void part_name_set(char *path, const part_name *name, unsigned no);

#endif
