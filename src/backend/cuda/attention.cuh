/* backend/cuda/attention.cuh: what the kernels of attention share.
 *
 * A page of 64 keys is one unit of work: scores by tensor cores, its own maximum m and sum l, its own output O. Pages
 * are merged in ascending order within a super-chunk of 8 (512 keys, at absolute positions), super-chunks in ascending
 * order, the sink last. A row here is a query head of a position, the heads that share a KV head beside each other.
 * Every kernel computes the same numbers in this order; they differ in who takes which pages:
 *
 *   attention.cu       one: a warp a page, for few sequences with one row each; tile: a warp walks all pages of 16 rows
 *   attention_long.cu  tile's work by wgmma, on Hopper: prompts
 *   attention_many.cu  a warp walks the pages of a row and KV head after the other: many sequences with one row each */
#ifndef ORCD_BACKEND_CUDA_ATTENTION_CUH
#define ORCD_BACKEND_CUDA_ATTENTION_CUH

#include "backend/cuda/kv.cuh"
#include "backend/cuda/math.cuh"
#include "backend/cuda/pack.cuh"

#define SUPER 8 /* pages of a super-chunk */

struct attn_args {
    cuda_arrays a;
    const float *qkv;
    int width, n_head, n_kv, head_dim, group; /* group: query heads of a KV head */
    int window;
    float scale_log2;
    const float *sinks;
    const uint8_t *layer;
    int64_t page_bytes;
    int head_bytes;
    const int32_t *table;
    int n_entry;
    uint16_t *y;
    int64_t ldy;
    pack_to pack;
    float *partial;
    uint32_t *arrived;
    int reach;  /* `one`: super-chunks allotted to a row */
    int n_slot; /* `many`: partial results that there is room for */
};

static __device__ __forceinline__ uint4 and4(uint4 a, uint4 b) {
    return make_uint4(a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w);
}

/* 2^x for x <= 0; below 2^-126 zero, which rounds away wherever it is used: beside a sum of at least 1, and as f16. */
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16-byte piece c of row r (128 bytes): rows that a phase of lanes reads take different banks. */
static __device__ __forceinline__ int piece_at(int r, int c) { return r * 128 + ((c ^ ((r & 1) << 2)) << 4); }

/* A warp's 16 rows: query position and head of rows g and g + 8; keys that any of the 16 rows sees. */
struct attn_rows {
    int row[2], head[2], pos[2]; /* row -1: none */
    int key_low, key_high;
};

template <int DIM>
static __device__ __forceinline__ void load_q(const attn_args &a, const attn_rows &r, int t, uint4 (&q)[2][DIM / 32]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int b = 0; b < DIM / 32; b++) {
            uint32_t v[4] = {0, 0, 0, 0};
            if (r.row[h] >= 0) {
                const float *src = a.qkv + (int64_t)r.row[h] * a.width + r.head[h] * a.head_dim;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int d = b * 32 + 8 * t + 2 * i;
                    v[i] = f16x2(d < a.head_dim ? src[d] : 0.f, d + 1 < a.head_dim ? src[d + 1] : 0.f);
                }
            }
            q[h][b] = make_uint4(v[0], v[1], v[2], v[3]);
        }
}

/* The sink joins the sum; the output of one head at dims d, d + 1. */
static __device__ __forceinline__ void put_out(const attn_args &a, int row, int head, int d, float m, float l, float o0,
                                               float o1) {
    float f = 1;
    if (a.sinks) {
        const float z = a.sinks[head] * 1.44269504088896f, top = fmaxf(m, z);
        f = exp2f(m - top);
        l = fmaf(l, f, exp2f(z - top));
    }
    uint16_t *y = a.y + row * a.ldy + head * a.head_dim + d;
    const uint32_t v = f16x2(o0 * f / l, o1 * f / l);
    if (d < a.head_dim)
        y[0] = (uint16_t)v;
    if (d + 1 < a.head_dim)
        y[1] = (uint16_t)(v >> 16);
    if (a.pack.at && d < a.head_dim)
        *(uint32_t *)a.pack.of(row, head * a.head_dim + d) = v;
}

static __device__ __forceinline__ int first_key(const attn_args &a, int pos) {
    return a.window > 0 && pos >= a.window ? pos - a.window + 1 : 0;
}

/* Rows [16 i, 16 i + 16) of the rows x heads of a run that begins at batch row row0. */
static __device__ __forceinline__ attn_rows rows_of_warp(const attn_args &a, int row0, int n, int kv_head, int i,
                                                         int g) {
    attn_rows r;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int flat = i * 16 + g + h * 8, q = flat / a.group;
        r.row[h] = q < n ? row0 + q : -1;
        r.head[h] = kv_head * a.group + flat % a.group;
        r.pos[h] = q < n ? a.a.pos[row0 + q] : -1;
    }
    r.key_low = first_key(a, a.a.pos[row0 + min(i * 16 / a.group, n - 1)]);
    r.key_high = a.a.pos[row0 + min((i * 16 + 15) / a.group, n - 1)];
    return r;
}

/* Launchers; false when the kernel is not made for these shapes. */
bool attn_run_long(cuda_run *r, const attn_args &a, int tiles);
bool attn_run_many(cuda_run *r, attn_args a, int ones);

#endif
