/* backend/cuda/decode_attention.cuh: attention of a decode step over paged keys and values. */
#ifndef ORCD_BACKEND_CUDA_DECODE_ATTENTION_CUH
#define ORCD_BACKEND_CUDA_DECODE_ATTENTION_CUH

#include "backend/cuda/decode_core.cuh"

#define DEC_CHUNK 512 /* keys of a partial result: eight pages, one a warp */

struct dec_attn {
    const __half *q; /* [n_head][64] */
    dec_kv kv;
    const int32_t *pos;
    const float *sinks; /* [n_head] or NULL */
    int n_kv, window;   /* n_head = 8 n_kv */
    float scale_log2;   /* scale * log2(e) */
    float *part;        /* [n_kv][chunks][8][66]: O, m, l */
    int part_chunks;    /* allotted per kv head */
    uint32_t *arrived;  /* [n_kv], zero; left zero */
    uint16_t *y;        /* [n_head * 64] f16 */
};

struct dec_soft { /* running softmax of one head and two columns */
    float m, l, o0, o1;
    __device__ __forceinline__ void merge(float pm, float pl, float p0, float p1) {
        if (pm == -INFINITY)
            return;
        float a, b;
        soft_merge(m, l, pm, pl, a, b);
        o0 = fmaf(o0, a, p0 * b), o1 = fmaf(o1, a, p1 * b);
    }
};

__device__ __forceinline__ void dec_attn_finish(const dec_attn &a, int head, int d, const dec_soft &s) {
    float m = s.m, l = s.l, f = 1;
    if (a.sinks) {
        float z = a.sinks[head] * 1.44269504088896f;
        m = fmaxf(s.m, z), f = exp2f(s.m - m), l = fmaf(s.l, f, exp2f(z - m));
    }
    *(uint32_t *)(a.y + head * 64 + d) = f16x2(s.o0 * f / l, s.o1 * f / l);
}

#define DEC_ATTN_SMEM (8 * 8192 + 8 * 8 * 64 * 4 + 2 * 8 * 8 * 4 + 16)

/* A warp's page of 64 keys: K in registers as B fragments of q K^T, V (transposed) in shared memory, rows of 64 keys
 * whose halves change places in odd rows, which keeps the reads free of bank conflicts. */
struct dec_page {
    uint4 k[2][4][2];
    uint32_t v_at; /* shared */
    uint8_t *v;
    int lane;

    __device__ __forceinline__ void ask_v(const __half *page) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            int d = i * 4 + lane / 8, u = lane % 8;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(v_at + d * 128 + (u ^ (d & 1) << 2) * 16),
                         "l"(page + 4096 + i * 256 + lane * 8)
                         : "memory");
        }
    }
    __device__ __forceinline__ void ask_k(const __half *page) {
        int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                    k[b][i][e] =
                        __ldcg((const uint4 *)(page + (32 * b + g / 2 * 8 + 2 * i + g % 2) * 64 + e * 32 + t * 8));
    }
    /* s[b][i]: head g, keys 32 b + 8 t + 2 i, + 1. Four chains at a time; rows 8..15 of A are empty. */
    __device__ __forceinline__ void scores(const uint4 (&q)[2], float2 (&s)[2][4]) {
#pragma unroll
        for (int b = 0; b < 2; b++) {
            float c[4][4] = {{0}};
#pragma unroll
            for (int e = 0; e < 2; e++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    mma_f16(c[i], q[e].x, 0, q[e].y, 0, k[b][i][e].x, k[b][i][e].y);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    mma_f16(c[i], q[e].z, 0, q[e].w, 0, k[b][i][e].z, k[b][i][e].w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[b][i] = make_float2(c[i][0], c[i][1]);
        }
    }
    /* Values of keys that the row does not see may be anything, NaN included: cleared. */
    __device__ __forceinline__ void clear_unseen(const dec_attn &a, int key0, int pos) {
        const int last = pos - key0, first = a.window > 0 ? last - a.window + 1 : 0;
        if (first <= 0 && last >= 63)
            return;
        const int unit = lane % 8 ^ (lane / 8 & 1) << 2; /* of eight keys, in all the lane's rows: d = lane / 8 + 4 i */
        uint32_t keep[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = unit * 8 + 2 * i;
            keep[i] =
                (key >= first && key <= last ? 0xFFFFu : 0u) | (key + 1 >= first && key + 1 <= last ? 0xFFFF0000u : 0u);
        }
        uint4 *at = (uint4 *)v + lane; /* lane % 8 is where that unit lies */
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const uint4 w = at[i * 32];
            at[i * 32] = make_uint4(w.x & keep[0], w.y & keep[1], w.z & keep[2], w.w & keep[3]);
        }
        __syncwarp();
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
#pragma unroll 2
        for (int n = 0; n < 8; n++) {
            float o[4] = {0, 0, 0, 0};
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint4 w = *(const uint4 *)(v + (8 * n + g) * 128 + ((4 * b + t) ^ (g & 1) << 2) * 16);
                mma_f16(o, p[b][0], 0, p[b][1], 0, w.x, w.y);
                mma_f16(o, p[b][2], 0, p[b][3], 0, w.z, w.w);
            }
            *(float2 *)(so + g * 64 + 8 * n + 2 * t) = make_float2(o[0], o[1]);
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

/* Units (kv head, chunk of 512 keys), eight warps: a page each; chunks meet in the last CTA to arrive, in ascending
 * order. Pages before the current position are asked for before the wait: the kernel before this one started us after
 * its own wait, so that they, the page table and the position are settled. */
__global__ void __launch_bounds__(256, 2) dec_attention_kernel(dec_attn a) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = warp, d = lane * 2;
    float *so = (float *)(dec_shared + 8 * 8192), *sm = so + 8 * 8 * 64, *sl = sm + 64;
    int *flag = (int *)(sl + 64);
    dec_page pg;
    pg.lane = lane, pg.v = dec_shared + warp * 8192, pg.v_at = dec_smem(pg.v);
    pdl_launch();
    const int32_t *pages = a.kv.pages();
    int pos = __ldcg(a.pos), low = a.window > 0 && pos >= a.window ? pos - a.window + 1 : 0;
    int c0 = low / DEC_CHUNK, n_chunk = pos / DEC_CHUNK + 1 - c0, n_unit = n_chunk * a.n_kv;
    auto index_of = [&](int u) { /* this warp's page of a unit, -1 none */
                                 int index = (c0 + u / a.n_kv) * (DEC_CHUNK / 64) + warp;
                                 return u < n_unit && index >= low / 64 && index <= pos / 64 ? index : -1;
    };
    auto page_of = [=](int u, int index) {
        return (const __half *)(a.kv.layer + __ldcg(pages + index) * a.kv.page_bytes + u % a.n_kv * DEC_HEAD_BYTES);
    };
    int u = blockIdx.x, index = index_of(u);
    const __half *page = index >= 0 ? page_of(u, index) : nullptr;
    if (index == pos / 64)
        pdl_wait(); /* this page's last row is the kernel's before */
    if (index >= 0)
        pg.ask_k(page), pg.ask_v(page);
    pdl_wait();
#pragma unroll 1
    for (; u < n_unit; u += gridDim.x) {
        int h = u % a.n_kv, next = index_of(u + gridDim.x), now = index;
        float2 s[2][4];
        if (now >= 0) {
            uint4 q[2];
            const __half *row = a.q + (h * 8 + lane / 4) * 64 + lane % 4 * 8;
            q[0] = __ldcg((const uint4 *)row), q[1] = __ldcg((const uint4 *)(row + 32));
            pg.scores(q, s);
        }
        if (now >= 0) {
            dec_async_done();
            __syncwarp();
            pg.finish(a, s, now * 64, pos, so + warp * 512, sm + warp * 8, sl + warp * 8);
        } else if (lane < 8)
            sm[warp * 8 + lane] = -INFINITY;
        __syncwarp();
        if (next >= 0)
            page = page_of(u + gridDim.x, next), pg.ask_k(page), pg.ask_v(page);
        index = next;
        __syncthreads();
        dec_soft acc = {-INFINITY, 0, 0, 0};
#pragma unroll 2
        for (int w = 0; w < 8; w++) {
            float2 o = *(const float2 *)(so + w * 512 + g * 64 + d);
            acc.merge(sm[w * 8 + g], sl[w * 8 + g], o.x, o.y);
        }
        if (n_chunk == 1) {
            dec_attn_finish(a, h * 8 + g, d, acc);
            __syncthreads();
            continue;
        }
        float *out = a.part + (((int64_t)h * a.part_chunks + u / a.n_kv) * 8 + g) * 66;
        __stcg((float2 *)(out + d), make_float2(acc.o0, acc.o1));
        if (lane == 0)
            __stcg((float2 *)(out + 64), make_float2(acc.m, acc.l));
        if (!dec_arrive(a.arrived + h, n_chunk, flag))
            continue;
        acc = {-INFINITY, 0, 0, 0};
        const float *in = a.part + ((int64_t)h * a.part_chunks * 8 + g) * 66;
        for (int i0 = 0; i0 < n_chunk; i0 += 4) {
            float2 o[4], ml[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i0 + i < n_chunk) {
                    o[i] = __ldcg((const float2 *)(in + (i0 + i) * 528 + d));
                    ml[i] = __ldcg((const float2 *)(in + (i0 + i) * 528 + 64));
                } else
                    ml[i].x = -INFINITY;
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc.merge(ml[i].x, ml[i].y, o[i].x, o[i].y);
        }
        dec_attn_finish(a, h * 8 + g, d, acc);
    }
}

#endif
