/* backend/cuda/linear.cu: y = epilogue(W x + b). */
#include "backend/cuda/linear.cuh"

void cuda_run_linear(cuda_run *r, const cuda_cmd *c) {
    lin_args a = {};
    a.rows = cuda_rows_of(r, c);
    a.x = c->x->f16;
    a.ldx = c->x->ld;
    a.bias = c->w->bias;
    a.y = c->y->f32;
    a.yh = c->y->base.form == BE_ACT_FREE ? c->y->f16 : NULL;
    a.ldy = c->y->base.width;
    a.ldh = c->y->ld;
    a.epilogue = c->epilogue;
    const int width = lin_width(a.rows.cap), blocks = (a.rows.cap + width - 1) / width;
    for (int i = 0; i < c->w->n_matrix; i++)
        lin_launch<LIN_DENSE>(r, &c->w->matrix[i], a, width, blocks);
}
