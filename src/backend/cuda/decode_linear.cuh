/* backend/cuda/decode_linear.cuh: the dense products of a decode step: norm + qkv + rope + KV write, out + router sums,
 * norm + head. */
#ifndef ORCD_BACKEND_CUDA_DECODE_LINEAR_CUH
#define ORCD_BACKEND_CUDA_DECODE_LINEAR_CUH

#include "backend/cuda/decode_core.cuh"
#include "backend/cuda/kv.cuh"

struct dec_norm_in {
    const float *x, *p; /* [row][n_embd], [row][2][n_embd]: residual row = x + p + p; p NULL: x alone */
    float *x_out;       /* the sum, written by CTA 0; not x. Unused without p; NULL: nowhere */
    const int32_t *of;  /* which rows to take; NULL: all in order */
    const float *gain;
    float eps;
    int n_embd; /* <= 4096, or 3072 with two rows; a multiple of 4 */
};

/* Units per ring stage and stages: two tiles, and one and a half for out. A third of the shared memory of a
 * multiprocessor stays free for attention. */
template <class F> struct dec_plan { static constexpr int UNITS = 1, STAGES = 6, OUT_UNITS = 2, OUT_STAGES = 3; };
template <> struct dec_plan<form_f16<1>> { static constexpr int UNITS = 1, STAGES = 3, OUT_UNITS = 1, OUT_STAGES = 3; };

#define DEC_IN_GROUP 4 /* tiles of qkv and head that are added up at once */

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
    template <class Tiles, class X>
    __device__ __forceinline__ void tile_sum(Tiles &tiles, const X &x, float (&acc)[4]) {
        acc[0] = acc[1] = acc[2] = acc[3] = 0;
#pragma unroll
        for (int s = 0; s < PER_TILE; s++) {
            dec_units<F, UNITS>(ring.wait(), x, s * UNITS, acc, lane);
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

/* All tiles of this CTA in groups of G; epi(tile of the list, index in group's sums red, ...) runs on threads per
 * group. */
template <int G, int R, class Feed, class Tiles, class X, class Epi>
__device__ __forceinline__ void dec_tiles(Feed &feed, Tiles &tile, const X &x, float *red, int n, bool active,
                                          const Epi &epi) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!active)
        dec_async_done();
    for (int i0 = 0, k = 0; i0 < n; i0 += G, k ^= 1) {
        float *out = red + k * G * DEC_WARPS * dec_pitch<R>;
        int m = min(G, n - i0);
        if (active)
            for (int i = 0; i < m; i++) {
                float acc[4];
                feed.tile_sum(tile, x, acc);
                dec_store<R>(out, i, warp, acc, lane);
            }
        __syncthreads();
        epi(out, i0, m);
    }
}

/* xs (f16, shared) = norm of R residual rows. Ends with a barrier. */
template <int R, class Epi>
__device__ __forceinline__ void dec_norm_rows(const dec_norm_in &in, __half *xs, float *ws, Epi &epi) {
    const dec_spread<R> own;
    const int n = in.n_embd;
    float4 v[own.N], g[own.N];
    int row[own.N];
#pragma unroll
    for (int i = 0; i < own.N; i++) {
        g[i] = *(const float4 *)(in.gain + min(own.at(i), n - 4));
        row[i] = in.of ? __ldcg(in.of + own.row(i)) : own.row(i);
    }
    auto load = [&] {
#pragma unroll
        for (int i = 0; i < own.N; i++)
            v[i] = dec_ld4(in.x + row[i] * n + min(own.at(i), n - 4));
    };
    if (in.p) /* x is older: the kernel before this one started us after it had waited for it */
        load();
    pdl_wait();
    epi.after_wait();
    if (!in.p)
        load();
    if (in.p) {
        float4 p[own.N], q[own.N];
#pragma unroll
        for (int i = 0; i < own.N; i++) { /* all on their way before the first is used */
            const float *from = in.p + row[i] * 2 * n + min(own.at(i), n - 4);
            p[i] = dec_ld4(from), q[i] = dec_ld4(from + n);
        }
#pragma unroll
        for (int i = 0; i < own.N; i++) {
            v[i].x = v[i].x + p[i].x + q[i].x, v[i].y = v[i].y + p[i].y + q[i].y;
            v[i].z = v[i].z + p[i].z + q[i].z, v[i].w = v[i].w + p[i].w + q[i].w;
            if (blockIdx.x == 0 && in.x_out && own.at(i) < n)
                *(float4 *)(in.x_out + own.row(i) * n + own.at(i)) = v[i];
        }
    }
    float rs[R];
    own.scales(v, n, in.eps, ws, rs);
    own.norm(v, rs, g, xs, n);
    __syncthreads();
}

/* ---- norm + linear: qkv and head ---- */

template <class F, int SEG, int G, int R, class Epi>
__device__ __forceinline__ void dec_norm_linear(const dec_norm_in &in, const dec_matrix &w, Epi &epi) {
    using plan = dec_plan<F>;
    int warp = threadIdx.x / 32, n_seg = w.n_unit / SEG;
    bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::UNITS, plan::STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<G, R>);
    float *ws = (float *)c.take(R * 64);
    __half *xs = (__half *)c.take(R * dec_ld(in.n_embd) * 2);

    int first = dec_share(w.n_tile, blockIdx.x), n = dec_share(w.n_tile, blockIdx.x + 1) - first;
    dec_tiles_plain tile = {w.w + (int64_t)first * w.n_unit * F::CHUNK, (int64_t)w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    epi.before_wait(first, n);
    dec_norm_rows<R>(in, xs, ws, epi);
    dec_tiles<G, R>(feed, tile, dec_x1::of<R>(xs + warp * SEG * 64, dec_ld(in.n_embd)), red, n, active,
                    [&](const float *sums, int i0, int m) { epi(sums, first + i0, i0, m, n_seg); });
}

struct dec_rope {
    const float2 *cs;   /* [row][64], 32 used: cos, sin of its position, scaled */
    const int32_t *pos; /* [row] */
};

/* q (f16, after RoPE) and the KV pages of R rows. Weights' rows: n_head q heads, n_kv k heads, n_kv v heads, of 64,
 * PAIR64. */
template <int R> struct dec_qkv_epilogue {
    dec_matrix w;
    dec_rope rope;
    dec_kv kv;
    const int32_t *n_row; /* R > 1: how many rows there are */
    int n_head, n_kv;
    __half *q;   /* [R][n_head * 64] */
    float *bias; /* shared [DEC_MAX_TILES][16] */
    float2 *cs;  /* shared [R][32] */
    int64_t *at; /* shared [R][2]: page's offset, -1 none; position */
    bool early;  /* positions, rotations and page tables are settled before the wait */

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
#pragma unroll
        for (int j = 0; j < R; j++)
            cs[j * 32 + lane] = __ldcg(rope.cs + j * 64 + lane);
        if (lane < R) {
            int pos = __ldcg(rope.pos + lane);
            bool there = R == 1 || lane < __ldcg(n_row);
            at[2 * lane] = there ? __ldcg(kv.pages(lane) + pos / 64) * kv.page_bytes : -1;
            at[2 * lane + 1] = pos;
        }
    }
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int i0, int m, int n_seg) {
        int i = threadIdx.x / (8 * R), j = threadIdx.x / 8 % R, r = threadIdx.x % 8;
        if (i >= m)
            return;
        int row = dec_row_pair64(tile0 + i, r), head = row / 64, d = row % 64;
        float lo = dec_sum<R>(sums, i, j, r, n_seg) * w.post, hi = dec_sum<R>(sums, i, j, r + 8, n_seg) * w.post;
        if (w.bias && i0 + i < DEC_MAX_TILES)
            lo += bias[(i0 + i) * 16 + r], hi += bias[(i0 + i) * 16 + r + 8];
        else if (w.bias)
            lo += w.bias[row], hi += w.bias[row + 32];
        if (head < n_head + n_kv)
            rotate(lo, hi, cs[j * 32 + d]);
        if (head < n_head) {
            __half *to = q + j * n_head * 64 + row;
            to[0] = __float2half_rn(lo), to[32] = __float2half_rn(hi);
            return;
        }
        if (kv.fresh) {
            float *to = kv.fresh + j * 2 * n_kv * 64 + row - n_head * 64;
            to[0] = lo, to[32] = hi;
            return;
        }
        if (R > 1 && at[2 * j] < 0)
            return;
        int in = (int)at[2 * j + 1] % 64;
        __half *page = (__half *)(kv.layer + at[2 * j] + (head - n_head) % n_kv * kv_head_bytes<__half>(64));
        if (head < n_head + n_kv)
            page[in * 64 + d] = __float2half_rn(lo), page[in * 64 + d + 32] = __float2half_rn(hi);
        else
            page[4096 + d * 64 + in] = __float2half_rn(lo), page[4096 + (d + 32) * 64 + in] = __float2half_rn(hi);
    }
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    dec_qkv_kernel(dec_norm_in in, dec_matrix w, dec_rope rope, dec_kv kv, const int32_t *n_row, int n_head, int n_kv,
                   bool early, __half *q) {
    __shared__ float bias[DEC_MAX_TILES * 16];
    __shared__ float2 cs[R * 32];
    __shared__ int64_t at[R * 2];
    dec_qkv_epilogue<R> epi = {w, rope, kv, n_row, n_head, n_kv, q, bias, cs, at, early};
    dec_norm_linear<F, SEG, DEC_IN_GROUP, R>(in, w, epi);
}

/* logits[row][n_vocab] */
template <int R> struct dec_head_epilogue {
    dec_matrix w;
    int n_vocab;
    float *logits;

    __device__ __forceinline__ void before_wait(int, int) { pdl_launch(); }
    __device__ __forceinline__ void after_wait() {}
    __device__ __forceinline__ void operator()(const float *sums, int tile0, int, int m, int n_seg) {
        const int i = threadIdx.x / (16 * R), j = threadIdx.x / 16 % R, r = threadIdx.x % 16,
                  row = (tile0 + i) * 16 + r;
        if (i >= m || row >= n_vocab)
            return;
        float v = dec_sum<R>(sums, i, j, r, n_seg) * w.post;
        if (w.bias)
            v += w.bias[row];
        logits[(int64_t)j * n_vocab + row] = v;
    }
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2)
    dec_head_kernel(dec_norm_in in, dec_matrix w, int n_vocab, float *logits) {
    dec_head_epilogue<R> epi = {w, n_vocab, logits};
    dec_norm_linear<F, SEG, DEC_IN_GROUP, R>(in, w, epi);
}

/* ---- out: x_out = x + W y + b, and each tile's share of the router's sums ---- */

struct dec_out {
    const uint16_t *y;   /* f16, [row][columns] */
    const float *x;      /* [row][rows of the matrix] */
    float *x_out;        /* the same */
    const float *router; /* [tile][4][n_expert][4]: router weight times the norm's gain */
    float *route_part;   /* [row][tile][n_expert] */
    int n_expert;        /* a multiple of 32 */
};

template <class F, int SEG, int R>
__global__ void __launch_bounds__(ROW_THREADS, 2) dec_out_kernel(dec_out a, dec_matrix w) {
    using plan = dec_plan<F>;
    constexpr int G = 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_seg = w.n_unit / SEG, n_row = w.n_tile * 16;
    const bool active = warp < n_seg;
    dec_carve c = {dec_shared};
    dec_feed<F, SEG, plan::OUT_UNITS, plan::OUT_STAGES> feed;
    uint8_t *ring = c.take(n_seg * feed.WARP_BYTES);
    float *red = (float *)c.take(dec_sums_bytes<G, R>);
    float *xt = (float *)c.take(2 * G * R * 16 * 4);
    __half *ys = (__half *)c.take(n_seg * R * dec_ld(SEG * 64) * 2);

    int step = gridDim.x, n = (w.n_tile - blockIdx.x + step - 1) / step;
    dec_tiles_plain tile = {w.w + (int64_t)blockIdx.x * w.n_unit * F::CHUNK, (int64_t)step * w.n_unit * F::CHUNK};
    if (active) {
        feed.open(ring, n);
        feed.prime(tile);
    }
    const int e = threadIdx.x / 16, r = threadIdx.x % 16;
    float wr[G] = {}; /* router's weights, first of the first group for the first 32 experts */
#pragma unroll
    for (int i = 0; i < G; i++)
        if (i < n)
            wr[i] = a.router[(((int64_t)(blockIdx.x + i * step) * 4 + r / 4) * a.n_expert + e) * 4 + r % 4];
    const int own_i = threadIdx.x / (16 * R), own_j = threadIdx.x / 16 % R;
    float old = 0, off = 0; /* residual and bias of the thread's row in the first group */
    if (own_i < min(n, G) && w.bias)
        off = w.bias[(blockIdx.x + own_i * step) * 16 + r];
    pdl_launch();
    pdl_wait();
    __half *own = ys + warp * R * dec_ld(SEG * 64);
    if (active)
#pragma unroll
        for (int j = 0; j < R; j++)
            for (int i = lane; i < SEG * 8; i += 32)
                ((uint4 *)(own + j * dec_ld(SEG * 64)))[i] =
                    __ldcg((const uint4 *)(a.y + j * w.n_unit * 64 + warp * SEG * 64) + i);
    if (own_i < min(n, G))
        old = __ldcg(a.x + own_j * n_row + (blockIdx.x + own_i * step) * 16 + r);
    __syncwarp();
    int k = 0;
    dec_tiles<G, R>(feed, tile, dec_x1::of<R>(own, dec_ld(SEG * 64)), red, n, active,
                    [&](const float *sums, int i0, int m) {
                        float *x16 = xt + k * G * R * 16;
                        k ^= 1;
                        if (own_i < m) {
                            const int row = (blockIdx.x + (i0 + own_i) * step) * 16 + r;
                            float v = dec_sum<R>(sums, own_i, own_j, r, n_seg) * w.post;
                            if (i0 > 0)
                                old = __ldcg(a.x + own_j * n_row + row), off = w.bias ? w.bias[row] : 0.f;
                            v = old + (v + off);
                            a.x_out[own_j * n_row + row] = v;
                            x16[threadIdx.x] = v;
                        }
                        __syncthreads();
                        for (int e0 = 0; e0 < a.n_expert; e0 += 32) {
                            float v[G][R];
#pragma unroll
                            for (int i = 0; i < G * R; i++) {
                                const int t = i / R, j = i % R, tile = blockIdx.x + (i0 + t) * step;
                                if (i0 + e0 > 0 && t < m && j == 0)
                                    wr[t] = a.router[(((int64_t)tile * 4 + r / 4) * a.n_expert + e0 + e) * 4 + r % 4];
                                v[t][j] = __fmul_rn(wr[t], x16[(t * R + j) * 16 + r]);
                            }
#pragma unroll
                            for (int d = 8; d; d >>= 1) /* all side by side */
#pragma unroll
                                for (int i = 0; i < G * R; i++)
                                    v[i / R][i % R] += __shfl_xor_sync(~0u, v[i / R][i % R], d);
#pragma unroll
                            for (int i = 0; i < G * R; i++) {
                                const int t = i / R, j = i % R, tile = blockIdx.x + (i0 + t) * step;
                                if (r == 0 && t < m)
                                    a.route_part[(int64_t)(j * w.n_tile + tile) * a.n_expert + e0 + e] = v[t][j];
                            }
                        }
                    });
}

/* ---- shared memory of each kernel, bytes; n_seg = columns / 64 / SEG ---- */

template <class F, int R> constexpr size_t dec_linear_smem(int n_seg, int n_embd) {
    return (size_t)n_seg * dec_plan<F>::UNITS * dec_plan<F>::STAGES * F::CHUNK + dec_sums_bytes<DEC_IN_GROUP, R> +
           R * 64 + R * dec_ld(n_embd) * 2;
}
template <class F, int R> constexpr size_t dec_out_smem(int n_seg) {
    return (size_t)n_seg * dec_plan<F>::OUT_UNITS * dec_plan<F>::OUT_STAGES * F::CHUNK + dec_sums_bytes<2, R> +
           R * 256 + n_seg * R * dec_ld(4 * 64) * 2;
}

#endif
