/* backend/cuda/decode_attention.cuh: attention of a decode step over paged keys and values. */
#ifndef ORCD_BACKEND_CUDA_DECODE_ATTENTION_CUH
#define ORCD_BACKEND_CUDA_DECODE_ATTENTION_CUH

#include "backend/cuda/decode_core.cuh"
#include "backend/cuda/kv.cuh"

#include <type_traits>

#define DEC_CHUNK 512 /* keys of a partial result: eight pages, one a warp */

struct dec_attn {
    const __half *q; /* [row][n_head][64] */
    dec_kv kv;
    const int32_t *pos, *n_row;
    const float *sinks; /* [n_head] or NULL */
    int n_kv, window;   /* n_head = 8 n_kv */
    float scale_log2;   /* scale * log2(e) */
    float *part;        /* [row][n_kv][chunks][8][66]: O, m, l */
    int part_chunks;    /* allotted per kv head */
    uint32_t *arrived;  /* [row][n_kv], zero; left zero */
    uint16_t *y;        /* [row][n_head * 64] f16 */
};

struct dec_soft { /* running softmax of one head and two columns */
    float m, l, o0, o1;
    __device__ __forceinline__ void merge(float pm, float pl, float p0, float p1) { /* no branch: merges overlap */
        float a, b, nm = m, nl = l;
        soft_merge(nm, nl, pm, pl, a, b);
        const bool some = pm != -INFINITY;
        o0 = some ? fmaf(o0, a, p0 * b) : o0, o1 = some ? fmaf(o1, a, p1 * b) : o1;
        m = some ? nm : m, l = some ? nl : l;
    }
};

__device__ __forceinline__ void dec_attn_finish(const dec_attn &a, int row, int head, int d, float sink,
                                                const dec_soft &s) {
    float m = s.m, l = s.l, f = 1;
    if (a.sinks) {
        float z = sink * 1.44269504088896f;
        m = fmaxf(s.m, z), f = exp2f(s.m - m), l = fmaf(s.l, f, exp2f(z - m));
    }
    *(uint32_t *)(a.y + (row * a.n_kv * 8 + head) * 64 + d) = f16x2(s.o0 * f / l, s.o1 * f / l);
}

#define DEC_PAGE 8192 /* bytes of a page's V */
#define DEC_ATTN_SMEM (8 * DEC_PAGE + 8 * 8 * 64 * 4 + 2 * 8 * 8 * 4 + 16)

/* Where a page's outputs of head g, columns d and d + 1, lie among its 512 floats: eight columns of all heads together,
 * heads in another order in each eight, so that neither who writes nor who reads meets bank conflicts. */
__device__ __forceinline__ int dec_out_at(int g, int d) { return d / 8 * 64 + (g ^ d / 8) * 8 + d % 8; }

/* A warp's page of 64 keys: K in registers as B fragments of q K^T, V (transposed) in shared memory, rows of 64 keys
 * whose units of 16 bytes change places so that the reads are free of bank conflicts. T: __half or kv_int8. */
template <class T> struct dec_page {
    static constexpr bool INT8 = sizeof(T) == 1;
    static constexpr int ROW = 64 * sizeof(T), ROW_UNITS = ROW / 16, KEYS = 16 / sizeof(T) /* of a unit */;
    typedef typename std::conditional<INT8, uint2, uint4>::type eight; /* values */
    eight k[2][4][2];
    uint4 scale[INT8 ? 2 : 1][2]; /* K's, V's of the lane's eight keys of a block */
    uint32_t v_at;                /* shared */
    uint8_t *v;
    int lane;

    __device__ __forceinline__ dec_page(uint8_t *room /* shared, DEC_PAGE bytes */)
        : v_at(dec_smem(room)), v(room), lane(threadIdx.x % 32) {}

    static __device__ __forceinline__ T *of(const dec_attn &a, int row, int head, int index) {
        return (T *)(a.kv.layer + __ldcg(a.kv.pages(row) + index) * a.kv.page_bytes + head * kv_head_bytes<T>(64));
    }
    /* The new position's key and value join its page. */
    static __device__ __forceinline__ void store_fresh(const dec_attn &a, T *page, int row, int head, int at) {
        for (int value = 0; value < 2; value++) {
            const float *x = a.kv.fresh + ((row * 2 + value) * a.n_kv + head) * 64 + threadIdx.x % 32;
            const float row[2] = {__ldcg(x), __ldcg(x + 32)};
            kv_put(page, 64, value, at, row);
        }
        __syncwarp();
    }
    /* Where unit u of V's row d lies. */
    static __device__ __forceinline__ int unit_at(int d, int u) {
        return d * ROW_UNITS + (INT8 ? u ^ (d & 2) : u ^ (d & 1) << 2);
    }
    __device__ __forceinline__ void ask_v(const T *page) {
        const uint4 *v4 = (const uint4 *)(page + 4096);
#pragma unroll
        for (int i = 0; i < 64 * ROW_UNITS / 32; i++) {
            const int u = i * 32 + lane;
            asm volatile(
                "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(v_at + unit_at(u / ROW_UNITS, u % ROW_UNITS) * 16),
                "l"(v4 + u)
                : "memory");
        }
    }
    /* Of all keys, or of one. */
    __device__ __forceinline__ void ask_k(const T *page, int only = -1) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = 32 * b + g / 2 * 8 + 2 * i + g % 2;
                if (only < 0 || key == only)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        k[b][i][e] = __ldcg((const eight *)(page + key * 64 + e * 32 + t * 8));
            }
        if (INT8)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scale[INT8 ? i / 2 : 0][i % 2] = __ldcg((const uint4 *)(page + 8192) + i * 4 + t);
    }
    __device__ __forceinline__ void ask(const T *page) { ask_k(page), ask_v(page); }
    /* at: where in the page the new position is, -1 not there */
    __device__ __forceinline__ void ask(const dec_attn &a, T *page, int row, int head, int at) {
        if constexpr (INT8)
            if (at >= 0)
                store_fresh(a, page, row, head, at);
        ask(page);
    }
    /* The page was asked for before position `at` was in it, which the kernel before has computed. */
    __device__ __forceinline__ void renew(const dec_attn &a, T *page, int row, int head, int at) {
        if constexpr (INT8)
            store_fresh(a, page, row, head, at);
        ask_k(page, at);
        const T *from = page + 4096 + lane * 64 + at;
        const T x[2] = {__ldcg(from), __ldcg(from + 32 * 64)};
        dec_async_done();
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++)
            ((T *)v)[unit_at(lane + 32 * i, at / KEYS) * KEYS + at % KEYS] = x[i];
    }
    static __device__ __forceinline__ uint4 halves(uint4 v) { return v; }
    static __device__ __forceinline__ uint4 halves(uint2 v) { return kv_unpack(v); }
    /* s[b][i]: head g, keys 32 b + 8 t + 2 i, + 1. Four chains at a time; rows 8..15 of A are empty. */
    __device__ __forceinline__ void scores(const uint4 (&q)[2], float2 (&s)[2][4]) {
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float c[4][4] = {{0}};
#pragma unroll
            for (int e = 0; e < 2; e++) {
                uint4 w[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    w[i] = halves(k[b][i][e]);
                    mma_f16(c[i], q[e].x, 0, q[e].y, 0, w[i].x, w[i].y);
                }
#pragma unroll
                for (int i = 0; i < 4; i++)
                    mma_f16(c[i], q[e].z, 0, q[e].w, 0, w[i].z, w[i].w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[b][i] = INT8 ? make_float2(c[i][0] * kv_scale(scale[0][b], 2 * i),
                                             c[i][1] * kv_scale(scale[0][b], 2 * i + 1))
                               : make_float2(c[i][0], c[i][1]);
        }
    }
    /* Masks of pairs of f16: which of the lane's keys 32 b + 8 t + 2 i, + 1 the row sees. */
    __device__ __forceinline__ void look(const dec_attn &a, int key0, int pos, uint32_t (&seen)[2][4]) const {
        const int first = a.window > 0 ? max(pos - a.window + 1, 0) : 0;
        const uint32_t n = pos - first;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t at = key0 - first + i / 4 * 32 + lane % 4 * 8 + i % 4 * 2;
            seen[i / 4][i % 4] = (at <= n ? 0xFFFFu : 0u) | (at + 1 <= n ? 0xFFFF0000u : 0u);
        }
    }
    static __device__ __forceinline__ uint4 masked(uint4 v, const uint32_t (&m)[4]) {
        return make_uint4(v.x & m[0], v.y & m[1], v.z & m[2], v.w & m[3]);
    }
    /* Keys 32 b + 8 t .. + 7 of V's row d. What the row does not see may be anything, NaN included: cleared. */
    __device__ __forceinline__ uint4 values(int d, int b, const uint32_t (&seen)[2][4]) const {
        const int t = lane % 4;
        if (INT8) /* zero scales are enough */
            return kv_scaled(kv_unpack(*(const uint2 *)(v + unit_at(d, 2 * b + t / 2) * 16 + t % 2 * 8)),
                             masked(scale[INT8 ? 1 : 0][b], seen[b]));
        return masked(*(const uint4 *)(v + unit_at(d, 4 * b + t) * 16), seen[b]);
    }
    /* O, m and l of the page into shared memory, when what was asked for is there. so may be where V lies: eight
     * columns take less room than their keys, and are written when these have been read. */
    __device__ __forceinline__ void attend(const dec_attn &a, int row, int head, int index, int pos, float *so,
                                           float *sm, float *sl) {
        uint4 q[2];
        const __half *from = a.q + ((row * a.n_kv + head) * 8 + lane / 4) * 64 + lane % 4 * 8;
        q[0] = __ldcg((const uint4 *)from), q[1] = __ldcg((const uint4 *)(from + 32));
        float2 s[2][4];
        scores(q, s);
        dec_async_done();
        __syncwarp();
        finish(a, s, index * 64, pos, so, sm, sl);
    }
    __device__ __forceinline__ void finish(const dec_attn &a, float2 (&s)[2][4], int key0, int pos, float *so,
                                           float *sm, float *sl) {
        int g = lane / 4, t = lane % 4;
        float m = -INFINITY, l = 0;
        uint32_t seen[2][4];
        look(a, key0, pos, seen);
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &z = i % 2 ? s[b][i / 2].y : s[b][i / 2].x;
                z = seen[b][i / 2] >> i % 2 * 16 & 1 ? z * a.scale_log2 : -INFINITY;
                m = fmaxf(m, z);
            }
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        float mm = m == -INFINITY ? 0.f : m;
        uint32_t p[2][4];
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float p0 = exp2f(s[b][i].x - mm), p1 = exp2f(s[b][i].y - mm);
                l = l + p0, l = l + p1;
                __half2 h = __floats2half2_rn(p0, p1);
                p[b][i] = *(uint32_t *)&h;
            }
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        if (t == 0)
            sm[g] = m, sl[g] = l;
#pragma unroll
        for (int n0 = 0; n0 < 8; n0 += 4) {
            float o[4][4] = {};
#pragma unroll
            for (int b = 0; b < 2; b++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const uint4 w = values(8 * (n0 + n) + g, b, seen);
                    mma_f16(o[n], p[b][0], 0, p[b][1], 0, w.x, w.y);
                    mma_f16(o[n], p[b][2], 0, p[b][3], 0, w.z, w.w);
                }
            __syncwarp();
#pragma unroll
            for (int n = 0; n < 4; n++)
                *(float2 *)(so + dec_out_at(g, 8 * (n0 + n) + 2 * t)) = make_float2(o[n][0], o[n][1]);
        }
    }
};

/* Counts arrivals of CTAs whose partial results are written; true for all threads of the last one, which may read them.
 */
__device__ __forceinline__ bool dec_arrive(uint32_t *counter, int n, int *flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        int old;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(counter) : "memory");
        *flag = old == n - 1;
        if (old == n - 1)
            *counter = 0;
    }
    __syncthreads();
    return *flag;
}

/* The results of pages first .. end - 1, of eight at most, in ascending order. so: pages DISTANCE floats apart */
template <int DISTANCE>
__device__ __forceinline__ dec_soft dec_merge_pages(const float *so, const float *sm, const float *sl, int g, int d,
                                                    int first = 0, int end = 8) {
    dec_soft acc = {-INFINITY, 0, 0, 0};
#pragma unroll
    for (int w = first; w < end; w++) {
        const float2 o = *(const float2 *)(so + w * DISTANCE + dec_out_at(g, d));
        acc.merge(sm[w * 8 + g], sl[w * 8 + g], o.x, o.y);
    }
    return acc;
}

/* A unit of work: 512 keys of a row for one KV head. */
struct dec_unit {
    int row, pos, low; /* low: first key that the row sees */
    int chunk, head;   /* chunk: from the first that the row sees, c0 */
    int c0, n_chunk;
    /* The warp's page, -1 none. */
    __device__ __forceinline__ int page(int warp) const {
        const int index = (c0 + chunk) * (DEC_CHUNK / 64) + warp;
        return row >= 0 && index >= low / 64 && index <= pos / 64 ? index : -1;
    }
};

/* Units of R rows, numbered row by row, then by chunk, then by head. Lane j of each warp knows row j. */
template <int R> struct dec_units_of {
    int n_kv, pos, low, c0, n_chunk, base; /* base: the row's first unit */
    int n;                                 /* units of all rows */

    __device__ __forceinline__ dec_units_of(const dec_attn &a) {
        const int j = R == 1 ? 0 : threadIdx.x % 32;
        const bool there = R == 1 || j < min(R, __ldcg(a.n_row));
        n_kv = a.n_kv;
        pos = there ? __ldcg(a.pos + j) : 0;
        low = a.window > 0 && pos >= a.window ? pos - a.window + 1 : 0;
        c0 = low / DEC_CHUNK, n_chunk = there ? pos / DEC_CHUNK + 1 - c0 : 0;
        int sum = n_chunk * n_kv;
        n = sum, base = 0;
        if constexpr (R > 1) {
#pragma unroll
            for (int d = 1; d < R; d *= 2) {
                const int v = __shfl_up_sync(~0u, sum, d);
                sum += j >= d ? v : 0;
            }
            base = sum - n;
            n = __shfl_sync(~0u, sum, R - 1);
        }
    }
    __device__ __forceinline__ dec_unit at(int u) const {
        if (R == 1)
            return {u < n ? 0 : -1, pos, low, u / n_kv, u % n_kv, c0, n_chunk};
        const uint32_t who = __ballot_sync(~0u, u >= base && u < base + n_chunk * n_kv);
        const int row = __ffs((int)who) - 1, j = max(row, 0);
        u -= __shfl_sync(~0u, base, j);
        return {row,      __shfl_sync(~0u, pos, j), __shfl_sync(~0u, low, j),    u / n_kv,
                u % n_kv, __shfl_sync(~0u, c0, j),  __shfl_sync(~0u, n_chunk, j)};
    }
};

/* Eight warps a unit, a page each; chunks meet in the last CTA to arrive, in ascending order. Pages before the current
 * position are asked for before the wait: the kernel before this one started us after its own wait, so that they, the
 * page table and the position are settled. No two rows are of one sequence. */
template <class T, int R> __global__ void __launch_bounds__(256, 2) dec_attention_kernel(dec_attn a) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = warp, d = lane * 2;
    float *so = (float *)(dec_shared + 8 * DEC_PAGE), *sm = so + 8 * 8 * 64, *sl = sm + 64;
    int *flag = (int *)(sl + 64);
    dec_page<T> pg(dec_shared + warp * DEC_PAGE);
    pdl_launch();
    const dec_units_of<R> units(a);
    int u = blockIdx.x;
    const dec_unit begin = units.at(u);
    int index = begin.page(warp);
    T *page = index >= 0 ? pg.of(a, begin.row, begin.head, index) : nullptr;
    float sink = a.sinks && begin.row >= 0 ? a.sinks[begin.head * 8 + g] : 0.f; /* early: it comes from far */
    if (index == begin.pos / 64)
        pdl_wait();
    if (index >= 0)
        pg.ask(a, page, begin.row, begin.head, index == begin.pos / 64 ? begin.pos % 64 : -1);
    pdl_wait();
#pragma unroll 1
    for (; u < units.n; u += gridDim.x) {
        const dec_unit now = units.at(u), next = units.at(u + gridDim.x);
        const int h = now.head;
        if (index >= 0)
            pg.attend(a, now.row, h, index, now.pos, so + warp * 512, sm + warp * 8, sl + warp * 8);
        else if (lane < 8)
            sm[warp * 8 + lane] = -INFINITY;
        __syncwarp();
        index = next.page(warp);
        if (index >= 0)
            pg.ask(a, pg.of(a, next.row, next.head, index), next.row, next.head,
                   index == next.pos / 64 ? next.pos % 64 : -1);
        __syncthreads();
        dec_soft acc = dec_merge_pages<512>(so, sm, sl, g, d);
        const float z = sink;
        if (a.sinks && next.row >= 0)
            sink = a.sinks[next.head * 8 + g];
        if (now.n_chunk == 1) {
            dec_attn_finish(a, now.row, h * 8 + g, d, z, acc);
            __syncthreads();
            continue;
        }
        const int at = now.row * a.n_kv + h;
        float *out = a.part + (((int64_t)at * a.part_chunks + now.chunk) * 8 + g) * 66;
        __stcg((float2 *)(out + d), make_float2(acc.o0, acc.o1));
        if (lane == 0)
            __stcg((float2 *)(out + 64), make_float2(acc.m, acc.l));
        if (!dec_arrive(a.arrived + at, now.n_chunk, flag))
            continue;
        acc = {-INFINITY, 0, 0, 0};
        const float *in = a.part + ((int64_t)at * a.part_chunks * 8 + g) * 66;
        for (int i0 = 0; i0 < now.n_chunk; i0 += 4) {
            float2 o[4], ml[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i0 + i < now.n_chunk) {
                    o[i] = __ldcg((const float2 *)(in + (i0 + i) * 528 + d));
                    ml[i] = __ldcg((const float2 *)(in + (i0 + i) * 528 + 64));
                } else
                    ml[i].x = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc.merge(ml[i].x, ml[i].y, o[i].x, o[i].y);
        }
        dec_attn_finish(a, now.row, h * 8 + g, d, z, acc);
    }
}

/* ---- short contexts: all keys of a row and KV head at once, by a cluster of as many CTAs as there are chunks ---- */

#define DEC_PART (8 * 66) /* floats of a chunk's partial result: [head][64], m and l of each head */
constexpr int dec_attn_short_smem(int cluster) {
    return 8 * DEC_PAGE + 2 * 8 * 8 * 4 + 16 + (cluster - 1) * DEC_PART * 4;
}

/* A CTA a chunk, a warp a page. */
template <class T, int R>
__global__ void __launch_bounds__(256, 2) dec_attention_short_kernel(dec_attn a, int cluster) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = warp, d = lane * 2;
    const int who = blockIdx.x / cluster, rank = blockIdx.x % cluster, row = who / a.n_kv, head = who % a.n_kv;
    float *so = (float *)dec_shared, *sm = (float *)(dec_shared + 8 * DEC_PAGE), *sl = sm + 64;
    uint64_t *bar = (uint64_t *)(sl + 64);
    float *part = (float *)(bar + 2); /* [cluster - 1][DEC_PART] */
    dec_page<T> pg(dec_shared + warp * DEC_PAGE);
    pdl_launch();
    if (R > 1 && row >= __ldcg(a.n_row))
        return;
    const int pos = __ldcg(a.pos + row), low = a.window > 0 && pos >= a.window ? pos - a.window + 1 : 0;
    const int c0 = low / DEC_CHUNK, n_chunk = pos / DEC_CHUNK + 1 - c0;
    const int index = (c0 + rank) * (DEC_CHUNK / 64) + warp;
    const bool there = index >= low / 64 && index <= pos / 64;
    if (cluster > 1) {
        if (rank == 0 && threadIdx.x == 0)
            dec_expect(bar, (n_chunk - 1) * DEC_PART * 4);
        dec_cluster_arrive();
    }
    const float sink = a.sinks ? a.sinks[head * 8 + g] : 0.f;
    T *page = there ? pg.of(a, row, head, index) : nullptr;
    if (there)
        pg.ask(page);
    pdl_wait();
    if (index == pos / 64)
        pg.renew(a, page, row, head, pos % 64);
    if (there)
        pg.attend(a, row, head, index, pos, (float *)pg.v, sm + warp * 8, sl + warp * 8);
    __syncthreads();
    const int page0 = index - warp;
    dec_soft acc =
        dec_merge_pages<DEC_PAGE / 4>(so, sm, sl, g, d, max(low / 64 - page0, 0), min(pos / 64 - page0 + 1, 8));
    if (cluster > 1) {
        dec_cluster_wait();
        if (rank > 0) {
            if (rank < n_chunk) {
                float *to = part + (rank - 1) * DEC_PART;
                dec_send(to + g * 64 + d, make_float2(acc.o0, acc.o1), 0, bar);
                if (lane == 0)
                    dec_send(to + 512 + g * 2, make_float2(acc.m, acc.l), 0, bar);
            }
            return;
        }
        if (n_chunk > 1) {
            const dec_soft first = acc;
            acc = {-INFINITY, 0, 0, 0};
            acc.merge(first.m, first.l, first.o0, first.o1);
            dec_bar_wait(dec_smem(bar), 0);
        }
        for (int i = 0; i < n_chunk - 1; i++) {
            const float2 o = *(const float2 *)(part + i * DEC_PART + g * 64 + d),
                         ml = *(const float2 *)(part + i * DEC_PART + 512 + g * 2);
            acc.merge(ml.x, ml.y, o.x, o.y);
        }
    }
    dec_attn_finish(a, row, head * 8 + g, d, sink, acc);
}

#endif
