/* backend/cuda/linear.cu: y = epilogue(W x + b). */
#include "backend/cuda/flow.cuh"
#include "backend/cuda/stream.cuh"

/* Products by rows in wide.cuh's order. */
static void run_wide(cuda_run *r, const cuda_cmd *c, const lin_args &l, flow_way way) {
    uint8_t *x = r->packed == c->x ? r->pack : (uint8_t *)r->dev->scratch.down;
    wide_args a = {};
    a.l = l;
    a.x = x;
    a.ldx = round_up(l.rows.cap, 8);
    if (r->packed != c->x)
        wide_pack(r, l.rows, NULL, 1, l.x, l.ldx, x, a.ldx);
    if (way.share) {
        flow_run(r, &c->w->matrix[0], way, a);
        return;
    }
    for (int i = 0; i < c->w->n_matrix; i++) {
        a.cols = wide_cols(l.rows.cap, c->w->matrix[i].n_tile, r->dev->n_sm);
        wide_dense(r, &c->w->matrix[i], a);
    }
}

/* Columns per block of the streaming kernel, 0 to leave it. */
static int stream_width(int rows) {
    if (rows <= STREAM_MAX_COLS)
        return (rows + 7) / 8 * 8;
    return rows > 64 ? 0 : rows <= 32 ? 16 : STREAM_MAX_COLS;
}

/* Products of more rows than that are those of wide.cuh and flow.cuh, where these are. */
#define FEW_ROWS 48

bool cuda_can_linear_rope(const cuda_run *r, const cuda_cmd *c, const cuda_cmd *rope) {
    const cuda_matrix *m = &c->w->matrix[0];
    return cuda_rows_of(r, c).cap > FEW_ROWS && wide_can(r, c->w) && rope->op == CUDA_OP_ROPE && rope->x == c->y &&
           rope->freq >= 0 && rope->attn.head_dim == 64 && c->w->n_matrix == 1 && m->map == CUDA_ROWS_PAIR64 &&
           c->epilogue == BE_EPI_NONE;
}

void cuda_run_linear(cuda_run *r, const cuda_cmd *c) { cuda_run_linear_rope(r, c, NULL); }

void cuda_run_linear_rope(cuda_run *r, const cuda_cmd *c, const cuda_cmd *rope) {
    lin_args a = {};
    a.rows = cuda_rows_of(r, c);
    a.x = c->x->f16;
    a.ldx = c->x->ld;
    a.bias = c->w->bias;
    a.y = c->y->f32;
    a.yh = cuda_linear_f16(c->w, &c->y->base) ? c->y->f16 : NULL;
    a.ldy = c->y->base.width;
    a.ldh = c->y->ld;
    a.epilogue = c->epilogue;
    if (rope) {
        cuda_run_rope_table(r, rope);
        a.rope = r->dev->scratch.rope;
        a.n_rope = (rope->attn.n_head + rope->attn.n_kv_head) * 64;
    }
    if (r->packed == c->y) /* its rows are about to change */
        r->packed = NULL;
    const flow_way way = flow_choose(r, c->w, a.rows.cap, c->epilogue);
    if (way.share || (a.rows.cap > FEW_ROWS && wide_can(r, c->w))) {
        run_wide(r, c, a, way);
        return;
    }
    const int width = lin_width(a.rows.cap), blocks = (a.rows.cap + width - 1) / width;
    for (int i = 0; i < c->w->n_matrix; i++) {
        const cuda_matrix *m = &c->w->matrix[i];
        const int few = stream_width(a.rows.cap);
        if (!few || !stream_run<LIN_DENSE>(r, m, a, few, (a.rows.cap + few - 1) / few))
            lin_launch<LIN_DENSE>(r, m, a, width, blocks);
    }
}
