#include "serve/replay.h"

#include <jansson.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 1024 };

typedef struct entry {
    struct entry *next;          /* of the bucket */
    struct entry *newer, *older; /* of all */
    uint64_t hash, owner;
    size_t n, bytes;
    int32_t *id;
    char *call_id, *name, *arguments; /* all in one block with id */
} entry;

struct replay {
    pthread_mutex_t lock;
    size_t bytes, limit;
    entry *newest, *oldest;
    entry *bucket[BUCKETS];
};

orcd_status replay_open(size_t bytes, replay **out, orcd_error *err) {
    replay *r = *out = calloc(1, sizeof *r);
    if (!r)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    r->limit = bytes;
    pthread_mutex_init(&r->lock, NULL);
    return ORCD_OK;
}

static uint64_t hash_of(uint64_t owner, const char *call_id) {
    uint64_t h = 0xcbf29ce484222325u ^ owner;
    for (; *call_id; call_id++)
        h = (h ^ (unsigned char)*call_id) * 0x100000001b3u;
    return h;
}

static void drop(replay *r, entry *e) {
    entry **at = &r->bucket[e->hash % BUCKETS];
    while (*at != e)
        at = &(*at)->next;
    *at = e->next;
    *(e->newer ? &e->newer->older : &r->newest) = e->older;
    *(e->older ? &e->older->newer : &r->oldest) = e->newer;
    r->bytes -= e->bytes;
    free(e);
}

void replay_close(replay *r) {
    if (!r)
        return;
    while (r->newest)
        drop(r, r->newest);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

static char *put_text(char **at, const char *s) {
    size_t n = strlen(s) + 1;
    char *copy = memcpy(*at, s, n);
    *at += n;
    return copy;
}

void replay_put(replay *r, uint64_t owner, const char *call_id, const char *name, const char *arguments,
                const int32_t *id, size_t n) {
    size_t bytes = sizeof(entry) + n * sizeof *id + strlen(call_id) + strlen(name) + strlen(arguments) + 3;
    entry *e = bytes <= r->limit ? malloc(bytes) : NULL;
    if (!e)
        return;
    char *at = (char *)(e + 1) + n * sizeof *id;
    *e = (entry){.hash = hash_of(owner, call_id), .owner = owner, .n = n, .bytes = bytes, .id = (int32_t *)(e + 1)};
    memcpy(e->id, id, n * sizeof *id);
    e->call_id = put_text(&at, call_id);
    e->name = put_text(&at, name);
    e->arguments = put_text(&at, arguments);
    pthread_mutex_lock(&r->lock);
    while (r->oldest && r->bytes + bytes > r->limit)
        drop(r, r->oldest);
    entry **bucket = &r->bucket[e->hash % BUCKETS];
    e->next = *bucket;
    *bucket = e;
    e->older = r->newest;
    *(e->older ? &e->older->newer : &r->oldest) = e;
    r->newest = e;
    r->bytes += bytes;
    pthread_mutex_unlock(&r->lock);
}

/* Clients may parse the arguments and write them again. */
static bool same_json(const char *a, const char *b) {
    if (strcmp(a, b) == 0)
        return true;
    json_t *x = json_loads(a, JSON_DECODE_ANY, NULL), *y = json_loads(b, JSON_DECODE_ANY, NULL);
    bool same = x && y && json_equal(x, y);
    json_decref(x);
    json_decref(y);
    return same;
}

bool replay_find(replay *r, uint64_t owner, const char *call_id, const char *name, const char *arguments, ids *out) {
    uint64_t hash = hash_of(owner, call_id);
    pthread_mutex_lock(&r->lock);
    entry *e = r->bucket[hash % BUCKETS];
    while (e && !(e->hash == hash && e->owner == owner && strcmp(e->call_id, call_id) == 0))
        e = e->next;
    bool found = e && strcmp(e->name, name) == 0 && same_json(e->arguments, arguments);
    if (found)
        ids_add(out, e->id, e->n);
    pthread_mutex_unlock(&r->lock);
    return found;
}
