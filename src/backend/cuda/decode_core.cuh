/* backend/cuda/decode_core.cuh: what the fused decode kernels share: dependent launch, a ring of bulk copies per warp,
 * and the product of packed tiles with one activation row.
 *
 * A CTA has 16 warps and holds whole row tiles; warp w sums columns of segment w (see DEC_SEG_UNITS), whose activations
 * stay in its registers. Weights arrive through a ring in shared memory that a warp fills and empties alone; its first
 * stages are requested before griddepcontrol.wait, while the kernel before is still at work. Per tile the warps' sums
 * meet in shared memory and are added in ascending order of segments: the order of every other kernel for the same
 * weights. */
#ifndef ORCD_BACKEND_CUDA_DECODE_CORE_CUH
#define ORCD_BACKEND_CUDA_DECODE_CORE_CUH

#include <cuda_fp16.h>
#include <stdint.h>

#include "backend/cuda/cuda.h"
#include "backend/cuda/math.cuh"
#include "quant/f16/cuda_f16.cuh"
#include "quant/mxfp4/cuda_mxfp4.cuh"
#include "quant/q8_0/cuda_q8_0.cuh"

#define DEC_WARPS 16
#define DEC_THREADS (DEC_WARPS * 32)
#define DEC_TOP_K 4

/* A tile's first row of r = 0..7 under CUDA_ROWS_PAIR64; RoPE's partner is 32 rows on. */
__device__ __forceinline__ int dec_row_pair64(int tile, int r) { return tile / 4 * 64 + tile % 4 * 8 + r; }

__device__ __forceinline__ uint32_t dec_smem(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* ---- what all kernels share ---- */

struct dec_matrix {
    const uint8_t *w;   /* packed */
    const float *bias;  /* [n_mat][rows], of gate_up [n_mat][gate, up][n_ff]; or NULL */
    float post;         /* factor of the sums */
    int n_tile, n_unit; /* per matrix */
    int64_t mat_bytes;
};

#define DEC_MAX_TILES 16 /* of a CTA whose biases are kept in shared memory; more are read late */

struct dec_kv {
    uint8_t *layer;       /* of page 0: pool + the layer's offset */
    int64_t page_bytes;   /* distance of pages */
    const int32_t *table; /* [slot][n_entry] */
    const int32_t *slot;  /* of the rows */
    int n_entry;
    float *fresh; /* 8 bits: the rows' K and V for attention, which stores them, as their scale needs whole heads */
    __device__ __forceinline__ const int32_t *pages(int row) const {
        return table + (int64_t)__ldcg(slot + row) * n_entry;
    }
};

/* CTA's share of n things: [first, end). */
__device__ __forceinline__ int dec_share(int n, int i) { return (int)((uint32_t)n * (uint32_t)i / gridDim.x); }

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

/* ---- rings ---- */

/* A warp's ring of STAGES pieces of BYTES, filled by its own asynchronous copies. All lanes call everything together.
 */
template <int BYTES, int STAGES> struct dec_ring {
    static constexpr int WARP_BYTES = BYTES * STAGES;
    const uint8_t *buf;
    uint32_t buf_at; /* shared address */
    int put, get;    /* stages */

    __device__ __forceinline__ void open(uint8_t *b /* WARP_BYTES, 16-byte aligned */) {
        buf = b, buf_at = dec_smem(b), put = get = 0;
    }

    /* Ask for a piece, or for nothing (NULL): either counts as one group of copies. */
    __device__ __forceinline__ void issue(const uint8_t *src, int lane) {
        if (src) {
            uint32_t to = buf_at + put * BYTES + lane * 16;
            src += lane * 16;
#pragma unroll
            for (int i = 0; i < BYTES / 512; i++)
                asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to + i * 512),
                             "l"(src + i * 512)
                             : "memory");
            if (BYTES % 512 && lane < BYTES % 512 / 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + BYTES / 512 * 512),
                             "l"(src + BYTES / 512 * 512)
                             : "memory");
            put = put + 1 == STAGES ? 0 : put + 1;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    /* The oldest piece, ready. */
    __device__ __forceinline__ const uint8_t *wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
        return buf + get * BYTES;
    }

    /* The piece has been read; src: what takes its place, or NULL. */
    __device__ __forceinline__ void next(const uint8_t *src, int lane) {
        __syncwarp();
        get = get + 1 == STAGES ? 0 : get + 1;
        issue(src, lane);
    }
};

/* Halves from a row of n in shared memory to the next, which begins 64 bytes of banks further on. */
__host__ __device__ constexpr int dec_ld(int n) { return n + 32; }

/* A lane's activations of its warp's segment, block h of 32 columns of unit u. One or two rows, in shared memory: */
struct dec_x1 {
    const __half *x; /* the lane's first eight */
    /* Column lane / 4 of B is row lane / 4 % R. at: the warp's segment of row 0 */
    template <int R> static __device__ __forceinline__ dec_x1 of(const __half *at, int ld) {
        const int lane = threadIdx.x % 32;
        return {at + lane % 4 * 8 + (R == 1 ? 0 : lane / 4 % 2 * ld)};
    }
    __device__ __forceinline__ uint4 at(int u, int h) const { return *(const uint4 *)(x + u * 64 + h * 32); }
};

/* Row lane / 4 of up to eight, in registers. */
template <int SEG> struct dec_x8 {
    uint4 v[SEG][2];
    __device__ __forceinline__ uint4 at(int u, int h) const { return v[u][h]; }
    /* row: the lane's, at the warp's segment; NULL: zeros */
    __device__ __forceinline__ void load(const uint16_t *row) {
#pragma unroll
        for (int u = 0; u < SEG; u++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                v[u][h] =
                    row ? __ldcg((const uint4 *)(row + threadIdx.x % 4 * 8) + u * 8 + h * 4) : make_uint4(0, 0, 0, 0);
    }
    /* The same from shared memory. */
    __device__ __forceinline__ void take(const __half *row) {
#pragma unroll
        for (int u = 0; u < SEG; u++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                v[u][h] = row ? *((const uint4 *)(row + threadIdx.x % 4 * 8) + u * 8 + h * 4) : make_uint4(0, 0, 0, 0);
    }
};

/* acc += UNITS units at p (shared) times units u0, .. of the lane's activations. The two blocks of a unit are
 * independent chains. */
template <class F, int UNITS, class X>
__device__ __forceinline__ void dec_units(const uint8_t *p, const X &x, int u0, float (&acc)[4], int lane) {
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        const typename F::raw w = F::load_shared(p + u * F::CHUNK, lane);
        const uint4 b0 = x.at(u0 + u, 0), b1 = x.at(u0 + u, 1);
        if constexpr (F::SCALED) {
            const frag_block f = F::block(w, 0), g = F::block(w, 1);
            float c[4] = {0, 0, 0, 0}, d[4] = {0, 0, 0, 0};
            mma_f16(c, f.a[0][0], f.a[0][1], f.a[0][2], f.a[0][3], b0.x, b0.y);
            mma_f16(d, g.a[0][0], g.a[0][1], g.a[0][2], g.a[0][3], b1.x, b1.y);
            mma_f16(c, f.a[1][0], f.a[1][1], f.a[1][2], f.a[1][3], b0.z, b0.w);
            mma_f16(d, g.a[1][0], g.a[1][1], g.a[1][2], g.a[1][3], b1.z, b1.w);
#pragma unroll
            for (int i = 0; i < 4; i++)
                acc[i] = fmaf(g.s[i / 2], d[i], fmaf(f.s[i / 2], c[i], acc[i]));
        } else {
            const uint4 b[1][2] = {{b0, b1}};
            F::template mma<1>(w, b, &acc);
        }
    }
}

/* ---- mbarriers in shared memory ---- */

__device__ __forceinline__ void dec_bar_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void dec_bar_arrive(uint32_t bar) {
    asm volatile("{\n .reg .b64 t;\n mbarrier.arrive.shared.b64 t, [%0];\n}" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void dec_bar_wait(uint32_t bar, uint32_t phase) {
    uint32_t done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
#else
        asm volatile("{\n .reg .pred p;\n mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
#endif
                     : "=r"(done)
                     : "r"(bar), "r"(phase)
                     : "memory");
    } while (!done);
}

/* ---- clusters ---- */

#define DEC_MAX_CLUSTER 8

/* All CTAs of the cluster have begun: between the two, others' shared memory may not be written. */
__device__ __forceinline__ void dec_cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void dec_cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
/* bar counts `bytes` that others send; to be followed by dec_cluster_arrive. */
__device__ __forceinline__ void dec_expect(uint64_t *bar, int bytes) {
#if __CUDA_ARCH__ >= 900
    dec_bar_init(dec_smem(bar), 1);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(dec_smem(bar)), "r"(bytes) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/* Eight bytes to where `to` lies in the cluster's CTA `rank`, whose bar counts them. */
template <class T> __device__ __forceinline__ void dec_send(void *to, T v, int rank, uint64_t *bar) {
    static_assert(sizeof v == 8, "eight bytes");
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n .reg .b32 a, b;\n mapa.shared::cluster.u32 a, %0, %4;\n mapa.shared::cluster.u32 b, %1, %4;\n"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [a], {%2, %3}, [b];\n}" ::"r"(dec_smem(to)),
        "r"(dec_smem(bar)), "r"(((const uint32_t *)&v)[0]), "r"(((const uint32_t *)&v)[1]), "r"(rank)
        : "memory");
#endif
}

/* Tiles of N_SEG segments of SEG units on their way to the CTA's warps 0 .. N_SEG - 1: PARTS pieces a tile, each for
 * N_SEG / PARTS warps, STAGES pieces in flight. One warp asks for them: the sixteenth where it has no segment, else
 * warp 0 between its tiles. Tiles: an object whose next() gives the address of the next tile. */
template <class F, int SEG, int N_SEG, int PARTS, int STAGES,
          int PRODUCER_WARP = N_SEG<DEC_WARPS ? DEC_WARPS - 1 : 0> struct dec_pipe {
    static constexpr int WARPS = N_SEG / PARTS, BYTES = WARPS * SEG * F::CHUNK, SMEM = STAGES * (BYTES + 16);
    static constexpr int PRODUCER = PRODUCER_WARP, PER_TILE = PARTS;
    /* whole tiles: a warp meets a stage again only after its own last use, else parities would be taken for older ones
     */
    static_assert(N_SEG % PARTS == 0 && STAGES % PARTS == 0 && BYTES % 16 == 0, "whole pieces and tiles");
    const uint8_t *buf;
    uint32_t full, empty; /* shared addresses of barriers */
    int stage;            /* of the warp's next piece */
    uint32_t phase;
    const uint8_t *src; /* producer: */
    int piece, n_piece, put;
    uint32_t round;

    /* By all threads; a barrier must follow before anyone but the producer goes on. smem: SMEM bytes, 16-byte aligned
     */
    __device__ __forceinline__ void open(uint8_t *smem, int n_tile) {
        buf = smem, full = dec_smem(smem) + STAGES * BYTES, empty = full + STAGES * 8;
        stage = threadIdx.x / 32 / WARPS, phase = 0;
        src = nullptr, piece = put = 0, round = 0, n_piece = n_tile * PARTS;
        if ((int)threadIdx.x / 32 == PRODUCER) {
            for (int i = threadIdx.x % 32; i < STAGES; i += 32) {
#if __CUDA_ARCH__ >= 900
                dec_bar_init(full + i * 8, 1);
#else
                dec_bar_init(full + i * 8, 32);
#endif
                dec_bar_init(empty + i * 8, WARPS);
            }
#if __CUDA_ARCH__ >= 900
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
        }
        __syncwarp();
    }

    /* Pieces that may be asked for when `done` tiles have been summed: the ring holds them. */
    static __device__ __forceinline__ int refill(int done) { return done * PARTS + STAGES; }

    /* By the producer's warp: ask for pieces until `limit` have been asked for, waiting for room. */
    template <class Tiles> __device__ __forceinline__ void fill(Tiles &tiles, int limit) {
        const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
        if (lane != 0)
            return;
#endif
        for (; piece < min(limit, n_piece); piece++) {
            if (piece >= STAGES)
                dec_bar_wait(empty + put * 8, round ^ 1);
            src = piece % PARTS == 0 ? tiles.next() : src + BYTES;
            const uint32_t to = dec_smem(buf) + put * BYTES, bar = full + put * 8;
#if __CUDA_ARCH__ >= 900
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(BYTES) : "memory");
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
                         "%2, [%3], %4;" ::"r"(to),
                         "l"(src), "r"(BYTES), "r"(bar), "l"(0x12F0000000000000ull /* evict first */)
                         : "memory");
#else
            for (int i = lane * 16; i < BYTES; i += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"(src + i) : "memory");
            asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
#endif
            if (++put == STAGES)
                put = 0, round ^= 1;
        }
    }

    /* The segment's units of the next tile, there until release_tile. */
    __device__ __forceinline__ const uint8_t *wait_tile() const {
        dec_bar_wait(full + stage * 8, phase);
        return buf + stage * BYTES + threadIdx.x / 32 % WARPS * SEG * F::CHUNK;
    }
    __device__ __forceinline__ void release_tile() {
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            dec_bar_arrive(empty + stage * 8);
        stage += PARTS;
        if (stage >= STAGES)
            stage -= STAGES, phase ^= 1;
    }

    /* acc = the segment's sums of the next tile. */
    template <class X> __device__ __forceinline__ void tile_sum(const X &x, float (&acc)[4]) {
        acc[0] = acc[1] = acc[2] = acc[3] = 0;
        dec_units<F, SEG>(wait_tile(), x, 0, acc, threadIdx.x % 32);
        release_tile();
    }
};

/* Floats of a segment's sums of a tile for R rows: [row][16], rows 18 apart, which spreads them over the banks. */
template <int R> constexpr int dec_pitch = R == 1 ? 16 : R * 18;
/* Of G tiles' sums, twice: one group is added up while the next is multiplied. */
template <int G, int R, int N_SEG = DEC_WARPS> constexpr int dec_sums_bytes = 2 * G *N_SEG *dec_pitch<R> * 4;

/* Value r of tile i of a group for row j, from the segments' sums. red: [tile of group][N_SEG][dec_pitch] */
template <int R, int N_SEG = DEC_WARPS>
__device__ __forceinline__ float dec_sum(const float *red, int tile, int j, int r, int n_seg = N_SEG) {
    float v[N_SEG];
    red += tile * N_SEG * dec_pitch<R> + j * 18 + r;
#pragma unroll
    for (int w = 0; w < N_SEG; w++)
        v[w] = w < n_seg ? red[w * dec_pitch<R>] : 0.f;
    float s = v[0];
#pragma unroll
    for (int w = 1; w < N_SEG; w++)
        s += v[w];
    return s;
}

/* To shared memory, there after dec_async_done. */
__device__ __forceinline__ void dec_async16(float *to, const float *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dec_smem(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void dec_async4(float *to, const float *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dec_smem(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void dec_async_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* Lane (g, t) holds values g and g + 8 of rows 2t and 2t + 1. With one row all eight columns of B are that row. */
template <int R, int N_SEG = DEC_WARPS>
__device__ __forceinline__ void dec_store(float *red, int tile, int warp, const float (&acc)[4], int lane) {
    const int g = lane / 4, t = lane % 4;
    float *to = red + (tile * N_SEG + warp) * dec_pitch<R> + 36 * t + g;
    if (2 * t >= R)
        return;
    to[0] = acc[0], to[8] = acc[2];
    if (R > 1)
        to[18] = acc[1], to[26] = acc[3];
}

__device__ __forceinline__ float4 dec_ld4(const float *p) { return __ldcg((const float4 *)p); }

__device__ __forceinline__ uint2 dec_norm4(float4 v, float rs, float4 g) {
    return make_uint2(f16x2(v.x * rs * g.x, v.y * rs * g.y), f16x2(v.z * rs * g.z, v.w * rs * g.w));
}

/* How the squares of R rows are spread over a CTA, four columns at a time, so that each row's sum is row_sum's: in row
 * 1 the warps count backwards. With two rows there are at most 3072 columns. */
template <int R> struct dec_spread {
    static constexpr int N = R + 1; /* fours of a thread */
    int own[R];
    __device__ __forceinline__ dec_spread() {
#pragma unroll
        for (int j = 0; j < R; j++)
            own[j] = j == 0 ? threadIdx.x : ROW_THREADS - 32 - threadIdx.x / 32 * 32 + threadIdx.x % 32;
    }
    __device__ __forceinline__ int row(int i) const { return i < R ? i : R == 2 && threadIdx.x >= ROW_THREADS / 2; }
    __device__ __forceinline__ int at(int i) const {
        return 4 * (i < R ? own[i] : ROW_THREADS + own[R == 2 ? row(i) : 0]);
    }

    /* The scales of the rows whose fours are v. ws: [R][16] shared; one barrier inside */
    __device__ __forceinline__ void scales(const float4 (&v)[N], int n_embd, float eps, float *ws,
                                           float (&rs)[R]) const {
        float s[R];
#pragma unroll
        for (int j = 0; j < R; j++)
            s[j] = own[j] * 4 < n_embd ? sum_sq4(v[j], 0.f) : 0.f;
        if (at(R) < n_embd) {
            const float t = sum_sq4(v[R], row(R) == 0 ? s[0] : s[R - 1]);
            s[0] = row(R) == 0 ? t : s[0];
            s[R - 1] = row(R) == R - 1 ? t : s[R - 1];
        }
#pragma unroll
        for (int j = 0; j < R; j++) {
            s[j] = warp_sum(s[j]);
            if (threadIdx.x % 32 == 0)
                ws[j * 16 + own[j] / 32] = s[j];
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < R; j++) {
            float t = 0; /* a sum of squares is never -0 */
#pragma unroll
            for (int w = 0; w < ROW_THREADS / 32; w += 4) {
                const float4 p = *(const float4 *)(ws + j * 16 + w);
                t = t + p.x + p.y + p.z + p.w;
            }
            rs[j] = rms_scale(t, n_embd, eps);
        }
    }
    /* The rows normed, f16. */
    __device__ __forceinline__ void norm(const float4 (&v)[N], const float (&rs)[R], const float4 (&gain)[N],
                                         __half *xs, int n_embd) const {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (at(i) < n_embd)
                *(uint2 *)(xs + row(i) * dec_ld(n_embd) + at(i)) =
                    dec_norm4(v[i], row(i) == 0 ? rs[0] : rs[R - 1], gain[i]);
    }
};

#endif
