/* backend/cuda/few_linear.cuh: the dense products of a decode step of 3 to 8 rows: qkv + rope + KV write, and out +
 * router.
 *
 * As for one row, but norms stand at the end of the kernel before: when all of its CTAs have come to their end, one CTA
 * a row adds up what the row needs and leaves it normed as f16, which the next kernel takes straight to registers. */
#ifndef ORCD_BACKEND_CUDA_FEW_LINEAR_CUH
#define ORCD_BACKEND_CUDA_FEW_LINEAR_CUH

#include "backend/cuda/decode_experts.cuh"
#include "backend/cuda/decode_linear.cuh"

#define FEW_MAX 8 /* rows */

struct few_rows {
    const int32_t *n;
    const uint16_t *x; /* [FEW_MAX][ld] f16 */
    int64_t ld;
    uint32_t *zero; /* a counter that nobody looks at any more */
    __device__ __forceinline__ void reset() const {
        if (blockIdx.x == 0 && threadIdx.x == 0)
            *zero = 0;
    }
};

__device__ __forceinline__ void few_count(uint32_t *counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void few_await(const uint32_t *counter, uint32_t n) {
    uint32_t v;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    while (v != n);
}

/* By all CTAs, when what they computed is written: true in the CTA that finishes `row`, once all have come. They do
 * not wait for each other in vain: the next kernel's CTAs start when all of these have, so all find room at once. */
__device__ __forceinline__ bool few_all_done(uint32_t *done, int n_row, int &row) {
    row = (int)(gridDim.x - 1 - blockIdx.x);
    const bool mine = row < n_row;
    __syncwarp(); /* a producer's lanes come apart */
    __syncthreads();
    if (threadIdx.x == 0) {
        few_count(done);
        if (mine)
            few_await(done, gridDim.x);
    }
    if (mine)
        __syncthreads();
    return mine;
}

struct few_norm { /* of the row that a CTA finishes */
    const float *gain;
    float eps;
    int n_embd;  /* <= 4096, a multiple of 4 */
    uint16_t *y; /* [FEW_MAX][ld] f16 */
    int64_t ld;
    __device__ __forceinline__ void put(int row, const float4 (&v)[2], float rs) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 4 * (threadIdx.x + i * ROW_THREADS);
            if (at < n_embd)
                *(uint2 *)(y + row * ld + at) = dec_norm4(v[i], rs, *(const float4 *)(gain + at));
        }
    }
};

/* Units per ring stage and stages. */
template <class F, int R> struct few_plan {
    static constexpr int UNITS = R == 8 ? 1 : 3, STAGES = R == 8 ? 4 : 2, OUT_UNITS = 2, OUT_STAGES = 2;
};
template <int R> struct few_plan<form_f16<1>, R> {
    static constexpr int UNITS = 1, STAGES = R == 8 ? 2 : 3, OUT_UNITS = 1, OUT_STAGES = 3;
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    few_qkv_kernel(few_rows in, dec_matrix w, dec_rope rope, dec_kv kv, int n_head, int n_kv, bool early, __half *q) {
    using plan = few_plan<F, R>;
    __shared__ float bias[DEC_MAX_TILES * 16];
    __shared__ float2 cs[R * 32];
    __shared__ int64_t at[R * 2];
    const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 4, n_seg = w.n_unit / SEG;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<1, R>);
    const int first = dec_share(w.n_tile, blockIdx.x), n = dec_share(w.n_tile, blockIdx.x + 1) - first;
    dec_tiles_plain tile = {w.w + (int64_t)first * w.n_unit * F::CHUNK, (int64_t)w.n_unit * F::CHUNK};
    dec_qkv_epilogue<R> epi = {w, rope, kv, in.n, n_head, n_kv, q, bias, cs, at, early};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    epi.before_wait(first, n);
    pdl_wait();
    epi.after_wait();
    in.reset();
    dec_x8<SEG> x;
    x.load(active && row < R ? in.x + row * in.ld + warp * SEG * 64 : NULL);
    dec_tiles<1, R>(feed, tile, x, red, n, active,
                    [&](const float *sums, int i0, int m) { epi(sums, first + i0, i0, m, n_seg); });
}

/* logits[out][n_vocab] of the wanted rows. */
template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    few_head_kernel(few_rows in /* n: outputs */, const int32_t *out_row, dec_matrix w, int n_vocab, float *logits) {
    using plan = few_plan<F, R>;
    const int warp = threadIdx.x / 32, col = threadIdx.x % 32 / 4, n_seg = w.n_unit / SEG;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<1, R>);
    const int first = dec_share(w.n_tile, blockIdx.x), n = dec_share(w.n_tile, blockIdx.x + 1) - first;
    dec_tiles_plain tile = {w.w + (int64_t)first * w.n_unit * F::CHUNK, (int64_t)w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    const int n_out = __ldcg(in.n), i = threadIdx.x / (16 * R), j = threadIdx.x / 16 % R, r = threadIdx.x % 16;
    const uint16_t *from = active && col < n_out ? in.x + __ldcg(out_row + col) * in.ld + warp * SEG * 64 : NULL;
    pdl_launch();
    pdl_wait();
    dec_x8<SEG> x;
    x.load(from);
    dec_tiles<1, R>(feed, tile, x, red, n, active, [&](const float *sums, int i0, int m) {
        const int row = (first + i0 + i) * 16 + r;
        if (i >= m || j >= n_out || row >= n_vocab)
            return;
        float v = dec_sum<R>(sums, i, j, r, n_seg) * w.post;
        if (w.bias)
            v += w.bias[row];
        logits[(int64_t)j * n_vocab + row] = v;
    });
}

/* ---- out: x += W y + b, and each tile's share of the router's sums; then each row's route and norm ---- */

struct few_out {
    few_rows in;
    float *x;            /* [rows][n_embd] */
    const float *router; /* as dec_out's */
    float *route_part;   /* [FEW_MAX][tile][n_expert] */
    uint32_t *done;
    dec_route route; /* of row 0 */
    few_norm norm;
    int32_t *id; /* [FEW_MAX][DEC_TOP_K] */
    float *weight;
    uint32_t *routed; /* rows whose ids are there: gate_up asks for weights before the norms are done */
};

/* What a tile's end needs and was settled long before this kernel, in shared memory. */
template <int EPL, int R> struct few_settled {
    float router[EPL * ROW_THREADS]; /* the threads' in turn */
    float old[R * 16], bias[16];

    /* By asynchronous copies of all threads; rows past n_row stay what they are. */
    __device__ __forceinline__ void ask(const few_out &a, const dec_matrix &w, int tile, int n_row) {
        const int tid = threadIdx.x, e = tid / 16, r = tid % 16;
#pragma unroll
        for (int k = 0; k < EPL; k++)
            dec_async4(&router[k * ROW_THREADS + tid],
                       a.router + (((int64_t)tile * 4 + r / 4) * EPL * 32 + k * 32 + e) * 4 + r % 4);
        if (tid < R * 16 && tid / 16 < n_row)
            dec_async4(&old[tid], a.x + (int64_t)(tid / 16) * w.n_tile * 16 + tile * 16 + r);
        if (tid < 16 && w.bias)
            dec_async4(&bias[tid], w.bias + tile * 16 + tid);
        else if (tid < 16)
            bias[tid] = 0;
    }
};

/* Tile's sums of the router for R rows x16[R][16]. */
template <int EPL, int R>
__device__ __forceinline__ void few_route_tile(const few_out &a, int tile, int n_tile, const float *x16,
                                               const float *router) {
    const int e = threadIdx.x / 16, r = threadIdx.x % 16;
#pragma unroll
    for (int k = 0; k < EPL; k++) {
        const float w16 = router[k * ROW_THREADS + threadIdx.x];
#pragma unroll
        for (int j = 0; j < R; j++) {
            float v = __fmul_rn(w16, x16[j * 16 + r]);
#pragma unroll
            for (int d = 8; d; d >>= 1)
                v += __shfl_xor_sync(~0u, v, d);
            if (r == 0)
                a.route_part[((int64_t)j * n_tile + tile) * EPL * 32 + k * 32 + e] = v;
        }
    }
}

template <int EPL> __device__ __forceinline__ void few_route_row(const few_out &a, int row, float *shared) {
    dec_route route = a.route;
    route.x = a.x + (int64_t)row * route.n_embd;
    route.part = a.route_part + (int64_t)row * route.n_part * EPL * 32;
    dec_choice<EPL, 1> to;
    to.early(route);
    to.gather(route, shared);
    if (threadIdx.x < 32) {
        to.choose();
        const float weight = to.weigh();
        if (threadIdx.x < DEC_TOP_K) {
            a.id[row * DEC_TOP_K + threadIdx.x] = to.id;
            a.weight[row * DEC_TOP_K + threadIdx.x] = weight;
        }
        __syncwarp();
        if (threadIdx.x == 0)
            few_count(a.routed);
    }
    a.norm.put(row, to.v, to.rs[0]);
}

template <class F, int SEG, int EPL, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2) few_out_kernel(few_out a, dec_matrix w) {
    using plan = few_plan<F, R>;
    constexpr int G = 2;
    const int tid = threadIdx.x, warp = tid / 32, row = tid % 32 / 4, n_seg = w.n_unit / SEG;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::OUT_UNITS, plan::OUT_STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<G, R>);
    float *xt = (float *)c.take(2 * G * R * 16 * 4);
    few_settled<EPL, R> *early = (few_settled<EPL, R> *)c.take(G * sizeof *early);
    const int step = gridDim.x, n = (w.n_tile - blockIdx.x + step - 1) / step, n_row = __ldcg(a.in.n);
    dec_tiles_plain tile = {w.w + (int64_t)blockIdx.x * w.n_unit * F::CHUNK, (int64_t)step * w.n_unit * F::CHUNK};
    for (int i = 0; i < min(n, G); i++) /* the first group's; before the weights, so that they are there before them */
        early[i].ask(a, w, blockIdx.x + i * step, n_row);
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    pdl_launch();
    pdl_wait();
    dec_x8<SEG> x;
    x.load(active && row < R ? a.in.x + row * a.in.ld + warp * SEG * 64 : NULL);
    int k = 0;
    dec_tiles<G, R>(feed, tile, x, red, n, active, [&](const float *sums, int i0, int m) {
        float *x16 = xt + k * G * R * 16;
        k ^= 1;
        if (i0 > 0) { /* more groups than one: their turn */
            __syncthreads();
            for (int i = 0; i < m; i++)
                early[i].ask(a, w, blockIdx.x + (i0 + i) * step, n_row);
            dec_async_done();
            __syncthreads();
        }
        const int i = tid / (16 * R), j = tid / 16 % R, r = tid % 16;
        if (i < m) {
            float v = dec_sum<R>(sums, i, j, r, n_seg) * w.post;
            v = early[i].old[j * 16 + r] + (v + early[i].bias[r]);
            if (j < n_row)
                a.x[(int64_t)j * w.n_tile * 16 + (blockIdx.x + (i0 + i) * step) * 16 + r] = v;
            x16[tid] = v;
        }
        __syncthreads();
        for (int t = 0; t < m; t++)
            few_route_tile<EPL, R>(a, blockIdx.x + (i0 + t) * step, w.n_tile, x16 + t * R * 16, early[t].router);
    });
    int mine;
    if (few_all_done(a.done, n_row, mine))
        few_route_row<EPL>(a, mine, (float *)dec_shared);
}

/* ---- shared memory, bytes ---- */

template <class F, int R> constexpr size_t few_linear_smem(int n_seg) {
    using plan = few_plan<F, R>;
    return (size_t)n_seg * plan::UNITS * plan::STAGES * F::CHUNK + dec_sums_bytes<1, R>;
}
template <class F, int EPL, int R> constexpr size_t few_out_smem(int n_seg) {
    using plan = few_plan<F, R>;
    return (size_t)n_seg * plan::OUT_UNITS * plan::OUT_STAGES * F::CHUNK + dec_sums_bytes<2, R> + 4 * R * 64 +
           2 * sizeof(few_settled<EPL, R>);
}

#endif
