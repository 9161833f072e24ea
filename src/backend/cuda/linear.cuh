/* backend/cuda/linear.cuh: packed matrices times rows: one kernel for few rows, one for many, the same bits.
 *
 * few: a block walks tiles of 16 matrix rows; its 16 warps take one segment of columns each, with the first weights
 * on their way before the wait for the input. Segments meet in shared memory.
 * many: a block holds 8 tiles and 64 columns (tokens); 4 warps walk all segments of 2 tiles each, weights and
 * activations passing through shared memory in stages. */
#ifndef ORCD_BACKEND_CUDA_LINEAR_CUH
#define ORCD_BACKEND_CUDA_LINEAR_CUH

#include "backend/cuda/cuda.h"
#include "backend/cuda/math.cuh"
#include "quant/f16/cuda_f16.cuh"
#include "quant/mxfp4/cuda_mxfp4.cuh"
#include "quant/q8_0/cuda_q8_0.cuh"

enum lin_mode { LIN_DENSE, LIN_GATE_UP, LIN_DOWN };

struct lin_args {
    const uint8_t *w;
    int64_t mat_bytes;
    int n_tile, n_unit, seg;
    float factor;
    const float *bias; /* [n_mat][bias_mat]: GATE_UP gate then up */
    int64_t bias_mat;
    const uint16_t *x; /* f16 rows */
    int64_t ldx;
    cuda_count rows;  /* DENSE */
    const int4 *tile; /* experts: expert, first, count; perm[first ..] are the pairs */
    const int32_t *n_tiles, *perm;
    int k; /* experts of a row */
    float *y;
    uint16_t *yh; /* f16 output, or NULL */
    int64_t ldy, ldh;
    int n_row, row0; /* rows of this matrix; where they begin in y */
    int epilogue;
    cuda_rowmap map;
    float alpha, limit;
    const float2 *rope; /* wide.cuh and flow.cuh, q, k and v: cos and sin [row][64] for rows below n_rope, or NULL */
    int n_rope;
};

/* Which columns (tokens) a block works on. */
struct lin_cols {
    int mat, first, n;
};
template <lin_mode MODE> static __device__ __forceinline__ lin_cols lin_columns(const lin_args &a, int per, int block) {
    if (MODE == LIN_DENSE) {
        const int first = block * per;
        return {0, first, min(per, count_rows(a.rows) - first)};
    }
    if (block >= *(const volatile int32_t *)a.n_tiles)
        return {0, 0, 0};
    const int4 t = a.tile[block];
    return {t.x, t.y, t.z};
}

/* Row of the activations of column i. */
template <lin_mode MODE> static __device__ __forceinline__ int64_t lin_source(const lin_args &a, int i) {
    return MODE == LIN_GATE_UP ? a.perm[i] / a.k : i;
}

static __device__ __forceinline__ int lin_row(const lin_args &a, int tile, int r) {
    if (a.map == CUDA_ROWS_PAIR64)
        return (tile >> 2) * 64 + (tile & 3) * 8 + (r & 7) + (r >> 3) * 32;
    return tile * 16 + r;
}

static __device__ __forceinline__ float gelu_tanh(float v) {
    return 0.5f * v * (1.f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}
static __device__ __forceinline__ float gelu_erf(float v) { return 0.5f * v * (1.f + erff(v * 0.7071067811865476f)); }

/* One finished sum of DENSE or DOWN: matrix row `row`, column i. */
template <lin_mode MODE>
static __device__ __forceinline__ void lin_put(const lin_args &a, int mat, int row, int i, float sum) {
    if (row >= a.n_row)
        return;
    float v = __fmul_rn(sum, a.factor);
    if (a.bias)
        v += a.bias[mat * a.bias_mat + a.row0 + row];
    if (MODE == LIN_DOWN) {
        a.y[(int64_t)a.perm[i] * a.ldy + row] = v;
        return;
    }
    float *y = a.y + (int64_t)i * a.ldy + a.row0 + row;
    if (a.epilogue == BE_EPI_ADD)
        v = *y + v;
    else if (a.epilogue == BE_EPI_GELU_TANH)
        v = gelu_tanh(v);
    else if (a.epilogue == BE_EPI_GELU_ERF)
        v = gelu_erf(v);
    *y = v;
    if (a.yh)
        a.yh[(int64_t)i * a.ldh + a.row0 + row] = f16_bits(v);
}

/* A finished pair of GATE_UP: ff index, column i. */
static __device__ __forceinline__ void lin_put_glu(const lin_args &a, int mat, int ff, int i, float gate, float up) {
    if (ff >= a.n_row)
        return;
    gate = __fmul_rn(gate, a.factor);
    up = __fmul_rn(up, a.factor);
    if (a.bias) {
        gate += a.bias[mat * a.bias_mat + ff];
        up += a.bias[mat * a.bias_mat + a.n_row + ff];
    }
    a.yh[(int64_t)i * a.ldh + ff] = f16_bits(glu(gate, up, a.alpha, a.limit));
}

#define LIN_WARPS CUDA_MAX_SPLIT

/* 16-byte piece c (0..7) of a unit of activation row r in shared memory: rows of a phase take different banks. */
static __device__ __forceinline__ int lin_piece(int r, int c) { return (c ^ ((r & 1) << 2)) << 4; }

/* The columns in hand of lin_few: where their activations are. */
template <int NT, bool SHARED> struct lin_input {
    const uint16_t *x[NT];
    uint8_t *xs; /* [column][unit][128 bytes] */
    int n_unit, g, t;

    template <lin_mode MODE> __device__ __forceinline__ void open(const lin_args &a, const lin_cols &c) {
        if (!SHARED) {
#pragma unroll
            for (int n = 0; n < NT; n++)
                x[n] = n * 8 + g < c.n ? a.x + lin_source<MODE>(a, c.first + n * 8 + g) * a.ldx + t * 8 : NULL;
            return;
        }
        __syncthreads(); /* the columns before are done with */
        for (int r = threadIdx.x / 32; r < NT * 8; r += LIN_WARPS) {
            const uint4 *src = r < c.n ? (const uint4 *)(a.x + lin_source<MODE>(a, c.first + r) * a.ldx) : NULL;
            uint8_t *dst = xs + (int64_t)r * n_unit * 128;
            for (int i = threadIdx.x % 32; i < n_unit * 8; i += 32)
                *(uint4 *)(dst + i / 8 * 128 + lin_piece(r, i % 8)) = src ? src[i] : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
    }
    __device__ __forceinline__ uint4 piece(int n, int unit, int h) const {
        if (SHARED)
            return *(const uint4 *)(xs + ((int64_t)(n * 8 + g) * n_unit + unit) * 128 + lin_piece(g, h * 4 + t));
        return x[n] ? *(const uint4 *)(x[n] + unit * 64 + h * 32) : make_uint4(0, 0, 0, 0);
    }
};

/* acc += one unit. */
template <class F, int NT, bool SHARED>
static __device__ __forceinline__ void lin_unit(const typename F::raw &w, const lin_input<NT, SHARED> &in, int unit,
                                                float (*acc)[4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const typename F::frag f = F::get(w, h);
#pragma unroll
        for (int n = 0; n < NT; n++)
            F::apply(acc[n], f, in.piece(n, unit, h));
    }
}

/* Blocks share the list of (columns, tile) pairs evenly; the next tile's first weights are asked for before this one's
 * segments meet. */
template <class F, int NT, lin_mode MODE, bool SHARED>
static __global__ __launch_bounds__(LIN_WARPS * 32, NT > 2 ? 1 : 2) void lin_few_kernel(lin_args a) {
    constexpr int COLS = NT * 8, AHEAD = F::AHEAD;
    extern __shared__ __align__(128) uint8_t shared[];
    float(*red)[16][COLS] = (float(*)[16][COLS])shared; /* [2][LIN_WARPS][16][COLS] */
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tile = a.n_tile;
    const int u0 = min(warp * a.seg, a.n_unit), u1 = min(u0 + a.seg, a.n_unit);
    const int n_seg = (a.n_unit + a.seg - 1) / a.seg;
    lin_input<NT, SHARED> in;
    in.xs = shared + 2 * sizeof(float) * LIN_WARPS * 16 * COLS;
    in.n_unit = a.n_unit;
    in.g = lane >> 2;
    in.t = lane & 3;
    typename F::raw w[AHEAD];
    auto ask = [&](int mat, int tile) {
        const uint8_t *src = a.w + mat * a.mat_bytes + ((int64_t)tile * a.n_unit + u0) * F::CHUNK;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (u0 + i < u1)
                w[i] = F::load(src + i * F::CHUNK, lane);
        return src;
    };
    /* experts are only known after the wait; how many columns there are too, but all DENSE blocks begin at column 0 */
    const uint8_t *src = NULL;
    int64_t n_block = 1;
    if (MODE == LIN_DENSE) {
        n_block = (a.rows.cap + COLS - 1) / COLS;
        const int64_t first = n_block * n_tile * blockIdx.x / gridDim.x;
        src = ask(0, (int)(first % n_tile));
    }
    pdl_launch();
    pdl_wait();
    if (MODE != LIN_DENSE)
        n_block = *(const volatile int32_t *)a.n_tiles;
    const int64_t total = n_block * n_tile, first = total * blockIdx.x / gridDim.x;
    const int64_t end = total * (blockIdx.x + 1) / gridDim.x;
    int block = (int)(first / n_tile), tile = (int)(first - (int64_t)block * n_tile), k = 0;
    lin_cols c = {0, 0, 0};
    bool fresh = true;
    for (int64_t item = first; item < end; item++, k ^= 1) {
        if (fresh) {
            c = lin_columns<MODE>(a, COLS, block);
            if (c.n <= 0)
                return; /* DENSE: rows of the bucket that the batch does not have; all that follow lack them too */
            if (MODE != LIN_DENSE && item == first)
                src = ask(c.mat, tile);
            in.template open<MODE>(a, c);
        }
        float acc[NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++)
            acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
        for (int u = u0; u < u1; u += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (u + i < u1) {
                    lin_unit<F, NT, SHARED>(w[i], in, u + i, acc);
                    if (u + i + AHEAD < u1)
                        w[i] = F::load(src + (int64_t)(u + i + AHEAD - u0) * F::CHUNK, lane);
                }
        }
        const lin_cols done = c;
        const int done_tile = tile;
        fresh = ++tile == n_tile;
        if (fresh) {
            tile = 0;
            block++;
        }
        if (item + 1 < end)
            src = ask(!fresh || MODE == LIN_DENSE ? c.mat : a.tile[block].x, tile);
        float(*out)[16][COLS] = red + k * LIN_WARPS;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            *(float2 *)&out[warp][in.g][n * 8 + 2 * in.t] = make_float2(acc[n][0], acc[n][1]);
            *(float2 *)&out[warp][in.g + 8][n * 8 + 2 * in.t] = make_float2(acc[n][2], acc[n][3]);
        }
        __syncthreads(); /* the other buffer was read before the barrier of the tile before */
        constexpr int R = MODE == LIN_GATE_UP ? 8 : 16;
        for (int z = threadIdx.x; z < R * COLS; z += LIN_WARPS * 32) {
            const int r = z % R, i = z / R;
            if (i >= done.n)
                break;
            float s = out[0][r][i], up = MODE == LIN_GATE_UP ? out[0][r + 8][i] : 0;
            for (int q = 1; q < n_seg; q++) {
                s += out[q][r][i];
                if (MODE == LIN_GATE_UP)
                    up += out[q][r + 8][i];
            }
            if (MODE == LIN_GATE_UP)
                lin_put_glu(a, done.mat, done_tile * 8 + r, done.first + i, s, up);
            else
                lin_put<MODE>(a, done.mat, lin_row(a, done_tile, r), done.first + i, s);
        }
    }
}

static __device__ __forceinline__ void cp_async16(void *dst, const void *src, bool there) {
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(dst);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(src), "r"(there ? 16 : 0) : "memory");
}

#define MANY_TILES 8
#define MANY_COLS 64

template <class F> struct lin_many {
    static constexpr int STAGES = F::CHUNK > 2048 ? 3 : 4;
    static constexpr int A_BYTES = MANY_TILES * F::CHUNK, B_BYTES = MANY_COLS * 128, STAGE = A_BYTES + B_BYTES;
    static constexpr int SHARED = STAGES * STAGE;
};

template <class F, lin_mode MODE> static __global__ __launch_bounds__(128) void lin_many_kernel(lin_args a) {
    using P = lin_many<F>;
    constexpr int NT = MANY_COLS / 8;
    extern __shared__ __align__(128) uint8_t stage[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
    pdl_launch();
    pdl_wait();
    const lin_cols c = lin_columns<MODE>(a, MANY_COLS, (int)blockIdx.y);
    if (c.n <= 0)
        return;
    const int tile0 = blockIdx.x * MANY_TILES;
    const uint8_t *w = a.w + c.mat * a.mat_bytes;
    const uint16_t *x[4]; /* this thread copies pieces threadIdx % 8 of rows threadIdx / 8 + 16 i */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int col = threadIdx.x / 8 + 16 * i;
        x[i] = a.x + (col < c.n ? lin_source<MODE>(a, c.first + col) * a.ldx : 0) + threadIdx.x % 8 * 8;
    }
    auto fill = [&](int u) {
        uint8_t *s = stage + u % P::STAGES * P::STAGE;
        if (u < a.n_unit) {
            for (int k = threadIdx.x; k < P::A_BYTES / 16; k += 128) {
                const int tile = min(tile0 + k / (F::CHUNK / 16), a.n_tile - 1), at = k % (F::CHUNK / 16);
                cp_async16(s + k * 16, w + ((int64_t)tile * a.n_unit + u) * F::CHUNK + at * 16, true);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int col = threadIdx.x / 8 + 16 * i;
                cp_async16(s + P::A_BYTES + col * 128 + lin_piece(col, threadIdx.x % 8), x[i] + u * 64, col < c.n);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    float acc[2][NT][4], total[2][NT][4];
#pragma unroll
    for (int i = 0; i < 2 * NT * 4; i++)
        (&acc[0][0][0])[i] = (&total[0][0][0])[i] = 0;
    for (int u = 0; u < P::STAGES - 1; u++)
        fill(u);
    for (int u = 0, left = a.seg; u < a.n_unit; u++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(P::STAGES - 2) : "memory");
        __syncthreads();
        fill(u + P::STAGES - 1);
        const uint8_t *s = stage + u % P::STAGES * P::STAGE, *b = s + P::A_BYTES;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            typename F::frag f[2];
#pragma unroll
            for (int m = 0; m < 2; m++)
                f[m] = F::get(F::load_shared(s + (warp * 2 + m) * F::CHUNK, lane), h);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4 v = *(const uint4 *)(b + (n * 8 + g) * 128 + lin_piece(g, h * 4 + t));
                F::apply(acc[0][n], f[0], v);
                F::apply(acc[1][n], f[1], v);
            }
        }
        if (--left == 0 || u + 1 == a.n_unit) {
            left = a.seg;
#pragma unroll
            for (int i = 0; i < 2 * NT * 4; i++) {
                (&total[0][0][0])[i] += (&acc[0][0][0])[i];
                (&acc[0][0][0])[i] = 0;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const int tile = tile0 + warp * 2 + m;
        if (tile >= a.n_tile)
            break;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int i = n * 8 + 2 * t + h;
                if (i >= c.n)
                    continue;
                if (MODE == LIN_GATE_UP) {
                    lin_put_glu(a, c.mat, tile * 8 + g, c.first + i, total[m][n][h], total[m][n][h + 2]);
                } else {
                    lin_put<MODE>(a, c.mat, lin_row(a, tile, g), c.first + i, total[m][n][h]);
                    lin_put<MODE>(a, c.mat, lin_row(a, tile, g + 8), c.first + i, total[m][n][h + 2]);
                }
            }
    }
}

/* Columns per block for that many rows: 8, 16, 32 (few) or 64 (many). */
static inline int lin_width(int rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

template <class F, int NT, lin_mode MODE, bool SHARED>
static void lin_launch_few(cuda_run *r, const lin_args &a, size_t bytes, int n_block) {
    const int64_t items = (int64_t)n_block * a.n_tile,
                  slots = (int64_t)(bytes > 113 * 1024 || NT > 2 ? 1 : 2) * r->dev->n_sm;
    if (r->error == cudaSuccess)
        r->error = cudaFuncSetAttribute(lin_few_kernel<F, NT, MODE, SHARED>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    cuda_launch(r, lin_few_kernel<F, NT, MODE, SHARED>, dim3((unsigned)(items < slots ? items : slots)),
                dim3(LIN_WARPS * 32), bytes, a);
}

#define LIN_MAX_SHARED ((size_t)226 * 1024)

template <class F, int NT, lin_mode MODE> static void lin_launch_width(cuda_run *r, const lin_args &a, int n_block) {
    const size_t sums = (size_t)2 * 4 * LIN_WARPS * 16 * NT * 8, rows = (size_t)NT * 8 * a.n_unit * 128;
    if (sums + rows <= LIN_MAX_SHARED)
        lin_launch_few<F, NT, MODE, true>(r, a, sums + rows, n_block);
    else
        lin_launch_few<F, NT, MODE, false>(r, a, sums, n_block);
}

template <class F, lin_mode MODE> static void lin_launch_form(cuda_run *r, const lin_args &a, int width, int n_block) {
    switch (width) {
    case 8:
        lin_launch_width<F, 1, MODE>(r, a, n_block);
        break;
    case 16:
        lin_launch_width<F, 2, MODE>(r, a, n_block);
        break;
    case 32:
        lin_launch_width<F, 4, MODE>(r, a, n_block);
        break;
    default:
        if (r->error == cudaSuccess)
            r->error = cudaFuncSetAttribute(lin_many_kernel<F, MODE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            lin_many<F>::SHARED);
        cuda_launch(r, lin_many_kernel<F, MODE>, dim3((unsigned)((a.n_tile + 7) / 8), (unsigned)n_block), dim3(128),
                    lin_many<F>::SHARED, a);
    }
}

/* What a launch takes from the matrix. */
static inline void lin_matrix(lin_args *a, const cuda_matrix *m) {
    a->w = m->data;
    a->mat_bytes = (int64_t)m->n_tile * m->n_unit * m->chunk_bytes;
    a->n_tile = m->n_tile;
    a->n_unit = m->n_unit;
    a->seg = seg_len(m->n_unit);
    a->factor = m->factor;
    a->n_row = (int)m->n_row;
    a->row0 = m->row0;
    a->map = m->map;
}

/* width: columns per block (lin_width); n_block: blocks of columns. */
template <lin_mode MODE> static void lin_launch(cuda_run *r, const cuda_matrix *m, lin_args a, int width, int n_block) {
    lin_matrix(&a, m);
    switch (m->form) {
    case CUDA_FORM_MXFP4:
        lin_launch_form<form_mxfp4, MODE>(r, a, width, n_block);
        break;
    case CUDA_FORM_MXFP4_FAR:
        lin_launch_form<form_mxfp4_far, MODE>(r, a, width, n_block);
        break;
    case CUDA_FORM_Q8_0:
        lin_launch_form<form_q8_0, MODE>(r, a, width, n_block);
        break;
    case CUDA_FORM_F16:
        lin_launch_form<form_f16<1>, MODE>(r, a, width, n_block);
        break;
    default:
        lin_launch_form<form_f16<2>, MODE>(r, a, width, n_block);
    }
}

#endif
