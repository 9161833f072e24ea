/* backend/cuda/mid.cuh: dense products of 8 to 32 rows at once on Hopper: the bits of linear.cuh's kernels, by wgmma.
 *
 * A block keeps all columns of its rows of activations in shared memory and walks its share of the (rows, 64 matrix
 * rows) list. Groups of four warps take 64 matrix rows each, whenever they are done with the last, and never wait for
 * another: weights go from memory into registers, a segment ahead.
 *
 * Activations lie as in wide.cuh: [unit of 64 columns][row][128 bytes], pieces swizzled. */
#ifndef ORCD_BACKEND_CUDA_MID_CUH
#define ORCD_BACKEND_CUDA_MID_CUH

#include "backend/cuda/chain.cuh"

#ifdef HAVE_WGMMA
/* Rows of c into shared memory, n (a multiple of 8) of them, zeros behind c.n. Four lanes take 64 bytes of a row: each
 * spreads its eight columns over the four pieces of their block. */
template <int N_UNIT, int MOST, int WARPS>
static __device__ __forceinline__ void mid_rows(const lin_args &a, const lin_cols &c, int n, uint8_t *to) {
    constexpr int BLOCKS = 2 * N_UNIT, EACH = (BLOCKS + WARPS - 1) / WARPS;
    const int warp = threadIdx.x / 32, r = threadIdx.x / 4 % 8, v = threadIdx.x % 4;
    int64_t from[MOST / 8];
#pragma unroll
    for (int j = 0; j < MOST / 8; j++)
        from[j] = j * 8 + r < c.n ? (int64_t)(c.first + j * 8 + r) * a.ldx + v * 8 : -1;
#pragma unroll
    for (int j = 0; j < MOST / 8; j++) {
        if (j * 8 >= n)
            break;
        uint4 x[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int b = warp + i * WARPS;
            x[i] =
                b < BLOCKS && from[j] >= 0 ? __ldcg((const uint4 *)(a.x + from[j] + b * 32)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int b = warp + i * WARPS;
            uint8_t *s = to + (int64_t)(b / 2) * n * 128 + (j * 8 + r) * 128 + v * 4;
            if (b < BLOCKS) {
                *(uint32_t *)(s + ((b % 2 * 4 + 0) ^ r) * 16) = x[i].x;
                *(uint32_t *)(s + ((b % 2 * 4 + 1) ^ r) * 16) = x[i].y;
                *(uint32_t *)(s + ((b % 2 * 4 + 2) ^ r) * 16) = x[i].z;
                *(uint32_t *)(s + ((b % 2 * 4 + 3) ^ r) * 16) = x[i].w;
            }
        }
    }
}

/* total += a segment: a product for each block of 32 columns. raw: its weights; each unit's place is filled again from
 * `then`, the next segment, as soon as it is unpacked. */
template <class F, int N, int SEG>
static __device__ __forceinline__ void mid_segment(typename F::raw (&raw)[SEG], const uint8_t *then, uint64_t desc,
                                                   int lane, float (&total)[N / 2]) {
    float acc[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        acc[i] = 0;
    float c[N / 2], scale[2];
#pragma unroll
    for (int i = 0; i < 2 * SEG; i++) {
        const int u = i / 2;
        const frag_block f = F::block(raw[u], i % 2);
        if (i % 2)
            raw[u] = F::load(then + u * F::CHUNK, lane);
        if (i) {
            wgmma_wait<0>(c);
            wide_scale(acc, c, scale);
        }
        scale[0] = f.s[0], scale[1] = f.s[1];
        wide_issue<N>(c, f.a, desc + u * (N * 8) + i % 2 * 4);
    }
    wgmma_wait<0>(c);
    wide_scale(acc, c, scale);
    wide_add(total, acc);
}

/* The group's pieces of 64 matrix rows: from, from + GROUPS, .. below `end`. raw: the first segment of `from`. */
template <class P, int N>
static __device__ __forceinline__ void mid_pieces(const lin_args &a, const lin_cols &c, int from, int end, uint32_t x,
                                                  typename P::form::raw (&raw)[P::SEG]) {
    using F = typename P::form;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const uint8_t *src = P::tile_at(a, c.mat, from);
    for (int piece = from; piece < end; piece += P::GROUPS) {
        const uint8_t *const next = piece + P::GROUPS < end ? P::tile_at(a, c.mat, piece + P::GROUPS) : src;
        float total[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            total[i] = 0;
        uint64_t desc = wgmma_desc(x);
#pragma unroll 1
        for (int s = 1; s <= P::N_SEG; s++) {
            mid_segment<F, N, P::SEG>(raw, s < P::N_SEG ? src + s * (P::SEG * F::CHUNK) : next, desc, lane, total);
            desc += P::SEG * (N * 8);
        }
        const int tile = piece * 4 + warp;
        float bias[2];
        wide_bias<LIN_DENSE>(a, c.mat, tile, lane, bias);
        wide_put<LIN_DENSE, N>(a, c, NULL, tile, lane, bias, 0, total);
        src = next;
    }
}
#endif

/* How one shape is computed: segments, the rows of activations that fit, groups of four warps. */
template <class F, int SEG_, int N_SEG_, int MOST_, int GROUPS_> struct mid_plan {
    using form = F;
    static constexpr int SEG = SEG_, N_SEG = N_SEG_, MOST = MOST_, GROUPS = GROUPS_;
    static constexpr int N_UNIT = SEG * N_SEG, SHARED = N_UNIT * 128 * MOST + 1024;
    /* The warp's tile of a piece. */
    static __device__ __forceinline__ const uint8_t *tile_at(const lin_args &a, int mat, int piece) {
        const int tile = min(piece * 4 + (int)threadIdx.x / 32 % 4, a.n_tile - 1);
        return a.w + mat * a.mat_bytes + (int64_t)tile * (N_UNIT * F::CHUNK);
    }
};

template <class P>
static __global__ __launch_bounds__(P::GROUPS * 128, 1) void mid_kernel(const __grid_constant__ lin_args a, int cols) {
#ifdef HAVE_WGMMA
    extern __shared__ __align__(128) uint8_t shared[];
    uint8_t *x = shared + (-(uint32_t)__cvta_generic_to_shared(shared) & 1023);
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(x);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), lane = threadIdx.x % 32, n_piece = (a.n_tile + 3) / 4;
    pdl_launch();
    const int n_cols = (a.rows.cap + cols - 1) / cols, blocks = even_blocks(n_cols, gridDim.x);
    const int block = min((int)blockIdx.x, blocks);
    const int64_t total = (int64_t)n_cols * n_piece;
    const int end = (int)(total * min(block + 1, blocks) / blocks);
    bool waited = false;
    for (int i = (int)(total * block / blocks); i < end;) {
        const int entry = i / n_piece, from = i % n_piece, n = min(n_piece - from, end - i);
        typename P::form::raw raw[P::SEG];
        const uint8_t *w = P::tile_at(a, 0, from + group);
#pragma unroll
        for (int j = 0; j < P::SEG; j++)
            raw[j] = P::form::load(w + j * P::form::CHUNK, lane);
        if (!waited)
            pdl_wait();
        waited = true;
        i += n;
        const lin_cols c = lin_columns<LIN_DENSE>(a, cols, entry);
        if (c.n <= 0)
            break; /* rows of the bucket that the batch does not have; all that follow lack them too */
        const int rows = (c.n + 7) & ~7;
        mid_rows<P::N_UNIT, P::MOST, P::GROUPS * 4>(a, c, rows, x);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
#define MID_CASE(N)                                                                                                    \
    if constexpr (N <= P::MOST)                                                                                        \
        if (rows == N)                                                                                                 \
    mid_pieces<P, N>(a, c, from + group, from + n, at, raw)
        MID_CASE(8);
        MID_CASE(16);
        MID_CASE(24);
        MID_CASE(32);
#undef MID_CASE
        __syncthreads();
    }
    if (!waited)
        pdl_wait();
#else
    (void)a;
    (void)cols;
#endif
}

template <class P> static void mid_launch(cuda_run *r, const lin_args &a, int cols) {
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(mid_kernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, P::SHARED);
    cuda_launch(r, mid_kernel<P>, dim3((unsigned)r->dev->n_sm), dim3(P::GROUPS * 128), (size_t)P::SHARED, a, cols);
}

/* Rows of an item of a dense product, 0 to leave it: it pays where each group has one piece. */
static inline int mid_dense_cols(const cuda_run *r, const cuda_matrix *m, int rows) {
    const int most = m->n_unit == 45 ? 32 : m->n_unit == 64 ? 24 : 0, n_piece = (m->n_tile + 3) / 4;
    if (cuda_has_wide(r->dev) && m->form == CUDA_FORM_Q8_0)
        for (int cols = 8; cols <= most; cols += 8)
            if ((int64_t)((rows + cols - 1) / cols) * n_piece <= 4 * r->dev->n_sm)
                return cols;
    return 0;
}
static inline void mid_dense(cuda_run *r, const cuda_matrix *m, lin_args a) {
    const int cols = mid_dense_cols(r, m, a.rows.cap);
    lin_matrix(&a, m);
    if (m->n_unit == 45)
        mid_launch<mid_plan<form_q8_0, 3, 15, 32, 4>>(r, a, cols);
    else
        mid_launch<mid_plan<form_q8_0, 4, 16, 24, 4>>(r, a, cols);
}

#endif
