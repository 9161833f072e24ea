/* The engine's door for other threads: submit, cancel, drain, statistics. */
#include <string.h>

#include "engine/internal.h"

static orcd_status enqueue(eng *e, seq *s, eng_ticket *out, orcd_error *err) {
    if (atomic_load_explicit(&e->n.failed, memory_order_acquire))
        return orcd_fail(err, ORCD_ERR_DEVICE, "the engine has failed for good: %s", e->failure.message);
    if (e->draining || e->closing)
        return orcd_fail(err, ORCD_ERR_CANCELLED, "the engine is shutting down and takes no new requests");
    if (e->n_queue >= e->max_queue)
        return orcd_fail_at(err, ORCD_ERR_LIMIT, 1, "%d requests are waiting already: try again later", e->n_queue);
    s->ticket = *out = ++e->last_ticket;
    e->queue[(e->queue_head + e->n_queue++) % e->queue_cap] = s;
    atomic_store_explicit(&e->n.waiting, e->n_queue, memory_order_relaxed);
    eng_count(&e->n.requests, 1);
    e->poked = true;
    pthread_cond_signal(&e->wake);
    return ORCD_OK;
}

orcd_status eng_submit(eng *e, const eng_request *r, eng_ticket *out, orcd_error *err) {
    seq *s;
    *out = 0;
    ORCD_TRY(seq_new(e, r, &s, err));
    pthread_mutex_lock(&e->lock);
    orcd_status st = enqueue(e, s, out, err);
    pthread_mutex_unlock(&e->lock);
    if (st != ORCD_OK)
        seq_free(s);
    return st;
}

void eng_cancel(eng *e, eng_ticket t) {
    pthread_mutex_lock(&e->lock);
    seq *found = NULL;
    for (int i = 0; i < e->n_queue && !found; i++) {
        seq *s = e->queue[(e->queue_head + i) % e->queue_cap];
        found = s->ticket == t ? s : NULL;
    }
    for (int i = 0; i < e->info.max_batch && !found; i++)
        found = e->slot[i] && e->slot[i]->ticket == t ? e->slot[i] : NULL;
    if (found) {
        atomic_store_explicit(&found->cancelled, true, memory_order_relaxed);
        e->poked = true;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
}

void eng_drain(eng *e) {
    pthread_mutex_lock(&e->lock);
    e->draining = true;
    pthread_mutex_unlock(&e->lock);
}

bool eng_failure(const eng *e, orcd_error *why) {
    bool failed = atomic_load_explicit(&e->n.failed, memory_order_acquire);
    if (failed)
        *why = e->failure;
    return failed;
}

static uint64_t get(const atomic_uint_fast64_t *v) { return atomic_load_explicit(v, memory_order_relaxed); }

void eng_get_stats(const eng *e, eng_stats *out) {
    const eng_counters *n = &e->n;
    *out = (eng_stats){.n_running = atomic_load_explicit(&n->running, memory_order_relaxed),
                       .n_waiting = atomic_load_explicit(&n->waiting, memory_order_relaxed),
                       .max_batch = e->info.max_batch,
                       .n_requests = get(&n->requests),
                       .n_preempted = get(&n->preempted),
                       .n_tokens_in = get(&n->tokens_in),
                       .n_tokens_cached = get(&n->tokens_cached),
                       .n_tokens_out = get(&n->tokens_out),
                       .n_steps = get(&n->steps),
                       .cache_hits = get(&n->hits),
                       .cache_lookups = get(&n->lookups),
                       .step_s = (double)get(&n->step_ns) * 1e-9,
                       .forward_s = (double)get(&n->forward_ns) * 1e-9,
                       .callback_s = (double)get(&n->callback_ns) * 1e-9,
                       .resident = !atomic_load_explicit(&n->astray, memory_order_relaxed),
                       .failed = atomic_load_explicit(&n->failed, memory_order_relaxed)};
    for (int i = 0; i < ENG_N_WORK; i++)
        out->work[i] = (eng_work){get(&n->work_steps[i]), get(&n->work_decode[i]), get(&n->work_prefill[i]),
                                  (double)get(&n->work_ns[i]) * 1e-9};
    for (int i = 0; i <= ENG_STOP_ERROR; i++)
        out->n_by_stop[i] = get(&n->by_stop[i]);
    for (int pool = 0; pool < BE_N_POOLS; pool++) {
        const kv_pool *p = &e->kv.pool[pool];
        out->pages_total[pool] = p->n_page;
        out->pages_used[pool] = atomic_load_explicit(&p->used, memory_order_relaxed);
        out->pages_cached[pool] = atomic_load_explicit(&p->idle, memory_order_relaxed);
    }
    out->heartbeat_age_s = eng_now() - (double)get(&n->heartbeat_ns) * 1e-9;
}
