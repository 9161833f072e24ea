#include "backend/ref/ref.h"

#include <math.h>

#include "base/half.h"

static bool check_qkv(be_step *s, const be_attn *a, const be_act *qkv) {
    const be_kv_spec *k = &s->kv->spec;
    bool fits = qkv->n_row == s->batch.n_tok && qkv->width == (int64_t)(a->n_head + 2 * a->n_kv_head) * a->head_dim;
    bool same = a->layer >= 0 && a->layer < k->n_layer && a->n_kv_head == k->n_kv_head && a->head_dim == k->head_dim &&
                a->n_head % a->n_kv_head == 0 && a->window == k->window[a->layer];
    return ref_check(s, fits, ORCD_ERR_INTERNAL, "attention: qkv does not have a row of q, k and v heads per token") &&
           ref_check(s, same, ORCD_ERR_INTERNAL, "attention: the layer differs from the KV cache's");
}

/* Dimension i turns with dimension i + head_dim / 2, by the angle position * inv_freq[i]. */
void ref_rope(be_step *s, const be_attn *a, be_act *qkv) {
    if (!check_qkv(s, a, qkv))
        return;
    int half = a->head_dim / 2;
    for (int t = 0; t < s->batch.n_tok; t++) {
        for (int i = 0; i < half; i++) {
            double angle = (double)s->batch.pos[t] * a->inv_freq[i];
            double c = cos(angle) * a->rope_scale, d = sin(angle) * a->rope_scale;
            for (int h = 0; h < a->n_head + a->n_kv_head; h++) {
                float *x = ref_at(qkv, t) + h * a->head_dim;
                double x1 = x[i], x2 = x[i + half];
                x[i] = (float)(x1 * c - x2 * d);
                x[i + half] = (float)(x2 * c + x1 * d);
            }
        }
    }
}

void ref_kv_write(be_step *s, const be_attn *a, const be_act *qkv) {
    if (!check_qkv(s, a, qkv))
        return;
    int n = a->n_kv_head * a->head_dim;
    for (int t = 0; t < s->batch.n_tok; t++) {
        const float *src = ref_at(qkv, t) + a->n_head * a->head_dim;
        for (int which = 0; which < 2; which++) {
            float *dst = ref_kv_at((ref_kv *)s->kv, a->layer, s->batch.slot[t], s->batch.pos[t], which);
            for (int i = 0; i < n; i++) {
                float v = src[which * n + i];
                dst[i] = s->kv->spec.type == BE_KV_F16 ? f32_from_f16(f16_from_f32(v)) : v;
            }
        }
    }
}

/* One query head of one row: softmax over the visible keys, and over the sink, which has no value. */
static void attend(ref_kv *kv, const be_attn *a, int slot, int pos, int head, const float *q, float *out) {
    int first = a->window && pos >= a->window ? pos - a->window + 1 : 0;
    int at = head / (a->n_head / a->n_kv_head) * a->head_dim;
    double max = a->sinks ? ((const ref_weight *)a->sinks)->vector[head] : -INFINITY;
    for (int k = first; k <= pos; k++) {
        kv->score[k] = a->scale * ref_dot(q, ref_kv_at(kv, a->layer, slot, k, 0) + at, a->head_dim);
        max = fmax(max, kv->score[k]);
    }
    double sum = a->sinks ? exp(((const ref_weight *)a->sinks)->vector[head] - max) : 0;
    for (int i = 0; i < a->head_dim; i++)
        kv->value[i] = 0;
    for (int k = first; k <= pos; k++) {
        const float *v = ref_kv_at(kv, a->layer, slot, k, 1) + at;
        double p = exp(kv->score[k] - max);
        sum += p;
        for (int i = 0; i < a->head_dim; i++)
            kv->value[i] += p * v[i];
    }
    for (int i = 0; i < a->head_dim; i++)
        out[i] = (float)(kv->value[i] / sum);
}

void ref_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y) {
    bool sinks_fit = !a->sinks || a->sinks->n_col == a->n_head;
    if (!check_qkv(s, a, qkv) ||
        !ref_check(s, sinks_fit, ORCD_ERR_INTERNAL, "attention: there is not one sink per head") ||
        !ref_output(s, y, s->batch.n_tok, (int64_t)a->n_head * a->head_dim, "attention: the output does not fit"))
        return;
    for (int t = 0; t < s->batch.n_tok; t++)
        for (int h = 0; h < a->n_head; h++)
            attend((ref_kv *)s->kv, a, s->batch.slot[t], s->batch.pos[t], h, ref_at(qkv, t) + h * a->head_dim,
                   ref_at(y, t) + h * a->head_dim);
}
