/* backend/cuda/decode_experts.cuh: the experts of a decode step: route + norm + gate_up + SwiGLU, and down. */
#ifndef ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH
#define ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH

#include "backend/cuda/decode_core.cuh"

/* Pieces of a third of a tile. Down's ring of one row is so small that its CTA finds room beside gate_up's; with two
 * rows a deeper ring is worth more than that. */
template <class F, int R> struct dec_expert_plan;
template <int R> struct dec_expert_plan<form_mxfp4, R> {
    using up = dec_pipe<form_mxfp4, 3, 15, 3, 12>;
    using down = dec_pipe<form_mxfp4, 3, 15, 3, R == 1 ? 9 : 12>;
};

/* n tiles in groups of G by the N_SEG warps that sum: epi(sums, number of tiles) adds a group up. */
template <int G, int R, int N_SEG, class Pipe, class X, class Epi>
__device__ __forceinline__ void dec_piped_tiles(Pipe &pipe, const X &x, float *red, int n, Epi &&epi) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * G * N_SEG * dec_pitch<R>;
        const int m = min(G, n - i0);
        for (int i = 0; i < m; i++) {
            float acc[4];
            pipe.tile_sum(x, acc);
            dec_store<R, N_SEG>(out, i, warp, acc, lane);
        }
        dec_async_done(); /* biases */
        asm volatile("bar.sync 1, %0;" ::"n"(N_SEG * 32) : "memory");
        epi(out, m);
    }
}

#define DEC_UP_GROUP 4 /* tiles of gate_up that are added up at once */

template <int R> constexpr int dec_n_bias = R * 12; /* tiles whose biases are kept in shared memory */
constexpr int dec_max(int a, int b) { return a > b ? a : b; }

struct dec_route {
    const float *x;    /* residual rows [row][n_embd] */
    const float *part; /* [row][n_part][n_expert] from dec_out_kernel */
    const float *bias; /* [n_expert] */
    int n_part, n_embd;
    float eps;
};

/* The four experts of each of R rows. EPL: experts per lane (32 EPL in all). */
template <int EPL, int R> struct dec_choice {
    float4 v[R + 1]; /* the thread's fours of the rows */
    float rs[R], off[EPL];
    float *rp; /* shared [row][DEC_WARPS][32 EPL] */
    /* by one warp: */
    int id[R][DEC_TOP_K];
    float weight[R][DEC_TOP_K];

    static constexpr int SMEM = R * (DEC_WARPS * EPL * 32 + 16) * 4;

    /* What was settled long ago, and comes from far. */
    __device__ __forceinline__ void early(const dec_route &a) {
#pragma unroll
        for (int k = 0; k < EPL; k++)
            off[k] = a.bias ? a.bias[k * 32 + threadIdx.x % 32] : 0.f;
    }
    /* The warp's part of the router's sums of all rows. */
    __device__ __forceinline__ void sum_parts(const dec_route &a, float (&part)[R][EPL]) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        constexpr int AHEAD = EPL == 1 ? 12 : 12 / R; /* loads in flight at once */
        for (int i0 = warp; i0 < a.n_part; i0 += DEC_WARPS * AHEAD) {
            float t[AHEAD][R][EPL];
#pragma unroll
            for (int i = 0; i < AHEAD * R * EPL; i++) {
                const int l = i / (R * EPL), j = i / EPL % R, k = i % EPL, at = i0 + l * DEC_WARPS;
                t[l][j][k] = at < a.n_part ? __ldcg(a.part + ((j * a.n_part + at) * EPL + k) * 32 + lane) : 0.f;
            }
#pragma unroll
            for (int i = 0; i < AHEAD * R * EPL; i++)
                part[i / EPL % R][i % EPL] += t[i / (R * EPL)][i / EPL % R][i % EPL];
        }
    }
    /* By all: the rows and their scales, the router's sums. shared: SMEM bytes. One barrier inside. */
    __device__ __forceinline__ void gather(const dec_route &a, float *shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const dec_spread<R> own;
        float part[R][EPL] = {};
        rp = shared + R * 16;
#pragma unroll
        for (int i = 0; i < R + 1; i++)
            v[i] = dec_ld4(a.x + own.row(i) * a.n_embd + min(own.at(i), a.n_embd - 4));
        sum_parts(a, part);
#pragma unroll
        for (int j = 0; j < R; j++)
#pragma unroll
            for (int k = 0; k < EPL; k++)
                rp[((j * DEC_WARPS + warp) * EPL + k) * 32 + lane] = part[j][k];
        own.scales(v, a.n_embd, a.eps, shared, rs);
    }
    /* By one warp: the four largest, lower ids first among equals, and the softmax over them. */
    __device__ __forceinline__ void choose() {
        const int lane = threadIdx.x % 32;
        uint32_t key[R][EPL];
#pragma unroll
        for (int i = 0; i < R * EPL; i++) {
            const int j = i / EPL, k = i % EPL;
            float t = rp[(j * DEC_WARPS * EPL + k) * 32 + lane];
#pragma unroll
            for (int w = 1; w < DEC_WARPS; w++)
                t += rp[((j * DEC_WARPS + w) * EPL + k) * 32 + lane];
            const uint32_t u = __float_as_uint(fmaf(t, rs[j], off[k]));
            key[j][k] = u & 0x80000000u ? ~u : u | 0x80000000u;
        }
        float l[R][DEC_TOP_K];
#pragma unroll
        for (int i = 0; i < R * DEC_TOP_K; i++) {
            const int s = i / R, j = i % R;
            uint32_t top = 0, who = 0;
#pragma unroll
            for (int k = 0; k < EPL; k++)
                top = max(top, key[j][k]);
            top = __reduce_max_sync(~0u, top);
#pragma unroll
            for (int k = EPL - 1; k >= 0; k--) {
                const uint32_t has = __ballot_sync(~0u, key[j][k] == top);
                who = has ? k * 32 + __ffs((int)has) - 1 : who;
            }
            id[j][s] = (int)who;
#pragma unroll
            for (int k = 0; k < EPL; k++)
                if (who == (uint32_t)(k * 32 + lane))
                    key[j][k] = 0;
            l[j][s] = __uint_as_float(top & 0x80000000u ? top & 0x7FFFFFFFu : ~top);
        }
#pragma unroll
        for (int j = 0; j < R; j++) {
            float sum = 0;
#pragma unroll
            for (int s = 0; s < DEC_TOP_K; s++)
                weight[j][s] = expf(l[j][s] - l[j][0]), sum += weight[j][s];
#pragma unroll
            for (int s = 0; s < DEC_TOP_K; s++)
                weight[j][s] = weight[j][s] / sum;
        }
    }
    /* Lane i's: element i of [R][DEC_TOP_K]. */
    template <class T> static __device__ __forceinline__ T of_lane(const T (&x)[R][DEC_TOP_K]) {
        T t = x[0][0];
#pragma unroll
        for (int i = 1; i < R * DEC_TOP_K; i++)
            t = threadIdx.x % 32 == i ? x[i / DEC_TOP_K][i % DEC_TOP_K] : t;
        return t;
    }
};

template <int EPL, int R>
constexpr int dec_gate_up_sums = dec_max(dec_sums_bytes<DEC_UP_GROUP, R, 15>, dec_choice<EPL, R>::SMEM);
template <int EPL, int R> constexpr int dec_down_sums = dec_max(dec_sums_bytes<4, 1>, dec_choice<EPL, R>::SMEM);

/* Experts in the order in which their weights are read, in shared memory. */
template <int R> struct dec_list {
    static constexpr int ROWS = R;
    int n, expert[R * DEC_TOP_K];
    int8_t slot[R * DEC_TOP_K][R]; /* which of the row's experts it is, -1 none */

    /* By one warp: each expert once. */
    template <int EPL> __device__ __forceinline__ void make(const dec_choice<EPL, R> &c) {
        const int lane = threadIdx.x % 32, mine = c.of_lane(c.id), in_0 = dec_find(c.id[0], mine);
        const bool there = lane < DEC_TOP_K || (lane < R * DEC_TOP_K && in_0 < 0);
        const uint32_t all = __ballot_sync(~0u, there);
        const int at = __popc(all & ((1u << lane) - 1));
        if (there) {
            expert[at] = mine;
#pragma unroll
            for (int j = 0; j < R; j++)
                slot[at][j] = (int8_t)dec_find(c.id[j], mine);
        }
        if (lane == 0)
            n = __popc(all);
        __syncwarp();
    }
    static __device__ __forceinline__ int dec_find(const int (&id)[DEC_TOP_K], int e) {
        return id[0] == e ? 0 : id[1] == e ? 1 : id[2] == e ? 2 : id[3] == e ? 3 : -1;
    }
};

/* This CTA's tiles of n_list experts: [first, first + n). */
struct dec_range {
    int first, n;
    __device__ __forceinline__ dec_range(int n_list, const dec_matrix &w) {
        first = dec_share(n_list * w.n_tile, blockIdx.x);
        n = dec_share(n_list * w.n_tile, blockIdx.x + 1) - first;
    }
};

struct dec_tiles_list { /* consecutive tiles of the list: all tiles of the first expert, of the second, .. */
    const dec_matrix &w;
    const int *expert; /* the next tile's */
    int64_t tile_bytes;
    int tile;
    __device__ __forceinline__ const uint8_t *next() {
        const uint8_t *p = w.w + *expert * w.mat_bytes + tile * tile_bytes;
        if (++tile == w.n_tile)
            tile = 0, expert++;
        return p;
    }
};

struct dec_tiles_pairs { /* units of two experts each: a tile of both in turn; expert: those of the unit's pair */
    const dec_matrix &w;
    const int *expert;
    int64_t tile_bytes;
    int tile, second;
    __device__ __forceinline__ const uint8_t *next() {
        const uint8_t *p = w.w + expert[second] * w.mat_bytes + tile * tile_bytes;
        if (second && ++tile == w.n_tile)
            tile = 0, expert += 2;
        second ^= 1;
        return p;
    }
};

/* A thread's place in the list: the tile of each group that it adds up. */
struct dec_cursor {
    int k, e, tile; /* tile of the CTA's range, expert of the list, tile of the expert */
    __device__ __forceinline__ dec_cursor(const dec_range &s, const dec_matrix &w, int i) : k(i) {
        e = (s.first + i) / w.n_tile, tile = s.first + i - e * w.n_tile;
    }
    __device__ __forceinline__ void next(int n_tile, int by) {
        k += by, tile += by;
        if (tile >= n_tile)
            tile -= n_tile, e++;
    }
};

/* h[row][slot][n_ff] (f16) = glu of the chosen experts' gate_up on the normed rows. */
template <class F, int EPL, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2) dec_gate_up_kernel(dec_route route, const float *gain, dec_matrix w,
                                                                     float alpha, float limit, uint16_t *h, int n_ff) {
    constexpr int G = DEC_UP_GROUP, N_BIAS = dec_n_bias<R>;
    __shared__ dec_list<R> list;
    const int tid = threadIdx.x, warp = tid / 32;
    dec_carve c = {dec_shared};
    typename dec_expert_plan<F, R>::up pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(dec_gate_up_sums<EPL, R>);
    __half *xs = (__half *)c.take(R * dec_ld(route.n_embd) * 2);
    float *bias = (float *)c.take(N_BIAS * 64); /* [N_BIAS][16] */

    pipe.open(ring, 0);
    const dec_spread<R> own;
    float4 g[R + 1];
#pragma unroll
    for (int i = 0; i < R + 1; i++)
        g[i] = *(const float4 *)(gain + min(own.at(i), route.n_embd - 4));
    dec_choice<EPL, R> to;
    to.early(route);
    const dec_range range(tid % 32, w); /* for a list of as many experts as the lane's number */
    const int expert0 = range.first / w.n_tile, tile0 = range.first - expert0 * w.n_tile;
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the route's inputs before its own wait */
    to.gather(route, red);
    if (warp == pipe.PRODUCER) {
        to.choose();
        list.template make<EPL>(to);
        const int n_tile = (int)__shfl_sync(~0u, range.n, list.n), expert = __shfl_sync(~0u, expert0, list.n),
                  tile = __shfl_sync(~0u, tile0, list.n);
        dec_tiles_list tiles = {w, list.expert + expert, (int64_t)w.n_unit * F::CHUNK, tile};
        pipe.n_piece = n_tile * pipe.PER_TILE;
        pipe.fill(tiles, pipe.refill(0));
        __syncwarp();
        own.norm(to.v, to.rs, g, xs, route.n_embd);
        __syncthreads();
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    own.norm(to.v, to.rs, g, xs, route.n_embd);
    __syncthreads();
    const dec_range s(list.n, w);
    for (int i = tid; w.bias && i < min(s.n, N_BIAS) * 4; i += 15 * 32) {
        const dec_cursor b(s, w, i / 4);
        dec_async16(bias + i * 4, w.bias + ((int64_t)list.expert[b.e] * 2 + i % 4 / 2) * n_ff + b.tile * 8 + i % 2 * 4);
    }
    const int i = tid / (8 * R), j = tid / 8 % R, r = tid % 8;
    dec_cursor at(s, w, i);
    dec_piped_tiles<G, R, 15>(
        pipe, dec_x1::of<R>(xs + warp * 192, dec_ld(route.n_embd)), red, s.n, [&](const float *sums, int m) {
            const int slot = i < m ? list.slot[at.e][j] : -1;
            if (slot >= 0) {
                float gate = dec_sum<R, 15>(sums, i, j, r) * w.post, up = dec_sum<R, 15>(sums, i, j, r + 8) * w.post;
                if (w.bias && at.k < N_BIAS) {
                    gate += bias[at.k * 16 + r], up += bias[at.k * 16 + r + 8];
                } else if (w.bias) {
                    const float *b = w.bias + (int64_t)list.expert[at.e] * 2 * n_ff + at.tile * 8 + r;
                    gate += b[0], up += b[n_ff];
                }
                h[(j * DEC_TOP_K + slot) * n_ff + at.tile * 8 + r] = f16_bits(glu(gate, up, alpha, limit));
            }
            at.next(w.n_tile, G);
        });
}

/* p[row][pair][n_embd] = weighted sum of two experts' down + bias; pair 0: the first two of the row's route. */
template <class F, int EPL, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    dec_down_kernel(dec_route route, dec_matrix w, const uint16_t *h, int n_ff, float *p) {
    constexpr int G = 2;
    __shared__ int expert[R * DEC_TOP_K];
    __shared__ float weight[R * DEC_TOP_K];
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    dec_carve c = {dec_shared};
    typename dec_expert_plan<F, R>::down pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(dec_down_sums<EPL, R>);
    uint4 *hs = (uint4 *)c.take(4 * n_ff * 2);         /* two pairs' rows, [segment][4][192] */
    float *bias = (float *)c.take(DEC_MAX_TILES * 64); /* [DEC_MAX_TILES][16] */

    const int n_all = 2 * R * w.n_tile, first = dec_share(n_all, blockIdx.x),
              n = dec_share(n_all, blockIdx.x + 1) - first, pair0 = first / w.n_tile; /* of all rows' pairs */
    dec_choice<EPL, R> to;
    to.early(route);
    to.gather(route, red);
    dec_tiles_pairs tiles = {w, expert + 2 * pair0, (int64_t)w.n_unit * F::CHUNK, first - pair0 * w.n_tile, 0};
    pipe.open(ring, n * 2);
    if (warp == pipe.PRODUCER) {
        to.choose();
        if (lane < R * DEC_TOP_K)
            expert[lane] = to.of_lane(to.id), weight[lane] = to.of_lane(to.weight);
        __syncwarp();
        pipe.fill(tiles, pipe.refill(0));
        __syncwarp();
        for (int i = lane; w.bias && i < min(2 * n, DEC_MAX_TILES) * 4; i += 32) {
            const int u = first + i / 8, pair = u / w.n_tile;
            dec_async16(bias + i * 4, w.bias + (int64_t)expert[2 * pair + i / 4 % 2] * w.n_tile * 16 +
                                          (u - pair * w.n_tile) * 16 + i % 4 * 4);
        }
    }
    pdl_launch();
    pdl_wait();
    /* the warp's segment of four rows of h: 24 pieces of 16 bytes each */
    uint4 *own = hs + warp * 24 * 4;
    if (warp < 15)
#pragma unroll
        for (int i = lane; i < 24 * 4; i += 32)
            own[i] =
                __ldcg((const uint4 *)(h + min(pair0 * 2 + i / 24, R * DEC_TOP_K - 1) * n_ff + warp * 192) + i % 24);
    dec_async_done();
    __syncthreads(); /* red was the route's; the pipe's */
    if (warp == pipe.PRODUCER) {
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    const int to_next = (pair0 + 1) * w.n_tile - first; /* units of the first pair */
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * 2 * G * DEC_WARPS * 16;
        int m = min(G, n - i0);
        for (int i = 0; i < 2 * m; i++) {
            float acc[4];
            const int row = (i0 + i / 2 >= to_next) * 2 + i % 2;
            pipe.tile_sum(dec_x1::of<1>((const __half *)(own + row * 24), 0), acc);
            dec_store<1>(out, i, warp, acc, lane);
        }
        asm volatile("bar.sync 1, %0;" ::"n"(15 * 32) : "memory");
        if (tid < m * 16) {
            const int i = tid / 16, r = tid % 16, u = first + i0 + i, pair = pair0 + (i0 + i >= to_next),
                      row = (u - pair * w.n_tile) * 16 + r;
            float d[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                d[j] = dec_sum<1>(out, 2 * i + j, 0, r, 15) * w.post;
                if (w.bias && 2 * (i0 + i) + j < DEC_MAX_TILES)
                    d[j] += bias[(2 * (i0 + i) + j) * 16 + r];
                else if (w.bias)
                    d[j] += w.bias[(int64_t)expert[2 * pair + j] * w.n_tile * 16 + row];
            }
            p[pair * w.n_tile * 16 + row] = fmaf(weight[2 * pair + 1], d[1], __fmul_rn(weight[2 * pair], d[0]));
        }
    }
}

/* ---- shared memory of each kernel, bytes ---- */

template <class F, int EPL, int R> constexpr size_t dec_gate_up_smem(int n_embd) {
    return dec_expert_plan<F, R>::up::SMEM + dec_gate_up_sums<EPL, R> + R * dec_ld(n_embd) * 2 + dec_n_bias<R> * 64 +
           64;
}
template <class F, int EPL, int R> constexpr size_t dec_down_smem(int n_ff) {
    return dec_expert_plan<F, R>::down::SMEM + dec_down_sums<EPL, R> + DEC_TOP_K * n_ff * 2 + DEC_MAX_TILES * 64 + 64;
}

#endif
