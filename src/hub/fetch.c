/* hub/fetch.c: ranges of files, several at once over their own connections, on one thread; a second one hashes what is
 * written. A range that breaks off goes on where it stopped. */
#include "hub/internal.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct fetch fetch;

typedef struct conn { /* one range under way */
    fetch *f;
    CURL *easy;
    hub_part *part; /* NULL: idle */
    uint64_t index; /* of the piece; the whole file when part->no_range */
    uint64_t first, at, end, begun_at;
    double not_before; /* after a failure: when to try again */
    int failures;      /* in a row, without a byte between them */
    bool active, direct;

    /* the answer in hand */
    bool range_ok, no_range;
    long retry_after;
    orcd_error err; /* code ORCD_OK: nothing that ends the whole */
} conn;

struct fetch {
    const hub_params *p;
    const char *repo;
    hub_part *part;
    size_t n_part, first_open;
    conn *conn;
    CURLM *multi;
    atomic_bool quit, hashed; /* to the hasher; from it: it is at the end, in whatever way */
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- the answer ---- */

static size_t on_header(char *line, size_t size, size_t n, void *ctx) {
    conn *c = ctx;
    char value[256], want[96];
    const hub_entry *e = c->part->entry;
    size_t len = size * n;
    if (len > 5 && strncmp(line, "HTTP/", 5) == 0)
        c->range_ok = false; /* the next answer of a redirect begins */
    if (hub_http_header(line, len, "content-range", value, sizeof value)) {
        snprintf(want, sizeof want, "bytes %llu-%llu/%llu", (unsigned long long)c->at, (unsigned long long)c->end - 1,
                 (unsigned long long)e->size);
        c->range_ok = strcmp(value, want) == 0;
    } else if (hub_http_header(line, len, "retry-after", value, sizeof value)) {
        c->retry_after = atol(value);
    } else if (!c->direct && e->oid[40] && hub_http_header(line, len, "x-linked-etag", value, sizeof value)) {
        size_t quote = value[0] == '"';
        if (strspn(value + quote, "0123456789abcdef") == 64 && strncmp(value + quote, e->oid, 64) != 0) {
            orcd_fail(&c->err, ORCD_ERR_IO, "%s changed on the hub since it was listed; run it again", e->path);
            return 0;
        }
    }
    return len;
}

static size_t on_body(char *bytes, size_t size, size_t n, void *ctx) {
    conn *c = ctx;
    long status = 0;
    size_t len = size * n;
    curl_easy_getinfo(c->easy, CURLINFO_RESPONSE_CODE, &status);
    if (status == 200 && !c->part->no_range && (c->first > 0 || c->end < c->part->entry->size || c->at > 0)) {
        c->no_range = true;
        return 0;
    }
    if ((status == 206 && !c->range_ok) || (status != 206 && status != 200) || len > c->end - c->at)
        return 0;
    for (size_t done = 0; done < len;) {
        ssize_t put = pwrite(c->part->data, bytes + done, len - done, (off_t)(c->at + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            orcd_fail(&c->err, ORCD_ERR_IO, "cannot write %s: %s; what is there stays, run it again to go on",
                      c->part->data_path, put < 0 ? strerror(errno) : "nothing was taken");
            return 0;
        }
        done += (size_t)put;
    }
    c->at += len;
    return len;
}

/* ---- work ---- */

static bool take_piece(conn *c, hub_part *part) {
    uint64_t i = 0, size = part->entry->size;
    if (part->no_range) {
        if (part->taken || part->n_done == part->n_piece)
            return false;
        part->taken = true;
        c->first = 0;
        c->end = size;
    } else {
        while (i < part->n_piece && part->state[i] != HUB_TODO)
            i++;
        if (i == part->n_piece)
            return false;
        part->state[i] = HUB_TAKEN;
        c->first = i * part->piece;
        c->end = size - c->first < part->piece ? size : c->first + part->piece;
    }
    c->part = part;
    c->index = i;
    c->at = c->first;
    c->not_before = 0;
    c->failures = 0;
    return true;
}

static void take_work(fetch *f, conn *c) {
    while (f->first_open < f->n_part && f->part[f->first_open].n_done == f->part[f->first_open].n_piece)
        f->first_open++;
    for (size_t i = f->first_open; i < f->n_part && !c->part; i++)
        take_piece(c, &f->part[i]);
}

static void start(conn *c) {
    enum { BUFFER = 512 << 10 };
    const hub_params *p = c->f->p;
    buf url = {0};
    char range[64];
    c->direct = c->part->url != NULL;
    if (c->direct) {
        buf_str(&url, c->part->url);
    } else {
        buf_printf(&url, "%s/%s/resolve/main/", p->url, c->f->repo);
        hub_http_escape(c->easy, c->part->entry->path, &url);
    }
    hub_http_prepare(p, c->easy, url.data ? url.data : "", !c->direct);
    buf_free(&url);
    curl_easy_setopt(c->easy, CURLOPT_PRIVATE, c);
    curl_easy_setopt(c->easy, CURLOPT_BUFFERSIZE, (long)BUFFER);
    curl_easy_setopt(c->easy, CURLOPT_WRITEFUNCTION, on_body);
    curl_easy_setopt(c->easy, CURLOPT_WRITEDATA, c);
    curl_easy_setopt(c->easy, CURLOPT_HEADERFUNCTION, on_header);
    curl_easy_setopt(c->easy, CURLOPT_HEADERDATA, c);
    if (c->part->no_range) {
        c->at = 0;
    } else {
        snprintf(range, sizeof range, "%llu-%llu", (unsigned long long)c->at, (unsigned long long)c->end - 1);
        curl_easy_setopt(c->easy, CURLOPT_RANGE, range);
    }
    c->begun_at = c->at;
    c->range_ok = c->no_range = false;
    c->retry_after = 0;
    c->active = curl_multi_add_handle(c->f->multi, c->easy) == CURLM_OK;
}

static void stop(conn *c) {
    if (c->active)
        curl_multi_remove_handle(c->f->multi, c->easy);
    c->active = false;
    c->part = NULL;
}

/* The bytes from the start that no longer change. */
static void move_ready(hub_part *part) {
    uint64_t i = atomic_load(&part->ready) / part->piece, size = part->entry->size;
    while (i < part->n_piece && part->state[i] == HUB_DONE)
        i++;
    atomic_store(&part->ready, i == part->n_piece ? size : i * part->piece);
}

static orcd_status piece_done(conn *c, orcd_error *err) {
    hub_part *part = c->part;
    uint64_t first = part->no_range ? 0 : c->index, n = part->no_range ? part->n_piece : 1;
    char *url = NULL;
    memset(part->state + first, HUB_DONE, n);
    part->n_done += n;
    if (pwrite(part->map, part->state + first, n, (off_t)first) != (ssize_t)n)
        return orcd_fail(err, ORCD_ERR_IO, "cannot write %s: %s", part->map_path, strerror(errno));
    move_ready(part);
    if (!part->url && curl_easy_getinfo(c->easy, CURLINFO_EFFECTIVE_URL, &url) == CURLE_OK && url &&
        strncmp(url, c->f->p->url, strlen(c->f->p->url)) != 0)
        part->url = strdup(url); /* the following pieces spare the hub a redirect each */
    stop(c);
    return ORCD_OK;
}

/* The server sends whole files only: what there is of it in pieces is given up, one connection fetches it. */
static orcd_status without_ranges(fetch *f, hub_part *part, orcd_error *err) {
    for (int i = 0; i < f->p->n_conn; i++)
        if (f->conn[i].part == part)
            stop(&f->conn[i]);
    atomic_store(&part->ready, 0);
    atomic_fetch_add(&part->era, 1);
    memset(part->state, HUB_TODO, part->n_piece);
    part->n_done = 0;
    part->no_range = true;
    f->first_open = 0;
    if (ftruncate(part->map, 0) != 0)
        return orcd_fail(err, ORCD_ERR_IO, "cannot write %s: %s", part->map_path, strerror(errno));
    return ORCD_OK;
}

static orcd_status finished(fetch *f, conn *c, CURLcode code, orcd_error *err) {
    long status = 0;
    hub_part *part = c->part;
    curl_easy_getinfo(c->easy, CURLINFO_RESPONSE_CODE, &status);
    curl_multi_remove_handle(f->multi, c->easy);
    c->active = false;
    if (c->err.code) {
        *err = c->err;
        return err->code;
    }
    if (code == CURLE_OK && c->at == c->end)
        return piece_done(c, err);
    if (c->no_range)
        return without_ranges(f, part, err);
    bool wrong = code == CURLE_WRITE_ERROR || code == CURLE_OK; /* another range, too many or too few bytes */
    bool expired = c->direct && code == CURLE_HTTP_RETURNED_ERROR;
    if (c->at > c->begun_at && !part->no_range)
        c->failures = 0;
    c->failures++;
    if (expired) {
        free(part->url); /* a signed address that is too old: the hub gives a new one */
        part->url = NULL;
    }
    if (c->failures > f->p->retries || !(wrong || expired || hub_http_transient(code, status))) {
        if (code != CURLE_WRITE_ERROR)
            return hub_http_failed(f->p, code, status, part->entry->path, err);
        return orcd_fail(err, ORCD_ERR_FORMAT, "%s: %s does not send the bytes that were asked for", part->entry->path,
                         f->p->url);
    }
    c->not_before = now() + hub_http_pause(c->failures, c->retry_after);
    return ORCD_OK;
}

static void report(const fetch *f) {
    uint64_t done = 0, total = 0;
    for (size_t i = 0; i < f->n_part; i++) {
        done += hub_part_bytes(&f->part[i]);
        total += f->part[i].entry->size;
    }
    for (int i = 0; i < f->p->n_conn; i++)
        done += f->conn[i].part ? f->conn[i].at - f->conn[i].first : 0;
    if (f->p->progress)
        f->p->progress(f->p->ctx, done, total);
}

static orcd_status transfer(fetch *f, orcd_error *err) {
    for (int working = 1, running, left;;) {
        working = 0;
        for (int i = 0; i < f->p->n_conn; i++) {
            conn *c = &f->conn[i];
            if (!c->part)
                take_work(f, c);
            if (c->part && !c->active && now() >= c->not_before)
                start(c);
            working += c->part != NULL;
        }
        if (!working)
            return ORCD_OK;
        curl_multi_perform(f->multi, &running);
        for (CURLMsg *m; (m = curl_multi_info_read(f->multi, &left));) {
            conn *c = NULL;
            if (m->msg != CURLMSG_DONE)
                continue;
            curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&c);
            ORCD_TRY(finished(f, c, m->data.result, err));
        }
        report(f);
        if (f->p->stopped && f->p->stopped(f->p->ctx))
            return orcd_fail(err, ORCD_ERR_CANCELLED, "stopped; the same command goes on from here");
        curl_multi_poll(f->multi, NULL, 0, running ? 100 : 20, NULL);
    }
}

static void *hash_all(void *arg) {
    fetch *f = arg;
    for (size_t i = 0; i < f->n_part; i++)
        if (!hub_part_hash(&f->part[i], &f->quit))
            break;
    atomic_store(&f->hashed, true);
    return NULL;
}

/* Of what an earlier run had fetched, the hashes may take much longer than the rest of the bytes. */
static orcd_status wait_for_hashes(fetch *f, orcd_error *err) {
    enum { WAIT_US = 20000, SAID_AFTER = 50 /* waits */ };
    for (int waits = 0; !atomic_load(&f->hashed); waits++) {
        if (waits == SAID_AFTER && f->p->note)
            f->p->note(f->p->ctx, "all bytes are here; checking their hashes");
        if (f->p->stopped && f->p->stopped(f->p->ctx))
            return orcd_fail(err, ORCD_ERR_CANCELLED, "stopped; the same command goes on from here");
        usleep(WAIT_US);
    }
    return ORCD_OK;
}

static orcd_status open_fetch(fetch *f, orcd_error *err) {
    f->multi = curl_multi_init();
    f->conn = calloc((size_t)f->p->n_conn, sizeof *f->conn);
    bool ok = f->multi && f->conn;
    for (int i = 0; ok && i < f->p->n_conn; i++) {
        f->conn[i] = (conn){.f = f, .easy = curl_easy_init()};
        ok = f->conn[i].easy != NULL;
    }
    return ok ? ORCD_OK : orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for %d connections", f->p->n_conn);
}

orcd_status hub_fetch(const hub_params *p, const char *repo, hub_part *part, size_t n, orcd_error *err) {
    fetch f = {.p = p, .repo = repo, .part = part, .n_part = n};
    pthread_t hasher;
    bool hashing = false;
    orcd_status st;
    for (size_t i = 0; i < n; i++)
        move_ready(&part[i]);
    ORCD_TRY_GOTO(st, done, open_fetch(&f, err));
    hashing = pthread_create(&hasher, NULL, hash_all, &f) == 0;
    if (!hashing) {
        st = orcd_fail(err, ORCD_ERR_NOMEM, "cannot start a thread for the hashes");
        goto done;
    }
    st = transfer(&f, err);
    if (st == ORCD_OK)
        st = wait_for_hashes(&f, err);
done:
    atomic_store(&f.quit, st != ORCD_OK);
    if (hashing)
        pthread_join(hasher, NULL);
    for (int i = 0; f.conn && i < p->n_conn; i++) {
        if (f.conn[i].easy)
            stop(&f.conn[i]);
        curl_easy_cleanup(f.conn[i].easy);
    }
    free(f.conn);
    curl_multi_cleanup(f.multi);
    for (size_t i = 0; st == ORCD_OK && i < n; i++)
        if (!part[i].sha256[0])
            st = orcd_fail(err, ORCD_ERR_IO, "cannot read %s back", part[i].data_path);
    return st;
}
