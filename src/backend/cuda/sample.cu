/* backend/cuda/sample.cu: from logits to ids on the device.
 *
 * Greedy: parts of the vocabulary find their best, one block takes the best of them. Otherwise the blocks of a row draw
 * together: weights exp((x - max) / T) are integers of 2^-40, so that sums have no order and ids do not depend on how
 * many blocks there are; top-k and top-p look for the last value kept in the order (larger value, lower id), first its
 * bucket of a histogram, then its part of that bucket, then itself among what is in there. The draw is
 * Philox(seed, draw) against the kept weights in order of id. Before it log-probabilities take what they are made of,
 * then bias and penalties change the logits, until the draw is done; a mask leaves ids out. */
#include <cooperative_groups.h>

#include "backend/cuda/cuda.h"
#include "quant/fragment.cuh"

#define DRAW_THREADS 1024
#define DRAW_BLOCKS 8    /* of one row at most */
#define DRAW_AT_ONCE 128 /* blocks that the device has room for at the same time */
#define N_BUCKET (2 * DRAW_THREADS)
#define N_LIST 2048

/* Order of values as unsigned integers, NaN above all; the id below makes it total, lower ids first among equals. */
static __device__ __forceinline__ uint64_t order_of(float x, int id) {
    const uint32_t u = x != x ? 0x7FFFFFFFu : __float_as_uint(x);
    return (uint64_t)(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | (uint32_t)~id;
}
static __device__ __forceinline__ int id_of(uint64_t order) { return (int)~(uint32_t)order; }
static __device__ __forceinline__ float value_of(uint64_t order) {
    const uint32_t u = (uint32_t)(order >> 32);
    return __uint_as_float(u & 0x80000000u ? u & 0x7FFFFFFFu : ~u);
}

static __device__ uint64_t max_of_block(uint64_t v, uint64_t *part) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const uint64_t o = __shfl_xor_sync(~0u, v, d);
        v = o > v ? o : v;
    }
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = v;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; w++)
        v = part[w] > v ? part[w] : v;
    __syncthreads();
    return v;
}

/* Sum of v over the threads of the block before this one; *all: over all of them. */
static __device__ uint64_t sum_before(uint64_t v, uint64_t *part, uint64_t *all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t up = v, before = 0;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        const uint64_t o = __shfl_up_sync(~0u, up, d);
        up += lane >= d ? o : 0;
    }
    if (lane == 31)
        part[warp] = up;
    __syncthreads();
    *all = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) {
        before += w < warp ? part[w] : 0;
        *all += part[w];
    }
    __syncthreads();
    return before + up - v;
}

/* ---- the blocks of one row: a cluster, or one where the device has none. gridDim.x of them, blockIdx.x is which ----
 */

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
static __device__ __forceinline__ void row_sync() { cooperative_groups::this_cluster().sync(); }
template <typename T> static __device__ __forceinline__ T *of_block(T *shared, int block) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, block);
}
#else
static __device__ __forceinline__ void row_sync() { __syncthreads(); }
template <typename T> static __device__ __forceinline__ T *of_block(T *shared, int) { return shared; }
#endif

static __global__ __launch_bounds__(256) void best_kernel(cuda_arrays a, const float *logits, int n, uint64_t *best) {
    __shared__ uint64_t part[8];
    pdl_launch();
    pdl_wait();
    const int row = blockIdx.y;
    if (row >= a.batch->n_out)
        return;
    if (blockIdx.x == 0 && threadIdx.x == 0) { /* drawing replaces ids */
        const int32_t token = a.token[a.out_row[row]];
        a.unseen[row] = token < 0 ? a.id[-1 - token] : -1;
    }
    const int per = (n + CUDA_SAMPLE_PARTS - 1) / CUDA_SAMPLE_PARTS, from = blockIdx.x * per, to = min(n, from + per);
    uint64_t top = 0;
    for (int i = from + threadIdx.x; i < to; i += 256) {
        const uint64_t o = order_of(logits[(int64_t)row * n + i], i);
        top = o > top ? o : top;
    }
    top = max_of_block(top, part);
    if (threadIdx.x == 0)
        best[row * CUDA_SAMPLE_PARTS + blockIdx.x] = top;
}

/* ---- drawing ---- */

static __device__ void philox(uint64_t seed, uint64_t draw, uint32_t out[4]) {
    uint32_t c0 = (uint32_t)draw, c1 = (uint32_t)(draw >> 32), c2 = 0, c3 = 0, k0 = (uint32_t)seed,
             k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

struct draw_state { /* of one block, in shared memory */
    unsigned long long bucket[N_BUCKET];
    uint64_t list[N_LIST];
    uint64_t chunk[DRAW_THREADS], part[32], cut, sum;
    int n_list, where, changed;     /* changed: a token that is in no edit, else -1 */
    float was;                      /* its logit */
    uint32_t mask[CUDA_MASK_WORDS]; /* of this block's share */
};

struct draw_row {
    const float *x;
    int n, per, from, to; /* this block's share of the n values: whole chunks of `per`, from a multiple of 32 on */
    float max, inv_t, min_p;
    uint64_t cut;         /* orders below it are out */
    const uint32_t *mask; /* of the share; NULL = all are allowed */

    __device__ uint64_t weight(float v) const {
        const float w = expf((v - max) * inv_t);
        return w >= min_p ? (uint64_t)(w * 1099511627776.f) : 0;
    }
    __device__ bool allows(int i) const { return !mask || mask[(i - from) / 32] >> (i % 32) & 1; }
    /* What element i, which is v, adds: its weight, or one; 0 when it is out. */
    __device__ uint64_t value(int i, float v, bool mass) const {
        if (order_of(v, i) < cut || !allows(i))
            return 0;
        return mass ? weight(v) : 1;
    }
    /* f(i, x[i]) for every D-th element from i to end: the loads of eight are under way together. */
    template <int D, typename F> __device__ void each(int i, int end, F f) const {
        for (; i < end; i += 8 * D) {
            float v[8];
#pragma unroll
            for (int k = 0; k < 8; k++)
                v[k] = i + k * D < end ? x[i + k * D] : 0.f;
#pragma unroll
            for (int k = 0; k < 8; k++)
                if (i + k * D < end)
                    f(i + k * D, v[k]);
        }
    }
};

/* Buckets of values by their distance from the best, and parts of one bucket in the same way. */
struct draw_scale {
    float max, scale;
    int where; /* the bucket whose parts are looked at, -1 = all buckets */

    static __device__ int clamp(float d) { return (int)fminf(d, (float)(N_BUCKET - 1)); }
    /* -1: in another bucket */
    __device__ int bucket(float v) const {
        const float d = (max - v) * scale;
        if (where < 0)
            return clamp(d);
        return clamp(d) == where ? clamp((d - (float)where) * N_BUCKET) : -1;
    }
};

/* s->bucket: what the values of the whole row add in each bucket. */
static __device__ void fill_buckets(draw_state *s, const draw_row &r, const draw_scale &by, bool mass) {
    const int tid = threadIdx.x;
    s->bucket[tid] = s->bucket[tid + DRAW_THREADS] = 0;
    __syncthreads();
    r.each<DRAW_THREADS>(r.from + tid, r.to, [&](int i, float x) {
        const uint64_t v = r.value(i, x, mass);
        const int b = by.bucket(x);
        if (v && b >= 0)
            atomicAdd(&s->bucket[b], (unsigned long long)v);
    });
    row_sync();
    unsigned long long low = 0, high = 0;
    for (int b = 0; b < (int)gridDim.x; b++) {
        low += *of_block(&s->bucket[tid], b);
        high += *of_block(&s->bucket[tid + DRAW_THREADS], b);
    }
    row_sync();
    s->bucket[tid] = low;
    s->bucket[tid + DRAW_THREADS] = high;
    __syncthreads();
}

static __device__ uint64_t sum_of_row(draw_state *s, uint64_t v) {
    uint64_t all;
    sum_before(v, s->part, &all);
    if (threadIdx.x == 0)
        s->sum = all;
    row_sync();
    all = 0;
    for (int b = 0; b < (int)gridDim.x; b++)
        all += *of_block(&s->sum, b);
    row_sync();
    return all;
}

/* The last element, best first, of the fewest that number k or, with k = 0, weigh `share` of all: everything from it on
 * up is kept. */
static __device__ uint64_t select_cut(draw_state *s, const draw_row &r, int k, float share) {
    const int tid = threadIdx.x;
    const bool mass = k == 0;
    draw_scale by = {r.max, mass ? r.inv_t * 64.f : 64.f, -1};
    uint64_t target = (uint64_t)k;
    int where = -1;
    for (int level = 0; level < 2; level++) {
        by.where = where;
        fill_buckets(s, r, by, mass);
        const uint64_t low = s->bucket[2 * tid], own = low + s->bucket[2 * tid + 1];
        uint64_t all, before = sum_before(own, s->part, &all);
        if (mass && level == 0) {
            target = (uint64_t)((double)all * share);
            target = target ? target : 1;
        }
        if (level == 0 && all < target) /* a mask leaves fewer */
            return 0;
        if (before < target && target <= before + own) {
            const bool second = before + low < target;
            s->where = 2 * tid + second;
            s->sum = before + (second ? low : 0);
        }
        if (tid == 0)
            s->n_list = 0;
        __syncthreads();
        where = s->where;
        target -= s->sum;
        __syncthreads();
    }
    r.each<DRAW_THREADS>(r.from + tid, r.to, [&](int i, float x) {
        if (by.bucket(x) == where && r.value(i, x, mass)) {
            const int at = atomicAdd(&s->n_list, 1);
            if (at < N_LIST)
                s->list[at] = order_of(x, i);
        }
    });
    row_sync();
    bool fits = true;
    for (int b = 0; b < (int)gridDim.x; b++)
        fits &= *of_block(&s->n_list, b) <= N_LIST;
    if (fits) {
        for (int at = tid; at < s->n_list; at += DRAW_THREADS) {
            const uint64_t own = s->list[at], v = mass ? r.weight(value_of(own)) : 1;
            uint64_t before = 0;
            for (int b = 0; b < (int)gridDim.x; b++)
                for (int j = 0; j < *of_block(&s->n_list, b); j++) {
                    const uint64_t o = *of_block(&s->list[j], b);
                    before += o <= own ? 0 : mass ? r.weight(value_of(o)) : 1;
                }
            if (before < target && target <= before + v)
                for (int b = 0; b < (int)gridDim.x; b++)
                    *of_block(&s->cut, b) = own;
        }
        row_sync();
        return s->cut;
    }
    uint64_t lo = 0, hi = ~0ull; /* many equal values: halve the range of orders */
    while (lo < hi) {
        const uint64_t mid = lo + (hi - lo) / 2 + 1;
        uint64_t sum = 0;
        r.each<DRAW_THREADS>(r.from + tid, r.to, [&](int i, float x) {
            if (by.bucket(x) == where && order_of(x, i) >= mid)
                sum += r.value(i, x, mass);
        });
        if (sum_of_row(s, sum) >= target)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

/* ---- log-probabilities ---- */

/* exp of values <= 0, to the bit as engine/softmax.h has it. */
static __device__ __forceinline__ float exp_neg(float x) {
    const float round = 12582912.f, clamped = fmaxf(x, -200.f);
    const float shifted = __fadd_rn(__fmul_rn(clamped, 1.44269504f), round), k = __fsub_rn(shifted, round);
    const float r = __fsub_rn(__fsub_rn(clamped, __fmul_rn(k, 0.693359375f)), __fmul_rn(k, -2.12194440e-4f));
    float p = __fadd_rn(__fmul_rn(r, 1.9875691e-4f), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666666e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001e-1f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.f);
    return __fmul_rn(p, __int_as_float(max(__float_as_int(shifted) - 0x4b400000 + 127, 0) << 23));
}

/* Sum of exp(x - max), for the first thread of the first block: 16 lanes for 256 values, then in order. */
static __device__ double sum_exp(draw_state *s, const draw_row &r) {
    const int lane = threadIdx.x % 16, n_warp = DRAW_THREADS / 32, n_part = (r.n + 255) / 256;
    double all = 0;
    for (int first = 0; first < n_part; first += DRAW_THREADS) {
        const int end = min(n_part, first + DRAW_THREADS);
        for (int two = first + 2 * (blockIdx.x * n_warp + threadIdx.x / 32); two < end; two += 2 * gridDim.x * n_warp) {
            const int part = two + threadIdx.x % 32 / 16;
            float v[16], sum = 0;
#pragma unroll
            for (int k = 0; k < 16; k++) {
                const int i = part * 256 + k * 16 + lane;
                v[k] = i < r.n ? r.x[i] : -INFINITY;
            }
#pragma unroll
            for (int k = 0; k < 16; k++)
                sum = __fadd_rn(sum, exp_neg(__fsub_rn(v[k], r.max)));
            sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, 8, 16));
            sum = __fadd_rn(sum, __shfl_down_sync(~0u, sum, 4, 16));
            const double pair = (double)sum + (double)__shfl_down_sync(~0u, sum, 1, 16);
            const double both = pair + __shfl_down_sync(~0u, pair, 2, 16);
            if (lane == 0 && part < end)
                *of_block(&s->chunk[part - first], 0) = (uint64_t)__double_as_longlong(both);
        }
        row_sync();
        if (blockIdx.x == 0 && threadIdx.x == 0)
            for (int c = 0; c < end - first; c++)
                all += __longlong_as_double((int64_t)s->chunk[c]);
        row_sync();
    }
    return all;
}

static __device__ void tell_likely(draw_state *s, const draw_row &r, int n_top, be_likely *to) {
    const int tid = threadIdx.x;
    const double sum = sum_exp(s, r);
    if (n_top > 0) {
        const uint64_t cut = select_cut(s, r, n_top, 0);
        if (tid == 0)
            s->n_list = 0;
        row_sync();
        r.each<DRAW_THREADS>(r.from + tid, r.to, [&](int i, float x) {
            if (order_of(x, i) >= cut)
                *of_block(&s->list[atomicAdd(of_block(&s->n_list, 0), 1)], 0) = order_of(x, i);
        });
        row_sync();
    }
    if (blockIdx.x > 0)
        return;
    if (tid == 0) {
        to->max = r.max;
        to->sum = sum;
    }
    if (tid < n_top) {
        const uint64_t own = s->list[tid];
        int at = 0;
        for (int j = 0; j < n_top; j++)
            at += s->list[j] > own;
        to->top_id[at] = id_of(own);
        to->top[at] = value_of(own);
    }
}

/* ---- bias and penalties, by the first block ---- */

static __device__ float edited(float v, const be_edit &e, const be_sample &p) {
    v = __fadd_rn(v, e.bias);
    if (!p.penalties)
        return v;
    if (e.in_prompt || e.n_new > 0)
        v = v > 0.f ? __fdiv_rn(v, p.repetition) : __fmul_rn(v, p.repetition);
    if (e.n_new > 0)
        v = __fsub_rn(v, __fadd_rn(p.presence, __fmul_rn(p.frequency, (float)e.n_new)));
    return v;
}

/* Each entry keeps in `bias` what it changes. unseen: a token more that was generated, or -1. */
static __device__ void edit(draw_state *s, float *x, const be_sample &p, int unseen) {
    be_edit *list = (be_edit *)p.edit;
    bool listed = unseen < 0;
    for (int k = threadIdx.x; k < p.n_edit; k += DRAW_THREADS) {
        be_edit e = list[k];
        listed |= e.id == unseen;
        e.n_new += e.id == unseen;
        const float was = x[e.id];
        x[e.id] = edited(was, e, p);
        list[k].bias = was;
    }
    listed = __syncthreads_or(listed);
    if (threadIdx.x > 0)
        return;
    s->changed = listed ? -1 : unseen;
    if (!listed) {
        s->was = x[unseen];
        x[unseen] = edited(s->was, be_edit{unseen, 0.f, 1, false}, p);
    }
}

static __device__ void take_back(const draw_state *s, float *x, const be_sample &p) {
    for (int k = threadIdx.x; k < p.n_edit; k += DRAW_THREADS)
        x[p.edit[k].id] = p.edit[k].bias;
    if (threadIdx.x == 0 && s->changed >= 0)
        x[s->changed] = s->was;
    __syncthreads();
}

static __device__ const uint32_t *take_mask(draw_state *s, const draw_row &r, const uint32_t *mask) {
    for (int w = threadIdx.x; w < (r.to - r.from + 31) / 32; w += DRAW_THREADS)
        s->mask[w] = mask[r.from / 32 + w];
    return s->mask;
}

static __device__ uint64_t best_of_row(draw_state *s, const draw_row &r) {
    uint64_t top = 0;
    r.each<DRAW_THREADS>(r.from + threadIdx.x, r.to, [&](int i, float x) {
        const uint64_t o = r.allows(i) ? order_of(x, i) : 0;
        top = o > top ? o : top;
    });
    top = max_of_block(top, s->part);
    if (threadIdx.x == 0)
        s->cut = top;
    row_sync();
    for (int b = 0; b < (int)gridDim.x; b++) {
        const uint64_t o = *of_block(&s->cut, b);
        top = o > top ? o : top;
    }
    row_sync();
    return top;
}

/* ---- the draw ---- */

/* The first block's s->chunk: sums of the kept weights of r.per consecutive ids each. */
static __device__ void sum_chunks(draw_state *s, const draw_row &r) {
    const int lane = threadIdx.x % 32, n_warp = DRAW_THREADS / 32, n = DRAW_THREADS / gridDim.x, first = blockIdx.x * n;
    for (int c = first + threadIdx.x / 32; c < first + n; c += n_warp) {
        uint64_t sum = 0;
        r.each<32>(c * r.per + lane, min(r.n, (c + 1) * r.per), [&](int i, float v) { sum += r.value(i, v, true); });
#pragma unroll
        for (int d = 16; d; d >>= 1)
            sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0)
            *of_block(&s->chunk[c], 0) = sum;
    }
    row_sync();
}

/* By one block: the first id, in order, whose weight and those before it exceed the number drawn. */
static __device__ int draw_among(draw_state *s, draw_row r, const be_sample &p) {
    const int tid = threadIdx.x;
    uint32_t w[4];
    uint64_t sum, own = s->chunk[tid], before = sum_before(own, s->part, &sum);
    philox(p.seed, p.draw, w);
    const uint64_t bits = ((uint64_t)w[1] << 32 | w[0]) >> 11;
    uint64_t goal = (uint64_t)((double)bits * 0x1p-53 * (double)sum);
    goal = goal < sum ? goal : sum - 1;
    if (before <= goal && goal < before + own) {
        s->where = tid;
        s->sum = before;
    }
    __syncthreads();
    const int first = s->where * r.per, end = min(r.n, first + r.per), owner = s->where / (DRAW_THREADS / gridDim.x);
    goal -= s->sum;
    if (r.mask)
        r.mask = of_block(s->mask, owner);
    r.from = owner * (DRAW_THREADS / gridDim.x) * r.per;
    for (int i = first; i < end; i += DRAW_THREADS) {
        own = i + tid < end ? r.value(i + tid, r.x[i + tid], true) : 0;
        before = sum_before(own, s->part, &sum);
        if (before <= goal && goal < before + own)
            s->where = i + tid;
        goal -= sum; /* beyond every sum once it is found */
    }
    __syncthreads();
    return s->where;
}

/* The id, for the first block. top: the best. */
static __device__ int draw(draw_state *s, draw_row &r, const be_sample &p, uint64_t top) {
    r.max = value_of(top);
    r.inv_t = 1.f / p.temperature;
    if (!isfinite(r.max))
        return -1;
    if (p.temperature <= 0.f || p.top_k == 1 || p.top_p <= 0.f || !isfinite(r.inv_t))
        return id_of(top);
    if (p.top_k > 0 && p.top_k < r.n)
        r.cut = select_cut(s, r, p.top_k, 0);
    if (p.top_p < 1.f)
        r.cut = select_cut(s, r, 0, p.top_p);
    r.min_p = p.min_p;
    sum_chunks(s, r);
    return blockIdx.x ? -1 : draw_among(s, r, p);
}

static __global__ __launch_bounds__(DRAW_THREADS) void draw_kernel(cuda_arrays a, float *logits, int n,
                                                                   const uint64_t *best) {
    extern __shared__ __align__(16) uint8_t shared[];
    draw_state *s = (draw_state *)shared;
    pdl_launch();
    row_sync(); /* the others' shared memory is there */
    pdl_wait();
    const int row = blockIdx.y, tid = threadIdx.x, at = a.batch->id_part * a.max_id + row;
    if (row >= a.batch->n_out)
        return;
    const be_sample p = a.sample[row];
    uint64_t top = max_of_block(tid < CUDA_SAMPLE_PARTS ? best[row * CUDA_SAMPLE_PARTS + tid] : 0, s->part);
    const int per = (n + DRAW_THREADS - 1) / DRAW_THREADS, share = per * (DRAW_THREADS / gridDim.x);
    const int from = min(n, (int)blockIdx.x * share);
    float *x = logits + (int64_t)row * n;
    draw_row r = {x, n, per, from, min(n, from + share), value_of(top), 0, 0, 0, NULL};
    const bool likely = p.likely && isfinite(r.max);
    if (likely)
        tell_likely(s, r, p.n_top, &a.likely[at]);
    int id = isfinite(r.max) ? p.id : -1;
    if (!p.given) {
        const int unseen = p.penalties ? a.unseen[row] : -1;
        const bool edits = isfinite(r.max) && (p.n_edit > 0 || unseen >= 0), masked = isfinite(r.max) && p.mask;
        if (edits && blockIdx.x == 0)
            edit(s, x, p, unseen);
        if (masked)
            r.mask = take_mask(s, r, p.mask);
        if (edits || masked) {
            row_sync();
            top = best_of_row(s, r);
        }
        id = draw(s, r, p, top);
        if (edits && blockIdx.x == 0)
            take_back(s, x, p);
        if (masked)
            row_sync(); /* the first block has read the others' masks */
    }
    if (blockIdx.x == 0 && tid == 0) {
        a.id[row] = a.host_id[at] = id;
        if (likely && id >= 0)
            a.likely[at].logit = x[id];
    }
}

/* As many blocks for each row as run at once. */
static unsigned draw_blocks(const cuda_dev *d, unsigned rows) {
    unsigned blocks = d->major >= 9 ? DRAW_BLOCKS : 1;
    while (blocks > 1 && rows * blocks > DRAW_AT_ONCE)
        blocks /= 2;
    return blocks;
}

void cuda_run_sample(cuda_run *r, const cuda_cmd *c) {
    const int n = (int)c->x->base.width;
    const unsigned rows = (unsigned)r->shape.outs, blocks = draw_blocks(r->dev, rows);
    uint64_t *best = r->dev->scratch.best;
    cuda_launch(r, best_kernel, dim3(CUDA_SAMPLE_PARTS, rows), dim3(256), 0, r->dev->arr, (const float *)c->x->f32, n,
                best);
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(draw_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(draw_state));
    cuda_launch_clusters(r, draw_kernel, dim3(blocks, rows), blocks, dim3(DRAW_THREADS), sizeof(draw_state),
                         r->dev->arr, c->x->f32, n, (const uint64_t *)best);
}
