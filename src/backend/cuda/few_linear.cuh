/* backend/cuda/few_linear.cuh: the dense products of a decode step of 3 to 8 rows: norm + qkv + rope + KV write, out +
 * router sums, norm + head.
 *
 * As for one and two rows, but a row is normed once in a cluster of CTAs, by one of them for all. (The experts' CTAs
 * find no room as clusters: one of all does a row.) */
#ifndef ORCD_BACKEND_CUDA_FEW_LINEAR_CUH
#define ORCD_BACKEND_CUDA_FEW_LINEAR_CUH

#include "backend/cuda/decode_experts.cuh"
#include "backend/cuda/decode_linear.cuh"

#define FEW_MAX 8 /* rows */

/* Counters of rows, which qkv clears. */
struct few_counts {
    uint32_t routed, taken; /* the experts': ids are there, normed rows */
};

__device__ __forceinline__ void few_count(uint32_t *counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
/* By one thread of a CTA: many that look hold up those that count. */
__device__ __forceinline__ void few_await(const uint32_t *counter, int n) {
    uint32_t v;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    while (v != (uint32_t)n);
}

/* Of n floats: they come from far. */
__device__ __forceinline__ void few_near(const float *p, int n) {
    for (int at = threadIdx.x * 32; at < n; at += ROW_THREADS * 32)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p + at));
}

/* What a CTA's cluster sends to all of its CTAs. */
struct few_cluster {
    int size /* a power of two */, rank;
    __device__ __forceinline__ explicit few_cluster(int size) : size(size), rank((int)(blockIdx.x % (unsigned)size)) {}
    /* v to where `to` lies in each CTA, whose bar counts it */
    __device__ __forceinline__ void put(void *to, uint2 v, uint64_t *bar) const {
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
        for (int i = 0; i < size; i++)
            dec_send(to, v, rank ^ i, bar);
#else
        *(uint2 *)to = v;
#endif
    }
    /* All that bar expects is there. */
    __device__ __forceinline__ void wait(uint64_t *bar) const {
#if __CUDA_ARCH__ >= 900
        dec_bar_wait(dec_smem(bar), 0);
#else
        __syncthreads();
#endif
    }
};

struct few_norm_in {
    const int32_t *n;        /* rows */
    const int32_t *of;       /* which rows to take; NULL: all in order */
    const float *x;          /* [row][n_embd] residual rows */
    const float *d, *weight; /* [row][slot][n_embd], [row][slot]: the experts' results; d NULL: none */
    float *x_out;            /* their sum, written by the first cluster; not x. NULL: nowhere */
    const float *gain;
    float eps;
    int n_embd;        /* <= 4096, a multiple of 4 */
    few_counts *clear; /* the experts': done, and not begun again */
};

__device__ __forceinline__ float few_add(float x, float4 w, float d0, float d1, float d2, float d3) {
    return x + fmaf(w.y, d1, __fmul_rn(w.x, d0)) + fmaf(w.w, d3, __fmul_rn(w.z, d2));
}

/* The thread's two fours of row j. */
__device__ __forceinline__ void few_row(const few_norm_in &in, const few_cluster &cl, int j, float4 (&v)[2]) {
    const int n = in.n_embd, row = in.of ? __ldcg(in.of + j) : j;
    float4 e[2][DEC_TOP_K], w;
#pragma unroll
    for (int i = 0; i < 2; i++) { /* all on their way before the first is used */
        const int at = min(4 * (threadIdx.x + i * ROW_THREADS), n - 4);
        v[i] = dec_ld4(in.x + row * n + at);
#pragma unroll
        for (int s = 0; in.d && s < DEC_TOP_K; s++)
            e[i][s] = dec_ld4(in.d + (row * DEC_TOP_K + s) * n + at);
    }
    if (!in.d)
        return;
    w = dec_ld4(in.weight + row * DEC_TOP_K);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = 4 * (threadIdx.x + i * ROW_THREADS);
        v[i].x = few_add(v[i].x, w, e[i][0].x, e[i][1].x, e[i][2].x, e[i][3].x);
        v[i].y = few_add(v[i].y, w, e[i][0].y, e[i][1].y, e[i][2].y, e[i][3].y);
        v[i].z = few_add(v[i].z, w, e[i][0].z, e[i][1].z, e[i][2].z, e[i][3].z);
        v[i].w = few_add(v[i].w, w, e[i][0].w, e[i][1].w, e[i][2].w, e[i][3].w);
        if (in.x_out && (int)blockIdx.x < cl.size && at < n)
            *(float4 *)(in.x_out + row * n + at) = v[i];
    }
}

/* xs (f16, shared, [R]) = norm of R rows, in all CTAs of the cluster; zeros past n. ws: [R][16] shared */
template <int R>
__device__ __forceinline__ void few_norm_rows(const few_norm_in &in, const few_cluster &cl, int n,
                                              const float4 (&gain)[2], __half *xs, float *ws, uint64_t *bar) {
    for (int j = cl.rank; j < R; j += cl.size) {
        float4 v[2] = {};
        float s = 0;
        if (j < n)
            few_row(in, cl, j, v);
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (4 * (threadIdx.x + i * ROW_THREADS) < in.n_embd)
                s = sum_sq4(v[i], s);
        const float rs = rms_scale(row_sum(s, ws + j * 16), in.n_embd, in.eps);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = 4 * (threadIdx.x + i * ROW_THREADS);
            if (at < in.n_embd)
                cl.put(xs + j * dec_ld(in.n_embd) + at, dec_norm4(v[i], rs, gain[i]), bar);
        }
    }
    cl.wait(bar);
}

/* Units per ring stage, stages, tiles that are added up at once. The head has a multiprocessor for itself. */
template <class F, int R> struct few_qkv_plan {
    static constexpr int UNITS = R == 8 ? 1 : 3, STAGES = R == 8 ? 4 : 2, GROUP = 1;
};
template <int R> struct few_qkv_plan<form_f16<1>, R> {
    static constexpr int UNITS = 1, STAGES = R == 8 ? 2 : 3, GROUP = 1;
};
template <class F, int R> struct few_head_plan { static constexpr int UNITS = 1, STAGES = 8, GROUP = 16 / R; };
template <int R> struct few_head_plan<form_f16<1>, R> { static constexpr int UNITS = 1, STAGES = 4, GROUP = 16 / R; };
template <class F> struct few_out_plan { static constexpr int UNITS = 2, STAGES = 3; };
template <> struct few_out_plan<form_f16<1>> { static constexpr int UNITS = 1, STAGES = 3; };

template <class F, int SEG, int R, class plan, class Epi>
__device__ __forceinline__ void few_norm_linear(const few_norm_in &in, const dec_matrix &w, int cluster, bool early,
                                                Epi &epi) {
    constexpr int G = plan::GROUP;
    __shared__ uint64_t bar;
    const int warp = threadIdx.x / 32, col = threadIdx.x % 32 / 4, n_seg = w.n_unit / SEG;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<G, R>);
    float *ws = (float *)c.take(R * 64);
    __half *xs = (__half *)c.take(R * dec_ld(in.n_embd) * 2);
    const int first = dec_share(w.n_tile, blockIdx.x), n = dec_share(w.n_tile, blockIdx.x + 1) - first;
    dec_tiles_plain tile = {w.w + (int64_t)first * w.n_unit * F::CHUNK, (int64_t)w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    const few_cluster cl(cluster);
    if (threadIdx.x == 0)
        dec_expect(&bar, R * in.n_embd * 2);
    dec_cluster_arrive();
    float4 gain[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        gain[i] = *(const float4 *)(in.gain + min(4 * (threadIdx.x + i * ROW_THREADS), in.n_embd - 4));
    int n_row = early ? __ldcg(in.n) : 0;
    epi.before_wait(first, n);
    dec_cluster_wait();
    pdl_wait();
    epi.after_wait();
    if (blockIdx.x == 0 && threadIdx.x == 0)
        in.clear->routed = in.clear->taken = 0;
    if (!early)
        n_row = __ldcg(in.n);
    few_norm_rows<R>(in, cl, n_row, gain, xs, ws, &bar);
    dec_x8<SEG> x;
    x.take(active && col < R ? xs + col * dec_ld(in.n_embd) + warp * SEG * 64 : NULL);
    dec_tiles<G, R>(feed, tile, x, red, n, active,
                    [&](const float *sums, int i0, int m) { epi(sums, first + i0, i0, m, n_seg, n_row); });
}

template <int R> struct few_qkv_epilogue : dec_qkv_epilogue<R> {
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int i0, int m, int n_seg, int) {
        dec_qkv_epilogue<R>::operator()(sums, tile0, i0, m, n_seg);
    }
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    few_qkv_kernel(few_norm_in in, dec_matrix w, dec_rope rope, dec_kv kv, int n_head, int n_kv, bool early, __half *q,
                   int cluster) {
    __shared__ float bias[DEC_MAX_TILES * 16];
    __shared__ float2 cs[R * 32];
    __shared__ int64_t at[R * 2];
    few_qkv_epilogue<R> epi = {{w, rope, kv, in.n, n_head, n_kv, q, bias, cs, at, early}};
    few_norm_linear<F, SEG, R, few_qkv_plan<F, R>>(in, w, cluster, early, epi);
}

/* logits[out][n_vocab] */
template <int R> struct few_head_epilogue {
    dec_matrix w;
    int n_vocab;
    float *logits;

    __device__ __forceinline__ void before_wait(int, int) { pdl_launch(); }
    __device__ __forceinline__ void after_wait() {}
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int, int m, int n_seg, int n_out) {
        const int i = threadIdx.x / (16 * R), j = threadIdx.x / 16 % R, r = threadIdx.x % 16,
                  row = (tile0 + i) * 16 + r;
        if (i >= m || j >= n_out || row >= n_vocab)
            return;
        float v = dec_sum<R>(sums, i, j, r, n_seg) * w.post;
        if (w.bias)
            v += w.bias[row];
        logits[(int64_t)j * n_vocab + row] = v;
    }
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    few_head_kernel(few_norm_in in /* n: outputs */, dec_matrix w, int n_vocab, float *logits, int cluster) {
    few_head_epilogue<R> epi = {w, n_vocab, logits};
    few_norm_linear<F, SEG, R, few_head_plan<F, R>>(in, w, cluster, true, epi);
}

/* ---- out: x_out = x + W y + b, and each tile's share of the router's sums ---- */

struct few_out {
    const int32_t *n;
    const uint16_t *y;   /* f16, [FEW_MAX][columns] */
    const float *x;      /* [row][rows of the matrix] */
    float *x_out;        /* the same */
    const float *router; /* as dec_out's */
    float *route_part;   /* [FEW_MAX][tile][n_expert] */
};

/* What a tile's end needs and was settled long before this kernel, in shared memory. */
template <int EPL> struct few_settled {
    float4 router[4][EPL * 32];
    float bias[16];

    /* By asynchronous copies of all threads. */
    __device__ __forceinline__ void ask(const few_out &a, const dec_matrix &w, int tile) {
        for (int i = threadIdx.x; i < EPL * 128; i += ROW_THREADS)
            dec_async16((float *)(router[0] + i), a.router + ((int64_t)tile * EPL * 128 + i) * 4);
        if (threadIdx.x < 16 && w.bias)
            dec_async4(&bias[threadIdx.x], w.bias + tile * 16 + threadIdx.x);
        else if (threadIdx.x < 16)
            bias[threadIdx.x] = 0;
    }
    /* The tile's part of expert e's sum for a row of x; in the order of a butterfly over 16 lanes. */
    __device__ __forceinline__ float route(int e, const float *x16) const {
        float v[16];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 w = router[i][e], x = *(const float4 *)(x16 + i * 4);
            v[i * 4] = __fmul_rn(w.x, x.x), v[i * 4 + 1] = __fmul_rn(w.y, x.y);
            v[i * 4 + 2] = __fmul_rn(w.z, x.z), v[i * 4 + 3] = __fmul_rn(w.w, x.w);
        }
#pragma unroll
        for (int d = 8; d; d >>= 1)
#pragma unroll
            for (int i = 0; i < d; i++)
                v[i] += v[i + d];
        return v[0];
    }
};

template <class F, int SEG, int EPL, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2) few_out_kernel(few_out a, dec_matrix w) {
    using plan = few_out_plan<F>;
    constexpr int G = 2;
    const int tid = threadIdx.x, warp = tid / 32, col = tid % 32 / 4, n_seg = w.n_unit / SEG;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<G, R>);
    float *xt = (float *)c.take(2 * G * R * 16 * 4);
    few_settled<EPL> *early = (few_settled<EPL> *)c.take(G * sizeof *early);
    const int step = gridDim.x, n = (w.n_tile - blockIdx.x + step - 1) / step, n_row = __ldcg(a.n);
    dec_tiles_plain tile = {w.w + (int64_t)blockIdx.x * w.n_unit * F::CHUNK, (int64_t)step * w.n_unit * F::CHUNK};
    for (int i = 0; i < min(n, G); i++) /* the first group's; before the weights, so that they are there before them */
        early[i].ask(a, w, blockIdx.x + i * step);
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    const int i = tid / (16 * R), j = tid / 16 % R, r = tid % 16;
    const int64_t at = (int64_t)j * w.n_tile * 16 + (blockIdx.x + i * step) * 16 + r; /* in the first group */
    pdl_launch();
    pdl_wait();
    dec_x8<SEG> x;
    x.load(active && col < R ? a.y + (int64_t)col * w.n_unit * 64 + warp * SEG * 64 : NULL);
    float old = i < min(n, G) && j < n_row ? __ldcg(a.x + at) : 0.f;
    int k = 0;
    dec_tiles<G, R>(feed, tile, x, red, n, active, [&](const float *sums, int i0, int m) {
        float *x16 = xt + k * G * R * 16;
        k ^= 1;
        if (i0 > 0) { /* more groups than one: their turn */
            __syncthreads();
            for (int t = 0; t < m; t++)
                early[t].ask(a, w, blockIdx.x + (i0 + t) * step);
            dec_async_done();
            __syncthreads();
            old = i < m && j < n_row ? __ldcg(a.x + at + (int64_t)i0 * step * 16) : 0.f;
        }
        if (i < m) {
            float v = dec_sum<R>(sums, i, j, r, n_seg) * w.post;
            v = old + (v + early[i].bias[r]);
            if (j < n_row)
                a.x_out[at + (int64_t)i0 * step * 16] = v;
            x16[tid] = v;
        }
        __syncthreads();
        for (int p = tid; p < m * R * EPL * 32; p += ROW_THREADS) {
            const int e = p % (EPL * 32), row = p / (EPL * 32) % R, t = p / (EPL * 32) / R;
            a.route_part[((int64_t)row * w.n_tile + blockIdx.x + (i0 + t) * step) * EPL * 32 + e] =
                early[t].route(e, x16 + (t * R + row) * 16);
        }
    });
}

/* ---- shared memory, bytes ---- */

template <class F, int R, class plan> constexpr size_t few_linear_smem(int n_seg, int n_embd) {
    return (size_t)n_seg * plan::UNITS * plan::STAGES * F::CHUNK + dec_sums_bytes<plan::GROUP, R> + R * 64 +
           R * dec_ld(n_embd) * 2;
}
template <class F, int EPL, int R> constexpr size_t few_out_smem(int n_seg) {
    using plan = few_out_plan<F>;
    return (size_t)n_seg * plan::UNITS * plan::STAGES * F::CHUNK + dec_sums_bytes<2, R> + 4 * R * 64 +
           2 * sizeof(few_settled<EPL>);
}

#endif
