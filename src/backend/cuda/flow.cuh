/* backend/cuda/flow.cuh: Q8_0 matrices times 17 to 128 rows on Hopper: the bits of linear.cuh's kernels, by wgmma.
 *
 * A block computes items of 64 MG matrix rows and up to 64 rows of activations. Its four groups of four warps take 64
 * matrix rows each, or KG of them share 64: they take the segments in turn, and each adds its sums to those of the
 * segments before. A ring in shared memory holds a segment of both operands in each stage: one warp fills it with
 * weights, as soon as the block is there, another with rows of activations, which lie in wide.cuh's order. */
#ifndef ORCD_BACKEND_CUDA_FLOW_CUH
#define ORCD_BACKEND_CUDA_FLOW_CUH

#include "backend/cuda/wide.cuh"

#define FLOW_COLS 64     /* rows of activations of an item, at most */
#define FLOW_THREADS 640 /* 16 warps that multiply, one that asks for weights, one that asks for rows */
#define FLOW_SHARED (226 * 1024)

/* F: form of the weights, SEG units in each of N_SEG segments. */
template <class F, int SEG_, int N_SEG_, int KG_> struct flow_plan {
    using form = F;
    static constexpr int SEG = SEG_, N_SEG = N_SEG_, KG = KG_, MG = 4 / KG, TILES = 4 * MG,
                         MOST = KG == 1 ? 48 : FLOW_COLS;                   /* rows for which there are registers */
    static constexpr int W_TILE = SEG * F::CHUNK, W_BYTES = TILES * W_TILE; /* of a stage */
    static __host__ __device__ __forceinline__ int sums_bytes(int cols) { return KG > 1 ? MG * cols * 64 * 4 : 0; }
    static __host__ __device__ __forceinline__ int stages(int cols) {
        return (FLOW_SHARED - 1024 - sums_bytes(cols)) / (W_BYTES + SEG * cols * 128 + 16);
    }
};

#ifdef HAVE_WGMMA
/* Addresses in shared memory; the stage that a warp has reached. */
struct flow_ring {
    uint32_t x, w, full, empty;
    const uint8_t *w_ptr;
    int x_bytes, n_stage, stage;
    uint32_t parity;
    __device__ __forceinline__ void next(int by) {
        stage += by;
        if (stage >= n_stage)
            stage -= n_stage, parity ^= 1;
    }
};

/* The block's items, one after the other; those of the same weights are neighbours. cols: rows of an item. */
template <class P> struct flow_items {
    const lin_args &a;
    int cols, item, n_item, n_cols;
    __device__ __forceinline__ flow_items(const wide_args &w) : a(w.l), cols(w.cols), item(blockIdx.x) {
        n_cols = (a.rows.cap + cols - 1) / cols;
        n_item = (a.n_tile + P::TILES - 1) / P::TILES * n_cols;
    }
    __device__ __forceinline__ bool more() const { return item < n_item; }
    __device__ __forceinline__ void next() { item += gridDim.x; }
    __device__ __forceinline__ int tile() const { return item / n_cols * P::TILES; }
    __device__ __forceinline__ int first() const { return item % n_cols * cols; }
    /* Rows as they lie in a stage: the bucket's, whether the batch has them or not, which is not known at once. */
    __device__ __forceinline__ int rows() const { return min(cols, (a.rows.cap - first() + 7) & ~7); }
};

template <class P> static __device__ __forceinline__ void flow_ask_weights(const wide_args &a, flow_ring r) {
    const int lane = threadIdx.x % 32;
    for (flow_items<P> i(a); i.more(); i.next()) {
        const uint8_t *w = a.l.w + (int64_t)min(i.tile() + lane % P::TILES, a.l.n_tile - 1) * (P::N_SEG * P::W_TILE);
        for (int s = 0; s < P::N_SEG; s++, w += P::W_TILE) {
            const uint32_t full = r.full + 8 * r.stage;
            mbar_wait(r.empty + 8 * r.stage, r.parity ^ 1);
            if (lane == 0)
                mbar_expect(full, P::W_BYTES);
            __syncwarp();
            if (lane < P::TILES)
                bulk_copy(r.w + r.stage * P::W_BYTES + lane * P::W_TILE, w, P::W_TILE, full);
            r.next(1);
        }
    }
}

template <class P> static __device__ __forceinline__ void flow_ask_rows(const wide_args &a, flow_ring r) {
    const int lane = threadIdx.x % 32;
    for (flow_items<P> i(a); i.more(); i.next()) {
        const uint32_t bytes = (uint32_t)i.rows() * 128;
        const uint8_t *x = a.x + (lane % P::SEG * a.ldx + i.first()) * 128;
        for (int s = 0; s < P::N_SEG; s++, x += P::SEG * a.ldx * 128) {
            const uint32_t full = r.full + 8 * r.stage;
            mbar_wait(r.empty + 8 * r.stage, r.parity ^ 1);
            if (lane == 0)
                mbar_expect(full, P::SEG * bytes);
            __syncwarp();
            if (lane < P::SEG)
                bulk_copy(r.x + r.stage * r.x_bytes + lane * bytes, x, bytes, full);
            r.next(1);
        }
    }
}

/* A block of 32 columns of a tile. */
struct flow_raw {
    uint4 q;
    uint32_t s;
    __device__ __forceinline__ void load(const uint8_t *block) {
        q = *(const uint4 *)(block + threadIdx.x % 32 * 16);
        s = *(const uint32_t *)(block + 512 + threadIdx.x % 32 / 4 * 4);
    }
    template <class F> __device__ __forceinline__ frag_block unpack() const {
        typename F::raw r = {};
        r.q[0] = q, r.s[0] = s;
        return F::block(r, 0);
    }
};

/* acc = the sums of a segment, of which w and desc are the weights and the activations. */
template <class F, int N, int SEG>
static __device__ __forceinline__ void flow_segment(const uint8_t *w, uint64_t desc, float (&acc)[N / 2]) {
    float c[N / 2], scale[2];
    flow_raw raw;
    raw.load(w);
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        acc[i] = 0;
#pragma unroll
    for (int i = 0; i < 2 * SEG; i++) {
        const frag_block f = raw.unpack<F>();
        if (i + 1 < 2 * SEG)
            raw.load(w + (i + 1) * (F::CHUNK / 2));
        if (i) {
            wgmma_wait<0>(c);
            wide_scale(acc, c, scale);
        }
        scale[0] = f.s[0], scale[1] = f.s[1];
        wide_issue<N>(c, f.a, desc + i / 2 * (N * 8) + i % 2 * 4);
    }
    wgmma_wait<0>(c);
    wide_scale(acc, c, scale);
}

/* acc += the sums of the segments before, and is left for the next: [four values][thread of the group]. */
template <int N>
static __device__ __forceinline__ void flow_add(float4 *sums, bool first, bool last, float (&acc)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 8; i++) {
        float4 v = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        if (!first) {
            const float4 old = sums[i * 128];
            v = make_float4(old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w);
        }
        if (!last)
            sums[i * 128] = v;
        acc[4 * i] = v.x, acc[4 * i + 1] = v.y, acc[4 * i + 2] = v.z, acc[4 * i + 3] = v.w;
    }
}

/* Results: rows g and g + 8 of a tile, which are a pair where q, k and v are rotated. What is read is read at
 * once. */
template <int N>
static __device__ __forceinline__ void flow_put(const lin_args &a, const lin_cols &c, int tile, int lane,
                                                const float (&bias)[2], const float (&total)[N / 2]) {
    const int g = lane >> 2, t = lane & 3, row[2] = {lin_row(a, tile, g), lin_row(a, tile, g + 8)};
    const bool add = a.epilogue == BE_EPI_ADD, rope = a.rope && row[0] < a.n_rope;
    const int first = c.first + 2 * t, n = c.n - 2 * t;
    float *const y = a.y + (int64_t)first * a.ldy + a.row0;
    uint16_t *const yh = a.yh ? a.yh + (int64_t)first * a.ldh + a.row0 : NULL;
    float2 with[N / 4]; /* what is there, or cos and sin; of columns 2t, 2t + 1 of each 8 */
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int col = j / 2 * 8 + j % 2;
        with[j] = make_float2(0, 0);
        if (rope && col < n)
            with[j] = a.rope[(first + col) * 64 + row[0] % 64];
        if (add && col < n && row[0] < a.n_row)
            with[j].x = y[col * a.ldy + row[0]];
        if (add && col < n && row[1] < a.n_row)
            with[j].y = y[col * a.ldy + row[1]];
    }
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int col = j / 2 * 8 + j % 2;
        float v[2];
#pragma unroll
        for (int q = 0; q < 2; q++) {
            v[q] = __fmul_rn(total[j / 2 * 4 + 2 * q + j % 2], a.factor);
            if (a.bias)
                v[q] += bias[q];
            if (add)
                v[q] = (q ? with[j].y : with[j].x) + v[q];
        }
        if (rope)
            rotate(v[0], v[1], with[j]);
#pragma unroll
        for (int q = 0; q < 2; q++)
            if (col < n && row[q] < a.n_row) {
                y[col * a.ldy + row[q]] = v[q];
                if (yh)
                    yh[col * a.ldh + row[q]] = f16_bits(v[q]);
            }
    }
}

/* A group of warps, of those that share matrix rows. */
struct flow_group {
    int warp, turn, turn_next; /* the warp's tile of an item; barriers of this group and of that whose turn is next */
    int seg;                   /* its next segment of the item */
    float4 *sums;              /* of the matrix rows */
    bool begun;                /* an item is done */
};

static __device__ __forceinline__ void flow_await_turn(int id) {
    asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory");
}
static __device__ __forceinline__ void flow_give_turn(int id) {
    asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory");
}

/* The group's segments of an item; more: another item follows. */
template <class P, int N>
static __device__ __forceinline__ void flow_item(const lin_args &a, const lin_cols &c, int tile, flow_ring &r,
                                                 flow_group &g, bool more) {
    using F = typename P::form;
    const int lane = threadIdx.x % 32;
    float total[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        total[i] = 0;
#pragma unroll 1
    for (; g.seg < P::N_SEG; g.seg += P::KG, r.next(P::KG)) {
        const bool first = g.seg == 0, last = g.seg == P::N_SEG - 1;
        float own[N / 2], (&acc)[N / 2] = P::KG == 1 ? own : total;
        mbar_wait(r.full + 8 * r.stage, r.parity);
        flow_segment<F, N, P::SEG>(r.w_ptr + r.stage * P::W_BYTES + g.warp * P::W_TILE,
                                   wgmma_desc(r.x + r.stage * r.x_bytes), acc);
        if (lane == 0)
            mbar_arrive(r.empty + 8 * r.stage);
        if (P::KG == 1) {
            wide_add(total, acc);
            continue;
        }
        if (!first || g.begun)
            flow_await_turn(g.turn);
        flow_add<N>(g.sums, first, last, acc);
        if (!last || more)
            flow_give_turn(g.turn_next);
    }
    const bool mine = g.seg - P::KG == P::N_SEG - 1;
    g.seg -= P::N_SEG;
    if (!mine)
        return;
    float bias[2];
    wide_bias<LIN_DENSE>(a, c.mat, tile + g.warp, lane, bias);
    flow_put<N>(a, c, tile + g.warp, lane, bias, total);
}

template <class P>
static __device__ __forceinline__ void flow_multiply(const wide_args &a, flow_ring r, uint8_t *sums, int warp) {
    const int group = warp / 4, k = group % P::KG, m = group / P::KG;
    flow_group g = {m * 4 + warp % 4,
                    1 + group,
                    1 + m * P::KG + (k + 1) % P::KG,
                    k,
                    (float4 *)(sums + m * a.cols * 256) + threadIdx.x % 128,
                    false};
    r.stage = k;
    for (flow_items<P> i(a); i.more(); i.next(), g.begun = true) {
        const int rows = i.rows();
        const lin_cols c = {0, i.first(), min(a.cols, count_rows(a.l.rows) - i.first())};
        const bool more = i.item + (int)gridDim.x < i.n_item;
#define FLOW_CASE(N)                                                                                                   \
    if constexpr (N <= P::MOST)                                                                                        \
        if (rows == N)                                                                                                 \
    flow_item<P, N>(a.l, c, i.tile(), r, g, more)
        FLOW_CASE(8);
        FLOW_CASE(16);
        FLOW_CASE(24);
        FLOW_CASE(32);
        FLOW_CASE(40);
        FLOW_CASE(48);
        FLOW_CASE(56);
        FLOW_CASE(64);
#undef FLOW_CASE
    }
}
#endif

template <class P>
static __global__ __launch_bounds__(FLOW_THREADS, 1) void flow_kernel(const __grid_constant__ wide_args a) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *base = shared + (-(uint32_t)__cvta_generic_to_shared(shared) & 1023);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    flow_ring r;
    r.n_stage = P::stages(a.cols);
    r.x_bytes = P::SEG * a.cols * 128;
    r.x = (uint32_t)__cvta_generic_to_shared(base);
    r.w_ptr = base + r.n_stage * r.x_bytes;
    r.w = r.x + r.n_stage * r.x_bytes;
    r.full = r.w + r.n_stage * P::W_BYTES + P::sums_bytes(a.cols);
    r.empty = r.full + 8 * r.n_stage;
    r.stage = 0;
    r.parity = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < r.n_stage; i++) {
            mbar_init(r.full + 8 * i, 2);
            mbar_init(r.empty + 8 * i, P::TILES);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    pdl_launch();
    if (warp >= 16) {
        set_registers_down<32>();
        if (warp == 16)
            flow_ask_weights<P>(a, r);
        pdl_wait();
        if (warp == 17)
            flow_ask_rows<P>(a, r);
    } else {
        set_registers_up<112>();
        pdl_wait();
        flow_multiply<P>(a, r, (uint8_t *)r.w_ptr + r.n_stage * P::W_BYTES, warp);
    }
#else
    (void)a;
#endif
}

template <class P> static void flow_launch(cuda_run *r, const wide_args &a, int items) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(flow_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, FLOW_SHARED);
    cuda_launch(r, flow_kernel<P>, dim3((unsigned)(items < r->dev->n_sm ? items : r->dev->n_sm)), dim3(FLOW_THREADS),
                (size_t)FLOW_SHARED, a);
}

template <int SEG, int N_SEG> static void flow_share(cuda_run *r, const wide_args &a, int share, int items) {
    if (share == 1)
        flow_launch<flow_plan<form_q8_0, SEG, N_SEG, 1>>(r, a, items);
    else if (share == 2)
        flow_launch<flow_plan<form_q8_0, SEG, N_SEG, 2>>(r, a, items);
    else
        flow_launch<flow_plan<form_q8_0, SEG, N_SEG, 4>>(r, a, items);
}

/* share: groups of warps with the same matrix rows, 0: other kernels are sooner done. cols: rows of an item. */
struct flow_way {
    int share, cols, items;
};
static inline flow_way flow_choose(const cuda_run *r, const cuda_weight *w, int rows, int epilogue) {
    static const int fixed[] = {0, 130, 70, 0, 20}; /* of an item's time, by the groups that share; a row's is 3 */
    const cuda_matrix *m = &w->matrix[0];
    const int n_sm = r->dev->n_sm,
              most = m->n_tile > 4 * n_sm ? 64 : PACK_MOST; /* the head's weights have other kernels */
    flow_way best = {0, 0, 0};
    if (!cuda_has_wide(r->dev) || w->n_matrix != 1 || m->form != CUDA_FORM_Q8_0 ||
        (m->n_unit != 45 && m->n_unit != 64) || (epilogue != BE_EPI_NONE && epilogue != BE_EPI_ADD) ||
        rows < PACK_LEAST || rows > most)
        return best;
    for (int share = 1, least = INT32_MAX; share <= 4; share *= 2)
        for (int cols = 8; cols <= (share == 1 ? 48 : FLOW_COLS); cols += 8) {
            const int tiles = 16 / share, items = (m->n_tile + tiles - 1) / tiles * ((rows + cols - 1) / cols);
            const int cost = (items + n_sm - 1) / n_sm * (fixed[share] + 3 * cols);
            if (cost < least)
                best = {share, cols, items}, least = cost;
        }
    return best;
}
static inline void flow_run(cuda_run *r, const cuda_matrix *m, flow_way way, wide_args a) {
    lin_matrix(&a.l, m);
    a.cols = way.cols;
    if (m->n_unit == 45)
        flow_share<3, 15>(r, a, way.share, way.items);
    else
        flow_share<4, 16>(r, a, way.share, way.items);
}

#endif
