/* backend/cuda/few_experts.cuh: the experts of a decode step of 3 to 8 rows: route + norm + gate_up + SwiGLU + down.
 * Every expert that a row has chosen is read once; its products have a column for every row, of which those that chose
 * it are kept. */
#ifndef ORCD_BACKEND_CUDA_FEW_EXPERTS_CUH
#define ORCD_BACKEND_CUDA_FEW_EXPERTS_CUH

#include "backend/cuda/few_linear.cuh"

/* A CTA's share of a layer's experts, as dec_work: gate_up of the first and the second half of the list, down of both.
 * Part i are n[i] tiles from first[i] on of its half. */
struct few_work {
    int first[4], n[4];
    __device__ __forceinline__ few_work() {}
    __device__ __forceinline__ few_work(int n_list, int up_tiles, int down_tiles) {
        firsts(n_list, up_tiles, down_tiles, blockIdx.x, first);
        firsts(n_list, up_tiles, down_tiles, blockIdx.x + 1, n);
#pragma unroll
        for (int i = 0; i < 4; i++)
            n[i] -= first[i];
    }
    static __device__ __forceinline__ void firsts(int n_list, int up_tiles, int down_tiles, int cta, int (&to)[4]) {
        const int n = n_list * up_tiles, half = n_list / 2, up = dec_share(n, cta);
        to[0] = dec_share(half * up_tiles, cta), to[1] = up - to[0];
        to[2] = dec_share(n + half * down_tiles, cta) - up;
        to[3] = dec_share(n + n_list * down_tiles, cta) - up - to[2];
    }
};

/* The chosen experts in ascending order, in shared memory. */
struct few_list {
    int n;
    int expert[FEW_MAX * DEC_TOP_K];
    int8_t slot[FEW_MAX * DEC_TOP_K][FEW_MAX]; /* which of the row's experts it is, -1 none */
    few_work work;

    /* By one warp. id: [FEW_MAX][DEC_TOP_K] in lanes, -1 none; work_of: for a list of as many experts as the lane's
     * number and one */
    template <int EPL> __device__ __forceinline__ void make(int id, const few_work &work_of) {
        const int lane = threadIdx.x % 32;
        int rank = 0, total = 0;
#pragma unroll
        for (int k = 0; k < EPL; k++) {
            const uint32_t mask = __reduce_or_sync(~0u, id >> 5 == k ? 1u << (id & 31) : 0u);
            if (id >> 5 >= k)
                rank += __popc(id >> 5 == k ? mask & ((1u << (id & 31)) - 1) : mask);
            total += __popc(mask);
        }
        for (int i = lane; i < FEW_MAX * DEC_TOP_K * FEW_MAX / 4; i += 32)
            ((int *)slot)[i] = -1;
        __syncwarp();
        if (id >= 0) {
            expert[rank] = id;
            slot[rank][lane / DEC_TOP_K] = (int8_t)(lane % DEC_TOP_K);
        }
        if (lane == total - 1)
            n = total, work = work_of;
        __syncwarp();
    }
};

template <int R> struct few_expert_plan { /* pieces of a third of a tile */
    static constexpr int GROUP = R == 8 ? 3 : 4;
    static constexpr int BIAS = 96; /* tiles of a CTA whose biases are kept in shared memory; more are read late */
    using pipe = dec_pipe<form_mxfp4, 3, 15, 3, 12>;
};

/* What a layer's experts do. */
struct few_experts {
    const int32_t *n; /* rows */
    dec_route route;
    const float *gain;
    dec_glu up;
    dec_matrix down;
    float *d, *weight; /* [FEW_MAX][slot][n_embd]: the experts' results; [FEW_MAX][slot] */
    int32_t *id;       /* [FEW_MAX][slot] */
    uint16_t *y;       /* [FEW_MAX][n_embd] f16: the rows normed */
    few_counts *counts;
    uint32_t *met; /* see dec_meet */
};

/* The tiles that a CTA reads, part by part. */
struct few_tiles {
    const few_experts &a;
    const few_list &list;
    int64_t tile_bytes;
    int part, left; /* left: tiles of the part */
    const int *expert;
    int tile;
    __device__ __forceinline__ few_tiles(const few_experts &a, const few_list &list)
        : a(a), list(list), tile_bytes((int64_t)a.down.n_unit * form_mxfp4::CHUNK), part(-1), left(0) {}
    __device__ __forceinline__ const uint8_t *next() {
        while (left == 0) {
            const int i = ++part, first = list.work.first[i], n_tile = i < 2 ? a.up.w.n_tile : a.down.n_tile;
            left = list.work.n[i];
            expert = list.expert + (i % 2 ? list.n / 2 : 0) + first / n_tile, tile = first % n_tile;
        }
        left--;
        const dec_matrix &w = part < 2 ? a.up.w : a.down;
        const uint8_t *p = w.w + *expert * w.mat_bytes + tile * tile_bytes;
        if (++tile == w.n_tile)
            tile = 0, expert++;
        return p;
    }
};

/* Row j's experts and norm, by DEC_THREADS of which the last warp chooses; all others call few_route_pass. */
template <int EPL> __device__ __forceinline__ void few_route_row(const few_experts &a, int j, float *shared) {
    const int n_embd = a.route.n_embd, lane = threadIdx.x % 32;
    const bool chooses = threadIdx.x / 32 == DEC_WARPS - 1;
    dec_route route = a.route;
    route.x += (int64_t)j * n_embd;
    route.part += (int64_t)j * route.n_part * EPL * 32;
    dec_choice<EPL, 1> to;
    to.early(route);
    to.gather(route, shared);
    if (chooses) {
        to.choose();
        if (lane < DEC_TOP_K)
            a.id[j * DEC_TOP_K + lane] = to.id;
        __syncwarp();
        if (lane == 0)
            few_count(&a.counts->routed);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int at = 4 * (threadIdx.x + i * ROW_THREADS);
        if (at < n_embd)
            *(uint2 *)(a.y + j * n_embd + at) = dec_norm4(to.v[i], to.rs[0], *(const float4 *)(a.gain + at));
    }
    __syncthreads();
    if (threadIdx.x == 0)
        few_count(&a.counts->taken);
    if (chooses) {
        const float weight = to.weigh();
        if (lane < DEC_TOP_K)
            a.weight[j * DEC_TOP_K + lane] = weight;
    }
}
__device__ __forceinline__ void few_route_pass() {
    __syncthreads();
    __syncthreads();
}

/* d of the CTA's tiles of a half, whose experts begin at list's number expert0. */
template <int G, int R, class Pipe>
__device__ __forceinline__ void few_down(const few_experts &a, const few_list &list, int half, int expert0, Pipe &pipe,
                                         dec_x8<3> &x, dec_sums &sums, const float *bias, int n_bias) {
    const dec_matrix &w = a.down;
    const int first = list.work.first[2 + half], col = threadIdx.x % 32 / 4;
    const int i = threadIdx.x / (16 * R), j = threadIdx.x / 16 % R, r = threadIdx.x % 16;
    int e = first / w.n_tile - 1, left = 1; /* tiles until the next expert */
    dec_cursor at(first, w.n_tile, i);
    dec_piped_tiles<G, R>(
        pipe, x, sums, list.work.n[2 + half],
        [&](int k) {
            if (--left > 0)
                return;
            e++;
            left = (e + 1) * w.n_tile - (first + k);
            const int slot = col < R ? list.slot[expert0 + e][col] : -1;
            x.load(slot >= 0 ? a.up.h + (col * DEC_TOP_K + slot) * a.up.n_ff + threadIdx.x / 32 * 192 : NULL);
        },
        [&](const float *red, int m) {
            const int slot = i < m ? list.slot[expert0 + at.e][j] : -1;
            if (slot >= 0) {
                float v = dec_sum<R, DEC_SUM_WARPS>(red, i, j, r) * w.post;
                if (w.bias && at.k < n_bias)
                    v += bias[at.k * 16 + r];
                else if (w.bias)
                    v += w.bias[((int64_t)list.expert[expert0 + at.e] * w.n_tile + at.tile) * 16 + r];
                a.d[((int64_t)(j * DEC_TOP_K + slot) * w.n_tile + at.tile) * 16 + r] = v;
            }
            at.next(w.n_tile, G);
        });
}

/* Floats of two groups' sums; before that, the router's. */
template <int EPL, int R>
constexpr int few_experts_sums = dec_max(dec_sums_bytes<few_expert_plan<R>::GROUP, R, DEC_SUM_WARPS>,
                                         dec_choice<EPL, 1>::SMEM);

/* Both halves' gate_up, then both halves' down, as dec_experts_kernel. */
template <int EPL, int R> __global__ void __launch_bounds__(DEC_EXPERT_THREADS, 1) few_experts_kernel(few_experts a) {
    using plan = few_expert_plan<R>;
    constexpr int G = plan::GROUP, ADDERS = G * R / 4; /* warps that add gate_up up */
    __shared__ few_list list;
    __shared__ uint64_t bars[4]; /* a half of gate_up is added up in this CTA, [2]; in all, [2] */
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const uint32_t added = dec_smem(bars), met = added + 16;
    dec_carve c = {dec_shared};
    typename plan::pipe pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(few_experts_sums<EPL, R>);
    float *bias = (float *)c.take(plan::BIAS * 64);
    const int n_row = __ldcg(a.n);

    pipe.open(ring, 0);
    if (tid < 4)
        dec_bar_init(added + tid * 8, tid < 2 ? ADDERS : 1);
    few_work work_of;
    if (warp == pipe.PRODUCER)
        work_of = few_work(lane + 1, a.up.w.n_tile, a.down.n_tile);
    if (blockIdx.x < FEW_MAX && tid < DEC_THREADS) {
        few_near(a.gain, a.route.n_embd);
        few_near(a.route.bias, a.route.bias ? EPL * 32 : 0);
    }
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the route's inputs before its own wait */
    if ((int)blockIdx.x < n_row && tid < DEC_THREADS)
        few_route_row<EPL>(a, blockIdx.x, red);
    else if ((int)blockIdx.x < n_row)
        few_route_pass();
    if (tid >= DEC_THREADS) {
        __syncthreads();
        for (int i = 0; i < 2 && lane == 0; i++) {
            dec_bar_wait(added + i * 8, 0);
            dec_meet(a.met + i);
            dec_bar_arrive(met + i * 8);
        }
        return;
    }
    if (warp == pipe.PRODUCER) {
        if (lane == 0)
            few_await(&a.counts->routed, n_row);
        __syncwarp();
        list.make<EPL>(lane < n_row * DEC_TOP_K ? __ldcg(a.id + lane) : -1, work_of);
        const few_work &s = list.work;
        few_tiles tiles(a, list);
        pipe.n_piece = (s.n[0] + s.n[1] + s.n[2] + s.n[3]) * pipe.PER_TILE;
        pipe.fill(tiles, 2 * pipe.PER_TILE); /* not more: all CTAs' first tiles before the third ones */
        if (lane == 0)
            few_await(&a.counts->taken, n_row);
        __syncwarp();
        __syncthreads();
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    __syncthreads();
    const int col = lane / 4;
    dec_x8<3> x;
    x.load(col < R ? a.y + col * a.route.n_embd + warp * 192 : NULL);
    const few_work &s = list.work;
    const int half = list.n / 2;
    dec_sums sums = {red, red + G * DEC_SUM_WARPS * dec_pitch<R>};
    for (int i = 0, at = 0; i < 4; at += s.n[i++])
        dec_ask_bias(list.expert + (i % 2 ? half : 0), s.first[i], s.n[i], plan::BIAS - at, i < 2 ? a.up.w : a.down,
                     i < 2 ? 2 * a.up.n_ff : a.down.n_tile * 16, i < 2 ? a.up.n_ff : 8, bias + at * 16);
    int at = 0; /* tiles done */
    for (int i = 0; i < 2; at += s.n[i++]) {
        dec_piped_tiles<G, R>(
            pipe, x, sums, s.n[i], [](int) {},
            dec_glu_sums<G, R, few_list>(a.up, list, s.first[i], bias + at * 16, plan::BIAS - at, i * half));
        __syncwarp();
        if (warp < ADDERS && lane == 0)
            dec_bar_arrive(added + i * 8);
    }
    for (int i = 0; i < 2; at += s.n[2 + i++]) {
        dec_bar_wait(met + i * 8, 0);
        few_down<G, R>(a, list, i, i * half, pipe, x, sums, bias + at * 16, plan::BIAS - at);
    }
}

/* ---- shared memory, bytes ---- */

template <int EPL, int R>
constexpr size_t few_experts_smem =
    few_expert_plan<R>::pipe::SMEM + few_experts_sums<EPL, R> + few_expert_plan<R>::BIAS * 64 + 64;

#endif
