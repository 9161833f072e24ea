/* backend/cuda/sample.cu: from logits to ids on the device.
 *
 * Greedy: parts of the vocabulary find their best, one block takes the best of them. Otherwise the blocks of a row draw
 * together: weights exp((x - max) / T) are integers of 2^-40, so that sums have no order and ids do not depend on how
 * many blocks there are; top-k and top-p look for the last value kept in the order (larger value, lower id), first its
 * bucket of a histogram, then its part of that bucket, then itself among what is in there. The draw is
 * Philox(seed, draw) against the kept weights in order of id. */
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
    int n_list, where;
};

struct draw_row {
    const float *x;
    int n, from, to; /* this block's share of the n values */
    float max, inv_t, min_p;
    uint64_t cut; /* orders below it are out */

    __device__ uint64_t weight(float v) const {
        const float w = expf((v - max) * inv_t);
        return w >= min_p ? (uint64_t)(w * 1099511627776.f) : 0;
    }
    /* What element i, which is v, adds: its weight, or one; 0 when it is out. */
    __device__ uint64_t value(int i, float v, bool mass) const {
        if (order_of(v, i) < cut)
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

/* The first block's s->chunk: sums of the kept weights of `per` consecutive ids each. */
static __device__ void sum_chunks(draw_state *s, const draw_row &r, int per) {
    const int lane = threadIdx.x % 32, n_warp = DRAW_THREADS / 32;
    for (int c = blockIdx.x * n_warp + threadIdx.x / 32; c < DRAW_THREADS; c += gridDim.x * n_warp) {
        uint64_t sum = 0;
        r.each<32>(c * per + lane, min(r.n, (c + 1) * per), [&](int i, float v) { sum += r.value(i, v, true); });
#pragma unroll
        for (int d = 16; d; d >>= 1)
            sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0)
            *of_block(&s->chunk[c], 0) = sum;
    }
    row_sync();
}

/* By one block: the first id, in order, whose weight and those before it exceed the number drawn. */
static __device__ int draw_among(draw_state *s, const draw_row &r, int per, const be_sample &p) {
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
    const int first = s->where * per, end = min(r.n, first + per);
    goal -= s->sum;
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

static __device__ void answer(const cuda_arrays &a, int row, int id) {
    a.id[row] = id;
    a.host_id[a.batch->id_part * a.max_id + row] = id;
}

static __global__ __launch_bounds__(DRAW_THREADS) void draw_kernel(cuda_arrays a, const float *logits, int n,
                                                                   const uint64_t *best) {
    extern __shared__ __align__(16) uint8_t shared[];
    draw_state *s = (draw_state *)shared;
    pdl_launch();
    row_sync(); /* the others' shared memory is there */
    pdl_wait();
    const int row = blockIdx.y, tid = threadIdx.x;
    if (row >= a.batch->n_out)
        return;
    const be_sample p = a.sample[row];
    const uint64_t top = max_of_block(tid < CUDA_SAMPLE_PARTS ? best[row * CUDA_SAMPLE_PARTS + tid] : 0, s->part);
    const float max = value_of(top);
    if (p.temperature <= 0.f || p.top_k == 1 || p.top_p <= 0.f || !isfinite(1.f / p.temperature) || !isfinite(max)) {
        if (blockIdx.x == 0 && tid == 0)
            answer(a, row, isfinite(max) ? id_of(top) : -1);
        return;
    }
    const int share = (n + gridDim.x - 1) / gridDim.x, per = (n + DRAW_THREADS - 1) / DRAW_THREADS;
    const int from = min(n, (int)blockIdx.x * share);
    draw_row r = {logits + (int64_t)row * n, n, from, min(n, from + share), max, 1.f / p.temperature, 0, 0};
    if (p.top_k > 0 && p.top_k < n)
        r.cut = select_cut(s, r, p.top_k, 0);
    if (p.top_p < 1.f)
        r.cut = select_cut(s, r, 0, p.top_p);
    r.min_p = p.min_p;
    sum_chunks(s, r, per);
    if (blockIdx.x > 0)
        return;
    const int id = draw_among(s, r, per, p);
    if (tid == 0)
        answer(a, row, id);
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
    cuda_launch_clusters(r, draw_kernel, dim3(blocks, rows), blocks, dim3(DRAW_THREADS), sizeof(draw_state),
                         r->dev->arr, (const float *)c->x->f32, n, (const uint64_t *)best);
}
