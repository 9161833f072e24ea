/* backend/cuda/attention_long.cu: attention of runs of rows with pages in shared memory: heads of 64, eight query heads
 * a KV head, f16. */
#include "backend/cuda/attention.cuh"

#define LONG_STAGES 3
#define LONG_PAGE (2 * BE_PAGE * 64 * 2) /* K, V of a page */
#define LONG_ALL (4 * 2 * 8 * 32 * 16)   /* [warp][16 rows][dims / 8][lane] four sums each */
#define LONG_SHARED (LONG_STAGES * LONG_PAGE + LONG_ALL)

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
                const uint4 v = *(const uint4 *)(page + piece_at(32 * b + (g >> 1) * 8 + 2 * i + (g & 1), e * 4 + t));
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
            uint4 v = *(const uint4 *)(page + LONG_PAGE / 2 + piece_at(8 * d + g, 4 * b + t));
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
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(dst + piece_at(k / 8, k % 8));
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

bool attn_run_long(cuda_run *r, const attn_args &a, int tiles) {
    if (r->kv->dim != 64 || r->kv->base.spec.type != BE_KV_F16 || a.head_dim != 64 || a.group != 8)
        return false;
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(attn_long_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, LONG_SHARED);
    cuda_launch(r, attn_long_kernel, dim3((unsigned)tiles, (unsigned)a.n_kv), dim3(128), LONG_SHARED, a);
    return true;
}
