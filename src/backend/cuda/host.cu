/* backend/cuda/host.cu: experts that stay in host memory. A kernel writes the normed rows and their routes to pinned
 * memory, a host function of the stream lets the cpu backend compute, a kernel adds what came out to the residual rows.
 * All three are recorded in graphs like any kernel, so whoever submits a step waits for nothing. */
#include "backend/cuda/cuda.h"
#include "quant/fragment.cuh"

#include <new>
#include <string.h>

struct cuda_host {
    be_device *dev; /* the cpu backend's */
    be_act *x, *route, *y;
    int64_t cap_row, n_embd, k; /* of the buffers */
    int32_t *n_row;             /* pinned, as all below: rows of the step in hand */
    float *in, *pair, *out;     /* [cap_row][n_embd], [cap_row][k][id, weight], [cap_row][n_embd] */
    orcd_error failed;          /* code ORCD_OK = no; told by the step's end */
};

static void free_buffers(cuda_host *h) {
    void *pinned[] = {h->n_row, h->in, h->pair, h->out};
    for (void *p : pinned)
        if (p)
            cudaFreeHost(p);
    be_act *act[] = {h->x, h->route, h->y};
    for (be_act *a : act)
        h->dev->ops->act_free(h->dev, a);
    be_device *dev = h->dev;
    *h = cuda_host{};
    h->dev = dev;
}

void cuda_host_free(cuda_dev *d) {
    if (!d->host)
        return;
    free_buffers(d->host);
    d->host->dev->ops->close(d->host->dev);
    delete d->host;
    d->host = NULL;
}

static orcd_status open_host(cuda_dev *d, orcd_error *err) {
    const be_ops *cpu = be_find("cpu");
    be_params p = d->params;
    if (!cpu)
        return orcd_fail(err, ORCD_ERR_UNSUPPORTED,
                         "experts in host memory need the cpu backend, which this build lacks");
    d->host = new (std::nothrow) cuda_host{};
    if (!d->host)
        return orcd_fail(err, ORCD_ERR_NOMEM, "out of memory");
    p.no_repack = false; /* the file may be closed once everything is loaded */
    orcd_status st = cpu->open(&p, &d->host->dev, err);
    if (st != ORCD_OK) {
        delete d->host;
        d->host = NULL;
    }
    return st;
}

orcd_status cuda_host_load(cuda_dev *d, const be_load *l, cuda_weight *w, orcd_error *err) {
    w->on_host = true;
    if (d->dry)
        return ORCD_OK;
    if (!d->host)
        ORCD_TRY(open_host(d, err));
    if (l->use == BE_USE_GATE_UP)
        d->host_embd = w->base.n_col;
    return d->host->dev->ops->load(d->host->dev, l, &w->host, err);
}

void cuda_host_unload(cuda_dev *d, be_weight *w) {
    if (w)
        d->host->dev->ops->unload(d->host->dev, w);
}

/* Room for steps of as many rows as the batch arrays hold. */
orcd_status cuda_host_reserve(cuda_dev *d, orcd_error *err) {
    cuda_host *h = d->host;
    if (!h || (d->max_tok <= h->cap_row && d->host_embd == h->n_embd && d->want_k == h->k))
        return ORCD_OK;
    const be_ops *cpu = h->dev->ops;
    const int64_t rows = d->max_tok, embd = d->host_embd, k = d->want_k;
    cuda_graphs_drop(d, NULL);
    free_buffers(h);
    CUDA_TRY(d, "pinning rows", cudaMallocHost((void **)&h->n_row, sizeof *h->n_row));
    CUDA_TRY(d, "pinning rows", cudaMallocHost((void **)&h->in, (size_t)(rows * embd) * sizeof *h->in));
    CUDA_TRY(d, "pinning rows", cudaMallocHost((void **)&h->pair, (size_t)(rows * k * 2) * sizeof *h->pair));
    CUDA_TRY(d, "pinning rows", cudaMallocHost((void **)&h->out, (size_t)(rows * embd) * sizeof *h->out));
    ORCD_TRY(cpu->act_new(h->dev, BE_ACT_FREE, rows, embd, &h->x, err));
    ORCD_TRY(cpu->act_new(h->dev, BE_ACT_ROUTE, rows, k, &h->route, err));
    ORCD_TRY(cpu->act_new(h->dev, BE_ACT_F32, rows, embd, &h->y, err));
    h->cap_row = rows, h->n_embd = embd, h->k = k;
    return ORCD_OK;
}

orcd_status cuda_host_check(cuda_dev *d, orcd_error *err) {
    if (!d->host || d->host->failed.code == ORCD_OK)
        return ORCD_OK;
    const orcd_status st = d->host->failed.code;
    if (err)
        *err = d->host->failed;
    d->host->failed.code = ORCD_OK;
    return st;
}

/* ---- running ---- */

static orcd_status compute(cuda_host *h, const cuda_weight *w, orcd_error *err) {
    const be_ops *cpu = h->dev->ops;
    const int n = *h->n_row;
    const be_batch batch = {n, NULL, NULL, NULL, 0, NULL, false};
    be_step *s = NULL;
    if (n == 0)
        return ORCD_OK;
    memset(h->out, 0, (size_t)n * (size_t)h->y->width * sizeof *h->out);
    ORCD_TRY(cpu->act_write(h->dev, h->x, 0, n, h->in, err));
    ORCD_TRY(cpu->act_write(h->dev, h->route, 0, n, h->pair, err));
    ORCD_TRY(cpu->act_write(h->dev, h->y, 0, n, h->out, err));
    ORCD_TRY(cpu->step_begin(h->dev, NULL, &batch, &s, err));
    cpu->experts(s, w->host, w->host_down, &w->host_glu, h->x, h->route, h->y);
    ORCD_TRY(cpu->step_end(s, err));
    return cpu->act_read(h->dev, h->y, 0, n, h->out, err);
}

static void CUDART_CB on_host(void *arg) {
    const cuda_weight *w = (const cuda_weight *)arg;
    cuda_host *h = w->dev->host;
    if (h->failed.code == ORCD_OK)
        (void)compute(h, w, &h->failed);
}

static __global__ void send_kernel(cuda_count rows, const __half *x, int64_t ldx, int n_embd, const int32_t *id,
                                   const float *weight, int k, int32_t *n_row, float *in, float *pair) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, n = count_rows(rows);
    if (row == 0 && threadIdx.x == 0)
        *n_row = n;
    if (row >= n)
        return;
    for (int i = threadIdx.x; i < n_embd; i += blockDim.x)
        in[(int64_t)row * n_embd + i] = __half2float(x[row * ldx + i]);
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        pair[2 * (row * k + i)] = (float)id[row * k + i];
        pair[2 * (row * k + i) + 1] = weight[row * k + i];
    }
}

static __global__ void receive_kernel(cuda_count rows, const float *out, int n_embd, float *y) {
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= count_rows(rows))
        return;
    for (int i = threadIdx.x; i < n_embd; i += blockDim.x)
        y[(int64_t)row * n_embd + i] += out[(int64_t)row * n_embd + i];
}

void cuda_run_host_experts(cuda_run *r, const cuda_cmd *c) {
    cuda_host *h = r->dev->host;
    cuda_weight *w = (cuda_weight *)c->w;
    const cuda_count rows = cuda_rows_of(r, c);
    const int n_embd = (int)c->y->base.width;
    w->host_down = c->w2->host;
    w->host_glu = c->glu;
    cuda_launch(r, send_kernel, dim3((unsigned)rows.cap), dim3(256), 0, rows, (const __half *)c->x->f16, c->x->ld,
                n_embd, (const int32_t *)c->z->id, (const float *)c->z->expert_w, c->k, h->n_row, h->in, h->pair);
    if (r->error == cudaSuccess)
        r->error = cudaLaunchHostFunc(r->stream, on_host, w);
    const bool pdl = r->pdl;
    r->pdl = false; /* it reads what a function of the host wrote */
    cuda_launch(r, receive_kernel, dim3((unsigned)rows.cap), dim3(256), 0, rows, (const float *)h->out, n_embd,
                c->y->f32);
    r->pdl = pdl;
}
