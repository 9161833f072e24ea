/* backend/cuda/decode_kernels.cuh: one row of gpt-oss in five kernels a layer: norm + qkv + rope + KV write, attention,
 * out + router sums, route + norm + gate_up + SwiGLU, down. The residual row is finished by whoever reads it next:
 * down leaves two partial rows, which the next norm adds. */
#ifndef ORCD_BACKEND_CUDA_DECODE_KERNELS_CUH
#define ORCD_BACKEND_CUDA_DECODE_KERNELS_CUH

#include "backend/cuda/decode_core.cuh"

struct dec_matrix {
    const uint8_t *w;   /* packed */
    const float *bias;  /* [n_mat][rows], of gate_up [n_mat][gate, up][n_ff]; or NULL */
    float post;         /* factor of the sums */
    int n_tile, n_unit; /* per matrix */
    int64_t mat_bytes;
};

struct dec_norm_in {
    const float *x, *p0, *p1; /* residual row = x + p0 + p1; p0 NULL: x alone */
    float *x_out;             /* the sum, written by CTA 0; not x. Unused without p0 */
    const float *gain;
    float eps;
    int n_embd; /* <= 4096, a multiple of 4 */
};

/* Units per ring stage and stages: a third of the shared memory of a multiprocessor stays free for the next kernel. */
template <class F> struct dec_plan { /* one tile's segment of three units in six or two stages */
    static constexpr int UNITS = 3, STAGES = 2, OUT_UNITS = 2, OUT_STAGES = 2;
};
template <> struct dec_plan<form_mxfp4> { /* pieces of a third of a tile */
    using up = dec_pipe<form_mxfp4, 3, 15, 3, 12>;
    using down = dec_pipe<form_mxfp4, 3, 15, 3, 9>;
};
template <> struct dec_plan<form_f16<1>> { static constexpr int UNITS = 1, STAGES = 3, OUT_UNITS = 1, OUT_STAGES = 3; };

/* A warp's walk over its segment of a list of tiles. Tiles: an object whose next() gives the address of the next tile.
 */
template <class F, int SEG, int UNITS, int STAGES> struct dec_feed {
    static constexpr int PER_TILE = SEG / UNITS, BYTES = UNITS * F::CHUNK;
    static constexpr int WARP_BYTES = BYTES * STAGES;
    static_assert(SEG % UNITS == 0, "a segment is whole stages");
    dec_ring<BYTES, STAGES> ring;
    const uint8_t *src;
    int left, part, lane; /* pieces to ask for; the next one's index in its tile */

    __device__ __forceinline__ void open(uint8_t *smem, int n_tile) {
        int warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        ring.open(smem + warp * WARP_BYTES);
        left = n_tile * PER_TILE, part = 0, src = nullptr;
    }
    template <class Tiles> __device__ __forceinline__ const uint8_t *source(Tiles &tiles) {
        if (PER_TILE == 1 || part == 0)
            src = tiles.next() + threadIdx.x / 32 * SEG * F::CHUNK;
        else
            src += BYTES;
        part = PER_TILE == 1 || part + 1 == PER_TILE ? 0 : part + 1;
        left--;
        return src;
    }
    template <class Tiles> __device__ __forceinline__ void prime(Tiles &tiles) {
#pragma unroll 1
        for (int s = 0; s < STAGES; s++)
            ring.issue(left > 0 ? source(tiles) : nullptr, lane);
    }
    /* acc = the segment's sums of the next tile. */
    template <class Tiles> __device__ __forceinline__ void tile_sum(Tiles &tiles, const __half *x, float (&acc)[4]) {
        acc[0] = acc[1] = acc[2] = acc[3] = 0;
#pragma unroll
        for (int s = 0; s < PER_TILE; s++) {
            dec_units<F, UNITS>(ring.wait(), x + s * UNITS * 64, acc, lane);
            ring.next(left > 0 ? source(tiles) : nullptr, lane);
        }
    }
};

struct dec_tiles_plain { /* tiles at a constant distance */
    const uint8_t *at;
    int64_t step;
    __device__ __forceinline__ const uint8_t *next() {
        const uint8_t *p = at;
        at += step;
        return p;
    }
};

/* CTA's share of n things: [first, end). */
__device__ __forceinline__ int dec_share(int n, int i) { return (int)((int64_t)n * i / gridDim.x); }

/* All tiles of this CTA in groups of G; epi(tile of the list, index in group's sums red, ...) runs on threads per
 * group. */
template <int G, class Feed, class Tiles, class Epi>
__device__ __forceinline__ void dec_tiles(Feed &feed, Tiles &tile, const __half *x, float *red, int n, bool active,
                                          const Epi &epi) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!active)
        dec_async_done();
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * G * DEC_WARPS * 16;
        int m = min(G, n - i0);
        if (active)
            for (int i = 0; i < m; i++) {
                float acc[4];
                feed.tile_sum(tile, x, acc);
                dec_store(out, i, warp, acc, lane);
            }
        __syncthreads();
        epi(out, i0, m);
    }
}

/* xs (f16, shared) = norm of the residual row. Ends with a barrier. */
template <class Epi>
__device__ __forceinline__ void dec_norm_row(const dec_norm_in &in, __half *xs, float *ws, Epi &epi) {
    int tid = threadIdx.x, n4 = in.n_embd / 4;
    float4 v[2], g[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (tid + i * ROW_THREADS < n4)
            g[i] = *(const float4 *)(in.gain + 4 * (tid + i * ROW_THREADS));
    pdl_wait();
    epi.after_wait();
    float s = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int at = 4 * (tid + i * ROW_THREADS);
        if (at < in.n_embd) {
            v[i] = dec_ld4(in.x + at);
            if (in.p0) {
                float4 p = dec_ld4(in.p0 + at), q = dec_ld4(in.p1 + at);
                v[i].x = v[i].x + p.x + q.x, v[i].y = v[i].y + p.y + q.y;
                v[i].z = v[i].z + p.z + q.z, v[i].w = v[i].w + p.w + q.w;
                if (blockIdx.x == 0)
                    *(float4 *)(in.x_out + at) = v[i];
            }
            s = sum_sq4(v[i], s);
        }
    }
    float rs = rms_scale(row_sum(s, ws), in.n_embd, in.eps);
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (tid + i * ROW_THREADS < n4)
            *(uint2 *)(xs + 4 * (tid + i * ROW_THREADS)) = dec_norm4(v[i], rs, g[i]);
    __syncthreads();
}

/* ---- norm + linear: qkv and head ---- */

/* Carves shared memory; the ring comes first. */
struct dec_carve {
    uint8_t *p;
    __device__ __forceinline__ uint8_t *take(int bytes) {
        uint8_t *r = p;
        p += (bytes + 15) / 16 * 16;
        return r;
    }
};

extern __shared__ __align__(128) uint8_t dec_shared[];

template <class F, int SEG, int G, class Epi>
__device__ __forceinline__ void dec_norm_linear(const dec_norm_in &in, const dec_matrix &w, Epi &epi) {
    using plan = dec_plan<F>;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_seg = w.n_unit / SEG;
    bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(2 * G * DEC_WARPS * 16 * 4);
    float *ws = (float *)c.take(64);
    __half *xs = (__half *)c.take(in.n_embd * 2);

    int first = dec_share(w.n_tile, blockIdx.x), n = dec_share(w.n_tile, blockIdx.x + 1) - first;
    dec_tiles_plain tile = {w.w + (int64_t)first * w.n_unit * F::CHUNK, (int64_t)w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    epi.before_wait(first, n);
    dec_norm_row(in, xs, ws, epi);
    dec_tiles<G>(feed, tile, xs + warp * SEG * 64 + lane % 4 * 8, red, n, active,
                 [&](const float *sums, int i0, int m) { epi(sums, first + i0, i0, m, n_seg); });
}

struct dec_kv {
    uint8_t *layer;       /* of page 0: pool + the layer's offset */
    int64_t page_bytes;   /* distance of pages */
    const int32_t *table; /* [slot][n_entry] */
    const int32_t *slot;  /* of the row */
    int n_entry;
    __device__ __forceinline__ const int32_t *pages() const { return table + (int64_t)__ldcg(slot) * n_entry; }
};
#define DEC_HEAD_BYTES 16384 /* K [64 keys][64] then V transposed [64][64 keys], f16 */

struct dec_rope {
    const float2 *cs;   /* [32] cos, sin of this position, scaled */
    const int32_t *pos; /* this row's position */
};

#define DEC_MAX_TILES 16 /* of a CTA whose biases are kept in shared memory; more are read late */

/* q (f16, after RoPE) and the KV page of one row. Rows: n_head q heads, n_kv k heads, n_kv v heads, of 64, PAIR64. */
struct dec_qkv_epilogue {
    dec_matrix w;
    dec_rope rope;
    dec_kv kv;
    int n_head, n_kv;
    __half *q;
    float *bias; /* shared [DEC_MAX_TILES][16] */
    float2 *cs;  /* shared [32] */
    int64_t *at; /* shared: page's offset, position */
    bool early;  /* position, rotation and page table are settled before the wait */

    __device__ __forceinline__ void before_wait(int first, int n) {
        if (early)
            settle();
        if (threadIdx.x / 32 == DEC_WARPS - 1)
            for (int i = threadIdx.x % 32; w.bias && i < min(n, DEC_MAX_TILES) * 16; i += 32)
                dec_async4(bias + i, w.bias + dec_row_pair64(first + i / 16, i % 8) + i % 16 / 8 * 32);
    }
    __device__ __forceinline__ void after_wait() {
        pdl_launch(); /* late: attention may then read positions and page tables before its wait */
        if (!early)
            settle();
    }
    __device__ __forceinline__ void settle() {
        int lane = threadIdx.x - (DEC_WARPS - 1) * 32;
        if (lane < 0)
            return;
        cs[lane] = __ldcg(rope.cs + lane);
        if (lane == 0) {
            int pos = __ldcg(rope.pos);
            at[0] = __ldcg(kv.pages() + pos / 64) * kv.page_bytes;
            at[1] = pos;
        }
    }
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int i0, int m, int n_seg) {
        int i = threadIdx.x / 8, r = threadIdx.x % 8;
        if (i >= m)
            return;
        int row = dec_row_pair64(tile0 + i, r), head = row / 64, d = row % 64;
        float lo = dec_sum(sums, i, r, n_seg) * w.post, hi = dec_sum(sums, i, r + 8, n_seg) * w.post;
        if (w.bias && i0 + i < DEC_MAX_TILES)
            lo += bias[(i0 + i) * 16 + r], hi += bias[(i0 + i) * 16 + r + 8];
        else if (w.bias)
            lo += w.bias[row], hi += w.bias[row + 32];
        if (head < n_head + n_kv)
            rotate(lo, hi, cs[d]);
        if (head < n_head) {
            q[row] = __float2half_rn(lo), q[row + 32] = __float2half_rn(hi);
            return;
        }
        int in = (int)at[1] % 64;
        __half *page = (__half *)(kv.layer + at[0] + (head - n_head) % n_kv * DEC_HEAD_BYTES);
        if (head < n_head + n_kv)
            page[in * 64 + d] = __float2half_rn(lo), page[in * 64 + d + 32] = __float2half_rn(hi);
        else
            page[4096 + d * 64 + in] = __float2half_rn(lo), page[4096 + (d + 32) * 64 + in] = __float2half_rn(hi);
    }
};

template <class F, int SEG>
__global__ void __launch_bounds__(ROW_THREADS, 2) dec_qkv_kernel(dec_norm_in in, dec_matrix w, dec_rope rope, dec_kv kv,
                                                                 int n_head, int n_kv, bool early, __half *q) {
    __shared__ float bias[DEC_MAX_TILES * 16];
    __shared__ float2 cs[32];
    __shared__ int64_t at[2];
    dec_qkv_epilogue epi = {w, rope, kv, n_head, n_kv, q, bias, cs, at, early};
    dec_norm_linear<F, SEG, 4>(in, w, epi);
}

/* logits of one row, and per CTA the best (value, id; ties: lower id). */
struct dec_head_epilogue {
    dec_matrix w;
    int n_vocab;
    float *logits;
    float top;
    int id;

    __device__ __forceinline__ void before_wait(int, int) { pdl_launch(); }
    __device__ __forceinline__ void after_wait() {}
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int, int m, int n_seg) {
        int i = threadIdx.x / 16, r = threadIdx.x % 16, row = (tile0 + i) * 16 + r;
        if (i >= m || row >= n_vocab)
            return;
        float v = dec_sum(sums, i, r, n_seg) * w.post;
        if (w.bias)
            v += w.bias[row];
        logits[row] = v;
        if (v > top || id == INT32_MAX)
            top = v, id = row; /* rows of a thread ascend */
    }
};

template <class F, int SEG>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    dec_head_kernel(dec_norm_in in, dec_matrix w, int n_vocab, float *logits,
                    float2 *best /* [gridDim.x], y: id bits */) {
    __shared__ float tops[4 * 16];
    __shared__ int ids[4 * 16];
    dec_head_epilogue epi = {w, n_vocab, logits, -INFINITY, INT32_MAX};
    dec_norm_linear<F, SEG, 4>(in, w, epi);
    float top = epi.top;
    int id = epi.id;
    if (threadIdx.x < 64)
        tops[threadIdx.x] = top, ids[threadIdx.x] = id;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < 64; i++)
            if (ids[i] != INT32_MAX && (id == INT32_MAX || tops[i] > top || (tops[i] == top && ids[i] < id)))
                top = tops[i], id = ids[i];
        best[blockIdx.x] = make_float2(top, __int_as_float(id));
    }
}

/* ---- attention ---- */

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

/* ---- out: x_out = x + W y + b, and each tile's share of the router's sums ---- */

struct dec_out {
    const uint16_t *y; /* f16 */
    const float *x;
    float *x_out;
    const float *router; /* [tile][4][n_expert][4]: router weight times the norm's gain */
    float *route_part;   /* [tile][n_expert] */
    int n_expert;        /* a multiple of 32 */
};

template <class F, int SEG> __global__ void __launch_bounds__(ROW_THREADS, 2) dec_out_kernel(dec_out a, dec_matrix w) {
    using plan = dec_plan<F>;
    constexpr int G = 2;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_seg = w.n_unit / SEG;
    bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::OUT_UNITS, plan::OUT_STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(2 * G * DEC_WARPS * 16 * 4);
    float *xt = (float *)c.take(2 * G * 16 * 4);
    __half *ys = (__half *)c.take(n_seg * SEG * 128);

    int step = gridDim.x, n = (w.n_tile - blockIdx.x + step - 1) / step;
    dec_tiles_plain tile = {w.w + (int64_t)blockIdx.x * w.n_unit * F::CHUNK, (int64_t)step * w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    int e = threadIdx.x / 16, r = threadIdx.x % 16;
    float wr = 0;
    if (n > 0)
        wr = a.router[(((int64_t)blockIdx.x * 4 + r / 4) * a.n_expert + e) * 4 + r % 4];
    pdl_launch();
    pdl_wait();
    float old = 0, off = 0; /* residual and bias of the thread's row in the first group */
    if (threadIdx.x < min(n, G) * 16) {
        int row = (blockIdx.x + threadIdx.x / 16 * step) * 16 + r;
        old = __ldcg(a.x + row);
        off = w.bias ? w.bias[row] : 0.f;
    }
    __half *own = ys + warp * SEG * 64;
    if (active)
        for (int i = lane; i < SEG * 8; i += 32)
            ((uint4 *)own)[i] = __ldcg((const uint4 *)(a.y + warp * SEG * 64) + i);
    __syncwarp();
    int k = 0;
    dec_tiles<G>(feed, tile, own + lane % 4 * 8, red, n, active, [&](const float *sums, int i0, int m) {
        float *x16 = xt + k * G * 16;
        k ^= 1;
        if (threadIdx.x < m * 16) {
            int i = threadIdx.x / 16, row = (blockIdx.x + (i0 + i) * step) * 16 + r;
            float v = dec_sum(sums, i, r, n_seg) * w.post;
            if (i0 > 0)
                old = __ldcg(a.x + row), off = w.bias ? w.bias[row] : 0.f;
            v = old + (v + off);
            a.x_out[row] = v;
            x16[threadIdx.x] = v;
        }
        __syncthreads();
        for (int i = 0; i < m; i++)
            for (int e0 = 0; e0 < a.n_expert; e0 += 32) {
                int64_t tile = blockIdx.x + (i0 + i) * step, at = tile * a.n_expert + e0 + e;
                float w16 = wr;
                if (i0 + i + e0 > 0)
                    w16 = a.router[((tile * 4 + r / 4) * a.n_expert + e0 + e) * 4 + r % 4];
                float v = __fmul_rn(w16, x16[i * 16 + r]);
#pragma unroll
                for (int d = 8; d; d >>= 1)
                    v += __shfl_xor_sync(~0u, v, d);
                if (r == 0)
                    a.route_part[at] = v;
            }
    });
}

/* ---- experts ---- */

/* All n tiles of this CTA in groups of G: epi(sums of the group, its first tile, its number of tiles) by the N_SEG
 * warps that sum. */
template <int G, int N_SEG, class Pipe, class Tiles, class Epi>
__device__ __forceinline__ void dec_piped_tiles(Pipe &pipe, Tiles &tiles, const __half *x, float *red, int n,
                                                Epi &&epi) {
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
            dec_store(out, i, warp, acc, lane);
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
    typename dec_plan<F>::up pipe;
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
    dec_piped_tiles<G, 15>(pipe, tile, xs + warp * 192 + lane % 4 * 8, red, n, [&](const float *sums, int i0, int m) {
        int i = tid / 8, r = tid % 8;
        if (i >= m)
            return;
        int at = first + i0 + i, slot = (at >= w.n_tile) + (at >= 2 * w.n_tile) + (at >= 3 * w.n_tile),
            e = dec_pick(id, slot), row = (at - slot * w.n_tile) * 8 + r;
        float gate = dec_sum(sums, i, r, 15) * w.post, up = dec_sum(sums, i, r + 8, 15) * w.post;
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
    typename dec_plan<F>::down pipe;
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
            pipe.tile_sum((const __half *)(own + (pair * 2 + i % 2) * 24) + lane % 4 * 8, acc);
            dec_store(out, i, warp, acc, lane);
        }
        asm volatile("bar.sync 1, %0;" ::"n"(15 * 32) : "memory");
        if (tid < m * 16) {
            int i = tid / 16, r = tid % 16, u = blockIdx.x + (i0 + i) * step, pair = u >= w.n_tile,
                row = (u - pair * w.n_tile) * 16 + r;
            float d[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                d[j] = dec_sum(out, 2 * i + j, r, 15) * w.post;
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

/* ---- shared memory of each kernel, bytes; n_seg = columns / 64 / SEG ---- */

template <class F> constexpr size_t dec_linear_smem(int n_seg, int n_embd) {
    return (size_t)n_seg * dec_plan<F>::UNITS * dec_plan<F>::STAGES * F::CHUNK + 2 * 4 * DEC_WARPS * 64 + 64 +
           n_embd * 2;
}
template <class F> constexpr size_t dec_out_smem(int n_seg, int n_col) {
    return (size_t)n_seg * dec_plan<F>::OUT_UNITS * dec_plan<F>::OUT_STAGES * F::CHUNK + 2 * 2 * DEC_WARPS * 64 + 256 +
           n_col * 2;
}
template <class F> constexpr size_t dec_gate_up_smem(int n_embd) {
    return dec_plan<F>::up::SMEM + 2 * 4 * DEC_WARPS * 64 + 64 + n_embd * 2 + DEC_MAX_TILES * 64 + 64;
}
template <class F> constexpr size_t dec_down_smem(int n_ff) {
    return dec_plan<F>::down::SMEM + 2 * 4 * DEC_WARPS * 64 + 64 + DEC_TOP_K * n_ff * 2 + DEC_MAX_TILES * 64 + 64;
}

#endif
