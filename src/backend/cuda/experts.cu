/* backend/cuda/experts.cu: routing rows to experts, and the experts.
 *
 * Rows are put in order of their experts (perm), cut into tiles of at most `width` rows of one expert, and each tile
 * goes through the packed products. Each (row, expert) pair's output is kept apart and added up at the end in the order
 * of the route, so that a row's result does not depend on its neighbours. */
#include "backend/cuda/linear.cuh"

#define MAX_TOP_K 64

/* ---- choosing ---- */

/* One warp: the k best of logit[n] in order (ties: lower id), softmax over them. */
static __device__ void choose(float *logit, int n, int k, int32_t *id, float *weight) {
    const int lane = threadIdx.x % 32;
    float first = 0, sum = 0;
    for (int j = 0; j < k; j++) {
        float best = -INFINITY;
        int who = INT32_MAX;
        for (int e = lane; e < n; e += 32)
            if (logit[e] > best || (logit[e] == best && e < who) || who == INT32_MAX) {
                best = logit[e];
                who = e;
            }
#pragma unroll
        for (int d = 16; d; d >>= 1) {
            const float v = __shfl_xor_sync(~0u, best, d);
            const int w = __shfl_xor_sync(~0u, who, d);
            if (w != INT32_MAX && (who == INT32_MAX || v > best || (v == best && w < who))) {
                best = v;
                who = w;
            }
        }
        if (j == 0)
            first = best;
        const float p = expf(best - first);
        sum += p;
        if (lane == 0) {
            id[j] = who;
            weight[j] = p;
            logit[who] = -INFINITY;
        }
        __syncwarp();
    }
    for (int j = lane; j < k; j += 32)
        weight[j] = weight[j] / sum;
}

/* Router on rows that are normed already. */
static __global__ __launch_bounds__(ROW_THREADS) void route_kernel(cuda_count rows, const float *x, const uint16_t *xh,
                                                                   int64_t ld, int n, const float *w, const float *bias,
                                                                   int n_expert, int k, int32_t *id, float *weight) {
    __shared__ float logit[CUDA_MAX_EXPERT];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= count_rows(rows))
        return;
    for (int e = warp; e < n_expert; e += ROW_THREADS / 32) {
        float s = 0;
        for (int i = lane; i < n; i += 32) {
            float v;
            if (x) {
                v = x[(int64_t)row * n + i];
            } else {
                v = __half2float(__ushort_as_half(xh[row * ld + i]));
            }
            s = fmaf(w[(int64_t)e * n + i], v, s);
        }
        s = warp_sum(s);
        if (lane == 0)
            logit[e] = s + (bias ? bias[e] : 0.f);
    }
    __syncthreads();
    if (warp == 0)
        choose(logit, n_expert, k, id + (int64_t)row * k, weight + (int64_t)row * k);
}

void cuda_run_route(cuda_run *r, const cuda_cmd *c) {
    const cuda_count rows = cuda_rows_of(r, c);
    cuda_launch(r, route_kernel, dim3((unsigned)rows.cap), dim3(ROW_THREADS), 0, rows,
                (const float *)(c->x->has_f32 ? c->x->f32 : NULL), (const uint16_t *)c->x->f16, c->x->ld,
                (int)c->x->base.width, (const float *)c->w->dense, (const float *)c->w->bias, (int)c->w->base.n_row,
                c->k, c->y->id, c->y->expert_w);
}

/* Norm and router of a residual row in one: the router sees the row before the norm, its weights carry the gain, and
 * the norm's scale comes last: the order of sums that the decode kernels use, tile by tile of 16 values. */
static __global__ __launch_bounds__(ROW_THREADS) void norm_route_kernel(cuda_count rows, const float *x, int n,
                                                                        const float *gain, float eps,
                                                                        const float *router, const float *bias,
                                                                        int n_expert, int k, uint16_t *y, int64_t ld,
                                                                        int32_t *id, float *weight) {
    extern __shared__ float xs[]; /* [n rounded up to 16] */
    __shared__ float part[16], sums[16][CUDA_MAX_EXPERT / 8], logit[CUDA_MAX_EXPERT];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tile = (n + 15) / 16;
    if (row >= count_rows(rows))
        return;
    x += (int64_t)row * n;
    float s = 0;
    for (int i = 4 * threadIdx.x; i < n_tile * 16; i += 4 * ROW_THREADS)
        for (int j = i; j < i + 4; j++) {
            const float v = j < n ? x[j] : 0;
            xs[j] = v;
            s = fmaf(v, v, s);
        }
    const float rs = rms_scale(row_sum(s, part), n, eps);
    for (int i = threadIdx.x; i < n; i += ROW_THREADS)
        y[row * ld + i] = f16_bits(__fmul_rn(__fmul_rn(xs[i], rs), gain[i]));
    for (int e0 = 0; e0 < n_expert; e0 += CUDA_MAX_EXPERT / 8) {
        for (int e = e0 + lane / 16; e < n_expert && e < e0 + CUDA_MAX_EXPERT / 8; e += 2) {
            float t = 0;
            for (int i = warp; i < n_tile; i += 16) {
                float v = router[((int64_t)i * n_expert + e) * 16 + lane % 16] * xs[i * 16 + lane % 16];
#pragma unroll
                for (int d = 8; d; d >>= 1)
                    v += __shfl_xor_sync(0xFFFFu << (lane & 16), v, d);
                t += v;
            }
            if (lane % 16 == 0)
                sums[warp][e - e0] = t;
        }
        __syncthreads();
        for (int e = e0 + threadIdx.x; e < n_expert && e < e0 + CUDA_MAX_EXPERT / 8; e += ROW_THREADS) {
            float t = sums[0][e - e0];
            for (int w = 1; w < 16; w++)
                t += sums[w][e - e0];
            logit[e] = fmaf(t, rs, bias ? bias[e] : 0.f);
        }
        __syncthreads();
    }
    if (warp == 0)
        choose(logit, n_expert, k, id + (int64_t)row * k, weight + (int64_t)row * k);
}

void cuda_run_moe(cuda_run *r, const cuda_cmd *c) {
    const cuda_count rows = cuda_rows_of(r, c);
    const int n = (int)c->x->base.width;
    cuda_launch(r, norm_route_kernel, dim3((unsigned)rows.cap), dim3(ROW_THREADS), (size_t)(n + 15) / 16 * 64, rows,
                (const float *)c->x->f32, n, (const float *)c->w->dense, c->eps, (const float *)c->w2->gained,
                (const float *)c->w2->bias, (int)c->w2->base.n_row, c->k, c->y->f16, c->y->ld, c->z->id,
                c->z->expert_w);
}

/* [tile of 16 columns][row][16] = weight times gain */
static __global__ void gain_kernel(const float *w, const float *gain, int n_row, int n, float *out) {
    const int tile = blockIdx.x;
    for (int i = threadIdx.x; i < n_row * 16; i += blockDim.x) {
        const int col = tile * 16 + i % 16;
        out[(int64_t)tile * n_row * 16 + i] = col < n ? __fmul_rn(w[(int64_t)(i / 16) * n + col], gain[col]) : 0.f;
    }
}

cudaError_t cuda_apply_gain(cuda_dev *d, cuda_weight *router, const cuda_weight *norm) {
    const int n = (int)router->base.n_col;
    gain_kernel<<<(unsigned)((n + 15) / 16), 256, 0, d->stream>>>(router->dense, norm->dense, (int)router->base.n_row,
                                                                  n, router->gained);
    router->gain_of = norm;
    return cudaGetLastError();
}

/* ---- order of experts ---- */

/* One block: pairs in order of expert then row, and the tiles of at most `width` of them. */
static __global__ __launch_bounds__(1024) void order_kernel(cuda_count rows, const int32_t *id, int k, int n_expert,
                                                            int width, int32_t *perm, int4 *tile, int32_t *n_tiles) {
    __shared__ int count[CUDA_MAX_EXPERT], first[CUDA_MAX_EXPERT], first_tile[CUDA_MAX_EXPERT];
    pdl_launch();
    for (int e = threadIdx.x; e < n_expert; e += blockDim.x)
        count[e] = 0;
    __syncthreads();
    pdl_wait();
    const int pairs = count_rows(rows) * k, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x)
        atomicAdd(&count[id[p]], 1);
    __syncthreads();
    if (warp == 0) {
        int at = 0, t = 0;
        for (int e0 = 0; e0 < n_expert; e0 += 32) {
            const int e = e0 + lane, c = e < n_expert ? count[e] : 0, nt = (c + width - 1) / width;
            int sum = c, tiles = nt;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const int a = __shfl_up_sync(~0u, sum, d), b = __shfl_up_sync(~0u, tiles, d);
                if (lane >= d) {
                    sum += a;
                    tiles += b;
                }
            }
            if (e < n_expert) {
                first[e] = at + sum - c;
                first_tile[e] = t + tiles - nt;
            }
            at += __shfl_sync(~0u, sum, 31);
            t += __shfl_sync(~0u, tiles, 31);
        }
        if (lane == 0)
            *n_tiles = t;
    }
    __syncthreads();
    for (int e = warp; e < n_expert; e += 32) {
        const int c = count[e];
        for (int i = lane; i * width < c; i += 32)
            tile[first_tile[e] + i] = make_int4(e, first[e] + i * width, min(width, c - i * width), 0);
        for (int p0 = 0, at = first[e]; c > 0 && p0 < pairs; p0 += 32) {
            const bool mine = p0 + lane < pairs && id[p0 + lane] == e;
            const uint32_t who = __ballot_sync(~0u, mine);
            if (mine)
                perm[at + __popc(who & ((1u << lane) - 1))] = p0 + lane;
            at += __popc(who);
        }
    }
}

/* ---- sum over the experts of a row ---- */

/* Pairs of experts first, then the pairs in order: y = (y + p0) + p1 ... */
static __global__ void combine_kernel(cuda_count rows, const float *down, const float *weight, int k, float *y, int n) {
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x;
    if (row >= count_rows(rows))
        return;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.y) {
        const float *d = down + (int64_t)row * k * n + i, *w = weight + (int64_t)row * k;
        float v = y[(int64_t)row * n + i];
        for (int j = 0; j < k; j += 2) {
            float p = __fmul_rn(w[j], d[(int64_t)j * n]);
            if (j + 1 < k)
                p = fmaf(w[j + 1], d[(int64_t)(j + 1) * n], p);
            v += p;
        }
        y[(int64_t)row * n + i] = v;
    }
}

/* Rows of a tile: as many as an expert gets on average, rounded up. */
static int tile_width(int pairs, int n_expert) {
    const int mean = (pairs + n_expert - 1) / n_expert;
    return mean <= 6 ? 8 : mean <= 14 ? 16 : mean <= 28 ? 32 : 64;
}

void cuda_run_experts(cuda_run *r, const cuda_cmd *c) {
    cuda_dev *d = r->dev;
    cuda_scratch *s = &d->scratch;
    const cuda_count rows = cuda_rows_of(r, c);
    const int n_expert = (int)c->w->base.n_mat, pairs = rows.cap * c->k, width = tile_width(pairs, n_expert);
    const int by_count = n_expert + pairs / width, n_block = pairs < by_count ? pairs : by_count;
    cuda_launch(r, order_kernel, dim3(1), dim3(1024), 0, rows, (const int32_t *)c->z->id, c->k, n_expert, width,
                s->perm, s->tile, s->count);
    lin_args a = {};
    a.tile = s->tile;
    a.n_tiles = s->count;
    a.perm = s->perm;
    a.k = c->k;
    a.x = c->x->f16;
    a.ldx = c->x->ld;
    a.bias = c->w->bias;
    a.bias_mat = c->w->base.n_row;
    a.yh = s->hidden;
    a.ldh = round_up(c->w->matrix[0].n_row, 64);
    a.alpha = c->glu.alpha;
    a.limit = c->glu.limit;
    lin_launch<LIN_GATE_UP>(r, &c->w->matrix[0], a, width, n_block);
    a.x = s->hidden;
    a.ldx = a.ldh;
    a.yh = NULL;
    a.bias = c->w2->bias;
    a.bias_mat = c->w2->base.n_row;
    a.y = s->down;
    a.ldy = c->w2->base.n_row;
    lin_launch<LIN_DOWN>(r, &c->w2->matrix[0], a, width, n_block);
    const unsigned wide = rows.cap < 64 ? 8 : 1;
    cuda_launch(r, combine_kernel, dim3((unsigned)rows.cap, wide), dim3(wide > 1 ? 384 : 512), 0, rows,
                (const float *)s->down, (const float *)c->z->expert_w, c->k, c->y->f32, (int)c->w2->base.n_row);
}
