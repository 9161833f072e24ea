/* backend/cuda/attention.cu: attention over paged keys and values, every type of cache and width of head. */
#include "backend/cuda/attention.cuh"

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

/* The page's share for 16 rows: m, l of rows g and g + 8, O as fragments [dim / 8]. */
template <int DIM> struct attn_part { float m[2], l[2], o[DIM / 8][4]; };

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

template <int DIM, class T> static void launch_typed(cuda_run *r, attn_args a, int ones, int tiles) {
    if (ones) {
        const size_t shared = (size_t)8 * 16 * (DIM + 2) * 4;
        if (r->error == cudaSuccess)
            r->error =
                cudaFuncSetAttribute(attn_one_kernel<DIM, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
        cuda_launch(r, attn_one_kernel<DIM, T>, dim3((unsigned)ones, (unsigned)a.n_kv, (unsigned)a.reach), dim3(256),
                    shared, a);
    }
    if (tiles)
        cuda_launch(r, attn_tile_kernel<DIM, T>, dim3((unsigned)tiles, (unsigned)a.n_kv), dim3(128), 0, a);
}

template <class T> static void launch_dim(cuda_run *r, const attn_args &a, int ones, int tiles) {
    if (r->kv->dim == 32)
        launch_typed<32, T>(r, a, ones, tiles);
    else if (r->kv->dim == 64)
        launch_typed<64, T>(r, a, ones, tiles);
    else
        launch_typed<128, T>(r, a, ones, tiles);
}

#define MANY_PAIRS 128 /* rows x KV heads from which warps have enough pages one after the other */

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
    if (r->shape.tiles == 0 && t->head_dim % 2 == 0) /* rows of prompts leave attention_long.cu by themselves */
        a.pack = pack_rows(r, c->y, r->shape.rows, r->dev->scratch.down, r->dev->scratch.down_bytes);
    a.partial = r->dev->scratch.partial;
    a.arrived = r->dev->scratch.arrived;
    /* a window of w keys lies in at most w / 512 + 2 super-chunks */
    const int span = t->window > 0 ? t->window / (SUPER * BE_PAGE) + 2 : r->shape.reach;
    a.reach = span < r->shape.reach ? span : r->shape.reach;
    int ones = r->shape.ones, tiles = r->shape.tiles;
    const int pairs = ones * t->n_kv_head;
    if ((pairs > MANY_PAIRS || (int64_t)pairs * a.reach > CUDA_MAX_PARTIAL) && attn_run_many(r, a, ones))
        ones = 0;
    if (tiles && attn_run_long(r, a, tiles))
        tiles = 0;
    if (kv->base.spec.type == BE_KV_F32)
        launch_dim<float>(r, a, ones, tiles);
    else if (kv->base.spec.type == BE_KV_Q8)
        launch_dim<kv_int8>(r, a, ones, tiles);
    else
        launch_dim<__half>(r, a, ones, tiles);
}
