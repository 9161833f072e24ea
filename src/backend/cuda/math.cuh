/* backend/cuda/math.cuh: arithmetic that several kernels must do alike to the last bit. */
#ifndef ORCD_BACKEND_CUDA_MATH_CUH
#define ORCD_BACKEND_CUDA_MATH_CUH

#include "quant/fragment.cuh"

#include <math.h>

#define ROW_THREADS 512 /* of a block that walks a whole row */

/* Sum over a block of ROW_THREADS: butterflies in each warp, the 16 warps' sums ascending. part: [16] shared; one
 * barrier inside, and the caller must put one before part is used again. */
static __device__ __forceinline__ float row_sum(float s, float *part) {
    s = warp_sum(s);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = s;
    __syncthreads();
    s = part[0];
#pragma unroll
    for (int w = 1; w < ROW_THREADS / 32; w++)
        s += part[w];
    return s;
}

/* A thread's squares of a row: float4 number i, i + 512, ... (n a multiple of 4 is padded with zeros by the caller). */
static __device__ __forceinline__ float sum_sq4(float4 v, float s) {
    return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, s))));
}

static __device__ __forceinline__ float rms_scale(float sum_sq, int n, float eps) { return rsqrtf(sum_sq / n + eps); }

/* RoPE's rotation of (d, d + head_dim / 2); cs: cos, sin. */
static __device__ __forceinline__ void rotate(float &lo, float &hi, float2 cs) {
    const float a = fmaf(lo, cs.x, -__fmul_rn(hi, cs.y));
    hi = fmaf(hi, cs.x, __fmul_rn(lo, cs.y));
    lo = a;
}

/* gpt-oss's clamped SwiGLU; NaN stays NaN, which fminf would lose. */
static __device__ __forceinline__ float glu(float g, float u, float alpha, float limit) {
    g = g > limit ? limit : g;
    u = u > limit ? limit : u < -limit ? -limit : u;
    return __fdividef(g, 1.f + __expf(-alpha * g)) * (u + 1.f);
}

/* Softmax in base 2 over parts of the keys: the running maximum m, the sum l and one output o. */
static __device__ __forceinline__ void soft_merge(float &m, float &l, float pm, float pl, float &a, float &b) {
    const float n = fmaxf(m, pm);
    a = exp2f(m - n);
    b = exp2f(pm - n);
    l = fmaf(l, a, pl * b);
    m = n;
}

#endif
