/* backend/cuda/decode_experts.cuh: the experts of a decode step: route + norm + gate_up + SwiGLU + down. */
#ifndef ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH
#define ORCD_BACKEND_CUDA_DECODE_EXPERTS_CUH

#include "backend/cuda/decode_core.cuh"

/* Pieces of a third of a tile. */
template <class F> struct dec_expert_plan;
template <> struct dec_expert_plan<form_mxfp4> { using pipe = dec_pipe<form_mxfp4, 3, 15, 3, 12>; };

#define DEC_SUM_WARPS 15 /* that sum; the sixteenth asks for weights */

/* A barrier of the warps that sum. */
__device__ __forceinline__ void dec_sum_sync() { asm volatile("bar.sync 1, %0;" ::"n"(DEC_SUM_WARPS * 32) : "memory"); }

/* Waits until all CTAs have come here: what they wrote before may be read after. By one thread. No CTA waits for one
 * that has no room, as each takes more than half of a multiprocessor and there are as many. The counter runs through
 * 0 .. 2 grids - 1. */
__device__ __forceinline__ void dec_meet(uint32_t *counter) {
    const uint32_t n = gridDim.x;
    uint32_t old;
    asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(2 * n - 1) : "memory");
    uint32_t now = old == 2 * n - 1 ? 0 : old + 1;
    while ((now < n) == (old < n))
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
}

/* Room for two groups' sums: one is added up while the next is multiplied. */
struct dec_sums {
    float *at, *other;
    __device__ __forceinline__ float *next() {
        float *t = at;
        at = other, other = t;
        return t;
    }
};

/* n tiles in groups of G: before(tile) sees to the activations, epi(sums, number of tiles) adds a group up. */
template <int G, int R, class Pipe, class X, class Before, class Epi>
__device__ __forceinline__ void dec_piped_tiles(Pipe &pipe, const X &x, dec_sums &sums, int n, Before &&before,
                                                Epi &&epi) {
    for (int i0 = 0; i0 < n; i0 += G) {
        float *out = sums.next();
        const int m = min(G, n - i0);
        for (int i = 0; i < m; i++) {
            float acc[4];
            before(i0 + i);
            pipe.tile_sum(x, acc);
            dec_store<R, DEC_SUM_WARPS>(out, i, threadIdx.x / 32, acc, threadIdx.x % 32);
        }
        dec_async_done(); /* biases */
        dec_sum_sync();
        epi(out, m);
    }
}

#define DEC_UP_GROUP 4 /* tiles that are added up at once */
#define DEC_DOWN_GROUP 4

template <int R> constexpr int dec_n_bias = R * 12; /* tiles whose biases are kept in shared memory */
__host__ __device__ constexpr int dec_max(int a, int b) { return a > b ? a : b; }

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
    /* Element i of [row][DEC_TOP_K] in lane i of the warp that chooses: */
    int id;
    float logit;

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
    /* By one warp: the four largest, lower ids first among equals. It runs once and everybody waits for it, so that
     * short code counts. */
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
        id = 0, logit = 0;
#pragma unroll 1
        for (int s = 0; s < DEC_TOP_K; s++)
#pragma unroll
            for (int j = 0; j < R; j++) {
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
#pragma unroll
                for (int k = 0; k < EPL; k++)
                    if (who == (uint32_t)(k * 32 + lane))
                        key[j][k] = 0;
                if (lane == j * DEC_TOP_K + s)
                    id = (int)who, logit = __uint_as_float(top & 0x80000000u ? top & 0x7FFFFFFFu : ~top);
            }
    }
    /* Then the softmax over a row's four: the lane's weight. */
    __device__ __forceinline__ float weigh() const {
        const int row = threadIdx.x % 32 / DEC_TOP_K * DEC_TOP_K;
        const float e = expf(logit - __shfl_sync(~0u, logit, row));
        float sum = 0;
#pragma unroll
        for (int s = 0; s < DEC_TOP_K; s++)
            sum += __shfl_sync(~0u, e, row + s);
        return e / sum;
    }
};

/* A CTA's share of a layer's experts, in four parts: gate_up of what the first and the second half of the rows' choices
 * chose, then down of both. Part i are n[i] tiles, or units of a tile of both experts of a pair, from first[i] on,
 * which belongs to expert or pair of[i] of the half. All CTAs have about as many tiles in all. */
struct dec_work {
    int first[4], n[4], of[4];
    __device__ __forceinline__ dec_work() {}
    __device__ __forceinline__ dec_work(int n_list, int half, int up_tiles, int down_tiles) {
        firsts(n_list, half, up_tiles, down_tiles, blockIdx.x, first);
        firsts(n_list, half, up_tiles, down_tiles, blockIdx.x + 1, n);
#pragma unroll
        for (int i = 0; i < 4; i++)
            n[i] -= first[i], of[i] = first[i] / (i < 2 ? up_tiles : down_tiles);
    }
    static __device__ __forceinline__ void firsts(int n_list, int half, int up_tiles, int down_tiles, int cta,
                                                  int (&to)[4]) {
        const int n = n_list * up_tiles, up = dec_share(n, cta);
        to[0] = dec_share(half * up_tiles, cta), to[1] = up - to[0];
        to[2] = (dec_share(n + half * down_tiles, cta) - up) / 2;
        to[3] = (dec_share(n + 2 * half * down_tiles, cta) - up) / 2 - to[2];
    }
};

/* The rows' experts, in shared memory. */
template <int R> struct dec_list {
    int n, expert[R * DEC_TOP_K];  /* each once, as gate_up takes them */
    int8_t slot[R * DEC_TOP_K][R]; /* which of the row's experts it is, -1 none */
    int chosen[R * DEC_TOP_K];     /* row by row, as down takes them */
    float weight[R * DEC_TOP_K];
    dec_work work;

    /* By one warp. id: element i of `chosen` in lane i; work_of: for a list of as many experts as the lane's number */
    __device__ __forceinline__ void make(int id, const dec_work &work_of) {
        const int lane = threadIdx.x % 32;
        bool first = lane < R * DEC_TOP_K; /* in `chosen` */
        int at_row[R];
#pragma unroll
        for (int j = 0; j < R; j++) {
            at_row[j] = -1;
#pragma unroll
            for (int s = 0; s < DEC_TOP_K; s++)
                at_row[j] = __shfl_sync(~0u, id, j * DEC_TOP_K + s) == id ? s : at_row[j];
            first = first && (lane / DEC_TOP_K <= j || at_row[j] < 0);
        }
        const uint32_t all = __ballot_sync(~0u, first);
        if (first) {
            const int at = __popc(all & ((1u << lane) - 1));
            expert[at] = id;
#pragma unroll
            for (int j = 0; j < R; j++)
                slot[at][j] = (int8_t)at_row[j];
        }
        if (lane < R * DEC_TOP_K)
            chosen[lane] = id;
        if (lane == __popc(all))
            n = lane, work = work_of;
        __syncwarp();
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

/* The tiles that a CTA reads, part by part. */
template <int R> struct dec_tiles_all {
    const dec_matrix &up, &down;
    const dec_list<R> &list;
    int64_t tile_bytes;
    int part, left;    /* left: tiles of the part */
    const int *expert; /* of gate_up's next tile, or the two of the unit */
    int tile, second;
    __device__ __forceinline__ dec_tiles_all(const dec_matrix &up, const dec_matrix &down, const dec_list<R> &list,
                                             int64_t tile_bytes)
        : up(up), down(down), list(list), tile_bytes(tile_bytes), part(-1), left(0) {}
    __device__ __forceinline__ void begin() {
        const dec_work &s = list.work;
        const int i = ++part, half = i % 2 * 2 * R;
        left = i < 2 ? s.n[i] : 2 * s.n[i];
        tile = s.first[i] - s.of[i] * (i < 2 ? up.n_tile : down.n_tile), second = 0;
        expert = i < 2 ? list.expert + half + s.of[i] : list.chosen + half + 2 * s.of[i];
    }
    __device__ __forceinline__ const uint8_t *next() {
        while (left == 0)
            begin();
        left--;
        const dec_matrix &w = part < 2 ? up : down;
        const uint8_t *p = w.w + expert[second] * w.mat_bytes + tile * tile_bytes;
        second = part < 2 ? 0 : second ^ 1;
        if (second == 0 && ++tile == w.n_tile)
            tile = 0, expert += part < 2 ? 1 : 2;
        return p;
    }
};

/* A thread's place in the list: the tile of each group that it adds up. */
struct dec_cursor {
    int k, e, tile; /* tile of the CTA's range, expert of the list, tile of the expert */
    __device__ __forceinline__ dec_cursor(int first, int n_tile, int i) : k(i) {
        e = (first + i) / n_tile, tile = first + i - e * n_tile;
    }
    __device__ __forceinline__ void next(int n_tile, int by) {
        k += by, tile += by;
        if (tile >= n_tile)
            tile -= n_tile, e++;
    }
};

/* The biases of a CTA's tiles, the first `max` of n, on their way to bias[tile][16] (shared). A tile has two halves of
 * eight, `half` floats apart; `mat` floats an expert. */
__device__ __forceinline__ void dec_ask_bias(const int *expert, int first, int n, int max, const dec_matrix &w, int mat,
                                             int half, float *bias) {
    for (int i = threadIdx.x; w.bias && i < min(n, max) * 4; i += DEC_SUM_WARPS * 32) {
        const dec_cursor c(first, w.n_tile, i / 4);
        const int per = half == 8 ? 16 : 8; /* floats from tile to tile */
        dec_async16(bias + i * 4, w.bias + (int64_t)expert[c.e] * mat + c.tile * per + i % 4 / 2 * half + i % 2 * 4);
    }
}

/* Gate_up with its activation. */
struct dec_glu {
    dec_matrix w;
    float alpha, limit;
    int n_ff;
    uint16_t *h; /* [row][slot][n_ff] f16 */
};

/* Adds groups of G tiles of gate_up up. A thread has value r of row j in tile i of each group. */
template <int G, int R, class List> struct dec_glu_sums {
    const dec_glu &a;
    const List &list;
    const float *bias; /* shared, of n_bias tiles */
    int n_bias, i, j, r;
    dec_cursor at;
    __device__ __forceinline__ dec_glu_sums(const dec_glu &a, const List &list, int first, const float *bias,
                                            int n_bias, int expert0 = 0)
        : a(a), list(list), bias(bias), n_bias(n_bias), i(threadIdx.x / (8 * R)), j(threadIdx.x / 8 % R),
          r(threadIdx.x % 8), at(first, a.w.n_tile, i) {
        at.e += expert0;
    }
    __device__ __forceinline__ void operator()(const float *sums, int m) {
        const int slot = i < m ? list.slot[at.e][j] : -1;
        if (slot >= 0) {
            float gate = dec_sum<R, DEC_SUM_WARPS>(sums, i, j, r) * a.w.post,
                  up = dec_sum<R, DEC_SUM_WARPS>(sums, i, j, r + 8) * a.w.post;
            if (a.w.bias && at.k < n_bias) {
                gate += bias[at.k * 16 + r], up += bias[at.k * 16 + r + 8];
            } else if (a.w.bias) {
                const float *b = a.w.bias + (int64_t)list.expert[at.e] * 2 * a.n_ff + at.tile * 8 + r;
                gate += b[0], up += b[a.n_ff];
            }
            a.h[(j * DEC_TOP_K + slot) * a.n_ff + at.tile * 8 + r] = f16_bits(glu(gate, up, a.alpha, a.limit));
        }
        at.next(a.w.n_tile, G);
    }
};

/* What a layer's experts do. */
struct dec_experts {
    dec_route route;
    const float *gain;
    dec_glu up;
    dec_matrix down;
    float *p;      /* [row][pair][n_embd]: weighted sum of two experts' down + bias; pair 0: the row's first two */
    uint32_t *met; /* see dec_meet */
};

/* Down's biases of a half, as dec_ask_bias. */
template <int R>
__device__ __forceinline__ void dec_ask_down_bias(const dec_matrix &w, const dec_list<R> &list, int half, int max,
                                                  float *bias) {
    const int first = list.work.first[2 + half], n = min(2 * list.work.n[2 + half], max);
    for (int i = threadIdx.x; w.bias && i < n * 4; i += DEC_SUM_WARPS * 32) {
        const int u = first + i / 8, pair = u / w.n_tile;
        dec_async16(bias + i * 4, w.bias + (int64_t)list.chosen[2 * (half * R + pair) + i / 4 % 2] * w.n_tile * 16 +
                                      (u - pair * w.n_tile) * 16 + i % 4 * 4);
    }
}

/* A half's rows of h on their way to the warps: each takes its segment of 2 R rows. */
template <int R> struct dec_h {
    static constexpr int PIECES = 2 * R * 24, N = (PIECES + 31) / 32; /* of 16 bytes */
    uint4 v[N];
    uint4 *own; /* [row][24] (shared) */
    __device__ __forceinline__ void ask(const dec_glu &up, int half) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = min(lane + i * 32, PIECES - 1);
            v[i] =
                __ldcg((const uint4 *)(up.h + (half * 2 * R + at / 24) * up.n_ff + threadIdx.x / 32 * 192) + at % 24);
        }
    }
    __device__ __forceinline__ void keep() {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (threadIdx.x % 32 + i * 32 < PIECES)
                own[threadIdx.x % 32 + i * 32] = v[i];
        __syncwarp();
    }
};

/* p of the CTA's units of a half. h: the half's; before_last: called before the last tile */
template <int R, class Pipe, class Before>
__device__ __forceinline__ void dec_down(const dec_experts &a, const dec_list<R> &list, int half, Pipe &pipe,
                                         const uint4 *h, dec_sums &sums, const float *bias, int n_bias,
                                         Before &&before_last) {
    const dec_matrix &w = a.down;
    const int first = list.work.first[2 + half], n = 2 * list.work.n[2 + half], pair0 = list.work.of[2 + half];
    const int to_next = (pair0 + 1) * w.n_tile - first; /* units of the first pair */
    const int i = threadIdx.x / 16, r = threadIdx.x % 16;
    int u = i; /* the thread's unit of a group */
    dec_x1 x;
    dec_piped_tiles<DEC_DOWN_GROUP, 1>(
        pipe, x, sums, n,
        [&](int k) {
            if (k == n - 1)
                before_last();
            x = dec_x1::of<1>((const __half *)(h + ((pair0 + (k / 2 >= to_next)) * 2 + k % 2) * 24), 0);
        },
        [&](const float *red, int m) {
            if (i < m / 2) {
                const int in = pair0 + (u >= to_next), pair = half * R + in, row = (first + u - in * w.n_tile) * 16 + r;
                float d[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    d[j] = dec_sum<1, DEC_SUM_WARPS>(red, 2 * i + j, 0, r) * w.post;
                    if (w.bias && 2 * u + j < n_bias)
                        d[j] += bias[(2 * u + j) * 16 + r];
                    else if (w.bias)
                        d[j] += w.bias[(int64_t)list.chosen[2 * pair + j] * w.n_tile * 16 + row];
                }
                a.p[pair * w.n_tile * 16 + row] =
                    fmaf(list.weight[2 * pair + 1], d[1], __fmul_rn(list.weight[2 * pair], d[0]));
            }
            u += DEC_DOWN_GROUP / 2;
        });
}

/* Floats of two groups' sums; before that, the router's. */
template <int EPL, int R>
constexpr int dec_experts_sums = dec_max(dec_sums_bytes<DEC_UP_GROUP, R, DEC_SUM_WARPS>, dec_choice<EPL, R>::SMEM);

/* Bytes of R normed rows, later of 2 R rows of h. */
template <int R> __host__ __device__ constexpr int dec_rows_bytes(int n_embd, int n_ff) {
    return dec_max(R * dec_ld(n_embd), 2 * R * n_ff) * 2;
}

#define DEC_EXPERT_THREADS (DEC_THREADS + 32)

/* Both halves' gate_up, then both halves' down. A half of gate_up is done everywhere long before its down begins, as
 * the other half or its down lies between; the seventeenth warp tells. */
template <class F, int EPL, int R>
__global__ void __launch_bounds__(DEC_EXPERT_THREADS, 1) dec_experts_kernel(dec_experts a) {
    __shared__ dec_list<R> list;
    __shared__ uint64_t bars[4]; /* a half of gate_up is added up in this CTA, [2]; in all, [2] */
    const int tid = threadIdx.x, lane = tid % 32, n_embd = a.route.n_embd;
    const uint32_t added = dec_smem(bars), met = added + 16;
    dec_carve c = {dec_shared};
    typename dec_expert_plan<F>::pipe pipe;
    uint8_t *ring = c.take(pipe.SMEM);
    float *red = (float *)c.take(dec_experts_sums<EPL, R>);
    uint8_t *rows = c.take(dec_rows_bytes<R>(n_embd, a.up.n_ff));
    float *bias = (float *)c.take(dec_n_bias<R> * 64), *down_bias = (float *)c.take(DEC_MAX_TILES * 64);

    pipe.open(ring, 0);
    if (tid < 4)
        dec_bar_init(added + tid * 8, tid < 2 ? R : 1);
    if (tid >= DEC_THREADS) {
        __syncthreads();
        __syncthreads();
        for (int i = 0; i < 2 && lane == 0; i++) {
            dec_bar_wait(added + i * 8, 0);
            dec_meet(a.met + i);
            dec_bar_arrive(met + i * 8);
        }
        return;
    }
    const dec_spread<R> own;
    float4 g[R + 1];
#pragma unroll
    for (int i = 0; i < R + 1; i++)
        g[i] = *(const float4 *)(a.gain + min(own.at(i), n_embd - 4));
    dec_choice<EPL, R> to;
    to.early(a.route);
    dec_work work_of;
    if (tid / 32 == pipe.PRODUCER)
        work_of = dec_work(lane, 2 * R, a.up.w.n_tile, a.down.n_tile);
    pdl_wait();
    pdl_launch(); /* after the wait: the kernel after this one may read the route's inputs before its own wait */
    to.gather(a.route, red);
    if (tid / 32 == pipe.PRODUCER) {
        to.choose();
        list.make(to.id, work_of);
        const dec_work &s = list.work;
        dec_tiles_all<R> tiles(a.up.w, a.down, list, (int64_t)a.down.n_unit * F::CHUNK);
        pipe.n_piece = (s.n[0] + s.n[1] + 2 * (s.n[2] + s.n[3])) * pipe.PER_TILE;
        pipe.fill(tiles, 2 * pipe.PER_TILE); /* not more: all CTAs' first tiles before the third ones */
        __syncwarp();
        const float weight = to.weigh();
        if (lane < R * DEC_TOP_K)
            list.weight[lane] = weight;
        own.norm(to.v, to.rs, g, (__half *)rows, n_embd);
        __syncthreads();
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    own.norm(to.v, to.rs, g, (__half *)rows, n_embd);
    __syncthreads();
    const dec_work &s = list.work;
    dec_sums sums = {red, red + DEC_UP_GROUP * DEC_SUM_WARPS * dec_pitch<R>};
    dec_h<R> h;
    h.own = (uint4 *)rows + tid / 32 * h.PIECES;
    auto ask_h = [&](int half) {
        dec_bar_wait(met + half * 8, 0);
        h.ask(a.up, half);
    };
    const dec_x1 x = dec_x1::of<R>((const __half *)rows + tid / 32 * 192, dec_ld(n_embd));
    for (int i = 0; i < 2; i++) {
        const int at = i ? s.n[0] : 0, down_at = i ? 2 * s.n[2] : 0;
        dec_ask_bias(list.expert + i * 2 * R, s.first[i], s.n[i], dec_n_bias<R> - at, a.up.w, 2 * a.up.n_ff, a.up.n_ff,
                     bias + at * 16);
        dec_ask_down_bias(a.down, list, i, DEC_MAX_TILES - down_at, down_bias + down_at * 16);
    }
    for (int i = 0; i < 2; i++) {
        const int at = i ? s.n[0] : 0, n = s.n[i];
        dec_piped_tiles<DEC_UP_GROUP, R>(
            pipe, x, sums, n,
            [&](int k) {
                if (i == 1 && k == n - 1)
                    ask_h(0);
            },
            dec_glu_sums<DEC_UP_GROUP, R, dec_list<R>>(a.up, list, s.first[i], bias + at * 16, dec_n_bias<R> - at,
                                                       i * 2 * R));
        __syncwarp();
        if (tid < R * 32 && lane == 0)
            dec_bar_arrive(added + i * 8);
    }
    if (s.n[1] == 0)
        ask_h(0);
    for (int i = 0; i < 2; i++) {
        const int at = i ? 2 * s.n[2] : 0;
        h.keep();
        dec_down(a, list, i, pipe, h.own, sums, down_bias + at * 16, DEC_MAX_TILES - at, [&] {
            if (i == 0)
                ask_h(1);
        });
        if (i == 0 && s.n[2] == 0)
            ask_h(1);
    }
}

/* ---- shared memory, bytes ---- */

template <class F, int EPL, int R> constexpr size_t dec_experts_smem(int n_embd, int n_ff) {
    return dec_expert_plan<F>::pipe::SMEM + dec_experts_sums<EPL, R> + dec_rows_bytes<R>(n_embd, n_ff) +
           dec_n_bias<R> * 64 + DEC_MAX_TILES * 64 + 64;
}

#endif
