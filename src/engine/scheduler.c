/* The engine thread. Every step is one flat batch: one row of each sequence that decodes, and slices of the prompts
 * (or of forced tokens) of the others, as many rows as the time target of a step allows.
 *
 * Where the device samples, the thread runs one step ahead: a step is submitted whose decoding rows are "whatever the
 * last step samples", and only then the tokens of the last step are read. A sequence that turns out to have ended, or
 * to be forced elsewhere, has one row too many in the open step; its token is dropped. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/internal.h"

#define IDLE_BEAT_S 0.25   /* an idle thread still shows that it lives */
#define IDLE_SAVE_S 0.03   /* what it writes to disk at a time, so that a request waits little */
#define CLOSE_SAVE_S 5.0   /* what is not on disk by then is computed anew after the next start */
#define QUEUE_LOOK_S 0.02  /* how often the queue is searched for deadlines */
#define STEP_TARGET_S 0.08 /* of a step that only prefills, so that a cancel is noticed within 100 ms */
#define STEP_BESIDE_S 0.04 /* of a step that prefills beside decoding, or, if that is longer, */
#define SLOWDOWN 4         /* so many times a pure decode step */
#define STEP_LONGEST_S 1.0 /* beyond this even the smallest good slice is cut */
#define MIN_SLICE 16       /* prefill rows that are always worth a step */
#define GOOD_SLICE 512     /* that are, where nobody decodes */
#define GROWTH 512         /* tokens that an answer of unknown length is expected to grow by */
#define GROWTH_MOST 2048   /* more are not kept for one with a limit either: many clients always ask for very many */
#define RESIDENT_S 60.0    /* how often the device is asked where the model's memory lies */
#define SMOOTH 0.2         /* weight of the newest step in the running means */

static void set_int(atomic_int *v, int n) { atomic_store_explicit(v, n, memory_order_relaxed); }

static void beat(eng *e, double now) {
    atomic_store_explicit(&e->n.heartbeat_ns, (uint64_t)(now * 1e9), memory_order_relaxed);
}

/* ---- who runs ---- */

static void start(eng *e, seq *s, int slot) {
    pthread_mutex_lock(&e->lock);
    e->slot[slot] = s;
    pthread_mutex_unlock(&e->lock);
    s->slot = slot;
    e->order[e->n_running++] = s;
    set_int(&e->n.running, e->n_running);
    if (s->n_said < 0) { /* for the first time */
        s->t_start = eng_now();
        s->n_cached = s->n_fed;
        eng_count(&e->n.tokens_in, s->r.n_prompt);
        eng_count(&e->n.tokens_cached, (uint64_t)s->n_cached);
    }
    while (s->next_boundary < s->r.n_boundary && s->r.boundary[s->next_boundary] <= (size_t)s->n_fed)
        s->next_boundary++;
    seq_prefilled(e, s);
    if (s->r.on_prompt)
        seq_score(e, s, 0, NULL);
}

/* Whatever an open step still samples for s is of no use. */
static void forget_awaited(eng *e, seq *s) {
    for (int f = 0; f < 2; f++)
        for (int k = 0; k < e->flight[f].n_out; k++)
            if (e->flight[f].seq[k] == s)
                e->flight[f].seq[k] = NULL;
    s->awaits = NULL;
}

/* Take a sequence out of its slot; the cache may keep what it has computed. */
static void take_out(eng *e, seq *s, bool keep) {
    forget_awaited(e, s);
    if (e->cache) {
        if (keep)
            prefix_save(e->cache, s->slot, s->token, s->n_fed, s->r.cache_salt, &s->cursor);
        prefix_leave(e->cache, &s->cursor);
    }
    kv_release(&e->kv, s->slot);
    if (e->cache)
        prefix_trim(e->cache);
    pthread_mutex_lock(&e->lock);
    e->slot[s->slot] = NULL;
    pthread_mutex_unlock(&e->lock);
    int i = 0;
    while (e->order[i] != s)
        i++;
    memmove(&e->order[i], &e->order[i + 1], (size_t)(--e->n_running - i) * sizeof *e->order);
    set_int(&e->n.running, e->n_running);
}

static void finish(eng *e, seq *s, eng_stop why, const orcd_error *error) {
    take_out(e, s, why != ENG_STOP_ERROR);
    e->may_admit = true;
    seq_end(e, s, why, error);
}

/* s loses its place and goes on later, as the first that waits: what the cache forgets meanwhile is computed again,
 * with the same results. */
static void preempt(eng *e, seq *s) {
    take_out(e, s, true);
    s->n_fed = 0;
    pthread_mutex_lock(&e->lock);
    e->queue_head = (e->queue_head + e->queue_cap - 1) % e->queue_cap;
    e->queue[e->queue_head] = s;
    set_int(&e->n.waiting, ++e->n_queue);
    pthread_mutex_unlock(&e->lock);
    eng_count(&e->n.preempted, 1);
}

/* Pages to map before s has n_pos positions. */
static int pages_until(const eng *e, const seq *s, int32_t n_pos) {
    int n = kv_n_index(n_pos) - e->kv.end[BE_POOL_FULL][s->slot];
    return e->kv.pool[BE_POOL_FULL].n_page && n > 0 ? n : 0;
}

/* Pages that are kept for s when others want to start. */
static int pages_to_come(const eng *e, const seq *s) {
    int32_t most = s->r.max_new > 0 ? GROWTH_MOST : GROWTH, left = s->n_limit - 1 - s->n_tok;
    return pages_until(e, s, s->n_tok + (left < most ? left : most));
}

/* There is room for everyone running as far as can be foreseen, and for s too, whose slot maps what it shares. */
static bool fits(const eng *e, const seq *s) {
    int need = pages_to_come(e, s);
    for (int i = 0; i < e->n_running; i++)
        need += pages_to_come(e, e->order[i]);
    return need <= kv_available(&e->kv, BE_POOL_FULL);
}

/* Someone is computing just now what s begins with: several answers to one prompt, say. n_pos: what is cached. */
static bool soon_cached(const eng *e, const seq *s, int32_t n_pos) {
    for (int i = 0; i < e->n_running; i++) {
        const seq *r = e->order[i];
        size_t n = r->r.n_prompt;
        if ((size_t)r->n_fed < n && n <= s->r.n_prompt && n >= (size_t)n_pos + BE_PAGE &&
            r->r.cache_salt == s->r.cache_salt && memcmp(r->token, s->token, n * sizeof *s->token) == 0)
            return true;
    }
    return false;
}

/* Give s the free slot, with the longest prefix that the cache has. False: not now. */
static bool place(eng *e, seq *s, int slot) {
    s->slot = slot;
    if (!e->cache || seq_scores(s))
        return fits(e, s);
    bool fresh = s->n_said < 0;
    prefix_hit hit = prefix_find(e->cache, s->token, s->n_tok, s->r.cache_salt);
    if (fresh && soon_cached(e, s, hit.n_pos))
        return false;
    eng_count(&e->n.lookups, fresh);
    if (hit.n_pos > 0) {
        prefix_pin(e->cache, &hit, s->token, s->r.cache_salt, slot, &s->cursor);
        if (fits(e, s) && prefix_fork(e->cache, &hit, slot)) {
            s->n_fed = hit.n_pos;
            eng_count(&e->n.hits, fresh);
            return true;
        }
        prefix_unpin(e->cache, &hit, slot, &s->cursor);
        if (e->n_running > 0) /* alone it must not wait for what only the cache holds */
            return false;
    }
    return fits(e, s);
}

static seq *head_of_queue(eng *e) {
    pthread_mutex_lock(&e->lock);
    seq *s = e->n_queue ? e->queue[e->queue_head] : NULL;
    pthread_mutex_unlock(&e->lock);
    return s;
}

static void admit(eng *e) {
    while (e->may_admit && e->n_running < e->info.max_batch) {
        seq *s = head_of_queue(e);
        int slot = 0;
        while (e->slot[slot])
            slot++;
        if (!s || !place(e, s, slot)) {
            e->may_admit = false; /* until a sequence ends, a prompt is done, or one comes */
            return;
        }
        pthread_mutex_lock(&e->lock);
        e->queue_head = (e->queue_head + 1) % e->queue_cap;
        set_int(&e->n.waiting, --e->n_queue);
        pthread_mutex_unlock(&e->lock);
        start(e, s, slot);
    }
}

/* ---- who stops without a token ---- */

static bool expired(const seq *s, double now, bool closing, eng_stop *why) {
    *why = ENG_STOP_CANCELLED;
    if (closing || atomic_load_explicit(&s->cancelled, memory_order_relaxed))
        return true;
    *why = ENG_STOP_DEADLINE;
    return s->r.deadline_s > 0 && now - s->t_submit > s->r.deadline_s;
}

/* The first waiting sequence that must go, taken out of the queue; NULL when there is none. */
static seq *take_expired(eng *e, double now, bool closing, eng_stop *why) {
    seq *found = NULL;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_queue; i++) {
        seq **at = &e->queue[(e->queue_head + i) % e->queue_cap];
        if (found)
            e->queue[(e->queue_head + i - 1) % e->queue_cap] = *at;
        else if (expired(*at, now, closing, why))
            found = *at;
    }
    if (found)
        set_int(&e->n.waiting, --e->n_queue);
    pthread_mutex_unlock(&e->lock);
    return found;
}

static void sweep(eng *e, double now, bool closing, bool poked) {
    eng_stop why;
    for (int i = e->n_running; i-- > 0;)
        if (expired(e->order[i], now, closing, &why))
            finish(e, e->order[i], why, NULL);
    if (!closing && !poked && now < e->look_at)
        return;
    e->look_at = now + QUEUE_LOOK_S;
    for (seq *s; (s = take_expired(e, now, closing, &why));) {
        e->may_admit = true;
        seq_end(e, s, why, NULL);
    }
}

/* ---- one step ---- */

static int pace_of(int rows) {
    int k = 31 - __builtin_clz((unsigned)rows);
    return k < N_PACE ? k : N_PACE - 1;
}

/* Seconds that a step of so many rows takes: on the line between the sizes that were seen, in proportion beyond. */
static double step_seconds(const eng *e, double rows) {
    const pace *below = NULL, *above = NULL;
    for (int k = 0; k < N_PACE && !above; k++) {
        const pace *p = &e->pace[k];
        if (p->s > 0 && p->rows <= rows)
            below = p;
        else if (p->s > 0)
            above = p;
    }
    if (!below || !above)
        return below ? below->s * rows / below->rows : above ? above->s : 0;
    return below->s + (above->s - below->s) * (rows - below->rows) / (above->rows - below->rows);
}

/* The most rows, from `least` to `most`, of a step that takes at most so long; at worst `least`. */
static int rows_within(const eng *e, double seconds, int least, int most) {
    while (least < most) {
        int mid = least + (most - least + 1) / 2;
        if (step_seconds(e, mid) <= seconds)
            least = mid;
        else
            most = mid - 1;
    }
    return least;
}

/* Rows of prefill that this step may carry beside n_decode rows of decoding. */
static int prefill_rows(const eng *e, int n_decode) {
    int most = e->info.chunk;
    if (n_decode && e->pace[pace_of(n_decode)].s <= 0) /* measure a step without prefill first */
        return 0;
    if (step_seconds(e, MIN_SLICE) <= 0)
        return most < 4 * MIN_SLICE ? most : 4 * MIN_SLICE;
    double beside = fmax(SLOWDOWN * step_seconds(e, n_decode), STEP_BESIDE_S);
    int slice = n_decode + MIN_SLICE, least = n_decode ? slice : most < 4 * GOOD_SLICE ? most / 4 : GOOD_SLICE;
    int longest = rows_within(e, STEP_LONGEST_S, slice, n_decode + most);
    least = least < longest ? least : longest;
    int rows = rows_within(e, n_decode ? beside : STEP_TARGET_S, least, longest) - n_decode;
    return rows < most ? rows : most;
}

/* The token that is awaited is the last there can be. */
static bool awaits_last(const seq *s) { return s->awaits && s->n_tok + 1 >= s->n_limit; }

static int left_to_share(const seq *s) { return seq_decodes(s) ? 0 : seq_pending(s) - s->rows; }

/* Give s up to n rows more; how many it takes. outs: output rows beyond one for each sequence. */
static int give(seq *s, int n, int *outs) {
    int left = left_to_share(s);
    n = n < left ? n : left;
    if (seq_scores(s)) { /* each row has an output */
        int extra = s->rows ? n : n - 1;
        extra = extra < *outs ? extra : *outs;
        n = s->rows ? extra : extra + 1;
        *outs -= extra;
    }
    s->rows += n;
    return n;
}

static seq *shortest_left(const eng *e) {
    seq *best = NULL;
    for (int i = 0; i < e->n_running; i++)
        if (left_to_share(e->order[i]) > 0 && (!best || left_to_share(e->order[i]) < left_to_share(best)))
            best = e->order[i];
    return best;
}

/* Decide how many rows each sequence gets. Prompts are computed one after the other: all at once, all would be ready
 * when the last is. A quarter goes to the shortest, which need not wait for a long one before them. */
static void share_out(eng *e) {
    int n_decode = 0, n_prefill = 0;
    for (int i = 0; i < e->n_running; i++) {
        seq *s = e->order[i];
        bool decodes = seq_decodes(s);
        s->rows = decodes && !awaits_last(s);
        n_decode += s->rows;
        n_prefill += !decodes;
    }
    if (!n_prefill)
        return;
    int rows = prefill_rows(e, n_decode), outs = e->info.max_batch - e->n_running;
    int quick = rows / 4, given;
    for (seq *s; quick > 0 && (s = shortest_left(e)) && (given = give(s, quick, &outs)) > 0; quick -= given)
        rows -= given;
    for (int i = 0; i < e->n_running && rows > 0; i++)
        if (left_to_share(e->order[i]) > 0)
            rows -= give(e->order[i], rows, &outs);
}

/* Pages for the rows of this step: where they do not suffice, the youngest go, never the oldest, which therefore comes
 * to its end; alone it always has room. */
static void make_room(eng *e) {
    for (;;) {
        int need = 0;
        for (int i = 0; i < e->n_running; i++)
            need += pages_until(e, e->order[i], e->order[i]->rows ? e->order[i]->n_fed + e->order[i]->rows : 0);
        if (need <= kv_available(&e->kv, BE_POOL_FULL) || e->n_running < 2)
            return;
        preempt(e, e->order[e->n_running - 1]);
    }
}

/* Which of the rows just laid out for s have an output: the last one, when the next token follows it, and those that
 * score the prompt. */
static void lay_out_outputs(eng *e, seq *s, be_batch *b, flight *f) {
    for (int k = seq_scores(s) ? 0 : s->rows - 1; k < s->rows; k++) {
        int32_t next = s->n_fed + k + 1;
        bool scores = seq_scores(s) && next < (int32_t)s->r.n_prompt;
        if (!scores && (k < s->rows - 1 || s->rows < seq_pending(s)))
            continue;
        e->sample[b->n_out] = seq_sample(e, s, next, scores);
        f->likely |= e->sample[b->n_out].likely;
        f->masked |= e->sample[b->n_out].masked;
        b->best &= !scores && seq_wants_best(s);
        f->seq[b->n_out] = s;
        f->score[b->n_out] = scores ? next : 0;
        e->out_row[b->n_out++] = b->n_tok - s->rows + k;
    }
}

/* Lay the rows out and map their pages. A sequence for which no page is left ends here. */
static void lay_out(eng *e, be_batch *b, flight *f) {
    *b = (be_batch){.token = e->row_token, .pos = e->row_pos, .slot = e->row_slot, .out_row = e->out_row, .best = true};
    f->n_out = f->n_decode = f->n_prefill = 0;
    f->likely = f->masked = false;
    for (int i = 0; i < e->n_running; i++) {
        seq *s = e->order[i];
        if (s->rows && !kv_extend(&e->kv, s->slot, s->n_fed + s->rows)) {
            orcd_error err;
            orcd_fail(&err, ORCD_ERR_INTERNAL, "internal error: no KV page was left for an admitted request");
            finish(e, s, ENG_STOP_ERROR, &err);
            i--;
            continue;
        }
        *(seq_decodes(s) ? &f->n_decode : &f->n_prefill) += s->rows;
        for (int k = 0; k < s->rows; k++, b->n_tok++) {
            int32_t at = s->n_fed + k;
            e->row_token[b->n_tok] = at < s->n_tok ? s->token[at] : BE_TOKEN_OF(s->awaited);
            e->row_pos[b->n_tok] = at;
            e->row_slot[b->n_tok] = s->slot;
        }
        if (s->rows)
            lay_out_outputs(e, s, b, f);
    }
    f->n_out = b->n_out;
}

static orcd_status submit(eng *e, const be_batch *b, flight *f, bool sample, orcd_error *err) {
    const be_ops *ops = e->dev->ops;
    be_step *step;
    f->t_submit = eng_now();
    orcd_status st = ops->step_begin(e->dev, e->kv.kv, b, &step, err);
    if (st == ORCD_OK) {
        f->logits = arch_forward(e->model, step);
        if (sample)
            ops->sample(step, f->logits, e->sample);
        st = ops->step_end(step, err);
    }
    if (st == ORCD_OK && e->reads_file)
        st = eng_check_file(e, err);
    e->in_model += eng_now() - f->t_submit;
    return st;
}

static void mean(double *v, double x) { *v = *v > 0 ? *v + SMOOTH * (x - *v) : x; }

/* The step is done: learn what its rows cost. What larger and smaller steps cost is bounded by it: they may have been
 * slow once, and a size that seems too slow is never tried again. */
static void measure(eng *e, const flight *f) {
    double now = eng_now(), seconds = now - fmax(f->t_submit, e->t_ready);
    int rows = f->n_prefill + f->n_decode, at = pace_of(rows);
    pace *p = &e->pace[at];
    eng_work_kind kind = f->n_prefill == 0 ? ENG_DECODE : f->n_decode == 0 ? ENG_PREFILL : ENG_MIXED;
    e->t_ready = now;
    eng_count(&e->n.work_steps[kind], 1);
    eng_count(&e->n.work_decode[kind], (uint64_t)f->n_decode);
    eng_count(&e->n.work_prefill[kind], (uint64_t)f->n_prefill);
    eng_count(&e->n.work_ns[kind], (uint64_t)(seconds * 1e9));
    mean(&p->rows, rows);
    mean(&p->s, seconds);
    for (int k = 0; k < N_PACE; k++) {
        pace *q = &e->pace[k];
        double most = k < at ? p->s : p->s * q->rows / p->rows;
        q->s = k != at && q->s > most ? most : q->s;
    }
}

/* Wait for the open step's tokens. */
static orcd_status read_open(eng *e, orcd_error *err) {
    double t0 = eng_now();
    be_likely *likely = e->open->likely ? e->likely : NULL;
    e->open = NULL;
    orcd_status st = e->dev->ops->sampled(e->dev, e->sampled, likely, err);
    e->in_model += eng_now() - t0;
    return st;
}

/* Every sequence of a failed step ends; a lost device or model file ends the engine. */
static void fail_step(eng *e, const orcd_error *error) {
    orcd_error unread;
    bool lost = error->code == ORCD_ERR_DEVICE || error->code == ORCD_ERR_IO;
    if (e->open && read_open(e, &unread) != ORCD_OK)
        lost |= unread.code == ORCD_ERR_DEVICE;
    if (lost) {
        e->failure = *error;
        atomic_store_explicit(&e->n.failed, true, memory_order_release);
    }
    for (int i = e->n_running; i-- > 0;)
        if (lost || e->order[i]->rows || e->order[i]->awaits)
            finish(e, e->order[i], ENG_STOP_ERROR, error);
    for (seq *s; lost && (s = take_expired(e, 0, true, &(eng_stop){0}));)
        seq_end(e, s, ENG_STOP_ERROR, error);
}

/* The rows are computed: move on, and remember what is worth it while its pages are still mapped. */
static void advance(eng *e, seq *s) {
    int32_t n_prompt = (int32_t)s->r.n_prompt;
    bool prefill = s->n_fed < n_prompt;
    s->n_fed += s->rows;
    if (e->cache && prefill) {
        while (s->next_boundary < s->r.n_boundary && s->r.boundary[s->next_boundary] <= (size_t)s->n_fed)
            prefix_save(e->cache, s->slot, s->token, (int32_t)s->r.boundary[s->next_boundary++], s->r.cache_salt,
                        &s->cursor);
        if (s->n_fed >= n_prompt) {
            e->may_admit = true;
            prefix_save(e->cache, s->slot, s->token, n_prompt, s->r.cache_salt, &s->cursor);
        }
    }
    kv_slide(&e->kv, s->slot, s->n_fed);
    if (prefill)
        seq_prefilled(e, s);
}

static orcd_status logits_row(eng *e, const be_act *logits, int row, const float **out, orcd_error *err) {
    const float *host = e->dev->ops->act_host(e->dev, logits);
    *out = host ? host + (int64_t)row * e->cfg.n_vocab : e->logits;
    return host ? ORCD_OK : e->dev->ops->act_read(e->dev, logits, row, 1, e->logits, err);
}

static orcd_status not_a_number(orcd_error *err) {
    return orcd_fail(err, ORCD_ERR_INTERNAL, "numerical error: the model's output is not a number, this request ends");
}

/* The next token of s, from output row k: sampled by the device (id) or, with id NULL, drawn here. False: s ends. */
static bool next_token(eng *e, seq *s, const be_act *act, int k, const int32_t *id, eng_stop *why, orcd_error *err) {
    const float *logits = NULL;
    be_likely own, *likely = s->r.top_logprobs >= 0 ? &e->likely[k] : NULL;
    int32_t drawn = -1;
    *why = ENG_STOP_ERROR;
    if (id) {
        drawn = *id;
    } else {
        if (logits_row(e, act, k, &logits, err) != ORCD_OK || seq_draw(e, s, logits, &drawn, err) != ORCD_OK)
            return false;
        if (likely)
            samp_likely(logits, e->cfg.n_vocab, drawn, seq_n_top(e, s), likely = &own);
    }
    if (drawn < 0 || drawn >= e->cfg.n_vocab) {
        not_a_number(err);
        return false;
    }
    return seq_take(e, s, drawn, likely, why);
}

/* Tell the log-probability that output row k has; false: s ends. */
static bool score(eng *e, seq *s, const flight *f, int k, const int32_t *id, orcd_error *err) {
    const float *logits;
    be_likely own, *likely = &e->likely[k];
    if (id && *id < 0)
        return not_a_number(err) == ORCD_OK;
    if (!id) {
        if (logits_row(e, f->logits, k, &logits, err) != ORCD_OK)
            return false;
        samp_likely(logits, e->cfg.n_vocab, s->token[f->score[k]], seq_n_top(e, s), likely = &own);
    }
    seq_score(e, s, f->score[k], likely);
    return true;
}

/* Hand out the tokens of a step that is done; id as the device sampled them, or NULL. */
static void hand_out(eng *e, flight *f, const int32_t *id) {
    measure(e, f);
    for (int k = 0; k < f->n_out; k++, id += id != NULL) {
        seq *s = f->seq[k];
        eng_stop why;
        orcd_error err;
        if (!s)
            continue;
        if (f->score[k] && score(e, s, f, k, id, &err)) /* another row may have the next token */
            continue;
        if (s->awaits == f)
            s->awaits = NULL;
        f->seq[k] = NULL;
        if (f->score[k])
            finish(e, s, ENG_STOP_ERROR, &err);
        else if (!next_token(e, s, f->logits, k, id, &why, &err))
            finish(e, s, why, &err);
        else if (s->turned)
            forget_awaited(e, s); /* it goes on differently */
    }
    f->n_out = 0;
}

static void collect(eng *e) {
    flight *f = e->open;
    orcd_error err;
    if (read_open(e, &err) == ORCD_OK)
        hand_out(e, f, e->sampled);
    else
        fail_step(e, &err);
}

/* The tokens before the rows of f are known: tell the device what may follow them, and let it draw. */
static orcd_status allow(eng *e, const flight *f, orcd_error *err) {
    for (int k = 0; k < f->n_out; k++)
        e->sample[k].mask = f->seq[k] && e->sample[k].masked ? seq_mask(e, f->seq[k]) : NULL;
    return e->dev->ops->allow(e->dev, e->sample, err);
}

static void step(eng *e) {
    be_batch b;
    orcd_error err;
    flight *f = &e->flight[e->open == &e->flight[0]];
    share_out(e);
    make_room(e);
    lay_out(e, &b, f);
    if (b.n_tok == 0) { /* all await their last token */
        if (e->open)
            collect(e);
        return;
    }
    bool sample = e->dev->ops->sample && b.n_out > 0;
    if (submit(e, &b, f, sample, &err) != ORCD_OK) {
        fail_step(e, &err);
        return;
    }
    for (int i = 0; i < e->n_running; i++)
        if (e->order[i]->rows)
            advance(e, e->order[i]);
    for (int k = 0; k < b.n_out; k++) {
        if (f->score[k])
            continue;
        f->seq[k]->awaits = f;
        f->seq[k]->awaited = k;
    }
    if (e->open)
        collect(e);
    if (!sample)
        hand_out(e, f, NULL);
    else if (f->masked && allow(e, f, &err) != ORCD_OK)
        fail_step(e, &err);
    else
        e->open = f;
}

static void check_resident(eng *e, double now) {
    if (now < e->resident_at || !e->dev->ops->resident)
        return;
    e->resident_at = now + RESIDENT_S;
    atomic_store_explicit(&e->n.astray, e->dev->ops->resident(e->dev, NULL) != ORCD_OK, memory_order_relaxed);
}

/* Sleep while there is nothing to do. */
static void wait_for_work(eng *e, bool *closing, bool *poked) {
    bool saving = false;
    pthread_mutex_lock(&e->lock);
    while (e->n_running == 0 && !e->poked && !e->closing && !(e->n_queue && e->may_admit)) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += saving ? 0 : (long)(IDLE_BEAT_S * 1e9);
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_cond_timedwait(&e->wake, &e->lock, &until) == ETIMEDOUT) {
            pthread_mutex_unlock(&e->lock);
            saving = e->disk && disk_save(e->disk, eng_now() + IDLE_SAVE_S);
            check_resident(e, eng_now());
            pthread_mutex_lock(&e->lock);
        }
        beat(e, eng_now());
        e->may_admit |= e->n_queue > 0; /* alone, the head of the queue always fits */
    }
    *closing = e->closing;
    *poked = e->poked;
    e->poked = false;
    pthread_mutex_unlock(&e->lock);
}

void *eng_loop(void *engine) {
    eng *e = engine;
    bool closing = false, poked;
    e->resident_at = eng_now() + RESIDENT_S; /* loading has looked */
    while (!closing) {
        wait_for_work(e, &closing, &poked);
        double now = eng_now();
        e->in_model = e->in_callbacks = 0;
        beat(e, now);
        e->may_admit |= poked;
        sweep(e, now, closing, poked);
        check_resident(e, now);
        if (!closing && !atomic_load_explicit(&e->n.failed, memory_order_relaxed))
            admit(e);
        if (e->n_running == 0)
            continue;
        step(e);
        eng_count(&e->n.steps, 1);
        eng_count(&e->n.step_ns, (uint64_t)((eng_now() - now) * 1e9));
        eng_count(&e->n.forward_ns, (uint64_t)(e->in_model * 1e9));
        eng_count(&e->n.callback_ns, (uint64_t)(e->in_callbacks * 1e9));
    }
    if (e->disk && !atomic_load_explicit(&e->n.failed, memory_order_relaxed))
        disk_save(e->disk, eng_now() + CLOSE_SAVE_S);
    return NULL;
}
