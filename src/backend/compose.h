/* backend/compose.h: what model code calls: each operation as a function, fused where the backend has it. */
#ifndef ORCD_BACKEND_COMPOSE_H
#define ORCD_BACKEND_COMPOSE_H

#include "backend/backend.h"

static inline void be_embed(be_step *s, const be_weight *table, const be_weight *pos_table, be_act *y) {
    s->dev->ops->embed(s, table, pos_table, y);
}
static inline void be_linear(be_step *s, const be_weight *w, const be_act *x, be_act *y, be_epilogue e) {
    s->dev->ops->linear(s, w, x, y, e);
}
static inline void be_attention(be_step *s, const be_attn *a, const be_act *qkv, be_act *y) {
    s->dev->ops->attention(s, a, qkv, y);
}
static inline void be_gather_out(be_step *s, const be_act *x, be_act *y) { s->dev->ops->gather_out(s, x, y); }

/* y = epilogue(W norm(x) + b); tmp is scratch of x's width */
void be_norm_linear(be_step *s, const be_norm *n, const be_weight *w, const be_act *x, be_act *tmp, be_act *y,
                    be_epilogue e);
/* qkv = W norm(x) + b, q and k rotated, k and v written to the cache */
void be_attn_in(be_step *s, const be_norm *n, const be_weight *wqkv, const be_attn *a, const be_act *x, be_act *tmp,
                be_act *qkv);
/* x += mixture of experts of norm(x) */
void be_moe(be_step *s, const be_norm *n, const be_weight *router, int top_k, const be_weight *gate_up,
            const be_weight *down, const be_glu *g, be_act *tmp, be_act *route, be_act *x);

#endif
