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

#define DEC_ATTN_SMEM (8 * 8192 + 8 * 8 * 64 * 4 + 2 * 8 * 8 * 4 + 16)

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
    __device__ __forceinline__ void ask_k(const T *page) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    k[b][i][e] =
                        __ldcg((const eight *)(page + (32 * b + g / 2 * 8 + 2 * i + g % 2) * 64 + e * 32 + t * 8));
        if (INT8)
#pragma unroll
            for (int i = 0; i < 4; i++)
                scale[INT8 ? i / 2 : 0][i % 2] = __ldcg((const uint4 *)(page + 8192) + i * 4 + t);
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
    /* Values of keys that the row does not see may be anything, NaN included: cleared. */
    __device__ __forceinline__ void clear_unseen(const dec_attn &a, int key0, int pos) {
        const int last = pos - key0, first = a.window > 0 ? last - a.window + 1 : 0;
        if (first <= 0 && last >= 63)
            return;
        if (INT8) { /* their scales are enough */
            uint32_t *w = (uint32_t *)scale[INT8 ? 1 : 0];
#pragma unroll
            for (int i = 0; i < 8; i++)
                w[i] &= keep(i / 4 * 32 + lane % 4 * 8 + i % 4 * 2, first, last);
            return;
        }
        const int unit = lane % 8 ^ (lane / 8 & 1) << 2; /* of eight keys, in all the lane's rows: d = lane / 8 + 4 i */
        uint4 *at = (uint4 *)v + lane;                   /* lane % 8 is where that unit lies */
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const uint4 w = at[i * 32];
            const int key = unit * 8;
            at[i * 32] = make_uint4(w.x & keep(key, first, last), w.y & keep(key + 2, first, last),
                                    w.z & keep(key + 4, first, last), w.w & keep(key + 6, first, last));
        }
        __syncwarp();
    }
    /* Mask of a pair of f16: keys key, key + 1 of first .. last. */
    static __device__ __forceinline__ uint32_t keep(int key, int first, int last) {
        return (key >= first && key <= last ? 0xFFFFu : 0u) | (key + 1 >= first && key + 1 <= last ? 0xFFFF0000u : 0u);
    }
    /* Keys 32 b + 8 t .. + 7 of V's row d. */
    __device__ __forceinline__ uint4 values(int d, int b) const {
        const int t = lane % 4;
        if (INT8)
            return kv_scaled(kv_unpack(*(const uint2 *)(v + unit_at(d, 2 * b + t / 2) * 16 + t % 2 * 8)),
                             scale[INT8 ? 1 : 0][b]);
        return *(const uint4 *)(v + unit_at(d, 4 * b + t) * 16);
    }
    /* O, m and l of the page into shared memory, from the scores; V is there. */
    __device__ __forceinline__ void finish(const dec_attn &a, float2 (&s)[2][4], int key0, int pos, float *so,
                                           float *sm, float *sl) {
        int g = lane / 4, t = lane % 4;
        float m = -INFINITY, l = 0;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int age = pos - (key0 + 32 * b + 8 * t + i);
                float &z = i % 2 ? s[b][i / 2].y : s[b][i / 2].x;
                z = age >= 0 && (a.window == 0 || age < a.window) ? z * a.scale_log2 : -INFINITY;
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
        clear_unseen(a, key0, pos);
#pragma unroll 4
        for (int n = 0; n < 8; n++) {
            float o[4] = {0, 0, 0, 0};
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint4 w = values(8 * n + g, b);
                mma_f16(o, p[b][0], 0, p[b][1], 0, w.x, w.y);
                mma_f16(o, p[b][2], 0, p[b][3], 0, w.z, w.w);
            }
            *(float2 *)(so + g * 64 + 8 * n + 2 * t) = make_float2(o[0], o[1]);
        }
    }
};

/* By the warp whose page the new position lies in: its key and value join the page. */
template <class T>
__device__ __forceinline__ void dec_store_fresh(const dec_attn &a, T *page, int row, int head, int at) {
    for (int value = 0; value < 2; value++) {
        const float *x = a.kv.fresh + ((row * 2 + value) * a.n_kv + head) * 64 + threadIdx.x % 32;
        const float row[2] = {__ldcg(x), __ldcg(x + 32)};
        kv_put(page, 64, value, at, row);
    }
    __syncwarp();
}

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
    float *so = (float *)(dec_shared + 8 * 8192), *sm = so + 8 * 8 * 64, *sl = sm + 64;
    int *flag = (int *)(sl + 64);
    dec_page<T> pg;
    pg.lane = lane, pg.v = dec_shared + warp * 8192, pg.v_at = dec_smem(pg.v);
    pdl_launch();
    const dec_units_of<R> units(a);
    auto page_of = [&](const dec_unit &t, int index) {
        return (T *)(a.kv.layer + __ldcg(a.kv.pages(t.row) + index) * a.kv.page_bytes + t.head * kv_head_bytes<T>(64));
    };
    auto ask = [&](const dec_unit &t, T *page, int index) {
        if constexpr (dec_page<T>::INT8)
            if (index == t.pos / 64)
                dec_store_fresh(a, page, t.row, t.head, t.pos % 64);
        pg.ask_k(page), pg.ask_v(page);
    };
    int u = blockIdx.x;
    const dec_unit begin = units.at(u);
    int index = begin.page(warp);
    T *page = index >= 0 ? page_of(begin, index) : nullptr;
    float sink = a.sinks && begin.row >= 0 ? a.sinks[begin.head * 8 + g] : 0.f; /* early: it comes from far */
    if (index == begin.pos / 64) { /* this page's last row is the kernel's before; the others may come nearer already */
        for (int i = lane * 128; i < kv_head_bytes<T>(64); i += 32 * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"((const uint8_t *)page + i));
        pdl_wait();
    }
    if (index >= 0)
        ask(begin, page, index);
    pdl_wait();
#pragma unroll 1
    for (; u < units.n; u += gridDim.x) {
        const dec_unit now = units.at(u), next = units.at(u + gridDim.x);
        const int h = now.head;
        float2 s[2][4];
        if (index >= 0) {
            uint4 q[2];
            const __half *row = a.q + ((now.row * a.n_kv + h) * 8 + lane / 4) * 64 + lane % 4 * 8;
            q[0] = __ldcg((const uint4 *)row), q[1] = __ldcg((const uint4 *)(row + 32));
            pg.scores(q, s);
            dec_async_done();
            __syncwarp();
            pg.finish(a, s, index * 64, now.pos, so + warp * 512, sm + warp * 8, sl + warp * 8);
        } else if (lane < 8)
            sm[warp * 8 + lane] = -INFINITY;
        __syncwarp();
        index = next.page(warp);
        if (index >= 0)
            ask(next, page_of(next, index), index);
        __syncthreads();
        dec_soft acc = {-INFINITY, 0, 0, 0};
#pragma unroll
        for (int w = 0; w < 8; w++) {
            float2 o = *(const float2 *)(so + w * 512 + g * 64 + d);
            acc.merge(sm[w * 8 + g], sl[w * 8 + g], o.x, o.y);
        }
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

#endif
