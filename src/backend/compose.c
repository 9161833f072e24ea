#include "backend/compose.h"

void be_norm_linear(be_step *s, const be_norm *n, const be_weight *w, const be_act *x, be_act *tmp, be_act *y,
                    be_epilogue e) {
    const be_ops *ops = s->dev->ops;
    if (ops->norm_linear) {
        ops->norm_linear(s, n, w, x, tmp, y, e);
        return;
    }
    ops->norm(s, n, x, tmp);
    ops->linear(s, w, tmp, y, e);
}

void be_attn_in(be_step *s, const be_norm *n, const be_weight *wqkv, const be_attn *a, const be_act *x, be_act *tmp,
                be_act *qkv) {
    const be_ops *ops = s->dev->ops;
    if (ops->attn_in) {
        ops->attn_in(s, n, wqkv, a, x, tmp, qkv);
        return;
    }
    be_norm_linear(s, n, wqkv, x, tmp, qkv, BE_EPI_NONE);
    if (a->rotary)
        ops->rope(s, a, qkv);
    ops->kv_write(s, a, qkv);
}

void be_moe(be_step *s, const be_norm *n, const be_weight *router, int top_k, const be_weight *gate_up,
            const be_weight *down, const be_glu *g, be_act *tmp, be_act *route, be_act *x) {
    const be_ops *ops = s->dev->ops;
    if (ops->moe) {
        ops->moe(s, n, router, top_k, gate_up, down, g, tmp, route, x);
        return;
    }
    ops->norm(s, n, x, tmp);
    ops->route(s, router, tmp, top_k, route);
    ops->experts(s, gate_up, down, g, tmp, route, x);
}
