/* backend/cuda/decode_experts.cuh: the experts of a decode step: route + norm + gate_up + SwiGLU, and down. */
#ifndef ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH
#define ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH

#include "backend/cuda/decode_core.cuh"

template <class F> struct dec_expert_plan;
template <> struct dec_expert_plan<form_mxfp4> { /* pieces of a third of a tile */
    using up = dec_pipe<form_mxfp4, 3, 15, 3, 12>;
    using down = dec_pipe<form_mxfp4, 3, 15, 3, 9>;
};

/* All n tiles of this CTA in groups of G: epi(sums of the group, its first tile, its number of tiles) by the N_SEG
 * warps that sum. */
template <int G, int N_SEG, class Pipe, class Tiles, class X, class Epi>
__device__ __forceinline__ void dec_piped_tiles(Pipe &pipe, Tiles &tiles, const X &x, float *red, int n, Epi &&epi) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= N_SEG) {
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    dec_async_done(); /* biases */
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * G * DEC_WARPS * 16;
        const int m = min(G, n - i0);
        for (int i = 0; i < m; i++) {
            float acc[4];
            pipe.tile_sum(x, acc);
            dec_store<1>(out, i, warp, acc, lane);
        }
        asm volatile("bar.sync 1, %0;" ::"n"(N_SEG * 32) : "memory");
        epi(out, i0, m);
    }
}

struct dec_route {
    const float *x;    /* residual row */
    const float *part; /* [n_part][n_expert] from dec_out_kernel */
    const float *bias; /* [n_expert] */
    int n_part, n_embd;
    float eps;
};

/* Ids and weights of the four experts of the row, in every warp. EPL: experts per lane (32 EPL in all).
 * v: the thread's values of the row. rp: [16][32 EPL] shared, ws: [16] shared. One barrier. */
template <int EPL>
__device__ __forceinline__ float dec_choose(const dec_route &a, float4 (&v)[2], float *rp, float *ws,
                                            int (&id)[DEC_TOP_K], float (&weight)[DEC_TOP_K]) {
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    float part[EPL] = {0}, s = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = 4 * (tid + i * ROW_THREADS);
        if (at < a.n_embd)
            v[i] = dec_ld4(a.x + at);
    }
    float off[EPL];
#pragma unroll
    for (int k = 0; k < EPL; k++)
        off[k] = a.bias ? a.bias[k * 32 + lane] : 0.f;
    constexpr int AHEAD = 12; /* loads in flight at once */
    for (int i0 = warp; i0 < a.n_part; i0 += DEC_WARPS * AHEAD) {
        float t[AHEAD][EPL];
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
            for (int k = 0; k < EPL; k++)
                t[j][k] =
                    i0 + j * DEC_WARPS < a.n_part ? __ldcg(a.part + ((i0 + j * DEC_WARPS) * EPL + k) * 32 + lane) : 0.f;
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
#pragma unroll
            for (int k = 0; k < EPL; k++)
                part[k] += t[j][k];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (4 * (tid + i * ROW_THREADS) < a.n_embd)
            s = sum_sq4(v[i], s);
#pragma unroll
    for (int k = 0; k < EPL; k++)
        rp[(warp * EPL + k) * 32 + lane] = part[k];
    float rs = rms_scale(row_sum(s, ws), a.n_embd, a.eps);
    uint32_t key[EPL];
    float logit[EPL];
#pragma unroll
    for (int k = 0; k < EPL; k++) {
        float t = rp[k * 32 + lane];
#pragma unroll
        for (int w = 1; w < DEC_WARPS; w++)
            t += rp[(w * EPL + k) * 32 + lane];
        logit[k] = fmaf(t, rs, off[k]);
        uint32_t u = __float_as_uint(logit[k]);
        key[k] = u & 0x80000000u ? ~u : u | 0x80000000u;
    }
    float l[DEC_TOP_K];
#pragma unroll
    for (int j = 0; j < DEC_TOP_K; j++) {
        uint32_t top = 0, who = ~0u;
#pragma unroll
        for (int k = 0; k < EPL; k++)
            top = max(top, key[k]);
        top = __reduce_max_sync(~0u, top);
#pragma unroll
        for (int k = 0; k < EPL; k++)
            if (key[k] == top)
                who = min(who, (uint32_t)(k * 32 + lane));
        who = __reduce_min_sync(~0u, who);
        id[j] = (int)who;
#pragma unroll
        for (int k = 0; k < EPL; k++)
            if (who == (uint32_t)(k * 32 + lane))
                key[k] = 0;
        l[j] = __uint_as_float(top & 0x80000000u ? top & 0x7FFFFFFFu : ~top);
    }
    float sum = 0;
#pragma unroll
    for (int j = 0; j < DEC_TOP_K; j++)
        weight[j] = expf(l[j] - l[0]), sum += weight[j];
#pragma unroll
    for (int j = 0; j < DEC_TOP_K; j++)
        weight[j] = weight[j] / sum;
    return rs;
}

template <class T> __device__ __forceinline__ T dec_pick(const T (&v)[DEC_TOP_K], int i) {
    return i == 0 ? v[0] : i == 1 ? v[1] : i == 2 ? v[2] : v[3];
}

struct dec_tiles_experts { /* consecutive tiles of the list: all tiles of the first expert, of the second, .. */
    const dec_matrix &w;
    const int (&id)[DEC_TOP_K];
    int64_t tile_bytes;
    const uint8_t *at;
    int slot, left;
    __device__ __forceinline__ void start(int first) {
        slot = first / w.n_tile, left = w.n_tile - (first - slot * w.n_tile);
        at = w.w + dec_pick(id, slot) * w.mat_bytes + (w.n_tile - left) * tile_bytes;
    }
    __device__ __forceinline__ const uint8_t *next() {
        if (left == 0)
            slot++, left = w.n_tile, at = w.w + dec_pick(id, slot) * w.mat_bytes;
        const uint8_t *p = at;
        at += tile_bytes, left--;
        return p;
    }
};

struct dec_tiles_pairs { /* units blockIdx.x, + step, ..: both experts of a pair in turn; then the second pair's tiles
                          */
    const dec_matrix &w;
    const int (&id)[DEC_TOP_K];
    int64_t tile_bytes;
    int unit, step, second;
    __device__ __forceinline__ const uint8_t *next() {
        int pair = unit >= w.n_tile;
        const uint8_t *p = w.w + dec_pick(id, pair * 2 + second) * w.mat_bytes + (unit - pair * w.n_tile) * tile_bytes;
        unit += second ? step : 0, second ^= 1;
        return p;
    }
};

/* h[4][n_ff] (f16) = glu of the chosen experts' gate_up on the normed row. */
template <class F, int EPL>
__global__ void __launch_bounds__(ROW_THREADS, 2) dec_gate_up_kernel(dec_route route, const float *gain, dec_matrix w,
                                                                     float alpha, float limit, __half *h, int n_ff) {
    constexpr int G = 4;
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    dec_carve c = {dec_shared};
    typename dec_expert_plan<F>::up pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(2 * G * DEC_WARPS * 16 * 4);
    float *ws = (float *)c.take(64);
    __half *xs = (__half *)c.take(route.n_embd * 2);
    float *rp = red; /* sums come later */

    int n_all = DEC_TOP_K * w.n_tile, first = dec_share(n_all, blockIdx.x),
        n = dec_share(n_all, blockIdx.x + 1) - first;
    pipe.open(ring, n);
    float4 g[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (4 * (tid + i * ROW_THREADS) < route.n_embd)
            g[i] = *(const float4 *)(gain + 4 * (tid + i * ROW_THREADS));
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the route's inputs before its own wait */
    float4 v[2];
    int id[DEC_TOP_K];
    float weight[DEC_TOP_K];
    float rs = dec_choose<EPL>(route, v, rp, ws, id, weight);
    dec_tiles_experts tile = {w, id, (int64_t)w.n_unit * F::CHUNK};
    tile.start(first);
    if (warp == pipe.PRODUCER)
        pipe.fill(tile, pipe.refill(0));
    float *bias = (float *)(xs + route.n_embd); /* [DEC_MAX_TILES][16] */
    if (warp == DEC_WARPS - 2 && w.bias)
        for (int i = lane; i < min(n, DEC_MAX_TILES) * 16; i += 32) {
            int at = first + i / 16, slot = (at >= w.n_tile) + (at >= 2 * w.n_tile) + (at >= 3 * w.n_tile);
            dec_async4(bias + i, w.bias + ((int64_t)dec_pick(id, slot) * 2 + i % 16 / 8) * n_ff +
                                     (at - slot * w.n_tile) * 8 + i % 8);
        }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (4 * (tid + i * ROW_THREADS) < route.n_embd)
            *(uint2 *)(xs + 4 * (tid + i * ROW_THREADS)) = dec_norm4(v[i], rs, g[i]);
    __syncthreads();
    dec_piped_tiles<G, 15>(
        pipe, tile, dec_x1{xs + warp * 192 + lane % 4 * 8}, red, n, [&](const float *sums, int i0, int m) {
            int i = tid / 8, r = tid % 8;
            if (i >= m)
                return;
            int at = first + i0 + i, slot = (at >= w.n_tile) + (at >= 2 * w.n_tile) + (at >= 3 * w.n_tile),
                e = dec_pick(id, slot), row = (at - slot * w.n_tile) * 8 + r;
            float gate = dec_sum<1>(sums, i, 0, r, 15) * w.post, up = dec_sum<1>(sums, i, 0, r + 8, 15) * w.post;
            if (w.bias && i0 + i < DEC_MAX_TILES)
                gate += bias[(i0 + i) * 16 + r], up += bias[(i0 + i) * 16 + r + 8];
            else if (w.bias)
                gate += w.bias[(int64_t)e * 2 * n_ff + row], up += w.bias[((int64_t)e * 2 + 1) * n_ff + row];
            h[slot * n_ff + row] = __float2half_rn(glu(gate, up, alpha, limit));
        });
}

/* p[pair][n_embd] = weighted sum of two experts' down + bias; pair 0: the first two of the route. */
template <class F, int EPL>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    dec_down_kernel(dec_route route, dec_matrix w, const __half *h, int n_ff, float *p) {
    constexpr int G = 2;
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    dec_carve c = {dec_shared};
    typename dec_expert_plan<F>::down pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(2 * 2 * G * DEC_WARPS * 16 * 4);
    float *ws = (float *)c.take(64);
    __half *hs = (__half *)c.take(DEC_TOP_K * n_ff * 2);

    int step = gridDim.x, n_all = 2 * w.n_tile, n = (n_all - blockIdx.x + step - 1) / step;
    float4 v[2];
    int id[DEC_TOP_K];
    float weight[DEC_TOP_K];
    dec_choose<EPL>(route, v, red, ws, id, weight);
    dec_tiles_pairs tile = {w, id, (int64_t)w.n_unit * F::CHUNK, (int)blockIdx.x, step, 0};
    pipe.open(ring, n * 2);
    if (warp == pipe.PRODUCER)
        pipe.fill(tile, pipe.refill(0));
    pdl_launch();
    pdl_wait();
    float *bias = (float *)(hs + DEC_TOP_K * n_ff); /* [DEC_MAX_TILES][16] */
    if (warp == DEC_WARPS - 2 && w.bias)
        for (int i = lane; i < min(2 * n, DEC_MAX_TILES) * 16; i += 32) {
            int u = blockIdx.x + i / 32 * step, pair = u >= w.n_tile;
            dec_async4(bias + i, w.bias + (int64_t)dec_pick(id, pair * 2 + i / 16 % 2) * w.n_tile * 16 +
                                     (u - pair * w.n_tile) * 16 + i % 16);
        }
    /* the warp's segment of the four rows of h: 24 pieces of 16 bytes each */
    uint4 *own = (uint4 *)hs + warp * 24 * DEC_TOP_K;
    if (warp < 15) {
#pragma unroll
        for (int i = lane; i < 24 * DEC_TOP_K; i += 32)
            own[i] = __ldcg((const uint4 *)(h + i / 24 * n_ff + warp * 192) + i % 24);
    }
    dec_async_done();
    __syncthreads(); /* red was dec_choose's; the pipe's */
    if (warp == pipe.PRODUCER) {
        pipe.fill(tile, INT32_MAX);
        return;
    }
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * 2 * G * DEC_WARPS * 16;
        int m = min(G, n - i0);
        for (int i = 0; i < 2 * m; i++) {
            int pair = (int)blockIdx.x + (i0 + i / 2) * step >= w.n_tile;
            float acc[4];
            pipe.tile_sum(dec_x1{(const __half *)(own + (pair * 2 + i % 2) * 24) + lane % 4 * 8}, acc);
            dec_store<1>(out, i, warp, acc, lane);
        }
        asm volatile("bar.sync 1, %0;" ::"n"(15 * 32) : "memory");
        if (tid < m * 16) {
            int i = tid / 16, r = tid % 16, u = blockIdx.x + (i0 + i) * step, pair = u >= w.n_tile,
                row = (u - pair * w.n_tile) * 16 + r;
            float d[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                d[j] = dec_sum<1>(out, 2 * i + j, 0, r, 15) * w.post;
                if (w.bias && 2 * (i0 + i) + j < DEC_MAX_TILES)
                    d[j] += bias[(2 * (i0 + i) + j) * 16 + r];
                else if (w.bias)
                    d[j] += w.bias[(int64_t)dec_pick(id, pair * 2 + j) * w.n_tile * 16 + row];
            }
            p[pair * w.n_tile * 16 + row] =
                fmaf(dec_pick(weight, pair * 2 + 1), d[1], dec_pick(weight, pair * 2) * d[0]);
        }
    }
}

/* ---- shared memory of each kernel, bytes ---- */

template <class F> constexpr size_t dec_gate_up_smem(int n_embd) {
    return dec_expert_plan<F>::up::SMEM + 2 * 4 * DEC_WARPS * 64 + 64 + n_embd * 2 + DEC_MAX_TILES * 64 + 64;
}
template <class F> constexpr size_t dec_down_smem(int n_ff) {
    return dec_expert_plan<F>::down::SMEM + 2 * 4 * DEC_WARPS * 64 + 64 + DEC_TOP_K * n_ff * 2 + DEC_MAX_TILES * 64 +
           64;
}

#endif
