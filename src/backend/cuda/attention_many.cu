/* backend/cuda/attention_many.cu: attention of many sequences with one row each: heads of 64, at most eight query heads
 * a KV head, f16 or 8 bits.
 *
 * The pages of all rows and KV heads, in this order, are one list, and each warp walks an equal share of it, cut
 * between super-chunks. Pages come through the warp's own ring in shared memory, which does not empty between
 * sequences. A warp that has all of a row's pages writes its output; where two or more share them, each leaves a
 * partial result for every super-chunk, and the last to arrive merges them. */
#include "backend/cuda/attention.cuh"

#define MANY_SLOT 528 /* floats of a partial result: O as a warp holds it, m and l of eight heads */

template <class T> struct many_ring { /* of a block */
    static constexpr bool INT8 = sizeof(T) == 1;
    static constexpr int WARPS = INT8 ? 8 : 4, STAGES = 2, PAGE = kv_head_bytes<T>(64);
    static constexpr int BYTES = WARPS * STAGES * PAGE;
};

struct many_row {
    int row, slot, pos;      /* of the batch; */
    int first;               /* page of the sequence that it sees first */
    int pages, units, count; /* pages and super-chunks before this row's, of one KV head; its own super-chunks */
};

struct many_list { /* in shared memory */
    int n, pages;
    bool split; /* super-chunks of a row and KV head may go to several warps: there is room for their partial results */
    many_row row[CUDA_MANY_ROWS];
};

/* A page of a row and KV head. */
struct many_at {
    int i, head, page;
};

static __device__ __forceinline__ int last_page(const many_row &r) { return r.pos / BE_PAGE; }

/* By all threads; ends with a barrier. What it reads was settled before the kernel before this one had waited. */
static __device__ void list_rows(const attn_args &a, many_list &l) {
    const int n = a.a.batch->n_one, lane = threadIdx.x;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        many_row &r = l.row[i];
        r.row = a.a.one[i];
        r.pos = a.a.pos[r.row];
        r.slot = a.a.slot[r.row];
        r.first = first_key(a, r.pos) / BE_PAGE;
        r.count = last_page(r) / SUPER - r.first / SUPER + 1;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int pages = 0, units = 0;
        for (int i0 = 0; i0 < n; i0 += 32) {
            const bool there = i0 + lane < n;
            const int p = there ? last_page(l.row[i0 + lane]) - l.row[i0 + lane].first + 1 : 0;
            const int u = there ? l.row[i0 + lane].count : 0;
            int ps = p, us = u;
            for (int d = 1; d < 32; d *= 2) {
                const int pd = __shfl_up_sync(~0u, ps, d), ud = __shfl_up_sync(~0u, us, d);
                ps += lane >= d ? pd : 0;
                us += lane >= d ? ud : 0;
            }
            if (there) {
                l.row[i0 + lane].pages = pages + ps - p;
                l.row[i0 + lane].units = units + us - u;
            }
            pages += __shfl_sync(~0u, ps, 31);
            units += __shfl_sync(~0u, us, 31);
        }
        if (lane == 0) {
            l.n = n;
            l.pages = pages * a.n_kv;
            l.split = units * a.n_kv <= a.n_slot;
        }
    }
    __syncthreads();
}

/* Page x of the list, 0 <= x < pages. */
static __device__ __forceinline__ many_at find_page(const many_list &l, int n_kv, int x) {
    int i = 0;
    for (int step = CUDA_MANY_ROWS / 2; step; step /= 2)
        if (i + step < l.n && l.row[i + step].pages * n_kv <= x)
            i += step;
    const many_row &r = l.row[i];
    const int n = last_page(r) - r.first + 1;
    x -= r.pages * n_kv;
    return {i, x / n, r.first + x % n};
}

/* The first page from x on at which a walk may begin. */
static __device__ __forceinline__ int cut_at(const many_list &l, int n_kv, int x) {
    if (x >= l.pages)
        return l.pages;
    const many_at at = find_page(l, n_kv, x);
    const int end = last_page(l.row[at.i]) + 1;
    if (at.page == l.row[at.i].first)
        return x;
    return x + (l.split ? min((at.page + SUPER - 1) / SUPER * SUPER, end) : end) - at.page;
}

static __device__ __forceinline__ void next_page(const many_list &l, int n_kv, many_at &at) {
    if (at.page++ < last_page(l.row[at.i]))
        return;
    if (++at.head == n_kv) {
        at.head = 0;
        at.i = min(at.i + 1, l.n - 1);
    }
    at.page = l.row[at.i].first;
}

/* ---- pages in shared memory ---- */

/* Keys of a page that the row sees. */
struct many_keys {
    int first, last;
    __device__ __forceinline__ bool all() const { return first <= 0 && last >= BE_PAGE - 1; }
    __device__ __forceinline__ bool any(int from, int n) const { return from + n > first && from <= last; }
    /* Mask of a pair of f16. */
    __device__ __forceinline__ uint32_t pair(int key) const {
        return (any(key, 1) ? 0xFFFFu : 0u) | (any(key + 1, 1) ? 0xFFFF0000u : 0u);
    }
    __device__ __forceinline__ uint4 eight(int key) const {
        return make_uint4(pair(key), pair(key + 2), pair(key + 4), pair(key + 6));
    }
};

static __device__ __forceinline__ many_keys keys_of(const attn_args &a, int pos, int page) {
    const int last = pos - page * BE_PAGE;
    return {a.window > 0 ? last - a.window + 1 : 0, last};
}

/* Unit c, of 16 bytes, of row r: K's rows are 0 .. 63, V's 64 .. 127. Rows that lanes read at once take different
 * banks. */
template <class T> static __device__ __forceinline__ int unit_at(int r, int c) {
    return many_ring<T>::INT8 ? r * 64 + ((c ^ ((r >> 1 ^ r >> 3) & 1) << 1) << 4) : piece_at(r, c);
}

template <class T>
static __device__ __forceinline__ void ask_page(const uint8_t *src, uint8_t *dst, const many_keys &see, int lane) {
    constexpr int UNITS = 4 * sizeof(T), KEYS = 16 / sizeof(T); /* of a row; of a unit of V */
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(dst);
    const bool values = see.any(lane % UNITS * KEYS, KEYS);
#pragma unroll
    for (int i = 0; i < 4 * UNITS; i++) {
        const int row = (i * 32 + lane) / UNITS;
        if (i < 2 * UNITS ? see.any(row, 1) : values)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + unit_at<T>(row, lane % UNITS)),
                         "l"(src + (i * 32 + lane) * 16)
                         : "memory");
    }
    if (many_ring<T>::INT8 && lane < 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + 8192 + lane * 16),
                     "l"(src + 8192 + lane * 16)
                     : "memory");
}

/* Eight f16: dims 32 e + 8 t of key r; keys 32 e + 8 t of V's row r - 64. */
template <class T> static __device__ __forceinline__ uint4 eight_of(const uint8_t *page, int r, int e, int t) {
    if (many_ring<T>::INT8)
        return kv_unpack(*(const uint2 *)(page + unit_at<T>(r, e * 2 + t / 2) + t % 2 * 8));
    return *(const uint4 *)(page + unit_at<T>(r, e * 4 + t));
}

struct many_sum {
    float m, l, o[8][2];
}; /* of head g: dims 8 n + 2 t, + 1 */

static __device__ __forceinline__ void clear(many_sum &s) {
    s.m = -INFINITY;
    s.l = 0;
#pragma unroll
    for (int n = 0; n < 8; n++)
        s.o[n][0] = s.o[n][1] = 0;
}

static __device__ __forceinline__ void merge(many_sum &into, const many_sum &part) {
    if (part.m == -INFINITY)
        return;
    float x, y;
    soft_merge(into.m, into.l, part.m, part.l, x, y);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            into.o[n][i] = fmaf(into.o[n][i], x, part.o[n][i] * y);
}

/* The page joins the super-chunk. MASK: some keys are not seen; they may be anything, NaN included. */
template <class T, bool MASK>
static __device__ __forceinline__ void walk_page(const attn_args &a, many_sum &sum, const uint4 (&q)[2],
                                                 const uint8_t *page, const many_keys &see, int g, int t) {
    constexpr bool INT8 = many_ring<T>::INT8;
    float s[8][4];
    uint4 scale[INT8 ? 2 : 1][2]; /* K's, V's of the lane's eight keys of a block */
    if (INT8)
#pragma unroll
        for (int i = 0; i < 4; i++)
            scale[INT8 ? i / 2 : 0][i % 2] = ((const uint4 *)(page + 8192))[i * 4 + t];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const uint4 v = eight_of<T>(page, i / 4 * 32 + (g >> 1) * 8 + i % 4 * 2 + (g & 1), e, t);
            mma_f16(s[i], q[e].x, 0, q[e].y, 0, v.x, v.y);
            mma_f16(s[i], q[e].z, 0, q[e].w, 0, v.z, v.w);
        }
    }
    many_sum part;
    part.m = -INFINITY;
    part.l = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float &z = s[i / 2][i % 2];
        if (INT8)
            z = __fmul_rn(z, kv_scale(scale[0][i / 8], i % 8));
        z = __fmul_rn(z, a.scale_log2);
        if (MASK)
            z = see.any(i / 8 * 32 + 8 * t + i % 8, 1) ? z : -INFINITY;
        part.m = fmaxf(part.m, z);
    }
    part.m = fmaxf(part.m, __shfl_xor_sync(~0u, part.m, 1));
    part.m = fmaxf(part.m, __shfl_xor_sync(~0u, part.m, 2));
    const float mm = part.m == -INFINITY ? 0.f : part.m;
    uint32_t p[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float p0 = exp2_fast(s[i][0] - mm), p1 = exp2_fast(s[i][1] - mm);
        part.l = part.l + p0;
        part.l = part.l + p1;
        p[i] = f16x2(p0, p1);
    }
    part.l += __shfl_xor_sync(~0u, part.l, 1);
    part.l += __shfl_xor_sync(~0u, part.l, 2);
    if (MASK && INT8) /* of integers the scales are enough */
#pragma unroll
        for (int b = 0; b < 2; b++)
            scale[INT8 ? 1 : 0][b] = and4(scale[INT8 ? 1 : 0][b], see.eight(32 * b + 8 * t));
#pragma unroll
    for (int n = 0; n < 8; n++) {
        float o[4] = {0, 0, 0, 0};
#pragma unroll
        for (int b = 0; b < 2; b++) {
            uint4 v = eight_of<T>(page, BE_PAGE + 8 * n + g, b, t);
            if (INT8)
                v = kv_scaled(v, scale[INT8 ? 1 : 0][b]);
            else if (MASK)
                v = and4(v, see.eight(32 * b + 8 * t));
            mma_f16(o, p[b * 4], 0, p[b * 4 + 1], 0, v.x, v.y);
            mma_f16(o, p[b * 4 + 2], 0, p[b * 4 + 3], 0, v.z, v.w);
        }
        part.o[n][0] = o[0];
        part.o[n][1] = o[1];
    }
    merge(sum, part);
}

/* ---- rows whose pages several warps walk ---- */

static __device__ __forceinline__ void put_slot(float *slot, const many_sum &s, int g, int t, int lane) {
#pragma unroll
    for (int n = 0; n < 8; n++)
        __stcg((float2 *)slot + n * 32 + lane, make_float2(s.o[n][0], s.o[n][1]));
    if (t == 0)
        __stcg((float2 *)slot + 256 + g, make_float2(s.m, s.l));
}
static __device__ __forceinline__ void get_slot(const float *slot, many_sum &s, int g, int lane) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float2 o = __ldcg((const float2 *)slot + n * 32 + lane);
        s.o[n][0] = o.x;
        s.o[n][1] = o.y;
    }
    const float2 ml = __ldcg((const float2 *)slot + 256 + g);
    s.m = ml.x;
    s.l = ml.y;
}

/* `done` super-chunks more are there; true when they were the last, for whom all others are visible. */
static __device__ __forceinline__ bool arrive(uint32_t *arrived, int done, int all, int lane) {
    uint32_t before = 0;
    __threadfence();
    __syncwarp();
    if (lane == 0)
        before = atomicAdd(arrived, (uint32_t)done);
    before = __shfl_sync(~0u, before, 0);
    if (before + (uint32_t)done != (uint32_t)all)
        return false;
    if (lane == 0)
        *arrived = 0;
    __threadfence();
    return true;
}

/* ---- the walk ---- */

static __device__ __forceinline__ void load_heads(const attn_args &a, const many_row &r, int kv_head, int g, int t,
                                                  uint4 (&q)[2]) {
    const float4 *src = (const float4 *)(a.qkv + (int64_t)r.row * a.width + (kv_head * a.group + g) * 64 + 8 * t);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float4 none = make_float4(0, 0, 0, 0);
        const float4 lo = g < a.group ? __ldcg(src + e * 8) : none, hi = g < a.group ? __ldcg(src + e * 8 + 1) : none;
        q[e] = make_uint4(f16x2(lo.x, lo.y), f16x2(lo.z, lo.w), f16x2(hi.x, hi.y), f16x2(hi.z, hi.w));
    }
}

static __device__ __forceinline__ void put_heads(const attn_args &a, const many_row &r, int kv_head, int g, int t,
                                                 const many_sum &s) {
    if (g < a.group)
#pragma unroll
        for (int n = 0; n < 8; n++)
            put_out(a, r.row, kv_head * a.group + g, 8 * n + 2 * t, s.m, s.l, s.o[n][0], s.o[n][1]);
}

/* Asks for a warp's pages one after the other. */
template <class T> struct many_feed {
    many_at at;
    int left, stage;
    int ids_of, ids_from, ids; /* the lane's entry of the page table: page ids_from + lane of row ids_of */
    bool waited;               /* for the kernel before, which wrote the last position of each row */

    __device__ __forceinline__ void wait() {
        if (!waited)
            pdl_wait();
        waited = true;
    }
    __device__ __forceinline__ void ask(const attn_args &a, const many_list &l, uint8_t *ring, int lane) {
        if (left > 0) {
            const many_row &r = l.row[at.i];
            if (at.i != ids_of || at.page - ids_from >= 32 || at.page < ids_from) {
                ids_of = at.i;
                ids_from = at.page;
                ids = at.page + lane <= last_page(r) ? a.table[(int64_t)r.slot * a.n_entry + at.page + lane] : 0;
            }
            const int id = __shfl_sync(~0u, ids, at.page - ids_from);
            if (at.page == last_page(r))
                wait();
            ask_page<T>(a.layer + (int64_t)max(id, 0) * a.page_bytes + (int64_t)at.head * a.head_bytes,
                        ring + stage * many_ring<T>::PAGE, keys_of(a, r.pos, at.page), lane);
            next_page(l, a.n_kv, at);
            stage = stage + 1 == many_ring<T>::STAGES ? 0 : stage + 1;
            left--;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
};

template <class T> static __global__ __launch_bounds__(many_ring<T>::WARPS * 32, 1) void attn_many_kernel(attn_args a) {
    constexpr int WARPS = many_ring<T>::WARPS, STAGES = many_ring<T>::STAGES;
    extern __shared__ __align__(128) uint8_t many_shared[];
    __shared__ many_list l;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    pdl_launch();
    list_rows(a, l);
    const int64_t walker = blockIdx.x * WARPS + warp, walkers = gridDim.x * WARPS;
    const int from = cut_at(l, a.n_kv, (int)(l.pages * walker / walkers));
    const int n = cut_at(l, a.n_kv, (int)(l.pages * (walker + 1) / walkers)) - from;
    if (n <= 0) {
        pdl_wait();
        return;
    }
    uint8_t *ring = many_shared + warp * STAGES * many_ring<T>::PAGE;
    many_at at = find_page(l, a.n_kv, from);
    many_feed<T> feed = {at, n, 0, -1, 0, 0, false};
    for (int i = 0; i < STAGES - 1; i++)
        feed.ask(a, l, ring, lane);
    feed.wait();
    uint4 q[2];
    many_sum super, all;
    clear(super);
    clear(all);
    bool whole = false;
    int stored = 0;
#pragma unroll 1
    for (int k = 0, stage = 0; k < n; k++, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        const many_row &r = l.row[at.i];
        feed.ask(a, l, ring, lane);
        if (k == 0 || at.page == r.first) {
            load_heads(a, r, at.head, g, t, q);
            whole = at.page == r.first && n - k > last_page(r) - at.page;
        }
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        __syncwarp();
        const many_keys see = keys_of(a, r.pos, at.page);
        if (see.all())
            walk_page<T, false>(a, super, q, ring + stage * many_ring<T>::PAGE, see, g, t);
        else
            walk_page<T, true>(a, super, q, ring + stage * many_ring<T>::PAGE, see, g, t);
        __syncwarp();
        if (at.page == last_page(r) || at.page % SUPER == SUPER - 1) {
            bool ready = whole && at.page == last_page(r);
            if (whole) {
                merge(all, super);
            } else {
                float *slots = a.partial + (int64_t)(r.units * a.n_kv + at.head * r.count) * MANY_SLOT;
                put_slot(slots + (at.page / SUPER - r.first / SUPER) * MANY_SLOT, super, g, t, lane);
                stored++;
                if (k == n - 1 || at.page == last_page(r)) {
                    ready = arrive(a.arrived + at.i * a.n_kv + at.head, stored, r.count, lane);
                    stored = 0;
                    for (int i = 0; ready && i < r.count; i++) {
                        get_slot(slots + i * MANY_SLOT, super, g, lane);
                        merge(all, super);
                    }
                }
            }
            if (ready) {
                put_heads(a, r, at.head, g, t, all);
                clear(all);
            }
            clear(super);
        }
        next_page(l, a.n_kv, at);
    }
}

template <class T> static void launch_many(cuda_run *r, const attn_args &a) {
    if (r->error == cudaSuccess)
        r->error =
            cudaFuncSetAttribute(attn_many_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, many_ring<T>::BYTES);
    cuda_launch(r, attn_many_kernel<T>, dim3((unsigned)r->dev->n_sm), dim3(many_ring<T>::WARPS * 32),
                many_ring<T>::BYTES, a);
}

bool attn_run_many(cuda_run *r, attn_args a, int ones) {
    if (!cuda_attn_many(r->kv, ones, a.group))
        return false;
    a.n_slot = CUDA_MAX_PARTIAL * 16 * (128 + 2) / MANY_SLOT;
    if (r->kv->base.spec.type == BE_KV_Q8)
        launch_many<kv_int8>(r, a);
    else
        launch_many<__half>(r, a);
    return true;
}
