/* Exact sampling without a full sort. One pass (softmax.h) finds the maximum of every block of 256 logits; those maxima
 * bound the k-th best value from below and let later passes skip blocks, so that only a few candidates are ever
 * ordered. */
#include "engine/sampler.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "engine/softmax.h"

typedef struct cand {
    float x; /* logit */
    float w; /* exp((x - max) / T), at most 1 */
    int32_t id;
} cand;

struct samp {
    const softmax_ops *ops;
    int32_t n_vocab, n_block;
    float *work;     /* [n_vocab]: logits after bias, penalties and mask */
    uint32_t *count; /* [n_vocab]: all zero between draws */
    float *peak;     /* [n_block]: maximum of each block */
    float *select;   /* [n_block]: scratch of the bound */
    double *mass;    /* [n_block]: sum of exp of each block */
    cand *cand;      /* [n_vocab] */
};

void samp_close(samp *s) {
    if (!s)
        return;
    free(s->work);
    free(s->count);
    free(s->peak);
    free(s->select);
    free(s->mass);
    free(s->cand);
    free(s);
}

orcd_status samp_open(int32_t n_vocab, samp **out, orcd_error *err) {
    *out = NULL;
    if (n_vocab < 1)
        return orcd_fail(err, ORCD_ERR_ARG, "a sampler needs a vocabulary, got %d tokens", n_vocab);
    samp *s = calloc(1, sizeof *s);
    if (!s)
        goto oom;
    s->ops = softmax_for(cpu_tier_best());
    s->n_vocab = n_vocab;
    s->n_block = (n_vocab - 1) / SOFTMAX_BLOCK + 1;
    s->work = malloc((size_t)n_vocab * sizeof *s->work);
    s->count = calloc((size_t)n_vocab, sizeof *s->count);
    s->peak = malloc((size_t)s->n_block * sizeof *s->peak);
    s->select = malloc((size_t)s->n_block * sizeof *s->select);
    s->mass = malloc((size_t)s->n_block * sizeof *s->mass);
    s->cand = malloc((size_t)n_vocab * sizeof *s->cand);
    if (!s->work || !s->count || !s->peak || !s->select || !s->mass || !s->cand)
        goto oom;
    *out = s;
    return ORCD_OK;
oom:
    samp_close(s);
    return orcd_fail(err, ORCD_ERR_NOMEM, "no memory for a sampler over %d tokens", n_vocab);
}

static int block_len(int32_t n_vocab, int b) {
    int rest = n_vocab - b * SOFTMAX_BLOCK;
    return rest < SOFTMAX_BLOCK ? rest : SOFTMAX_BLOCK;
}

static int32_t first_equal(const float *x, int32_t n, const float *peak, float value) {
    int b = 0;
    while (peak[b] != value)
        b++;
    for (int32_t i = b * SOFTMAX_BLOCK; i < n; i++)
        if (x[i] == value)
            return i;
    return -1;
}

/* All logits >= bound, in order of id. */
static int collect(const samp *s, const float *x, float max, float inv_t, float bound) {
    float e[SOFTMAX_BLOCK];
    uint32_t bits[SOFTMAX_BLOCK / 32];
    int n = 0;
    for (int b = 0; b < s->n_block; b++) {
        if (s->peak[b] < bound || s->peak[b] == -INFINITY)
            continue;
        const float *block = x + b * SOFTMAX_BLOCK;
        int len = block_len(s->n_vocab, b);
        s->ops->reach(block, len, bound, bits);
        s->ops->weights(block, len, max, inv_t, e);
        for (int w = 0; w < SOFTMAX_BLOCK / 32; w++) {
            for (uint32_t rest = bits[w]; rest; rest &= rest - 1) {
                int i = w * 32 + __builtin_ctz(rest);
                if (block[i] > -INFINITY)
                    s->cand[n++] = (cand){block[i], e[i], b * SOFTMAX_BLOCK + i};
            }
        }
    }
    return n;
}

/* ---- partial ordering of candidates: larger x first, among equals the lower id ---- */

static inline bool before(cand a, cand b) { return a.x > b.x || (a.x == b.x && a.id < b.id); }

static void sort_few(cand *c, int n) {
    for (int i = 1; i < n; i++) {
        cand v = c[i];
        int j = i;
        for (; j > 0 && before(v, c[j - 1]); j--)
            c[j] = c[j - 1];
        c[j] = v;
    }
}

static cand median3(cand a, cand b, cand c) {
    if (before(b, a)) {
        cand t = a;
        a = b;
        b = t;
    }
    return before(c, a) ? a : before(c, b) ? c : b;
}

/* Split c[0, n) so that everything before index r stands before everything from r on; 0 < r < n. */
static int split(cand *c, int n) {
    cand pivot = median3(c[n / 4], c[n / 2], c[n / 4 * 3]);
    int i = 0, j = n - 1;
    for (;;) {
        while (before(c[i], pivot))
            i++;
        while (before(pivot, c[j]))
            j--;
        if (i >= j)
            break;
        cand t = c[i];
        c[i++] = c[j];
        c[j--] = t;
    }
    return i > 0 ? i : 1;
}

static double weigh(const cand *c, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += c[i].w;
    return sum;
}

/* Move to the front of c the fewest best candidates that number `k` or weigh `target` together (whichever comes
 * first), and return how many they are: quickselect by count and by mass. */
static int select_best(cand *c, int n, int k, double target) {
    int first = 0, last = n;
    double done = 0;
    while (last - first > 24) {
        int r = first + split(c + first, last - first);
        double mass = weigh(c + first, r - first);
        if (r >= k || done + mass >= target) {
            last = r;
        } else {
            first = r;
            done += mass;
        }
    }
    sort_few(c + first, last - first);
    while (first < last && first < k && (first == 0 || done < target))
        done += c[first++].w;
    return first;
}

static int compare_desc(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* A value that at least k logits reach: k blocks have a maximum that large. */
static float bound_of_k(samp *s, int k) {
    if (k > s->n_block)
        return -INFINITY;
    memcpy(s->select, s->peak, (size_t)s->n_block * sizeof *s->peak);
    qsort(s->select, (size_t)s->n_block, sizeof *s->select, compare_desc);
    return s->select[k - 1];
}

/* ---- drawing ---- */

/* Inverse of the cumulative distribution over the whole vocabulary, in order of id. */
static int32_t draw_all(samp *s, const float *x, float max, float inv_t, double u) {
    double goal = u * s->ops->sum(x, s->n_vocab, max, inv_t, s->mass);
    int b = 0;
    for (; b + 1 < s->n_block && goal >= s->mass[b]; b++)
        goal -= s->mass[b];
    while (s->mass[b] == 0) /* rounding took the goal past the last block that has any mass */
        b--;
    float e[SOFTMAX_BLOCK];
    int n = block_len(s->n_vocab, b), last = 0;
    s->ops->weights(x + b * SOFTMAX_BLOCK, n, max, inv_t, e);
    for (int i = 0; i < n; i++) {
        if (e[i] <= 0)
            continue;
        last = i;
        if (goal < e[i])
            break;
        goal -= e[i];
    }
    return b * SOFTMAX_BLOCK + last;
}

/* The first n candidates again, in order of id: the order in which every sampler, a device's too, draws. */
static int in_order(samp *s, const float *x, float max, float inv_t, int n) {
    cand last = s->cand[0];
    for (int i = 1; i < n; i++)
        last = before(last, s->cand[i]) ? s->cand[i] : last;
    int kept = 0, all = collect(s, x, max, inv_t, last.x);
    for (int i = 0; i < all; i++)
        if (!before(last, s->cand[i]))
            s->cand[kept++] = s->cand[i];
    return kept;
}

/* Keep the candidates that top-k, top-p and min-p leave. */
static int filter(samp *s, const float *x, float max, float inv_t, const samp_params *p) {
    bool few = p->top_k > 0 && p->top_k < s->n_vocab;
    int n = 0;
    if (few) {
        n = collect(s, x, max, inv_t, bound_of_k(s, p->top_k));
        n = select_best(s->cand, n, p->top_k, INFINITY);
        if (p->top_p < 1)
            n = select_best(s->cand, n, n, p->top_p * weigh(s->cand, n));
    } else if (p->top_p < 1) {
        double target = p->top_p * s->ops->sum(x, s->n_vocab, max, inv_t, NULL);
        float bound, reach = 6; /* most distributions are decided within a few nats of the best */
        do {
            bound = reach < 90 ? max - reach / inv_t : -INFINITY;
            n = collect(s, x, max, inv_t, bound);
            reach *= 2;
        } while (bound > -INFINITY && weigh(s->cand, n) < target);
        n = select_best(s->cand, n, n, target);
    }
    if (few || p->top_p < 1)
        n = in_order(s, x, max, inv_t, n);
    else
        n = collect(s, x, max, inv_t, max + (logf(p->min_p) - 0.01f) / inv_t); /* a little more; exact below */
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (s->cand[i].w >= p->min_p)
            s->cand[kept++] = s->cand[i];
    return kept;
}

static int32_t draw_among(const cand *c, int n, double u) {
    double goal = u * weigh(c, n);
    for (int i = 0; i + 1 < n; i++) {
        if (goal < c[i].w)
            return c[i].id;
        goal -= c[i].w;
    }
    return c[n - 1].id;
}

/* ---- bias, penalties, mask ---- */

static bool wants_edit(const samp_input *in) {
    const samp_params *p = in->params;
    return in->n_bias > 0 || in->mask || p->repetition_penalty != 1 || p->presence_penalty != 0 ||
           p->frequency_penalty != 0;
}

static void penalise(samp *s, const samp_input *in) {
    const samp_params *p = in->params;
    bool repetition = p->repetition_penalty != 1;
    size_t from = repetition ? 0 : in->n_prompt;
    for (size_t i = from; i < in->n_seen; i++) {
        int32_t id = in->seen[i];
        if (id >= 0 && id < s->n_vocab)
            s->count[id] = (s->count[id] | 1) + (i >= in->n_prompt ? 2 : 0); /* bit 0: seen; above: generated */
    }
    for (size_t i = from; i < in->n_seen; i++) {
        int32_t id = in->seen[i];
        if (id < 0 || id >= s->n_vocab || !s->count[id])
            continue;
        float v = s->work[id], generated = (float)(s->count[id] >> 1);
        if (repetition)
            v = v > 0 ? v / p->repetition_penalty : v * p->repetition_penalty;
        if (generated > 0)
            v -= p->presence_penalty + p->frequency_penalty * generated;
        s->work[id] = v;
        s->count[id] = 0;
    }
}

static void edit(samp *s, const samp_input *in) {
    const samp_params *p = in->params;
    memcpy(s->work, in->logits, (size_t)s->n_vocab * sizeof *s->work);
    for (int i = 0; i < in->n_bias; i++)
        if (in->bias_id[i] < (uint32_t)s->n_vocab)
            s->work[in->bias_id[i]] += in->bias[i];
    if (p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0)
        penalise(s, in);
    for (int32_t i = 0; in->mask && i < s->n_vocab; i += 32) {
        uint32_t word = in->mask[i / 32];
        int32_t end = s->n_vocab - i < 32 ? s->n_vocab - i : 32;
        for (int32_t j = 0; word != UINT32_MAX && j < end; j++)
            if (!(word >> j & 1))
                s->work[i + j] = -INFINITY;
    }
}

bool samp_is_greedy(const samp_params *p) {
    return p->temperature <= 0 || !isfinite(1 / p->temperature) || p->top_k == 1 || p->top_p <= 0;
}

orcd_status samp_draw(samp *s, const samp_input *in, int32_t *id, orcd_error *err) {
    const samp_params *p = in->params;
    const float *x = in->logits;
    *id = -1;
    float max = s->ops->peaks(x, s->n_vocab, s->peak);
    if (max == max && wants_edit(in)) {
        edit(s, in);
        x = s->work;
        max = s->ops->peaks(x, s->n_vocab, s->peak);
    }
    if (!isfinite(max))
        return orcd_fail(err, ORCD_ERR_INTERNAL, "numerical error: %s",
                         max == -INFINITY ? "no token is allowed here"
                                          : "the model's output is not a number, this request ends");
    if (samp_is_greedy(p)) {
        *id = first_equal(x, s->n_vocab, s->peak, max);
        return ORCD_OK;
    }
    float inv_t = 1 / p->temperature;
    double u = rng_uniform(p->seed, 0, in->draw);
    if ((p->top_k <= 0 || p->top_k >= s->n_vocab) && p->top_p >= 1 && p->min_p <= 0) {
        *id = draw_all(s, x, max, inv_t, u);
    } else {
        int n = filter(s, x, max, inv_t, p);
        *id = draw_among(s->cand, n, u);
    }
    return ORCD_OK;
}

/* Into the list of the n largest so far, behind equal ones. */
static void insert(float x, int32_t id, int *kept, int n, int32_t *top_id, float *top) {
    int j = *kept < n ? (*kept)++ : n - 1;
    for (; j > 0 && x > top[j - 1]; j--) {
        top[j] = top[j - 1];
        top_id[j] = top_id[j - 1];
    }
    top[j] = x;
    top_id[j] = id;
}

void samp_likely(const float *logits, int32_t n_vocab, int32_t id, int n, be_likely *out) {
    const softmax_ops *ops = softmax_for(cpu_tier_best());
    out->logit = id >= 0 && id < n_vocab ? logits[id] : -INFINITY;
    out->max = ops->peaks(logits, n_vocab, NULL);
    out->sum = ops->sum(logits, n_vocab, out->max, 1, NULL);
    int kept = 0;
    for (int b = 0; n > 0 && b * SOFTMAX_BLOCK < n_vocab; b++) {
        const float *block = logits + b * SOFTMAX_BLOCK;
        int len = block_len(n_vocab, b);
        if (kept == n && !(ops->peaks(block, len, NULL) > out->top[n - 1]))
            continue;
        for (int i = 0; i < len; i++)
            if (kept < n || block[i] > out->top[n - 1])
                insert(block[i], b * SOFTMAX_BLOCK + i, &kept, n, out->top_id, out->top);
    }
    for (int j = kept; j < n; j++) {
        out->top_id[j] = -1;
        out->top[j] = -INFINITY;
    }
}

float samp_log_sum(const be_likely *l) { return l->max + (float)log(l->sum); }
