/* backend/cuda/wide.cuh: packed matrices times many rows on Hopper: the bits of linear.cuh's kernels, by wgmma.
 *
 * Weights are the register operand; activations come from shared memory. A block computes items of 128 matrix rows and
 * up to 128 activation rows: four warps fill a ring of stages with bulk copies, two groups of four take 64 matrix rows
 * each. Where blocks of columns have scales, a group keeps two products in flight, one for each half of the
 * activation rows, and scales one half's block sums while the other half, and the other group, have the tensor cores.
 *
 * Activations lie in the order in which the copies take them: [unit of 64 columns][row][128 bytes], the 16-byte pieces
 * of a row swizzled with its index, so the first row of an item is a multiple of 8. Inside each block of 32 columns the
 * columns follow the packed weights: piece q holds columns 2q, 2q + 1 of each 8. */
#ifndef ORCD_BACKEND_CUDA_WIDE_CUH
#define ORCD_BACKEND_CUDA_WIDE_CUH

#include "backend/cuda/linear.cuh"
#include "backend/cuda/pack.cuh"
#include "backend/cuda/wgmma.cuh"

#define WIDE_COLS 128 /* activation rows of an item */
#define WIDE_TILES 8  /* tiles of 16 matrix rows */
#define WIDE_X_UNIT (WIDE_COLS * 128)
#define WIDE_THREADS 384

struct wide_args {
    lin_args l;       /* x is not used; rows: DENSE */
    const uint8_t *x; /* [unit][ldx rows][128] */
    int64_t ldx;
    uint8_t *hidden; /* GATE_UP: [unit][ldx rows][128] */
    int cols;        /* DENSE: rows of an item, a multiple of 8 */
};

/* wide.cu: rows of x (row perm[i] / k for row i, none where perm is negative; perm NULL: all) in the order above. */
void wide_pack(cuda_run *r, cuda_count rows, const int32_t *perm, int k, const uint16_t *x, int64_t ldx, uint8_t *out,
               int64_t ldo);
void wide_dense(cuda_run *r, const cuda_matrix *m, const wide_args &a);
/* Whether there are kernels for all of a weight's matrices. */
static inline bool wide_can(const cuda_run *r, const cuda_weight *w) {
    bool can = cuda_has_wide(r->dev);
    for (int i = 0; i < w->n_matrix; i++)
        can = can && w->matrix[i].form != CUDA_FORM_MXFP4_FAR;
    return can;
}

/* An item, as the copies' warp leaves it for the others: in shared memory, one more than there are stages, so that it
 * is still there when its results are stored. */
struct wide_work {
    lin_cols c;
    int tile0;
    int32_t to[WIDE_COLS]; /* DOWN: perm */
};

template <class F> struct wide_plan {
    static constexpr int UNITS = F::CHUNK <= 1088 ? 3 : F::CHUNK <= 2048 ? 2 : 1; /* of a stage, at most */
    static constexpr int X_BYTES = UNITS * WIDE_X_UNIT, W_BYTES = WIDE_TILES * UNITS * F::CHUNK;
    static constexpr int FIT = (225 * 1024) / (X_BYTES + W_BYTES), STAGES = FIT < 8 ? FIT : 8;
    static constexpr int SHARED = STAGES * (X_BYTES + W_BYTES) + 1024 + 256 + (STAGES + 1) * (int)sizeof(wide_work);
};

/* Units of the next stage; a stage is of one segment, of which `left` units are not in a stage yet. */
template <class F> static __device__ __forceinline__ int wide_units(int left) {
    constexpr int most = wide_plan<F>::UNITS;
    return left <= most ? left : most == 3 && left == 4 ? 2 : most;
}

#ifdef HAVE_WGMMA
struct wide_ring { /* addresses in shared memory; the place that a thread has reached */
    uint32_t x, w, full, empty;
    const uint8_t *w_ptr;
    int stage;
    uint32_t parity;
    int item; /* the next one's place */
};
template <class P> static __device__ __forceinline__ wide_work *wide_next_work(wide_ring &r) {
    wide_work *work = (wide_work *)(r.w_ptr + P::STAGES * (P::W_BYTES + 16)) + r.item;
    r.item = r.item == P::STAGES ? 0 : r.item + 1;
    return work;
}
template <int STAGES> static __device__ __forceinline__ void wide_next(wide_ring &r) {
    if (++r.stage == STAGES) {
        r.stage = 0;
        r.parity ^= 1;
    }
}

/* Four warps' copies for one item: the first brings activations and, with the first stage, `work`; the others have a
 * third of the weights each. Copies that one warp starts follow each other slowly. */
template <class F, lin_mode MODE>
static __device__ void wide_fill(const wide_args &a, const lin_cols &c, int tile0, wide_work *work, wide_ring &r) {
    using P = wide_plan<F>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, rows = (c.n + 7) & ~7;
    const int tile = max(warp - 1 + 3 * lane, 0);
    const uint8_t *w =
        a.l.w + c.mat * a.l.mat_bytes + (int64_t)min(tile0 + tile, a.l.n_tile - 1) * a.l.n_unit * F::CHUNK;
    for (int u = 0, left = 0, n; u < a.l.n_unit; u += n, left -= n) {
        if (left == 0)
            left = min(a.l.seg, a.l.n_unit - u);
        n = wide_units<F>(left);
        mbar_wait(r.empty + 8 * r.stage, r.parity ^ 1);
        const uint32_t full = r.full + 8 * r.stage;
        const bool perm = MODE == LIN_DOWN && u == 0;
        if (warp == 0 && lane == 0) {
            if (u == 0)
                work->c = c, work->tile0 = tile0;
            mbar_expect(full, (uint32_t)(n * (rows * 128 + WIDE_TILES * F::CHUNK) + perm * rows * 4));
        }
        __syncwarp();
        if (warp && tile < WIDE_TILES)
            bulk_copy(r.w + r.stage * P::W_BYTES + tile * (P::UNITS * F::CHUNK), w + (int64_t)u * F::CHUNK,
                      (uint32_t)(n * F::CHUNK), full);
        else if (warp == 0 && lane < n)
            bulk_copy(r.x + r.stage * P::X_BYTES + lane * WIDE_X_UNIT,
                      a.x + ((int64_t)(u + lane) * a.ldx + c.first) * 128, (uint32_t)rows * 128, full);
        else if (warp == 0 && perm && lane == 31)
            bulk_copy((uint32_t)__cvta_generic_to_shared(work->to), a.l.perm + c.first, (uint32_t)rows * 4, full);
        wide_next<P::STAGES>(r);
    }
}

/* The copies for the items of a block. */
template <class F, lin_mode MODE>
static __device__ void wide_feed(const wide_args &a, int n_m, int total, wide_ring &r) {
    using P = wide_plan<F>;
    for (int item = blockIdx.x; item < total; item += gridDim.x)
        wide_fill<F, MODE>(a, lin_columns<MODE>(a.l, a.cols, item / n_m), item % n_m * WIDE_TILES, wide_next_work<P>(r),
                           r);
}

/* c = the block's 64 x N product. */
template <int N>
static __device__ __forceinline__ void wide_issue(float (&c)[N / 2], const uint32_t (&a)[2][4], uint64_t desc) {
    wgmma_fence();
    wgmma<N>(c, a[0], desc, 0);
    wgmma<N>(c, a[1], desc + 2, 1);
    wgmma_commit();
}

template <int R>
static __device__ __forceinline__ void wide_scale(float (&acc)[R], const float (&c)[R], const float (&s)[2]) {
#pragma unroll
    for (int i = 0; i < R; i++)
        acc[i] = fmaf(s[i / 2 % 2], c[i], acc[i]);
}

template <int R> static __device__ __forceinline__ void wide_add(float *total, float (&acc)[R]) {
#pragma unroll
    for (int i = 0; i < R; i++) {
        total[i] += acc[i];
        acc[i] = 0;
    }
}

/* Sums of an item for weights with block scales: 64 rows x 2 N columns of a group. */
template <class F, int N> struct wide_scaled {
    using P = wide_plan<F>;
    static constexpr int R = N / 2, HALF = N * 128 / 16;
    wide_ring &r;
    int lane, at;     /* the warp's tile in a stage */
    const uint8_t *w; /* of the stage that is open */
    uint64_t desc;
    typename F::raw raw;
    frag_block f; /* its first block */
    float acc[2][R], c0[R], c1[R];

    __device__ __forceinline__ wide_scaled(wide_ring &ring, int tile, int l)
        : r(ring), lane(l), at(tile * P::UNITS * F::CHUNK) {
#pragma unroll
        for (int i = 0; i < 2 * R; i++)
            acc[i / R][i % R] = 0;
    }

    __device__ __forceinline__ void open() {
        mbar_wait(r.full + 8 * r.stage, r.parity);
        w = r.w_ptr + r.stage * P::W_BYTES + at;
        desc = wgmma_desc(r.x + r.stage * P::X_BYTES);
        raw = F::load_shared(w, lane);
        f = F::block(raw, 0);
    }

    /* A segment is over. */
    __device__ __forceinline__ void add(float (&total)[N]) {
        wide_add(total, acc[0]);
        wide_add(total + R, acc[1]);
    }

    /* A stage of UNITS units, open, without a break between products; opens the next. */
    template <int UNITS> __device__ __forceinline__ void run(bool first, bool more) {
        (void)first;
        wide_issue<N>(c0, f.a, desc);
        wide_issue<N>(c1, f.a, desc + HALF);
#pragma unroll
        for (int i = 0; i < UNITS; i++) {
            const frag_block g = F::block(raw, 1);
            wgmma_wait<1>(c0);
            wide_scale(acc[0], c0, f.s);
            wide_issue<N>(c0, g.a, desc + i * (WIDE_X_UNIT / 16) + 4);
            wgmma_wait<1>(c1);
            wide_scale(acc[1], c1, f.s);
            wide_issue<N>(c1, g.a, desc + i * (WIDE_X_UNIT / 16) + 4 + HALF);
            if (i + 1 < UNITS) {
                raw = F::load_shared(w + (i + 1) * F::CHUNK, lane);
                f = F::block(raw, 0);
                wgmma_wait<1>(c0);
                wide_scale(acc[0], c0, g.s);
                wide_issue<N>(c0, f.a, desc + (i + 1) * (WIDE_X_UNIT / 16));
                wgmma_wait<1>(c1);
                wide_scale(acc[1], c1, g.s);
                wide_issue<N>(c1, f.a, desc + (i + 1) * (WIDE_X_UNIT / 16) + HALF);
            } else {
                const uint32_t empty = r.empty + 8 * r.stage;
                wide_next<P::STAGES>(r);
                if (more)
                    open();
                wgmma_wait<1>(c0);
                wide_scale(acc[0], c0, g.s);
                wgmma_wait<0>(c1);
                if (lane == 0)
                    mbar_arrive(empty);
                wide_scale(acc[1], c1, g.s);
            }
        }
    }
};

/* The same for weights without: a segment is one chain. */
template <class F, int N> struct wide_plain {
    using P = wide_plan<F>;
    wide_ring &r;
    int lane, at;
    const uint8_t *w;
    uint64_t desc;
    uint32_t f[F::STEPS][4]; /* the stage's first unit */
    float acc[N];

    __device__ __forceinline__ wide_plain(wide_ring &ring, int tile, int l)
        : r(ring), lane(l), at(tile * P::UNITS * F::CHUNK) {
#pragma unroll
        for (int i = 0; i < N; i++)
            acc[i] = 0;
    }

    __device__ __forceinline__ void open() {
        mbar_wait(r.full + 8 * r.stage, r.parity);
        w = r.w_ptr + r.stage * P::W_BYTES + at;
        desc = wgmma_desc(r.x + r.stage * P::X_BYTES);
        F::steps(F::load_shared(w, lane), f);
    }

    __device__ __forceinline__ void add(float (&total)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++)
            total[i] += acc[i];
    }

    __device__ __forceinline__ void issue(const uint32_t (&a)[F::STEPS][4], int unit, bool fresh) {
        constexpr int EACH = F::STEPS / 4; /* products of the same columns */
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < F::STEPS; k++)
            wgmma<2 * N>(acc, a[k], desc + unit * (WIDE_X_UNIT / 16) + k / (2 * EACH) * 4 + k % 2 * 2, k || !fresh);
        wgmma_commit();
    }

    template <int UNITS> __device__ __forceinline__ void run(bool first, bool more) {
        issue(f, 0, first);
#pragma unroll
        for (int i = 1; i < UNITS; i++) {
            uint32_t g[F::STEPS][4];
            F::steps(F::load_shared(w + i * F::CHUNK, lane), g);
            issue(g, i, false);
        }
        const uint32_t empty = r.empty + 8 * r.stage;
        wide_next<P::STAGES>(r);
        wgmma_wait<UNITS - 1>(); /* nothing reads f any more */
        if (more)
            open();
        wgmma_wait<0>(acc);
        if (lane == 0)
            mbar_arrive(empty);
    }
};

template <class F, int N, bool SCALED = F::SCALED> struct wide_kind { using sum = wide_scaled<F, N>; };
template <class F, int N> struct wide_kind<F, N, false> { using sum = wide_plain<F, N>; };

/* Sums of an item, segments in ascending order. */
template <class F, int N>
static __device__ __forceinline__ void wide_sum(const wide_args &a, wide_ring &r, int group, int lane,
                                                float (&total)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++)
        total[i] = 0;
    typename wide_kind<F, N>::sum sum(r, group * 4 + threadIdx.x / 32 % 4, lane);
    sum.open();
    for (int u = 0, left = 0; u < a.l.n_unit;) {
        const bool first = left == 0;
        if (first)
            left = min(a.l.seg, a.l.n_unit - u);
        const int n = wide_units<F>(left);
        u += n;
        left -= n;
        if (wide_plan<F>::UNITS > 2 && n == 3)
            sum.template run<3>(first, u < a.l.n_unit);
        else if (wide_plan<F>::UNITS > 1 && n == 2)
            sum.template run<2>(first, u < a.l.n_unit);
        else
            sum.template run<1>(first, u < a.l.n_unit);
        if (left == 0)
            sum.add(total);
    }
}

/* Biases of the lane's two rows of a tile. */
template <lin_mode MODE>
static __device__ __forceinline__ void wide_bias(const lin_args &l, int mat, int tile, int lane, float (&bias)[2]) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
        const int row = MODE == LIN_GATE_UP ? tile * 8 + lane / 4 : lin_row(l, tile, lane / 4 + 8 * q);
        const bool there = tile < l.n_tile && row < l.n_row;
        bias[q] = l.bias && there ? l.bias[mat * l.bias_mat + (MODE == LIN_GATE_UP ? q * l.n_row : l.row0) + row] : 0.f;
    }
}

/* Results of DENSE and DOWN: rows g and g + 8 of a tile, columns col0 .. col0 + N - 1. perm: DOWN's, of the columns.
 * What is read is read for all of them at once. */
template <lin_mode MODE, int N>
static __device__ __forceinline__ void wide_put(const lin_args &l, const lin_cols &c, const int32_t *perm, int tile,
                                                int lane, const float (&bias)[2], int col0, float *total) {
    const int g = lane >> 2, t = lane & 3;
    const int row[2] = {lin_row(l, tile, g), lin_row(l, tile, g + 8)};
    const bool there[2] = {tile < l.n_tile && row[0] < l.n_row, tile < l.n_tile && row[1] < l.n_row};
    int to[N / 4]; /* rows of y, -1: no such column */
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int col = col0 + j / 2 * 8 + 2 * t + j % 2;
        to[j] = col >= c.n ? -1 : MODE == LIN_DOWN ? perm[col] : c.first + col;
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        total[i] = __fmul_rn(total[i], l.factor);
        if (l.bias)
            total[i] += bias[i / 2 % 2];
    }
    if (MODE == LIN_DENSE && l.rope && row[0] < l.n_rope) { /* the two rows are a pair */
        float2 cs[N / 4];
#pragma unroll
        for (int j = 0; j < N / 4; j++)
            cs[j] = to[j] >= 0 ? l.rope[to[j] * 64 + row[0] % 64] : make_float2(0, 0);
#pragma unroll
        for (int j = 0; j < N / 4; j++)
            rotate(total[j / 2 * 4 + j % 2], total[j / 2 * 4 + 2 + j % 2], cs[j]);
    }
    if (MODE == LIN_DENSE && l.epilogue == BE_EPI_ADD) {
        float old[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            if (to[i / 4 * 2 + i % 2] >= 0 && there[i / 2 % 2])
                old[i] = l.y[to[i / 4 * 2 + i % 2] * l.ldy + l.row0 + row[i / 2 % 2]];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] = old[i] + total[i];
    } else if (MODE == LIN_DENSE && l.epilogue != BE_EPI_NONE) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] = l.epilogue == BE_EPI_GELU_TANH ? gelu_tanh(total[i]) : gelu_erf(total[i]);
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const int at = to[i / 4 * 2 + i % 2], q = i / 2 % 2;
        if (at >= 0 && there[q]) {
            l.y[at * l.ldy + l.row0 + row[q]] = total[i];
            if (MODE == LIN_DENSE && l.yh)
                l.yh[at * l.ldh + l.row0 + row[q]] = f16_bits(total[i]);
        }
    }
}

/* Results of GATE_UP: gate in row g, up in row g + 8 of a tile; an item's rows are one unit of the next product. Lanes
 * of neighbouring rows exchange, so that each stores two of one activation row. */
template <int N>
static __device__ __forceinline__ void wide_put_glu(const wide_args &a, const lin_cols &c, int tile, int lane,
                                                    const float (&bias)[2], const float (&total)[N]) {
    const int g = lane >> 2, ff = tile * 8 + g, odd = g & 1, col = 2 * (lane & 3) + odd; /* of eight */
    const lin_args &l = a.l;
    const bool there = ff < l.n_row;
    uint8_t *out = a.hidden + ((tile / 8) * a.ldx + c.first + col) * 128 + wide_at(ff & 62, col);
    float v[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        float gate = __fmul_rn(total[i / 2 * 4 + i % 2], l.factor);
        float up = __fmul_rn(total[i / 2 * 4 + 2 + i % 2], l.factor);
        if (l.bias) {
            gate += bias[0];
            up += bias[1];
        }
        v[i] = glu(gate, up, l.alpha, l.limit);
        v[i] = there ? v[i] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const float other = __shfl_xor_sync(~0u, odd ? v[2 * i] : v[2 * i + 1], 4);
        if (i * 8 + col < c.n)
            *(uint32_t *)(out + i * 1024) = odd ? f16x2(other, v[2 * i + 1]) : f16x2(v[2 * i], other);
    }
}

template <class F, lin_mode MODE, int N>
static __device__ __forceinline__ void wide_item(const wide_args &a, const wide_work *work, wide_ring &r, int group,
                                                 int lane) {
    mbar_wait(r.full + 8 * r.stage, r.parity);
    const int tile = work->tile0 + group * 4 + threadIdx.x / 32 % 4;
    float bias[2], total[N];
    if (!F::SCALED) /* else there are no registers to spare */
        wide_bias<MODE>(a.l, work->c.mat, tile, lane, bias);
    wide_sum<F, N>(a, r, group, lane, total);
    const lin_cols c = work->c;
    if (F::SCALED)
        wide_bias<MODE>(a.l, c.mat, tile, lane, bias);
    if constexpr (MODE == LIN_GATE_UP)
        wide_put_glu<N>(a, c, tile, lane, bias, total);
    else
#pragma unroll
        for (int i = 0; i < 2 * N; i += 32)
            if (2 * N - i >= 32)
                wide_put<MODE, 32>(a.l, c, work->to, tile, lane, bias, i, total + i / 2);
            else
                wide_put<MODE, 16>(a.l, c, work->to, tile, lane, bias, i, total + i / 2);
}
#endif

template <class F, lin_mode MODE>
static __global__ __launch_bounds__(WIDE_THREADS, 1) void wide_kernel(const __grid_constant__ wide_args a) {
#ifdef HAVE_WGMMA
    using P = wide_plan<F>;
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *base = shared + (-(uint32_t)__cvta_generic_to_shared(shared) & 1023);
    wide_ring r;
    r.x = (uint32_t)__cvta_generic_to_shared(base);
    r.w = r.x + P::STAGES * P::X_BYTES;
    r.w_ptr = base + P::STAGES * P::X_BYTES;
    r.full = r.w + P::STAGES * P::W_BYTES;
    r.empty = r.full + 8 * P::STAGES;
    r.stage = 0;
    r.parity = 0;
    r.item = 0;
    const int role = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < P::STAGES; i++) {
            mbar_init(r.full + 8 * i, 1);
            mbar_init(r.empty + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    pdl_launch();
    pdl_wait();
    __syncthreads();
    const int n_m = (a.l.n_tile + WIDE_TILES - 1) / WIDE_TILES;
    const int rows = MODE == LIN_DENSE ? count_rows(a.l.rows) : 0;
    const int n_cols = MODE == LIN_DENSE ? (rows + a.cols - 1) / a.cols : *(const volatile int32_t *)a.l.n_tiles;
    const int total = n_m * n_cols;
    if (role == 2) {
        set_registers_down<24>();
        wide_feed<F, MODE>(a, n_m, total, r);
    } else {
        set_registers_up<240>();
        /* The way through an item must be uniform for the compiler too, or products wait for their addresses. */
        for (int item = blockIdx.x; item < total; item += gridDim.x) {
            const int n = MODE == LIN_DENSE ? min(a.cols, rows - item / n_m * a.cols) : a.l.tile[item / n_m].z;
            const int half = max((n + 15) / 16 * 8, 16);
            const wide_work *work = wide_next_work<P>(r);
#define WIDE_CASE(N)                                                                                                   \
    if (half <= N) {                                                                                                   \
        wide_item<F, MODE, N>(a, work, r, role, lane);                                                                 \
        continue;                                                                                                      \
    }
            WIDE_CASE(16)
            WIDE_CASE(24)
            WIDE_CASE(32)
            WIDE_CASE(40)
            WIDE_CASE(48)
            WIDE_CASE(56)
            WIDE_CASE(64)
#undef WIDE_CASE
        }
    }
#else
    (void)a;
#endif
}

/* Activation rows of an item of a dense product: fewer fill the device when there is little to do. */
static inline int wide_cols(int rows, int n_tile, int n_sm) {
    int best = 0, least = 0;
    for (int cols = 32; cols <= WIDE_COLS; cols += 32) {
        const int items = (n_tile + WIDE_TILES - 1) / WIDE_TILES * ((rows + cols - 1) / cols);
        const int cost = (items + n_sm - 1) / n_sm * (cols + 40); /* 40: what an item costs whatever its rows */
        if (best == 0 || cost < least) {
            best = cols;
            least = cost;
        }
    }
    return best;
}

template <class F, lin_mode MODE> static void wide_launch_form(cuda_run *r, const wide_args &a) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(wide_kernel<F, MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        wide_plan<F>::SHARED);
    cuda_launch(r, wide_kernel<F, MODE>, dim3((unsigned)r->dev->n_sm), dim3(WIDE_THREADS), wide_plan<F>::SHARED, a);
}

template <lin_mode MODE> static void wide_launch(cuda_run *r, const cuda_matrix *m, wide_args a) {
    lin_matrix(&a.l, m);
    switch (m->form) {
    case CUDA_FORM_MXFP4:
        wide_launch_form<form_mxfp4, MODE>(r, a);
        break;
    case CUDA_FORM_Q8_0:
        wide_launch_form<form_q8_0, MODE>(r, a);
        break;
    case CUDA_FORM_F16:
        wide_launch_form<form_f16<1>, MODE>(r, a);
        break;
    default:
        wide_launch_form<form_f16<2>, MODE>(r, a);
    }
}

#endif
