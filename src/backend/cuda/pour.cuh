/* backend/cuda/pour.cuh: experts of up to 32 rows at once on Hopper: the bits of linear.cuh's kernels, by wgmma.
 *
 * A block keeps all columns of an entry's rows of activations in shared memory, in the order of wide.cuh, and walks its
 * share of the (rows, 64 matrix rows) list. Groups of four warps take 64 matrix rows each, whenever they are done with
 * the last. Each warp has a ring of its own, which its bulk copies fill with its 16 matrix rows' weights, a segment a
 * stage, as deep as the rows leave room for, across the ends of pieces and entries. A segment is one chain of products,
 * during which the next one's first unit is unpacked. */
#ifndef ORCD_BACKEND_CUDA_POUR_CUH
#define ORCD_BACKEND_CUDA_POUR_CUH

#include "backend/cuda/chain.cuh"

#define POUR_SHARED (226 * 1024)

/* F: form of the weights, SEG units in each of N_SEG segments; MOST: rows of an entry, at most; GROUPS of four warps.
 */
template <class F, int SEG_, int N_SEG_, int MOST_, int GROUPS_> struct pour_plan {
    using form = F;
    using weights = chain_weights<F, SEG_>;
    static constexpr int SEG = SEG_, N_SEG = N_SEG_, MOST = MOST_, GROUPS = GROUPS_, WARPS = 4 * GROUPS;
    static constexpr int N_UNIT = SEG * N_SEG, PART = SEG * F::CHUNK, MOST_DEPTH = 8;
    static __device__ __forceinline__ int depth(int rows) {
        return min((POUR_SHARED - 1024 - WARPS * MOST_DEPTH * 8 - rows * (N_UNIT * 128)) / (WARPS * PART), MOST_DEPTH);
    }
};

#ifdef HAVE_WGMMA
/* Rows of c into shared memory, n (a multiple of 8) of them, zeros behind c.n. Four lanes take 64 bytes of a row: each
 * spreads its eight columns over the four pieces of their block. 16 rows are on their way at once. */
template <class P, lin_mode MODE>
static __device__ __forceinline__ void pour_rows(const lin_args &a, const lin_cols &c, int n, uint8_t *to) {
    constexpr int BLOCKS = 2 * P::N_UNIT, EACH = (BLOCKS + P::WARPS - 1) / P::WARPS, J = 2;
    const int warp = threadIdx.x / 32, r = threadIdx.x / 4 % 8, v = threadIdx.x % 4;
    int64_t from[P::MOST / 8];
#pragma unroll
    for (int j = 0; j < P::MOST / 8; j++)
        from[j] = j * 8 + r < c.n ? lin_source<MODE>(a, c.first + j * 8 + r) * a.ldx + v * 8 : -1;
#pragma unroll
    for (int j = 0; j < P::MOST / 8; j += J) {
        if (j * 8 >= n)
            break;
        uint4 x[J][EACH];
#pragma unroll
        for (int k = 0; k < J * EACH; k++) {
            const int b = warp + k % EACH * P::WARPS;
            const int64_t at = from[j + k / EACH];
            x[k / EACH][k % EACH] =
                b < BLOCKS && at >= 0 ? __ldcg((const uint4 *)(a.x + at + b * 32)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < J * EACH; k++) {
            const int b = warp + k % EACH * P::WARPS, row = (j + k / EACH) * 8 + r;
            const uint4 q = x[k / EACH][k % EACH];
            uint8_t *s = to + b / 2 * (n * 128) + row * 128 + v * 4;
            if (b < BLOCKS && row < n) {
                *(uint32_t *)(s + ((b % 2 * 4 + 0) ^ r) * 16) = q.x;
                *(uint32_t *)(s + ((b % 2 * 4 + 1) ^ r) * 16) = q.y;
                *(uint32_t *)(s + ((b % 2 * 4 + 2) ^ r) * 16) = q.z;
                *(uint32_t *)(s + ((b % 2 * 4 + 3) ^ r) * 16) = q.w;
            }
        }
    }
}

/* A warp's ring: addresses in shared memory; the stage that the warp has read. */
template <class P> struct pour_ring {
    uint32_t w, full;
    const uint8_t *w_ptr;
    int depth, stage;
    uint32_t parity;
    __device__ __forceinline__ void ask(int at, const uint8_t *src, int lane) const {
        if (lane == 0) {
            mbar_expect(full + 8 * at, P::PART);
            bulk_copy(w + at * P::PART, src, P::PART, full + 8 * at);
        }
    }
    __device__ __forceinline__ void open(typename P::weights &to, int lane) const {
        mbar_wait(full + 8 * stage, parity);
        to.load(w_ptr + stage * P::PART, lane);
    }
};

/* total += the segment in w; ask: its place in the ring is filled from `then`; more: the next one comes into w. */
template <class P, int N>
static __device__ __forceinline__ void pour_segment(typename P::weights &w, pour_ring<P> &r, const uint8_t *then,
                                                    bool ask, bool more, uint64_t desc, int lane, float (&acc)[N / 2],
                                                    float (&total)[N / 2]) {
    __syncwarp();
    if (ask)
        r.ask(r.stage, then, lane);
    if (++r.stage == r.depth)
        r.stage = 0, r.parity ^= 1;
    chain_begin<typename P::form, P::SEG, N>(w, desc, acc);
    if (more)
        r.open(w, lane);
    chain_end(acc, total);
}

/* The block's share of the list, and where the warp's weights of a piece are. */
template <class P> struct pour_share {
    const lin_args &a;
    int n_piece, end, warp; /* of the group */
    __device__ __forceinline__ const uint8_t *tile_at(int item) const {
        const int mat = chain_uniform(__ldcg(&a.tile[item / n_piece].x));
        const int tile = min(item % n_piece * 4 + warp, a.n_tile - 1);
        return a.w + mat * a.mat_bytes + (int64_t)tile * (P::N_SEG * P::PART);
    }
};

/* Results of GATE_UP: gate in row g, up in row g + 8 of a tile. */
template <int N>
static __device__ __forceinline__ void pour_put_glu(const lin_args &a, const lin_cols &c, int tile, int lane,
                                                    const float (&bias)[2], const float (&total)[N / 2]) {
    const int g = lane >> 2, t = lane & 3, ff = tile * 8 + g;
    if (ff >= a.n_row)
        return;
    uint16_t *y = a.yh + (int64_t)(c.first + 2 * t) * a.ldh + ff;
#pragma unroll
    for (int i = 0; i < N / 8; i++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float gate = __fmul_rn(total[i * 4 + e], a.factor), up = __fmul_rn(total[i * 4 + 2 + e], a.factor);
            if (a.bias) {
                gate += bias[0];
                up += bias[1];
            }
            if (i * 8 + 2 * t + e < c.n)
                y[(int64_t)(i * 8 + e) * a.ldh] = f16_bits(glu(gate, up, a.alpha, a.limit));
        }
}

/* The group's pieces of an entry: item, item + GROUPS, .. below `end`, the first of which is open. */
template <class P, lin_mode MODE, int N>
static __device__ __forceinline__ void pour_pieces(const pour_share<P> &share, const lin_cols &c, int &item, int end,
                                                   uint32_t x, const uint8_t *&src, typename P::weights &w,
                                                   pour_ring<P> &r) {
    const lin_args &a = share.a;
    const int lane = threadIdx.x % 32, warp = share.warp;
    float acc[N / 2], total[N / 2], bias[2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        acc[i] = 0;
    for (; item < end; item += P::GROUPS) {
        const int tile = item % share.n_piece * 4 + warp;
        const bool last = item + P::GROUPS >= share.end;
        const uint8_t *next = share.tile_at(last ? item : item + P::GROUPS);
        wide_bias<MODE>(a, c.mat, tile, lane, bias);
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] = 0;
        uint64_t desc = wgmma_desc(x);
#pragma unroll 1
        for (int s = 0; s < P::N_SEG; s++) {
            const int ask = s + r.depth;
            const uint8_t *then = ask < P::N_SEG ? src + ask * P::PART : next + (ask - P::N_SEG) * P::PART;
            pour_segment<P, N>(w, r, then, ask < P::N_SEG || !last, s + 1 < P::N_SEG || !last, desc, lane, acc, total);
            desc += P::SEG * (N * 8);
        }
        if constexpr (MODE == LIN_GATE_UP)
            pour_put_glu<N>(a, c, tile, lane, bias, total);
        else
            wide_put<MODE, N>(a, c, a.perm + c.first, tile, lane, bias, 0, total);
        src = next;
    }
}
#endif

template <class P, lin_mode MODE>
static __global__ __launch_bounds__(P::WARPS * 32, 1) void pour_kernel(const __grid_constant__ lin_args a) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *x = shared + (-(uint32_t)__cvta_generic_to_shared(shared) & 1023);
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(x);
    const int warp = chain_uniform(threadIdx.x / 32), group = warp / 4, lane = threadIdx.x % 32;
    /* What is multiplied is known before the input is: the list is older than GATE_UP, which lets DOWN begin only when
     * it has seen it. */
    if (MODE == LIN_GATE_UP)
        pdl_wait();
    pdl_launch();
    pour_share<P> share = {a, (a.n_tile + 3) / 4, 0, warp % 4};
    const int n_cols = chain_uniform(*(const volatile int32_t *)a.n_tiles);
    const int blocks = even_blocks(n_cols, gridDim.x), block = min((int)blockIdx.x, blocks);
    const int64_t total = (int64_t)n_cols * share.n_piece;
    const int begin = (int)(total * block / max(blocks, 1));
    share.end = (int)(total * min(block + 1, blocks) / max(blocks, 1));
    int item = begin + group, rows = 8;
    for (int e = begin / share.n_piece; e * share.n_piece < share.end; e++)
        rows = max(rows, (__ldcg(&a.tile[e].z) + 7) & ~7);
    pour_ring<P> r;
    rows = chain_uniform(rows);
    r.depth = P::depth(rows);
    const int ring = (rows * P::N_UNIT * 128) + warp * r.depth * P::PART;
    r.w = at + ring;
    r.w_ptr = x + ring;
    r.full = at + POUR_SHARED - 1024 - (P::WARPS - warp) * P::MOST_DEPTH * 8;
    r.stage = 0;
    r.parity = 0;
    if (lane < r.depth)
        mbar_init(r.full + 8 * lane, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    const uint8_t *src = NULL;
    if (item < share.end) {
        src = share.tile_at(item);
        for (int i = 0; i < r.depth; i++)
            r.ask(i, src + i * P::PART, lane);
    }
    if (MODE != LIN_GATE_UP)
        pdl_wait();
    typename P::weights w;
    if (item < share.end)
        r.open(w, lane);
    for (int i = begin; i < share.end;) {
        const int entry = i / share.n_piece, end = min((entry + 1) * share.n_piece, share.end);
        const lin_cols c = lin_columns<MODE>(a, 0, entry);
        const int n = (chain_uniform(c.n) + 7) & ~7;
        pour_rows<P, MODE>(a, c, n, x);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
#define POUR_CASE(N)                                                                                                   \
    if constexpr (N <= P::MOST)                                                                                        \
        if (n == N)                                                                                                    \
    pour_pieces<P, MODE, N>(share, c, item, end, at, src, w, r)
        POUR_CASE(8);
        POUR_CASE(16);
        POUR_CASE(24);
        POUR_CASE(32);
#undef POUR_CASE
        __syncthreads();
        i = end;
    }
#else
    (void)a;
#endif
}

template <class P, lin_mode MODE> static void pour_launch(cuda_run *r, const lin_args &a) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(pour_kernel<P, MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize, POUR_SHARED);
    cuda_launch(r, pour_kernel<P, MODE>, dim3((unsigned)r->dev->n_sm), dim3(P::WARPS * 32), (size_t)POUR_SHARED, a);
}

/* pour.cu: experts of POUR_COLS rows or fewer at once, where chain_can. */
#define POUR_COLS 32
template <lin_mode MODE> void pour_run(cuda_run *r, const cuda_matrix *m, lin_args a);

#endif
