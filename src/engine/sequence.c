#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/checked.h"
#include "engine/internal.h"

double eng_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- checking ---- */

static orcd_status check_range(const char *name, double v, double lo, double hi, orcd_error *err) {
    if (v >= lo && v <= hi) /* false for NaN */
        return ORCD_OK;
    return orcd_fail(err, ORCD_ERR_ARG, "%s is %g; expected %g to %g", name, v, lo, hi);
}

static orcd_status check_sampling(const eng *e, const samp_params *p, orcd_error *err) {
    ORCD_TRY(check_range("temperature", p->temperature, 0, 2, err));
    ORCD_TRY(check_range("top_p", p->top_p, 0, 1, err));
    ORCD_TRY(check_range("min_p", p->min_p, 0, 1, err));
    ORCD_TRY(check_range("top_k", p->top_k, 0, e->cfg.n_vocab, err));
    ORCD_TRY(check_range("repetition_penalty", p->repetition_penalty, 1e-6, 1e6, err));
    ORCD_TRY(check_range("presence_penalty", p->presence_penalty, -2, 2, err));
    return check_range("frequency_penalty", p->frequency_penalty, -2, 2, err);
}

static orcd_status check(const eng *e, const eng_request *r, orcd_error *err) {
    int n_ctx = e->info.n_ctx;
    if (!r->prompt || r->n_prompt < 1)
        return orcd_fail(err, ORCD_ERR_ARG, "the prompt has no tokens");
    if (r->n_prompt >= (size_t)n_ctx)
        return orcd_fail_at(err, ORCD_ERR_LIMIT, 0,
                            "the prompt has %zu tokens; the context holds %d together with the answer", r->n_prompt,
                            n_ctx);
    for (size_t i = 0; i < r->n_prompt; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= e->cfg.n_vocab)
            return orcd_fail(err, ORCD_ERR_ARG, "prompt token %zu has the id %d; the vocabulary has ids 0 to %d", i,
                             r->prompt[i], e->cfg.n_vocab - 1);
    ORCD_TRY(check_sampling(e, &r->sampling, err));
    if (r->n_stop_id < 0 || r->n_bias < 0 || r->n_boundary < 0 || (r->n_stop_id && !r->stop_id) ||
        (r->n_bias && (!r->bias_id || !r->bias)) || (r->n_boundary && !r->boundary))
        return orcd_fail(err, ORCD_ERR_ARG, "a list of the request has a count but no elements");
    for (int i = 0; i < r->n_bias; i++)
        if (r->bias_id[i] >= (uint32_t)e->cfg.n_vocab || !(fabsf(r->bias[i]) <= 1000))
            return orcd_fail(err, ORCD_ERR_ARG, "logit_bias of token %u is %g; ids go to %d, values from -1000 to 1000",
                             r->bias_id[i], (double)r->bias[i], e->cfg.n_vocab - 1);
    if (r->top_logprobs < -1 || r->top_logprobs > BE_MAX_TOP)
        return orcd_fail(err, ORCD_ERR_ARG, "top_logprobs is %d; expected -1 (none) to %d", r->top_logprobs,
                         BE_MAX_TOP);
    if (r->on_prompt && r->top_logprobs < 0)
        return orcd_fail(err, ORCD_ERR_ARG, "log-probabilities of the prompt need top_logprobs");
    return check_range("the deadline in seconds", r->deadline_s, 0, 1e9, err);
}

/* Most tokens that prompt and answer can come to. */
static orcd_status limit(const eng *e, const eng_request *r, int32_t *n_limit, orcd_error *err) {
    int64_t pages = e->kv.pool[BE_POOL_FULL].n_page, n_ctx = e->info.n_ctx, n = (int64_t)r->n_prompt;
    int64_t memory = pages ? pages * BE_PAGE + 1 : n_ctx; /* the last token is never fed */
    int64_t want = r->max_new > 0 ? n + r->max_new : (n_ctx < memory ? n_ctx : memory);
    want = want < n_ctx ? want : n_ctx;
    if (want > memory || n >= memory)
        return orcd_fail_at(err, ORCD_ERR_LIMIT, 2,
                            "the request asks for %lld positions; the KV memory holds %lld in all: ask for fewer new "
                            "tokens or give it more memory",
                            (long long)want, (long long)memory);
    *n_limit = (int32_t)want;
    return ORCD_OK;
}

/* ---- copying ---- */

static void *put(char **at, const void *src, size_t bytes) {
    void *dst = *at;
    if (bytes)
        memcpy(dst, src, bytes);
    *at += (bytes + 15) & ~(size_t)15;
    return dst;
}

/* Which boundaries are worth an entry: those inside the prompt, the first two and the last ones. */
static void choose_boundaries(eng_request *r) {
    size_t *b = (size_t *)(uintptr_t)r->boundary; /* our own copy */
    int n = 0;
    for (int i = 0; i < r->n_boundary; i++)
        if (b[i] > (n ? b[n - 1] : 0) && b[i] < r->n_prompt)
            b[n++] = b[i];
    if (n > MAX_SAVES) {
        memmove(b + 2, b + n - (MAX_SAVES - 2), (MAX_SAVES - 2) * sizeof *b);
        n = MAX_SAVES;
    }
    r->n_boundary = n;
}

/* ---- edits: what bias and penalties change ---- */

static bool has_penalties(const samp_params *p) {
    return p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
}

static int compare_id(const void *a, const void *b) {
    int32_t x = ((const be_edit *)a)->id, y = ((const be_edit *)b)->id;
    return (x > y) - (x < y);
}

/* Most edits that there can be. */
static size_t room_for_edits(const eng_request *r, int32_t n_limit) {
    if (!has_penalties(&r->sampling))
        return (size_t)r->n_bias;
    return (size_t)r->n_bias + (size_t)n_limit - (r->sampling.repetition_penalty != 1 ? 0 : r->n_prompt);
}

/* Before anything is generated. */
static void list_edits(seq *s) {
    int32_t n = 0, kept = 0;
    for (int i = 0; i < s->r.n_bias; i++)
        s->edit[n++] = (be_edit){.id = (int32_t)s->r.bias_id[i], .bias = s->r.bias[i]};
    for (size_t i = 0; s->r.sampling.repetition_penalty != 1 && i < s->r.n_prompt; i++)
        s->edit[n++] = (be_edit){.id = s->token[i], .in_prompt = true};
    qsort(s->edit, (size_t)n, sizeof *s->edit, compare_id);
    for (int32_t i = 0; i < n; i++) {
        be_edit *last = kept ? &s->edit[kept - 1] : NULL;
        if (last && last->id == s->edit[i].id) {
            last->bias += s->edit[i].bias;
            last->in_prompt |= s->edit[i].in_prompt;
        } else {
            s->edit[kept++] = s->edit[i];
        }
    }
    s->n_edit = kept;
}

/* A token is generated or, by = -1, taken back. */
static void count_generated(seq *s, int32_t id, int by) {
    int32_t lo = 0, hi = s->n_edit;
    if (!has_penalties(&s->r.sampling))
        return;
    while (lo < hi) {
        int32_t mid = lo + (hi - lo) / 2;
        if (s->edit[mid].id < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    be_edit *at = &s->edit[lo];
    if (lo == s->n_edit || at->id != id) {
        memmove(at + 1, at, (size_t)(s->n_edit++ - lo) * sizeof *at);
        *at = (be_edit){.id = id};
    }
    at->n_new += by;
    if (at->n_new == 0 && !at->in_prompt && at->bias == 0) /* there is no more room than for what is known */
        memmove(at, at + 1, (size_t)(--s->n_edit - lo) * sizeof *at);
}

/* ---- a request's life ---- */

orcd_status seq_new(const eng *e, const eng_request *r, seq **out, orcd_error *err) {
    int32_t n_limit = 0, end[4];
    int n_end = e->tok ? tok_ends(e->tok, end) : 0;
    *out = NULL;
    ORCD_TRY(check(e, r, err));
    ORCD_TRY(limit(e, r, &n_limit, err));
    size_t stop = (size_t)r->n_stop_id * sizeof *r->stop_id, bound = (size_t)r->n_boundary * sizeof *r->boundary;
    size_t bias_id = (size_t)r->n_bias * sizeof *r->bias_id, bias = (size_t)r->n_bias * sizeof *r->bias;
    size_t n_edit = room_for_edits(r, n_limit);
    seq *s = calloc(1, sizeof *s);
    if (s) {
        s->token = malloc((size_t)n_limit * sizeof *s->token);
        s->edit = malloc((n_edit + 1) * sizeof *s->edit);
        s->copies = malloc(stop + bound + bias_id + bias + sizeof end + 5 * 16);
    }
    if (!s || !s->token || !s->copies || !s->edit) {
        seq_free(s);
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory for a request of %zu tokens", r->n_prompt);
    }
    char *at = s->copies;
    s->r = *r;
    s->r.boundary = put(&at, r->boundary, bound);
    s->r.bias_id = put(&at, r->bias_id, bias_id);
    s->r.bias = put(&at, r->bias, bias);
    s->r.stop_id = put(&at, r->stop_id, stop);
    if (r->n_stop_id == 0) {
        s->r.stop_id = put(&at, end, (size_t)n_end * sizeof *end);
        s->r.n_stop_id = n_end;
    }
    choose_boundaries(&s->r);
    if (!r->has_seed) {
        if (getrandom(&s->r.sampling.seed, sizeof s->r.sampling.seed, 0) < 0)
            s->r.sampling.seed = (uint64_t)(eng_now() * 1e9);
        s->r.sampling.seed >>= 11; /* 53 bits: a number that every JSON reader keeps */
    }
    memcpy(s->token, r->prompt, r->n_prompt * sizeof *s->token);
    s->r.prompt = s->token;
    list_edits(s);
    s->n_limit = n_limit;
    s->n_tok = s->n_told = (int32_t)r->n_prompt;
    s->slot = s->n_said = -1;
    s->t_submit = eng_now();
    *out = s;
    return ORCD_OK;
}

void seq_free(seq *s) {
    if (!s)
        return;
    free(s->token);
    free(s->edit);
    free(s->copies);
    free(s);
}

void seq_end(eng *e, seq *s, eng_stop why, const orcd_error *error) {
    int32_t n_prompt = (int32_t)s->r.n_prompt;
    double now = eng_now(), start = s->t_start > 0 ? s->t_start : now, first = s->t_first > 0 ? s->t_first : now;
    eng_result res = {.stop = why,
                      .n_prompt = n_prompt,
                      .n_cached = s->n_cached,
                      .n_new = s->n_told - n_prompt,
                      .queue_s = start - s->t_submit,
                      .prefill_s = s->t_start > 0 ? first - start : 0,
                      .decode_s = s->t_first > 0 ? s->t_last - s->t_first : 0,
                      .seed = s->r.sampling.seed};
    if (error && why == ENG_STOP_ERROR)
        res.error = *error;
    eng_count(&e->n.by_stop[why], 1);
    if (s->r.on_done)
        s->r.on_done(s->r.ctx, &res);
    seq_free(s);
    e->in_callbacks += eng_now() - now;
}

void seq_prefilled(eng *e, seq *s) {
    int32_t n_prompt = (int32_t)s->r.n_prompt, n_done = s->n_fed < n_prompt ? s->n_fed : n_prompt;
    double t0 = eng_now();
    if (s->r.on_prefill && n_done > s->n_said)
        s->r.on_prefill(s->r.ctx, n_done, n_prompt);
    s->n_said = n_done > s->n_said ? n_done : s->n_said;
    e->in_callbacks += eng_now() - t0;
}

/* ---- generating ---- */

const uint32_t *seq_mask(eng *e, const seq *s) {
    double t0 = eng_now();
    const uint32_t *mask = s->r.mask ? s->r.mask(s->r.ctx) : NULL;
    e->in_callbacks += eng_now() - t0;
    return mask;
}

be_sample seq_sample(const eng *e, const seq *s, int32_t next, bool scores) {
    const samp_params *p = &s->r.sampling;
    be_sample row = {
        .likely = s->r.top_logprobs >= 0, .n_top = seq_n_top(e, s), .given = scores, .id = scores ? s->token[next] : 0};
    if (scores)
        return row;
    row.temperature = p->temperature;
    row.top_p = p->top_p;
    row.min_p = p->min_p;
    row.top_k = p->top_k;
    row.seed = p->seed;
    row.draw = (uint64_t)next - s->r.n_prompt;
    row.masked = s->r.mask != NULL;
    row.edit = s->edit;
    row.n_edit = s->n_edit;
    row.penalties = has_penalties(p);
    row.repetition = p->repetition_penalty;
    row.presence = p->presence_penalty;
    row.frequency = p->frequency_penalty;
    return row;
}

static void append(seq *s, int32_t id) {
    s->token[s->n_tok++] = id;
    count_generated(s, id, 1);
}

bool seq_wants_best(const seq *s) {
    const samp_params *p = &s->r.sampling;
    bool edited = s->r.mask || s->r.n_bias > 0 || has_penalties(p);
    return samp_is_greedy(p) && !edited && s->r.top_logprobs < 0;
}

static bool is_stop(const seq *s, int32_t id) {
    for (int i = 0; i < s->r.n_stop_id && !s->r.ignore_eos; i++)
        if (s->r.stop_id[i] == id)
            return true;
    return false;
}

/* Report every token that is known but not told yet; a verdict may append more. */
static bool tell(eng *e, seq *s, eng_token *t, bool sampled, eng_stop *why) {
    while (s->n_told < s->n_tok) {
        t->id = s->token[s->n_told];
        t->index = s->n_told - (int32_t)s->r.n_prompt;
        t->forced = !sampled;
        s->n_told++;
        eng_count(&e->n.tokens_out, 1);
        eng_verdict v = {ENG_GO, NULL, 0};
        double t0 = eng_now();
        if (s->r.on_token)
            v = s->r.on_token(s->r.ctx, t);
        e->in_callbacks += eng_now() - t0;
        bool replace = v.action == ENG_REPLACE && sampled && v.n > 0;
        if (replace) {
            s->n_told = --s->n_tok;
            count_generated(s, t->id, -1);
            s->n_fed = s->n_fed < s->n_tok ? s->n_fed : s->n_tok; /* a step ahead has fed it already */
        }
        s->turned |= replace || v.action == ENG_FORCE;
        if (v.action == ENG_FORCE || v.action == ENG_REPLACE)
            for (int i = 0; i < v.n && s->n_tok < s->n_limit; i++)
                if (v.id[i] >= 0 && v.id[i] < e->cfg.n_vocab)
                    append(s, v.id[i]);
        if (sampled && is_stop(s, t->id) && v.action != ENG_FORCE && !replace) {
            *why = ENG_STOP_EOS;
            return false;
        }
        if (v.action == ENG_END) {
            *why = ENG_STOP_CALLER;
            return false;
        }
        sampled = false;
        t->logprob = 0;
        t->n_top = 0;
    }
    *why = ENG_STOP_LENGTH;
    return s->n_tok < s->n_limit;
}

orcd_status seq_draw(eng *e, const seq *s, const float *logits, int32_t *id, orcd_error *err) {
    samp_input in = {.logits = logits,
                     .params = &s->r.sampling,
                     .draw = (uint64_t)s->n_tok - s->r.n_prompt,
                     .seen = s->token,
                     .n_seen = (size_t)s->n_tok,
                     .n_prompt = s->r.n_prompt,
                     .bias_id = s->r.bias_id,
                     .bias = s->r.bias,
                     .n_bias = s->r.n_bias,
                     .mask = seq_mask(e, s)};
    return samp_draw(e->samp, &in, id, err);
}

static void look_up(const eng *e, const seq *s, const be_likely *l, eng_token *t, eng_logprob *best) {
    float all = samp_log_sum(l);
    t->logprob = l->logit - all;
    t->top = best;
    t->n_top = seq_n_top(e, s);
    for (int i = 0; i < t->n_top; i++)
        best[i] = (eng_logprob){l->top_id[i], l->top[i] - all};
}

void seq_score(eng *e, seq *s, int32_t at, const be_likely *likely) {
    eng_logprob best[BE_MAX_TOP];
    eng_token t = {.id = s->token[at], .index = at, .logprob = NAN, .top = best};
    if (at != s->n_scored) /* told before it gave way to others */
        return;
    if (likely)
        look_up(e, s, likely, &t, best);
    s->n_scored++;
    double t0 = eng_now();
    s->r.on_prompt(s->r.ctx, &t);
    e->in_callbacks += eng_now() - t0;
}

bool seq_take(eng *e, seq *s, int32_t id, const be_likely *likely, eng_stop *why) {
    eng_logprob best[BE_MAX_TOP];
    eng_token t = {.top = best};
    if (likely)
        look_up(e, s, likely, &t, best);
    s->t_last = eng_now();
    if (s->t_first <= 0)
        s->t_first = s->t_last;
    append(s, id);
    s->turned = false;
    return tell(e, s, &t, true, why);
}
