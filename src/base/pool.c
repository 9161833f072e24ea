#include "base/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

/* About 20 us of spinning: longer than a phase's imbalance on idle cores, short enough that a core taken by another
 * process is given back. */
enum { SPINS = 2000 };

/* A word that threads wait to see changed: spinning first, then asleep in the kernel. */
typedef struct gate {
    _Alignas(64) atomic_uint value;
    atomic_uint sleepers;
} gate;

struct pool {
    int n;
    void (*fn)(void *arg, int thread, int n_threads);
    void *arg;
    bool stop;
    gate start, step; /* start: a run begins; step: a barrier opens */
    _Alignas(64) atomic_uint arrived;
    struct worker {
        pool *p;
        int index;
        pthread_t id;
    } * worker; /* n - 1 of them */
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void gate_wait(gate *g, unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&g->value, memory_order_acquire) != seen)
            return;
        relax();
    }
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->value) == seen)
        syscall(SYS_futex, &g->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&g->sleepers, 1);
}

static void gate_open(gate *g) {
    atomic_fetch_add(&g->value, 1);
    if (atomic_load(&g->sleepers))
        syscall(SYS_futex, &g->value, FUTEX_WAKE_PRIVATE, 0x7fffffff, NULL, NULL, 0);
}

void pool_barrier(pool *p) {
    if (p->n == 1)
        return;
    unsigned seen = atomic_load_explicit(&p->step.value, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)p->n) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        gate_open(&p->step);
    } else {
        gate_wait(&p->step, seen);
    }
}

static void *work(void *arg) {
    struct worker *w = arg;
    pool *p = w->p;
    for (unsigned seen = 0;; seen++) {
        gate_wait(&p->start, seen);
        if (p->stop)
            return NULL;
        p->fn(p->arg, w->index, p->n);
        pool_barrier(p);
    }
}

void pool_run(pool *p, void (*fn)(void *arg, int thread, int n_threads), void *arg) {
    p->fn = fn;
    p->arg = arg;
    if (p->n > 1)
        gate_open(&p->start);
    fn(arg, 0, p->n);
    pool_barrier(p);
}

orcd_status pool_open(int n_threads, pool **out, orcd_error *err) {
    *out = NULL;
    if (n_threads < 1)
        return orcd_fail(err, ORCD_ERR_ARG, "a thread pool needs at least 1 thread, not %d", n_threads);
    pool *p = aligned_alloc(64, (sizeof *p + 63) / 64 * 64);
    if (!p)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a pool of %d threads", n_threads);
    *p = (pool){.n = 1};
    p->worker = calloc((size_t)n_threads, sizeof *p->worker);
    if (!p->worker) {
        pool_close(p);
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a pool of %d threads", n_threads);
    }
    for (int i = 1; i < n_threads; i++) {
        struct worker *w = &p->worker[i - 1];
        *w = (struct worker){.p = p, .index = i};
        if (pthread_create(&w->id, NULL, work, w) != 0) {
            pool_close(p);
            return orcd_fail(err, ORCD_ERR_NOMEM, "cannot start thread %d of %d: lower the number of threads", i + 1,
                             n_threads);
        }
        p->n = i + 1; /* workers read it only after the first run begins */
    }
    *out = p;
    return ORCD_OK;
}

void pool_close(pool *p) {
    if (!p)
        return;
    p->stop = true;
    gate_open(&p->start);
    for (int i = 1; i < p->n; i++)
        pthread_join(p->worker[i - 1].id, NULL);
    free(p->worker);
    free(p);
}

int pool_n(const pool *p) { return p->n; }
