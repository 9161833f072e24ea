/* backend/cuda/attention_long.cu: attention of runs of rows on Hopper, by wgmma: heads of 64, eight query heads a KV
 * head, f16 or 8 bits. The bits of attention.cu's kernels.
 *
 * A block has four groups of four warps, each with 64 rows: eight positions, eight heads. Four more warps bring pages
 * into a ring in shared memory, and run ahead of them from one tile to the next. A step of 16 columns holds what
 * mma.sync's step holds elsewhere, so columns change places on the way: of 32 dims of a key, bytes 16 t .. + 7 go to
 * step 0, the other halves to step 1; of 32 keys of V, step j has pairs 4 t + 2 j and, eight columns on, 4 t + 2 j + 1.
 * K's rows stand so that a lane's columns of the scores are the keys that it has elsewhere. */
#include "backend/cuda/attention.cuh"
#include "backend/cuda/wgmma.cuh"

#define LONG_STAGES 6
#define LONG_PAGE (2 * BE_PAGE * 64 * 2) /* K, V of a page in f16 */
#define LONG_GROUPS (CUDA_TILE_ROWS / 8)
#define LONG_WARPS (LONG_GROUPS * 4)
#define LONG_FEED 128 /* threads that copy */
#define LONG_THREADS (LONG_WARPS * 32 + LONG_FEED)

/* Shared memory, from a multiple of 1,024 on. */
#define LONG_QUERY (LONG_STAGES * LONG_PAGE)       /* [group][64 rows][128] */
#define LONG_ALL (LONG_QUERY + LONG_GROUPS * 8192) /* [warp][dims / 8][lane] four sums each */
#define LONG_BARS (LONG_ALL + LONG_WARPS * 4096)   /* [stage] full, empty */
#define LONG_SCALES (LONG_BARS + LONG_STAGES * 16) /* [stage][64] of the keys, 8 bits */
#define LONG_SHARED (LONG_SCALES + LONG_STAGES * 256 + 1024)

/* A tile and a KV head. */
struct long_item {
    cuda_tile tile;
    int kv_head, low, last, from, to; /* positions and pages that some row sees */

    /* The block's k-th: those with most keys come first, blocks take turns there and back. */
    __device__ __forceinline__ bool take(const attn_args &a, int n_tile, int k) {
        const int block = k % 2 ? (int)gridDim.x - 1 - (int)blockIdx.x : (int)blockIdx.x,
                  i = k * (int)gridDim.x + block;
        if (i >= n_tile * a.n_kv)
            return false;
        tile = a.a.tile[i / a.n_kv];
        kv_head = i % a.n_kv;
        last = tile.pos + tile.n - 1;
        low = first_key(a, tile.pos);
        from = low / BE_PAGE;
        to = last / BE_PAGE;
        return true;
    }
};

#ifdef HAVE_WGMMA
struct long_ring { /* the place in it that a warp has reached */
    uint32_t shared;
    int stage, parity;
    __device__ __forceinline__ void next() {
        if (++stage == LONG_STAGES)
            stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t keys() const { return shared + stage * LONG_PAGE; }
    __device__ __forceinline__ uint32_t values() const { return keys() + LONG_PAGE / 2; }
    __device__ __forceinline__ uint32_t scales() const { return shared + LONG_SCALES + stage * 256; }
    __device__ __forceinline__ uint32_t full() const { return shared + LONG_BARS + stage * 16; }
    __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
};

/* ---- copies ---- */

static __device__ __forceinline__ void long_put(uint32_t at, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
static __device__ __forceinline__ void long_put(uint32_t at, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
/* What the thread wrote before is there for wgmma. */
static __device__ __forceinline__ void long_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

static __device__ __forceinline__ const uint8_t *long_source(const attn_args &a, const long_item &w, int p) {
    const int id = a.table[(int64_t)w.tile.slot * a.n_entry + p];
    return a.layer + (int64_t)max(id, 0) * a.page_bytes + (int64_t)w.kv_head * a.head_bytes;
}

/* Mask of a pair of keys: those that some row of the tile sees. */
static __device__ __forceinline__ uint32_t long_seen(const long_item &w, int key) {
    return (key >= w.low && key <= w.last ? 0xFFFFu : 0) | (key + 1 >= w.low && key + 1 <= w.last ? 0xFFFF0000u : 0);
}

/* Pages of f16: every fourth row of K, in pairs, and of V are a warp's. */
template <class T> struct long_feed {
    int warp, lane;
    uint32_t k_dst, v_dst;

    __device__ __forceinline__ long_feed(int i) : warp(i / 32), lane(i % 32) {
        const int u = lane % 16, unit = 4 * (u / 8 * 2 + u % 2) + u / 2 % 4, c = lane / 16;
        k_dst = warp * 1024 + c * 128 + ((unit / 2 ^ c) << 4) + unit % 2 * 8;
        v_dst = warp * 128 + ((lane / 16 * 4 + lane % 4 ^ warp) << 4) + lane % 16 / 4 * 4;
    }
    __device__ __forceinline__ void keys(const uint8_t *src, uint32_t dst) const {
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile(
                "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((dst ^ i % 4 << 5) + i / 4 * 4096 + i % 4 * 256),
                "l"(src + i * 1024)
                : "memory");
    }
    /* EDGE: a pair of keys is there (all of mask), or not: then it becomes zero, for what nobody wrote may be anything,
     * and NaN times zero is NaN. */
    template <bool EDGE> __device__ __forceinline__ void values(const uint8_t *src, uint32_t dst, uint32_t mask) const {
#pragma unroll
        for (int d = 0; d < 64; d += 4) {
            const uint32_t to = (dst ^ (d & 4) << 4) + d * 128;
            if (EDGE)
                asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(src + d * 128),
                             "r"(mask ? 4 : 0)
                             : "memory");
            else
                asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(src + d * 128) : "memory");
        }
    }
    /* One key of the pair is there. */
    __device__ __forceinline__ void half(const uint8_t *src, uint32_t dst, uint32_t mask) const {
#pragma unroll 4
        for (int d = 0; d < 64; d += 4)
            long_put((dst ^ (d & 4) << 4) + d * 128, *(const uint32_t *)(src + d * 128) & mask);
        asm volatile("cp.async.wait_all;" ::: "memory");
    }
    __device__ __forceinline__ void run(const attn_args &a, const long_item &w, long_ring &at) const {
        const uint8_t *page = long_source(a, w, w.from);
        for (int p = w.from; p <= w.to; p++) {
            const uint8_t *src = page + LONG_PAGE / 2 + warp * 128 + lane * 4;
            const uint32_t dst = at.values() + v_dst, full = at.full();
            const uint32_t mask = long_seen(w, p * BE_PAGE + 2 * lane);
            mbar_wait(at.empty(), at.parity);
            keys(page + warp * 256 + lane * 8, at.keys() + k_dst);
            page = long_source(a, w, min(p + 1, w.to));
            at.next();
            if (p > w.from && p < w.to)
                values<false>(src, dst, mask);
            else if (mask == 0 || mask == ~0u)
                values<true>(src, dst, mask);
            else {
                half(src, dst, mask);
                mbar_arrive(full);
                continue;
            }
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
        }
    }
};

/* Pages of 8 bits: a thread turns eight values of four keys, and of four dims of V, into f16, V's times their scales.
 * The next page is on its way meanwhile. */
template <> struct long_feed<kv_int8> {
    int i, q;
    uint32_t k_dst, v_dst;
    uint2 k[4], v[4];
    uint4 scale;
    __half k_scale;

    __device__ __forceinline__ long_feed(int thread) : i(thread), q(thread % 8) {
        const int t = q % 4, r = i / 8, turn = r / 8 * 2 + r % 2; /* turn: of K's row in eight, or four less */
        k_dst = (r % 8 / 2 * 8 + turn) * 128 + ((q / 4 * 4 + t / 2 ^ turn) << 4) + t % 2 * 8;
        v_dst = r * 128 + ((q / 4 * 4 ^ (r & 7)) << 4) + t * 4;
    }
    __device__ __forceinline__ void ask_k(const uint8_t *page) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            k[j] = *(const uint2 *)(page + j * 1024 + i * 8);
        k_scale = *(const __half *)(page + 8192 + i % 64 * 2);
    }
    __device__ __forceinline__ void ask_v(const uint8_t *page) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = *(const uint2 *)(page + 4096 + j * 1024 + i * 8);
        scale = *(const uint4 *)(page + 8192 + 128 + q * 16);
    }
    __device__ __forceinline__ void put_k(const long_ring &at) const {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 x = kv_unpack(k[j]);
            const uint32_t to = (at.keys() + k_dst ^ j % 2 << 6) + j / 2 * 4096 + j % 2 * 512;
            long_put(to, x.x, x.y);
            long_put(to ^ 32, x.z, x.w);
        }
        if (i < 64)
            long_put(at.scales() + i * 4, __float_as_uint(__half2float(k_scale)));
    }
    /* The thread's first key is `key`. Scales that nobody wrote may be anything. */
    __device__ __forceinline__ void put_v(const long_ring &at, const long_item &w, int key) {
        uint32_t *s = (uint32_t *)&scale;
#pragma unroll
        for (int j = 0; j < 4; j++)
            s[j] &= long_seen(w, key + 2 * j);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint4 x = kv_scaled(kv_unpack(v[j]), scale);
            const uint32_t to = at.values() + v_dst + j * 2048;
            long_put(to, x.x);
            long_put(to ^ 16, x.y);
            long_put(to ^ 32, x.z);
            long_put(to ^ 48, x.w);
        }
    }
    __device__ __forceinline__ void run(const attn_args &a, const long_item &w, long_ring &at) {
        const uint8_t *page = long_source(a, w, w.from);
        ask_k(page);
        ask_v(page);
        for (int p = w.from; p <= w.to; p++) {
            page = long_source(a, w, min(p + 1, w.to));
            mbar_wait(at.empty(), at.parity);
            put_k(at);
            ask_k(page);
            put_v(at, w, p * BE_PAGE + q * 8);
            ask_v(page);
            long_fence();
            mbar_arrive(at.full());
            at.next();
        }
    }
};

/* ---- a warp's 16 rows: positions 2 w and 2 w + 1 of the group's eight, lane / 4 their head ---- */

struct long_rows {
    int pos[2];               /* -1: none */
    int whole_from, whole_to; /* pages that both see whole */
    float m[2], l[2], o[32];  /* of the super-chunk */
    float am[2], al[2];       /* of those before, whose outputs are in shared memory */
};

static __device__ __forceinline__ void long_clear(long_rows &w) {
#pragma unroll
    for (int i = 0; i < 32; i++)
        w.o[i] = 0;
    w.m[0] = w.m[1] = -INFINITY;
    w.l[0] = w.l[1] = 0;
}

/* n of the two positions are there; rows: the warp's in shared memory. */
static __device__ __forceinline__ void long_query(const attn_args &a, long_rows &w, const long_item &item, int first,
                                                  uint32_t rows, int g, int t) {
    const int n = item.tile.n - first;
    float2 x[2][4][2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float *src = a.qkv + (int64_t)(item.tile.row + first + h) * a.width + (item.kv_head * 8 + g) * 64 +
                           t / 2 * 8 + t % 2 * 2;
        w.pos[h] = h < n ? item.tile.pos + first + h : -1;
#pragma unroll
        for (int j = 0; j < 8; j++)
            x[h][j / 2][j % 2] =
                h < n ? __ldcg((const float2 *)(src + j / 4 * 32 + j / 2 % 2 * 4 + j % 2 * 16)) : make_float2(0, 0);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < 8; j++)
            long_put(rows + (h * 8 + g) * 128 + ((j ^ g) << 4) + t * 4,
                     f16x2(x[h][j / 2][j % 2].x, x[h][j / 2][j % 2].y));
    long_fence();
    w.whole_from = a.window > 0 ? max(w.pos[1] - a.window + BE_PAGE, 0) / BE_PAGE : 0;
    w.whole_to = n > 1 ? (w.pos[0] + 1) / BE_PAGE : 0;
    w.am[0] = w.am[1] = -INFINITY;
    w.al[0] = w.al[1] = 0;
    long_clear(w);
}

/* Scores, times the keys' scales where they have some. */
template <class T>
static __device__ __forceinline__ void long_scale(const attn_args &a, float (&s)[32], const long_ring &at, int t) {
    if (sizeof(T) == 1)
#pragma unroll
        for (int b = 0; b < 4; b++) {
            float x[4];
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                         : "r"(at.scales() + b / 2 * 128 + t * 32 + b % 2 * 16));
#pragma unroll
            for (int i = 0; i < 8; i++)
                s[b * 8 + i] = __fmul_rn(s[b * 8 + i], x[i / 4 * 2 + i % 2]);
        }
#pragma unroll
    for (int i = 0; i < 32; i++)
        s[i] = __fmul_rn(s[i], a.scale_log2);
}

/* A page that the group does not see: not before it is there, for no warp may be a round ahead of the others. */
static __device__ __forceinline__ void long_skip(long_ring &at, int lane) {
    mbar_wait(at.full(), at.parity);
    if (lane == 0)
        mbar_arrive(at.empty());
    at.next();
}

/* Of page p, keys that a row does not see. */
static __device__ __forceinline__ void long_mask(const attn_args &a, const long_rows &w, float (&s)[32], int p, int t) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int last = w.pos[h] - p * BE_PAGE - 8 * t, first = a.window > 0 ? last - a.window + 1 : -BE_PAGE;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int key = i / 8 * 32 + i % 8;
            float &z = s[i / 2 * 4 + h * 2 + i % 2];
            z = key >= first && key <= last ? z : -INFINITY;
        }
    }
}

/* Scores become weights p against the page's maximum m, l their sum. */
static __device__ __forceinline__ void long_soft(float (&s)[32], float (&m)[2], float (&l)[2], uint32_t (&p)[4][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top[4];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float z = s[i / 2 * 4 + h * 2 + i % 2];
            top[i % 4] = i < 4 ? z : fmaxf(top[i % 4], z);
        }
        top[0] = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
        top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 1));
        m[h] = fmaxf(fmaxf(top[0], __shfl_xor_sync(~0u, top[0], 2)), -INFINITY); /* no NaN */
        const float mm = m[h] == -INFINITY ? 0.f : m[h];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float p0 = exp2_fast(s[i * 4 + h * 2] - mm), p1 = exp2_fast(s[i * 4 + h * 2 + 1] - mm);
            l[h] = i ? l[h] + p0 : p0;
            l[h] = l[h] + p1;
            p[i / 2][i % 2 * 2 + h] = f16x2(p0, p1);
        }
        l[h] += __shfl_xor_sync(~0u, l[h], 1);
        l[h] += __shfl_xor_sync(~0u, l[h], 2);
    }
}

/* soft_merge with one exponential: the other is of zero. */
static __device__ __forceinline__ void long_weigh(float &m, float &l, float pm, float pl, float &x, float &y) {
    const float e = exp2f(-fabsf(m - pm));
    x = m >= pm ? 1.f : e;
    y = m >= pm ? e : 1.f;
    l = fmaf(l, x, pl * y);
    m = fmaxf(m, pm);
}

/* The page joins the super-chunk, but for rows that see nothing of it. */
static __device__ __forceinline__ void long_merge(long_rows &w, const float (&m)[2], const float (&l)[2],
                                                  const float (&o)[32]) {
    float x[2], y[2];
    if (__all_sync(~0u, fminf(m[0], m[1]) != -INFINITY)) {
#pragma unroll
        for (int h = 0; h < 2; h++)
            long_weigh(w.m[h], w.l[h], m[h], l[h], x[h], y[h]);
#pragma unroll
        for (int i = 0; i < 32; i++)
            w.o[i] = fmaf(w.o[i], x[i / 2 % 2], o[i] * y[i / 2 % 2]);
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (m[h] != -INFINITY) {
            long_weigh(w.m[h], w.l[h], m[h], l[h], x[h], y[h]);
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (i / 2 % 2 == h)
                    w.o[i] = fmaf(w.o[i], x[h], o[i] * y[h]);
        }
}

/* The super-chunk joins those before. */
static __device__ __forceinline__ void long_super(long_rows &w, float4 *all) {
    float x[2], y[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        x[h] = 1, y[h] = 0;
        if (w.m[h] != -INFINITY)
            long_weigh(w.am[h], w.al[h], w.m[h], w.l[h], x[h], y[h]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float4 v = all[i * 32];
        if (w.m[0] != -INFINITY) {
            v.x = fmaf(v.x, x[0], w.o[i * 4] * y[0]);
            v.y = fmaf(v.y, x[0], w.o[i * 4 + 1] * y[0]);
        }
        if (w.m[1] != -INFINITY) {
            v.z = fmaf(v.z, x[1], w.o[i * 4 + 2] * y[1]);
            v.w = fmaf(v.w, x[1], w.o[i * 4 + 3] * y[1]);
        }
        all[i * 32] = v;
    }
    long_clear(w);
}

/* The next page, in the ring, gives scores: asked for, not waited for. */
template <class T>
static __device__ __forceinline__ void long_ask(float (&s)[32], uint32_t query, const long_ring &at) {
    mbar_wait(at.full(), at.parity);
    if (sizeof(T) > 1) /* what other threads copied is there for wgmma */
        long_fence();
    const uint64_t q = wgmma_desc(query), k = wgmma_desc(at.keys());
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++)
        wgmma64_shared(s, q + 2 * j, k + 2 * j, j > 0);
    wgmma_commit();
}

/* Page p, whose scores are there, becomes outputs; its place in the ring is free. */
template <class T>
static __device__ __forceinline__ void long_page(const attn_args &a, const long_rows &w, long_ring &at, int p,
                                                 float (&s)[32], float (&o)[32], float (&m)[2], float (&l)[2],
                                                 int lane) {
    uint32_t p16[4][4];
    long_scale<T>(a, s, at, lane & 3);
    if (p < w.whole_from || p >= w.whole_to)
        long_mask(a, w, s, p, lane & 3);
    long_soft(s, m, l, p16);
    const uint64_t v = wgmma_desc(at.values());
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; j++)
        wgmma<64>(o, p16[j], v + 2 * j, j > 0);
    wgmma_commit();
    wgmma_wait<0>(o);
    if (lane == 0)
        mbar_arrive(at.empty());
    at.next();
}

/* A group walks the item's pages; low .. high are those that it sees. The scores of a page are computed while the one
 * before is merged. */
template <class T>
static __device__ __forceinline__ void long_walk(const attn_args &a, long_rows &w, long_ring &at, const long_item &item,
                                                 int low, int high, uint32_t query, float4 *all, int lane) {
    float s[32], o[32], m[2], l[2];
#pragma unroll
    for (int i = 0; i < 8; i++)
        all[i * 32] = make_float4(0, 0, 0, 0);
    int p = item.from;
    for (; p < low; p++)
        long_skip(at, lane);
    if (p <= high) {
        long_ask<T>(s, query, at);
        wgmma_wait<0>(s);
#pragma unroll 1
        for (; p < high; p++) {
            long_page<T>(a, w, at, p, s, o, m, l, lane);
            long_ask<T>(s, query, at);
            long_merge(w, m, l, o);
            wgmma_wait<0>(s);
            if (p % SUPER == SUPER - 1)
                long_super(w, all);
        }
        long_page<T>(a, w, at, p++, s, o, m, l, lane);
        long_merge(w, m, l, o);
        long_super(w, all);
    }
    for (; p <= item.to; p++)
        long_skip(at, lane);
}

/* x / l as division rounds it, for results that are normal and l between 2^-100 and 2^100; r: 1 / l. */
static __device__ __forceinline__ float long_divide(float x, float l, float r) {
    float q = x * r;
    q = fmaf(fmaf(-l, q, x), r, q);
    return fmaf(fmaf(-l, q, x), r, q);
}

/* put_out for a warp's rows, which leave through its 4 KB of shared memory. */
static __device__ __forceinline__ void long_store(const attn_args &a, const long_rows &w, const long_item &item,
                                                  int first, uint8_t *room, int lane) {
    const int g = lane >> 2, t = lane & 3;
    float o[32];
#pragma unroll
    for (int i = 0; i < 8; i++)
        *(float4 *)(o + i * 4) = ((const float4 *)room)[i * 32 + lane];
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float f = 1, l = w.al[h];
        uint32_t y[8], odd = 0;
        if (a.sinks) {
            const float z = a.sinks[item.kv_head * 8 + g] * 1.44269504088896f, top = fmaxf(w.am[h], z);
            f = exp2f(w.am[h] - top);
            l = fmaf(l, f, exp2f(z - top));
        }
        const float r = __frcp_rn(l);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x0 = o[i * 4 + h * 2] * f, x1 = o[i * 4 + h * 2 + 1] * f;
            y[i] = f16x2(long_divide(x0, l, r), long_divide(x1, l, r));
            asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(odd) : "r"(y[i]), "r"(0u));
        }
        if (odd & 0x7fff7fff) /* infinities or NaN */
#pragma unroll
            for (int i = 0; i < 8; i++)
                y[i] = f16x2(o[i * 4 + h * 2] * f / l, o[i * 4 + h * 2 + 1] * f / l);
#pragma unroll
        for (int i = 0; i < 8; i++)
            *(uint32_t *)(room + (h * 8 + g) * 128 + ((i ^ g) << 4) + t * 4) = y[i];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = i * 4 + lane / 8, c = lane % 8;
        if (first + r / 8 < item.tile.n)
            *(uint4 *)(a.y + (item.tile.row + first + r / 8) * a.ldy + (item.kv_head * 8 + r % 8) * 64 + c * 8) =
                *(const uint4 *)(room + r * 128 + ((c ^ (r & 7)) << 4));
    }
    __syncwarp();
}

template <class T>
static __device__ __forceinline__ void long_attend(const attn_args &a, long_ring &at, int n_tile, uint8_t *room,
                                                   int warp, int lane) {
    const int group = warp / 4, first = warp * 2;
    const uint32_t query = at.shared + LONG_QUERY + group * 8192;
    long_item item;
#pragma unroll 1
    for (int k = 0; item.take(a, n_tile, k); k++) {
        const int from = item.tile.pos + group * 8, to = min(from + 7, item.last); /* the group's positions */
        long_rows w;
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); /* nothing reads the last item's query */
        long_query(a, w, item, first, query + warp % 4 * 2048, lane >> 2, lane & 3);
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        long_walk<T>(a, w, at, item, from <= to ? first_key(a, from) / BE_PAGE : item.to + 1,
                     from <= to ? to / BE_PAGE : -1, query, (float4 *)room + lane, lane);
        long_store(a, w, item, first, room, lane);
    }
}
#endif

template <class T> static __global__ __launch_bounds__(LONG_THREADS, 1) void attn_long_kernel(attn_args a) {
#ifdef HAVE_WGMMA
    extern __shared__ uint8_t long_shared[];
    const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const uint32_t raw = (uint32_t)__cvta_generic_to_shared(long_shared), shared = (raw + 1023) & ~1023u;
    long_ring at = {shared, 0, 0};
    pdl_launch();
    if (threadIdx.x < LONG_STAGES) {
        mbar_init(shared + LONG_BARS + threadIdx.x * 16, LONG_FEED);
        mbar_init(shared + LONG_BARS + threadIdx.x * 16 + 8, LONG_WARPS);
    }
    __syncthreads();
    const int n_tile = a.a.batch->n_tile;
    pdl_wait();
    if (warp < LONG_WARPS) {
        set_registers_up<112>();
        long_attend<T>(a, at, n_tile, long_shared + (shared - raw) + LONG_ALL + warp * 4096, warp, lane);
    } else {
        set_registers_down<32>();
        long_feed<T> feed(threadIdx.x - LONG_WARPS * 32);
        long_item item;
        at.parity = 1;
        for (int k = 0; item.take(a, n_tile, k); k++)
            feed.run(a, item, at);
    }
#endif
}

template <class T> static void launch_long(cuda_run *r, const attn_args &a, int tiles) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(attn_long_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, LONG_SHARED);
    const int items = tiles * a.n_kv, blocks = r->dev->n_sm;
    cuda_launch(r, attn_long_kernel<T>, dim3((unsigned)(items < blocks ? items : blocks)), dim3(LONG_THREADS),
                LONG_SHARED, a);
}

bool attn_run_long(cuda_run *r, const attn_args &a, int tiles) {
    if (!cuda_has_wide(r->dev) || r->kv->dim != 64 || r->kv->base.spec.type == BE_KV_F32 || a.head_dim != 64 ||
        a.group != 8 || a.ldy % 8)
        return false;
    if (r->kv->base.spec.type == BE_KV_Q8)
        launch_long<kv_int8>(r, a, tiles);
    else
        launch_long<__half>(r, a, tiles);
    return true;
}
