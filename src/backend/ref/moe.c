#include "backend/ref/ref.h"

#include <math.h>

/* The largest logit that is not chosen yet; of equal ones the lowest id. */
static int best_of(const double *logit, int64_t n, const float *chosen, int n_chosen) {
    int best = -1;
    for (int e = 0; e < n; e++) {
        bool taken = false;
        for (int k = 0; k < n_chosen; k++)
            taken = taken || chosen[2 * k] == (float)e;
        if (!taken && (best < 0 || logit[e] > logit[best]))
            best = e;
    }
    return best;
}

void ref_route(be_step *s, const be_weight *weight, const be_act *x, int top_k, be_act *route) {
    ref_weight *w = (ref_weight *)weight;
    bool fits = weight->n_col == x->width && top_k >= 1 && top_k <= weight->n_row && route->form == BE_ACT_ROUTE;
    if (!ref_check(s, fits, ORCD_ERR_INTERNAL, "route: the input does not fit the router") ||
        !ref_output(s, route, x->n_row, top_k, "route: the output does not fit"))
        return;
    for (int64_t t = 0; t < x->n_row; t++) {
        float *pair = ref_at(route, t);
        double sum = 0, max = 0;
        for (int64_t r = 0; r < weight->n_row; r++) {
            ref_row(w, 0, r, w->rows);
            w->out[r] = ref_dot(w->rows, ref_at(x, t), x->width) + w->bias[r];
        }
        for (int k = 0; k < top_k; k++) {
            int e = best_of(w->out, weight->n_row, pair, k);
            pair[2 * k] = (float)e;
            max = k == 0 ? w->out[e] : max;
            sum += exp(w->out[e] - max);
        }
        for (int k = 0; k < top_k; k++)
            pair[2 * k + 1] = (float)(exp(w->out[(int)pair[2 * k]] - max) / sum);
    }
}

static double glu(const be_glu *g, double gate, double up) {
    gate = gate > g->limit ? g->limit : gate; /* NaN stays NaN */
    up = up > g->limit ? g->limit : up < -g->limit ? -g->limit : up;
    return gate / (1 + exp(-g->alpha * gate)) * (up + 1);
}

/* out[r] = row r of expert e times x, plus bias; the expert lies unpacked in w->rows. */
static void apply_expert(ref_weight *w, int64_t e, const float *x) {
    for (int64_t r = 0; r < w->base.n_row; r++)
        w->out[r] = ref_dot(w->rows + r * w->base.n_col, x, w->base.n_col) + w->bias[e * w->base.n_row + r];
}

static void unpack_expert(ref_weight *w, int64_t e) {
    for (int64_t r = 0; r < w->base.n_row; r++)
        ref_row(w, e, r, w->rows + r * w->base.n_col);
}

void ref_experts(be_step *s, const be_weight *gate_up, const be_weight *down, const be_glu *g, const be_act *x,
                 const be_act *route, be_act *y) {
    ref_weight *w1 = (ref_weight *)gate_up, *w2 = (ref_weight *)down;
    bool fits = gate_up->n_col == x->width && gate_up->n_row == 2 * down->n_col && gate_up->n_mat == down->n_mat &&
                route->n_row == x->n_row && y->n_row == x->n_row;
    if (!ref_check(s, fits, ORCD_ERR_INTERNAL, "experts: input, route and weights do not fit") ||
        !ref_output(s, y, x->n_row, down->n_row, "experts: the output does not fit"))
        return;
    for (int64_t e = 0; e < gate_up->n_mat; e++) {
        bool unpacked = false;
        for (int64_t i = 0; i < x->n_row * route->width; i++) {
            int64_t t = i / route->width;
            const float *pair = ref_at(route, t) + i % route->width * 2;
            if (pair[0] != (float)e)
                continue;
            if (!unpacked) {
                unpack_expert(w1, e);
                unpack_expert(w2, e);
                unpacked = true;
            }
            apply_expert(w1, e, ref_at(x, t));
            for (int64_t f = 0; f < down->n_col; f++)
                w1->hidden[f] = (float)glu(g, w1->out[f], w1->out[down->n_col + f]);
            apply_expert(w2, e, w1->hidden);
            for (int64_t r = 0; r < down->n_row; r++)
                ref_at(y, t)[r] += (float)(pair[1] * w2->out[r]);
        }
    }
}
