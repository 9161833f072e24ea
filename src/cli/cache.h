/* cli/cache.h: where pulled models lie, and finding them by name. */
#ifndef ORCD_CLI_CACHE_H
#define ORCD_CLI_CACHE_H

#include "hub/hub.h"

/* `given` (--cache) or, when NULL, the user's cache folder: $XDG_CACHE_HOME/orcd, else ~/.cache/orcd. */
orcd_status cli_cache_dir(const char *given, char *path, size_t cap, orcd_error *err) ORCD_MUST_USE;

/* The path of a pulled model; a name that is none comes back as it is. Fails for an incomplete model, and for an alias
 * that was not pulled. */
orcd_status cli_find_pulled(const char *name, char *path, size_t cap, orcd_error *err) ORCD_MUST_USE;

#endif
