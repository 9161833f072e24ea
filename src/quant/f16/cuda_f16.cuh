/* quant/f16/cuda_f16.cuh: 16-bit weights for tensor cores. A chunk of 16 rows x 64 columns is 2048 bytes a plane:
 *
 *     [plane][column block 0, 1][row g, row g+8][lane][its eight columns] f16
 *
 * BF16 is multiplied by a power of two of the whole tensor, 2^8 unless its largest weight needs less: then weights from
 * 2^-25 to 255 are exact and smaller ones are rounded at 2^-33, below the noise of f32 sums. F16 has the power 1. F32
 * is the sum of two planes, 22 bits. The sums are multiplied by the inverse. */
#ifndef ORCD_QUANT_CUDA_F16_CUH
#define ORCD_QUANT_CUDA_F16_CUH

#include "quant/fragment.cuh"

template <int P> struct form_f16 {
    static constexpr int CHUNK = P * 2048;
    static constexpr int AHEAD = 2 / P;
    static constexpr bool SCALED = false; /* blocks have scales */
    static constexpr int STEPS = 4 * P;   /* products of 16 columns in a unit */

    struct raw {
        uint4 q[P][2][2];
    };

    static __device__ __forceinline__ raw load(const uint8_t *chunk, int lane) {
        raw r;
#pragma unroll
        for (int i = 0; i < P * 4; i++)
            r.q[i / 4][i / 2 % 2][i % 2] = ld_stream(chunk + i * 512 + lane * 16);
        return r;
    }
    static __device__ __forceinline__ raw load_shared(const uint8_t *chunk, int lane) {
        raw r;
#pragma unroll
        for (int i = 0; i < P * 4; i++)
            r.q[i / 4][i / 2 % 2][i % 2] = *(const uint4 *)(chunk + i * 512 + lane * 16);
        return r;
    }

    struct frag {
        uint4 lo[P], hi[P];
    };
    static __device__ __forceinline__ frag get(const raw &r, int i) {
        frag f;
#pragma unroll
        for (int p = 0; p < P; p++)
            f.lo[p] = r.q[p][i][0], f.hi[p] = r.q[p][i][1];
        return f;
    }
    static __device__ __forceinline__ void apply(float acc[4], const frag &f, uint4 b) {
#pragma unroll
        for (int p = 0; p < P; p++) {
            mma_f16(acc, f.lo[p].x, f.hi[p].x, f.lo[p].y, f.hi[p].y, b.x, b.y);
            mma_f16(acc, f.lo[p].z, f.hi[p].z, f.lo[p].w, f.hi[p].w, b.z, b.w);
        }
    }
    /* Operands of a unit. */
    static __device__ __forceinline__ void steps(const raw &r, uint32_t (&a)[STEPS][4]) {
#pragma unroll
        for (int i = 0; i < 2 * P; i++) {
            const uint4 lo = r.q[i % P][i / P][0], hi = r.q[i % P][i / P][1];
            a[2 * i][0] = lo.x, a[2 * i][1] = hi.x, a[2 * i][2] = lo.y, a[2 * i][3] = hi.y;
            a[2 * i + 1][0] = lo.z, a[2 * i + 1][1] = hi.z, a[2 * i + 1][2] = lo.w, a[2 * i + 1][3] = hi.w;
        }
    }
    template <int NT> static __device__ __forceinline__ void mma(const raw &w, const uint4 (*b)[2], float (*acc)[4]) {
        mma_unit<form_f16<P>, NT>(w, b, acc);
    }
};

/* One lane of one chunk from canonical rows of TYPE: F32 (0), F16 (1) or BF16 (30). power: see above; *big is set when
 * a weight times the power leaves f16. */
template <int P, int TYPE, class Rows>
static __device__ void pack_f16(uint8_t *chunk, int lane, const Rows &row, int64_t col0, int64_t n_col, float power,
                                int *big) {
    const int g = lane >> 2, t = lane & 3;
    for (int p = 0; p < P; p++)
        for (int q = 0; q < 4; q++) {
            const uint8_t *src = row(g + q % 2 * 8);
            __half *dst = (__half *)(chunk + (p * 4 + q) * 512 + lane * 16);
            for (int k = 0; k < 8; k++) {
                const int64_t c = col0 + q / 2 * 32 + 8 * t + k;
                float v = 0;
                if (src && c < n_col)
                    v = TYPE == 0   ? ((const float *)src)[c]
                        : TYPE == 1 ? __half2float(((const __half *)src)[c])
                                    : __uint_as_float((uint32_t)((const uint16_t *)src)[c] << 16);
                v *= power;
                if (fabsf(v) > 65504.f)
                    *big = 1;
                if (p)
                    v -= __half2float(__float2half_rn(v));
                dst[k] = __float2half_rn(v);
            }
        }
}

#endif
