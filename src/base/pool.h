/* base/pool.h: persistent workers that all run the same function, with a spin-then-sleep barrier. */
#ifndef ORCD_BASE_POOL_H
#define ORCD_BASE_POOL_H

#include "base/status.h"

typedef struct pool pool;

/* n_threads >= 1 counts the caller: n_threads - 1 workers are started. */
orcd_status pool_open(int n_threads, pool **out, orcd_error *err) ORCD_MUST_USE;
void pool_close(pool *p);
int pool_n(const pool *p);

/* Run fn(arg, thread, n_threads) on every thread, the caller being thread 0; returns when all have returned. */
void pool_run(pool *p, void (*fn)(void *arg, int thread, int n_threads), void *arg);
/* Inside fn only: wait until every thread of the pool has come here. */
void pool_barrier(pool *p);

#endif
