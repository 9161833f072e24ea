#include "serve/store.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct entry {
    struct entry *newer, *older;
    uint64_t owner;
    size_t bytes;
    const char *id;
    char text[]; /* then the id */
} entry;

struct store {
    pthread_mutex_t lock;
    size_t bytes, limit;
    entry *newest, *oldest;
};

orcd_status store_open(size_t bytes, store **out, orcd_error *err) {
    store *s = *out = calloc(1, sizeof *s);
    if (!s)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    s->limit = bytes;
    pthread_mutex_init(&s->lock, NULL);
    return ORCD_OK;
}

static void drop_oldest(store *s) {
    entry *e = s->oldest;
    s->oldest = e->newer;
    *(e->newer ? &e->newer->older : &s->newest) = NULL;
    s->bytes -= e->bytes;
    free(e);
}

void store_close(store *s) {
    if (!s)
        return;
    while (s->oldest)
        drop_oldest(s);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

void store_put(store *s, uint64_t owner, const char *id, const char *text) {
    size_t n_text = strlen(text) + 1, n_id = strlen(id) + 1, bytes = sizeof(entry) + n_text + n_id;
    entry *e = bytes <= s->limit ? malloc(bytes) : NULL;
    if (!e)
        return;
    *e = (entry){.owner = owner, .bytes = bytes, .id = e->text + n_text};
    memcpy(e->text, text, n_text);
    memcpy(e->text + n_text, id, n_id);
    pthread_mutex_lock(&s->lock);
    while (s->oldest && s->bytes + bytes > s->limit)
        drop_oldest(s);
    e->older = s->newest;
    *(e->older ? &e->older->newer : &s->oldest) = e;
    s->newest = e;
    s->bytes += bytes;
    pthread_mutex_unlock(&s->lock);
}

char *store_get(store *s, uint64_t owner, const char *id) {
    pthread_mutex_lock(&s->lock);
    const entry *e = s->newest;
    while (e && !(e->owner == owner && strcmp(e->id, id) == 0))
        e = e->older;
    char *copy = e ? strdup(e->text) : NULL;
    pthread_mutex_unlock(&s->lock);
    return copy;
}
