/* backend/cuda/experts.cu: routing rows to experts, and the experts.
 *
 * Rows are put in order of their experts (perm), cut into tiles of at most `width` rows of one expert, and each tile
 * goes through the packed products. Each (row, expert) pair's output is kept apart and added up at the end in the order
 * of the route, so that a row's result does not depend on its neighbours. */
#include "backend/cuda/stream.cuh"
#include "backend/cuda/wide.cuh"

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

/* Router weights (times gain) of 16 columns times the row's: products, then halves added onto each other, as the
 * butterflies of the decode kernels do. */
static __device__ __forceinline__ float route_tile(const float4 (&w)[4], const float *x) {
    float v[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float4 a = ((const float4 *)x)[i];
        v[4 * i] = __fmul_rn(w[i].x, a.x), v[4 * i + 1] = __fmul_rn(w[i].y, a.y);
        v[4 * i + 2] = __fmul_rn(w[i].z, a.z), v[4 * i + 3] = __fmul_rn(w[i].w, a.w);
    }
#pragma unroll
    for (int d = 8; d; d >>= 1)
#pragma unroll
        for (int i = 0; i < d; i++)
            v[i] = __fadd_rn(v[i], v[i + d]);
    return v[0];
}

/* Norm and router of a residual row in one: the router sees the row before the norm, its weights carry the gain, and
 * the norm's scale comes last: the order of sums that the decode kernels use, tile by tile of 16 values. */
static __global__ __launch_bounds__(ROW_THREADS) void norm_route_kernel(cuda_count rows, const float *x, int n,
                                                                        const float *gain, float eps,
                                                                        const float *router, const float *bias,
                                                                        int n_expert, int k, uint16_t *y, int64_t ld,
                                                                        int32_t *id, float *weight) {
    constexpr int AHEAD = 4;         /* tiles on their way at once */
    extern __shared__ float4 row4[]; /* [n rounded up to 16] floats */
    __shared__ float part[16], sums[16][32], logit[CUDA_MAX_EXPERT];
    float *xs = (float *)row4;
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tile = (n + 15) / 16;
    if (row >= count_rows(rows))
        return;
    x += (int64_t)row * n;
    float s = 0;
    for (int i = 4 * threadIdx.x; i < n_tile * 16; i += 4 * ROW_THREADS) {
        float4 v;
        if (n % 4 == 0)
            v = i < n ? *(const float4 *)(x + i) : make_float4(0, 0, 0, 0);
        else
            v = make_float4(i < n ? x[i] : 0.f, i + 1 < n ? x[i + 1] : 0.f, i + 2 < n ? x[i + 2] : 0.f,
                            i + 3 < n ? x[i + 3] : 0.f);
        row4[i / 4] = v;
        s = sum_sq4(v, s);
    }
    const float rs = rms_scale(row_sum(s, part), n, eps);
    for (int e0 = 0; e0 < n_expert; e0 += 32) {
        const int e = min(e0 + lane, n_expert - 1);
        float t = 0;
        for (int i0 = warp; i0 < n_tile; i0 += 16 * AHEAD) {
            float4 w[AHEAD][4];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    w[j][q] = i0 + 16 * j < n_tile
                                  ? ((const float4 *)(router + ((int64_t)(i0 + 16 * j) * n_expert + e) * 16))[q]
                                  : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (i0 + 16 * j < n_tile)
                    t += route_tile(w[j], xs + (i0 + 16 * j) * 16);
        }
        sums[warp][lane] = t;
        __syncthreads();
        if (warp == 0 && e0 + lane < n_expert) {
            t = sums[0][lane];
#pragma unroll
            for (int w = 1; w < 16; w++)
                t += sums[w][lane];
            logit[e] = fmaf(t, rs, bias ? bias[e] : 0.f);
        }
        __syncthreads();
    }
    if (warp == 0)
        choose(logit, n_expert, k, id + (int64_t)row * k, weight + (int64_t)row * k);
    for (int i = threadIdx.x; i < n; i += ROW_THREADS)
        y[row * ld + i] = f16_bits(__fmul_rn(__fmul_rn(xs[i], rs), gain[i]));
}

/* The same for ROUTE_ROWS rows a block, a lane an expert: the sums of norm_route_kernel in their order, without its
 * shuffles, and weights read once for all rows. */
#define ROUTE_ROWS 8
#define ROUTE_EXPERTS 128

static __global__ __launch_bounds__(ROW_THREADS) void norm_route_many_kernel(cuda_count rows, const float *x, int n,
                                                                             const float *gain, float eps,
                                                                             const float *router, const float *bias,
                                                                             int n_expert, int k, uint16_t *y,
                                                                             int64_t ld, int32_t *id, float *weight) {
    extern __shared__ float4 many_rows[]; /* [ROUTE_ROWS][n rounded up to 16] */
    __shared__ float part[ROUTE_ROWS][16], sums[16][ROUTE_ROWS][32], logit[ROUTE_ROWS][ROUTE_EXPERTS];
    pdl_launch();
    pdl_wait();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tile = (n + 15) / 16, row0 = blockIdx.x * ROUTE_ROWS;
    const int n_row = min(ROUTE_ROWS, count_rows(rows) - row0);
    float *xs = (float *)many_rows;
    if (n_row <= 0)
        return;
    for (int r = 0; r < ROUTE_ROWS; r++) {
        const float *src = x + (int64_t)(row0 + r) * n;
        float s = 0;
        for (int i = 4 * threadIdx.x; i < n_tile * 16; i += 4 * ROW_THREADS) {
            float4 v = make_float4(0, 0, 0, 0);
            if (r < n_row && i + 3 < n && n % 4 == 0)
                v = *(const float4 *)(src + i);
            else if (r < n_row)
                v = make_float4(i < n ? src[i] : 0.f, i + 1 < n ? src[i + 1] : 0.f, i + 2 < n ? src[i + 2] : 0.f,
                                i + 3 < n ? src[i + 3] : 0.f);
            *(float4 *)(xs + r * n_tile * 16 + i) = v;
            s = sum_sq4(v, s);
        }
        s = warp_sum(s);
        if (lane == 0)
            part[r][warp] = s;
    }
    __syncthreads();
    for (int r = 0; r < n_row; r++) {
        float s = part[r][0];
#pragma unroll
        for (int w = 1; w < ROW_THREADS / 32; w++)
            s += part[r][w];
        const float rs = rms_scale(s, n, eps);
        for (int i = threadIdx.x; i < n; i += ROW_THREADS)
            y[(row0 + r) * ld + i] = f16_bits(__fmul_rn(__fmul_rn(xs[r * n_tile * 16 + i], rs), gain[i]));
    }
    for (int e0 = 0; e0 < n_expert; e0 += 32) {
        const int e = min(e0 + lane, n_expert - 1);
        float t[ROUTE_ROWS] = {0};
        for (int i = warp; i < n_tile; i += 16) {
            const float4 *src = (const float4 *)(router + ((int64_t)i * n_expert + e) * 16);
            const float4 w[4] = {src[0], src[1], src[2], src[3]};
#pragma unroll
            for (int r = 0; r < ROUTE_ROWS; r++)
                t[r] += route_tile(w, xs + (r * n_tile + i) * 16);
        }
#pragma unroll
        for (int r = 0; r < ROUTE_ROWS; r++)
            sums[warp][r][lane] = t[r];
        __syncthreads();
        if (warp < ROUTE_ROWS && e0 + lane < n_expert) {
            float s = part[warp][0], sum = sums[0][warp][lane];
#pragma unroll
            for (int w = 1; w < 16; w++) {
                s += part[warp][w];
                sum += sums[w][warp][lane];
            }
            logit[warp][e] = fmaf(sum, rms_scale(s, n, eps), bias ? bias[e] : 0.f);
        }
        __syncthreads();
    }
    if (warp < n_row)
        choose(logit[warp], n_expert, k, id + (int64_t)(row0 + warp) * k, weight + (int64_t)(row0 + warp) * k);
}

void cuda_run_moe(cuda_run *r, const cuda_cmd *c) {
    const cuda_count rows = cuda_rows_of(r, c);
    const int n = (int)c->x->base.width, n_expert = (int)c->w2->base.n_row;
    const size_t row = (size_t)(n + 15) / 16 * 64;
    const bool many = rows.cap > 128 && n_expert <= ROUTE_EXPERTS && row * ROUTE_ROWS <= (size_t)100 * 1024;
    if (many && r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(norm_route_many_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)row * ROUTE_ROWS);
    cuda_launch(r, many ? norm_route_many_kernel : norm_route_kernel,
                dim3((unsigned)(many ? (rows.cap + ROUTE_ROWS - 1) / ROUTE_ROWS : rows.cap)), dim3(ROW_THREADS),
                many ? row * ROUTE_ROWS : row, rows, (const float *)c->x->f32, n, (const float *)c->w->dense, c->eps,
                (const float *)c->w2->gained, (const float *)c->w2->bias, n_expert, c->k, c->y->f16, c->y->ld, c->z->id,
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

/* One block: pairs in order of expert then row, and the tiles of at most `width` of them. pad > 1: an expert's pairs
 * begin at a multiple of it, perm is -1 between experts, and an expert's tiles are alike; total: pairs and padding. */
static __global__ __launch_bounds__(1024) void order_kernel(cuda_count rows, const int32_t *id, int k, int n_expert,
                                                            int width, int pad, int32_t *perm, int4 *tile,
                                                            int32_t *n_tiles, int32_t *total) {
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
            const int padded = (c + pad - 1) / pad * pad;
            int sum = padded, tiles = nt;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const int a = __shfl_up_sync(~0u, sum, d), b = __shfl_up_sync(~0u, tiles, d);
                if (lane >= d) {
                    sum += a;
                    tiles += b;
                }
            }
            if (e < n_expert) {
                first[e] = at + sum - padded;
                first_tile[e] = t + tiles - nt;
            }
            at += __shfl_sync(~0u, sum, 31);
            t += __shfl_sync(~0u, tiles, 31);
        }
        if (lane == 0) {
            *n_tiles = t;
            *total = at;
        }
    }
    __syncthreads();
    for (int e = warp; e < n_expert; e += 32) {
        const int c = count[e], nt = (c + width - 1) / width;
        const int per = pad > 1 && nt ? ((c + nt - 1) / nt + pad - 1) / pad * pad : width;
        for (int i = lane; i < nt; i += 32)
            tile[first_tile[e] + i] = make_int4(e, first[e] + i * per, min(per, c - i * per), 0);
        if (c + lane < (c + pad - 1) / pad * pad)
            perm[first[e] + c + lane] = -1;
        for (int p0 = 0, at = first[e]; c > 0 && p0 < pairs; p0 += 8 * 32) {
            int32_t v[8];
#pragma unroll
            for (int q = 0; q < 8; q++)
                v[q] = p0 + q * 32 + lane < pairs ? id[p0 + q * 32 + lane] : -1;
#pragma unroll
            for (int q = 0; q < 8; q++) {
                const uint32_t who = __ballot_sync(~0u, v[q] == e);
                if (v[q] == e)
                    perm[at + __popc(who & ((1u << lane) - 1))] = p0 + q * 32 + lane;
                at += __popc(who);
            }
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
    return mean <= 5 ? 8 : mean <= 11 ? 16 : mean <= 32 ? STREAM_MAX_COLS : 64;
}

template <lin_mode MODE> static void run_tiles(cuda_run *r, const cuda_matrix *m, const lin_args &a, int width, int n) {
    if (width > STREAM_MAX_COLS || !stream_run<MODE>(r, m, a, width, n))
        lin_launch<MODE>(r, m, a, width == STREAM_MAX_COLS ? 32 : width, n);
}

static void to_down(lin_args *a, const cuda_cmd *c, const cuda_scratch *s) {
    a->bias = c->w2->bias;
    a->bias_mat = c->w2->base.n_row;
    a->y = s->down;
    a->ldy = c->w2->base.n_row;
}

static void run_wide(cuda_run *r, const cuda_cmd *c, const lin_args &l, int pairs) {
    cuda_scratch *s = &r->dev->scratch;
    wide_pack(r, {s->count + 1, pairs}, s->perm, c->k, c->x->f16, c->x->ld, s->wide_x, pairs);
    wide_args a = {};
    a.l = l;
    a.x = s->wide_x;
    a.ldx = pairs;
    a.hidden = s->wide_hidden;
    wide_launch<LIN_GATE_UP>(r, &c->w->matrix[0], a);
    a.x = s->wide_hidden;
    to_down(&a.l, c, s);
    wide_launch<LIN_DOWN>(r, &c->w2->matrix[0], a);
}

void cuda_run_experts(cuda_run *r, const cuda_cmd *c) {
    if (c->w->on_host) {
        cuda_run_host_experts(r, c);
        return;
    }
    cuda_dev *d = r->dev;
    cuda_scratch *s = &d->scratch;
    const cuda_count rows = cuda_rows_of(r, c);
    const int n_expert = (int)c->w->base.n_mat, pairs = rows.cap * c->k, few = tile_width(pairs, n_expert);
    const bool wide = few == 64 && cuda_has_wide(d);
    const int width = wide ? WIDE_COLS : few;
    const int by_count = n_expert + pairs / width, n_block = pairs < by_count ? pairs : by_count;
    cuda_launch(r, order_kernel, dim3(1), dim3(1024), 0, rows, (const int32_t *)c->z->id, c->k, n_expert, width,
                wide ? 8 : 1, s->perm, s->tile, s->count, s->count + 1);
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
    if (wide)
        run_wide(r, c, a, (int)cuda_wide_pairs(pairs, n_expert));
    else {
        run_tiles<LIN_GATE_UP>(r, &c->w->matrix[0], a, width, n_block);
        a.x = s->hidden;
        a.ldx = a.ldh;
        a.yh = NULL;
        to_down(&a, c, s);
        run_tiles<LIN_DOWN>(r, &c->w2->matrix[0], a, width, n_block);
    }
    const unsigned parts = rows.cap < 64 ? 8 : 1;
    cuda_launch(r, combine_kernel, dim3((unsigned)rows.cap, parts), dim3(parts > 1 ? 384 : 512), 0, rows,
                (const float *)s->down, (const float *)c->z->expert_w, c->k, c->y->f32, (int)c->w2->base.n_row);
}
