/* backend/cuda/few_experts.cuh: the experts of a decode step of 3 to 8 rows. Every expert that a row has chosen is read
 * once; its products have a column for every row, of which those that chose it are kept. */
#ifndef ORCD_BACKEND_CUDA_FEW_EXPERTS_CUH
#define ORCD_BACKEND_CUDA_FEW_EXPERTS_CUH

#include "backend/cuda/few_linear.cuh"

/* The chosen experts in ascending order, in shared memory. */
struct few_list {
    int n;
    int expert[FEW_MAX * DEC_TOP_K];
    int8_t slot[FEW_MAX * DEC_TOP_K][FEW_MAX]; /* which of the row's experts it is, -1 none */

    /* By one warp. id: [n_row][DEC_TOP_K] */
    template <int EPL> __device__ __forceinline__ void make(const int32_t *id, int n_row) {
        const int lane = threadIdx.x % 32, mine = lane < n_row * DEC_TOP_K ? __ldcg(id + lane) : -1;
        int rank = 0, total = 0;
#pragma unroll
        for (int k = 0; k < EPL; k++) {
            const uint32_t mask = __reduce_or_sync(~0u, mine >> 5 == k ? 1u << (mine & 31) : 0u);
            if (mine >> 5 >= k)
                rank += __popc(mine >> 5 == k ? mask & ((1u << (mine & 31)) - 1) : mask);
            total += __popc(mask);
        }
        for (int i = lane; i < FEW_MAX * DEC_TOP_K * FEW_MAX / 4; i += 32)
            ((int *)slot)[i] = -1;
        __syncwarp();
        if (mine >= 0) {
            expert[rank] = mine;
            slot[rank][lane / DEC_TOP_K] = (int8_t)(lane % DEC_TOP_K);
        }
        if (lane == 0)
            n = total;
        __syncwarp();
    }
};

template <int R> struct few_expert_plan { /* pieces of a third of a tile; groups: sums take the rest */
    static constexpr int GROUP = R == 8 ? 2 : 4;
    static constexpr int BIAS = 12 * R; /* tiles of a CTA whose biases are kept in shared memory; more are read late */
    using pipe = dec_pipe<form_mxfp4, 3, 15, 3, 9>;
};

/* This CTA's tiles of n_list experts: [first, first + n). */
struct few_range {
    int first, n;
    __device__ __forceinline__ few_range(int n_list, const dec_matrix &w) {
        first = dec_share(n_list * w.n_tile, blockIdx.x);
        n = dec_share(n_list * w.n_tile, blockIdx.x + 1) - first;
    }
};

/* By the producer's warp, before the others know the list. */
template <int EPL, class Pipe>
__device__ __forceinline__ dec_tiles_list few_begin(Pipe &pipe, few_list &list, const int32_t *id, int n_row,
                                                    const dec_matrix &w) {
    list.make<EPL>(id, n_row);
    const few_range s(list.n, w);
    dec_tiles_list tiles = {w, list.expert + s.first / w.n_tile, (int64_t)w.n_unit * form_mxfp4::CHUNK,
                            s.first % w.n_tile};
    pipe.n_piece = s.n * Pipe::PER_TILE;
    pipe.fill(tiles, pipe.refill(0));
    return tiles;
}

/* h[row][slot][n_ff] (f16) = glu of the chosen experts' gate_up on the rows. One CTA a multiprocessor, and nothing else
 * on it: beside a kernel that waits it takes almost twice as long. */
template <int EPL, int R>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    few_gate_up_kernel(few_rows in, const int32_t *id, const uint32_t *routed, dec_glu a) {
    using plan = few_expert_plan<R>;
    constexpr int G = plan::GROUP;
    __shared__ few_list list;
    const int tid = threadIdx.x, warp = tid / 32, col = tid % 32 / 4;
    dec_carve c = {dec_shared};
    typename plan::pipe pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(dec_sums_bytes<G, R, DEC_SUM_WARPS>);
    float *bias = (float *)c.take(plan::BIAS * 64);
    const int n_row = __ldcg(in.n);
    pipe.open(ring, 0);
    if (warp == pipe.PRODUCER) {
        few_await(routed, (uint32_t)n_row);
        dec_tiles_list tiles = few_begin<EPL>(pipe, list, id, n_row, a.w);
        __syncthreads();
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the routes before its own wait */
    in.reset();
    dec_x8<3> x;
    x.load(col < R ? in.x + col * in.ld + warp * 192 : NULL);
    __syncthreads();
    const few_range s(list.n, a.w);
    dec_sums sums = {red, red + G * DEC_SUM_WARPS * dec_pitch<R>};
    dec_ask_bias(list.expert, s.first, s.n, plan::BIAS, a.w, 2 * a.n_ff, a.n_ff, bias);
    dec_piped_tiles<G, R>(
        pipe, x, sums, s.n, [](int) {}, dec_glu_sums<G, R, few_list>(a, list, s.first, bias, plan::BIAS));
}

struct few_down {
    few_rows in; /* x: h [rows][slot][n_ff], ld: n_ff */
    const int32_t *id;
    const float *weight;
    float *d; /* [FEW_MAX][slot][n_embd] */
    float *x; /* [rows][n_embd] */
    uint32_t *done;
    few_norm norm; /* the next layer's or the last */
};

__device__ __forceinline__ float few_add(float x, float4 w, float d0, float d1, float d2, float d3) {
    return x + fmaf(w.y, d1, __fmul_rn(w.x, d0)) + fmaf(w.w, d3, __fmul_rn(w.z, d2));
}

/* x += the weighted sum of the row's experts, and its norm. */
__device__ __forceinline__ void few_finish_row(const few_down &a, int row, float *ws) {
    const int n = a.norm.n_embd;
    float *x = a.x + (int64_t)row * n;
    const float *d = a.d + (int64_t)row * DEC_TOP_K * n;
    const float4 w = __ldcg((const float4 *)a.weight + row);
    float4 v[2], e[2][DEC_TOP_K];
    float s = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) { /* all on their way before the first is used */
        const int at = min(4 * (threadIdx.x + i * ROW_THREADS), n - 4);
        v[i] = dec_ld4(x + at);
#pragma unroll
        for (int j = 0; j < DEC_TOP_K; j++)
            e[i][j] = dec_ld4(d + j * n + at);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = 4 * (threadIdx.x + i * ROW_THREADS);
        if (at >= n)
            break;
        v[i].x = few_add(v[i].x, w, e[i][0].x, e[i][1].x, e[i][2].x, e[i][3].x);
        v[i].y = few_add(v[i].y, w, e[i][0].y, e[i][1].y, e[i][2].y, e[i][3].y);
        v[i].z = few_add(v[i].z, w, e[i][0].z, e[i][1].z, e[i][2].z, e[i][3].z);
        v[i].w = few_add(v[i].w, w, e[i][0].w, e[i][1].w, e[i][2].w, e[i][3].w);
        *(float4 *)(x + at) = v[i];
        s = sum_sq4(v[i], s);
    }
    a.norm.put(row, v, rms_scale(row_sum(s, ws), n, a.norm.eps));
}

template <int EPL, int R> __global__ void __launch_bounds__(ROW_THREADS, 1) few_down_kernel(few_down a, dec_matrix w) {
    using plan = few_expert_plan<R>;
    constexpr int G = plan::GROUP;
    __shared__ few_list list;
    const int tid = threadIdx.x, warp = tid / 32, col = tid % 32 / 4;
    dec_carve c = {dec_shared};
    typename plan::pipe pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(dec_sums_bytes<G, R, DEC_SUM_WARPS>);
    float *bias = (float *)c.take(plan::BIAS * 64);
    const int n_row = __ldcg(a.in.n);
    pipe.open(ring, 0);
    if (warp == pipe.PRODUCER) {
        dec_tiles_list tiles = few_begin<EPL>(pipe, list, a.id, n_row, w);
        pdl_launch();
        pdl_wait();
        __syncthreads();
        pipe.fill(tiles, INT32_MAX);
    } else {
        pdl_launch();
        pdl_wait();
        a.in.reset();
        __syncthreads();
        const few_range s(list.n, w);
        dec_sums sums = {red, red + G * DEC_SUM_WARPS * dec_pitch<R>};
        dec_ask_bias(list.expert, s.first, s.n, plan::BIAS, w, w.n_tile * 16, 8, bias);
        const int i = tid / (16 * R), j = tid / 16 % R, r = tid % 16;
        int e = s.first / w.n_tile - 1, left = 1; /* tiles until the next expert */
        dec_cursor at(s.first, w.n_tile, i);
        dec_x8<3> x;
        dec_piped_tiles<G, R>(
            pipe, x, sums, s.n,
            [&](int k) {
                if (--left > 0)
                    return;
                e++;
                left = (e + 1) * w.n_tile - (s.first + k);
                const int slot = col < R ? list.slot[e][col] : -1;
                x.load(slot >= 0 ? a.in.x + (col * DEC_TOP_K + slot) * a.in.ld + warp * 192 : NULL);
            },
            [&](const float *red, int m) {
                const int slot = i < m ? list.slot[at.e][j] : -1;
                if (slot >= 0) {
                    float v = dec_sum<R, DEC_SUM_WARPS>(red, i, j, r) * w.post;
                    if (w.bias && at.k < plan::BIAS)
                        v += bias[at.k * 16 + r];
                    else if (w.bias)
                        v += w.bias[((int64_t)list.expert[at.e] * w.n_tile + at.tile) * 16 + r];
                    a.d[((int64_t)(j * DEC_TOP_K + slot) * w.n_tile + at.tile) * 16 + r] = v;
                }
                at.next(w.n_tile, G);
            });
    }
    int mine;
    if (few_all_done(a.done, n_row, mine))
        few_finish_row(a, mine, (float *)dec_shared);
}

/* ---- shared memory, bytes ---- */

constexpr int FEW_STATIC_SMEM = 1024; /* room for what the kernels have without asking */
static_assert(sizeof(few_list) <= FEW_STATIC_SMEM / 2, "the list is not all");

template <int R> constexpr size_t few_experts_smem() {
    using plan = few_expert_plan<R>;
    return plan::pipe::SMEM + dec_sums_bytes<plan::GROUP, R, DEC_SUM_WARPS> + plan::BIAS * 64;
}

#endif
