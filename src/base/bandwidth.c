#include "base/bandwidth.h"

#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/pool.h"

typedef struct reading {
    uint64_t *word;
    size_t n;                 /* words, a multiple of 8 for every thread */
    volatile uint64_t sum[8]; /* so that nothing is left out */
} reading;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void share(const reading *r, int thread, int n_threads, size_t *from, size_t *to) {
    size_t blocks = r->n / 8;
    *from = blocks * (size_t)thread / (size_t)n_threads * 8;
    *to = blocks * ((size_t)thread + 1) / (size_t)n_threads * 8;
}

/* Each thread touches its own part first: there its pages come to lie near it. */
static void fill(void *arg, int thread, int n_threads) {
    reading *r = arg;
    size_t from, to;
    share(r, thread, n_threads, &from, &to);
    memset(r->word + from, thread + 1, (to - from) * sizeof *r->word);
}

static void read_all(void *arg, int thread, int n_threads) {
    reading *r = arg;
    size_t from, to;
    uint64_t sum[8] = {0};
    share(r, thread, n_threads, &from, &to);
    for (const uint64_t *p = r->word + from, *end = r->word + to; p < end; p += 8)
        for (int k = 0; k < 8; k++)
            sum[k] += p[k];
    for (int k = 0; k < 8; k++)
        if (sum[k] == 1)
            r->sum[k] = sum[k];
}

orcd_status mem_bandwidth(int n_threads, double *bytes_per_s, orcd_error *err) {
    const double seconds = 0.5;
    /* machines of many cores have caches of hundreds of MiB */
    const size_t most = (size_t)(n_threads > 8 ? 1024 : 512) << 20, least = (size_t)64 << 20;
    size_t bytes = (size_t)sysconf(_SC_AVPHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 4;
    pool *p = NULL;
    double best = 0;
    bytes = (bytes > most ? most : bytes < least ? least : bytes) & ~(size_t)4095;
    *bytes_per_s = 0;
    void *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED)
        return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a block of %zu bytes to measure with", bytes);
    reading r = {.word = block, .n = bytes / sizeof *r.word};
    orcd_status st = pool_open(n_threads, &p, err);
    if (st != ORCD_OK)
        goto done;
    (void)madvise(block, bytes, MADV_HUGEPAGE);
    pool_run(p, fill, &r);
    for (double begin = now(), t0 = begin, t1; t0 - begin < seconds; t0 = t1) {
        pool_run(p, read_all, &r);
        t1 = now();
        best = (double)bytes / (t1 - t0) > best ? (double)bytes / (t1 - t0) : best;
    }
    *bytes_per_s = best;
done:
    pool_close(p);
    munmap(block, bytes);
    return st;
}
