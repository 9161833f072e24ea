/* backend/cuda/broad.cuh: experts of up to 64 rows at once on Hopper: the bits of linear.cuh's kernels, by wgmma.
 *
 * As wide.cuh, of which it takes the order of activations and the results' way out, in another shape: items of 64
 * matrix rows for each of GROUPS groups of four warps and all of an entry's rows, so that weights come in deep stages
 * and are read once. A stage is a segment of both operands, and a segment one chain of products, during which the next
 * one's first unit is unpacked. */
#ifndef ORCD_BACKEND_CUDA_BROAD_CUH
#define ORCD_BACKEND_CUDA_BROAD_CUH

#include "backend/cuda/chain.cuh"

#define BROAD_COLS 64
#define BROAD_SHARED (226 * 1024)
#define BROAD_ASK 4 /* warps that ask for copies: more than a segment has units */

struct broad_args {
    wide_args up, down; /* down.x is up.hidden */
    int cols;           /* the most rows of an entry, a multiple of 16 up to BROAD_COLS */
};

/* F: form of the weights, SEG units in each of N_SEG segments; GROUPS of four warps. */
template <class F, int SEG_, int N_SEG_, int GROUPS_> struct broad_plan {
    using form = F;
    using weights = chain_weights<F, SEG_>;
    static constexpr int SEG = SEG_, N_SEG = N_SEG_, GROUPS = GROUPS_, TILES = 4 * GROUPS, N_UNIT = SEG * N_SEG;
    static constexpr int PART = SEG * F::CHUNK, W_BYTES = TILES * PART, MOST_STAGES = 8;
    static constexpr int THREADS = (GROUPS + 1) * 128, REGISTERS = 160;
    static constexpr int FIXED = 1024 + MOST_STAGES * 16 + (MOST_STAGES + 1) * (int)sizeof(wide_work);
    static __device__ __forceinline__ int pieces(const lin_args &a) { return (a.n_tile + TILES - 1) / TILES; }
    static __device__ __forceinline__ int stages(int cols) {
        return min((BROAD_SHARED - FIXED) / (W_BYTES + SEG * cols * 128), MOST_STAGES);
    }
};

#ifdef HAVE_WGMMA
struct broad_ring {
    uint32_t x, w, full, empty;
    const uint8_t *w_ptr;
    wide_work *work;
    int x_bytes, n_stage, stage, item;
    uint32_t parity;
    __device__ __forceinline__ void next() {
        if (++stage == n_stage)
            stage = 0, parity ^= 1;
    }
    /* at: the warp's tile in a stage. */
    template <class P> __device__ __forceinline__ void open(typename P::weights &to, int at, int lane) const {
        mbar_wait(full + 8 * stage, parity);
        to.load(w_ptr + stage * P::W_BYTES + at, lane);
    }
    __device__ __forceinline__ wide_work *next_work() {
        wide_work *const now = work + item;
        item = item == n_stage ? 0 : item + 1;
        return now;
    }
};

/* The block's items, one after the other: those of GATE_UP, then those of DOWN, whose entries were finished long
 * before. */
template <class P> struct broad_items {
    const broad_args &a;
    int item, n_up, n_item;
    __device__ __forceinline__ broad_items(const broad_args &args) : a(args), item(blockIdx.x) {
        const int n = chain_uniform(*(const volatile int32_t *)a.up.l.n_tiles);
        n_up = n * P::pieces(a.up.l);
        n_item = n_up + n * P::pieces(a.down.l);
    }
    __device__ __forceinline__ bool more() const { return item < n_item; }
    __device__ __forceinline__ bool down() const { return item >= n_up; }
    __device__ __forceinline__ int entry() const {
        return down() ? (item - n_up) / P::pieces(a.down.l) : item / P::pieces(a.up.l);
    }
    __device__ __forceinline__ int tile() const {
        return (down() ? (item - n_up) % P::pieces(a.down.l) : item % P::pieces(a.up.l)) * P::TILES;
    }
};

/* Rows of an entry that GATE_UP has computed are counted in its place in the list, by tiles. What generic stores wrote
 * is read by bulk copies: a fence on either side. */
static __device__ __forceinline__ void broad_done(const int4 *entry, int lane) {
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncwarp();
    if (lane == 0)
        asm volatile("fence.acq_rel.gpu;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(&entry->w) : "memory");
}
static __device__ __forceinline__ void broad_await(const int4 *entry, int n_tile) {
    int n;
    do
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(&entry->w) : "memory");
    while (n < n_tile);
    asm volatile("fence.proxy.async;" ::: "memory");
}

/* The copies of one of BROAD_ASK warps for the items of a block: some tiles' weights and a unit's rows; one warp alone
 * asks for a copy each 75 ns, which is no faster than these are used. DOWN: the first stage of an item brings the rows
 * of its results along. The first item's weights are asked for before the rows are there. */
template <class P> static __device__ __forceinline__ void broad_feed(const broad_args &args, broad_ring &r, int mine) {
    const int lane = threadIdx.x % 32, at = mine + lane * BROAD_ASK;
    broad_items<P> i(args);
    for (int ahead = r.n_stage; i.more(); i.item += gridDim.x, ahead = 0) {
        const bool down = i.down();
        const wide_args &a = down ? args.down : args.up;
        const int4 *entry = &a.l.tile[i.entry()];
        const int4 c = __ldcg(entry);
        const int rows = (c.z + 7) & ~7, stride = (c.z + 15) & ~15;
        const uint8_t *w =
            a.l.w + c.x * a.l.mat_bytes + (int64_t)min(i.tile() + at, a.l.n_tile - 1) * (P::N_SEG * P::PART);
        const uint8_t *x = a.x + ((int64_t)mine * a.ldx + c.y) * 128;
        wide_work *work = r.next_work();
        auto ask_weights = [&](int s, int stage) {
            const uint32_t full = r.full + 8 * stage;
            if (mine == 0 && lane == 0)
                mbar_expect(full, P::W_BYTES + P::SEG * rows * 128 + (down && s == 0 ? rows * 4 : 0));
            if (at < P::TILES)
                bulk_copy(r.w + stage * P::W_BYTES + at * P::PART, w + s * P::PART, P::PART, full);
        };
        for (int s = 0; s < ahead; s++)
            ask_weights(s, s);
        if (ahead)
            pdl_wait();
        if (down)
            broad_await(entry, args.up.l.n_tile);
        for (int s = 0; s < P::N_SEG; s++) {
            const uint32_t full = r.full + 8 * r.stage;
            if (s >= ahead) {
                mbar_wait(r.empty + 8 * r.stage, r.parity ^ 1);
                ask_weights(s, r.stage);
            }
            if (mine < P::SEG && lane == 0)
                bulk_copy(r.x + r.stage * r.x_bytes + mine * stride * 128, x + (int64_t)s * P::SEG * a.ldx * 128,
                          (uint32_t)rows * 128, full);
            else if (mine == P::SEG && down && s == 0 && lane == 0)
                bulk_copy((uint32_t)__cvta_generic_to_shared(work->to), a.l.perm + c.y, (uint32_t)rows * 4, full);
            r.next();
        }
    }
}

/* An item: where it is, and an entry that a GATE_UP item before it belonged to, which has not been counted yet, so that
 * the fence does not wait for what was just stored. */
struct broad_item {
    bool down;
    const int4 *entry, *owed;
    lin_cols c;
    int tile;
    const wide_work *work;
};

template <class P, int N>
static __device__ __forceinline__ void broad_multiply(const wide_args &a, broad_item &i, broad_ring &r, int at,
                                                      int lane) {
    float acc[N / 2], total[N / 2], bias[2];
    if (i.down)
        wide_bias<LIN_DOWN>(a.l, i.c.mat, i.tile, lane, bias);
    else
        wide_bias<LIN_GATE_UP>(a.l, i.c.mat, i.tile, lane, bias);
#pragma unroll
    for (int k = 0; k < N / 2; k++)
        acc[k] = total[k] = 0;
    typename P::weights w;
    r.template open<P>(w, at, lane);
#pragma unroll 1
    for (int s = 1; s <= P::N_SEG; s++) {
        const uint32_t empty = r.empty + 8 * r.stage;
        chain_begin<typename P::form, P::SEG, N>(w, wgmma_desc(r.x + r.stage * r.x_bytes), acc);
        r.next();
        if (s < P::N_SEG)
            r.template open<P>(w, at, lane);
        chain_end(acc, total);
        if (lane == 0)
            mbar_arrive(empty);
    }
    if (i.owed)
        broad_done(i.owed, lane);
    i.owed = NULL;
    if (i.tile >= a.l.n_tile)
        return;
    if (i.down) {
        wide_put<LIN_DOWN, N>(a.l, i.c, i.work->to, i.tile, lane, bias, 0, total);
    } else {
        wide_put_glu<N / 2>(a, i.c, i.tile, lane, bias, total);
        i.owed = i.entry;
    }
}
#endif

/* GATE_UP and DOWN. */
template <class P>
static __global__ __launch_bounds__(P::THREADS, 1) void broad_kernel(const __grid_constant__ broad_args a) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *base = shared + (-(uint32_t)__cvta_generic_to_shared(shared) & 1023);
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    broad_ring r;
    r.n_stage = P::stages(a.cols);
    r.x_bytes = P::SEG * a.cols * 128;
    r.x = (uint32_t)__cvta_generic_to_shared(base);
    r.w = r.x + r.n_stage * r.x_bytes;
    r.w_ptr = base + r.n_stage * r.x_bytes;
    r.full = r.w + r.n_stage * P::W_BYTES;
    r.empty = r.full + 8 * P::MOST_STAGES;
    r.work = (wide_work *)(r.w_ptr + r.n_stage * P::W_BYTES + 16 * P::MOST_STAGES);
    r.stage = r.item = 0;
    r.parity = 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < r.n_stage; i++) {
            mbar_init(r.full + 8 * i, 1);
            mbar_init(r.empty + 8 * i, P::TILES);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    pdl_launch();
    __syncthreads();
    if (warp >= P::TILES) {
        set_registers_down<24>();
        broad_feed<P>(a, r, warp - P::TILES);
        pdl_wait();
    } else {
        set_registers_up<P::REGISTERS>();
        broad_item now = {};
        for (broad_items<P> i(a); i.more(); i.item += gridDim.x) {
            now.down = i.down();
            if (now.down && now.owed) { /* this item may wait for it */
                broad_done(now.owed, lane);
                now.owed = NULL;
            }
            const wide_args &of = now.down ? a.down : a.up;
            now.entry = &of.l.tile[i.entry()];
            const int4 t = __ldcg(now.entry);
            now.c = {t.x, t.y, chain_uniform(t.z)};
            now.tile = i.tile() + warp;
            now.work = r.next_work();
#define BROAD_CASE(N)                                                                                                  \
    if (now.c.n <= N) {                                                                                                \
        broad_multiply<P, N>(of, now, r, warp * P::PART, lane);                                                        \
        continue;                                                                                                      \
    }
            BROAD_CASE(16)
            BROAD_CASE(32)
            BROAD_CASE(48)
            BROAD_CASE(64)
#undef BROAD_CASE
        }
        if (now.owed)
            broad_done(now.owed, lane);
    }
#else
    (void)a;
#endif
}

template <class P> static void broad_launch(cuda_run *r, const broad_args &a) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(broad_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, BROAD_SHARED);
    cuda_launch(r, broad_kernel<P>, dim3((unsigned)r->dev->n_sm), dim3(P::THREADS), (size_t)BROAD_SHARED, a);
}

/* broad.cu: experts of BROAD_COLS rows or fewer at once, where chain_can. up.l, down.l: without their matrices. */
void broad_run(cuda_run *r, const cuda_matrix *up, const cuda_matrix *down, broad_args a);

#endif
