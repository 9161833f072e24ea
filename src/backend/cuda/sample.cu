/* backend/cuda/sample.cu: from logits to ids on the device.
 *
 * Greedy: parts of the vocabulary find their best, one block takes the best of them. Otherwise that block draws:
 * weights exp((x - max) / T) are integers of 2^-40, so that sums have no order; top-k and top-p look for the last value
 * kept in the order (larger value, lower id), first its bucket of a histogram, then itself among the bucket's members.
 * The draw is Philox(seed, draw) against the kept weights in order of id. */
#include "backend/cuda/cuda.h"
#include "quant/fragment.cuh"

#define DRAW_THREADS 1024
#define N_BUCKET 2048
#define N_LIST 2048
#define N_CHUNK 512

/* Order of values as unsigned integers, NaN above all; the id below makes it total, lower ids first among equals. */
static __device__ __forceinline__ uint64_t order_of(float x, int id) {
    const uint32_t u = x != x ? 0x7FFFFFFFu : __float_as_uint(x);
    return (uint64_t)(u & 0x80000000u ? ~u : u | 0x80000000u) << 32 | (uint32_t)~id;
}
static __device__ __forceinline__ int id_of(uint64_t order) { return (int)~(uint32_t)order; }

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

static __device__ uint64_t sum_of_block(uint64_t v, uint64_t *part) {
#pragma unroll
    for (int d = 16; d; d >>= 1)
        v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++)
        v += part[w];
    __syncthreads();
    return v;
}

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

struct draw_state { /* of one row, in shared memory */
    unsigned long long bucket[N_BUCKET];
    uint64_t list[N_LIST];
    uint64_t chunk[N_CHUNK], part[32], cut, sum;
    int n_list, where;
};

struct draw_row {
    const float *x;
    int n;
    float max, inv_t, min_p;
    uint64_t cut; /* orders below it are out */

    __device__ uint64_t weight(float v) const {
        const float w = expf((v - max) * inv_t);
        return w >= min_p ? (uint64_t)(w * 1099511627776.f) : 0;
    }
    /* What element i adds: its weight, or one; 0 when it is out. */
    __device__ uint64_t value(int i, bool mass) const {
        const float v = x[i];
        if (order_of(v, i) < cut)
            return 0;
        return mass ? weight(v) : 1;
    }
    __device__ int bucket(float v) const { return (int)fminf((max - v) * inv_t * 64.f, (float)(N_BUCKET - 1)); }
};

/* The last element, best first, of the fewest whose values reach target (1 .. their sum): everything from it on up is
 * kept. */
static __device__ uint64_t select_cut(draw_state *s, const draw_row &r, bool mass, uint64_t target) {
    const int tid = threadIdx.x;
    for (int b = tid; b < N_BUCKET; b += DRAW_THREADS)
        s->bucket[b] = 0;
    if (tid == 0)
        s->n_list = 0;
    __syncthreads();
    for (int i = tid; i < r.n; i += DRAW_THREADS) {
        const uint64_t v = r.value(i, mass);
        if (v)
            atomicAdd(&s->bucket[r.bucket(r.x[i])], (unsigned long long)v);
    }
    __syncthreads();
    if (tid < 32) { /* each lane 64 buckets */
        uint64_t mine = 0, sum;
        for (int b = 0; b < N_BUCKET / 32; b++)
            mine += s->bucket[tid * (N_BUCKET / 32) + b];
        sum = mine;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const uint64_t o = __shfl_up_sync(~0u, sum, d);
            sum += tid >= d ? o : 0;
        }
        uint64_t before = sum - mine;
        if (before < target && target <= sum)
            for (int b = 0; b < N_BUCKET / 32; b++) {
                const uint64_t v = s->bucket[tid * (N_BUCKET / 32) + b];
                if (before + v >= target) {
                    s->where = tid * (N_BUCKET / 32) + b;
                    s->sum = before;
                    break;
                }
                before += v;
            }
    }
    __syncthreads();
    const int where = s->where;
    target -= s->sum;
    for (int i = tid; i < r.n; i += DRAW_THREADS)
        if (r.bucket(r.x[i]) == where && r.value(i, mass)) {
            const int at = atomicAdd(&s->n_list, 1);
            if (at < N_LIST)
                s->list[at] = order_of(r.x[i], i);
        }
    __syncthreads();
    if (s->n_list <= N_LIST) {
        for (int k = tid; k < s->n_list; k += DRAW_THREADS) {
            const uint64_t own = s->list[k], v = r.value(id_of(own), mass);
            uint64_t before = 0;
            for (int j = 0; j < s->n_list; j++)
                if (s->list[j] > own)
                    before += r.value(id_of(s->list[j]), mass);
            if (before < target && target <= before + v)
                s->cut = own;
        }
        __syncthreads();
        return s->cut;
    }
    uint64_t lo = 0, hi = ~0ull; /* many equal values: halve the range of orders */
    while (lo < hi) {
        const uint64_t mid = lo + (hi - lo) / 2 + 1;
        uint64_t sum = 0;
        for (int i = tid; i < r.n; i += DRAW_THREADS)
            if (r.bucket(r.x[i]) == where && order_of(r.x[i], i) >= mid)
                sum += r.value(i, mass);
        if (sum_of_block(sum, s->part) >= target)
            lo = mid;
        else
            hi = mid - 1;
    }
    return lo;
}

/* Sum of the kept weights, by chunks of `per` consecutive ids. */
static __device__ uint64_t sum_chunks(draw_state *s, const draw_row &r, int per) {
    const int lane = threadIdx.x % 32;
    uint64_t all = 0;
    for (int c = threadIdx.x / 32; c * per < r.n; c += DRAW_THREADS / 32) {
        uint64_t sum = 0;
        for (int i = c * per + lane; i < min(r.n, (c + 1) * per); i += 32)
            sum += r.value(i, true);
#pragma unroll
        for (int d = 16; d; d >>= 1)
            sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0)
            s->chunk[c] = sum;
        all += lane == 0 ? sum : 0;
    }
    return sum_of_block(all, s->part);
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
    pdl_wait();
    const int row = blockIdx.x, tid = threadIdx.x;
    if (row >= a.batch->n_out)
        return;
    const be_sample p = a.sample[row];
    const uint64_t top = max_of_block(tid < CUDA_SAMPLE_PARTS ? best[row * CUDA_SAMPLE_PARTS + tid] : 0, s->part);
    const float max = logits[(int64_t)row * n + id_of(top)];
    if (p.temperature <= 0.f || p.top_k == 1 || p.top_p <= 0.f || !isfinite(1.f / p.temperature) || !isfinite(max)) {
        if (tid == 0)
            answer(a, row, isfinite(max) ? id_of(top) : -1);
        return;
    }
    draw_row r = {logits + (int64_t)row * n, n, max, 1.f / p.temperature, 0, 0};
    const int per = (n + N_CHUNK - 1) / N_CHUNK;
    if (p.top_k > 0 && p.top_k < n)
        r.cut = select_cut(s, r, false, (uint64_t)p.top_k);
    if (p.top_p < 1.f) {
        const uint64_t sum = sum_chunks(s, r, per);
        const uint64_t target = (uint64_t)((double)sum * (p.top_p > 0.f ? p.top_p : 0.f));
        r.cut = select_cut(s, r, true, target ? target : 1);
    }
    r.min_p = p.min_p;
    const uint64_t sum = sum_chunks(s, r, per);
    if (tid == 0) {
        uint32_t w[4];
        philox(p.seed, p.draw, w);
        const uint64_t bits = ((uint64_t)w[1] << 32 | w[0]) >> 11;
        uint64_t goal = (uint64_t)((double)bits * 0x1p-53 * (double)sum);
        goal = goal < sum ? goal : sum - 1;
        int c = 0, id = id_of(top);
        while ((c + 1) * per < n && goal >= s->chunk[c])
            goal -= s->chunk[c++];
        for (int i = c * per; i < n && i < (c + 1) * per; i++) {
            const uint64_t v = r.value(i, true);
            if (goal < v) {
                id = i;
                break;
            }
            goal -= v;
        }
        answer(a, row, id);
    }
}

void cuda_run_sample(cuda_run *r, const cuda_cmd *c) {
    const int n = (int)c->x->base.width;
    const unsigned rows = (unsigned)r->shape.outs;
    uint64_t *best = r->dev->scratch.best;
    cuda_launch(r, best_kernel, dim3(CUDA_SAMPLE_PARTS, rows), dim3(256), 0, r->dev->arr, (const float *)c->x->f32, n,
                best);
    cuda_launch(r, draw_kernel, dim3(rows), dim3(DRAW_THREADS), sizeof(draw_state), r->dev->arr,
                (const float *)c->x->f32, n, (const uint64_t *)best);
}
