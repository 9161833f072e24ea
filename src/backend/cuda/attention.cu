/* backend/cuda/attention.cu: attention over paged keys and values.
 *
 * A page of 64 keys is one unit of work: scores by tensor cores, its own maximum m and sum l, its own output O. Pages
 * are merged in ascending order within a super-chunk of 8 (512 keys, at absolute positions), super-chunks in ascending
 * order, the sink last. One warp does a page for 16 rows; a row here is a query head of a position, the heads that
 * share a KV head beside each other. `one` gives each page of a super-chunk its own warp (sequences with one row),
 * `tile` lets a warp walk all pages of 16 rows (longer runs): the same numbers in the same order. */
#include "backend/cuda/kv.cuh"
#include "backend/cuda/math.cuh"

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
    float *partial;
    uint32_t *arrived;
    int reach; /* `one`: super-chunks allotted to a row */
};

/* Eight consecutive values as f16. */
static __device__ __forceinline__ uint4 kv_load(const __half *p) {
    uint4 v; /* volatile: the compiler would sink it to its use, one wait after the other */
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
static __device__ __forceinline__ uint4 kv_load(const float *p) {
    const float4 a = ((const float4 *)p)[0], b = ((const float4 *)p)[1];
    return make_uint4(f16x2(a.x, a.y), f16x2(a.z, a.w), f16x2(b.x, b.y), f16x2(b.z, b.w));
}
static __device__ __forceinline__ uint4 kv_load(const kv_int8 *p) { return kv_unpack(*(const uint2 *)p); }

static __device__ __forceinline__ uint4 and4(uint4 a, uint4 b) {
    return make_uint4(a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w);
}

/* A warp's 16 rows: query position and head of rows g and g + 8; keys that any of the 16 rows sees. */
struct attn_rows {
    int row[2], head[2], pos[2]; /* row -1: none */
    int key_low, key_high;
};

/* The page's share for 16 rows: m, l of rows g and g + 8, O as fragments [dim / 8]. */
template <int DIM> struct attn_part { float m[2], l[2], o[DIM / 8][4]; };

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

/* LOADS_FIRST: all keys and values are on their way before the first is used, for warps that wait for nothing else. */
template <int DIM, class T, bool LOADS_FIRST>
static __device__ __forceinline__ void do_page(const attn_args &a, const attn_rows &r, const uint4 (&q)[2][DIM / 32],
                                               const T *page, int key0, int lane, attn_part<DIM> &out) {
    constexpr bool INT8 = sizeof(T) == 1;
    const int g = lane >> 2, t = lane & 3;
    const T *vt = page + BE_PAGE * DIM;
    float s[2][4][4];
    uint4 keys[2][4][DIM / 32], values[LOADS_FIRST ? 2 : 1][LOADS_FIRST ? DIM / 8 : 1];
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int e = 0; e < DIM / 32; e++)
                keys[b][i][e] = kv_load(page + (32 * b + (g >> 1) * 8 + 2 * i + (g & 1)) * DIM + t * 8 + e * 32);
    if (LOADS_FIRST)
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                values[b][n] = kv_load(vt + (8 * n + g) * BE_PAGE + 32 * b + t * 8);
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float(&z)[4] = s[b][i];
            z[0] = z[1] = z[2] = z[3] = 0;
#pragma unroll
            for (int e = 0; e < DIM / 32; e++) {
                const uint4 v = keys[b][i][e];
                mma_f16(z, q[0][e].x, q[1][e].x, q[0][e].y, q[1][e].y, v.x, v.y);
                mma_f16(z, q[0][e].z, q[1][e].z, q[0][e].w, q[1][e].w, v.z, v.w);
            }
        }
    uint4 scale[INT8 ? 2 : 1][2]; /* K's, V's of the lane's eight keys of a block */
    if (INT8)
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                scale[INT8 ? i : 0][b] = ((const uint4 *)(page + 2 * BE_PAGE * DIM))[i * 8 + b * 4 + t];
    uint32_t p[2][2][4]; /* [rows g, g + 8][block][S tile] */
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float m = -INFINITY, l = 0;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int age = r.pos[h] - (key0 + 32 * b + 8 * t + i);
                float &z = s[b][i / 2][h * 2 + i % 2];
                if (INT8)
                    z *= kv_scale(scale[0][b], i);
                z = age >= 0 && (a.window == 0 || age < a.window) ? z * a.scale_log2 : -INFINITY;
                m = fmaxf(m, z);
            }
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        const float mm = m == -INFINITY ? 0.f : m;
#pragma unroll
        for (int b = 0; b < 2; b++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p0 = exp2f(s[b][i][h * 2] - mm), p1 = exp2f(s[b][i][h * 2 + 1] - mm);
                l = l + p0;
                l = l + p1;
                p[h][b][i] = f16x2(p0, p1);
            }
        l += __shfl_xor_sync(~0u, l, 1);
        l += __shfl_xor_sync(~0u, l, 2);
        out.m[h] = m;
        out.l[h] = l;
    }
    /* Values that no row sees may be anything, NaN included, and NaN times zero is NaN: clear them. Of 8 bits the
     * scales are enough. */
    uint4 keep[2];
    const bool whole = key0 >= r.key_low && key0 + BE_PAGE - 1 <= r.key_high;
    for (int b = 0; b < 2; b++) {
        const int low = r.key_low - key0 - 32 * b - 8 * t, high = r.key_high - key0 - 32 * b - 8 * t;
        uint32_t w[4];
        for (int i = 0; i < 4; i++)
            w[i] = (2 * i >= low && 2 * i <= high ? 0xFFFFu : 0) |
                   (2 * i + 1 >= low && 2 * i + 1 <= high ? 0xFFFF0000u : 0);
        keep[b] = make_uint4(w[0], w[1], w[2], w[3]);
        if (INT8)
            scale[INT8 ? 1 : 0][b] = and4(scale[INT8 ? 1 : 0][b], keep[b]);
    }
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        float(&o)[4] = out.o[n];
        o[0] = o[1] = o[2] = o[3] = 0;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            uint4 v = LOADS_FIRST ? values[LOADS_FIRST ? b : 0][LOADS_FIRST ? n : 0]
                                  : kv_load(vt + (8 * n + g) * BE_PAGE + 32 * b + t * 8);
            if (INT8)
                v = kv_scaled(v, scale[INT8 ? 1 : 0][b]);
            else if (!whole)
                v = and4(v, keep[b]);
            mma_f16(o, p[0][b][0], p[1][b][0], p[0][b][1], p[1][b][1], v.x, v.y);
            mma_f16(o, p[0][b][2], p[1][b][2], p[0][b][3], p[1][b][3], v.z, v.w);
        }
    }
}

/* into += part, for rows g and g + 8 of a warp. */
template <int DIM> static __device__ __forceinline__ void merge_part(attn_part<DIM> &into, const attn_part<DIM> &part) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (part.m[h] == -INFINITY)
            continue;
        float x, y;
        soft_merge(into.m[h], into.l[h], part.m[h], part.l[h], x, y);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                into.o[n][h * 2 + i] = fmaf(into.o[n][h * 2 + i], x, part.o[n][h * 2 + i] * y);
    }
}

template <int DIM> static __device__ __forceinline__ void clear_part(attn_part<DIM> &p) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        p.m[h] = -INFINITY;
        p.l[h] = 0;
    }
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
        p.o[n][0] = p.o[n][1] = p.o[n][2] = p.o[n][3] = 0;
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

/* Runs of rows: blockIdx.x = tile of rows, y = KV head; each warp walks every page that its 16 rows see. */
template <int DIM, class T> static __global__ __launch_bounds__(128) void attn_tile_kernel(attn_args a) {
    pdl_launch();
    pdl_wait();
    if ((int)blockIdx.x >= a.a.batch->n_tile)
        return;
    const cuda_tile tile = a.a.tile[blockIdx.x];
    const int kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    const int32_t *table = a.table + (int64_t)a.a.slot[tile.row] * a.n_entry;
    for (int i = warp; i * 16 < tile.n * a.group; i += 4) {
        const attn_rows r = rows_of_warp(a, tile.row, tile.n, kv_head, i, g);
        uint4 q[2][DIM / 32];
        load_q<DIM>(a, r, t, q);
        const int from = r.key_low / BE_PAGE, to = r.key_high / BE_PAGE;
        attn_part<DIM> all, super, page;
        clear_part(all);
        clear_part(super);
        for (int p = from; p <= to; p++) {
            const T *src = (const T *)(a.layer + (int64_t)max(table[p], 0) * a.page_bytes + kv_head * a.head_bytes);
            do_page<DIM, T, false>(a, r, q, src, p * BE_PAGE, lane, page);
            merge_part(super, page);
            if (p % SUPER == SUPER - 1 || p == to) {
                merge_part(all, super);
                clear_part(super);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (r.row[h] >= 0)
#pragma unroll
                for (int n = 0; n < DIM / 8; n++)
                    put_out(a, r.row[h], r.head[h], 8 * n + 2 * t, all.m[h], all.l[h], all.o[n][h * 2],
                            all.o[n][h * 2 + 1]);
    }
}

/* ---- runs of rows, pages in shared memory: heads of 64, eight query heads a KV head, f16 ---- */

#define LONG_STAGES 3
#define LONG_PAGE (2 * BE_PAGE * 64 * 2) /* K, V of a page */
#define LONG_ALL (4 * 2 * 8 * 32 * 16)   /* [warp][16 rows][dims / 8][lane] four sums each */
#define LONG_SHARED (LONG_STAGES * LONG_PAGE + LONG_ALL)

/* 2^x for x <= 0; below 2^-126 zero, which rounds away wherever it is used: beside a sum of at least 1, and as f16. */
static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16-byte piece c of row r (128 bytes): rows that a phase of lanes reads take different banks. */
static __device__ __forceinline__ int long_piece(int r, int c) { return r * 128 + ((c ^ ((r & 1) << 2)) << 4); }

struct long_warp { /* 32 rows of a warp */
    attn_rows r[2];
    uint4 q[2][2][2];
    float m[2][2], l[2][2], o[2][8][4]; /* of the super-chunk */
};

/* One page joins the warp's super-chunk: do_page and merge_part for 32 rows, each sum merged as soon as it is there. */
template <bool MASK>
static __device__ __forceinline__ bool long_page(const attn_args &a, long_warp &w, const uint8_t *page, int key0, int g,
                                                 int t) {
    float s[2][8][4];
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int m = 0; m < 2; m++)
                s[m][b * 4 + i][0] = s[m][b * 4 + i][1] = s[m][b * 4 + i][2] = s[m][b * 4 + i][3] = 0;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const uint4 v = *(const uint4 *)(page + long_piece(32 * b + (g >> 1) * 8 + 2 * i + (g & 1), e * 4 + t));
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const uint4 q0 = w.q[m][0][e], q1 = w.q[m][1][e];
                    mma_f16(s[m][b * 4 + i], q0.x, q1.x, q0.y, q1.y, v.x, v.y);
                    mma_f16(s[m][b * 4 + i], q0.z, q1.z, q0.w, q1.w, v.z, v.w);
                }
            }
        }
    float top[2][2];
    bool none = false;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float m = -INFINITY;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                float &z = s[n][i / 2][h * 2 + i % 2];
                z = __fmul_rn(z, a.scale_log2);
                if (MASK) {
                    const int age = w.r[n].pos[h] - (key0 + i / 8 * 32 + 8 * t + i % 8);
                    z = age >= 0 && (a.window == 0 || age < a.window) ? z : -INFINITY;
                }
                m = fmaxf(m, z);
            }
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            top[n][h] = m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            none |= m == -INFINITY;
        }
    if (!MASK && __any_sync(~0u, none))
        return false; /* a row of NaN has no part in the page: only the other version can leave it out */
    uint32_t p[2][2][8];
    float x[2][2], y[2][2];
    bool there[2][2];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float m = top[n][h], mm = MASK && m == -INFINITY ? 0.f : m;
            float l = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float p0 = exp2_fast(s[n][i][h * 2] - mm), p1 = exp2_fast(s[n][i][h * 2 + 1] - mm);
                l = l + p0;
                l = l + p1;
                p[n][h][i] = f16x2(p0, p1);
            }
            l += __shfl_xor_sync(~0u, l, 1);
            l += __shfl_xor_sync(~0u, l, 2);
            there[n][h] = !MASK || m != -INFINITY;
            if (there[n][h])
                soft_merge(w.m[n][h], w.l[n][h], m, l, x[n][h], y[n][h]);
        }
    const int key_low = w.r[0].key_low - key0 - 8 * t, key_high = w.r[1].key_high - key0 - 8 * t;
#pragma unroll
    for (int d = 0; d < 8; d++) {
        float o[2][4] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
        for (int b = 0; b < 2; b++) {
            uint4 v = *(const uint4 *)(page + LONG_PAGE / 2 + long_piece(8 * d + g, 4 * b + t));
            if (MASK) { /* values that no row sees may be anything, and NaN times zero is NaN */
                uint32_t keep[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    keep[i] = (32 * b + 2 * i >= key_low && 32 * b + 2 * i <= key_high ? 0xFFFFu : 0) |
                              (32 * b + 2 * i + 1 >= key_low && 32 * b + 2 * i + 1 <= key_high ? 0xFFFF0000u : 0);
                v = make_uint4(v.x & keep[0], v.y & keep[1], v.z & keep[2], v.w & keep[3]);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                mma_f16(o[n], p[n][0][b * 4], p[n][1][b * 4], p[n][0][b * 4 + 1], p[n][1][b * 4 + 1], v.x, v.y);
                mma_f16(o[n], p[n][0][b * 4 + 2], p[n][1][b * 4 + 2], p[n][0][b * 4 + 3], p[n][1][b * 4 + 3], v.z, v.w);
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float &sum = w.o[n][d][i];
                const float joined = fmaf(sum, x[n][i / 2], o[n][i] * y[n][i / 2]);
                sum = there[n][i / 2] ? joined : sum;
            }
    }
    return true;
}

/* The super-chunk joins what came before, which a lane keeps in shared memory; clears it. */
static __device__ __forceinline__ void long_super(long_warp &w, float (&m)[2][2], float (&l)[2][2], float4 *all) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float x[2], y[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (w.m[n][h] == -INFINITY) {
                x[h] = 1;
                y[h] = 0;
                continue;
            }
            soft_merge(m[n][h], l[n][h], w.m[n][h], w.l[n][h], x[h], y[h]);
        }
#pragma unroll
        for (int d = 0; d < 8; d++) {
            float4 &to = all[(n * 8 + d) * 32];
            float(&o)[4] = w.o[n][d];
            float4 v = to;
            if (w.m[n][0] != -INFINITY) {
                v.x = fmaf(v.x, x[0], o[0] * y[0]);
                v.y = fmaf(v.y, x[0], o[1] * y[0]);
            }
            if (w.m[n][1] != -INFINITY) {
                v.z = fmaf(v.z, x[1], o[2] * y[1]);
                v.w = fmaf(v.w, x[1], o[3] * y[1]);
            }
            to = v;
            o[0] = o[1] = o[2] = o[3] = 0;
        }
        w.m[n][0] = w.m[n][1] = -INFINITY;
        w.l[n][0] = w.l[n][1] = 0;
    }
}

static __device__ __forceinline__ void long_fetch(const attn_args &a, const int32_t *table, int kv_head, int p,
                                                  uint8_t *dst) {
    const uint8_t *src = a.layer + (int64_t)max(table[p], 0) * a.page_bytes + (int64_t)kv_head * LONG_PAGE;
#pragma unroll
    for (int i = 0; i < LONG_PAGE / 16 / 128; i++) {
        const int k = i * 128 + threadIdx.x;
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(dst + long_piece(k / 8, k % 8));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(src + k * 16) : "memory");
    }
}

/* blockIdx.x = tile from the last, which sees most keys; y = KV head. Four warps of 32 rows: 16 positions, 8 heads. */
static __global__ __launch_bounds__(128, 2) void attn_long_kernel(attn_args a) {
    extern __shared__ __align__(128) uint8_t long_shared[];
    pdl_launch();
    pdl_wait();
    if ((int)blockIdx.x >= a.a.batch->n_tile)
        return;
    const cuda_tile tile = a.a.tile[a.a.batch->n_tile - 1 - (int)blockIdx.x];
    const int kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    const int32_t *table = a.table + (int64_t)a.a.slot[tile.row] * a.n_entry;
    const int from = first_key(a, a.a.pos[tile.row]) / BE_PAGE, to = a.a.pos[tile.row + tile.n - 1] / BE_PAGE;
    for (int s = 0; s < LONG_STAGES - 1; s++) {
        if (from + s <= to)
            long_fetch(a, table, kv_head, from + s, long_shared + s * LONG_PAGE);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    float4 *all = (float4 *)(long_shared + LONG_STAGES * LONG_PAGE) + warp * 16 * 32 + lane;
    float m[2][2], l[2][2];
    long_warp w;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        w.r[n] = rows_of_warp(a, tile.row, tile.n, kv_head, warp * 2 + n, g);
        load_q<64>(a, w.r[n], t, w.q[n]);
        m[n][0] = m[n][1] = w.m[n][0] = w.m[n][1] = -INFINITY;
        l[n][0] = l[n][1] = w.l[n][0] = w.l[n][1] = 0;
#pragma unroll
        for (int d = 0; d < 8; d++) {
            w.o[n][d][0] = w.o[n][d][1] = w.o[n][d][2] = w.o[n][d][3] = 0;
            all[(n * 8 + d) * 32] = make_float4(0, 0, 0, 0);
        }
    }
    const int pos_first = a.a.pos[tile.row + min(warp * 32 / 8, tile.n - 1)], pos_last = w.r[1].key_high;
    for (int p = from, stage = 0; p <= to; p++, stage = stage + 1 == LONG_STAGES ? 0 : stage + 1) {
        asm volatile("cp.async.wait_group %0;" ::"n"(LONG_STAGES - 2) : "memory");
        __syncthreads();
        if (p + LONG_STAGES - 1 <= to)
            long_fetch(a, table, kv_head, p + LONG_STAGES - 1,
                       long_shared + (stage + LONG_STAGES - 1) % LONG_STAGES * LONG_PAGE);
        asm volatile("cp.async.commit_group;" ::: "memory");
        const int key0 = p * BE_PAGE;
        const uint8_t *page = long_shared + stage * LONG_PAGE;
        const bool whole = key0 + BE_PAGE - 1 <= pos_first && (a.window == 0 || pos_last - key0 < a.window);
        if (!whole || !long_page<false>(a, w, page, key0, g, t))
            long_page<true>(a, w, page, key0, g, t);
        if (p % SUPER == SUPER - 1 || p == to)
            long_super(w, m, l, all);
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (w.r[n].row[h] >= 0)
#pragma unroll
                for (int d = 0; d < 8; d++) {
                    const float4 v = all[(n * 8 + d) * 32];
                    put_out(a, w.r[n].row[h], w.r[n].head[h], 8 * d + 2 * t, m[n][h], l[n][h], h ? v.z : v.x,
                            h ? v.w : v.y);
                }
}

/* Single rows: blockIdx.x = row of the list, y = KV head, z = super-chunk from the row's first; a warp takes one page.
 * The last block of a row and KV head to arrive adds the super-chunks up. Up to 16 heads share a KV head here. */
template <int DIM, class T> static __global__ __launch_bounds__(256) void attn_one_kernel(attn_args a) {
    constexpr int W = DIM + 2;      /* O, m, l */
    extern __shared__ float part[]; /* [warp][16][W] */
    __shared__ uint32_t last;
    pdl_launch();
    pdl_wait();
    if ((int)blockIdx.x >= a.a.batch->n_one)
        return;
    const int row = a.a.one[blockIdx.x], kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int g = lane >> 2, t = lane & 3, pos = a.a.pos[row], low = first_key(a, pos) / BE_PAGE, high = pos / BE_PAGE;
    const int s0 = low / SUPER, n_super = high / SUPER - s0 + 1, z = blockIdx.z;
    if (z >= n_super)
        return;
    const int p = (s0 + z) * SUPER + warp;
    const bool there = p >= low && p <= high;
    if (there) {
        const attn_rows r = rows_of_warp(a, row, 1, kv_head, 0, g);
        const int32_t id = a.table[(int64_t)a.a.slot[row] * a.n_entry + p];
        uint4 q[2][DIM / 32];
        load_q<DIM>(a, r, t, q);
        attn_part<DIM> page;
        const T *src = (const T *)(a.layer + (int64_t)max(id, 0) * a.page_bytes + kv_head * a.head_bytes);
        do_page<DIM, T, DIM <= 64>(a, r, q, src, p * BE_PAGE, lane, page);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float *to = part + (warp * 16 + g + h * 8) * W;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                *(float2 *)(to + 8 * n + 2 * t) = make_float2(page.o[n][h * 2], page.o[n][h * 2 + 1]);
            if (t == 0)
                *(float2 *)(to + DIM) = make_float2(page.m[h], page.l[h]);
        }
    }
    __syncthreads();
    const int slot = (blockIdx.x * a.n_kv + kv_head), w0 = max(low - (s0 + z) * SUPER, 0);
    const int w1 = min(high - (s0 + z) * SUPER, SUPER - 1);
    float *mine = a.partial + ((int64_t)slot * a.reach + z) * 16 * W;
    for (int k = threadIdx.x; k < a.group * (DIM / 2); k += 256) {
        const int head = k / (DIM / 2), d = k % (DIM / 2) * 2;
        float m = -INFINITY, l = 0, o0 = 0, o1 = 0;
        for (int w = w0; w <= w1; w++) {
            const float *from = part + (w * 16 + head) * W;
            if (from[DIM] == -INFINITY)
                continue;
            float x, y;
            soft_merge(m, l, from[DIM], from[DIM + 1], x, y);
            o0 = fmaf(o0, x, from[d] * y);
            o1 = fmaf(o1, x, from[d + 1] * y);
        }
        if (n_super == 1) {
            put_out(a, row, kv_head * a.group + head, d, m, l, o0, o1);
        } else {
            __stcg((float2 *)(mine + head * W + d), make_float2(o0, o1));
            if (d == 0)
                __stcg((float2 *)(mine + head * W + DIM), make_float2(m, l));
        }
    }
    if (n_super == 1)
        return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        last = atomicAdd(&a.arrived[slot], 1) == (uint32_t)n_super - 1;
    __syncthreads();
    if (!last)
        return;
    __threadfence();
    for (int k = threadIdx.x; k < a.group * (DIM / 2); k += 256) {
        const int head = k / (DIM / 2), d = k % (DIM / 2) * 2;
        float m = -INFINITY, l = 0, o0 = 0, o1 = 0;
        const float *from = a.partial + (int64_t)slot * a.reach * 16 * W + head * W;
        for (int i = 0; i < n_super; i++, from += 16 * W) {
            const float2 o = __ldcg((const float2 *)(from + d)), ml = __ldcg((const float2 *)(from + DIM));
            if (ml.x == -INFINITY)
                continue;
            float x, y;
            soft_merge(m, l, ml.x, ml.y, x, y);
            o0 = fmaf(o0, x, o.x * y);
            o1 = fmaf(o1, x, o.y * y);
        }
        put_out(a, row, kv_head * a.group + head, d, m, l, o0, o1);
    }
    if (threadIdx.x == 0)
        a.arrived[slot] = 0;
}

template <int DIM, class T> static void launch_typed(cuda_run *r, attn_args a, int ones, int tiles, int zs) {
    if (ones) {
        const size_t shared = (size_t)8 * 16 * (DIM + 2) * 4;
        if (r->error == cudaSuccess)
            r->error =
                cudaFuncSetAttribute(attn_one_kernel<DIM, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        cuda_launch(r, attn_one_kernel<DIM, T>, dim3((unsigned)ones, (unsigned)a.n_kv, (unsigned)zs), dim3(256), shared,
                    a);
    }
    if (!tiles)
        return;
    if (DIM == 64 && sizeof(T) == 2 && a.head_dim == 64 && a.group == 8) {
        if (r->error == cudaSuccess)
            r->error = cudaFuncSetAttribute(attn_long_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, LONG_SHARED);
        cuda_launch(r, attn_long_kernel, dim3((unsigned)tiles, (unsigned)a.n_kv), dim3(128), LONG_SHARED, a);
    } else
        cuda_launch(r, attn_tile_kernel<DIM, T>, dim3((unsigned)tiles, (unsigned)a.n_kv), dim3(128), 0, a);
}

template <class T> static void launch_dim(cuda_run *r, const attn_args &a, int ones, int tiles, int zs) {
    if (r->kv->dim == 32)
        launch_typed<32, T>(r, a, ones, tiles, zs);
    else if (r->kv->dim == 64)
        launch_typed<64, T>(r, a, ones, tiles, zs);
    else
        launch_typed<128, T>(r, a, ones, tiles, zs);
}

void cuda_run_attention(cuda_run *r, const cuda_cmd *c) {
    const be_attn *t = &c->attn;
    const cuda_kv *kv = r->kv;
    const int pool = kv->window[t->layer] ? BE_POOL_WINDOW : BE_POOL_FULL;
    attn_args a = {};
    a.a = r->dev->arr;
    a.qkv = c->x->f32;
    a.width = (int)c->x->base.width;
    a.n_head = t->n_head;
    a.n_kv = t->n_kv_head;
    a.head_dim = t->head_dim;
    a.group = t->n_head / t->n_kv_head;
    a.window = t->window;
    a.scale_log2 = t->scale * 1.44269504088896f;
    a.sinks = t->sinks ? ((const cuda_weight *)t->sinks)->dense : NULL;
    a.layer = cuda_kv_layer(kv, pool, t->layer);
    a.page_bytes = (int64_t)kv->base.page_bytes[pool];
    a.head_bytes = kv->head_bytes;
    a.table = kv->table[pool];
    a.n_entry = kv->n_entry;
    a.y = c->y->f16;
    a.ldy = c->y->ld;
    a.partial = r->dev->scratch.partial;
    a.arrived = r->dev->scratch.arrived;
    /* a window of w keys lies in at most w / 512 + 2 super-chunks */
    const int span = t->window > 0 ? t->window / (SUPER * BE_PAGE) + 2 : r->shape.reach;
    a.reach = span < r->shape.reach ? span : r->shape.reach;
    if (kv->base.spec.type == BE_KV_F32)
        launch_dim<float>(r, a, r->shape.ones, r->shape.tiles, a.reach);
    else if (kv->base.spec.type == BE_KV_Q8)
        launch_dim<kv_int8>(r, a, r->shape.ones, r->shape.tiles, a.reach);
    else
        launch_dim<__half>(r, a, r->shape.ones, r->shape.tiles, a.reach);
}
