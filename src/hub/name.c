#include "hub/hub.h"

#include <string.h>

static bool is_alnum(char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }

/* One part of a path: `more` lists what may stand in it beside letters and digits. No leading dot (hidden names, "..",
 * our own .orcd) and no leading minus (options of whatever program is given the name). */
static bool is_part(const char *s, size_t n, size_t limit, const char *more) {
    if (n == 0 || n > limit || s[0] == '.' || s[0] == '-' || s[0] == ' ' || s[n - 1] == ' ')
        return false;
    for (size_t i = 0; i < n; i++)
        if (!is_alnum(s[i]) && !strchr(more, s[i]))
            return false;
    return true;
}

bool hub_is_repo(const char *name) {
    const char *slash = strchr(name, '/');
    return slash && is_part(name, (size_t)(slash - name), 96, "._-") &&
           is_part(slash + 1, strlen(slash + 1), 96, "._-");
}

bool hub_is_file(const char *name) {
    enum { MAX_DEPTH = 8 };
    if (strlen(name) >= HUB_FILE)
        return false;
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        size_t n = strcspn(name, "/");
        if (!is_part(name, n, 200, "._-+=@,()[] "))
            return false;
        if (!name[n])
            return true;
        name += n + 1;
    }
    return false;
}

const char *hub_alias(const char *name) {
    static const char *const alias[][2] = {
        {"gpt-oss-20b", "openai/gpt-oss-20b"},
        {"gpt-oss-120b", "openai/gpt-oss-120b"},
        {"gpt2", "openai-community/gpt2"},
    };
    for (size_t i = 0; i < ORCD_COUNT(alias); i++)
        if (strcmp(alias[i][0], name) == 0)
            return alias[i][1];
    return NULL;
}
