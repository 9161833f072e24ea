/* backend/cuda/experts.cu: routing rows to experts, and the experts.
 *
 * Rows are put in order of their experts (perm), cut into tiles of at most `width` rows of one expert, and each tile
 * goes through the packed products. Each (row, expert) pair's output is kept apart and added up at the end in the order
 * of the route, so that a row's result does not depend on its neighbours. */
#include "backend/cuda/broad.cuh"
#include "backend/cuda/pour.cuh"
#include "backend/cuda/stream.cuh"

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
        __syncwarp(); /* all lanes have read the logits */
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
    for (int i = 0; i < 8; i++) /* a loop over the halvings would stay a loop */
        v[i] = __fadd_rn(v[i], v[i + 8]);
#pragma unroll
    for (int i = 0; i < 4; i++)
        v[i] = __fadd_rn(v[i], v[i + 4]);
    return __fadd_rn(__fadd_rn(v[0], v[2]), __fadd_rn(v[1], v[3]));
}

/* What the experts' sums of a row share: the row, the router's weights and where tiles' sums go. */
struct route_args {
    cuda_count rows;
    const float *x, *gain, *router, *bias;
    int n, n_expert, k;
    float eps;
    uint16_t *y;
    int64_t ld;
    int32_t *id;
    float *weight;
    float *part;       /* [row][tile][n_expert] */
    uint32_t *arrived; /* [row], zero; left zero */
};

/* Sums of tiles [from, to) of a row in shared memory, a warp (tile, 32 experts) at a time. */
static __device__ void route_tiles(const route_args &a, const float *xs, int from, int to, float *part) {
    constexpr int AHEAD = 3; /* on their way at once */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, groups = (a.n_expert + 31) / 32;
    const int n = (to - from) * groups;
    for (int i0 = warp; i0 < n; i0 += 16 * AHEAD) {
        float4 w[AHEAD][4];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int i = min(i0 + 16 * j, n - 1), e = min(i % groups * 32 + lane, a.n_expert - 1);
#pragma unroll
            for (int q = 0; q < 4; q++)
                w[j][q] = __ldg((const float4 *)a.router + ((int64_t)(from + i / groups) * 4 + q) * a.n_expert + e);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const int i = i0 + 16 * j, tile = from + i / groups, e = i % groups * 32 + lane;
            if (i < n && e < a.n_expert)
                __stcg(part + (int64_t)tile * a.n_expert + e, route_tile(w[j], xs + tile * 16));
        }
    }
}

/* logit[n_expert] (shared) from the tiles' sums: tiles w, w + 16, .. for w = 0 .. 15, then those. */
static __device__ void route_logits(const route_args &a, const float *part, int n_tile, float rs, float (*sums)[32],
                                    float *logit) {
    constexpr int AHEAD = 12;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e0 = 0; e0 < a.n_expert; e0 += 32) {
        const int e = min(e0 + lane, a.n_expert - 1);
        float t = 0;
        for (int i0 = warp; i0 < n_tile; i0 += 16 * AHEAD) {
            float v[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                v[j] = i0 + 16 * j < n_tile ? __ldcg(part + (int64_t)(i0 + 16 * j) * a.n_expert + e) : 0.f;
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (i0 + 16 * j < n_tile)
                    t += v[j];
        }
        sums[warp][lane] = t;
        __syncthreads();
        if (warp == 0 && e0 + lane < a.n_expert) {
            t = sums[0][lane];
#pragma unroll
            for (int w = 1; w < 16; w++)
                t += sums[w][lane];
            logit[e] = fmaf(t, rs, a.bias ? a.bias[e] : 0.f);
        }
        __syncthreads();
    }
}

/* Norm and router of a residual row in one: the router sees the row before the norm, its weights carry the gain, and
 * the norm's scale comes last: the order of sums that the decode kernels use, tile by tile of 16 values. The blocks of
 * a row (grid.y) share its tiles; the last to finish adds them up and chooses. */
static __global__ __launch_bounds__(ROW_THREADS) void norm_route_kernel(route_args a) {
    extern __shared__ float4 row4[]; /* [n rounded up to 16] floats */
    __shared__ float part16[16], sums[16][32], logit[CUDA_MAX_EXPERT];
    __shared__ bool last;
    float *xs = (float *)row4;
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, n = a.n, n_tile = (n + 15) / 16;
    if (row >= count_rows(a.rows))
        return;
    const float *x = a.x + (int64_t)row * n;
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
    const float rs = rms_scale(row_sum(s, part16), n, a.eps);
    float *part = a.part + (int64_t)row * n_tile * a.n_expert;
    const int from = n_tile * blockIdx.y / gridDim.y, to = n_tile * (blockIdx.y + 1) / gridDim.y;
    route_tiles(a, xs, from, to, part);
    for (int i = from * 16 + threadIdx.x; i < min(to * 16, n); i += ROW_THREADS)
        a.y[row * a.ld + i] = f16_bits(__fmul_rn(__fmul_rn(xs[i], rs), a.gain[i]));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&a.arrived[row], 1) == gridDim.y - 1;
        if (last)
            a.arrived[row] = 0;
    }
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    route_logits(a, part, n_tile, rs, sums, logit);
    if (threadIdx.x < 32)
        choose(logit, a.n_expert, a.k, a.id + (int64_t)row * a.k, a.weight + (int64_t)row * a.k);
}

/* A row's scale from its 16 warps' sums of squares. */
static __device__ __forceinline__ float many_scale(const float4 (&part)[4], int n, float eps) {
    float s = 0;
#pragma unroll
    for (int w = 0; w < 4; w++)
        s = w ? s + part[w].x + part[w].y + part[w].z + part[w].w : part[w].x + part[w].y + part[w].z + part[w].w;
    return rms_scale(s, n, eps);
}

/* Half a warp has every other of R rows, a lane E experts, ROUTE_LANES apart: what is read from shared memory serves
 * several of them. Experts from e0 on, sums of the warp's tiles: to[row][expert]. */
#define ROUTE_LANES 16
template <int R, int E>
static __device__ __forceinline__ void many_tiles(const route_args &a, const float *xs, int ldx, int e0,
                                                  float (*to)[E * ROUTE_LANES]) {
    constexpr int AHEAD = E > 2 ? 1 : 2; /* tiles on their way at once */
    const int warp = threadIdx.x / 32, half = threadIdx.x / ROUTE_LANES % 2, n_tile = (a.n + 15) / 16;
    const int lane = threadIdx.x % ROUTE_LANES;
    float t[R / 2][E] = {};
    for (int i0 = warp; i0 < n_tile; i0 += 16 * AHEAD) {
        float4 w[AHEAD][E][4];
#pragma unroll
        for (int j = 0; j < AHEAD * E; j++) {
            const int tile = min(i0 + j / E * 16, n_tile - 1), e = min(e0 + j % E * ROUTE_LANES + lane, a.n_expert - 1);
#pragma unroll
            for (int q = 0; q < 4; q++)
                w[j / E][j % E][q] = __ldg((const float4 *)a.router + ((int64_t)tile * 4 + q) * a.n_expert + e);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (i0 + 16 * j < n_tile)
#pragma unroll
                for (int r = 0; r < R / 2; r++)
#pragma unroll
                    for (int e = 0; e < E; e++)
                        t[r][e] += route_tile(w[j][e], xs + (2 * r + half) * ldx + (i0 + 16 * j) * 16);
    }
#pragma unroll
    for (int i = 0; i < R / 2 * E; i++)
        to[2 * (i / E) + half][i % E * ROUTE_LANES + lane] = t[i / E][i % E];
}

/* The same for R rows a block: the sums of norm_route_kernel in their order, without its shuffles, and weights read
 * once for all rows. E: experts of a lane. */
template <int R, int E> static __global__ __launch_bounds__(ROW_THREADS, 1) void norm_route_many_kernel(route_args a) {
    constexpr int QUADS = CUDA_ROUTE_MOST / 4 / ROW_THREADS + 1; /* of a thread in a row */
    constexpr int WIDTH = E * ROUTE_LANES;
    extern __shared__ float4 many_rows[]; /* [R][n rounded up to 16, 4 more: neighbours in other banks] */
    __shared__ float4 part[R][4];
    __shared__ float sums[16][R][WIDTH], logit[R][CUDA_ROUTE_EXPERTS];
    const int n = a.n, n_quad = n / 4, n_tile = (n + 15) / 16, ld4 = n_tile * 4 + 1, row0 = blockIdx.x * R;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_launch();
    pdl_wait();
    const int n_row = min(R, count_rows(a.rows) - row0);
    if (n_row <= 0)
        return;
    float4 v[R][QUADS];
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            const int at = threadIdx.x + j * ROW_THREADS;
            v[r][j] = r < n_row && at < n_quad ? __ldcg((const float4 *)(a.x + (int64_t)(row0 + r) * n) + at)
                                               : make_float4(0, 0, 0, 0);
        }
#pragma unroll
    for (int r = 0; r < R; r++) {
        float s = 0;
#pragma unroll
        for (int j = 0; j < QUADS; j++) {
            const int at = threadIdx.x + j * ROW_THREADS;
            if (at < n_tile * 4)
                many_rows[r * ld4 + at] = v[r][j];
            s = sum_sq4(v[r][j], s);
        }
        s = warp_sum(s);
        if (lane == 0)
            ((float *)part[r])[warp] = s;
    }
    __syncthreads();
    float rs[R];
#pragma unroll
    for (int r = 0; r < R; r++)
        rs[r] = many_scale(part[r], n, a.eps);
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        const int at = threadIdx.x + j * ROW_THREADS;
        if (at >= n_quad)
            break;
        const float4 g = ((const float4 *)a.gain)[at];
#pragma unroll
        for (int r = 0; r < R; r++)
            if (r < n_row) {
                const float4 x = v[r][j];
                *(uint2 *)(a.y + (row0 + r) * a.ld + 4 * at) =
                    make_uint2(f16x2(__fmul_rn(__fmul_rn(x.x, rs[r]), g.x), __fmul_rn(__fmul_rn(x.y, rs[r]), g.y)),
                               f16x2(__fmul_rn(__fmul_rn(x.z, rs[r]), g.z), __fmul_rn(__fmul_rn(x.w, rs[r]), g.w)));
            }
    }
    for (int e0 = 0; e0 < a.n_expert; e0 += WIDTH) {
        many_tiles<R, E>(a, (const float *)many_rows, 4 * ld4, e0, sums[warp]);
        __syncthreads();
        for (int i = threadIdx.x; i < R * WIDTH; i += ROW_THREADS) {
            const int r = i / WIDTH, e = e0 + i % WIDTH;
            float sum = sums[0][r][i % WIDTH];
#pragma unroll
            for (int w = 1; w < 16; w++)
                sum += sums[w][r][i % WIDTH];
            if (e < a.n_expert)
                logit[r][e] = fmaf(sum, many_scale(part[r], n, a.eps), a.bias ? a.bias[e] : 0.f);
        }
        __syncthreads();
    }
    if (warp < n_row)
        choose(logit[warp], a.n_expert, a.k, a.id + (int64_t)(row0 + warp) * a.k,
               a.weight + (int64_t)(row0 + warp) * a.k);
}

template <int R> static void run_many_rows(cuda_run *r, const route_args &a) {
    const size_t bytes = (size_t)(round_up(a.n, 16) + 4) * 4 * R;
    const auto kernel = a.n_expert <= 2 * ROUTE_LANES ? norm_route_many_kernel<R, 2> : norm_route_many_kernel<R, 4>;
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    cuda_launch(r, kernel, dim3((unsigned)((a.rows.cap + R - 1) / R)), dim3(ROW_THREADS), bytes, a);
}

/* ---- the same by clusters: each of TEAM blocks has a quarter of the router's weights, which it asks for before the
 * rows are there, and the result of one of TEAM rows ---- */

#define TEAM 4
#define TEAM_EXPERTS 32 /* a lane each */
#define TEAM_ROWS 64    /* of a step: of more, not all clusters run at once */
struct team_shared {
    float4 w[(CUDA_ROUTE_MOST + 255) / 256][TEAM][4][TEAM_EXPERTS]; /* w[c][i]: of tile 16 c + TEAM rank + i */
    float4 x[TEAM][CUDA_ROUTE_MOST / 4];
    float sums[TEAM][TEAM][TEAM_EXPERTS]; /* of a row: of the block's tiles that are 16 apart */
    float4 part[4];
    float logit[TEAM_EXPERTS];
    uint64_t full;
};

#ifdef HAVE_WGMMA
static __device__ __forceinline__ void team_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
static __device__ __forceinline__ float team_read(const float *mine, int rank) {
    uint32_t at;
    float v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((uint32_t)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}
static __device__ void team_ask(const route_args &a, int n_tile, int rank, team_shared &s, uint32_t full) {
    int mine = 0;
    for (int tile = TEAM * rank; tile < n_tile; tile += 16)
        mine += min(TEAM, n_tile - tile);
    mbar_expect(full, (uint32_t)mine * sizeof s.w[0][0]);
    for (int tile = TEAM * rank, c = 0; tile < n_tile; tile += 16, c++)
        bulk_copy((uint32_t)__cvta_generic_to_shared(s.w[c]), a.router + (int64_t)tile * 16 * TEAM_EXPERTS,
                  (uint32_t)min(TEAM, n_tile - tile) * sizeof s.w[0][0], full);
}
#endif

/* TEAM rows a cluster: the sums of norm_route_kernel in their order. */
static __global__ __launch_bounds__(ROW_THREADS, 1) void norm_route_team_kernel(route_args a) {
#ifdef HAVE_WGMMA
    constexpr int QUADS = CUDA_ROUTE_MOST / 4 / ROW_THREADS + 1;
    extern __shared__ __align__(128) uint8_t team_memory[];
    team_shared &s = *(team_shared *)team_memory;
    const int n_quad = a.n / 4, n_tile = a.n / 16, rank = blockIdx.x % TEAM, row0 = blockIdx.x - rank;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = row0 + rank;
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(&s.full);
    if (threadIdx.x == 0) {
        mbar_init(full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        team_ask(a, n_tile, rank, s, full);
    }
    pdl_launch();
    pdl_wait();
    const int n_row = count_rows(a.rows);
    float4 own[QUADS];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        const int at = threadIdx.x + j * ROW_THREADS;
        float4 v[TEAM];
#pragma unroll
        for (int r = 0; r < TEAM; r++)
            v[r] = row0 + r < n_row && at < n_quad ? __ldcg((const float4 *)(a.x + (int64_t)(row0 + r) * a.n) + at)
                                                   : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < TEAM; r++) {
            if (at < n_quad)
                s.x[r][at] = v[r];
            if (r == rank)
                own[j] = v[r];
        }
        sum = sum_sq4(own[j], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0)
        ((float *)s.part)[warp] = sum;
    __syncthreads();
    mbar_wait(full, 0);
    float t = 0;
    for (int c = 0, tile = TEAM * rank + warp % TEAM; tile < n_tile; tile += 16, c++) {
        float4 w[4];
#pragma unroll
        for (int q = 0; q < 4; q++)
            w[q] = s.w[c][warp % TEAM][q][lane];
        t += route_tile(w, (const float *)&s.x[warp / TEAM][tile * 4]);
    }
    s.sums[warp / TEAM][warp % TEAM][lane] = t;
    team_sync();
    const float rs = many_scale(s.part, a.n, a.eps);
    if (warp == 0 && row < n_row) {
        float all = team_read(&s.sums[rank][0][lane], 0);
#pragma unroll
        for (int w = 1; w < 16; w++)
            all += team_read(&s.sums[rank][w % TEAM][lane], w / TEAM);
        s.logit[lane] = fmaf(all, rs, a.bias ? a.bias[lane] : 0.f);
        __syncwarp();
        choose(s.logit, TEAM_EXPERTS, a.k, a.id + (int64_t)row * a.k, a.weight + (int64_t)row * a.k);
    }
#pragma unroll
    for (int j = 0; j < QUADS; j++) {
        const int at = threadIdx.x + j * ROW_THREADS;
        if (at >= n_quad || row >= n_row)
            break;
        const float4 g = ((const float4 *)a.gain)[at], x = own[j];
        *(uint2 *)(a.y + row * a.ld + 4 * at) =
            make_uint2(f16x2(__fmul_rn(__fmul_rn(x.x, rs), g.x), __fmul_rn(__fmul_rn(x.y, rs), g.y)),
                       f16x2(__fmul_rn(__fmul_rn(x.z, rs), g.z), __fmul_rn(__fmul_rn(x.w, rs), g.w)));
    }
    team_sync(); /* the others have read this block's sums */
#else
    (void)a;
#endif
}

static void run_team(cuda_run *r, const route_args &a) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(norm_route_team_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        (int)sizeof(team_shared));
    cuda_launch_clusters(r, norm_route_team_kernel, dim3((unsigned)round_up(a.rows.cap, TEAM)), TEAM, dim3(ROW_THREADS),
                         sizeof(team_shared), a);
}

void cuda_run_moe(cuda_run *r, const cuda_cmd *c) {
    const cuda_scratch *s = &r->dev->scratch;
    const int n = (int)c->x->base.width, n_expert = (int)c->w2->base.n_row;
    const cuda_count rows = cuda_rows_of(r, c);
    const route_args a = {rows,     c->x->f32, c->w->dense,    c->w2->gained, c->w2->bias,
                          n,        n_expert,  c->k,           c->eps,        c->y->f16,
                          c->y->ld, c->z->id,  c->z->expert_w, s->route_part, s->route_arrived};
    if (cuda_has_wide(r->dev) && n_expert == TEAM_EXPERTS && n % 16 == 0 && n <= CUDA_ROUTE_MOST && rows.cap > 16 &&
        rows.cap <= TEAM_ROWS) {
        run_team(r, a);
    } else if (rows.cap <= CUDA_ROUTE_ROWS || !cuda_routes_many(n, n_expert)) {
        const unsigned parts = rows.cap <= 16 ? 8 : rows.cap <= 64 ? 2 : 1;
        cuda_launch(r, norm_route_kernel, dim3((unsigned)rows.cap, parts), dim3(ROW_THREADS),
                    (size_t)round_up(n, 16) * 4, a);
    } else if (rows.cap <= 2 * r->dev->n_sm)
        run_many_rows<2>(r, a);
    else if (rows.cap <= 4 * r->dev->n_sm)
        run_many_rows<4>(r, a);
    else
        run_many_rows<8>(r, a);
}

/* [tile of 16 columns][four columns][row][4] = weight times gain */
static __global__ void gain_kernel(const float *w, const float *gain, int n_row, int n, float *out) {
    const int tile = blockIdx.x;
    for (int i = threadIdx.x; i < n_row * 16; i += blockDim.x) {
        const int col = tile * 16 + i / (4 * n_row) * 4 + i % 4, row = i / 4 % n_row;
        out[(int64_t)tile * n_row * 16 + i] = col < n ? __fmul_rn(w[(int64_t)row * n + col], gain[col]) : 0.f;
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

/* One block: pairs in order of their experts, and the tiles of at most `width` of them. even: an expert's tiles are
 * alike, multiples of 8. pad: what an expert's pairs begin at a multiple of; perm is -1 between experts. total: pairs
 * and padding. In which order an expert has its pairs is left to chance: no result depends on it. */
static __global__ __launch_bounds__(1024) void order_kernel(cuda_count rows, const int32_t *id, int k, int n_expert,
                                                            int width, int pad, bool even, int32_t *perm, int4 *tile,
                                                            int32_t *n_tiles, int32_t *total) {
    __shared__ int count[CUDA_MAX_EXPERT], first[CUDA_MAX_EXPERT], first_tile[CUDA_MAX_EXPERT], next[CUDA_MAX_EXPERT];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    pdl_launch();
    for (int e = threadIdx.x; e < n_expert; e += 1024)
        count[e] = 0;
    __syncthreads();
    pdl_wait();
    const int pairs = count_rows(rows) * k;
#pragma unroll 4
    for (int p = threadIdx.x; p < pairs; p += 1024)
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
                first[e] = next[e] = at + sum - padded;
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
#pragma unroll 4
    for (int p = threadIdx.x; p < pairs; p += 1024)
        perm[atomicAdd(&next[id[p]], 1)] = p;
    for (int e = warp; e < n_expert; e += 32) {
        const int c = count[e], nt = (c + width - 1) / width;
        const int per = even && nt ? ((c + nt - 1) / nt + 7) / 8 * 8 : width;
        for (int i = lane; i < nt; i += 32)
            tile[first_tile[e] + i] = make_int4(e, first[e] + i * per, min(per, c - i * per), 0);
        if (c + lane < (c + pad - 1) / pad * pad)
            perm[first[e] + c + lane] = -1;
    }
}

/* ---- sum over the experts of a row ---- */

#define COMBINE_MAX 4096 /* values of a row that one block combines and norms */

static __device__ __forceinline__ float pair_sum(float wa, float a, float wb, float b, bool both) {
    const float p = __fmul_rn(wa, a);
    return both ? fmaf(wb, b, p) : p;
}

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
            const bool both = j + 1 < k;
            v += pair_sum(w[j], d[(int64_t)j * n], both ? w[j + 1] : 0.f, both ? d[(int64_t)(j + 1) * n] : 0.f, both);
        }
        y[(int64_t)row * n + i] = v;
    }
}

/* The same for all of a row by one block, and the row's RMSNorm: the sums of norm_kernel (n a multiple of 4). */
static __global__ __launch_bounds__(ROW_THREADS) void combine_norm_kernel(cuda_count rows, const float *down,
                                                                          const float *weight, int k, float *y, int n,
                                                                          const float *gain, float eps, float *z,
                                                                          uint16_t *zh, int64_t ld, pack_to pack) {
    __shared__ float part[16];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.x, n4 = n / 4;
    if (row >= count_rows(rows))
        return;
    const float *w = weight + (int64_t)row * k;
    float4 v[COMBINE_MAX / (4 * ROW_THREADS)];
    float s = 0;
#pragma unroll
    for (int i = 0; i < COMBINE_MAX / (4 * ROW_THREADS); i++) {
        const int at = threadIdx.x + i * ROW_THREADS;
        if (at >= n4)
            break;
        v[i] = ((const float4 *)(y + (int64_t)row * n))[at];
        for (int j = 0; j < k; j += 2) {
            const float4 *d = (const float4 *)(down + ((int64_t)row * k + j) * n) + at;
            const float4 a = d[0], b = j + 1 < k ? d[n4] : make_float4(0, 0, 0, 0);
            const float wa = w[j], wb = j + 1 < k ? w[j + 1] : 0.f;
            v[i].x += pair_sum(wa, a.x, wb, b.x, j + 1 < k), v[i].y += pair_sum(wa, a.y, wb, b.y, j + 1 < k);
            v[i].z += pair_sum(wa, a.z, wb, b.z, j + 1 < k), v[i].w += pair_sum(wa, a.w, wb, b.w, j + 1 < k);
        }
        ((float4 *)(y + (int64_t)row * n))[at] = v[i];
        s = sum_sq4(v[i], s);
    }
    const float rs = rms_scale(row_sum(s, part), n, eps);
#pragma unroll
    for (int i = 0; i < COMBINE_MAX / (4 * ROW_THREADS); i++) {
        const int at = threadIdx.x + i * ROW_THREADS;
        if (at >= n4)
            break;
        const float4 g = ((const float4 *)gain)[at];
        const float4 o = make_float4(__fmul_rn(__fmul_rn(v[i].x, rs), g.x), __fmul_rn(__fmul_rn(v[i].y, rs), g.y),
                                     __fmul_rn(__fmul_rn(v[i].z, rs), g.z), __fmul_rn(__fmul_rn(v[i].w, rs), g.w));
        ((float4 *)(z + (int64_t)row * n))[at] = o;
        const uint32_t h[2] = {f16x2(o.x, o.y), f16x2(o.z, o.w)};
        if (zh)
            *(uint2 *)(zh + row * ld + 4 * at) = make_uint2(h[0], h[1]);
        if (pack.at)
#pragma unroll
            for (int j = 0; j < 2; j++)
                *(uint32_t *)pack.of(row, 4 * at + 2 * j) = h[j];
    }
}

/* Rows of a tile: as many as an expert gets on average, rounded up. */
static int tile_width(int mean) { return mean <= 5 ? 8 : mean <= 11 ? 16 : mean <= 32 ? STREAM_MAX_COLS : 64; }

template <lin_mode MODE>
static void run_tiles(cuda_run *r, const cuda_matrix *m, const lin_args &a, bool pour, int width, int n) {
    if (pour)
        pour_run<MODE>(r, m, a);
    else if (width > STREAM_MAX_COLS || !stream_run<MODE>(r, m, a, width, n))
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
    uint8_t *x = (uint8_t *)s->down, *hidden = (uint8_t *)s->hidden;
    wide_pack(r, {s->count + 1, pairs}, s->perm, c->k, c->x->f16, c->x->ld, x, pairs);
    wide_args a = {};
    a.l = l;
    a.x = x;
    a.ldx = pairs;
    a.hidden = hidden;
    wide_launch<LIN_GATE_UP>(r, &c->w->matrix[0], a);
    a.x = hidden;
    to_down(&a.l, c, s);
    wide_launch<LIN_DOWN>(r, &c->w2->matrix[0], a);
}

/* Rows lie behind the results, which are written while others are still read. */
static void run_broad(cuda_run *r, const cuda_cmd *c, const lin_args &l, int pairs, int order) {
    cuda_scratch *s = &r->dev->scratch;
    uint8_t *x = (uint8_t *)s->down + cuda_broad_at(pairs, c->w2->base.n_row);
    wide_pack(r, {s->count + 1, order}, s->perm, c->k, c->x->f16, c->x->ld, x, order);
    broad_args a = {};
    a.cols = BROAD_COLS;
    a.up.l = a.down.l = l;
    a.up.ldx = a.down.ldx = order;
    a.up.x = x;
    a.down.x = a.up.hidden = (uint8_t *)s->hidden;
    to_down(&a.down.l, c, s);
    broad_run(r, &c->w->matrix[0], &c->w2->matrix[0], a);
}

bool cuda_can_combine_norm(const cuda_cmd *c, const cuda_cmd *norm) {
    const int64_t n = c->y->base.width;
    return !c->w->on_host && norm->op == CUDA_OP_NORM && norm->norm_kind == BE_NORM_RMS && norm->x == c->y &&
           norm->rows == c->rows && norm->n_row == c->n_row && !norm->w2 && n % 4 == 0 && n <= COMBINE_MAX;
}

static void run_combine(cuda_run *r, const cuda_cmd *c, const cuda_cmd *norm, cuda_count rows) {
    const float *down = r->dev->scratch.down;
    const int n = (int)c->w2->base.n_row;
    if (norm) {
        const cuda_scratch *s = &r->dev->scratch;
        const size_t room = c->w->matrix[0].n_row % 64 ? 0 : s->hidden_bytes; /* else there are zeros to be kept */
        cuda_launch(r, combine_norm_kernel, dim3((unsigned)rows.cap), dim3(ROW_THREADS), 0, rows, down,
                    (const float *)c->z->expert_w, c->k, c->y->f32, n, (const float *)norm->w->dense, norm->eps,
                    norm->y->f32, norm->y->f16, norm->y->ld, pack_rows(r, norm->y, rows.cap, s->hidden, room));
        return;
    }
    const unsigned parts = rows.cap < 64 ? 8 : 1;
    cuda_launch(r, combine_kernel, dim3((unsigned)rows.cap, parts), dim3(parts > 1 ? 384 : 512), 0, rows, down,
                (const float *)c->z->expert_w, c->k, c->y->f32, n);
}

void cuda_run_experts(cuda_run *r, const cuda_cmd *c) { cuda_run_experts_norm(r, c, NULL); }

void cuda_run_experts_norm(cuda_run *r, const cuda_cmd *c, const cuda_cmd *norm) {
    if (c->w->on_host) {
        cuda_run_host_experts(r, c);
        return;
    }
    cuda_scratch *s = &r->dev->scratch;
    const cuda_count rows = cuda_rows_of(r, c);
    const int n_expert = (int)c->w->base.n_mat, pairs = rows.cap * c->k, mean = (pairs + n_expert - 1) / n_expert;
    const bool few = chain_can(r, &c->w->matrix[0]) && chain_can(r, &c->w2->matrix[0]);
    const bool pour = few && pairs > 128 && mean <= 12, broad = few && mean > 12 && mean <= CUDA_BROAD_MEAN;
    /* Fewer rows are streamed sooner. Columns past ff stay zero in `hidden`, which has another order in wide.cuh. */
    const bool wide =
        !pour && !broad && mean > 18 && wide_can(r, c->w) && wide_can(r, c->w2) && c->w->matrix[0].n_row % 64 == 0;
    const int width = wide ? WIDE_COLS : broad ? BROAD_COLS : pour ? 24 : tile_width(mean);
    const int by_count = n_expert + pairs / width, n_block = pairs < by_count ? pairs : by_count;
    cuda_launch(r, order_kernel, dim3(1), dim3(1024), 0, rows, (const int32_t *)c->z->id, c->k, n_expert, width,
                wide || broad ? 8 : 1, wide || broad || pour, s->perm, s->tile, s->count, s->count + 1);
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
    if (broad)
        run_broad(r, c, a, pairs, (int)cuda_wide_pairs(pairs, n_expert));
    else if (wide)
        run_wide(r, c, a, (int)cuda_wide_pairs(pairs, n_expert));
    else {
        run_tiles<LIN_GATE_UP>(r, &c->w->matrix[0], a, pour, width, n_block);
        a.x = s->hidden;
        a.ldx = a.ldh;
        a.yh = NULL;
        to_down(&a, c, s);
        run_tiles<LIN_DOWN>(r, &c->w2->matrix[0], a, pour, width, n_block);
    }
    run_combine(r, c, norm, rows);
}
