#include "backend/ref/ref.h"

#include <math.h>
#include <string.h>

/* Eight sums side by side, so that additions need not wait for each other. */
double ref_dot(const float *a, const float *b, int64_t n) {
    double sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sum[j] += (double)a[i + j] * b[i + j];
    for (; i < n; i++)
        sum[0] += (double)a[i] * b[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

void ref_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y) {
    const be_batch *b = &s->batch;
    if (!ref_output(s, y, b->n_tok, table->n_col, "embed: the output does not fit"))
        return;
    for (int t = 0; t < b->n_tok; t++) {
        float *row = ref_at(y, t);
        if (!ref_check(s, b->token[t] < table->n_row, ORCD_ERR_ARG, "a token is outside the vocabulary"))
            return;
        ref_row((ref_weight *)table, 0, b->token[t], row);
        if (!pos_table)
            continue;
        if (!ref_check(s, b->pos[t] < pos_table->n_row, ORCD_ERR_ARG, "a position has no embedding"))
            return;
        float *add = ((ref_weight *)pos_table)->rows;
        ref_row((ref_weight *)pos_table, 0, b->pos[t], add);
        for (int64_t i = 0; i < y->width; i++)
            row[i] += add[i];
    }
}

void ref_norm(be_step *s, const be_norm *n, const be_act *x, be_act *y) {
    if (!ref_check(s, n->weight->n_col == x->width, ORCD_ERR_INTERNAL, "norm: weight and rows differ in width") ||
        !ref_output(s, y, x->n_row, x->width, "norm: the output does not fit"))
        return;
    const float *weight = ((const ref_weight *)n->weight)->vector;
    const float *bias = n->bias ? ((const ref_weight *)n->bias)->vector : NULL;
    for (int64_t t = 0; t < x->n_row; t++) {
        const float *in = ref_at(x, t);
        float *out = ref_at(y, t);
        double mean = 0, square = 0;
        for (int64_t i = 0; n->kind == BE_NORM_LAYER && i < x->width; i++)
            mean += in[i] / (double)x->width;
        for (int64_t i = 0; i < x->width; i++)
            square += (in[i] - mean) * (in[i] - mean);
        double scale = 1 / sqrt(square / (double)x->width + n->eps);
        for (int64_t i = 0; i < x->width; i++)
            out[i] = (float)((in[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0));
    }
}

static double apply(be_epilogue e, double v, float old) {
    switch (e) {
    case BE_EPI_ADD:
        return old + v;
    case BE_EPI_GELU_TANH:
        return v * 0.5 * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case BE_EPI_GELU_ERF:
        return v * 0.5 * (1 + erf(v / sqrt(2)));
    case BE_EPI_NONE:
        break;
    }
    return v;
}

void ref_linear(be_step *s, const be_weight *weight, const be_act *x, be_act *y, be_epilogue e) {
    ref_weight *w = (ref_weight *)weight;
    bool fits = weight->n_col == x->width && (e != BE_EPI_ADD || y->n_row == x->n_row);
    if (!ref_check(s, fits, ORCD_ERR_INTERNAL, "linear: the input does not fit the weight") ||
        !ref_output(s, y, x->n_row, weight->n_row, "linear: the output does not fit"))
        return;
    for (int64_t r = 0; r < weight->n_row; r++) {
        ref_row(w, 0, r, w->rows);
        for (int64_t t = 0; t < x->n_row; t++) {
            float *out = &ref_at(y, t)[r];
            *out = (float)apply(e, ref_dot(w->rows, ref_at(x, t), x->width) + w->bias[r], *out);
        }
    }
}

void ref_gather_out(be_step *s, const be_act *x, be_act *y) {
    if (!ref_check(s, x->n_row == s->batch.n_tok, ORCD_ERR_INTERNAL, "gather: the input has not one row per token") ||
        !ref_output(s, y, s->batch.n_out, x->width, "gather: the output does not fit"))
        return;
    for (int i = 0; i < s->batch.n_out; i++)
        memcpy(ref_at(y, i), ref_at(x, s->batch.out_row[i]), (size_t)x->width * sizeof(float));
}

void ref_tap(be_step *s, const char *name, int layer, const be_act *a, be_tap_fn fn, void *ctx) {
    (void)s;
    fn(ctx, name, layer, a->n_row, ((const ref_act *)a)->stride, ref_at(a, 0));
}
