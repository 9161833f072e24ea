#include <math.h>
#include <string.h>

#include "backend/cpu/internal.h"
#include "base/half.h"

/* ---- rotary positions ---- */

static void make_table(cpu_step *s, const be_attn *a, int thread) {
    int half = a->head_dim / 2;
    for (int i = thread; i < s->base.batch.n_tok; i += s->dev->n_thread) {
        float *t = s->dev->shared.rope + (size_t)i * (size_t)a->head_dim;
        for (int j = 0; j < half; j++) {
            double angle = (double)s->base.batch.pos[i] * (double)a->inv_freq[j];
            t[j] = (float)cos(angle) * a->rope_scale;
            t[half + j] = (float)sin(angle) * a->rope_scale;
        }
    }
}

static void run_rope(cpu_step *s, cpu_cmd *c, int thread) {
    const be_attn *a = &c->attn;
    int half = a->head_dim / 2, heads = a->n_head + a->n_kv_head;
    if (c->make_table) {
        make_table(s, a, thread);
        pool_barrier(s->dev->pool);
    }
    for (int64_t i = thread; i < c->y->base.n_row * heads; i += s->dev->n_thread) {
        float *x = c->y->data + i / heads * c->y->stride + i % heads * a->head_dim;
        s->dev->k->rotate(x, s->dev->shared.rope + i / heads * a->head_dim, half);
    }
}

void cpu_rope(be_step *base, const be_attn *a, be_act *qkv) {
    cpu_step *s = (cpu_step *)base;
    cpu_cmd *c = cpu_record(base, run_rope);
    c->attn = *a;
    c->y = (cpu_act *)qkv;
    c->make_table = s->rope_freq != a->inv_freq || s->rope_scale != a->rope_scale;
    s->rope_freq = a->inv_freq;
    s->rope_scale = a->rope_scale;
    cpu_widen(&s->dev->dims.max_tok, qkv->n_row);
    cpu_widen(&s->dev->dims.head_dim, a->head_dim);
}

/* ---- KV cache ---- */

/* K of a head in the page that holds position `pos` of a slot; V lies head_bytes behind it. */
static uint8_t *page_of(const cpu_kv *kv, const be_attn *a, int slot, int index, int head) {
    int kind = kv->base.spec.window[a->layer] ? BE_POOL_WINDOW : BE_POOL_FULL;
    int32_t page = kv->table[kind][(size_t)slot * (size_t)kv->n_index + (size_t)index];
    return kv->page[kind] + (size_t)page * kv->base.page_bytes[kind] +
           ((size_t)kv->layer_index[a->layer] * (size_t)a->n_kv_head + (size_t)head) * 2 * kv->head_bytes;
}

static void run_kv_write(cpu_step *s, cpu_cmd *c, int thread) {
    const be_attn *a = &c->attn;
    const be_batch *b = &s->base.batch;
    const cpu_kv *kv = (const cpu_kv *)s->base.kv;
    int hd = a->head_dim;
    for (int64_t i = thread; i < (int64_t)b->n_tok * a->n_kv_head; i += s->dev->n_thread) {
        int64_t row = i / a->n_kv_head;
        int head = (int)(i % a->n_kv_head), at = b->pos[row] % BE_PAGE;
        uint8_t *page = page_of(kv, a, b->slot[row], b->pos[row] / BE_PAGE, head);
        const float *k = c->x->data + row * c->x->stride + (a->n_head + head) * hd;
        const float *v = k + a->n_kv_head * hd;
        if (kv->elem == 4) {
            float *pk = (float *)page, *pv = (float *)(page + kv->head_bytes) + at * hd;
            for (int d = 0; d < hd; d++)
                pk[d * BE_PAGE + at] = k[d];
            memcpy(pv, v, (size_t)hd * sizeof *v);
        } else {
            uint16_t *pk = (uint16_t *)page, *pv = (uint16_t *)(page + kv->head_bytes) + at * hd;
            for (int d = 0; d < hd; d++) {
                pk[d * BE_PAGE + at] = f16_from_f32(k[d]);
                pv[d] = f16_from_f32(v[d]);
            }
        }
    }
}

void cpu_kv_write(be_step *s, const be_attn *a, const be_act *qkv) {
    cpu_cmd *c = cpu_record(s, run_kv_write);
    c->attn = *a;
    c->x = (const cpu_act *)qkv;
}

/* ---- attention ---- */

/* Query rows that read the same KV head of the same sequence. */
typedef struct tile {
    cpu_attn_tile t;
    int pos[CPU_ATTN_ROWS], head[CPU_ATTN_ROWS];
    float *out[CPU_ATTN_ROWS];
    float acc[CPU_ATTN_ROWS * 256] __attribute__((aligned(64))); /* [row][head_dim] */
} tile;

static int first_visible(const be_attn *a, int pos) { return a->window && pos >= a->window ? pos - a->window + 1 : 0; }

static void run_tile(cpu_step *s, const be_attn *a, tile *w, int slot, int kv_head) {
    const cpu_kv *kv = (const cpu_kv *)s->base.kv;
    cpu_attn_tile *t = &w->t;
    int low = first_visible(a, w->pos[0]), high = 0;
    t->head_dim = a->head_dim;
    t->scale = a->scale;
    for (int i = 0; i < t->n; i++) {
        t->max[i] = -INFINITY;
        t->sum[i] = 0;
        t->acc[i] = w->acc + i * a->head_dim;
        memset(t->acc[i], 0, (size_t)a->head_dim * sizeof(float));
        int first = first_visible(a, w->pos[i]);
        low = first < low ? first : low;
        high = w->pos[i] > high ? w->pos[i] : high;
    }
    for (int page = low / BE_PAGE; page <= high / BE_PAGE; page++) {
        for (int i = 0; i < t->n; i++) {
            int first = first_visible(a, w->pos[i]) - page * BE_PAGE, last = w->pos[i] - page * BE_PAGE;
            t->first[i] = first > 0 ? first : 0;
            t->last[i] = last < BE_PAGE - 1 ? last : BE_PAGE - 1;
        }
        const uint8_t *k = page_of(kv, a, slot, page, kv_head);
        (kv->elem == 4 ? s->dev->k->attn_f32 : s->dev->k->attn_f16)(t, k, k + kv->head_bytes);
    }
    const float *sinks = a->sinks ? ((const cpu_weight *)a->sinks)->vector : NULL;
    for (int i = 0; i < t->n; i++) {
        float sum = t->sum[i], keep = 1;
        if (sinks) {
            float sink = sinks[w->head[i]], top = sink > t->max[i] ? sink : t->max[i];
            keep = expf(t->max[i] - top);
            sum = sum * keep + expf(sink - top);
        }
        float inv = keep / sum;
        for (int d = 0; d < a->head_dim; d++)
            w->out[i][d] = t->acc[i][d] * inv;
    }
}

static void run_attention(cpu_step *s, cpu_cmd *c, int thread) {
    (void)thread;
    const be_attn *a = &c->attn;
    const be_batch *b = &s->base.batch;
    int group = a->n_head / a->n_kv_head;                      /* query heads of a KV head */
    int heads = group < CPU_ATTN_ROWS ? group : CPU_ATTN_ROWS; /* of them in one tile */
    int rows = CPU_ATTN_ROWS / heads, head_runs = (group + heads - 1) / heads;
    int64_t row_runs = (b->n_tok + rows - 1) / rows, total = row_runs * a->n_kv_head * head_runs;
    tile w;
    /* items of one KV head follow one another: its pages stay in the cache */
    for (int64_t i; (i = atomic_fetch_add_explicit(&c->next[0], 1, memory_order_relaxed)) < total;) {
        int kv_head = (int)(i / row_runs / head_runs),
            head0 = kv_head * group + (int)(i / row_runs % head_runs) * heads;
        int row = (int)(row_runs - 1 - i % row_runs) * rows, end = row + rows < b->n_tok ? row + rows : b->n_tok;
        int head_end = (kv_head + 1) * group < head0 + heads ? (kv_head + 1) * group : head0 + heads;
        while (row < end) {
            int slot = b->slot[row];
            w.t.n = 0;
            for (; row < end && b->slot[row] == slot; row++)
                for (int h = head0; h < head_end; h++) {
                    int n = w.t.n++;
                    w.pos[n] = b->pos[row];
                    w.head[n] = h;
                    w.t.q[n] = c->x->data + row * c->x->stride + h * a->head_dim;
                    w.out[n] = c->y->data + row * c->y->stride + h * a->head_dim;
                }
            run_tile(s, a, &w, slot, kv_head);
        }
    }
}

void cpu_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y) {
    cpu_cmd *c = cpu_record(s, run_attention);
    c->attn = *a;
    c->x = (const cpu_act *)qkv;
    c->y = (cpu_act *)y;
    y->n_row = qkv->n_row;
}
