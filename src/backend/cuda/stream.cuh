/* backend/cuda/stream.cuh: packed matrices times 1 to 24 rows at the speed of the memory, for gpt-oss's widths.
 *
 * One block a multiprocessor walks its share of the (columns, tile) list. A producer warp keeps a ring of bulk copies
 * of weights full; each of N_SEG warps sums one segment of SEG units with the columns' activations in registers, so
 * that a weight passes through shared memory once and an activation not at all. Segments meet in shared memory as in
 * linear.cuh: the same numbers in the same order. */
#ifndef ORCD_BACKEND_CUDA_STREAM_CUH
#define ORCD_BACKEND_CUDA_STREAM_CUH

#include "backend/cuda/decode_core.cuh"
#include "backend/cuda/linear.cuh"

#define STREAM_MAX_COLS 24

/* Ring of a matrix of N_SEG segments: pieces of about 8 KB, about 100 KB in flight. */
template <class F, int SEG, int N_SEG> struct stream_plan {
    static constexpr int TILE = SEG * N_SEG * F::CHUNK;
    static constexpr int PARTS = N_SEG == 15 ? (TILE > 64 * 1024 ? 15 : TILE > 32 * 1024 ? 5 : 3) : 8;
    static constexpr int FIT = 98 * 1024 / (TILE / PARTS), STAGES = FIT > PARTS ? FIT / PARTS *PARTS : PARTS;
    using pipe = dec_pipe<F, SEG, N_SEG, PARTS, STAGES, N_SEG>;
    static constexpr int THREADS = (N_SEG + 1) * 32;
};

/* Sums of a tile: [segment][column][16 rows], columns 20 apart: no bank conflicts. */
template <int NT, int N_SEG> struct stream_sums {
    static constexpr int GROUP = NT == 1 ? 4 : NT == 2 ? 2 : 1; /* tiles whose sums meet at once */
    static constexpr int SEGMENT = NT * 8 * 20, TILE = N_SEG * SEGMENT, BYTES = 2 * GROUP * TILE * 4;
};

struct stream_tiles { /* the block's share of the list: n_tile tiles of every entry of `columns` */
    const uint8_t *w;
    int64_t mat_bytes, tile_bytes;
    const int4 *columns; /* x: matrix; NULL: always the first */
    int n_tile, block, tile;
    __device__ __forceinline__ const uint8_t *next() {
        const uint8_t *p = w + (columns ? columns[block].x : 0) * mat_bytes + tile * tile_bytes;
        if (++tile == n_tile)
            tile = 0, block++;
        return p;
    }
};

/* The lane's activations of its warp's segment: 8 columns a step of mma, two blocks of 32 values a unit. */
template <int NT, int SEG, lin_mode MODE>
static __device__ __forceinline__ void stream_rows(const lin_args &a, const lin_cols &c, int warp, int lane,
                                                   uint4 (&x)[NT][SEG][2]) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const int i = n * 8 + lane / 4;
        const uint16_t *src =
            a.x + (i < c.n ? lin_source<MODE>(a, c.first + i) : 0) * a.ldx + warp * SEG * 64 + lane % 4 * 8;
#pragma unroll
        for (int u = 0; u < SEG; u++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                x[n][u][h] = i < c.n ? __ldcg((const uint4 *)(src + u * 64 + h * 32)) : make_uint4(0, 0, 0, 0);
    }
}

/* A group of m tiles of the same columns from their segments' sums. */
template <int NT, int N_SEG, lin_mode MODE>
static __device__ __forceinline__ void stream_finish(const lin_args &a, const lin_cols &c, int tile0, int m,
                                                     const float *sums) {
    using S = stream_sums<NT, N_SEG>;
    constexpr int R = MODE == LIN_GATE_UP ? 8 : 16;
    const int per = R * c.n;
    for (int z = threadIdx.x; z < per * m; z += N_SEG * 32) {
        const int tile = z / per, r = z % R, i = z % per / R;
        const float *from = sums + tile * S::TILE + i * 20 + r;
        float s = from[0], up = MODE == LIN_GATE_UP ? from[8] : 0;
#pragma unroll
        for (int q = 1; q < N_SEG; q++) {
            s += from[q * S::SEGMENT];
            if (MODE == LIN_GATE_UP)
                up += from[q * S::SEGMENT + 8];
        }
        if (MODE == LIN_GATE_UP)
            lin_put_glu(a, c.mat, (tile0 + tile) * 8 + r, c.first + i, s, up);
        else
            lin_put<MODE>(a, c.mat, lin_row(a, tile0 + tile, r), c.first + i, s);
    }
}

template <class F, int NT, lin_mode MODE, int SEG, int N_SEG>
static __global__ __launch_bounds__((N_SEG + 1) * 32, 1) void stream_kernel(lin_args a) {
    using P = typename stream_plan<F, SEG, N_SEG>::pipe;
    using S = stream_sums<NT, N_SEG>;
    constexpr int COLS = NT * 8;
    extern __shared__ __align__(128) uint8_t stream_shared[];
    float *const sums = (float *)(stream_shared + P::SMEM);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tile = a.n_tile;
    P pipe;
    stream_tiles tiles = {a.w, a.mat_bytes, (int64_t)a.n_unit * F::CHUNK, MODE == LIN_DENSE ? NULL : a.tile, n_tile};
    int first = 0, n = 0;
    auto share = [&](int n_block) {
        const int64_t total = (int64_t)n_block * n_tile;
        first = (int)(total * blockIdx.x / gridDim.x);
        n = (int)(total * (blockIdx.x + 1) / gridDim.x) - first;
        tiles.block = first / n_tile;
        tiles.tile = first % n_tile;
    };
    if (MODE == LIN_DENSE) { /* weights are known before the input is */
        share((a.rows.cap + COLS - 1) / COLS);
        pipe.open(stream_shared, n);
        if (warp == N_SEG)
            pipe.fill(tiles, P::refill(0));
        pdl_launch();
        pdl_wait();
    } else {
        pdl_launch();
        pdl_wait();
        share(*(const volatile int32_t *)a.n_tiles);
        pipe.open(stream_shared, n);
    }
    __syncthreads();
    if (warp == N_SEG) {
        pipe.fill(tiles, INT32_MAX);
        return;
    }
    uint4 x[NT][SEG][2];
    int block = first / n_tile, tile = first % n_tile;
    for (int done = 0, k = 0; done < n; k ^= 1) {
        const lin_cols c = lin_columns<MODE>(a, COLS, block);
        if (done == 0 || tile == 0)
            stream_rows<NT, SEG, MODE>(a, c, warp, lane, x);
        const int m = min(min(S::GROUP, n - done), n_tile - tile);
        float *out = sums + k * S::GROUP * S::TILE;
        for (int i = 0; i < m; i++) {
            float acc[NT][4];
#pragma unroll
            for (int j = 0; j < NT; j++)
                acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
            const uint8_t *p = pipe.wait_tile();
#pragma unroll
            for (int u = 0; u < SEG; u++) {
                const typename F::raw w = F::load_shared(p + u * F::CHUNK, lane);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const typename F::frag f = F::get(w, h);
#pragma unroll
                    for (int j = 0; j < NT; j++)
                        F::apply(acc[j], f, x[j][u][h]);
                }
            }
            pipe.release_tile();
            float *to = out + i * S::TILE + warp * S::SEGMENT + lane % 4 * 40 + lane / 4;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                to[j * 160] = acc[j][0], to[j * 160 + 20] = acc[j][1];
                to[j * 160 + 8] = acc[j][2], to[j * 160 + 28] = acc[j][3];
            }
        }
        asm volatile("bar.sync 1, %0;" ::"n"(N_SEG * 32) : "memory");
        stream_finish<NT, N_SEG, MODE>(a, c, tile, m, out);
        done += m;
        tile += m;
        if (tile == n_tile)
            tile = 0, block++;
    }
}

template <class F, int NT, lin_mode MODE, int SEG, int N_SEG>
static void stream_launch(cuda_run *r, const lin_args &a, int n_block) {
    const size_t bytes = stream_plan<F, SEG, N_SEG>::pipe::SMEM + stream_sums<NT, N_SEG>::BYTES;
    const int64_t items = (int64_t)n_block * a.n_tile;
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(stream_kernel<F, NT, MODE, SEG, N_SEG>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    cuda_launch(r, stream_kernel<F, NT, MODE, SEG, N_SEG>,
                dim3((unsigned)(items < r->dev->n_sm ? items : r->dev->n_sm)), dim3((N_SEG + 1) * 32), bytes, a);
}

template <class F, lin_mode MODE, int SEG, int N_SEG>
static void stream_launch_width(cuda_run *r, const lin_args &a, int width, int n_block) {
    if (width == 8)
        stream_launch<F, 1, MODE, SEG, N_SEG>(r, a, n_block);
    else if (width == 16)
        stream_launch<F, 2, MODE, SEG, N_SEG>(r, a, n_block);
    else
        stream_launch<F, 3, MODE, SEG, N_SEG>(r, a, n_block);
}

template <class F, lin_mode MODE>
static bool stream_launch_form(cuda_run *r, const lin_args &a, int width, int n_block) {
    if (a.n_unit == 45)
        stream_launch_width<F, MODE, 3, 15>(r, a, width, n_block);
    else if constexpr (MODE == LIN_DENSE)
        if (a.n_unit == 64)
            stream_launch_width<F, MODE, 4, 16>(r, a, width, n_block);
    return a.n_unit == 45 || (MODE == LIN_DENSE && a.n_unit == 64);
}

/* As lin_launch, for width 8, 16 or 24; false: no kernel is made for this matrix. */
template <lin_mode MODE> static bool stream_run(cuda_run *r, const cuda_matrix *m, lin_args a, int width, int n_block) {
    lin_matrix(&a, m);
    switch (m->form) {
    case CUDA_FORM_MXFP4:
        return stream_launch_form<form_mxfp4, MODE>(r, a, width, n_block);
    case CUDA_FORM_Q8_0:
        return stream_launch_form<form_q8_0, MODE>(r, a, width, n_block);
    case CUDA_FORM_F16:
        return stream_launch_form<form_f16<1>, MODE>(r, a, width, n_block);
    default:
        return false;
    }
}

#endif
