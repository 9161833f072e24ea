/* cli/cache.c: where pulled models lie, and finding them by name. */
#include "cli/cache.h"

#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"

/* As the XDG base directory specification has it; relative values are to be ignored. */
orcd_status cli_cache_dir(const char *given, char *path, size_t cap, orcd_error *err) {
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    const struct passwd *user = home && *home == '/' ? NULL : getpwuid(getuid());
    int n = -1;
    if (given)
        n = snprintf(path, cap, "%s", given);
    else if (xdg && *xdg == '/')
        n = snprintf(path, cap, "%s/orcd", xdg);
    else if (user || (home && *home == '/'))
        n = snprintf(path, cap, "%s/.cache/orcd", user ? user->pw_dir : home);
    if (n <= 0 || (size_t)n >= cap)
        return orcd_fail(err, ORCD_ERR_ARG, "no folder for pulled models is known; give --cache DIR");
    return ORCD_OK;
}

orcd_status cli_find_pulled(const char *name, char *path, size_t cap, orcd_error *err) {
    char dir[HUB_PATH];
    hub_models all = {0};
    orcd_status st;
    ORCD_TRY_GOTO(st, done, cli_cache_dir(NULL, dir, sizeof dir, err));
    ORCD_TRY_GOTO(st, done, hub_list(dir, &all, err));
    const hub_model *m = hub_find(&all, name);
    if (m && !m->complete)
        st = orcd_fail(err, ORCD_ERR_IO, "%s is not complete yet; orcd pull %s goes on with it", m->name, name);
    else if (m || !hub_alias(name))
        snprintf(path, cap, "%s", m ? m->path : name);
    else
        st = orcd_fail(err, ORCD_ERR_IO, "%s is not here yet; orcd pull %s fetches it", name, name);
done:
    hub_models_free(&all);
    return st;
}
